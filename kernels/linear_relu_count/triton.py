"""One persistent Triton kernel: the product, bias, ReLU, rounding, and the counts of the rounded output.

Neurons lie along M of the matrix product and tokens along N (``acc[neuron, token]``): the sum over tokens then runs along
the accumulator's rows, nearly all of it within a thread. The other way round it crosses warps. ``h [tokens, d_ff]`` is
stored through a transposed tile.

Counts are added with relaxed integer atomics. Integer addition does not depend on the order, so the result is the same
every time, without the workspace and the second kernel that sums of floats need.

The operands are read through tensor descriptors, TMA on NVIDIA since 9.0 and asynchronous or plain copies elsewhere.
Matrices whose rows do not begin at multiples of 16 bytes are copied into rows that do (``rows16``); where ``d_ff`` itself
is no multiple of 16 bytes, ``h`` is computed in wider rows and copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.checks import PLAIN
from ..common.triton_launch import (
    INTERPRETER,
    SMALL,
    Launcher,
    aligned,
    cdiv,
    launching,
    offsets_on,
    padded,
    planned,
    precision,
    processors,
    rows16,
    target_of,
    unit,
)
from .kernels import count_straddling_kernel, forward_kernel, tile_tasks_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGE = ("cuda:80", "cuda:90")  # whose shared memory holds a 128x128 tile of float32
_LIMIT = 2**31 - 512  # coordinates of a descriptor are int32, and the last tile may reach over the edge


def _tiles(target: str, dtype: torch.dtype, precise: str) -> list[dict[str, Any]]:
    """The launch keywords for a target, the larger tiles first; the last is for few tokens or neurons."""

    def tile(bm: int, bn: int, bk: int, warps: int, stages: int, flatten: bool = True) -> dict[str, Any]:
        sizes = {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "FLATTEN": flatten}
        return {**sizes, "UNIT": unit(dtype), "PRECISION": precise, "num_warps": warps, "num_stages": stages}

    if target == INTERPRETER:
        return [tile(64, 64, 32, 4, 1), tile(32, 32, 16, 4, 1)]
    # Not flattened where that takes twice the shared memory (gfx942) or spills (10.0, Triton 3.6).
    flat = target not in ("cuda:100", "hip:gfx942")
    if dtype == torch.float32:
        small = tile(64, 64, 16 if precise == "ieee" else 32, 4, 2, flat)
        # ieee has no tensor cores: accumulator and operands share the registers.
        return [tile(128, 128, 32, 8, 3), small] if precise == "tf32" and target in _LARGE else [small]
    return {
        "cuda:80": [tile(128, 128, 64, 8, 3), tile(64, 64, 64, 4, 3)],
        SMALL: [tile(128, 128, 32, 8, 3), tile(64, 64, 32, 4, 3)],
        # At 790 TFLOP/s 128x256 asks 9.3 TB/s of the L2 cache, 128x128 12.3 TB/s.
        "cuda:90": [tile(128, 256, 64, 8, 3), tile(128, 128, 64, 4, 3)],
        # On 10.0 the transposed store aborts the compiler with 8 warps, and 128x256 spills with 4 (Triton 3.6 and 3.7).
        "cuda:100": [tile(128, 128, 64, 4, 3, flat)],
        "hip:gfx942": [tile(128, 128, 64, 8, 2, flat), tile(64, 64, 64, 4, 2, flat)],
    }[target]


def _choose(tiles: list[dict[str, Any]], d_ff: int, tokens: int, programs: int) -> dict[str, Any]:
    """The largest tiles that give every multiprocessor one; else the smallest."""
    for tile in tiles:
        if cdiv(d_ff, tile["BM"]) * cdiv(tokens, tile["BN"]) >= programs:
            return tile
    return tiles[-1]


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
) -> str | None:
    """Why :func:`forward` cannot take these arguments, in one line; None where it can."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("valid", valid)):
        if t is not None and (type(t) not in PLAIN or t.device != x.device or t.layout is not torch.strided):
            return f"{name} is a {type(t).__name__}, {t.layout}, on {t.device} (x: {x.device})"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = [str(t.dtype) for t in (x, weight, bias) if t is not None]
        return f"the dtypes are {', '.join(given)}; it takes one of float32, bfloat16 and float16"
    if x.shape[1] == 0 or max(*x.shape, *weight.shape) > _LIMIT:
        return f"x is {list(x.shape)} and weight {list(weight.shape)}; it takes sizes from 1 to {_LIMIT}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, task_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x [tokens, d_in]``, ``weight [d_ff, d_in]`` -> ``h [tokens, d_ff]``, ``counts`` int64 ``[tasks, d_ff]``.

    float32 sums; float32 operands are multiplied in TF32 where PyTorch may. The result has the same bits every time.
    Nothing waits for the device.

    Args:
        x: float32, bfloat16 or float16.
        weight: like ``x``.
        bias: like ``x``, ``[d_ff]``, or None.
        valid: bool ``[tokens]`` or None.
        task_offsets: int32 or int64 ``[tasks + 1]`` or None, on the CPU or on the device.

    Raises:
        ValueError: ``task_offsets`` is on the CPU and does not rise from 0 to the number of tokens.
    """
    tokens, d_ff = x.shape[0], weight.shape[0]
    tasks = 1 if task_offsets is None else task_offsets.shape[0] - 1
    if tasks == 0 and tokens > 0:
        raise ValueError(f"task_offsets has 1 number, so no task has the {tokens} tokens")
    h = x.new_empty((tokens, padded(d_ff, x.dtype)))
    counts = x.new_zeros((tasks, d_ff), dtype=torch.int64)
    if task_offsets is not None:
        task_offsets = offsets_on(task_offsets, tokens, x.device)
    if tokens and d_ff:
        bias = None if bias is None else bias.contiguous()
        valid = None if valid is None else valid.contiguous().view(torch.uint8)
        launching(x.device, _launch, rows16(x), rows16(weight), bias, valid, task_offsets, h, counts)
    return h if h.shape[1] == d_ff else h[:, :d_ff].contiguous(), counts


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    offsets: Tensor | None,
    h: Tensor,
    counts: Tensor,
) -> None:
    tokens, d_ff, (tasks, step) = x.shape[0], weight.shape[0], (counts.shape[0], unit(x.dtype))
    programs, precise = processors(x.device), precision(x.dtype)
    tile = _choose(_tiles(target_of(x.device), x.dtype, precise), d_ff, tokens, programs)
    options = bias is not None, valid is not None, offsets is not None
    kind = _plan(x.device, x.dtype, tile["BM"], tile["BN"], precise, *options, aligned(bias, valid, offsets))
    columns = cdiv(tokens, tile["BN"])
    tile_task = None
    if offsets is not None:
        tile_task = torch.empty(columns, dtype=torch.int32, device=x.device)
        grid = (cdiv(columns, kind.tile_tasks.keywords["BLOCK"]), 1, 1)
        kind.tile_tasks(grid, offsets, tile_task, tokens, tasks, columns)
    strides = x.stride(0) // step, weight.stride(0) // step
    grid = (min(programs, cdiv(d_ff, tile["BM"]) * columns), 1, 1)
    pointers = (x, weight, bias, valid, tile_task, h, counts)
    kind.forward(grid, *pointers, tokens, d_ff, x.shape[1] // step, h.shape[1] // step, *strides)
    if offsets is not None:
        grid = (tasks, cdiv(d_ff, kind.straddling.keywords["COLUMNS"]), 1)
        kind.straddling(grid, h, valid, offsets, counts, tokens, d_ff, h.shape[1] // step)


class _Plan(NamedTuple):
    forward: Launcher
    tile_tasks: Launcher
    straddling: Launcher


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    bm: int,
    bn: int,
    precise: str,
    has_bias: bool,
    has_valid: bool,
    has_tasks: bool,
    addresses: tuple[bool, ...],
) -> _Plan:
    """The launches of calls that are alike in all this; the sizes are not specialised on."""
    tile = next(t for t in _tiles(target_of(device), dtype, precise) if (t["BM"], t["BN"]) == (bm, bn))
    sizes = {"BN": tile["BN"], "UNIT": tile["UNIT"], "ROWS": 32, "COLUMNS": 128}
    options = {"HAS_BIAS": has_bias, "HAS_VALID": has_valid, "HAS_TASKS": has_tasks}
    return _Plan(
        Launcher(forward_kernel, {**tile, **options}),
        Launcher(tile_tasks_kernel, {"BN": tile["BN"], "BLOCK": 128, "num_warps": 4}),
        Launcher(count_straddling_kernel, {**sizes, "HAS_VALID": has_valid, "num_warps": 4}),
    )
