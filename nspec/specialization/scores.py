"""Neuron scores: for each task and layer, how much each neuron matters on average over real tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .storage import Kind
from .sums import TokenSums
from .tensors import each

Score = Literal["gradient", "magnitude"]
"""``gradient``: ``abs(h * dL/dh)``. ``magnitude``: ``abs(h)``. ``h`` is the activation that fc2 gets."""


class NeuronScores(TokenSums):
    """``scores[task][layer]`` is a float64 tensor ``[d_ff]``: the sum over tokens of a score of each neuron.

    With ``h`` for what fc2 gets (of a gated block the product of gate and up) the score of a token is ``abs(h)``
    (``magnitude``) or ``abs(h * dL/dh)`` (``gradient``: by how much the loss would change, to first order, without the
    neuron). A mapping of tasks. ``scores + scores`` adds them up (batches of one task that were run apart) and joins tasks.

    Args:
        scores: task -> {qualified name of fc1: floating-point tensor ``[d_ff]``, finite and none negative}. Copied.
        tokens: task -> the number of tokens that were summed over: one for all layers, or {layer: number} where they
            differ. Of every task.
        score: what was summed.

    Attributes:
        score: ``gradient`` or ``magnitude``.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer without neurons, a name that is empty, a score
            that is negative or not finite, an unknown kind of score, or numbers of tokens that lack a task, or of another
            task or other layers.
        TypeError: a value that is not a floating-point tensor, or a name that is no text, or no mapping of mappings, or a
            number of tokens that is no whole one.

    Example:
        >>> scores = NeuronScores({"cy": {"fc1": torch.tensor([1.0, 6.0])}}, tokens={"cy": 12}, score="magnitude")
        >>> scores.means()["cy"]["fc1"].tolist()
        [0.08333333333333333, 0.5]
    """

    _KIND = Kind("scores", ("F64",))

    def __init__(
        self,
        scores: Mapping[str, Mapping[str, Tensor]],
        tokens: Mapping[str, int | Mapping[str, int]],
        score: Score,
    ) -> None:
        check_score(score, get_args(Score))
        super().__init__(each(scores, _checked), tokens)
        if unknown := [task for task in self.tasks if task not in self._tokens]:
            raise ValueError(f"tokens lacks task {unknown[0]}, expected the number of tokens of every task")
        self.score: Score = score

    def means(self) -> dict[str, dict[str, Tensor]]:
        """For each task and layer the mean score of each neuron, float64 ``[d_ff]``; 0 without tokens."""
        return self._means()

    def __repr__(self) -> str:
        return f"NeuronScores({len(self.tasks)} tasks, {len(self.layers)} layers, {self.score})"

    def __add__(self, other: NeuronScores) -> NeuronScores:
        if isinstance(other, NeuronScores) and other.score != self.score:
            raise ValueError(f"scores of {self.score} and of {other.score} do not add up, expected those of one kind")
        return super().__add__(other)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``scores.safetensors`` (one float64 tensor ``[tasks, d_ff]`` per layer) and a readable ``scores.json``.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        mean = {
            task: {layer: float(of.mean()) for layer, of in layers.items()} for task, layers in self.means().items()
        }
        self._save(folder, {"mean": mean}, {"score": self.score})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> NeuronScores:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``scores.safetensors`` in the folder.
            ValueError: the file is broken, is not one of scores, or holds something else than it says; the message names
                the file, what was found and what was expected.
        """
        with cls._reading(folder) as (scores, more):
            return cls(scores, more.get("tokens", {}), more.get("score"))  # type: ignore[arg-type]

    def _like(self, sums: dict[str, dict[str, Tensor]], tokens: Mapping[str, Mapping[str, int]]) -> NeuronScores:
        return NeuronScores(sums, tokens, self.score)


def check_score(score: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError unless ``score`` is one of those that are known."""
    if score not in known:
        raise ValueError(f"score is {score!r}, expected one of {', '.join(map(repr, known))}")


def _checked(task: str, layer: str, sums: Tensor) -> Tensor:
    if not isinstance(sums, Tensor) or not sums.is_floating_point():
        found = sums.dtype if isinstance(sums, Tensor) else type(sums).__name__
        raise TypeError(f"scores of {task}, {layer}: found {found}, expected a float64 tensor [d_ff]")
    if sums.dim() != 1:
        raise ValueError(f"scores of {task}, {layer} have shape {list(sums.shape)}, expected [d_ff]")
    if not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
        raise ValueError(f"scores of {task}, {layer} are negative or not finite somewhere, expected none below 0")
    return sums.detach().to("cpu", torch.float64, copy=True)
