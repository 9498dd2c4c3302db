"""The rule ``loss``: how many neurons a direction keeps follows from what masking others does to its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import nspec
from nspec.analysis.overlap import layer_side
from nspec.mt.config import SelectConfig

CHOSEN = "chosen.json"
"""File beside the masks with the k of each part of each direction."""


class LossOf(Protocol):
    """The validation loss of a direction in nats per token, with masks or dense."""

    def __call__(self, task: str, masks: nspec.NeuronMasks | None = None) -> float: ...


@dataclass
class ByLoss:
    """Selects by validation loss.

    Args:
        loss_of: measures the dense model with masks of some layers.
        progress: called as ``progress(task, parts done, parts in all)``.

    Attributes:
        record: what was chosen, for :data:`CHOSEN`, once it has selected.
    """

    loss_of: LossOf
    progress: Callable[[str, int, int], None] | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def select(self, counts: nspec.ActivationCounts, select: SelectConfig) -> nspec.NeuronMasks:
        """For each direction and part the smallest k of the grid that is good enough, all other parts being dense.

        Good enough is a loss at most ``select.tolerance`` above that of the dense model. A part is a side or a layer
        (``select.by``). Where no k is, all neurons are kept; layers in which all directions keep all are left out.

        Raises:
            ValueError: no k is good enough anywhere.
        """
        groups: dict[str, list[str]] = {}
        for layer in counts.layers:
            groups.setdefault(layer if select.by == "layer" else layer_side(layer), []).append(layer)
        chosen: dict[str, dict[str, dict[str, float | None]]] = {}
        kept: dict[str, dict[str, torch.Tensor]] = {}
        dense: dict[str, float] = {}
        done, total = 0, len(counts.tasks) * len(groups)
        for task in counts.tasks:
            dense[task], chosen[task], kept[task] = self.loss_of(task), {}, {}
            for part, layers in groups.items():
                masks, found = self._smallest(counts, select, task, layers, dense[task])
                kept[task].update(masks)
                chosen[task][part] = found
                done += 1
                if self.progress is not None:
                    self.progress(task, done, total)
        left = [layer for layer in counts.layers if any(not bool(of[layer].all()) for of in kept.values())]
        if not left:
            grid = ", ".join(f"{k:g}" for k in sorted(select.grid))
            raise ValueError(
                f"select.rule loss: no k of select.grid ({grid}) keeps the loss of any direction within "
                f"{select.tolerance:g} nats of that of the dense model: raise select.tolerance, or give larger ks"
            )
        self.record = {
            "tolerance": select.tolerance,
            "grid": sorted(select.grid),
            "by": select.by,
            "unit": "nats per target token, validation text, no training",
            "dense_loss": dense,
            "chosen": chosen,
        }
        return nspec.NeuronMasks({task: {layer: of[layer] for layer in left} for task, of in kept.items()})

    def _smallest(
        self, counts: nspec.ActivationCounts, select: SelectConfig, task: str, layers: list[str], dense: float
    ) -> tuple[dict[str, torch.Tensor], dict[str, float | None]]:
        """The masks of some layers, and the k (1: not specialised) and loss that they have."""
        own = nspec.ActivationCounts({task: {layer: counts[task][layer] for layer in layers}})
        for k in sorted(select.grid):
            masks = nspec.select(own, k)
            loss = self.loss_of(task, masks)
            if loss <= dense + select.tolerance:
                return dict(masks[task]), {"k": k, "loss": loss}
        every = {layer: torch.ones(len(counts[task][layer]), dtype=torch.bool) for layer in layers}
        return every, {"k": 1.0, "loss": dense}
