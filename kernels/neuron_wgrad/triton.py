"""Triton: columns taken out into rows of whole 16 bytes, a product over chunks of tokens, and the sum of its parts.

Few columns of many tokens are a product that waits for memory: it reads ``x [tokens, d]`` once and has ``k`` operations a
byte for it, and a device that computes 200 to 300 a byte waits up to a ``k`` of that size. Its blocks are few, and fill a
device where the tokens are cut into chunks; a part for each, added in their order, gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import gpu
from ..common.backend import requested
from ..common.triton_launch import (
    INTERPRETER,
    SMALL,
    Launcher,
    aligned,
    cdiv,
    launching,
    padded,
    planned,
    precision,
    rows16,
    target_of,
    unit,
)
from ..common.triton_products import Product, product_tile
from ..common.triton_tasks import DTYPES, LIMIT, Tasks, Tile
from .kernels import gather_kernel, sum_kernel

_GATHER = {"TOKENS": 32, "COLUMNS": 64, "num_warps": 4}
_SUM = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}

#: Share of what a product reads from which another pass over its result is worth a kernel that needs none, and the most
#: neurons for which a product waits for memory, whoever computes it. Arithmetic, NOT YET MEASURED.
SAVED, MOST = 0.05, 256


def by_library(tokens: int, k: int, d: int, dtype: torch.dtype, further: bool) -> str | None:
    """Why PyTorch's product is not slower than this one; None where it is. NOT YET MEASURED: all of it is arithmetic.

    Both read ``2 tokens (k + d)`` bytes in 16 bits and compute the same. PyTorch's is one kernel of a library that is hard
    to beat, and loses

    * on ROCm, where no product of 16 bits has sums in float32: its operands are cast, three times the bytes;
    * where ``k`` or ``d`` is no multiple of 8: the library's loads of 16 bytes become narrower ones, which its manual warns
      of, and an arbitrary number of neurons is none in seven of eight layers;
    * where its result has a further pass, to be added to another or rounded to 16 bits: ``8 k d`` bytes, which count
      beside the product's where tokens are few.

    Args:
        tokens: of the operands.
        k: columns of the left one.
        d: columns of the right one.
        dtype: of both.
        further: whether the result is added to another, or in 16 bits.
    """
    if dtype == torch.float32:
        return "PyTorch's product is chosen in float32, which has no tensor cores"
    if torch.version.hip is not None or k % unit(dtype) or d % unit(dtype):
        return None
    if further and k <= MOST and 8 * k * d >= SAVED * 2 * tokens * (k + d):
        return None
    return (
        f"PyTorch's product of {tokens} tokens, {k} neurons and {d} features is as fast; NSPEC_BACKEND can ask for this"
    )


def supports(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype, add_to: Tensor | None) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    if dz.dtype not in DTYPES or dtype not in DTYPES:
        return f"the dtypes are {dz.dtype} and, of the result, {dtype}; it takes float32, bfloat16 and float16"
    if dz.device.type == "cpu" and torch.bfloat16 in (dz.dtype, dtype) and gpu.interpreted():
        # triton-lang/triton#11584
        return "Triton's interpreter multiplies the bit patterns of bfloat16, and truncates where it should round"
    for t in (dz, x, index, add_to):
        if t is not None and (t.device != dz.device or t.layout is not torch.strided):
            return f"a tensor is {t.layout} on {t.device}, the first one on {dz.device}"
    (tokens, columns), d = dz.shape, x.shape[1]
    k = columns if index is None else index.shape[0]
    if max(tokens, columns, k, d) > LIMIT:
        return f"a size is above {LIMIT}"
    if requested("neuron_wgrad") == "triton":
        return None
    return by_library(tokens, k, d, dz.dtype, add_to is not None or dtype.itemsize == 2)


def tile_of(target: str, dtype: torch.dtype, precise: str, k: int) -> Tile:
    """The block sizes of the product for so many neurons: narrow ones where one row of blocks has them all."""
    if dtype == torch.float32 and target != INTERPRETER:
        return product_tile(target, dtype, precise)
    narrow = {
        INTERPRETER: Tile(16, 32, 32, 2, 4, 1),
        "cuda:80": Tile(64, 128, 32, 4, 4, 4),
        SMALL: Tile(64, 128, 32, 4, 4, 4),
        "cuda:90": Tile(64, 128, 64, 4, 4, 4),
        "cuda:100": Tile(64, 128, 64, 4, 4, 4),
        "hip:gfx942": Tile(64, 128, 32, 4, 4, 2),
    }[target]
    return narrow if k <= narrow.m else product_tile(target, dtype, precise)


class _Plan:
    """The launches of calls that are alike in all that Triton compiles for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tile: Tile, gathers: bool, add: bool) -> None:
        self.gather = Launcher(gather_kernel, _GATHER) if gathers else None
        self.product = Product(device, dtype, False, False, tile)
        self.sum = Launcher(sum_kernel, {"ADD": add, **_SUM})

    def __call__(self, dz: Tensor, x: Tensor, index: Tensor | None, k: int, out: Tensor) -> None:
        tokens = dz.shape[0]
        if self.gather is not None:
            # What pads its rows is not written: it comes into rows of the parts that nothing reads.
            left = dz.new_empty((tokens, padded(k, dz.dtype)))
            grid = (cdiv(tokens, _GATHER["TOKENS"]), cdiv(k, _GATHER["COLUMNS"]), 1)
            self.gather(grid, dz, index, left, tokens, k, dz.shape[1], *dz.stride(), left.stride(0))
        else:
            left = dz
        parts, _ = self.product(left, x, Tasks(tokens, 1, None), None)
        d = out.shape[1]
        grid = (cdiv(k, _SUM["ROWS"]), cdiv(d, _SUM["COLUMNS"]), 1)
        self.sum(grid, parts, out, len(parts), k, d, *parts.stride()[:2], *out.stride())


