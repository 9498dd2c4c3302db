"""Functions that Triton kernels of several operators call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_order(tile, rows, columns, GROUP: tl.constexpr):
    """The row and column of the ``tile``-th of ``rows x columns`` tiles, going through GROUP rows of tiles together.

    Tiles that run at the same time then share operands, which stay in the L2 cache.
    """
    in_group = GROUP * columns
    first = tile // in_group * GROUP
    height = min(rows - first, GROUP)
    within = tile % in_group
    return first + within % height, within // height
