"""A curriculum by difficulty: of each direction the easiest pairs first (Platanios et al., Competence-based Curriculum
Learning, 2019).

The difficulty of a pair is its rank among the pairs of its direction, in (0, 1]. After a share t of the way, pairs of
difficulty up to the competence sqrt(t (1 - c0²) + c0²) are sampled, c0 at the start and 1 at the end. The competence
grows in steps, so that within a step every pair comes once before any comes again, and a micro-batch is a function of its
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

STEPS = 50
"""In which the competence grows, each as long as the others."""

FEWEST = 4
"""Micro-batches that the pairs of a step fill at least: of fewer, the last one of an epoch, not full, would be many."""


def rarity(ids: npt.NDArray[np.integer], offsets: Index) -> Floats:
    """How rare the tokens of sentences are: sum of -log p, with p the share of a token among all.

    Args:
        ids: [tokens], sentences one after another, none of them empty.
        offsets: int64 [n + 1], where each begins, and the end.

    Returns:
        float64 [n], nats.
    """
    counts = np.bincount(ids)
    costs = np.log(counts.sum()) - np.log(np.maximum(counts, 1))
    return np.add.reduceat(costs[ids], offsets[:-1]).astype(np.float64)


@dataclass(frozen=True)
class Competence:
    """How the share of the pairs that are sampled grows.

    Args:
        start: at the first micro-batch.
        until: share of the micro-batches after which all pairs are.
        micro_batches: of the training.
        difficulty: of the pairs of a direction, float [n] in any unit.
    """

    start: float
    until: float
    micro_batches: int
    difficulty: Callable[[str], npt.NDArray[np.number]]

    def steps(self, numbers: Index) -> Index:
        """The step, 0 to :data:`STEPS`, in which each micro-batch is."""
        way = numbers / (self.until * self.micro_batches)
        return np.minimum(way * STEPS, STEPS).astype(np.int64)

    def at(self, step: int) -> float:
        """The competence of a step: that at its beginning, so that no micro-batch is above its own."""
        return math.sqrt(step / STEPS * (1 - self.start**2) + self.start**2)

    def kept(self, step: int, task: str, source: Index, target: Index, budget: int) -> Index:
        """The pairs of a direction that are sampled in a step: as the competence says, or what fills :data:`FEWEST`
        micro-batches if more.

        Args:
            step: see :meth:`steps`.
            task: the direction.
            source: int64 [n], lengths.
            target: int64 [n], lengths.
            budget: tokens of a micro-batch.

        Returns:
            int64 [kept], sorted.
        """
        order = np.argsort(self.difficulty(task), kind="stable")
        tallest = np.maximum.accumulate(source[order]) + np.maximum.accumulate(target[order])
        filling = int(np.searchsorted(tallest * np.arange(1, len(order) + 1), FEWEST * budget)) + 1
        return np.sort(order[: max(math.ceil(self.at(step) * len(order)), filling)])
