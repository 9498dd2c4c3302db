"""The weight gradient of fc1, and the bias gradient.

The baseline is the dense product, on a GPU with the bias gradient, which costs a pass over dh there; on a CPU without it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Provider, Results
from nspec.kernels.common.active import active_index
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad


def _dense(dh: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return dh.t() @ x, dh.sum(0)


def _masked(dh: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return (dh.t() @ x) * mask, dh.sum(0)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: the product over the active neurons; dh (for the bias), x and the whole gradient moved once."""
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * tokens * (d + d_ff)
    sets = [
        (shared.noise(tokens, d_ff, device=device).to(dtype), shared.noise(tokens, d, device=device).to(dtype))
        for _ in range(shared.input_sets(size))
    ]
    active = shared.random_sets(case.tasks, d_ff, case.active, device)
    offsets = shared.equal_offsets(tokens, case.tasks, device) if case.tasks > 1 else None
    # What a user has ready before a step: the index of the set, the rows, a mask in the weights' dtype.
    index = active_index(active)
    chosen = active if offsets is not None else active[0]
    masks = active[:, :, None].to(dtype)
    rows = [one.nonzero().squeeze(1) for one in active]
    parts = [slice(*ends) for ends in pairwise(offsets.tolist())] if offsets is not None else [slice(0, tokens)]
    take = lambda number: sets[number % len(sets)]  # CHECK takes the last
    names = lambda answer: dict(zip(("dw", "db"), answer))

    def expected(computes: Computes) -> Results:
        dh, x = (t.double() for t in take(shared.CHECK))
        sets_of = chosen if computes == "active" else torch.ones_like(chosen)
        with shared.backend("reference"):
            return names(row_sparse_wgrad(dh, x, sets_of, task_offsets=offsets))

    def work(computes: Computes) -> tuple[int, int]:
        share = case.active if computes == "active" else d_ff
        return 2 * tokens * d * share, size + dtype.itemsize * d_ff * (d + 1)

    def selected(number: int) -> tuple[Tensor, Tensor]:
        dh, x = take(number)
        dw = torch.zeros(d_ff, d, dtype=dtype, device=device)
        for part, own in zip(parts, rows):
            dw.index_add_(0, own, dh[part].index_select(1, own).t() @ x[part])
        return dw, dh.sum(0)

    def masked(number: int) -> tuple[Tensor, Tensor]:
        dh, x = take(number)
        dw, db = _masked(dh[parts[0]], x[parts[0]], masks[0])
        for part, mask in zip(parts[1:], masks[1:]):
            more = _masked(dh[part], x[part], mask)
            dw, db = dw.add_(more[0]), db.add_(more[1])
        return dw, db

    def call(number: int) -> tuple[Tensor, Tensor]:
        dh, x = take(number)
        return row_sparse_wgrad(dh, x, chosen, task_offsets=offsets, index=index)

    plain = [
        Provider("dense", lambda n: _product(*take(n)), lambda answer: {"dw": answer}, computes="all"),
        Provider("dense, bias gradient", lambda n: _dense(*take(n)), names, computes="all"),
    ]
    made = Problem(
        case,
        [
            *(reversed(plain) if device.type == "cuda" else plain),
            Provider("weight x mask", masked, names),
            Provider("index_select", selected, names),
        ],
        expected,
        work,
        len(sets),
    )
    if offsets is not None:
        if case.grouped:
            _grouped(made, take, masks, offsets)
    else:
        dense, mask = torch.compile(_dense, dynamic=False), torch.compile(_masked, dynamic=False)
        shared.compiled(
            made,
            Provider("dense, bias gradient, compiled", lambda n: dense(*take(n)), names, computes="all"),
            Provider("weight x mask, compiled", lambda n: mask(take(n)[0], take(n)[1], masks[0]), names),
        )
    made.providers += shared.ours(row_sparse_wgrad, (*sets[0], chosen), {"task_offsets": offsets}, call, names)
    return made


def _product(dh: Tensor, x: Tensor) -> Tensor:
    return dh.t() @ x


def _grouped(made: Problem, take: Any, masks: Tensor, offsets: Tensor) -> None:
    """PyTorch's grouped product over the tokens of each task: a dense gradient for each, masked and added."""
    ends = offsets[1:].to(torch.int32)

    def call(number: int) -> tuple[Tensor, Tensor]:
        dh, x = take(number)
        return (F.grouped_mm(dh.t(), x, offs=ends) * masks).sum(0), dh.sum(0)

    shared.attempt(
        made, Provider("grouped_mm, mask", call, lambda answer: dict(zip(("dw", "db"), answer)))
    )  # an older PyTorch has no such function
