"""A feed-forward block, forward and backward, with the gradients of the input and of all weights and biases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Results, Work
from nspec.kernels.common.active import active_index
from nspec.kernels.compact_ffn import compact_ffn

NAMES = ("y", *(f"gradient of {name}" for name in ("x", "w1", "b1", "w2", "b2")))
Block = Callable[..., Tensor]
"""``x, w1, b1, w2, b2`` -> ``y``."""


def _dense(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)


def _masked(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, mask: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1 * mask, b1)), w2, b2)


def _selected(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, on: Tensor, off: Tensor) -> Tensor:
    """The compact block in PyTorch's own operations; ``on`` and ``off`` list the active and the other neurons."""
    constant = F.linear(F.relu(b1.index_select(0, off)), w2.index_select(1, off), b2)
    h = F.relu(F.linear(x, w1.index_select(0, on), b1.index_select(0, on)))
    return F.linear(h, w2.index_select(1, on)) + constant


def _step(block: Block) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward: of ``x, w1, b1, w2, b2`` and the gradient of y."""

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = block(*inputs[:-1])
        return (y.detach(), *torch.autograd.grad(y, inputs[:-1], inputs[-1]))

    return step


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: six products over the active neurons.

    Bytes are what six products move that each read and write memory: seven passes over ``[tokens, active]`` and six over
    ``[tokens, d_model]``, the active weights read twice, and both gradients written.
    """
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * (2 * tokens * d + 2 * d * d_ff)
    shapes = ((tokens, d), (d_ff, d), (d_ff,), (d, d_ff), (d,))
    make = lambda *shape: shared.noise(*shape, device=device).div_(shape[-1] ** 0.5).to(dtype).requires_grad_()
    sets: list[tuple[Tensor, ...]] = [
        (*(make(*shape) for shape in shapes), shared.noise(tokens, d, device=device).to(dtype))
        for _ in range(shared.input_sets(size + dtype.itemsize * tokens * d_ff))
    ]
    exact = [shared.small_integers(*shape, device=device, dtype=dtype) for shape in (*shapes, (tokens, d))]
    exact[2] += 0.5
    check = (*(t.requires_grad_() for t in exact[:-1]), exact[-1])
    active = shared.random_sets(case.tasks, d_ff, case.active, device)
    offsets = shared.equal_offsets(tokens, case.tasks, device) if case.tasks > 1 else None
    chosen = active if offsets is not None else active[0]
    index, masks = active_index(active), active[:, :, None].to(dtype)
    rows = [(one.nonzero().squeeze(1), (~one).nonzero().squeeze(1)) for one in active]
    lengths = [b - a for a, b in pairwise(offsets.tolist())] if offsets is not None else [tokens]
    take = lambda number: check if number == shared.CHECK else sets[number % len(sets)]
    results = lambda answer: dict(zip(NAMES, answer))

    def by_task(block: Block, extra: list[tuple[Tensor, ...]]) -> Block:
        def joined(x: Tensor, *weights: Tensor) -> Tensor:
            parts = x.split(lengths) if len(lengths) > 1 else (x,)
            found = [block(part, *weights, *more) for part, more in zip(parts, extra)]
            return torch.cat(found) if len(found) > 1 else found[0]

        return joined

    def own(*tensors: Tensor, sets_of: Tensor = chosen, **options: Any) -> Tensor:
        return compact_ffn(*tensors, sets_of, task_offsets=offsets, **options)  # type: ignore[misc]

    def expected(computes: Computes) -> Results:
        wide = [t.detach().double().requires_grad_() for t in check]
        sets_of = chosen if computes == "active" else torch.ones_like(chosen)
        with shared.backend("reference"):
            return results(_step(lambda *t: own(*t, sets_of=sets_of))(*wide))

    def work(computes: Computes) -> Work:
        n = case.active if computes == "active" else d_ff
        moved = 7 * tokens * n + 6 * tokens * d + 4 * n * d + 2 * d_ff * d
        return 12 * tokens * d * n, dtype.itemsize * moved

    def grouped(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """PyTorch's grouped products over packed weights of each task, ``[tasks, width, d_model]``, padded to one width."""
        assert offsets is not None
        ends, of_token = offsets[1:].to(torch.int32), torch.repeat_interleave(offsets.diff())
        pad, places = index < 0, index.clamp(min=0)
        w1_tasks, w2_tasks = (w[places].masked_fill(pad[:, :, None], 0) for w in (w1, w2.t()))
        b1_tasks = b1[places].masked_fill(pad, 0)
        h = F.relu(F.grouped_mm(x, w1_tasks.transpose(1, 2), offs=ends) + b1_tasks[of_token])
        constant = (F.relu(b1) * ~active) @ w2.t() + b2
        return F.grouped_mm(h, w2_tasks, offs=ends) + constant[of_token]

    made = Problem(case, take, results, expected, work, len(sets))
    made.add("dense", _step(_dense), "all")
    made.add("weight x mask", _step(by_task(_masked, [(mask,) for mask in masks])))
    made.add("index_select", _step(by_task(_selected, list(rows))))
    made.compiled("dense", _dense, "all", of=_step)
    if offsets is None:
        made.compiled("weight x mask", _masked, of=lambda one: _step(by_task(one, [(masks[0],)])))
    elif case.grouped:
        made.attempt("grouped_mm", _step(grouped))
    step = _step(lambda *t: own(*t, index=index))
    made.ours(compact_ffn, step, *sets[0][:-1], chosen, task_offsets=offsets, index=index)
    return made
