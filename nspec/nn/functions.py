"""What functions of PyTorch do to the value that stands for the activations of a specialised block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nspec.kernels.gated_activation import gated_activation

from .elementwise import judge
from .transforms import in_transform
from .values import Value, as_views, first_of, flattened

_DROPOUT = (F.dropout, torch.dropout)
_OTHER_DROPOUT = (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout) + (
    torch.feature_dropout,
    torch.alpha_dropout,
)
_LINEAR = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_SHAPES = (torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten)
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_PARTS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)
_PRELUS = (torch.prelu, F.prelu, Tensor.prelu)
_ALIASES = (torch.detach, Tensor.detach)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None) -> Any:
    """A function of PyTorch with a value among its arguments."""
    if not args and "input" in kwargs and function in (*_SHAPES, *_PARTS):
        args, kwargs = (kwargs["input"],), {key: one for key, one in kwargs.items() if key != "input"}
    value = args[0] if args else kwargs.get("input")
    if function in _PRELUS and len(args) + len(kwargs) == 2:
        return _prelu(*args, **kwargs)
    if function in _DROPOUT or function in _OTHER_DROPOUT:
        return _dropped(function, value, args, kwargs)
    if function in _LINEAR and len(args) == 2 and isinstance(value, Value):
        return _product(value, args[1])
    if function is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[1], Value):
        return linear(args[1], args[2].t(), args[0])
    if function in _SHAPES and isinstance(value, Value):
        if function in (torch.flatten, Tensor.flatten):
            return flattened(value, *args[1:], **kwargs)
        return value.view(*args[1:], *kwargs.values())
    if isinstance(value, Value) and value.halves and function in _PARTS:
        return getattr(value, function.__name__)(*args[1:], **kwargs)
    return elementwise(function, args, kwargs, name)


def elementwise(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
) -> Any:
    """An elementwise function of values of one block, numbers and tensors with one element.

    Raises:
        ValueError: it is not elementwise, or takes other tensors.
    """
    values = [one for one in (*args, *kwargs.values()) if isinstance(one, Value)]
    shown = name or str(getattr(function, "__name__", None) or function)
    first: Any = values[0] if values else first_of((*args, *kwargs.values()))
    if len(values) > 1 and (fused := _gated(function, values, args, kwargs)) is not None:
        return fused
    if not values:
        first.refuse(f"it calls {shown}")
    for other in values[1:]:
        if not _of_one_pass(first, other) or other.shape != first.shape:
            first.refuse(f"it calls {shown} with activations of {other.fc1.qualified_name} in another pass or shape")
    for one in values:
        one.compute()
    # The active columns have fewer dimensions in a batch of several tasks; the constants always do.
    args = tuple(_flat(one, first) for one in args)
    kwargs = {key: _flat(one, first) for key, one in kwargs.items()}
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
            constants[0] = constants[0].clone().reshape(-1)
        result.constant = _with(function, args, kwargs, values, constants)
        if result.constant.dim() and result.constant.numel() == 1:
            result.constant = result.constant.reshape(())
    if function in _ALIASES:
        as_views(first, result)
    if in_place:
        first.changed()
        first.active, first.constant, first.pending = result.active, result.constant, None
        return first
    return result


def _prelu(input: Any, weight: Any) -> Value:
    if not isinstance(input, Value) or not isinstance(weight, Tensor):
        first_of((input, weight)).refuse("it calls prelu with them as weights")
    if weight.numel() != 1:
        raise ValueError(
            f"{input.fc1.qualified_name}: PReLU has {weight.numel()} parameters there, and a tensor with a number for each "
            "neuron cannot be told from one that mixes neurons, of which mode 'forward' has the active ones alone: take "
            "nn.PReLU() with its one parameter, use mode='update', or leave the block out of the masks"
        )
    found: Value = elementwise(_leaky, (input, weight.reshape(())), {}, "prelu")
    return found


def _leaky(z: Tensor, slope: Tensor) -> Tensor:
    """PReLU, whose own operator looks at dimensions."""
    return torch.where(z > 0, z, slope * z)


def _of_one_pass(one: Value, other: Value) -> bool:
    """Whether two values are of one block, and of one task or batch (an equal one where a pass is computed again)."""
    (active, batch), (its, others) = one.use, other.use
    return active is its and (batch is others or (not torch.compiler.is_compiling() and batch == others))


def _tensor(constant: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A constant as a tensor; a number stays on the CPU."""
    return constant if isinstance(constant, Tensor) else torch.full((), constant, dtype=dtype)


def _with(function: Any, args: Any, kwargs: Any, values: list[Value], parts: list[Any]) -> Any:
    """The call with a part of each value in its place."""
    rest = iter(parts)
    put = lambda one: next(rest) if isinstance(one, Value) else one
    return function(*[put(one) for one in args], **{key: put(one) for key, one in kwargs.items()})


def _flat(one: Any, value: Value) -> Any:
    """A tensor with one element in one dimension at most, where it adds none to the value."""
    return one.reshape(1) if isinstance(one, Tensor) and one.numel() == 1 and 1 < one.dim() <= value.ndim else one


def _slot(one: Any, value: Value, function: str, known: bool) -> tuple[Any, ...]:
    """An argument as :func:`judge` takes it."""
    if isinstance(one, Value):
        return "value", one.dtype, one.constant if known else None
    if isinstance(one, Tensor):
        if one.numel() != 1 or one.dim() > value.ndim:
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


def _gated(function: Any, values: list[Value], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | None:
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


def _dropped(function: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Dropout: what does nothing passes; one that drops does where the other neurons are 0, and stay so."""
    if not isinstance(value, Value):
        first_of((*args, *kwargs.values())).refuse(f"it calls {function.__name__}")
    rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))
    if rate <= 0 or not training:
        return value
    active = value.compute()
    constant = not value.fc1.silent and (isinstance(value.constant, Tensor) or value.constant != 0)
    if constant or function not in _DROPOUT:
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


def linear(h: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(h, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        first_of((h, weight, bias)).refuse("it calls linear with them as weights")
    if weight.dim() != 2 or weight.shape[1] != h.width:
        h.refuse(f"it calls linear with a weight of shape {list(weight.shape)}, expected [d_out, {h.width}]")
    if _is_of_fc1(weight, h):
        name = h.fc1.qualified_name
        raise ValueError(
            f"{name}: its activations are multiplied by {name}.weight again (tied, as in F.linear(h, fc1.weight.t())), "
            "which is dense where it is read and masked where fc1 is called: give fc2 a weight of its own, or leave the "
            "block out of the masks"
        )
    y: Tensor = h.fc1.block(h, weight, bias)
    return y


def _is_of_fc1(weight: Tensor, h: Value) -> bool:
    """Whether it is the weight of the layer that gave the activations, or a view of all of it."""
    if torch.compiler.is_compiling() or in_transform() or not weight.numel() or weight.is_meta:
        return False
    own = [h.inputs[1], h.fc1._parameters.get("weight")]
    try:
        return any(one is not None and one.numel() and one.data_ptr() == weight.data_ptr() for one in own)
    except RuntimeError:  # of tensors without a place in memory
        return False


def _product(h: Value, other: Any) -> Tensor:
    """``h @ weight.T``, as some models write fc2."""
    if not isinstance(other, Tensor) or other.dim() != 2:
        h.refuse("it calls matmul with something else than the weight of fc2")
    return linear(h, other.t())