@planned
def _plan(device: torch.device, dtype: torch.dtype, tile: Tile, gathers: bool, add: bool, *alike: Any) -> _Plan:
    return _Plan(device, dtype, tile, gathers, add)


def forward(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the reference."""
    k = dz.shape[1] if index is None else index.shape[0]
    out = x.new_empty((k, x.shape[1]), dtype=dtype)
    return _into(out, dz, x, index, add=False)


def accumulate(total: Tensor, dz: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """As the reference."""
    return _into(total, dz, x, index, add=True)


def _into(out: Tensor, dz: Tensor, x: Tensor, index: Tensor | None, add: bool) -> Tensor:
    if out.numel() == 0 or dz.shape[0] == 0:
        return out if add else out.zero_()
    k, x = out.shape[0], rows16(x)
    if index is None:
        dz = _whole_rows(dz)
    else:
        index = index.contiguous()
    sizes = (*dz.shape[1:], x.shape[1], *dz.stride(), x.stride(0), out.shape[1], *out.stride(), padded(k, dz.dtype))
    precise, target = precision(dz.dtype), target_of(dz.device)
    plan = _plan(
        *(dz.device, dz.dtype, tile_of(target, dz.dtype, precise, k), index is not None, add, out.dtype, precise),
        *[(n % 16 == 0, n == 1, n >= 2**31) for n in sizes],
        *(_part_strides(x.shape[1], k), aligned(dz, x, index, out)),
    )
    launching(dz.device, plan, dz, x, index, k, out)
    return out


def _part_strides(columns: int, k: int) -> bool:
    """Whether a part has addresses beyond 32 bits."""
    return padded(columns + 512, torch.float32) * (k + 512) >= 2**31


def _whole_rows(columns: Tensor) -> Tensor:
    """``columns [tokens, k]`` with rows of whole 16 bytes, as the product reads them; what pads them may be anything.

    A column adds to its own row of the result alone. So memory behind a row that is there serves as padding.
    """
    tokens, k = columns.shape
    width, (stride, step) = padded(k, columns.dtype), columns.stride()
    last = columns.storage_offset() + (tokens - 1) * stride + width
    there = last * columns.itemsize <= columns.untyped_storage().nbytes()
    if step == 1 and stride >= width and stride % unit(columns.dtype) == 0 and there and columns.data_ptr() % 16 == 0:
        return columns.as_strided((tokens, width), (stride, 1))
    return rows16(columns)
