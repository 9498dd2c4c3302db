"""What fc1 of a specialised block returns: its activations, of which only the active columns are computed.

A Transformer layer computes ``fc2(f(fc1(x)))``, or ``fc2(f(gate(x)) * up(x))``, in its own code. Under a task fc1 returns
a value that stands for the activations. It holds the active columns, and the constant of each of the other neurons: with
its row masked a neuron's output is f of its bias, for every token. PyTorch applies each elementwise function to both
parts, with their gradients, whatever the function is; fc2 takes the value and multiplies the active columns. ReLU right
behind fc1 is not computed but noted: fc2 then computes the whole block with one operator.

What is not elementwise (a norm, a softmax, another order of columns, a product with another tensor) is an error that names
the operation, in every pass, compiled ones too. Nothing is kept on a module between the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from nspec.kernels.gated_activation import gated_activation

from .elementwise import judge

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELU_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)
_DROPOUT = (F.dropout, torch.dropout)
_OTHER_DROPOUT = (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout) + (
    torch.feature_dropout,
    torch.alpha_dropout,
)
_LINEAR = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_SHAPES = (torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten)
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_ALIASES = (torch.detach, Tensor.detach)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


class Activations:
    """The activations ``[..., d_ff]`` of a layer under a task, of which the active columns alone are computed.

    It has the shape, dtype and device that the activations would have, and takes part in ``torch`` functions through
    ``__torch_function__``. It begins as what fc1 is to compute; the first function that is not ReLU has it computed.

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
        grad: whether gradients were on where fc1 ran.
        autocast: the dtype of autocast there; None outside of it. Before it is computed only.
        versions: of the inputs. Before it is computed only.
    """

    active: Tensor | None = None
    constant: Tensor | float = 0.0
    pending: str | None = None
    views: list[Activations] | None = None
    stale: bool = False

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

    def copy(self) -> Activations:
        """Another value that stands for the same activations."""
        other = Activations.__new__(Activations)
        other.fc1, other.use, other.inputs, other.rectified = self.fc1, self.use, self.inputs, self.rectified
        other.lead, other.width, other._dtype, other.grad = self.lead, self.width, self._dtype, self.grad
        other.autocast, other.versions = self.autocast, self.versions
        other.active, other.constant, other.pending = self.active, self.constant, self.pending
        return other

    def of(self, active: Tensor, constant: Tensor | float) -> Activations:
        """The value with other parts."""
        other = self.copy()
        other.active, other.constant, other.pending = active, constant, None
        return other

    def check(self) -> None:
        """Whether the activations are still what fc1 would have computed: they are computed when they are taken.

        Raises:
            ValueError: gradients or autocast were switched since, or what fc1 read was changed in place.
        """
        if torch.is_grad_enabled() != self.grad:
            self.refuse(f"it switches gradients {'off' if self.grad else 'on'} between the two")
        if self.stale:
            self.refuse("it uses them after another view of them was changed in place")
        if self.active is not None:
            return
        device = self.inputs[0].device.type
        if (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None) != self.autocast:
            self.refuse("it switches autocast between the two")
        if _versions(self.inputs) != self.versions:
            self.refuse("it changes the input or a parameter of fc1 in place between the two")

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
            self.active, self.pending = _applied(self.pending, self.active), None
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

    def relu(self) -> Activations:
        """The same with ReLU applied."""
        return self.copy().relu_() if self.active is None else elementwise(torch.relu, (self,), {})

    def relu_(self) -> Activations:
        """ReLU in place."""
        if self.active is not None:
            return elementwise(torch.relu_, (self,), {})
        if torch.is_grad_enabled() != self.grad:
            self.check()
        self.changed()
        self.rectified = True
        return self

    def changed(self) -> None:
        """Notes that it is changed in place: its views are not what they were."""
        for view in self.views or ():
            view.stale = view is not self

    def contiguous(self, **_: Any) -> Activations:
        """Itself."""
        return self

    def clone(self, **_: Any) -> Activations:
        """Another value, which a function in place on this one does not change."""
        return self.copy()

    def view(self, *shape: Any) -> Activations:
        """The same with other leading dimensions.

        Raises:
            ValueError: the last dimension would not be that of the neurons.
        """
        return _reshaped(self, shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)

    def reshape(self, *shape: Any) -> Activations:
        """See :meth:`view`."""
        return self.view(*shape)

    def to(self, *args: Any, **kwargs: Any) -> Activations:
        """The same in another dtype; the device must be theirs.

        Under autocast the next layer casts back what is widened here, so that ReLU's are not computed for that.

        Raises:
            ValueError: another device.
        """
        wanted, result = [*args, kwargs.get("device"), kwargs.get("dtype")], self
        for value in wanted:
            if isinstance(value, (Tensor, Activations)):
                result = result.to(value.device, value.dtype)
            elif isinstance(value, torch.dtype) and value != result.dtype:
                if result.active is None and result.autocast is not None and value == torch.float32:
                    result = result.copy()
                    result._dtype = value
                else:
                    result = elementwise(Tensor.to, (result, value), {})
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                device = torch.device(value)
                if device.type != self.device.type or device.index not in (None, self.device.index):
                    self.refuse(f"to({device}), of activations on {self.device}")
        return result.copy() if kwargs.get("copy") else result

    def type_as(self, other: Any) -> Activations:
        """The same in the dtype of ``other``, which must be on the same device."""
        return self.to(other.device, other.dtype)

    def float(self) -> Activations:
        """The same in float32."""
        return self.to(torch.float32)

    def refuse(self, operation: str) -> NoReturn:
        """Raises ValueError for an operation that the active neurons alone do not determine."""
        raise ValueError(
            f"{self.fc1.qualified_name}: what the layer does between fc1 and fc2 is not elementwise: {operation}. Mode "
            "'forward' computes the active neurons alone, and needs functions that compute each activation from itself, "
            "and nothing else there (no norm, adapter or hook that mixes or reads activations): take it out, or use "
            "mode='update'"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        if function in _RELU and isinstance(args[0] if args else None, Activations) and args[0].active is None:
            inplace = function in _RELU_IN_PLACE or kwargs.get("inplace", len(args) > 1 and args[1])
            return args[0].relu_() if inplace else args[0].relu()
        return _call(function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Activations' object has no attribute {name!r}")
        if callable(getattr(Tensor, name)):
            return functools.partial(_method, self, name)
        return self.refuse(f"it reads Tensor.{name}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fc1.qualified_name}, shape={list(self.shape)}, rectified={self.rectified})"


class GateAndUp(Activations):
    """What a fused projection of a gated block returns, ``[..., 2 d_ff]``: the gate and behind it the other half.

    It is to be taken apart: ``chunk(2, -1)``, ``split(d_ff, -1)``, ``[..., :d_ff]`` and ``[..., d_ff:]``.

    Args:
        gate: the first half.
        up: the second.
    """

    def __init__(self, gate: Activations, up: Activations) -> None:
        self.fc1, self.use, self.inputs, self.rectified = gate.fc1, gate.use, gate.inputs, False
        self.lead, self.width, self._dtype, self.grad = gate.lead, 2 * gate.width, gate.dtype, gate.grad
        self.autocast, self.versions = gate.autocast, ()
        self.halves = gate, up

    def take(self, function: str, of: Any, dim: Any) -> Any:
        """The halves, of ``chunk`` and its kin."""
        half = self.width // 2
        fits = of == 2 if function == "chunk" else of in (half, [half, half], (half, half))
        if dim not in (-1, self.ndim - 1) or not fits:
            self.refuse(f"it calls {function}({of}, dim={dim}), expected the two halves of gate and up")
        return self.halves

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """The two halves."""
        return self.take("chunk", chunks, dim)

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """The two halves."""
        return self.take("split", split_size, dim)

    def __getitem__(self, key: Any) -> Activations:
        half = self.width // 2
        last = key[-1] if isinstance(key, tuple) and len(key) == 2 and key[0] is Ellipsis else None
        if isinstance(last, slice) and last.step in (None, 1):
            if last.start in (None, 0) and last.stop == half:
                return self.halves[0]
            if last.start == half and last.stop in (None, self.width):
                return self.halves[1]
        return self.refuse("it takes a part that is neither gate nor up")

    def copy(self) -> Activations:
        """Another value that stands for the same."""
        return GateAndUp(*(half.copy() for half in self.halves))

    def view(self, *shape: Any) -> Activations:
        """The same with other leading dimensions."""
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        if sizes[-1] != self.width:
            self.refuse(f"it reshapes {list(self.shape)} to {sizes}, expected {self.width} at its end")
        return GateAndUp(*(half.view(*sizes[:-1], self.width // 2) for half in self.halves))

    def relu_(self) -> Activations:
        """Refuses."""
        return self.refuse("it calls relu on gate and up before it takes them apart")

    def relu(self) -> Activations:
        """Refuses."""
        return self.relu_()

    def compute(self) -> Tensor:
        """Refuses: the halves are what is computed."""
        return self.refuse("it uses gate and up before it takes them apart")


def _method(value: Activations, name: str, *args: Any, **kwargs: Any) -> Any:
    return _call(getattr(Tensor, name), (value, *args), kwargs, f"Tensor.{name}")


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None) -> Any:
    """A function of PyTorch with a value among its arguments."""
    value = args[0] if args else kwargs.get("input")
    if function in _DROPOUT or function in _OTHER_DROPOUT:
        return _dropped(function, value, args, kwargs)
    if function in _LINEAR and len(args) == 2 and isinstance(value, Activations):
        return _product(value, args[1])
    if function is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[1], Activations):
        return _linear(args[1], args[2].t(), args[0])
    if function in _SHAPES and isinstance(value, Activations):
        if function in (torch.flatten, Tensor.flatten):
            return _flattened(value, *args[1:], **kwargs)
        return value.view(*args[1:], *kwargs.values())
    if isinstance(value, GateAndUp) and function in (torch.chunk, torch.split, torch.Tensor.chunk, Tensor.split):
        return getattr(value, function.__name__)(*args[1:], **kwargs)
    return elementwise(function, args, kwargs, name)


def elementwise(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
) -> Activations:
    """An elementwise function of values of one block, numbers and tensors with one element.

    Raises:
        ValueError: it is not elementwise, or takes other tensors.
    """
    values = [one for one in (*args, *kwargs.values()) if isinstance(one, Activations)]
    shown = name or str(getattr(function, "__name__", None) or function)
    first: Any = values[0] if values else _first((*args, *kwargs.values()))
    if len(values) > 1 and (fused := _gated(function, values, args, kwargs)) is not None:
        return fused
    if not values:
        first.refuse(f"it calls {shown}")
    for other in values[1:]:
        if not _of_one_pass(first, other) or other.shape != first.shape:
            first.refuse(f"it calls {shown} with activations of {other.fc1.qualified_name} in another pass or shape")
    for one in values:
        one.compute()
    # Constants that are numbers are computed with the verdict, and kept with it.
    known = all(not isinstance(one, Tensor) for one in (*args, *kwargs.values(), *(one.constant for one in values)))
    slots = tuple(_slot(one, first, shown, known) for one in args)
    keywords = tuple((key, _slot(one, first, shown, known)) for key, one in kwargs.items())
    refused, in_place, constant = judge(function, slots, keywords)
    if refused is not None:
        first.refuse(f"it calls {shown}" + ("" if refused.rpartition(".")[2] == shown else f" ({refused})"))
    if first.fc1.gated and (kind := _kind(function, args, kwargs)) is not None and first.dtype.is_floating_point:
        result = first.copy()
        result.pending = kind
    else:
        copied = [one.active.clone() if in_place and one is first else one.active for one in values]
        result = first.of(_with(function, args, kwargs, values, copied), constant)
    result.constant = constant
    if not known:
        constants = [_tensor(one.constant, one.dtype) for one in values]
        if in_place:
            constants[0] = constants[0].clone()
        result.constant = _with(function, args, kwargs, values, constants)
        if result.constant.dim() and result.constant.numel() == 1:
            result.constant = result.constant.reshape(())
    if function in _ALIASES:
        _as_views(first, result)
    if in_place:
        first.changed()
        first.active, first.constant, first.pending = result.active, result.constant, None
        return first
    return result


def _of_one_pass(one: Activations, other: Activations) -> bool:
    """Whether two values are of one block, and of one task or batch (an equal one where a pass is computed again)."""
    (active, batch), (its, others) = one.use, other.use
    return active is its and (batch is others or (not torch.compiler.is_compiling() and batch == others))


def _tensor(constant: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A constant as a tensor; a number stays on the CPU."""
    return constant if isinstance(constant, Tensor) else torch.full((), constant, dtype=dtype)


