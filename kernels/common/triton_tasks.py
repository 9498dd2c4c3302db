"""Tokens sorted by task, and columns by active set: what the kernels of ``row_sparse_wgrad`` and ``compact_ffn`` share.

The kernels are in ``kernels.py``, which says how tokens are cut into tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu
from .kernels import pack_columns_kernel, task_sums_kernel
from .triton_launch import Launcher, cdiv, offsets_on

COLUMNS = 128
WIDTH_MULTIPLE = 64  # of packed columns; the compact layout has it, the in-place layout is padded to it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = 2**31 - 1024  # coordinates of descriptors are int32, and the last tile may reach over the edge


class Tile(NamedTuple):
    """Block sizes of a product: rows, columns and depth of a step, rows of tiles that go together, warps, stages."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int

    def keywords(self, precision: str) -> dict[str, object]:
        """What a launch of the product gives by keyword."""
        return {
            "M": self.m,
            "N": self.n,
            "K": self.k,
            "GROUP": self.group,
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tasks(NamedTuple):
    """The tokens of a call by task; ``offsets`` is None for one task, else int64 ``[number + 1]`` on the device."""

    tokens: int
    number: int
    offsets: Tensor | None

    def most_tiles(self, size: int) -> int:
        """The most tiles of ``size`` tokens that these tasks can need, wherever one ends and the next begins."""
        return cdiv(self.tokens, size) + self.number - 1


def tasks_of(tokens: int, task_offsets: Tensor | None, device: torch.device) -> Tasks:
    """The tokens of a call by task, their offsets on ``device``.

    Raises:
        ValueError: offsets on the CPU that do not rise from 0 to ``tokens``; tokens, but no task.
    """
    if task_offsets is None:
        return Tasks(tokens, 1, None)
    offsets = offsets_on(task_offsets, tokens, device)
    count = offsets.shape[0] - 1
    if count == 0 and tokens > 0:
        raise ValueError(f"task_offsets has 1 number, so no task has the {tokens} tokens")
    return Tasks(tokens, count, offsets if count > 1 else None)


def compact_width(index: Tensor) -> int:
    """The columns of packed operands for an index tensor: its width, padded, and at least one block."""
    return max(cdiv(index.shape[1], WIDTH_MULTIPLE), 1) * WIDTH_MULTIPLE


def refuses(tensors: tuple[Tensor | None, ...], index: Tensor, tokens: int, same: bool = True) -> str | None:
    """Why the kernels do not take these operands, the first of which is never None; None if they do.

    ``same``: whether they must have one dtype.
    """
    first = tensors[0]
    assert first is not None
    dtype, device, strided, largest, smallest = first.dtype, first.device, torch.strided, tokens, 1
    for t in tensors:
        if t is None:
            continue
        if (same and t.dtype != dtype) or dtype not in DTYPES:
            given = ", ".join(str(t.dtype) for t in tensors if t is not None)
            return f"the dtypes are {given}; it takes one of float32, bfloat16 and float16"
        if t.device != device or t.layout is not strided:
            return f"a tensor is {t.layout} on {t.device}, the first one on {device}"
        if t.dim() == 2:
            rows, columns = t.shape
            largest, smallest = max(largest, rows, columns), min(smallest, columns)
    if index.device != device:
        return f"a tensor is {index.layout} on {index.device}, the first one on {device}"
    if device.type == "cpu" and dtype == torch.bfloat16 and gpu.interpreted():
        return "Triton's interpreter multiplies the bit patterns of bfloat16"  # triton-lang/triton#11584
    # Coordinates are int32, and so are the rows of all tasks' packed weights.
    if max(largest, index.shape[0] * compact_width(index)) > LIMIT:
        return f"a size is above {LIMIT}"
    return None if smallest else "a layer has no features"


class Columns(NamedTuple):
    """Launches of ``pack_columns_kernel``; see :func:`column_sums`."""

    launcher: Launcher
    tokens: int

    def __call__(self, dense: Tensor, tasks: Tasks, *packing: Tensor | None) -> Tensor:
        """Sums of the columns of ``dense [tokens, columns]`` over tiles of tokens: float32 ``[tiles, columns]``.

        Args:
            dense: last stride 1.
            tasks: at least one token.
            packing: where columns are packed, what is written, ``[tokens, width]``, its padding undefined; the index int64
                ``[tasks, <= width]``, contiguous; the places of the same sets, see ``places_of``.
        """
        packed, index, places = packing or (None, None, None)
        columns = dense.shape[1]
        tiles = tasks.most_tiles(self.tokens)
        sums = torch.empty((tiles, columns), dtype=torch.float32, device=dense.device)
        width, stride = (0, 0) if index is None or packed is None else (index.shape[1], packed.stride(0))
        pointers = (dense, packed, sums, index, places, tasks.offsets)
        sizes = (tasks.tokens, tasks.number, columns, width, dense.stride(0), stride)
        self.launcher((tiles, cdiv(columns, COLUMNS), 1), *pointers, *sizes)
        return sums


def column_sums(grouped: bool, pack: bool) -> Columns:
    """Launches that pack active columns, or only sum all of them; for a plan."""
    # Packing 64 tokens with 8 warps, a thread loads its index 32 times, and half as many warps fit (9.0, Triton 3.6).
    sizes: dict[str, Any] = {"TOKENS": 32, "num_warps": 4} if pack else {"TOKENS": 64, "num_warps": 8}
    keywords = {"GROUPED": grouped, "PACK": pack, "COLUMNS": COLUMNS, **sizes}
    return Columns(Launcher(pack_columns_kernel, keywords), sizes["TOKENS"])


class Sums:
    """Sums of the columns of a matrix by task; for a plan. PyTorch's do for one task."""

    def __init__(self) -> None:
        self.tiles = column_sums(True, False)
        # Few programs, each a chain of loads: the larger the tile, the shorter.
        keywords = {"GROUPED": True, "TILES": 64, "COLUMNS": COLUMNS, "num_warps": 8}
        self.tasks = Launcher(task_sums_kernel, keywords)

    def __call__(self, dense: Tensor, tasks: Tasks) -> Tensor:
        """The sums of the columns of ``dense [tokens, columns]`` by task: float32 ``[tasks, columns]``."""
        if tasks.offsets is None:
            return dense.sum(0, dtype=torch.float32)[None]
        sums, columns = self.tiles(dense, tasks), dense.shape[1]
        out = torch.empty((tasks.number, columns), dtype=torch.float32, device=dense.device)
        grid = (tasks.number, cdiv(columns, COLUMNS), 1)
        self.tasks(grid, sums, out, tasks.offsets, tasks.tokens, columns, self.tiles.tokens)
        return out


def whole(matrix: Tensor, columns: int) -> Tensor:
    """``matrix [rows, columns]``, contiguous, without the further columns that padding to 16 bytes gave it."""
    if matrix.shape[1] == columns:
        return matrix.contiguous()
    return matrix[:, :columns].contiguous()


def wide(matrix: Tensor, columns: int) -> Tensor:
    """``matrix [rows, <= columns]`` as the products read it: contiguous rows of ``columns``, zero behind what it has."""
    if matrix.shape[1] == columns and matrix.is_contiguous() and matrix.data_ptr() % 16 == 0:
        return matrix
    copy = matrix.new_zeros((matrix.shape[0], columns))
    copy[:, : matrix.shape[1]] = matrix
    return copy
