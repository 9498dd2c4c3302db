"""Triton: the products of several operators, with their block sizes: of packed operands, in one launch for all tasks.

Once the active columns are packed every product is a plain one. ``products.py`` says which the library computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .kernels import expand_kernel, from_neurons_kernel, pack_neurons_kernel, product_kernel
from .products import mm_float32
from .triton_launch import INTERPRETER, SMALL, Launcher, cdiv, padded, precision, processors, target_of
from .triton_tasks import WIDTH_MULTIPLE, Tasks, Tile, compact_width, wide

_PACK = {"NEURONS": 64, "FEATURES": 64, "num_warps": 4}
MOST_SPLITS = 8  # chunks of a task of average size
ROWS, COLUMNS = 64, 32  # block of the result in the sum over parts; with twice that it spills for 8.0


def float32_tile(precise: str, warps: int, stages: int) -> Tile:
    """Without tensor cores ("ieee") accumulator and operands share the registers: a spill decides the warps."""
    return Tile(64, 64, 32, 8, 4, 2) if precise == "tf32" else Tile(64, 64, 16, 8, warps, stages)


def features_tile(target: str, dtype: torch.dtype, precise: str) -> Tile:
    """The block sizes of ``from_neurons_kernel``: tokens, features, depth."""
    if target == INTERPRETER:
        return Tile(32, 32, 32, 2, 4, 1)
    if dtype == torch.float32:
        # 4 warps spill for 10.0 (Triton 3.6); with 8, the wider wavefronts of AMD would load less than 16 bytes a thread.
        return float32_tile(precise, 4, 2) if target.startswith("hip") else float32_tile(precise, 8, 3)
    return {
        "cuda:80": Tile(128, 128, 64, 8, 8, 3),
        SMALL: Tile(128, 128, 32, 8, 8, 3),
        "cuda:90": Tile(128, 256, 64, 8, 8, 3),
        "cuda:100": Tile(128, 256, 64, 8, 8, 3),
        "hip:gfx942": Tile(128, 128, 64, 8, 8, 2),
    }[target]


def product_tile(target: str, dtype: torch.dtype, precise: str) -> Tile:
    """The block sizes of the product on a target."""
    if target == INTERPRETER:
        return Tile(32, 64, 32, 2, 4, 1)
    if dtype == torch.float32:  # without tensor cores ("ieee"), accumulator and operands share the registers
        return Tile(64, 64, 16 if precise == "ieee" else 32, 4, 4, 2)
    return {
        "cuda:80": Tile(128, 256, 32, 4, 8, 4),
        SMALL: Tile(128, 128, 32, 4, 8, 4),
        "cuda:90": Tile(128, 256, 64, 4, 8, 4),
        "cuda:100": Tile(128, 256, 64, 4, 8, 4),
        "hip:gfx942": Tile(128, 128, 32, 4, 8, 2),
    }[target]


def has_tma(target: str) -> bool:
    """Whether devices of a target copy blocks by themselves; the interpreter does as they do."""
    return target in ("cuda:90", "cuda:100", INTERPRETER)


def multiply(
    a: Tensor,
    weight: Tensor,
    added: Tensor | None,
    out: Tensor,
    tasks: Tasks,
    task_offsets: Tensor | None,
    transposed: bool = False,
) -> None:
    """Writes ``out = a weight + added`` by the library: each task's tokens with its rows of the weights.

    Args:
        a: ``[tokens, n]``.
        weight: ``[tasks * n, columns]``; transposed ``[tasks * columns, n]``.
        added: ``[tasks, columns]``, or None.
        out: ``[tokens, columns]``.
        tasks: at least one token.
        task_offsets: as the operator got them.
        transposed: whether the weights are.
    """
    if tasks.number == 1:
        _multiply(a, weight.t() if transposed else weight, None if added is None else added[0], out)
        return
    rows = len(weight) // tasks.number
    for task, (start, stop) in enumerate(checks.segments(task_offsets, tasks.tokens)):
        own = weight[task * rows : (task + 1) * rows]
        constant = None if added is None else added[task]
        _multiply(a[start:stop], own.t() if transposed else own, constant, out[start:stop])


def _multiply(a: Tensor, b: Tensor, constant: Tensor | None, out: Tensor) -> None:
    if constant is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(constant.to(a.dtype), a, b, out=out)


class Features:
    """Products of each task's tokens with rows of its own, in one launch; for a plan.

    Args:
        device: of the operands.
        dtype: of the operands.
        grouped: whether there are several tasks.
        added: whether something is added.
        library: whether the library computes it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, grouped: bool, added: bool, library: bool) -> None:
        precise, target = precision(dtype), target_of(device)
        self.library, self.tile, self.programs = library, features_tile(target, dtype, precise), processors(device)
        keywords = {"GROUPED": grouped, "CONSTANT": added, **self.tile.keywords(precise)}
        self.launcher = Launcher(from_neurons_kernel, keywords)

    def __call__(
        self,
        inputs: Tensor,
        weight: Tensor,
        added: Tensor | None,
        tasks: Tasks,
        task_offsets: Tensor | None,
        transposed: bool = False,
    ) -> Tensor:
        """``inputs weight + added``, ``[tokens, columns]``; as :func:`multiply`, transposed by the library alone."""
        depth, columns = inputs.shape[1], len(weight) // tasks.number if transposed else weight.shape[1]
        out = inputs.new_empty((tasks.tokens, columns))
        if self.library:
            multiply(inputs, weight, added, out, tasks, task_offsets, transposed)
            return out
        # A step over the edge would multiply zeros by rows of the next task, whose NaN and infinities would give NaN.
        assert depth % self.tile.k == 0, f"{depth} packed columns are no multiple of a step of {self.tile.k}"
        programs = min(self.programs, tasks.most_tiles(self.tile.m) * cdiv(columns, self.tile.n))
        sizes = (tasks.tokens, tasks.number, depth, columns)
        self.launcher((programs, 1, 1), inputs, weight, added, out, tasks.offsets, *sizes)
        return out


