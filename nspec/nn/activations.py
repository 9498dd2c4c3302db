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
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .functions import call, elementwise, linear
from .values import Value

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELU_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)


class Activations(Value):
    """The value, as the layer's own code uses it: it takes part in functions through ``__torch_function__``."""

    def relu(self) -> Activations:
        """The same with ReLU applied."""
        return self.copy().relu_() if self.active is None else elementwise(torch.relu, (self,), {})

    def relu_(self) -> Activations:
        """ReLU in place."""
        if self.active is not None:
            return elementwise(torch.relu_, (self,), {})
        self.check_grad()
        self.changed()
        self.rectified = True
        return self

    def contiguous(self, **_: Any) -> Activations:
        """Itself."""
        self.check_grad()
        return self

    def clone(self, **_: Any) -> Activations:
        """Another value, which a function in place on this one does not change."""
        self.check_grad()
        return self.copy()

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

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return linear(*args, **kwargs)
        if function in _RELU and isinstance(args[0] if args else None, Activations) and args[0].active is None:
            inplace = function in _RELU_IN_PLACE or kwargs.get("inplace", len(args) > 1 and args[1])
            return args[0].relu_() if inplace else args[0].relu()
        return call(function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Activations' object has no attribute {name!r}")
        if callable(getattr(Tensor, name)):
            return functools.partial(_method, self, name)
        return self.refuse(f"it reads Tensor.{name}")


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
        self.halves: tuple[Activations, Activations] = (gate, up)

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

    def copy(self) -> GateAndUp:
        """Another value that stands for the same."""
        return GateAndUp(*(half.copy() for half in self.halves))

    def view(self, *shape: Any) -> GateAndUp:
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
    return call(getattr(Tensor, name), (value, *args), kwargs, f"Tensor.{name}")


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: Activations, *others: Any) -> Any:
        return call(function, (self, *others), {}, name)

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
