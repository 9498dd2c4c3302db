"""fc1, an activation and fc2 over the active neurons are the dense block with masked rows of fc1, for any activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from active_sets import LAYOUTS
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.gated_activation import gated_activation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "softplus": F.softplus,
    "squared relu": lambda t: F.relu(t).square(), "tanh": torch.tanh,
}  # fmt: skip


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine chooses, in float64 too the reference, and the reference alone."""
    monkeypatch.setenv("NSPEC_BACKEND", request.param)


def sets(share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two tasks' sets of 150 neurons, their offsets for 33 tokens, and the mask of each token."""
    torch.manual_seed(0)
    two = torch.rand(2, 150) < torch.tensor([[share], [share / 2]])
    return two, torch.tensor([0, 20, 33]), torch.cat([two[0].expand(20, -1), two[1].expand(13, -1)])


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def assert_same(ours: Tensor, dense: Tensor, tensors: list[Tensor]) -> None:
    dy = torch.randn(dense.shape, dtype=torch.float64).to(dense.dtype)
    found = [ours, *torch.autograd.grad(ours, tensors, dy)]
    want = [dense, *torch.autograd.grad(dense, tensors, dy)]
    limit = 1e-12 if dense.dtype == torch.float64 else 1e-4
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_plain_block_is_the_masked_dense_one(name: str, share: float) -> None:
    act, (two, offsets, own) = ACTIVATIONS[name], sets(share)
    for layout, dtype in ((layout, dtype) for layout in LAYOUTS for dtype in (torch.float64, torch.float32)):
        tensors = leaves((33, 9), (150, 9), (150,), (12, 150), (12,), dtype=dtype)
        x, w1, b1, w2, b2 = tensors
        for active, options, mask in ((two[0], {}, two[0]), (two, {"task_offsets": offsets}, own)):
            index = layout(active)
            z = compact_fc1(x, w1, b1, active, index=index, **options)
            y = compact_fc2(act(z), act(b1), w2, b2, active, index=index, **options)
            assert_same(y, F.linear(act(F.linear(x, w1) * mask + b1), w2, b2), tensors)
            z = compact_fc1(x, w1, None, active, index=index, **options)
            y = compact_fc2(act(z), act(z.new_zeros(())), w2, b2, active, index=index, **options)
            used = [x, w1, w2, b2]
            assert_same(y, F.linear(act(F.linear(x, w1) * mask), w2, b2), used)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_gated_block_without_biases_is_the_masked_dense_one(kind: str, share: float) -> None:
    two, offsets, own = sets(share)
    act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[kind]
    for layout, dtype in ((layout, dtype) for layout in LAYOUTS for dtype in (torch.float64, torch.float32)):
        tensors = leaves((33, 9), (150, 9), (150, 9), (12, 150), dtype=dtype)
        x, wg, wu, wd = tensors
        for active, options, mask in ((two[0], {}, two[0]), (two, {"task_offsets": offsets}, own)):
            shared: Any = {"index": layout(active), **options}
            gate, up = (compact_fc1(x, w, None, active, **shared) for w in (wg, wu))
            y = compact_fc2(gated_activation(gate, up, kind), None, wd, None, active, **shared)
            assert_same(y, F.linear(act(F.linear(x, wg) * mask) * F.linear(x, wu), wd), tensors)


def test_nothing_is_left_of_neurons_that_no_task_has() -> None:
    active = torch.arange(150) < 70
    x, wg, wu, wd = leaves((33, 9), (150, 9), (150, 9), (12, 150), dtype=torch.float32)
    with torch.no_grad():
        wg[~active], wu[~active], wd[:, ~active] = float("nan"), float("nan"), float("nan")
    gate, up = (compact_fc1(x, w, None, active) for w in (wg, wu))
    y = compact_fc2(gated_activation(gate, up, "silu"), None, wd, None, active)
    gradients = torch.autograd.grad(y.sum(), (x, wg, wu, wd))
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert all((g[~active] == 0).all() for g in (gradients[1], gradients[2], gradients[3].t()))


def test_with_relu_it_is_compact_ffn() -> None:
    active = torch.arange(150) % 2 == 0
    tensors = leaves((33, 9), (150, 9), (150,), (12, 150), (12,), dtype=torch.float64)
    x, w1, b1, w2, b2 = tensors
    y = compact_fc2(F.relu(compact_fc1(x, w1, b1, active)), F.relu(b1), w2, b2, active)
    assert_same(y, compact_ffn(*tensors, active), tensors)
