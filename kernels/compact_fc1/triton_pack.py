"""Triton: weights of every task's active neurons, packed, and the products with them; ``compact_fc2`` uses them too."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from ..common.kernels import from_neurons_kernel, pack_neurons_kernel
from ..common.triton_launch import Launcher, Shipped, cdiv, padded, pointer, precision, processors, target_of
from ..common.triton_tasks import WIDTH_MULTIPLE, Tasks, compact_width, wide
from ..compact_ffn.triton_tiles import features_tile

_PACK = {"NEURONS": 64, "FEATURES": 64, "num_warps": 4}


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
        precise, target = precision(dtype), target_of(device)
        self.tile, self.programs = features_tile(target, dtype, precise), processors(device)
        keywords = {"GROUPED": grouped, "CONSTANT": added, **self.tile.keywords(precise)}
        self.launcher = Launcher(from_neurons_kernel, keywords)

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
        width, dtype = compact_width(index), inputs.dtype
        weight, bias = self.pack(source, added if self.to_neurons else None, index)
        columns = width if self.to_neurons else weight.shape[1]
        if self.to_neurons:
            added = bias
        elif added is not None and added.shape[1] < columns:
            added = torch.nn.functional.pad(added, (0, columns - added.shape[1]))
        depth = (weight.shape[1] if self.library else deep(source.shape[1])) if self.to_neurons else width
        inputs = wide(inputs, depth)
        out = inputs.new_empty((tasks.tokens, columns))
        if self.library:
            bounds = [(0, tasks.tokens)] if tasks.number == 1 else checks.segments(task_offsets, tasks.tokens)
            for task, (start, stop) in enumerate(bounds):
                own = weight[task * width : (task + 1) * width]
                own = own.t() if self.to_neurons else own
                if added is None:
                    torch.mm(inputs[start:stop], own, out=out[start:stop])
                else:
                    torch.addmm(added[task].to(dtype), inputs[start:stop], own, out=out[start:stop])
            return out
        # A step over the edge would multiply zeros by rows of the next task, whose NaN and infinities would give NaN.
        assert depth % self.tile.k == 0, f"{depth} packed columns are no multiple of a step of {self.tile.k}"
        programs = min(self.programs, tasks.most_tiles(self.tile.m) * cdiv(columns, self.tile.n))
        sizes = (tasks.tokens, tasks.number, depth, columns)
        self.launcher((programs, 1, 1), inputs, weight, added, out, tasks.offsets, *sizes)
        return out


def shipped_packing(dtype: torch.dtype, columns_of_source: bool) -> list[Shipped]:
    """The configurations of the packing kernel for fc1's rows or fc2's columns; the product is ``compact_ffn``'s."""
    p, name = pointer(dtype), str(dtype).removeprefix("torch.")
    kernels = []
    for rows in (True, False):
        pointers = {"source_ptr": p, "index_ptr": "*i64", "out_ptr": p}
        strides = ["neuron_stride", "feature_stride", "out_neuron_stride", "out_feature_stride"]
        ones = {strides.pop(0 if columns_of_source else 1): 1, strides.pop(-1 if rows else -2): 1}
        sizes = dict.fromkeys(("index_width", "width", "features", "out_features", *strides), "i32")
        kinds = ((False, False), (False, True), (True, True), (True, False))
        for biased, fill in kinds[:1] if columns_of_source else kinds:
            in_place = biased and not fill
            covered = not (rows if columns_of_source else biased and fill)
            none = {} if biased else {"bias_ptr": None, "out_bias_ptr": None}
            more = {"bias_ptr": p, "out_bias_ptr": "*fp32"} if biased else {}
            signature = {**pointers, **more, **sizes}
            keywords = {"BIAS": biased, "IN_PLACE": in_place, "FILL": fill, **none, **ones, **_PACK}
            kind = " with bias in place" if in_place else " with bias" if biased else " filled" if fill else ""
            label = f"pack {'rows' if rows else 'columns'}{kind} {name}"
            kernels.append(Shipped(label, pack_neurons_kernel, signature, keywords, tuple(signature), covered=covered))
    return kernels
