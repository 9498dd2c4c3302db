"""The authors' way of masking (Tan et al. 2024), as what ours is compared with: a weight times a mask of its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class WeightMaskedLinear(nn.Linear):
    """Their fc1: the weight times a mask of its size, a byte an element, for each task one; dense in cost."""

    masks: dict[str, Tensor]
    mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_model]`` -> ``[..., d_ff]``."""
        return nn.functional.linear(x, self.weight if self.mask is None else self.weight * self.mask, self.bias)


def mask_weights(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Makes a model train in their way, in place: task -> name of fc1 -> bool ``[d_ff]``, held where the weights are."""
    for name in next(iter(masks.values())):
        fc1: Any = model.get_submodule(name)
        fc1.__class__, fc1.mask = WeightMaskedLinear, None
        wide = lambda rows, weight=fc1.weight: rows.to(weight.device)[:, None].expand_as(weight).contiguous()
        fc1.masks = {task: wide(rows[name]) for task, rows in masks.items()}
    return model


@contextlib.contextmanager
def weights_masked(model: nn.Module, task: object) -> Iterator[None]:
    """Within the block such a model uses the masks of a task.

    Raises:
        ValueError: a list of tasks, which would need a weight for each.
    """
    if not isinstance(task, str):
        raise ValueError(
            "a weight times a mask is of one task: a batch of several would need a weight for each of them"
        )
    layers = [module for module in model.modules() if isinstance(module, WeightMaskedLinear)]
    for layer in layers:
        layer.mask = layer.masks[task]
    try:
        yield
    finally:
        for layer in layers:
            layer.mask = None
