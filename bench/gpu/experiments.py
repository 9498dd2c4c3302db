"""The experiments of the probe, by name: what each measures and what it decides.

Other block sizes are tried on launches that a call has made, by making them again. Where the kernels have changed too much
for that, the measurement says so and the others go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.lab import Lab, Launch, Operands, backend, launches, off_by
from bench.rows import Row
from nspec.kernels.common.active import active_index
from nspec.kernels.common.products import mm_float32


def products(lab: Lab) -> Iterator[Row]:
    """E1: the library's six products on compact operands, at each width and d_model: what every share is taken of."""
    t, size = lab.tokens, lab.dtype.itemsize
    for d, _ in lab.shapes.values():
        for n in lab.widths:
            x, h = lab.normal(t, d), lab.normal(t, n)
            fc1, fc2 = lab.normal(n, d), lab.normal(n, d)  # both neuron-major, as they are packed
            six = {
                "h": functools.partial(torch.mm, x, fc1.t()),
                "y": functools.partial(torch.mm, h, fc2),
                "dh": functools.partial(torch.mm, x, fc2.t()),
                "dx": functools.partial(torch.mm, h, fc1),
                "dw1": functools.partial(mm_float32, h.t(), x),
                "dw2": functools.partial(mm_float32, h.t(), lab.normal(t, d)),
            }
            moved = size * (t * d + t * n + n * d)
            for name, call in six.items():
                wide = 2 * n * d if name.startswith("dw") else 0
                work = {"flops": 2 * t * d * n, "moved": moved + wide}
                yield lab.timed("E1", f"library, {name}, d {d}, n {n}", call, **work)


def fused_relu(lab: Lab) -> Iterator[Row]:
    """E2: the library's product with bias and ReLU, and whether its ReLU passes NaN on: decides who computes h."""
    t, size = lab.tokens, lab.dtype.itemsize
    x, w, b = lab.normal(8, 16), lab.normal(16, 16), lab.normal(16)
    x[0, 0], x[1, 0] = float("nan"), float("inf")

    def passes() -> str:
        found, right = torch._addmm_activation(b, x, w.t()), torch.relu(F.linear(x, w, b))
        nan = bool(found[0].isnan().all())
        same = torch.equal(found[1].nan_to_num(), right[1].nan_to_num())
        lost = f"LOST: {found[0, :4].tolist()}"
        return f"NaN is {'passed on' if nan else lost}; infinity {'as' if same else 'NOT as'} relu"

    said = passes()
    for shape, (d, d_ff) in lab.shapes.items():
        widths = {f", n {n}": n for n in lab.widths if n < d_ff} | {"": d_ff}
        for label, n in widths.items():
            args = lab.normal(n), lab.normal(t, d), lab.normal(n, d).t()
            call = functools.partial(torch._addmm_activation, *args)
            work = {"flops": 2 * t * d * n, "moved": size * (t * d + t * n + n * d)}
            yield lab.timed("E2", f"fc1 by _addmm_activation, {shape}{label}", call, note=said, **work)


def tiles(lab: Lab) -> Iterator[Row]:
    """E3: stages and flattening of h and of the gate, and flattening and GROUP of fc1 with counts, Transformer-big."""
    (d, d_ff), t, size = lab.shapes["big"], lab.tokens, lab.dtype.itemsize
    n = d_ff // 2
    o = lab.operands("big", 0.5)
    found = [one for one in launches(lab.device, block_calls(o)[1]) if one.name == "to_neurons_kernel"]
    relu, gate = found  # one for h, one for dh
    for kernel, what, flat, stages in (
        (relu, "h", False, 3), (relu, "h", True, 3), (gate, "gate", False, 2), (gate, "gate", False, 3),
        (gate, "gate", True, 2),
    ):  # fmt: skip
        other = kernel.again(FLATTEN=flat, num_stages=stages)
        name = f"{what}, {stages} stages, {'' if flat else 'not '}flattened"
        moved = size * (t * d + (1 if what == "h" else 2) * t * n + n * d)
        right = functools.partial(_same, kernel, other, ("out_ptr",) if what == "h" else ("out_ptr", "sums_ptr"))
        yield lab.timed("E3", name, other, right=right, flops=2 * t * d * n, moved=moved)
    lr = backend("linear_relu_count")
    (counting,) = launches(lab.device, lambda: lr.forward(o.x, o.w1, o.b1, None, None))
    for flat in (True, False):
        for group in (1, 4, 8):
            other = counting.again(FLATTEN=flat, GROUP=group)
            name = f"fc1 with counts, {'' if flat else 'not '}flattened, GROUP {group}"
            moved = size * (t * d + t * d_ff + d_ff * d)
            right = functools.partial(_same, counting, other, ("h", "counts"))
            yield lab.timed("E3", name, other, right=right, flops=2 * t * d * d_ff, moved=moved)


