"""The value that stands for the activations of a specialised block: its parts, and what they are checked for."""

from __future__ import annotations

import math
import sys
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

V = TypeVar("V", bound="Value")


class Value:
    """The activations ``[..., d_ff]`` of a layer under a task, of which the active columns alone are computed.

    It has the shape, dtype and device that the activations would have. It begins as what fc1 is to compute; the first
    function that is not ReLU has it computed.

    Args:
        fc1: the layer, which computes the block.
        use: its active set and, for a batch of several tasks, the batch.
        inputs: what the layer read: ``x [..., d_in]``, weight ``[d_ff, d_in]`` and bias.
        rectified: whether ReLU has been applied.

    Attributes:
        lead: the leading shape, ``[...]``.
        active: the active columns, ``[..., width]`` in the layout of the set's index; ``[tokens, width]``, sorted by task,
            for a batch of several. None before they are computed.
        constant: the activation of each neuron where it is not active, ``[d_ff]``; a number, which nothing has to wait for,
            where that is the same for all (no biases).
        pending: an activation function that is still to be applied to ``active``, for the product with the other half of
            a gated block.
        views: this value and those that view it in another shape, of which a function in place changes one.
        stale: whether another of the views was changed so.
        halves: gate and up, where it stands for both behind one another; else None.
        grad: whether gradients were on where fc1 ran.
        autocast: the dtype of autocast there; None outside of it. Before it is computed only.
        versions: of the inputs; empty where nothing counts them, and fc1 gave copies. Before it is computed only, and of
            the bias as long as it is the constant.
    """

    active: Tensor | None = None
    constant: Tensor | float = 0.0
    pending: str | None = None
    views: list[Any] | None = None
    stale: bool = False
    halves: Any = None

    def __init__(self, fc1: Any, use: tuple[Any, Any], inputs: tuple[Tensor, Tensor, Tensor | None], rectified: bool):
        x, weight, _ = inputs
        self.fc1, self.use, self.inputs, self.rectified = fc1, use, inputs, rectified
        self.lead, self.width = x.shape[:-1], weight.shape[0]
        self._dtype, device = x.dtype, x.device.type
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if self.autocast is not None and self._dtype != torch.float64:
            self._dtype = self.autocast
        self.versions = _versions(inputs)

    def copy(self: V) -> V:
        """Another value that stands for the same activations."""
        other = object.__new__(type(self))
        other.fc1, other.use, other.inputs, other.rectified = self.fc1, self.use, self.inputs, self.rectified
        other.lead, other.width, other._dtype, other.grad = self.lead, self.width, self._dtype, self.grad
        other.autocast, other.versions = self.autocast, self.versions
        other.active, other.constant, other.pending = self.active, self.constant, self.pending
        return other

    def of(self: V, active: Tensor, constant: Tensor | float) -> V:
        """The value with other parts."""
        other = self.copy()
        other.active, other.constant, other.pending = active, constant, None
        return other

    def check(self) -> None:
        """Whether the activations are still what fc1 would have computed: they are computed when they are taken.

        Raises:
            ValueError: gradients or autocast were switched since, or what fc1 read was changed in place.
        """
        self.check_grad()
        if self.stale:
            self.refuse("it uses them after another view of them was changed in place")
        if self.active is not None:
            if self.versions and self.constant is self.inputs[2] and _versions(self.inputs)[-1] != self.versions[-1]:
                self.refuse("it changes the bias of fc1 in place between the two")
            return
        device = self.inputs[0].device.type
        if (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None) != self.autocast:
            self.refuse("it switches autocast between the two")
        if self.versions and _versions(self.inputs) != self.versions:
            self.refuse("it changes the input or a parameter of fc1 in place between the two")

    def check_grad(self) -> None:
        """Whether gradients are on as they were where fc1 ran; see :meth:`check`."""
        if torch.is_grad_enabled() != self.grad:
            if (function := _autograd_function()) is not None:
                self.refuse(f"it gives them to {function}, a torch.autograd.Function, which takes tensors")
            self.refuse(f"it switches gradients {'off' if self.grad else 'on'} between the two")

    def compute(self) -> Tensor:
        """The active columns, with everything applied that was noted."""
        self.check()
        if self.active is None:
            active, self.constant = self.fc1.pre_activations(self)
            self._dtype = active.dtype
            if self.rectified:
                active = torch.relu(active)
                self.constant = torch.relu(self.constant) if isinstance(self.constant, Tensor) else self.constant
            self.active = active
        if self.pending is not None:
            self.active, self.pending = applied(self.pending, self.active), None
        return self.active

    @property
    def shape(self) -> torch.Size:
        """``[..., d_ff]``."""
        return torch.Size((*self.lead, self.width))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations: that in which fc1 would compute, to begin with."""
        return self._dtype if self.active is None else self.active.dtype

    @property
    def device(self) -> torch.device:
        """The device of fc1's input."""
        return self.inputs[0].device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.lead) + 1

    @property
    def is_nested(self) -> bool:
        """False: nested tensors are not taken."""
        return False

    @property
    def is_cuda(self) -> bool:
        """Whether they are on a GPU."""
        return self.device.type == "cuda"

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient would flow into what fc1 read."""
        if self.active is not None:
            return self.active.requires_grad
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.inputs)

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of activations."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the dtype is one of numbers with a point."""
        return self.dtype.is_floating_point

    def changed(self) -> None:
        """Notes that it is changed in place: its views are not what they were."""
        for view in self.views or ():
            view.stale = view is not self

    def view(self: V, *shape: Any) -> V:
        """The same with other leading dimensions.

        Raises:
            ValueError: the last dimension would not be that of the neurons.
        """
        self.check_grad()
        return reshaped(self, shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)

    def reshape(self: V, *shape: Any) -> V:
        """See :meth:`view`."""
        return self.view(*shape)

    def refuse(self, operation: str) -> NoReturn:
        """Raises ValueError for an operation that the active neurons alone do not determine."""
        raise ValueError(
            f"{self.fc1.qualified_name}: what the layer does between fc1 and fc2 is not elementwise: {operation}. Mode "
            "'forward' computes the active neurons alone, and needs functions that compute each activation from itself, "
            "and nothing else there (no norm, adapter or hook that mixes or reads activations): take it out, or use "
            "mode='update'"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fc1.qualified_name}, shape={list(self.shape)}, rectified={self.rectified})"


