"""The weight gradient of the active rows, zeros elsewhere, and the dense bias gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nspec.kernels.common.active import active_index
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad
from nspec.kernels.row_sparse_wgrad.op import _row_sparse_wgrad


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def some(d_ff: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(d_ff, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_exact_and_inactive_rows_are_zero(share: float, dtype: torch.dtype) -> None:
    dh, x, active = integers(40, 33), integers(40, 9, seed=1), some(33, share)
    dw, db = row_sparse_wgrad(dh.to(dtype), x.to(dtype), active)
    assert torch.equal(dw.float(), (dh.t() @ x) * active[:, None])
    assert torch.equal(db.float(), dh.sum(0))


def test_inactive_columns_are_not_read_for_the_weight_gradient() -> None:
    dh, x, active = integers(40, 33), integers(40, 9, seed=1), some(33, 0.4)
    dh[:, ~active] = float("nan")
    dw, db = row_sparse_wgrad(dh, x, active)
    assert torch.isfinite(dw).all()
    assert torch.isnan(db[~active]).all()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_grouped_is_the_sum_over_tasks(sizes: list[int], seed: int) -> None:
    tokens = sum(sizes)
    dh, x = integers(tokens, 12, seed=seed), integers(tokens, 5, seed=seed + 1)
    active = torch.stack([some(12, i / 4, seed=i) for i in range(len(sizes))])
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    dw, db = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
    assert torch.equal(
        dw, sum(row_sparse_wgrad(dh[a:b], x[a:b], s)[0] for s, a, b in zip(active, offsets, offsets[1:]))
    )
    assert torch.equal(db, dh.sum(0))


def test_it_has_gradients_of_its_own() -> None:
    dh, x = integers(6, 7).double().requires_grad_(), integers(6, 4, seed=1).double().requires_grad_()
    active = torch.stack([some(7, 0.5), some(7, 0.5, seed=1)])
    assert torch.autograd.gradcheck(lambda a, b: row_sparse_wgrad(a, b, active[0]), (dh, x))
    offsets = torch.tensor([0, 2, 6])
    assert torch.autograd.gradcheck(lambda a, b: row_sparse_wgrad(a, b, active, task_offsets=offsets), (dh, x))


def test_schema_fake_and_autograd_pass_opcheck_and_it_compiles() -> None:
    dh, x, active = integers(6, 7).requires_grad_(), integers(6, 4, seed=1).requires_grad_(), some(7, 0.5)
    torch.library.opcheck(_row_sparse_wgrad, (dh, x, active_index(active), None))
    compiled = torch.compile(row_sparse_wgrad, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(dh, x, active)[0], row_sparse_wgrad(dh, x, active)[0])


def test_errors_name_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[5, 4\], expected \[6, any\]"):
        row_sparse_wgrad(integers(6, 7), integers(5, 4), some(7, 0.5))
    with pytest.raises(ValueError, match=r"active has shape \[8\], expected \[7\]"):
        row_sparse_wgrad(integers(6, 7), integers(6, 4), some(8, 0.5))
    with pytest.raises(TypeError, match="dh has dtype torch.float32 and x torch.float64"):
        row_sparse_wgrad(integers(6, 7), integers(6, 4).double(), some(7, 0.5))
