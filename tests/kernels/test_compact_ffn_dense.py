"""Small blocks on a CPU are computed dense where packing would cost more than it saves, with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common.active import active_index
from nspec.kernels.common.backend import Choice
from nspec.kernels.compact_ffn import compact_ffn, dense


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSPEC_BACKEND", raising=False)


def inputs(tokens: int, d: int, d_ff: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (tokens, d), (d_ff, d), (d_ff,), (d, d_ff), (d,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def some(d_ff: int, share: float) -> Tensor:
    return torch.rand(d_ff) < share


def chosen(*args: Any, **options: Any) -> Choice:
    operator: Any = compact_ffn
    return operator(*args, **options, explain=True)


def test_small_blocks_are_dense_and_large_ones_or_sparse_ones_are_not() -> None:
    def backend(tokens: int, d: int, d_ff: int, share: float, dtype: torch.dtype = torch.float32) -> str:
        shapes = (tokens, d), (d_ff, d), (d_ff,), (d, d_ff), (d,)
        active = torch.arange(d_ff) < share * d_ff
        return chosen(*(torch.empty(shape, dtype=dtype) for shape in shapes), active).backend

    assert backend(512, 256, 1024, 0.78) == "dense"
    assert backend(1024, 256, 1024, 0.78) != "dense"
    assert backend(1024, 256, 1024, 0.78, torch.bfloat16) == "dense"
    assert backend(4096, 512, 2048, 1.0, torch.bfloat16) != "dense"
    assert backend(64, 64, 256, 0.5, torch.float64) == "reference"


def test_a_backend_that_is_asked_for_computes_small_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(4, 8, 128, torch.float32)
    assert chosen(*tensors, some(128, 0.5)).backend == "dense"
    monkeypatch.setenv("NSPEC_BACKEND", "reference")
    assert chosen(*tensors, some(128, 0.5)).backend == "reference"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 9]])
def test_dense_equals_compact_in_value_and_gradients(
    share: float, offsets: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(9, 5, 200, torch.float32)
    active = some(200, share) if offsets is None else torch.stack([some(200, share) for _ in range(3)])
    options = {} if offsets is None else {"task_offsets": torch.tensor(offsets)}
    assert chosen(*tensors, active, **options).backend == "dense"
    results = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("NSPEC_BACKEND", backend)
        y = compact_ffn(*tensors, active, **options)
        results.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    unused = ~active if offsets is None else ~active[[0, 2]].any(0)  # the second task has no tokens
    assert (results[0][2][unused] == 0).all()


def test_masked_weights_are_not_read() -> None:
    tensors, active = inputs(9, 5, 200, torch.float32), some(200, 0.5)
    with torch.no_grad():
        tensors[1][~active] = float("nan")
    assert torch.isfinite(compact_ffn(*tensors, active)).all()


def test_several_tasks_have_to_save_their_packing_each() -> None:
    x, w1 = torch.empty(1024, 256), torch.empty(1024, 256)
    one, four = active_index(some(1024, 0.5)), active_index(torch.stack([some(1024, 0.5) for _ in range(4)]))
    assert dense.reason(x, w1, one) is None
    assert "for a task" in str(dense.reason(x, w1, four))
