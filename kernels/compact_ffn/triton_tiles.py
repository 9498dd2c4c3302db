"""Triton: block sizes of the kernels for each target, and everything that is launched there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..common.kernels import from_neurons_kernel, task_sums_kernel
from ..common.products import launched
from ..common.triton_launch import INTERPRETER, SMALL, Shipped, pointer
from ..common.triton_tasks import Tile, task_sums_launch
from ..row_sparse_wgrad.triton import precisions
from .kernels import constant_kernel, expand_bias_kernel, pack_fc1_kernel, pack_fc2_kernel, to_neurons_kernel

PACK_ROWS = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
PACK_COLUMNS = {"NEURONS": 64, "OUTPUTS": 64, "num_warps": 4}
CONSTANT = {"BLOCKS": 64, "COLUMNS": 128, "num_warps": 8}


def expand_bias_launch(target: str, grouped: bool) -> dict[str, Any]:
    """What a launch of ``expand_bias_kernel`` gives by keyword."""
    # Few programs, each a chain of loads: the more outputs a step has, the shorter. 256 spill for 8.0.
    outputs = 128 if target in ("cuda:80", SMALL) else 256
    return {"GROUPED": grouped, "NEURONS": 32, "OUTPUTS": outputs, "TILES": 16, "num_warps": 8}


def _float32_tile(precise: str, warps: int, stages: int) -> Tile:
    """Without tensor cores ("ieee") accumulator and operands share the registers: a spill decides the warps."""
    return Tile(64, 64, 32, 8, 4, 2) if precise == "tf32" else Tile(64, 64, 16, 8, warps, stages)


def neurons_tile(target: str, dtype: torch.dtype, precise: str, gate: bool) -> Tile:
    """The block sizes of ``to_neurons_kernel``: neurons, tokens, depth."""
    if target == INTERPRETER:
        return Tile(64, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps, or 3 stages, spill for 8.6 without gate (Triton 3.6), 8 warps with it (Triton 3.7).
        return _float32_tile(precise, 8 if target == SMALL and not gate else 4, 2)
    return {
        "cuda:80": Tile(128, 128, 64, 8, 8, 3),
        SMALL: Tile(128, 128, 32, 8, 8, 3),
        "cuda:90": Tile(128, 256, 64, 8, 8, 3),
        # With 8 warps the transposed store aborts the compiler on 10.0 (Triton 3.6 and 3.7).
        "cuda:100": Tile(128, 128, 64, 8, 4, 3),
        "hip:gfx942": Tile(128, 128, 64, 8, 8, 2),
    }[target]


def flattens(target: str, dtype: torch.dtype, grouped: bool, gate: bool) -> bool:
    """Whether the loop over the tiles of ``to_neurons_kernel`` is flattened with that over their steps.

    The gate's block of h does not fit beside three stages then, a task is found by a loop of its own, and flattening spills
    or takes twice the shared memory elsewhere, as in ``linear_relu_count``.
    """
    return not (grouped or gate) and (target == INTERPRETER or (target == "cuda:90" and dtype != torch.float32))


def features_tile(target: str, dtype: torch.dtype, precise: str) -> Tile:
    """The block sizes of ``from_neurons_kernel``: tokens, features, depth."""
    if target == INTERPRETER:
        return Tile(32, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps spill for 10.0 (Triton 3.6); with 8, the wider wavefronts of AMD would load less than 16 bytes a thread.
        return _float32_tile(precise, 4, 2) if target.startswith("hip") else _float32_tile(precise, 8, 3)
    return {
        "cuda:80": Tile(128, 128, 64, 8, 8, 3),
        SMALL: Tile(128, 128, 32, 8, 8, 3),
        "cuda:90": Tile(128, 256, 64, 8, 8, 3),
        "cuda:100": Tile(128, 256, 64, 8, 8, 3),
        "hip:gfx942": Tile(128, 128, 64, 8, 8, 2),
    }[target]


def shipped(target: str) -> list[Shipped]:
    """Every kernel and configuration that can be launched on a target; ``row_sparse_wgrad`` lists those that it lends."""
    kernels = []
    for dtype in (torch.bfloat16, torch.float32):
        for given in dict.fromkeys((dtype, torch.float32)):
            kernels += _shipped_packing(target, given, dtype)
        for precise in precisions(target, dtype):
            kernels += _shipped_products(target, dtype, precise)
    signature = {"sums_ptr": "*fp32", "out_ptr": "*fp32", "offsets_ptr": "*i64"}
    signature |= dict.fromkeys(("tokens", "columns", "size"), "i32")
    aligned = ("sums_ptr", "out_ptr", "columns")
    kernels.append(Shipped("sums of tasks", task_sums_kernel, signature, task_sums_launch(), aligned))
    return kernels


def _label(grouped: bool) -> str:
    return "tasks" if grouped else "one task"


def _offsets(grouped: bool, signature: dict[str, str]) -> dict[str, None]:
    """Puts the offsets into the signature where there are several tasks; gives the constants that there are else."""
    if not grouped:
        return {"offsets_ptr": None}
    signature["offsets_ptr"] = "*i64"
    return {}


def _shipped_packing(target: str, given: torch.dtype, dtype: torch.dtype) -> list[Shipped]:
    """The kernels that read weights in dtype ``given``, for products in ``dtype``."""
    w, p = pointer(given), pointer(dtype)
    name = str(dtype).removeprefix("torch.") + ("" if given == dtype else " of float32")
    kernels = []

    def add(
        label: str, kernel: Any, pointers: dict[str, str], sizes: Sequence[str], keywords: dict, covered: bool = False
    ) -> None:
        signature = {**pointers, **dict.fromkeys(sizes, "i32")}
        aligned = tuple(argument for argument in signature if argument not in ("tokens", "tasks", "size", "blocks"))
        kernels.append(Shipped(f"{label} {name}", kernel, signature, keywords, aligned, covered=covered))

    pointers = {"w1_ptr": w, "b1_ptr": w, "index_ptr": "*i64", **dict.fromkeys(("fc1_ptr", "bias_ptr", "fc2_ptr"), p)}
    sizes: Sequence[str] = ("index_width", "width", "d_in", "w1_stride", "fc1_stride", "fc2_stride")
    for in_place in (False, True):
        keywords = {"BIAS": True, "IN_PLACE": in_place, "w1_column_stride": 1, **PACK_ROWS}
        label = f"pack fc1 {'in place' if in_place else 'compact'}"
        add(label, pack_fc1_kernel, pointers, sizes, keywords, covered=in_place or dtype == torch.float32)
    reads = {"w2_ptr": w, "b1_ptr": w, "places_ptr": "*i32"}
    sizes = ("tasks", "width", "d_ff", "d_out", "w2_stride", "fc2_stride")
    packing = {"w2_column_stride": 1, **PACK_COLUMNS}
    pointers = {**reads, "fc2_ptr": p}
    add("pack fc2", pack_fc2_kernel, pointers, sizes, {**packing, "CONSTANT": False, "parts_ptr": None}, covered=True)
    pointers["parts_ptr"] = "*fp32"
    add("pack fc2 and constant", pack_fc2_kernel, pointers, sizes, {**packing, "CONSTANT": True})
    pointers = {"parts_ptr": "*fp32", "b2_ptr": w, "out_ptr": p}
    add(
        "constant",
        constant_kernel,
        pointers,
        ("blocks", "d_out", "columns"),
        {"PARTS": True, "BIAS": True, **CONSTANT},
    )
    sizes = ("tokens", "tasks", "size", "width", "d_ff", "d_out", "w2_stride")
    for grouped in (False, True):
        pointers = {**reads, "active_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*fp32" if grouped else w}
        options: dict[str, Any] = {**_offsets(grouped, pointers), "w2_column_stride": 1}
        options |= expand_bias_launch(target, grouped)
        add(f"expand bias {_label(grouped)}", expand_bias_kernel, pointers, sizes, options, covered=not grouped)
    return kernels


def _shipped_products(target: str, dtype: torch.dtype, precise: str) -> list[Shipped]:
    p, name = pointer(dtype), f"{str(dtype).removeprefix('torch.')} {precise}"
    expect = ("product32",) if dtype == torch.float32 else ("product16",)
    kernels = []
    for grouped in (False, True):
        for gate in (False, True):
            if not launched("dh" if gate else "h", dtype, grouped, target):
                continue
            tile = neurons_tile(target, dtype, precise, gate)
            sizes = ("width", "depth", "in_stride", "weight_stride")
            signature = {**dict.fromkeys(("in_ptr", "weight_ptr", "out_ptr"), p), **dict.fromkeys(sizes, "i32")}
            signature |= {"h_ptr": p, "sums_ptr": "*fp32"} if gate else {"bias_ptr": p}
            aligned = tuple(signature)
            signature |= {"tokens": "i32", "tasks": "i32"}
            keywords = {"GROUPED": grouped, "GATE": gate, "BIAS": not gate, **tile.keywords(precise)}
            keywords |= {"bias_ptr": None} if gate else {"h_ptr": None, "sums_ptr": None}
            keywords |= {"FLATTEN": flattens(target, dtype, grouped, gate), **_offsets(grouped, signature)}
            label = f"{'gated' if gate else 'relu'} {name} {_label(grouped)} {tile.m}x{tile.n}"
            kernels.append(Shipped(label, to_neurons_kernel, signature, keywords, aligned, expect))
        for constant in (False, True):
            if not launched("y" if constant else "dx", dtype, grouped, target):
                continue
            tile = features_tile(target, dtype, precise)
            signature = {**dict.fromkeys(("in_ptr", "weight_ptr", "out_ptr"), p), "width": "i32", "columns": "i32"}
            if constant:
                signature["constant_ptr"] = "*fp32"
            aligned = tuple(signature)
            signature |= {"tokens": "i32", "tasks": "i32"}
            keywords = {"GROUPED": grouped, "CONSTANT": constant, **tile.keywords(precise)}
            keywords |= {**({} if constant else {"constant_ptr": None}), **_offsets(grouped, signature)}
            label = f"features {name} {_label(grouped)}{' constant' if constant else ''} {tile.m}x{tile.n}"
            kernels.append(Shipped(label, from_neurons_kernel, signature, keywords, aligned, expect, not constant))
    return kernels
