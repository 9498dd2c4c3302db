"""Triton: packs the weights of every task's active neurons, computes on compact operands, and expands the gradients.

Packing costs one pass over the weights in each direction, whatever the number of tokens; in return every product reads
whole, aligned blocks. Products that end in something (ReLU; the gate and the sums for db1) are kernels of our own, as are
those of several tasks, in one launch each; ``common/products.py`` says which others the library computes. Every sum has a
fixed order, and every output is written once.

What tensor descriptors cannot read is copied: features that are no whole 16 bytes are padded with zeros, and so is an
in-place index of a d_ff that is no multiple of 64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.active import places_of
from ..common.products import Ways, ways
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
    processors,
    rows16,
    target_of,
)
from ..common.triton_products import Expand, Features, Product, float32_tile, multiply
from ..common.triton_tasks import (
    DTYPES,
    Sums,
    Tasks,
    Tile,
    column_sums,
    compact_width,
    refuses,
    tasks_of,
    whole,
    wide,
)
from .kernels import constant_kernel, expand_bias_kernel, pack_fc1_kernel, pack_fc2_kernel, to_neurons_kernel

PACK_ROWS = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
PACK_COLUMNS = {"NEURONS": 64, "OUTPUTS": 64, "num_warps": 4}
CONSTANT = {"BLOCKS": 64, "COLUMNS": 128, "num_warps": 8}


def neurons_tile(target: str, dtype: torch.dtype, precise: str, gate: bool) -> Tile:
    """The block sizes of ``to_neurons_kernel``: neurons, tokens, depth."""
    if target == INTERPRETER:
        return Tile(64, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps, or 3 stages, spill for 8.6 without gate (Triton 3.6), 8 warps with it (Triton 3.7).
        return float32_tile(precise, 8 if target == SMALL and not gate else 4, 2)
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


class PackedTasks(NamedTuple):
    """The weights of all tasks, neuron-major: task t has the rows ``t * width`` to ``(t + 1) * width``.

    ``fc1 [tasks * width, d_in]``, ``bias [tasks * width]`` or None, ``fc2 [tasks * width, d_out]``, with features padded to
    16 bytes; rows without a neuron are zero. ``constant [tasks, d_out]`` or None, float32 for our kernels.
    """

    fc1: Tensor
    bias: Tensor | None
    fc2: Tensor
    constant: Tensor | None
    width: int


class _Pack:
    """Gathers what the tasks need; for a plan. ``constant`` is the dtype of that of the inactive neurons; None: no need."""

    def __init__(
        self, d_ff: int, width: int, dtype: torch.dtype, biases: tuple[bool, bool], constant: torch.dtype | None
    ) -> None:
        has_b1, has_b2 = biases
        self.dtype, self.has_b1, self.constant = dtype, has_b1, constant
        self.shares = constant is not None and has_b1
        self.fc1 = Launcher(pack_fc1_kernel, {"BIAS": has_b1, "IN_PLACE": width == d_ff, **PACK_ROWS})
        self.fc2 = Launcher(pack_fc2_kernel, {"CONSTANT": self.shares, **PACK_COLUMNS})
        keywords = {"PARTS": self.shares, "BIAS": has_b2, **CONSTANT}
        self.total = Launcher(constant_kernel, keywords) if constant is not None and any(biases) else None

    def __call__(
        self, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor, places: Tensor
    ) -> PackedTasks:
        """The packed weights; the constant ``b2 + W2[:, I] relu(b1[I])``, summed in float32."""
        (tasks, index_width), dtype = index.shape, self.dtype
        (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], compact_width(index)
        rows, wide = padded(d_in, dtype), padded(d_out, dtype)
        fc1 = w1.new_empty((tasks * width, rows), dtype=dtype)
        fc2 = w1.new_empty((tasks * width, wide), dtype=dtype)
        bias = w1.new_empty(tasks * width, dtype=dtype) if self.has_b1 else None
        grid = (cdiv(width, PACK_ROWS["ROWS"]), cdiv(max(rows, wide), PACK_ROWS["COLUMNS"]), tasks)
        self.fc1(grid, w1, b1, index, fc1, bias, fc2, index_width, width, d_in, *w1.stride(), rows, wide)
        blocks, total = cdiv(d_ff, PACK_COLUMNS["NEURONS"]), None
        shares = w1.new_empty((tasks, blocks, wide), dtype=torch.float32) if self.shares else None
        grid = (blocks, cdiv(wide, PACK_COLUMNS["OUTPUTS"]), 1)
        self.fc2(grid, w2, b1, places, fc2, shares, tasks, width, d_ff, d_out, *w2.stride(), wide)
        if self.total is not None:
            total = w1.new_empty((tasks, wide), dtype=self.constant)
            self.total((tasks, cdiv(wide, CONSTANT["COLUMNS"]), 1), shares, b2, total, blocks, d_out, wide)
        return PackedTasks(fc1, bias, fc2, total, width)


class _Neurons:
    """Products into the neurons, with ReLU or with the gate; for a plan."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, bias: bool, gate: bool) -> None:
        precise, target = precision(dtype), target_of(device)
        self.tile, self.programs, self.gate = neurons_tile(target, dtype, precise, gate), processors(device), gate
        keywords = {"GROUPED": grouped, "BIAS": bias, "GATE": gate, "FLATTEN": flattens(target, dtype, grouped, gate)}
        self.launcher = Launcher(to_neurons_kernel, {**keywords, **self.tile.keywords(precise)})

    def __call__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, out: Tensor, tasks: Tasks
    ) -> Tensor | None:
        """Writes out; with the gate gives the sums over tiles of tokens, float32 ``[tiles, width]``."""
        width = out.shape[1]
        tiles = tasks.most_tiles(self.tile.n)
        sums = out.new_empty((tiles, width), dtype=torch.float32) if self.gate else None
        programs = min(self.programs, tiles * cdiv(width, self.tile.m))
        pointers = (inputs, weight, bias, h, out, sums, tasks.offsets)
        sizes = (tasks.tokens, tasks.number, width, inputs.shape[1], inputs.stride(0), weight.stride(0))
        self.launcher((programs, 1, 1), *pointers, *sizes)
        return sums