def _same(shipped: Launch, other: Callable[[], object], names: tuple[str, ...]) -> str | None:
    """What is wrong with the results of a launch with other blocks, which start as zero, against the shipped one's."""
    tensors = [shipped.argument(name) for name in names]
    results = []
    for call in (shipped.again(), other):
        for tensor in tensors:
            tensor.zero_()
        call()
        results.append([tensor.clone() for tensor in tensors])
    said = (off_by(found, exact) for exact, found in zip(*results))
    return next((f"{name}: {words}" for name, words in zip(names, said) if words), None)


def block_calls(o: Operands) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The backend of compact_ffn without autograd: forward, and forward + backward."""
    ff = backend("compact_ffn")
    weights = (o.w1, o.b1, o.w2)

    def forward() -> Any:
        return ff.forward(o.x, *weights, o.b2, o.index, o.offsets)

    def both() -> Any:
        _, kept = forward()
        return ff.backward(o.dy, o.x, *weights, o.index, o.offsets, *kept)

    return forward, both


def small_kernels(lab: Lab) -> Iterator[Row]:
    """E4: every kernel of a block by itself, density 0.5, one task and eight, and the library's passes."""
    for tasks in (1, 8):
        o = lab.operands("big", 0.5, tasks)
        seen: dict[str, int] = {}
        for launch in launches(lab.device, block_calls(o)[1]):
            seen[launch.name] = seen.get(launch.name, 0) + 1
            name = f"{launch.name} {seen[launch.name]}, {tasks} task{'s' if tasks > 1 else ''}"
            yield lab.timed("E4", name, launch.again(), moved=launch.moved)
    n = lab.shapes["big"][1] // 2
    h, dh = lab.normal(lab.tokens, n), lab.normal(lab.tokens, n)
    size = h.numel() * h.element_size()
    yield lab.timed("E4", "torch relu_", lambda: h.relu_(), moved=2 * size)
    threshold = torch.ops.aten.threshold_backward.grad_input
    yield lab.timed("E4", "torch threshold_backward", lambda: threshold(dh, h, 0, grad_input=dh), moved=3 * size)
    yield lab.timed("E4", "torch sum over tokens", lambda: dh.sum(0), moved=size)


def packing(lab: Lab) -> Iterator[Row]:
    """E5: blocks of pack_columns, and packing dh against the dense product whose inactive rows are left out."""
    wg = backend("row_sparse_wgrad")
    (d, d_ff), t, size = lab.shapes["big"], lab.tokens, lab.dtype.itemsize
    dh, x = lab.normal(t, d_ff), lab.normal(t, d)

    def gradient(index: Tensor, way: bool) -> tuple[Tensor, Tensor]:
        with mock.patch.object(wg, "packs", return_value=way):
            found: tuple[Tensor, Tensor] = wg.forward(dh, x, index, None)
        return found

    def same(index: Tensor) -> str | None:
        pairs = zip(gradient(index, True), gradient(index, False))
        return next((said for one, other in pairs if (said := off_by(one, other))), None)

    for density in (0.5, 0.7, 0.78):
        index = active_index(lab.operands("big", density).active)
        width = index.shape[1]
        if density == 0.5:
            made = launches(lab.device, functools.partial(gradient, index, True))
            (pack,) = (one for one in made if one.name == "pack_columns_kernel")
            yield from _packing_blocks(lab, pack, size * t * (d_ff + width))
        moved = size * (t * d_ff + t * d + d_ff * d)
        for way, words in ((True, "packing"), (False, "the dense product")):
            name, call = f"gradient by {words}, density {density}", functools.partial(gradient, index, way)
            right = functools.partial(same, index)
            yield lab.timed("E5", name, call, right=right, flops=2 * t * d * width, moved=moved)


def _packing_blocks(lab: Lab, pack: Launch, moved: int) -> Iterator[Row]:
    """The same columns packed by other blocks of tokens."""
    rows = pack.argument("sums_ptr").shape[0]
    for tokens, warps in ((64, 8), (32, 4), (64, 16)):
        grid = (-(-lab.tokens // tokens), *pack.grid[1:])
        if grid[0] > rows:
            raise ValueError(f"{grid[0]} blocks of {tokens} tokens, and memory for the sums of {rows}")
        other = pack.again((grid[0], grid[1], grid[2]), TOKENS=tokens, num_warps=warps)
        name = f"pack_columns, density 0.5, {tokens} tokens, {warps} warps"
        yield lab.timed("E5", name, other, right=functools.partial(_same_sums, pack, other), moved=moved)


def _same_sums(pack: Launch, other: Callable[[], object]) -> str | None:
    """As :func:`_same`; the sums of tiles of other sizes agree when they are added up."""
    sums = pack.argument("sums_ptr")
    if said := _same(pack, other, ("packed_ptr",)):
        return said
    totals = []
    for call in (pack.again(), other):
        sums.zero_()
        call()
        totals.append(sums.sum(0))
    return off_by(totals[1], totals[0])
