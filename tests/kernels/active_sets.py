"""The layouts of active sets in which the operators on the layers of a block are tested."""

from __future__ import annotations

import torch
from torch import Tensor

from nspec.kernels.common.active import active_index


def in_place_index(active: Tensor) -> Tensor:
    """The index in the in-place layout, which ``active_index`` gives near density 1 alone, at every density."""
    sets = active if active.dim() == 2 else active[None]
    return torch.where(sets, torch.arange(sets.shape[1], device=sets.device), -1)


LAYOUTS = (active_index, in_place_index)
