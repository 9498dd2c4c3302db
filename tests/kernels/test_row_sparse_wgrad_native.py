"""Several tasks on the CPU: a product for each where they have many tokens, one for all where they have few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nspec.kernels.common import native as library
from nspec.kernels.common.active import active_index
from nspec.kernels.row_sparse_wgrad import native, reference

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = pytest.mark.parametrize("least", [0.0, float("inf")], ids=["native a product for each", "native one product"])
OFFSETS = [[0, 5, 5, 11], [0, 11], [0, 0, 11], [0, 0, 0]]


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS)
@WAYS
def test_both_ways_are_exact(
    least: float, offsets: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LEAST_TOKENS", least)
    dh, x = integers(offsets[-1], 150, dtype=dtype), integers(offsets[-1], 24, dtype=dtype)
    index = active_index(torch.rand(len(offsets) - 1, 150) < 0.4)
    ends = torch.tensor(offsets)
    dw, db = native.forward(dh, x, index, ends)
    wanted, sums = reference.forward(dh.double(), x.double(), index, ends)
    assert dw.dtype == db.dtype == dtype
    assert torch.equal(dw.double(), wanted)
    assert torch.equal(db.double(), sums)


@WAYS
def test_columns_of_inactive_neurons_are_not_read(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LEAST_TOKENS", least)
    active = torch.tensor([[True, False] * 64, [False, True] * 64])
    offsets = torch.tensor([0, 7, 16])
    dh, x = torch.randn(16, 128), torch.randn(16, 8)
    for own, (start, stop) in zip(active, [(0, 7), (7, 16)]):
        dh[start:stop, ~own] = float("nan")
    dw, _ = native.forward(dh, x, active_index(active), offsets)
    assert torch.isfinite(dw).all()


def test_few_tokens_a_task_take_one_product_and_many_do_not() -> None:
    dh = torch.empty(1024, 256)
    index = lambda tasks: active_index(torch.arange(256).expand(tasks, 256) < 128)
    assert native.saved_tokens(dh, index(4)) == 128 >= native.LEAST_TOKENS
    assert native.saved_tokens(dh, index(8)) == 64 < native.LEAST_TOKENS