class _Forward:
    """The launches of forward passes that are alike in all that Triton compiles for."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        grouped: bool,
        library: Ways,
        biases: tuple[bool, bool],
        d_ff: int,
        width: int,
    ) -> None:
        self.library = library
        self.pack = _Pack(d_ff, width, dtype, biases, constant=dtype if library.y else torch.float32)
        self.hidden = _Neurons(device, dtype, grouped, biases[0], gate=False)
        self.features = Features(device, dtype, grouped, any(biases), library.y)

    def __call__(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        index: Tensor,
        places: Tensor,
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor, PackedTasks]:
        packed = self.pack(*weights, index, places)
        h = x.new_empty((tasks.tokens, packed.width))
        if not self.library.h:
            self.hidden(x, packed.fc1, packed.bias, None, h, tasks)
        else:
            bias = None if packed.bias is None else packed.bias.view(tasks.number, -1)
            multiply(x, packed.fc1, bias, h, tasks, task_offsets, transposed=True)
            h.relu_()  # not _addmm_activation: nothing promises that the ReLU inside it lets NaN through
        y = self.features(h, packed.fc2, packed.constant, tasks, task_offsets)
        return whole(y, weights[2].shape[0]), h, packed


class _Backward:
    """The launches of backward passes that are alike in all that Triton compiles for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, library: Ways, has_b1: bool) -> None:
        self.library, self.sums, self.tiles = library, Sums(), column_sums(grouped, False)
        self.hidden = _Neurons(device, dtype, grouped, bias=False, gate=True)
        self.features = Features(device, dtype, grouped, added=False, library=library.dx)
        self.product1, self.product2 = (Product(device, dtype, grouped, library.dw) for _ in range(2))
        self.fc1, self.fc2 = Expand(grouped), Expand(grouped, constant=has_b1)
        # Few programs, each a chain of loads: the more outputs a step has, the shorter. 256 spill for 8.0.
        outputs = 128 if target_of(device) in ("cuda:80", SMALL) else 256
        keywords = {"GROUPED": grouped, "NEURONS": 32, "OUTPUTS": outputs, "TILES": 16, "num_warps": 8}
        self.bias = Launcher(expand_bias_kernel, keywords)

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor],
        kept: tuple[Tensor, ...],
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        w1, b1, w2 = weights
        h, fc1, fc2, places = kept
        (d_ff, d_in), d_out, one, width = w1.shape, w2.shape[0], tasks.number == 1, h.shape[1]
        s = whole(self.sums(dy, tasks), d_out)
        dh, active, size = self._hidden(dy, h, fc2, tasks, task_offsets, b1 is not None)
        dx = whole(self.features(dh, fc1, None, tasks, task_offsets), d_in)
        dw1, dw2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
        self.fc1(*self.product1(dh, x, tasks, task_offsets), places, tasks, dw1)
        parts, chunk = self.product2(h, dy, tasks, task_offsets)
        self.fc2(parts, chunk, places, tasks, dw2.t(), None if b1 is None else (b1, s))
        db2 = (s[0] if one else s.sum(0)).to(w2.dtype)
        if b1 is None:
            return dx, dw1, None, dw2, db2
        db1 = b1.new_empty((tasks.number, d_ff), dtype=b1.dtype if one else torch.float32)
        sizes = (tasks.tokens, tasks.number, size, width, d_ff, d_out, *w2.stride())
        grid = (cdiv(d_ff, self.bias.keywords["NEURONS"]), tasks.number, 1)
        self.bias(grid, active, s, w2, b1, places, tasks.offsets, db1, *sizes)
        return dx, dw1, db1[0] if one else db1.sum(0).to(b1.dtype), dw2, db2

    def _hidden(
        self, dy: Tensor, h: Tensor, fc2: Tensor, tasks: Tasks, task_offsets: Tensor | None, sums: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """``dh [tokens, width]``; if wanted its sums over tiles, float32 ``[tiles, width]``; the tokens in a tile."""
        dh = torch.empty_like(h)
        if not self.library.dh:
            return dh, self.hidden(dy, fc2, None, h, dh, tasks), self.hidden.tile.n
        multiply(dy, fc2, None, dh, tasks, task_offsets, transposed=True)
        torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        if tasks.number == 1 or not sums:
            return dh, dh.sum(0, dtype=torch.float32)[None] if sums else None, max(tasks.tokens, 1)
        return dh, self.tiles(dh, tasks), self.tiles.tokens


@planned
def _forward_plan(
    device: torch.device,
    dtype: torch.dtype,
    grouped: bool,
    library: Ways,
    biases: tuple[bool, bool],
    d_ff: int,
    width: int,
    *alike: Any,
) -> _Forward:
    return _Forward(device, dtype, grouped, library, biases, d_ff, width)


@planned
def _backward_plan(
    device: torch.device, dtype: torch.dtype, grouped: bool, library: Ways, has_b1: bool, *alike: Any
) -> _Backward:
    return _Backward(device, dtype, grouped, library, has_b1)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    index: Tensor,
    task_offsets: Tensor | None,
    places: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As the reference; the constant of the inactive neurons is summed in float32.

    Weights and biases may be float32 whatever the dtype of x. Keeps h, and the packed weights and the places.
    """
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], index.shape[1]
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        return x.new_empty((0, d_out)), (x.new_empty((0, width)),)
    places = places_of(index, d_ff) if places is None else places.contiguous()
    x, index = rows16(x), index.contiguous()
    b1, b2 = None if b1 is None else b1.contiguous(), None if b2 is None else b2.contiguous()
    biases = b1 is not None, b2 is not None
    plan = _forward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, ways(x.dtype, task_offsets), biases, d_ff, width),
        *(w1.dtype, d_in, d_out, w1.stride(), w2.stride(), x.stride(0), precision(x.dtype)),
        aligned(w1, b1, w2, b2, index, places),
    )
    y, h, packed = launching(x.device, plan, x, (w1, b1, w2, b2), index, places, tasks, task_offsets)
    return y, (whole(h, width), packed.fc1, packed.fc2, places)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    index: Tensor,
    task_offsets: Tensor | None,
    h: Tensor,
    *kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """As the reference; sums over tokens and over tasks are in float32. Packs again where nothing but h was kept."""
    (d_ff, d_in), d_out, width = w1.shape, w2.shape[0], compact_width(index)
    tasks = tasks_of(x.shape[0], task_offsets, x.device)
    if tasks.tokens == 0:
        zeros = w1.new_zeros
        return x.new_zeros(x.shape), zeros(w1.shape), zeros(d_ff), zeros(w2.shape), zeros(d_out)
    b1 = None if b1 is None else b1.contiguous()
    if not kept:
        index, places = index.contiguous(), places_of(index, d_ff)
        pack = _Pack(d_ff, index.shape[1], x.dtype, (b1 is not None, False), constant=None)
        packed = launching(x.device, pack, w1, b1, w2, None, index, places)
        kept = packed.fc1, packed.fc2, places
    dy, x, h = rows16(dy), rows16(x), wide(h, width)
    plan = _backward_plan(
        *(x.device, x.dtype, tasks.offsets is not None, ways(x.dtype, task_offsets), b1 is not None),
        *(w1.dtype, d_ff, d_in, d_out, width, w1.stride(), w2.stride(), x.stride(0), dy.stride(0)),
        *(precision(x.dtype), aligned(b1, w2, *kept)),
    )
    return launching(x.device, plan, dy, x, (w1, b1, w2), (h, *kept), tasks, task_offsets)


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor, task_offsets: Tensor | None
) -> str | None:
    """None, or why these arguments are not taken. Any strides and addresses are: what does not fit is copied."""
    cast = (
        x.dtype in DTYPES and w1.dtype == torch.float32 and all(t is None or t.dtype == w1.dtype for t in (b1, w2, b2))
    )
    return refuses((x, w1, b1, w2, b2), index, x.shape[0], same=not cast)
