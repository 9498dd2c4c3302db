"""AdamW over active rows equals PyTorch's AdamW there, and leaves everything else bitwise alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
from nspec.kernels.row_sparse_adamw.op import _row_sparse_adamw

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(17, 5), (1, 3), (64, 32), (9,)]


def state(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]
    return params, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


def sets(seed: int = 0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(s[0], generator=g) < 0.5 for s in SHAPES[:-1]] + [None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_active_rows_follow_pytorch_adamw(dtype: torch.dtype, tolerance: float) -> None:
    params, exp_avgs, exp_avg_sqs = state(dtype)
    active = sets()
    theirs = [p.double().clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, **OPTIONS)
    g = torch.Generator().manual_seed(7)
    for step in range(1, 6):
        grads = [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]
        for p, grad in zip(theirs, grads):
            p.grad = grad.clone()
        optimizer.step()
        row_sparse_adamw_(params, [x.to(dtype) for x in grads], exp_avgs, exp_avg_sqs, active, step=step, **OPTIONS)
    for ours, want, rows in zip(params, theirs, active):
        rows = slice(None) if rows is None else rows
        torch.testing.assert_close(ours[rows].double(), want.detach()[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inactive_rows_stay_bitwise_even_where_their_gradient_is_nan(dtype: torch.dtype) -> None:
    params, exp_avgs, exp_avg_sqs = state(dtype)
    for t in (*exp_avgs, *exp_avg_sqs):
        t.fill_(0.5)
    active = sets()
    grads = [torch.ones_like(p) for p in params]
    before = [[t.clone() for t in ts] for ts in (params, exp_avgs, exp_avg_sqs)]
    for grad, rows in zip(grads, active):
        if rows is not None:
            grad[~rows] = float("nan")
    row_sparse_adamw_(params, grads, exp_avgs, exp_avg_sqs, active, step=3, **OPTIONS | {"lr": 0.5})
    for now, then in zip((params, exp_avgs, exp_avg_sqs), before):
        for a, b, rows in zip(now, then, active):
            if rows is not None:
                assert torch.equal(a[~rows], b[~rows])
                assert (a[rows] != b[rows]).all()
            assert torch.isfinite(a).all()


def test_no_active_row_changes_nothing() -> None:
    params, exp_avgs, exp_avg_sqs = state(torch.float32)
    before = [p.clone() for p in params]
    none = [torch.zeros(s[0], dtype=torch.bool) for s in SHAPES]
    row_sparse_adamw_(params, [torch.ones_like(p) for p in params], exp_avgs, exp_avg_sqs, none, step=1, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(params, before))


def test_schema_and_mutation_pass_opcheck() -> None:
    params, exp_avgs, exp_avg_sqs = state(torch.float32)
    grads = [torch.ones_like(p) for p in params]
    torch.library.opcheck(
        _row_sparse_adamw, (params, grads, exp_avgs, exp_avg_sqs, sets(), 1, 0.01, 0.9, 0.98, 1e-6, 0.1),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_errors_name_what_was_found() -> None:
    p = [torch.zeros(4, 2)]
    ok = [torch.zeros(4, 2)]
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \[4, 3\], expected \[4, 2\]"):
        row_sparse_adamw_(p, [torch.zeros(4, 3)], ok, ok, [None], step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"active\[0\] has shape \[5\]"):
        row_sparse_adamw_(p, ok, ok, ok, [torch.ones(5, dtype=torch.bool)], step=1, lr=0.1)
    with pytest.raises(TypeError, match=r"active\[0\] has dtype"):
        row_sparse_adamw_(p, ok, ok, ok, [torch.ones(4)], step=1, lr=0.1)
    with pytest.raises(ValueError, match="step is 0"):
        row_sparse_adamw_(p, ok, ok, ok, [None], step=0, lr=0.1)
    with pytest.raises(ValueError, match=r"lengths \[1, 2, 1, 1, 1\]"):
        row_sparse_adamw_(p, ok * 2, ok, ok, [None], step=1, lr=0.1)
