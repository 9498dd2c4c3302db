"""Which layout ``compact_fc1`` and ``compact_fc2`` compute in: the compact one, or, where packing would not pay, in place.

``compact_ffn`` computes small blocks dense (``compact_ffn/dense.py``). Here the layers are calls of their own, and what
tells them how to compute is the width of the index: in place, the products are dense, of weights whose inactive rows and
columns are zero, or, with several tasks, over the tokens of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.active import active_index
from ..compact_ffn import dense


def in_place_index(active: Tensor) -> Tensor:
    """The index of ``active`` (bool ``[d_ff]`` or ``[tasks, d_ff]``) in the in-place layout, whatever the density."""
    sets = active if active.dim() == 2 else active[None]
    return torch.where(sets, torch.arange(sets.shape[1], device=sets.device), -1)


def index_for(x: Tensor, w: Tensor, active: Tensor) -> Tensor:
    """The index of ``active`` in the layout that is faster for these tokens.

    Args:
        x: input of fc1, ``[..., d_in]``.
        w: weight of fc1, ``[d_ff, d_in]``.
        active: bool ``[d_ff]`` or ``[tasks, d_ff]``.

    Returns:
        int64 ``[tasks, width]`` (``[1, width]`` for one set); ``common/active.py`` describes the layouts.
    """
    index = active_index(active)
    if torch.compiler.is_compiling() or dense.reason(x, w, index) is None:
        return index
    return in_place_index(active)