def applied(kind: str, z: Tensor) -> Tensor:
    if kind == "silu":
        return F.silu(z)
    if kind == "relu":
        return torch.relu(z)
    return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")


def reshaped(value: V, shape: Any) -> V:
    """The value with other leading dimensions; -1 once, as in PyTorch."""
    sizes = list(shape)
    if not sizes or not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
        value.refuse("it views them as another dtype")
    tokens, lead = math.prod(value.lead), sizes[:-1]
    if sizes[-1] == -1 and -1 not in lead and math.prod(lead) == tokens:
        sizes[-1] = value.width
    if sizes[-1] != value.width:
        value.refuse(f"it reshapes {list(value.shape)} to {list(shape)}, which mixes neurons")
    if -1 in lead:
        known = -math.prod(lead)
        lead[lead.index(-1)] = tokens // known if known != 0 else 0
    other = value.copy()
    other.lead = torch.Size(lead)
    if other.active is not None and other.use[1] is None:
        other.active = other.active.reshape(*lead, other.active.shape[-1])
    as_views(value, other)
    return other


def as_views(value: Value, other: Value) -> None:
    value.views = other.views = [*(value.views or [value]), other]


def flattened(value: V, start_dim: int = 0, end_dim: int = -1) -> V:
    sizes, last = list(value.shape), value.ndim - 1
    start, end = start_dim % (last + 1), end_dim % (last + 1)
    if end == last and start != end:
        value.refuse(f"it calls flatten({start_dim}, {end_dim}), which mixes neurons")
    return reshaped(value, [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]])


def _autograd_function() -> str | None:
    """The name of the ``torch.autograd.Function`` whose forward is running, where one is."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        for value in frame.f_locals.values() if frame.f_code.co_name == "forward" else ():
            if isinstance(value, torch.autograd.function.BackwardCFunction):
                return str(type(value)._forward_cls.__name__)  # type: ignore[attr-defined]
        frame = frame.f_back
    return None


def _versions(tensors: Any) -> tuple[int, ...]:
    """How often each tensor was written to; tensors of inference mode do not count it, nor do compiled graphs."""
    if torch.compiler.is_compiling():
        return ()
    x, weight, bias = tensors
    try:
        return x._version, weight._version, -1 if bias is None else bias._version
    except RuntimeError:
        return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def first_of(values: Any) -> Any:
    """The first of the values, or of what a list among them holds, that is a ``Value``."""
    for value in values:
        if isinstance(value, Value):
            return value
        if isinstance(value, (list, tuple)) and (found := first_of(value)) is not None:
            return found
    return None
