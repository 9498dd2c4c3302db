"""What a feed-forward block of a model is made of, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is ``[in, out]``: that of GPT-2's ``Conv1D``, a linear layer by another name."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in type(module).__mro__
    )


def is_linear(module: object) -> bool:
    """Whether it is a linear layer by its class: ``nn.Linear``, one of its subclasses, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_transposed(module))


def features(module: nn.Module) -> tuple[int, int]:
    """The sizes of input and output of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features  # a packed weight, of four bits say, has another shape
    weight: Any = module.weight
    if is_transposed(module):
        return weight.shape[0], weight.shape[1]
    return weight.shape[1], weight.shape[0]


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: ``fc2(act(fc1(x)))``, or gated ``fc2(act(gate(x)) * up(x))``.

    Neuron i is output i of ``fc1`` and input i of ``fc2``; in a gated block also output i of ``up``, or output d_ff + i of
    a fused projection.

    Attributes:
        name: qualified name of ``fc1``, by which masks and counts know the block.
        parent: the module that computes with them.
        fc1: the first linear layer; the gate projection of a gated block, or the fused one of gate and up.
        fc2: the last linear layer.
        up: the other projection of a gated block that has two; None else.
        fused: whether ``fc1`` computes gate and up behind one another.
    """

    name: str
    parent: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    up: nn.Module | None = None
    fused: bool = False

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return features(self.fc2)[0]

    @property
    def gated(self) -> bool:
        """Whether two projections are multiplied."""
        return self.fused or self.up is not None
