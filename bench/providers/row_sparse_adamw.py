"""One AdamW step of twelve layers' fc1.weight, float32. All providers work on the same parameters and moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Provider, Results
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_

LAYERS = 12
BYTES_PER_ELEMENT = 28  # parameter, gradient and two moments read, all but the gradient written
LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.01
STEP = 3
OPTIONS: dict[str, Any] = {"step": STEP, "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
Step = Callable[[Lists, list[Tensor]], None]


def _torch(lists: Lists, steps: list[Tensor], *, fused: bool) -> None:
    params, grads, first, second = lists
    adamw(
        params, grads, first, second, [], steps, foreach=not fused, fused=fused, amsgrad=False, beta1=BETAS[0],
        beta2=BETAS[1], lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
    )  # fmt: skip


def _selected(lists: Lists, steps: list[Tensor], rows: list[Tensor]) -> None:
    """The active rows gathered, stepped by PyTorch's fused AdamW, and put back."""
    packed: Lists = tuple([t.index_select(0, own) for t, own in zip(column, rows)] for column in lists)  # type: ignore[assignment]
    _torch(packed, steps, fused=True)
    for column, small in zip((lists[0], *lists[2:]), (packed[0], *packed[2:])):
        for whole, own, part in zip(column, rows, small):
            whole.index_copy_(0, own, part)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: the active rows of parameter, gradient and moments read, and all but the gradient written.

    One set of inputs: twelve layers with their moments are larger than a cache. Each provider is checked on clones.
    """
    d, d_ff, operator = case.d_model, case.d_ff, cast(Callable[..., Any], row_sparse_adamw_)
    draw = lambda: [shared.noise(d_ff, d, device=device) for _ in range(LAYERS)]
    lists: Lists = (draw(), draw(), draw(), [t.abs_() for t in draw()])
    active = list(shared.random_sets(LAYERS, d_ff, case.active, device))
    rows = [one.nonzero().squeeze(1) for one in active]
    # A fused step counts on the parameters' device. It is at step STEP when it is called, and adds one itself.
    steps = [torch.tensor(float(STEP - 1), device=device) for _ in range(LAYERS)]

    def provider(name: str, step: Step, computes: Computes = "active") -> Provider:
        def call(number: int) -> Step:
            step(lists, steps)
            return step

        return Provider(name, call, checked, computes)

    def checked(step: Step) -> Results:
        clones: Lists = tuple([t.clone() for t in column[:2]] for column in start)  # type: ignore[assignment]
        step(clones, [torch.full_like(s, STEP - 1) for s in steps[:2]])
        return _named(clones)

    start: Lists = tuple([t.clone() for t in column[:2]] for column in lists)  # type: ignore[assignment]

    def expected(computes: Computes) -> Results:
        wide: Lists = tuple([t.double() for t in column] for column in start)  # type: ignore[assignment]
        sets = active[:2] if computes == "active" else [torch.ones_like(one) for one in active[:2]]
        with shared.backend("reference"):
            operator(*wide, sets, **OPTIONS)
        return _named(wide)

    def own(all_lists: Lists, _: list[Tensor]) -> None:
        operator(*all_lists, active[: len(all_lists[0])], **OPTIONS)

    def work(computes: Computes) -> tuple[int, int]:
        elements = LAYERS * d * (case.active if computes == "active" else d_ff)
        return 12 * elements, BYTES_PER_ELEMENT * elements

    made = Problem(
        case,
        [
            provider("fused AdamW", lambda all_lists, s: _torch(all_lists, s, fused=True), "all"),
            provider("foreach AdamW", lambda all_lists, s: _torch(all_lists, s, fused=False), "all"),
            provider("index_select, fused AdamW", lambda all_lists, s: _selected(all_lists, s, rows)),
        ],
        expected,
        work,
        1,
    )
    if device.type == "cuda":  # on a CPU the loop it makes takes minutes to compile, and is no faster
        whole = torch.compile(lambda all_lists, s: _torch(all_lists, s, fused=False), dynamic=False)
        shared.compiled(made, provider("foreach AdamW, compiled", whole, "all"))
    made.providers += shared.ours(row_sparse_adamw_, (*lists, active), OPTIONS, provider("", own).call, checked)
    return made


def _named(lists: Lists) -> Results:
    names = ("parameter", "first moment", "second moment")
    return {f"{name} {i}": t for name, c in zip(names, (lists[0], *lists[2:])) for i, t in enumerate(c)}
