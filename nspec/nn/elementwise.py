"""Whether a function of PyTorch computes each element from that element alone. It is asked, not looked up in a list.

The function runs once on a tiny tensor, and every operator that it comes down to must carry PyTorch's tag for such
operators. The answer is kept, for a function with the arguments that it was given.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Elementwise, and without the tag in one of the versions of PyTorch.
_UNTAGGED = (aten.hardswish, aten.hardswish_, aten.leaky_relu, aten.leaky_relu_, aten.log_sigmoid_forward)
# They compute nothing, make a constant, or change the dtype alone.
_HARMLESS = (aten.detach, aten.alias, aten.clone, aten.lift_fresh, aten._to_copy, aten.copy_, aten.scalar_tensor) + (
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
)
_POINTS = (0.37, -1.3, 2.1)

Slot = tuple[Any, ...]
"""An argument: ``("value", dtype, number)``, of which the function is asked what it gives for that number (None: not
asked); ``("scalar", dtype)`` of a tensor with one element; ``("is", itself)``."""


class Verdict(NamedTuple):
    """What a function does.

    Attributes:
        refused: the operator for which it is not elementwise; None where it is.
        in_place: whether it writes into its first argument.
        constant: what it gives for the numbers that it was asked about.
    """

    refused: str | None
    in_place: bool = False
    constant: float = 0.0


class _Watching(TorchDispatchMode):
    """Notes the first operator that is not elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        known = torch.Tag.pointwise in function.tags and torch.Tag.nondeterministic_seeded not in function.tags
        if not known and packet not in _UNTAGGED and packet not in _HARMLESS:
            self.refused = self.refused or str(packet)
        return function(*args, **(kwargs or {}))


@functools.cache
def _judge(function: Callable[..., Any], slots: tuple[Slot, ...], keywords: tuple[tuple[str, Slot], ...]) -> Verdict:
    made: list[Tensor] = []

    def argument(slot: Slot) -> Any:
        kind, what, *number = slot
        if kind == "is":
            return what
        if kind == "scalar":
            return torch.full((), 0.7, dtype=what, device="cpu")
        points = [number[0] or 0.0, *_POINTS]
        probe = torch.tensor(points, dtype=torch.float64, device="cpu").to(what)
        made.append(probe)
        return probe

    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        args, kwargs = [argument(slot) for slot in slots], {name: argument(slot) for name, slot in keywords}
        before = [probe._version for probe in made]
        with _Watching() as watching:
            try:
                found = function(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                line = str(error).splitlines()[0] if str(error) else ""
                if isinstance(error, IndexError) or re.search(r"dimension|size|shape|subscript", line):
                    return Verdict("it depends on the dimensions")  # what the error says is true of the probe alone
                return Verdict(f"{type(error).__name__}: {line}")
        if watching.refused is not None:
            return Verdict(watching.refused)
        if not isinstance(found, Tensor) or found.shape != (len(_POINTS) + 1,):
            return Verdict("something else than one value for each")
        changed = [probe._version != version for probe, version in zip(made, before)]
        return Verdict(None, any(changed), float(found[0]))


def judge(
    function: Callable[..., Any], slots: tuple[Slot, ...], keywords: tuple[tuple[str, Slot], ...]
) -> tuple[str | None, bool, float]:
    """The :class:`Verdict` on ``function`` with these arguments, as a tuple; a constant to compiled code."""
    try:
        refused, in_place, constant = _judge(function, slots, keywords)
    except TypeError:  # an argument that cannot be hashed: no elementwise function has one
        return "a list", False, 0.0
    return refused, in_place, constant


# What torch.compiler.assume_constant_result does, which would load the compiler with this module.
judge._dynamo_marked_constant = True  # type: ignore[attr-defined]
