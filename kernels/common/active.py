"""Sets of active neurons as index tensors, in the layout that the compact operators read.

``active_index`` turns bool ``[d_ff]`` (or ``[tasks, d_ff]``) into int64 ``[tasks, width]``. Two layouts, told apart by
the width alone:

* *compact*, ``width < d_ff``: the active neurons in rising order, then -1 as padding to a multiple of 64;
* *in place*, ``width == d_ff``: position j holds j if neuron j is active, else -1.

Why pad: matrix products whose inner or outer size is no multiple of 16 fall off the fast path of CPU libraries and lose
the whole gain (at density 0.78, 1597 neurons ran at 0.99x of dense, 1600 at 1.15x). Why in place: close to density 1 the
gathers cost more than the few skipped neurons save, and multiplying the inactive rows of fc1.weight by zero is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH_MULTIPLE = 64
IN_PLACE_ABOVE = 0.98  # share of d_ff; with float32, 4096 tokens, 512 x 2048: compact 1.04x of dense at density 0.95


def padded_width(neurons: int, d_ff: int) -> int:
    """The width of the layout for a set of ``neurons`` active neurons out of ``d_ff``."""
    width = -(-neurons // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return d_ff if width > IN_PLACE_ABOVE * d_ff else width


@torch.library.custom_op("nspec::active_index", mutates_args=())
def _active_index(active: Tensor) -> Tensor:
    tasks, d_ff = active.shape
    largest = int(active.sum(1).max()) if tasks else 0
    width = padded_width(largest, d_ff)
    places = torch.arange(d_ff, device=active.device).expand(tasks, d_ff)
    if width == d_ff:
        return torch.where(active, places, -1)
    # A stable sort of "inactive" moves the active neurons to the front in their order.
    order = torch.sort((~active).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    return torch.where(active.gather(1, order), order, -1)


@_active_index.register_fake
def _(active: Tensor) -> Tensor:
    width = torch.library.get_ctx().new_dynamic_size()
    return active.new_empty((active.shape[0], width), dtype=torch.int64)


def active_index(active: Tensor) -> Tensor:
    """Index tensor of the active neurons.

    Args:
        active: bool ``[d_ff]`` or ``[tasks, d_ff]``.

    Returns:
        int64 ``[tasks, width]`` (``[1, width]`` for one set) in the layout described above.
    """
    return _active_index(active if active.dim() == 2 else active[None])


def places_of(index: Tensor, d_ff: int) -> Tensor:
    """Where each neuron is in its task's row of ``index [tasks, width]``: int32 ``[tasks, d_ff]``, -1 for nowhere."""
    tasks, width = index.shape
    # What is padding writes into a column of its own, which is cut off.
    places = torch.full((tasks, d_ff + 1), -1, dtype=torch.int32, device=index.device)
    place = torch.arange(width, dtype=torch.int32, device=index.device).expand(tasks, -1)
    return places.scatter(1, torch.where(index < 0, d_ff, index), place)[:, :d_ff].contiguous()


def rows_of(index: Tensor) -> Tensor:
    """The active neurons of one task, int64 ``[n]``, from its row of the index tensor."""
    return index[index >= 0]
