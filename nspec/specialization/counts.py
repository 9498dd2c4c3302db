"""Activation counts: for each task and layer, how many real tokens fired each neuron, and of how many."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from .storage import Kind
from .sums import TokenSums
from .tensors import each


class ActivationCounts(TokenSums):
    """``counts[task][layer]`` is an int64 tensor ``[d_ff]``: the number of tokens that fired each neuron.

    A neuron fires for a token where its pre-activation (of a gated block, that of its gate) is above 0. ReLU, GELU, SiLU,
    squared ReLU and their like are above 0 there and nowhere else (but for subnormal numbers, half of which may be rounded
    to 0); of activations that are never 0 (the sigmoid) it is the definition.

    A mapping of tasks. ``counts + counts`` adds them up (batches of one task that were counted apart) and joins tasks.

    Args:
        counts: task -> {qualified name of fc1: integer tensor ``[d_ff]``, none negative}. Copied.
        tokens: task -> the number of tokens that were counted: one for all layers, or {layer: number} where they differ,
            as in encoder and decoder, and in experts. Tasks may be left out: their numbers are not known.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer without neurons, a name that is empty,
            negative counts, numbers of tokens of another task or other layers, or a neuron that fired more often than there
            are tokens.
        TypeError: a value that is not an integer tensor, or a name that is no text, or no mapping of mappings, or a number
            of tokens that is no whole one.

    Example:
        >>> counts = ActivationCounts({"en-de": {"fc1": torch.tensor([1, 6, 3])}}, tokens={"en-de": 12})
        >>> counts.tokens["en-de"], counts.rates()["en-de"]["fc1"].tolist()
        (12, [0.08333333333333333, 0.5, 0.25])
    """

    _KIND = Kind("counts", ("I32", "I64"))

    def __init__(
        self, counts: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, int | Mapping[str, int]] | None = None
    ) -> None:
        super().__init__(each(counts, _checked), tokens)

    def rates(self) -> dict[str, dict[str, Tensor]]:
        """For each task and layer the share of tokens that fired each neuron, float64 ``[d_ff]``; 0 without tokens.

        Raises:
            ValueError: the number of tokens of a task is not known.
        """
        return self._means()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``counts.safetensors`` (one integer tensor ``[tasks, d_ff]`` per layer) and a readable ``counts.json``.

        Both hold the numbers of tokens that are known.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        fired = {
            task: {layer: total(count) for layer, count in layers.items()} for task, layers in self._by_task.items()
        }
        self._save(folder, {"activations": fired}, {})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ActivationCounts:
        """Reads what :meth:`save` wrote, also in versions before the numbers of tokens were kept.

        Raises:
            FileNotFoundError: there is no ``counts.safetensors`` in the folder.
            ValueError: the file is broken, is not one of counts, or holds something else than it says; the message names
                the file, what was found and what was expected.
        """
        with cls._reading(folder) as (counts, more):
            return cls(counts, more.get("tokens"))

    def _stored(self, sums: Tensor) -> Tensor:
        return sums.to(torch.int32) if int(sums.max()) < 2**31 else sums

    def _plus(self, task: str, layer: str, one: Tensor, other: Tensor) -> Tensor:
        both = one + other
        if int(both.min()) < 0:  # of two that are not negative, every sum beyond an int64 is
            raise ValueError(f"the counts of {task}, {layer} add up to more than {2**63 - 1}")
        return both

    def _fewest(self, value: Tensor) -> int:
        return int(value.max())


def total(count: Tensor) -> int:
    """The sum of one layer's counts, int64 ``[d_ff]``, exactly: it may be larger than an int64."""
    return (int((count >> 32).sum()) << 32) + int((count & 0xFFFFFFFF).sum())


def _checked(task: str, layer: str, count: Tensor) -> Tensor:
    if not isinstance(count, Tensor) or count.dtype not in (torch.int64, torch.int32):
        found = count.dtype if isinstance(count, Tensor) else type(count).__name__
        raise TypeError(f"counts of {task}, {layer}: found {found}, expected an int64 tensor [d_ff]")
    if count.dim() != 1:
        raise ValueError(f"counts of {task}, {layer} have shape {list(count.shape)}, expected [d_ff]")
    if count.numel() and int(count.min()) < 0:
        raise ValueError(f"counts of {task}, {layer} go down to {int(count.min())}, expected none below 0")
    return count.detach().to("cpu", torch.int64, copy=True)
