"""The experiments of the probe on whole calls: host time, the optimiser, replayed graphs, batches of several tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.experiments import block_calls
from bench.gpu.lab import Lab, Operands, backend, forget, launches
from bench.providers.row_sparse_adamw import BETAS, BYTES_PER_ELEMENT, LAYERS, OPTIONS, STEP, torch_adamw
from bench.providers.shared import random_sets
from bench.rows import Row
from nspec.kernels.common import products
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad


def passes(o: Operands, forward: Callable[..., Tensor]) -> Callable[[], Any]:
    """A block, forward and backward: its output's gradients of x, w1, b1, w2, b2."""
    leaves = o.leaves
    return lambda: torch.autograd.grad(forward(*leaves), leaves, o.dy)


def public(o: Operands) -> Callable[[], Any]:
    """compact_ffn as users call it, with its gradients."""
    options: dict[str, Any] = {"task_offsets": o.offsets, "index": o.index}
    return passes(o, lambda x, w1, b1, w2, b2: compact_ffn(x, w1, b1, w2, b2, o.active, **options))


def dense(o: Operands) -> Callable[[], Any]:
    """The whole block in PyTorch, with its gradients."""
    return passes(o, lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2, b2))


def host(lab: Lab) -> Iterator[Row]:
    """E6: the host's time of a call, and whole blocks on the device and as called: whether the host keeps up."""
    for shape, (d, d_ff) in lab.shapes.items():
        for density in (*lab.densities, None):
            o = lab.operands(shape, density or 0.5)
            name = f"dense, {shape}" if density is None else f"compact_ffn, {shape}, density {density}"
            call = dense(o) if density is None else public(o)
            flops = 12 * lab.tokens * d * round((density or 1.0) * d_ff)
            yield lab.timed("E6", f"{name}, device", call, flops=flops, moved=0)
            yield lab.row("E6", f"{name}, as called", functools.partial(lab.called_microseconds, call), of="as called")
    dh = lab.normal(lab.tokens, lab.shapes["base"][1])
    forward, both = block_calls(o := lab.operands("base", 0.5))
    mixed = lab.operands("base", 0.5, 8)
    calls: dict[str, Callable[[], Any]] = {
        "compact_ffn, forward + backward, public": public(o),
        "compact_ffn, forward, inside": forward,
        "compact_ffn, forward + backward, inside": both,
        "compact_ffn, forward + backward, public, 8 tasks": public(mixed),
        "row_sparse_wgrad, public": lambda: row_sparse_wgrad(dh, o.x, o.active, index=o.index),
        "linear_relu_count, public": lambda: linear_relu_count(o.x, o.w1, o.b1),
        "dense, forward + backward": dense(o),
    }
    for name, call in calls.items():
        yield lab.row("E6", f"host: {name}", functools.partial(lab.host_microseconds, call), of="host")


def optimizer(lab: Lab) -> Iterator[Row]:
    """E7: AdamW over twelve fc1.weight, by density and by the elements of a program, and PyTorch's fused one."""
    ad = backend("row_sparse_adamw")
    d, d_ff = lab.shapes["big"]
    lists: list[list[Tensor]] = [[torch.rand(d_ff, d, device=lab.device) for _ in range(LAYERS)] for _ in range(4)]
    for density in (0.5, 1.0):
        active = list(random_sets(LAYERS, d_ff, round(density * d_ff), lab.device))
        moved = BYTES_PER_ELEMENT * LAYERS * d * round(density * d_ff)
        for elements in (1024, 2048, 4096):
            name = f"row_sparse_adamw, density {density}, {elements} elements"
            with mock.patch.object(ad, "_keywords", _sized(ad._keywords, elements)):
                ad._kept.clear()
                forget(ad)

                def call(active: list[Tensor] = active) -> None:
                    ad.row_sparse_adamw_(*lists, active, step=STEP, betas=BETAS, **OPTIONS)

                def right(call: Callable[[], None] = call, elements: int = elements) -> str | None:
                    (one,) = launches(lab.device, call)
                    found = one.launcher.keywords["GROUPS"] * one.launcher.keywords["WIDE"]
                    return None if found == elements else f"a program has {found} elements"

                yield lab.timed("E7", name, call, right=right, moved=moved)
    ad._kept.clear()
    forget(ad)
    steps = [torch.tensor(float(STEP - 1), device=lab.device) for _ in range(LAYERS)]
    fused = functools.partial(torch_adamw, tuple(lists), steps)  # type: ignore[arg-type]
    yield lab.timed("E7", "fused AdamW", fused, moved=BYTES_PER_ELEMENT * LAYERS * d * d_ff)


def _sized(real: Callable[..., dict[str, Any]], elements: int) -> Callable[..., dict[str, Any]]:
    """The keywords of a launch with so many elements a program."""

    def keywords(*args: Any) -> dict[str, Any]:
        found = real(*args)
        return {**found, "GROUPS": elements // found["WIDE"]}

    return keywords


def graphs(lab: Lab) -> Iterator[Row]:
    """E8: a block with its gradients replayed from a CUDA graph, without any host time: what the kernels alone can give."""
    for shape, (d, d_ff) in lab.shapes.items():
        for density in (*lab.densities, None):
            name = f"graph: {'dense' if density is None else f'compact_ffn, density {density}'}, {shape}"
            if lab.device.type != "cuda":
                yield lab.absent("E8", name)
                continue
            o = lab.operands(shape, density or 0.5)
            replayed = functools.partial(_replayed, lab, dense(o) if density is None else public(o))
            yield lab.row("E8", name, replayed, flops=12 * lab.tokens * d * round((density or 1.0) * d_ff), moved=0)


def _replayed(lab: Lab, call: Callable[[], Any]) -> float:
    """Microseconds of a call that is captured and replayed."""
    side, main = torch.cuda.Stream(lab.device), torch.cuda.current_stream(lab.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):  # what is compiled and loaded at first use must not fall into the capture
        for _ in range(3):
            call()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    taken = lab.device_microseconds(graph.replay)
    del kept
    return taken


def mixed(lab: Lab) -> Iterator[Row]:
    """E9: batches of eight tasks, every product by our kernels or by the library in a loop: decides LIBRARY for them."""
    (d, d_ff) = lab.shapes["big"]
    for density in lab.densities:
        call = block_calls(lab.operands("big", density, 8))[1]
        for way, who in ((products.NEVER, "our kernels"), (products.HOST, "the library in a loop")):

            def by(call: Callable[[], Any] = call, way: str = way) -> None:
                with mock.patch.dict(products.LIBRARY, dict.fromkeys(products.LIBRARY, way)):
                    call()

            flops = 12 * lab.tokens * d * round(density * d_ff)
            yield lab.timed("E9", f"8 tasks by {who}, density {density}", by, flops=flops, moved=0)
