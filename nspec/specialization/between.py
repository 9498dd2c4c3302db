"""What a feed-forward block does between its linear layers: is it such that pre-activations above 0 are what fires?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .feed_forward import FeedForward
from .layers import FUSED_NAMES, activation_of, is_relu

_ROWS = 64  # of a batch that are looked at
_SURE = 20  # times nearer that one order of gate and up must be than the other
_NEAR = 0.02  # of the largest value: 16-bit models round what is compared
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
        shown: whether a value other than 0 has passed.
    """

    def __init__(self, block: FeedForward) -> None:
        self._block = block
        self._activation: Any = activation_of(block)
        self.relu = not block.gated and self._activation is not None and is_relu(self._activation)
        self.shown = False

    def see(self, z: Sample, up: Sample | None, got: Tensor) -> None:
        """Compares what fc2 got with what the layers before it gave.

        Args:
            z: of what fc1 gave; of a gated block the gate.
            up: of what the other projection of a gated block gave.
            got: what fc2 got.

        Raises:
            ValueError: it is not of the shape of ``z``; the signs of a plain block's pre-activations are lost on the way,
                and it is no function of them that is known; or what the activation function sees is ``up``.
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
        self.shown = bool((h[finite] > 0).any())

    def _see_plain(self, z: Tensor, got: Tensor) -> None:
        finite = torch.isfinite(z) & torch.isfinite(got)
        z, got = z[finite], got[finite]
        kept = not bool((((z > 0) & (got < 0)) | ((z < 0) & (got > 0))).any())
        if not (kept or self._is_activation(z, got) or _rises(z, got)):
            raise self._error(
                "neurons with a pre-activation above 0 are not those that fire: something else than an activation function "
                "of each number (a norm, say) comes between fc1 and fc2"
            )
        self.shown = bool((got != 0).any())
        both = bool((z > 0).any()) and bool((z < 0).any())
        if self._activation is None and both and torch.equal(torch.relu(z).to(got.dtype), got):
            self.relu = True

    def _see_gated(self, z: Tensor, up: Tensor, got: Tensor) -> None:
        finite = torch.isfinite(z) & torch.isfinite(up) & torch.isfinite(got)
        z, up, got = z[finite], up[finite], got[finite].double()
        if not bool((got != 0).any()):
            return
        # A function of the block's own may know its dtype alone.
        gates = (self._activation,) if callable(self._activation) else _GATES
        right, wrong = (
            min(float((gate(a.clone()).double() * b.double() - got).abs().max()) for gate in gates)
            for a, b in ((z, up), (up, z))
        )
        size = float(got.abs().max())
        if wrong * _SURE < right and wrong < _NEAR * size:
            raise self._error(
                "the activation function sees the second half of the fused projection, expected the first"
                if self._block.fused
                else "the activation function sees the other projection: name (gate, up, down) in this order"
            )
        unknown = self._block.fused and not self._block.name.endswith(tuple(f".{first}" for first, _ in FUSED_NAMES))
        if unknown and right >= _NEAR * size:
            raise self._error("fc1 is twice as wide as fc2, and which half of it is the gate cannot be told")
        self.shown = True

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