class Pack:
    """The weights of the neurons of every task; for a plan.

    Args:
        rows: whether a neuron is a row of the result, or a column.
        bias: whether there is one.
        in_place: whether the index is in the in-place layout.
        fill: whether the padding of the compact layout repeats the task's first neuron.
    """

    def __init__(self, rows: bool, bias: bool = False, in_place: bool = False, fill: bool = False) -> None:
        self.rows = rows
        # Without a bias the layout makes no difference here.
        keywords = {"BIAS": bias, "IN_PLACE": bias and in_place, "FILL": fill and not in_place, **_PACK}
        self.launcher = Launcher(pack_neurons_kernel, keywords)

    def __call__(self, source: Tensor, bias: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Packs.

        Args:
            source: ``[d_ff, features]``, of any strides.
            bias: ``[d_ff]``, contiguous, or None.
            index: int64 ``[tasks, index width]``, contiguous.

        Returns:
            ``[tasks * width, padded features]``, each row of whole 16 bytes, or ``[tasks * deep features, width]`` with
            whole steps of a product, and the bias, float32 ``[tasks, width]``; ``width`` is that of ``compact_width``.
        """
        (tasks, index_width), features, width = index.shape, source.shape[1], compact_width(index)
        if self.rows:
            out_features = padded(features, source.dtype)
            out = source.new_empty((tasks * width, out_features))
            strides = (*source.stride(), out_features, 1)
        else:
            out_features = deep(features)
            out = source.new_empty((tasks * out_features, width))
            strides = (*source.stride(), 1, width)
        packed_bias = None if bias is None else source.new_empty((tasks, width), dtype=torch.float32)
        sizes = (index_width, width, features, out_features, *strides)
        grid = (cdiv(width, _PACK["NEURONS"]), cdiv(out_features, _PACK["FEATURES"]), tasks)
        self.launcher(grid, source, bias, index, out, packed_bias, *sizes)
        return out, packed_bias


def deep(features: int) -> int:
    """``features``, rounded up to whole steps of a product over them."""
    return cdiv(features, WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class Multiply:
    """The product of each task's tokens with the weights of its neurons; for a plan.

    Args:
        device: of the operands.
        dtype: of the operands.
        grouped: whether there are several tasks.
        library: whether the library computes it.
        to_neurons: ``inputs sourceᵀ + bias``; else ``inputs source + constant``.
        added: whether there is that bias, or that constant.
        in_place: whether the index is in the in-place layout.
        fill: whether the padding of the compact layout repeats the result of the task's first neuron.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        grouped: bool,
        library: bool,
        to_neurons: bool,
        added: bool = False,
        in_place: bool = False,
        fill: bool = False,
    ) -> None:
        self.library, self.to_neurons = library, to_neurons
        self.pack = Pack(library or not to_neurons, to_neurons and added, in_place, fill)
        self.product = Features(device, dtype, grouped, added, library)

    def __call__(
        self,
        inputs: Tensor,
        source: Tensor,
        added: Tensor | None,
        index: Tensor,
        tasks: Tasks,
        task_offsets: Tensor | None,
    ) -> Tensor:
        """Multiplies.

        Args:
            inputs: ``[tokens, features]``, or ``[tokens, width]`` in the layout of the index.
            source: ``[d_ff, features]``, of any strides.
            added: to neurons the bias ``[d_ff]``, contiguous; else the constant ``[tasks, features]``, float32 unless the
                library computes; or None.
            index: int64 ``[tasks, index width]``, contiguous.
            tasks: at least one token.
            task_offsets: as the operator got them.

        Returns:
            ``[tokens, width]`` or ``[tokens, padded features]``.
        """
        weight, bias = self.pack(source, added if self.to_neurons else None, index)
        if self.to_neurons:
            added, depth = bias, weight.shape[1] if self.library else deep(source.shape[1])
        else:
            depth = compact_width(index)
            if added is not None and added.shape[1] < weight.shape[1]:
                added = torch.nn.functional.pad(added, (0, weight.shape[1] - added.shape[1]))
        transposed = self.library and self.to_neurons
        return self.product(wide(inputs, depth), weight, added, tasks, task_offsets, transposed)


