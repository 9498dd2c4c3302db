"""One AdamW step of twelve layers' fc1.weight, float32. All providers work on the same parameters and moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Results, Work
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_

LAYERS = 12
BYTES_PER_ELEMENT = 28  # parameter, gradient and two moments read, all but the gradient written
STEP = 3
OPTIONS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.01}
BETAS = (0.9, 0.98)

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, first and second moments."""


def torch_adamw(lists: Lists, steps: list[Tensor], fused: bool = True) -> Lists:
    """PyTorch's step, with the options of ours."""
    params, grads, first, second = lists
    options: dict[str, Any] = {**OPTIONS, "beta1": BETAS[0], "beta2": BETAS[1], "foreach": not fused, "fused": fused}
    adamw(params, grads, first, second, [], steps, amsgrad=False, maximize=False, **options)
    return lists


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: the active rows of parameter, gradient and moments read, and all but the gradient written.

    One set of inputs: twelve layers with their moments are larger than a cache. Checked on clones of the first two.
    """
    d, d_ff, operator = case.d_model, case.d_ff, cast(Callable[..., Any], row_sparse_adamw_)
    draw = lambda: [shared.noise(d_ff, d, device=device) for _ in range(LAYERS)]
    lists: Lists = (draw(), draw(), draw(), [t.abs_() for t in draw()])
    active = list(shared.random_sets(LAYERS, d_ff, case.active, device))
    rows = [one.nonzero().squeeze(1) for one in active]
    # A fused step counts on the parameters' device. It is at step STEP when it is called, and adds one itself.
    steps = [torch.tensor(float(STEP - 1), device=device) for _ in range(LAYERS)]
    start = [[t.clone() for t in column[:2]] for column in lists]

    def inputs(number: int) -> tuple[Lists, list[Tensor]]:
        if number != shared.CHECK:
            return lists, steps
        clones: Any = tuple([t.clone() for t in column] for column in start)
        return clones, [torch.full_like(s, STEP - 1) for s in steps[:2]]

    def results(answer: Lists) -> Results:
        names = ("parameter", "first moment", "second moment")
        return {f"{name} {i}": t for name, c in zip(names, (answer[0], *answer[2:])) for i, t in enumerate(c)}

    def expected(computes: Computes) -> Results:
        wide: Any = tuple([t.double() for t in column] for column in start)
        sets = active[:2] if computes == "active" else [torch.ones_like(one) for one in active[:2]]
        with shared.backend("reference"):
            operator(*wide, sets, step=STEP, betas=BETAS, **OPTIONS)
        return results(wide)

    def selected(whole: Lists, steps: list[Tensor]) -> Lists:
        """The active rows gathered, stepped by PyTorch's fused AdamW, and put back."""
        packed: Any = tuple([t.index_select(0, own) for t, own in zip(column, rows)] for column in whole)
        torch_adamw(packed, steps)
        for column, small in zip((whole[0], *whole[2:]), (packed[0], *packed[2:])):
            for tensor, own, part in zip(column, rows, small):
                tensor.index_copy_(0, own, part)
        return whole

    def own(whole: Lists, _: list[Tensor]) -> Lists:
        operator(*whole, active[: len(whole[0])], step=STEP, betas=BETAS, **OPTIONS)
        return whole

    def work(computes: Computes) -> Work:
        elements = LAYERS * d * (case.active if computes == "active" else d_ff)
        return 12 * elements, BYTES_PER_ELEMENT * elements

    made = Problem(case, inputs, results, expected, work, 1)
    made.add("fused AdamW", torch_adamw, "all")
    made.add("foreach AdamW", lambda whole, s: torch_adamw(whole, s, fused=False), "all")
    made.add("index_select, fused AdamW", selected)
    if device.type == "cuda":  # on a CPU the loop it makes takes minutes to compile, and is no faster
        made.compiled("foreach AdamW", lambda whole, s: torch_adamw(whole, s, fused=False), "all")
    made.ours(row_sparse_adamw_, own, *lists, active, step=STEP, betas=BETAS, **OPTIONS)
    return made
