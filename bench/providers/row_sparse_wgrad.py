"""The weight gradient of fc1, and the bias gradient.

The baseline is the dense product, on a GPU with the bias gradient, which costs a pass over dh there; on a CPU without it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Results, Work
from nspec.kernels.common.active import active_index
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

Pair = tuple[Tensor, Tensor]


def _dense(dh: Tensor, x: Tensor) -> Pair:
    return dh.t() @ x, dh.sum(0)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: the product over the active neurons; dh (for the bias), x and the whole gradient moved once."""
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * tokens * (d + d_ff)
    draw = lambda width: shared.noise(tokens, width, device=device).to(dtype)
    sets = [(draw(d_ff), draw(d)) for _ in range(shared.input_sets(size))]
    active = shared.random_sets(case.tasks, d_ff, case.active, device)
    offsets = shared.equal_offsets(tokens, case.tasks, device) if case.tasks > 1 else None
    # What a user has ready before a step: the index of the set, the rows, a mask in the weights' dtype.
    index, masks = active_index(active), active[:, :, None].to(dtype)
    chosen = active if offsets is not None else active[0]
    rows = [one.nonzero().squeeze(1) for one in active]
    parts = [slice(*ends) for ends in pairwise(offsets.tolist())] if offsets is not None else [slice(0, tokens)]
    take = lambda number: sets[number % len(sets)]  # CHECK takes the last
    results = lambda answer: dict(zip(("dw", "db"), answer))

    def expected(computes: Computes) -> Results:
        sets_of = chosen if computes == "active" else torch.ones_like(chosen)
        dh, x = (t.double() for t in take(shared.CHECK))
        with shared.backend("reference"):
            return results(row_sparse_wgrad(dh, x, sets_of, task_offsets=offsets))

    def work(computes: Computes) -> Work:
        share = case.active if computes == "active" else d_ff
        return 2 * tokens * d * share, size + dtype.itemsize * d_ff * (d + 1)

    def selected(dh: Tensor, x: Tensor) -> Pair:
        dw = torch.zeros(d_ff, d, dtype=dtype, device=device)
        for part, own in zip(parts, rows):
            dw.index_add_(0, own, dh[part].index_select(1, own).t() @ x[part])
        return dw, dh.sum(0)

    def masked(dh: Tensor, x: Tensor) -> Pair:
        dw, db = (dh[parts[0]].t() @ x[parts[0]]) * masks[0], dh[parts[0]].sum(0)
        for part, mask in zip(parts[1:], masks[1:]):
            dw, db = dw.add_((dh[part].t() @ x[part]) * mask), db.add_(dh[part].sum(0))
        return dw, db

    def grouped(dh: Tensor, x: Tensor) -> Pair:
        """A dense gradient for each task, masked and added."""
        assert offsets is not None
        return (F.grouped_mm(dh.t(), x, offs=offsets[1:].to(torch.int32)) * masks).sum(0), dh.sum(0)

    def own(dh: Tensor, x: Tensor) -> Pair:
        return row_sparse_wgrad(dh, x, chosen, task_offsets=offsets, index=index)

    made = Problem(case, take, results, expected, work, len(sets))
    made.add("dense", lambda dh, x: (dh.t() @ x,), "all")
    made.add("dense, bias gradient", _dense, "all")
    if device.type == "cuda":
        made.providers.reverse()
    made.add("weight x mask", masked)
    made.add("index_select", selected)
    if offsets is None:
        made.compiled("dense, bias gradient", _dense, "all")
        made.compiled("weight x mask", lambda dh, x: ((dh.t() @ x) * masks[0], dh.sum(0)))
    elif case.grouped:
        made.attempt("grouped_mm, mask", grouped)
    made.ours(row_sparse_wgrad, own, *sets[0], chosen, task_offsets=offsets)
    return made