def chunk_of(tasks: Tasks, tiles: int, programs: int, step: int) -> int:
    """Tokens in a chunk, a multiple of ``step``: the fewest that fill the device evenly for tasks of equal size.

    Args:
        tasks: at least one token.
        tiles: blocks of the result of one task.
        programs: how many run side by side.
        step: tokens in a step of the product.
    """
    tokens = cdiv(tasks.tokens, tasks.number)
    items = tiles * tasks.number
    # The time of the product in waves of programs, and of writing and reading a part, a few per cent of a wave each.
    # The latter is arithmetic for 16384 tokens and d_in 1024, NOT YET MEASURED.
    splits = range(1, max(1, min(MOST_SPLITS, tokens // (2 * step))) + 1)
    best = min(splits, key=lambda s: cdiv(items * s, programs) / s * programs / items + 0.03 * s)
    return max(cdiv(cdiv(tokens, best), step), 1) * step


class Product:
    """The product over tokens, in parts, one for each chunk of each task's tokens; for a plan.

    Args:
        device: of the operands.
        dtype: of the operands.
        grouped: whether there are several tasks.
        library: whether the library computes it.
        tile: other block sizes than those of :func:`product_tile`.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, grouped: bool, library: bool, tile: Tile | None = None
    ) -> None:
        self.library = library
        precise, target = precision(dtype), target_of(device)
        self.tile, self.programs = tile or product_tile(target, dtype, precise), processors(device)
        keywords = {"GROUPED": grouped, "TMA": has_tma(target), **self.tile.keywords(precise)}
        self.launcher = Launcher(product_kernel, keywords)

    def __call__(self, left: Tensor, right: Tensor, tasks: Tasks, task_offsets: Tensor | None) -> tuple[Tensor, int]:
        """``leftᵀ right``.

        Args:
            left: ``[tokens, width]``, as ``rows16`` gives it.
            right: ``[tokens, columns]``, likewise.
            tasks: at least one token.
            task_offsets: as the operator got them.

        Returns:
            float32 ``[parts, >= width, >= columns]``, the chunks of a task behind each other; the tokens in a chunk.
        """
        width, columns = left.shape[1], right.shape[1]
        if self.library:
            if tasks.number == 1:
                return mm_float32(left.t(), right)[None], tasks.tokens
            bounds = checks.segments(task_offsets, tasks.tokens)
            products = [mm_float32(left[a:b].t(), right[a:b])[None] for a, b in bounds if a < b]
            return products[0] if len(products) == 1 else torch.cat(products), tasks.tokens
        tile = self.tile
        down, across = cdiv(width, tile.m), cdiv(columns, tile.n)
        chunk = chunk_of(tasks, down * across, self.programs, tile.k)
        count = tasks.most_tiles(chunk)
        parts = torch.empty((count, down * tile.m, across * tile.n), dtype=torch.float32, device=left.device)
        sizes = (tasks.tokens, tasks.number, chunk, width, columns, left.stride(0), right.stride(0))
        self.launcher((count * down * across, 1, 1), left, right, parts, tasks.offsets, *sizes)
        return parts, chunk


class Expand:
    """Rows of the result from what :class:`Product` gives; for a plan.

    Args:
        grouped: whether there are several tasks.
        constant: whether it is the gradient of W2, with what the constants of neurons add that a task has not.
        add: add to a float32 result in the rows that some task has, and touch no other row.
        whole: whether the parts have a row for every neuron, not for every place.
    """

    def __init__(self, grouped: bool, constant: bool = False, add: bool = False, whole: bool = False) -> None:
        kinds = {"GROUPED": grouped, "CONSTANT": constant, "ADD": add, "WHOLE": whole}
        self.launcher = Launcher(expand_kernel, {**kinds, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4})

    def __call__(
        self,
        parts: Tensor,
        chunk: int,
        places: Tensor,
        tasks: Tasks,
        out: Tensor,
        constant: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Writes ``out [d_ff, columns]``, of any strides: the sums of the parts in the order of tasks and chunks.

        Args:
            parts: as :class:`Product` gives them.
            chunk: the tokens in a chunk, likewise.
            places: int32 ``[tasks, d_ff]``, see ``places_of``.
            tasks: as for the parts.
            out: any dtype of the kernels.
            constant: b1 ``[d_ff]`` and the sums of dy by task, float32 ``[tasks, columns]``: where a task has not the
                neuron, it adds the product of the two, b1 after ReLU.
        """
        neurons, columns = out.shape
        bias, sums = constant or (None, None)
        sizes = (tasks.tokens, tasks.number, chunk, neurons, columns, *parts.stride()[:2], *out.stride())
        grid = (cdiv(neurons, ROWS), cdiv(columns, COLUMNS), 1)
        self.launcher(grid, parts, places, tasks.offsets, bias, sums, out, *sizes)
