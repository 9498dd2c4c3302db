"""What a feed-forward block does between its linear layers: is it such that pre-activations above 0 are what fires?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feed_forward import FeedForward
from .layers import FUSED_NAMES, activation_of, is_relu

_ROWS = 64  # of a batch that are looked at
_SURE = 20  # times nearer that one order of gate and up must be than the other, by a function that is known
_LIKELIER = 2  # times, by a fit
_FITS = 0.05  # of the size of what fc2 gets; numbers of 16 bits are off by 0.002
_NEAR = 0.02  # of the largest value: 16-bit models round what is compared
_WINDOW = 16  # values with nearly the same gate
_MOST, _FEWEST = 4096, 8 * _WINDOW  # values that are fitted
_GATES: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    F.gelu,
    functools.partial(F.gelu, approximate="tanh"),
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    lambda z: torch.relu(z).square(),
    lambda z: z * torch.sigmoid(1.702 * z),
)


class Sample:
    """The shape of activations ``[..., d_ff]``, and a copy of the first rows: what follows may overwrite them."""

    def __init__(self, values: Tensor) -> None:
        self.shape = values.shape
        self.rows = values.reshape(-1, values.shape[-1])[:_ROWS].clone()


class Between:
    """Looks at what fc2 gets, until a value other than 0 has shown what a block computes.

    Attributes:
        relu: whether it is ReLU alone: the block says so, or ``see`` has seen it.
        passed: whether a value other than 0 has passed.
        shown: whether such values have shown it; those of a gated block may fit both orders of gate and up.
    """

    def __init__(self, block: FeedForward) -> None:
        self._block = block
        self._activation: Any = activation_of(block)
        self.relu = not block.gated and self._activation is not None and is_relu(self._activation)
        self.passed = self.shown = False

    def see(self, z: Sample, up: Sample | None, got: Tensor) -> None:
        """Compares what fc2 got with what the layers before it gave.

        Args:
            z: of what fc1 gave; of a gated block the gate.
            up: of what the other projection of a gated block gave.
            got: what fc2 got.

        Raises:
            ValueError: it is not of the shape of ``z``; the signs of a plain block's pre-activations are lost on the way,
                and it is no function of them that is known; what the activation function sees is ``up``; or it is no
                function of the gate times ``up``.
        """
        if got.shape != z.shape:
            raise self._error(f"fc2 got {list(got.shape)}, expected {list(z.shape)}, what fc1 gave")
        seen = Sample(got).rows.to(z.rows.device)
        if up is None:
            self._see_plain(z.rows, seen)
        else:
            self._see_gated(z.rows, up.rows.to(z.rows.device), seen)

    def see_rectified(self, h: Tensor, got: Tensor) -> None:
        """The same where ReLU was computed with fc1: what follows must not change it.

        Raises:
            ValueError: it does.
        """
        h = h.to(got.device, got.dtype)
        finite = torch.isfinite(h)  # the others are told of after the pass, by what they make of fc2's output
        if got.shape != h.shape or not torch.equal(got[finite], h[finite]):
            raise ValueError(
                f"{self._block.name}: what the layer does between fc1 and fc2 is not ReLU alone in eval mode, though its "
                "activation is ReLU"
            )
        self.passed = self.shown = bool((h[finite] > 0).any())

    def _see_plain(self, z: Tensor, got: Tensor) -> None:
        finite = torch.isfinite(z) & torch.isfinite(got)
        z, got = z[finite], got[finite]
        kept = not bool((((z > 0) & (got < 0)) | ((z < 0) & (got > 0))).any())
        if not (kept or self._is_activation(z, got) or _rises(z, got)):
            raise self._error(
                "neurons with a pre-activation above 0 are not those that fire: something else than an activation function "
                "of each number (a norm, say) comes between fc1 and fc2"
            )
        self.passed = self.shown = bool((got != 0).any())
        both = bool((z > 0).any()) and bool((z < 0).any())
        if self._activation is None and both and torch.equal(torch.relu(z).to(got.dtype), got):
            self.relu = True

    def _see_gated(self, z: Tensor, up: Tensor, got: Tensor) -> None:
        finite = torch.isfinite(z) & torch.isfinite(up) & torch.isfinite(got)
        if not bool((got[finite] != 0).any()):
            return
        self.passed = True
        orders = ((z, up), (up, z))
        right, wrong = (self._off(gate, other, got, finite) for gate, other in orders)
        fits = min(right, wrong) < _NEAR and max(right, wrong) > _SURE * min(right, wrong)
        enough = int(finite.sum()) >= _FEWEST
        if not fits and enough:
            fitted = (_unexplained(gate[finite], other[finite], got[finite]) for gate, other in orders)
            right, wrong = map(min, (right, wrong), fitted)
            fits = min(right, wrong) < _FITS and max(right, wrong) > _LIKELIER * min(right, wrong)
        if fits and wrong < right:
            raise self._error(
                "the activation function sees the second half of the fused projection, expected the first: leave the block "
                "out with layers=[...]"
                if self._block.fused
                else "the activation function sees the other projection: name (gate, up, down) in this order, as in "
                f"layers=[(gate, {self._block.name!r}, down)]"
            )
        if fits:
            self.shown = True
        elif self._block.fused and not _is_known(self._block.name):
            raise self._error("fc1 is twice as wide as fc2, and which half of it is the gate cannot be told")
        elif enough and min(right, wrong) >= _FITS:
            raise self._error(
                "fc2 does not get the product of an activation function of each number of the gate, and of up (a norm of "
                "the gate may come between): name its gate, up and down with layers=[(gate, up, down)] if they are other "
                "layers, or leave the block out"
            )

    def _off(self, gate: Tensor, up: Tensor, got: Tensor, finite: Tensor) -> float:
        """How far ``got`` is, of its size, from the nearest known function of the gate times ``up``, normed or not."""
        # A function of the block's own may know its dtype alone.
        gates = (self._activation,) if callable(self._activation) else _GATES
        want = got[finite].double()
        size = want.square().mean().sqrt()
        offs = []
        for function in gates:
            h = function(gate.clone()) * up
            for found in (h, *(norm(h) for norm in self._norms())):
                offs.append(float((found[finite].double() - want).square().mean().sqrt() / size))
        return min((off for off in offs if off == off), default=float("inf"))

    def _norms(self) -> list[nn.Module]:
        """Norms of all neurons that the block has: one after the product changes no gate."""
        of_width = [
            m for m in self._block.parent.modules() if any(p.shape == (self._block.d_ff,) for p in m.parameters(False))
        ]
        return [module for module in of_width if "norm" in type(module).__name__.lower()]

    def _is_activation(self, z: Tensor, got: Tensor) -> bool:
        if not callable(self._activation):
            return False
        want = self._activation(z.clone())
        return bool(((want - got).abs() <= _NEAR * got.abs().max()).all())

    def _error(self, why: str) -> ValueError:
        return ValueError(f"{self._block.name}: what fires in this block cannot be counted: {why}")


def _rises(z: Tensor, got: Tensor) -> bool:
    """Whether it is a function that rises with the pre-activation, as the sigmoid."""
    ordered = got[torch.sort(z).indices].double()
    return bool((ordered.diff() >= -_NEAR * ordered.abs().max()).all())


def _is_known(name: str) -> bool:
    return f".{name}".endswith(tuple(f".{first}" for first, _ in FUSED_NAMES))


def _unexplained(gate: Tensor, up: Tensor, got: Tensor) -> float:
    """The share of ``got`` that is no ``f(gate) * up``, whatever ``f`` is, of values ``[n]``: about 0 in the right order.

    Among values of nearly the same gate that product is linear in ``up``; in the wrong order it bends there as ``f`` does.
    The slope may change with what is left of the gate in a window.
    """
    every = torch.arange(min(_MOST, len(got)), device=got.device) * len(got) // min(_MOST, len(got))
    order = every[torch.sort(gate[every]).indices]
    order = order[: len(order) // _WINDOW * _WINDOW]
    a, b, h = (values[order].double().cpu().view(-1, _WINDOW) for values in (gate, up, got))
    a = a - a.mean(1, keepdim=True)
    a, b, h = (v / v.abs().amax(1, keepdim=True).clamp_min(1e-30) for v in (a, b, h))
    terms = torch.stack([torch.ones_like(a), a, b, a * b], -1)
    rest = h - (terms @ torch.linalg.lstsq(terms, h.unsqueeze(-1)).solution).squeeze(-1)
    spread = (h - h.mean(1, keepdim=True)).square().sum(1)
    shares = (rest.square().sum(1) / spread)[spread > 0]
    return float(shares.median().sqrt()) if len(shares) else float("inf")
