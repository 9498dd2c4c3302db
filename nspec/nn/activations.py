"""What fc1 of a specialised pair returns: its activations, not computed yet, which only ReLU and fc2 know how to take.

A Transformer layer computes ``fc2(relu(fc1(x)))`` in its own code. Under a task fc1 returns a value that stands for the
activations; ReLU marks it; the linear layer that takes it computes the whole compact block at once. Everything else that
the layer does to it is an error that names the operation, in every pass, compiled ones too: dropout that drops, another
activation, a hook that changes something, an adapter. Nothing is kept on a module between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELU_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)
_DROPOUT = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
    torch.alpha_dropout,
)


class Activations:
    """The activations ``[..., d_ff]`` of a layer under a task, as a value that is computed when fc2 takes it.

    It has the shape, dtype and device that the activations would have, takes part in ``torch`` functions through
    ``__torch_function__``, and survives ReLU, dropout that does nothing, and moves to where it is already.

    Args:
        fc1: the layer, which computes the block.
        use: its active set and, for a batch of several tasks, the batch.
        inputs: what the layer read: ``x [..., d_in]``, weight and bias.
        rectified: whether ReLU has been applied.

    Attributes:
        dtype: the dtype that fc1 would compute in.
        grad: whether gradients were on where fc1 ran.
        autocast: the dtype of autocast there; None outside of it.
        versions: of the inputs.
    """

    def __init__(self, fc1: Any, use: tuple[Any, Any], inputs: tuple[Tensor, Tensor, Tensor | None], rectified: bool):
        self.fc1, self.use, self.inputs, self.rectified = fc1, use, inputs, rectified
        self.dtype, device = inputs[0].dtype, inputs[0].device.type
        self.grad = torch.is_grad_enabled()
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if self.autocast is not None and self.dtype != torch.float64:
            self.dtype = self.autocast
        self.versions = _versions(inputs)

    def copy(self) -> Activations:
        """Another value that stands for the same activations."""
        other = Activations(self.fc1, self.use, self.inputs, self.rectified)
        other.dtype, other.grad, other.autocast, other.versions = self.dtype, self.grad, self.autocast, self.versions
        return other

    def check(self) -> None:
        """Whether the activations are still what fc1 would have computed: they are computed when fc2 takes them.

        Raises:
            ValueError: gradients or autocast were switched since, or what fc1 read was changed in place.
        """
        device = self.inputs[0].device.type
        if torch.is_grad_enabled() != self.grad:
            self.refuse(f"it switches gradients {'off' if self.grad else 'on'} between the two")
        if (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None) != self.autocast:
            self.refuse("it switches autocast between the two")
        if _versions(self.inputs) != self.versions:
            self.refuse("it changes the input or a parameter of fc1 in place between the two")

    @property
    def shape(self) -> torch.Size:
        """``[..., d_ff]``."""
        return torch.Size((*self.inputs[0].shape[:-1], self.inputs[1].shape[0]))

    @property
    def device(self) -> torch.device:
        """The device of fc1's input."""
        return self.inputs[0].device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.inputs[0].dim()

    @property
    def is_nested(self) -> bool:
        """False: nested tensors are not taken."""
        return False

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient would flow into what fc1 read."""
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
        """True."""
        return True

    def relu(self) -> Activations:
        """The same with ReLU applied."""
        return self.copy().relu_()

    def relu_(self) -> Activations:
        """ReLU in place."""
        self.check()
        self.rectified = True
        return self

    def contiguous(self, **_: Any) -> Activations:
        """Itself."""
        return self

    def clone(self, **_: Any) -> Activations:
        """Another value, which ReLU in place on this one does not change."""
        return self.copy()

    def to(self, *args: Any, **kwargs: Any) -> Activations:
        """Itself, where it has that dtype and device.

        Under autocast the next layer casts back what is widened here, so that this changes nothing either.

        Raises:
            ValueError: another dtype or device.
        """
        wanted, result = [*args, kwargs.get("device"), kwargs.get("dtype")], self
        for value in wanted:
            other = value.dtype if isinstance(value, (Tensor, Activations)) else value
            if isinstance(other, torch.dtype) and other != self.dtype:
                if self.autocast is None or other != torch.float32:
                    self.refuse(f"to({other}), of activations in {self.dtype}")
                result = self.copy()
                result.dtype = other
            if isinstance(other, (str, int, torch.device)) and not isinstance(other, bool):
                device = torch.device(other)
                if device.type != self.device.type or device.index not in (None, self.device.index):
                    self.refuse(f"to({device}), of activations on {self.device}")
        return result.copy() if kwargs.get("copy") else result

    def type_as(self, other: Any) -> Activations:
        """Itself, where ``other`` has its dtype and device."""
        return self.to(other.device, other.dtype)

    def refuse(self, operation: str) -> NoReturn:
        """Raises ValueError for an operation that the active neurons alone do not determine."""
        raise ValueError(
            f"{self.fc1.qualified_name}: what the layer does between fc1 and fc2 is not ReLU alone: {operation}. Mode "
            "'forward' needs ReLU, an activation dropout of 0, and nothing else there (no hook or adapter that reads or "
            "changes activations): take it out, or use mode='update'"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        value: Any = args[0] if args else kwargs.get("input")
        if not isinstance(value, cls):
            _first((*args, *kwargs.values())).refuse(f"it calls {function.__name__}")
        if function in _RELU:
            inplace = function in _RELU_IN_PLACE or kwargs.get("inplace", len(args) > 1 and args[1])
            return value.relu_() if inplace else value.relu()
        if function in _DROPOUT:
            rate, training = _dropout(args, kwargs)
            if rate > 0 and training:
                value.refuse(
                    f"it drops activations out, p={rate} ({function.__name__}); nspec.specialize with "
                    "activation_dropout=0 sets that to 0 in layers whose dropout it knows"
                )
            return value
        return value.refuse(f"it calls {function.__name__}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Activations' object has no attribute {name!r}")
        if callable(getattr(Tensor, name)):
            return lambda *args, **kwargs: self.refuse(f"it calls Tensor.{name}")
        return self.refuse(f"it reads Tensor.{name}")

    def __repr__(self) -> str:
        return f"Activations({self.fc1.qualified_name}, shape={list(self.shape)}, rectified={self.rectified})"


def _linear(h: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(h, Activations):
        _first((h, weight, bias)).refuse("it calls linear with them as weights")
    if isinstance(weight, Activations) or isinstance(bias, Activations):
        h.refuse("it calls linear with them as weights")
    if not h.rectified:
        h.refuse("it hands them to fc2 without one")
    if weight.dim() != 2 or weight.shape[1] != h.shape[-1]:
        h.refuse(f"it calls linear with a weight of shape {list(weight.shape)}, expected [d_out, {h.shape[-1]}]")
    h.check()
    y: Tensor = h.fc1.block(h, weight, bias)
    return y


def _versions(tensors: Any) -> tuple[int, ...]:
    """How often each tensor was written to; tensors of inference mode do not count it, nor do compiled graphs."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, bool]:
    """The rate and whether it is applied, of a call of one of ``_DROPOUT``: all take (input, p=0.5, training)."""
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(rate), bool(training)


def _first(values: Any) -> Any:
    """The first of the values, or of what a list among them holds, that is an ``Activations``."""
    for value in values:
        if isinstance(value, Activations):
            return value
        if isinstance(value, (list, tuple)) and (found := _first(value)) is not None:
            return found
    return None


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Activations, *_: Any) -> NoReturn:
        self.refuse(f"it calls Tensor.{name}")

    return method


# Python looks operators up on the class, not through __getattr__.
for _operator in (
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv", "floordiv",
    "rfloordiv", "mod", "rmod", "pow", "rpow", "ipow", "matmul", "rmatmul", "neg", "pos", "abs", "invert", "and", "rand",
    "or", "ror", "xor", "rxor", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len", "iter", "bool", "float",
    "int", "index", "contains", "array",
):  # fmt: skip
    setattr(Activations, f"__{_operator}__", _refusing(f"__{_operator}__"))
Activations.__hash__ = object.__hash__  # type: ignore[method-assign]  # a class with __eq__ has none of its own
