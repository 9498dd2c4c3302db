"""The experiments of the probe, by name: what each measures and what it decides.

They reach into the kernels' modules to try other block sizes. Where a module has changed, that measurement says so and the
others go on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.lab import Lab, Operands, launches, off_by, replaced
from bench.rows import Row
from nspec.kernels.common.active import active_index, places_of
from nspec.kernels.common.products import mm_float32


def backend(operator: str) -> ModuleType:
    """The Triton backend of an operator, or the module of ``common`` of that name."""
    within = f"common.{operator}" if operator.startswith("triton_") else f"{operator}.triton"
    return importlib.import_module(f"nspec.kernels.{within}")


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
    ff, tasks_of = backend("compact_ffn"), backend("triton_tasks").tasks_of
    (d, d_ff), t, size = lab.shapes["big"], lab.tokens, lab.dtype.itemsize
    n = d_ff // 2
    x, fc1, bias, h = lab.normal(t, d), lab.normal(n, d, scale=d**-0.5), lab.normal(n), lab.normal(t, n)
    tasks, work = tasks_of(t, None, lab.device), {"flops": 2 * t * d * n, "moved": size * (t * d + t * n + n * d)}
    gated = {**work, "moved": work["moved"] + size * t * n}
    exact = {False: torch.relu(F.linear(x, fc1, bias)), True: F.linear(x, fc1) * (h > 0)}
    for gate, flat, stages in (
        (False, False, 3), (False, True, 3), (True, False, 2), (True, False, 3), (True, True, 2),
    ):  # fmt: skip
        name = f"{'gate' if gate else 'h'}, {stages} stages, {'' if flat else 'not '}flattened"
        out = torch.empty_like(h)

        def tile(*args: Any, real: Any = ff.neurons_tile, stages: int = stages) -> Any:
            return real(*args)._replace(stages=stages)

        def call(gate: bool = gate, out: Tensor = out, tile: Any = tile, flat: bool = flat) -> None:
            with replaced(ff, neurons_tile=tile, flattens=lambda *_: flat):
                ff._to_neurons(x, fc1, None if gate else bias, h if gate else None, out, tasks)

        def right(gate: bool = gate, out: Tensor = out, call: Any = call) -> str | None:
            call()
            return off_by(out, exact[gate])

        yield lab.timed("E3", name, call, right=right, **(gated if gate else work))
    yield from _counting(lab)


def _counting(lab: Lab) -> Iterator[Row]:
    """fc1 with ReLU and counts, by the flattening of its loop and by the rows of tiles that go together."""
    lr = backend("linear_relu_count")
    (d, d_ff), t, size = lab.shapes["big"], lab.tokens, lab.dtype.itemsize
    x, w, b = lab.normal(t, d), lab.normal(d_ff, d, scale=d**-0.5), lab.normal(d_ff)
    exact = torch.relu(F.linear(x, w, b))
    for flat in (True, False):
        for group in (1, 4, 8):
            changed = {"FLATTEN": flat, "GROUP": group}

            def other(*args: Any, real: Any = lr._tiles, changed: dict[str, Any] = changed) -> Any:
                return [{**one, **changed} for one in real(*args)]

            def call(other: Any = other) -> tuple[Tensor, Tensor]:
                with replaced(lr, _tiles=other):
                    found: tuple[Tensor, Tensor] = lr.forward(x, w, b, None, None)
                return found

            def right(call: Any = call) -> str | None:
                found, counts = call()
                if not torch.equal(counts[0], (found > 0).sum(0)):
                    return "the counts are not those of its h"
                return off_by(found, exact)

            name = f"fc1 with counts, {'' if flat else 'not '}flattened, GROUP {group}"
            moved = size * (t * d + t * d_ff + d_ff * d)
            yield lab.timed("E3", name, call, right=right, flops=2 * t * d * d_ff, moved=moved)


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
    modules = [backend(name) for name in ("compact_ffn", "row_sparse_wgrad", "triton_tasks")]
    for tasks in (1, 8):
        o = lab.operands("big", 0.5, tasks)
        seen: dict[str, int] = {}
        for launch in launches(modules, block_calls(o)[1]):
            seen[launch.name] = seen.get(launch.name, 0) + 1
            name = f"{launch.name} {seen[launch.name]}, {tasks} task{'s' if tasks > 1 else ''}"
            yield lab.timed("E4", name, launch.again, moved=launch.moved)
    n = lab.shapes["big"][1] // 2
    h, dh = lab.normal(lab.tokens, n), lab.normal(lab.tokens, n)
    size = h.numel() * h.element_size()
    yield lab.timed("E4", "torch relu_", lambda: h.relu_(), moved=2 * size)
    threshold = torch.ops.aten.threshold_backward.grad_input
    yield lab.timed("E4", "torch threshold_backward", lambda: threshold(dh, h, 0, grad_input=dh), moved=3 * size)
    yield lab.timed("E4", "torch sum over tokens", lambda: dh.sum(0), moved=size)


def packing(lab: Lab) -> Iterator[Row]:
    """E5: blocks of pack_columns, and packing dh against the dense product whose inactive rows are left out."""
    wg, common = backend("row_sparse_wgrad"), backend("triton_tasks")
    (d, d_ff), t, size = lab.shapes["big"], lab.tokens, lab.dtype.itemsize
    dh, x = lab.normal(t, d_ff), lab.normal(t, d)
    tasks = common.tasks_of(t, None, lab.device)
    for density in (0.5, 0.7, 0.78):
        active = lab.operands("big", density).active
        index = active_index(active)
        places = places_of(index, d_ff)
        width = common.compact_width(index)
        for tokens, warps in ((64, 8), (32, 4), (64, 16)) if density == 0.5 else ():
            real = common.columns_launch

            def blocks(*args: Any, real: Any = real, tokens: int = tokens, warps: int = warps) -> dict[str, Any]:
                return {**real(*args), "TOKENS": tokens, "num_warps": warps}

            def pack(blocks: Any = blocks) -> Any:
                with replaced(common, columns_launch=blocks):
                    return common.pack_columns(dh, index, places, tasks, width)  # noqa: B023

            def right(pack: Any = pack) -> str | None:
                packed, sums = pack()
                return off_by(packed[:, : int(active.sum())], dh[:, active]) or off_by(sums.sum(0), dh.float().sum(0))  # noqa: B023

            name = f"pack_columns, density {density}, {tokens} tokens, {warps} warps"
            yield lab.timed("E5", name, pack, right=right, moved=size * t * (d_ff + width))

        def gradient(way: bool, index: Tensor = index) -> tuple[Tensor, Tensor]:
            with replaced(wg, packs=lambda *_: way):
                found: tuple[Tensor, Tensor] = wg.forward(dh, x, index, None)
            return found

        def same(gradient: Any = gradient) -> str | None:
            return next(
                (said for one, other in zip(gradient(True), gradient(False)) if (said := off_by(one, other))), None
            )

        moved = size * (t * d_ff + t * d + d_ff * d)
        for way, words in ((True, "packing"), (False, "the dense product")):
            name = f"gradient by {words}, density {density}"
            call = functools.partial(gradient, way)
            yield lab.timed("E5", name, call, right=same, flops=2 * t * d * width, moved=moved)
