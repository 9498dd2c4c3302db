"""A feed-forward block, forward and backward, with the gradients of the input and of all weights and biases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Provider, Results
from nspec.kernels.common.active import active_index
from nspec.kernels.compact_ffn import compact_ffn

NAMES = ("x", "w1", "b1", "w2", "b2")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Inputs = tuple[Tensors, Tensor]
"""What is differentiated, and the gradient of the output."""


def _dense(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)


def _masked(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, mask: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1 * mask, b1)), w2, b2)


def _selected(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, on: Tensor, off: Tensor) -> Tensor:
    """The compact block in PyTorch's own operations; ``on`` and ``off`` list the active and the other neurons."""
    constant = F.linear(F.relu(b1.index_select(0, off)), w2.index_select(1, off), b2)
    h = F.relu(F.linear(x, w1.index_select(0, on), b1.index_select(0, on)))
    return F.linear(h, w2.index_select(1, on)) + constant


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: six products over the active neurons.

    Bytes are what six products move that each read and write memory: seven passes over ``[tokens, active]`` and six over
    ``[tokens, d_model]``, the active weights read twice, and both gradients written.
    """
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * (2 * tokens * d + 2 * d * d_ff)
    make = lambda *shape: shared.noise(*shape, device=device).div_(shape[-1] ** 0.5).to(dtype).requires_grad_()
    shapes = ((tokens, d), (d_ff, d), (d_ff,), (d, d_ff), (d,))
    sets: list[Inputs] = [
        (tuple(make(*shape) for shape in shapes), shared.noise(tokens, d, device=device).to(dtype))  # type: ignore[misc]
        for _ in range(shared.input_sets(size + dtype.itemsize * tokens * d_ff))
    ]
    whole = [shared.small_integers(*shape, device=device, dtype=dtype) for shape in shapes]
    whole[2] += 0.5
    check: Inputs = (
        tuple(t.requires_grad_() for t in whole),  # type: ignore[assignment]
        shared.small_integers(tokens, d, device=device, dtype=dtype),
    )
    active = shared.random_sets(case.tasks, d_ff, case.active, device)
    offsets = shared.equal_offsets(tokens, case.tasks, device) if case.tasks > 1 else None
    chosen = active if offsets is not None else active[0]
    index, masks = active_index(active), active[:, :, None].to(dtype)
    rows = [(one.nonzero().squeeze(1), (~one).nonzero().squeeze(1)) for one in active]
    lengths = [b - a for a, b in pairwise(offsets.tolist())] if offsets is not None else [tokens]
    take = lambda number: check if number == shared.CHECK else sets[number % len(sets)]
    results = lambda answer: dict(zip(("y", *("gradient of " + name for name in NAMES)), answer))

    def step(block: Callable[[Tensors], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        def call(number: int) -> tuple[Tensor, ...]:
            tensors, dy = take(number)
            y = block(tensors)
            return (y.detach(), *torch.autograd.grad(y, tensors, dy))

        return call

    def by_task(block: Callable[..., Tensor], extra: list[tuple[Tensor, ...]]) -> Callable[[Tensors], Tensor]:
        def joined(t: Tensors) -> Tensor:
            parts = t[0].split(lengths) if len(lengths) > 1 else (t[0],)
            found = [block(part, *t[1:], *more) for part, more in zip(parts, extra)]
            return torch.cat(found) if len(found) > 1 else found[0]

        return joined

    def expected(computes: Computes) -> Results:
        wide, dy = [t.detach().double().requires_grad_() for t in check[0]], check[1]
        with shared.backend("reference"):
            x, w1, b1, w2, b2 = wide
            sets_of = chosen if computes == "active" else torch.ones_like(chosen)
            y = compact_ffn(x, w1, b1, w2, b2, sets_of, task_offsets=offsets)
            return results((y.detach(), *torch.autograd.grad(y, wide, dy.double())))

    def work(computes: Computes) -> tuple[int, int]:
        n = case.active if computes == "active" else d_ff
        moved = 7 * tokens * n + 6 * tokens * d + 4 * n * d + 2 * d_ff * d
        return 12 * tokens * d * n, dtype.itemsize * moved

    made = Problem(
        case,
        [
            Provider("dense", step(lambda t: _dense(*t)), results, computes="all"),
            Provider("weight x mask", step(by_task(_masked, [(mask,) for mask in masks])), results),
            Provider("index_select", step(by_task(_selected, list(rows))), results),
        ],
        expected,
        work,
        len(sets),
    )
    dense, mask = torch.compile(_dense, dynamic=False), torch.compile(_masked, dynamic=False)
    theirs = [Provider("dense, compiled", step(lambda t: dense(*t)), results, computes="all")]
    if offsets is None:
        theirs.append(Provider("weight x mask, compiled", step(lambda t: mask(*t, masks[0])), results))
    shared.compiled(made, *theirs)
    if offsets is not None and case.grouped:
        _grouped(made, step, results, index, active, offsets)
    made.providers += shared.ours(
        compact_ffn,
        (*sets[0][0], chosen),
        {"task_offsets": offsets, "index": index},
        step(lambda t: compact_ffn(*t, chosen, task_offsets=offsets, index=index)),
        results,
    )
    return made


def _grouped(
    made: Problem,
    step: Callable[[Callable[[Tensors], Tensor]], Callable[[int], tuple[Tensor, ...]]],
    results: Callable[[tuple[Tensor, ...]], Results],
    index: Tensor,
    active: Tensor,
    offsets: Tensor,
) -> None:
    """PyTorch's grouped products over packed weights of each task, ``[tasks, width, d_model]``, padded to one width."""
    ends = offsets[1:].to(torch.int32)
    pad, places = index < 0, index.clamp(min=0)
    of_token = torch.repeat_interleave(offsets.diff())
    off = ~active

    def block(t: Tensors) -> Tensor:
        x, w1, b1, w2, b2 = t
        w1_tasks = w1[places].masked_fill(pad[:, :, None], 0)
        b1_tasks = b1[places].masked_fill(pad, 0)
        w2_tasks = w2.t()[places].masked_fill(pad[:, :, None], 0)
        h = F.relu(F.grouped_mm(x, w1_tasks.transpose(1, 2), offs=ends) + b1_tasks[of_token])
        constant = (F.relu(b1) * off) @ w2.t() + b2
        return F.grouped_mm(h, w2_tasks, offs=ends) + constant[of_token]

    shared.attempt(made, Provider("grouped_mm", step(block), results))  # an older PyTorch has no such function
