"""Dense feed-forward blocks of every kind that is measured, as a model has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ACTIVATIONS = ("relu", "gelu", "swiglu")
"""SwiGLU is gated: three layers without biases, as in Llama."""


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_model]`` -> ``[..., d_model]``."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def dense_block(activation: str, d_model: int, d_ff: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A block with one of ``ACTIVATIONS``, and the names of its layers whose rows are neurons, that of the masks first."""
    if activation == "swiglu":
        return SwiGLU(d_model, d_ff), ("gate_proj", "up_proj")
    between: dict[str, Any] = {"relu": nn.ReLU, "gelu": nn.GELU}
    return nn.Sequential(nn.Linear(d_model, d_ff), between[activation](), nn.Linear(d_ff, d_model)), ("0",)