def _with(function: Any, args: Any, kwargs: Any, values: list[Activations], parts: list[Any]) -> Any:
    """The call with a part of each value in its place."""
    rest = iter(parts)
    put = lambda one: next(rest) if isinstance(one, Activations) else one
    return function(*[put(one) for one in args], **{key: put(one) for key, one in kwargs.items()})


def _slot(one: Any, value: Activations, function: str, known: bool) -> tuple[Any, ...]:
    """An argument as :func:`judge` takes it."""
    if isinstance(one, Activations):
        return "value", one.dtype, one.constant if known else None
    if isinstance(one, Tensor):
        if one.numel() != 1:
            value.refuse(f"it calls {function} with another tensor, of shape {list(one.shape)}")
        return "scalar", one.dtype
    if isinstance(one, (list, tuple)):
        value.refuse(f"it calls {function}")
    return "is", one


def _kind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Which activation of the fused product a call is: None for others."""
    if len(args) != 1:
        return None
    if function is F.silu or function is torch._C._nn.silu:
        return None if kwargs.get("inplace") else "silu"
    if function is F.gelu:
        return _GELUS.get(kwargs.get("approximate", "none"))
    if function in (F.relu, torch.relu, Tensor.relu):
        return None if kwargs.get("inplace") else "relu"
    return None


def _applied(kind: str, z: Tensor) -> Tensor:
    if kind == "silu":
        return F.silu(z)
    if kind == "relu":
        return torch.relu(z)
    return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")


def _gated(
    function: Any, values: list[Activations], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Activations | None:
    """The product of both halves of a gated block, where one has an activation that is to be applied yet."""
    if function not in _PRODUCTS or len(args) != 2 or kwargs or len(values) != 2:
        return None
    gate, up = values if values[0].pending is not None else values[::-1]
    if gate.pending is None or up is gate or not _of_one_pass(gate, up):
        return None
    kind, z, other = gate.pending, gate.active, up.compute()
    assert z is not None
    if gate.shape != up.shape or z.dtype != other.dtype:
        return None
    gate.check()
    return gate.of(gated_activation(z, other, kind), gate.constant * up.constant)


def _dropped(function: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activations:
    """Dropout: what does nothing passes; one that drops does where the other neurons are 0, and stay so."""
    if not isinstance(value, Activations):
        _first((*args, *kwargs.values())).refuse(f"it calls {function.__name__}")
    rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))
    if rate <= 0 or not training:
        return value
    active = value.compute()
    if isinstance(value.constant, Tensor) or value.constant != 0 or function not in _DROPOUT:
        value.refuse(
            f"it drops activations out, p={rate} ({function.__name__}), and neurons that are not active give constants; "
            "nspec.specialize with activation_dropout=0 sets that to 0 in layers whose dropout it knows"
        )
    result = value.of(F.dropout(active, rate, True), 0.0)
    if kwargs.get("inplace", len(args) > 3 and args[3]):
        value.changed()
        value.active = result.active
        return value
    return result


def _linear(h: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(h, Activations) or isinstance(weight, Activations) or isinstance(bias, Activations):
        _first((h, weight, bias)).refuse("it calls linear with them as weights")
    if weight.dim() != 2 or weight.shape[1] != h.width:
        h.refuse(f"it calls linear with a weight of shape {list(weight.shape)}, expected [d_out, {h.width}]")
    y: Tensor = h.fc1.block(h, weight, bias)
    return y


def _product(h: Activations, other: Any) -> Tensor:
    """``h @ weight.T``, as some models write fc2."""
    if not isinstance(other, Tensor) or other.dim() != 2:
        h.refuse("it calls matmul with something else than the weight of fc2")
    return _linear(h, other.t())


def _reshaped(value: Activations, shape: Any) -> Activations:
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
    _as_views(value, other)
    return other


def _as_views(value: Activations, other: Activations) -> None:
    value.views = other.views = [*(value.views or [value]), other]


def _flattened(value: Activations, start_dim: int = 0, end_dim: int = -1) -> Activations:
    sizes, last = list(value.shape), value.ndim - 1
    start, end = start_dim % (last + 1), end_dim % (last + 1)
    if end == last and start != end:
        value.refuse(f"it calls flatten({start_dim}, {end_dim}), which mixes neurons")
    return _reshaped(value, [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]])


def _versions(tensors: Any) -> tuple[int, ...]:
    """How often each tensor was written to; tensors of inference mode do not count it, nor do compiled graphs."""
    if torch.compiler.is_compiling():
        return ()
    x, weight, bias = tensors
    try:
        return x._version, weight._version, -1 if bias is None else bias._version
    except RuntimeError:
        return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def _first(values: Any) -> Any:
    """The first of the values, or of what a list among them holds, that is an ``Activations``."""
    for value in values:
        if isinstance(value, Activations):
            return value
        if isinstance(value, (list, tuple)) and (found := _first(value)) is not None:
            return found
    return None


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: Activations, *others: Any) -> Any:
        return _call(function, (self, *others), {}, name)

    return method


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Activations, *_: Any) -> NoReturn:
        self.refuse(f"it calls Tensor.{name}")

    return method


# Python looks operators up on the class, not through __getattr__.
for _name in (
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv", "floordiv",
    "rfloordiv", "mod", "rmod", "pow", "rpow", "ipow", "neg", "pos", "abs", "invert", "and", "rand", "or", "ror", "xor",
    "rxor", "lt", "le", "gt", "ge", "eq", "ne", "matmul",
):  # fmt: skip
    setattr(Activations, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("rmatmul", "getitem", "setitem", "len", "iter", "bool", "float", "int", "index", "contains", "array"):
    setattr(Activations, f"__{_name}__", _refusing(f"__{_name}__"))
Activations.__hash__ = object.__hash__  # type: ignore[method-assign]  # a class with __eq__ has none of its own
