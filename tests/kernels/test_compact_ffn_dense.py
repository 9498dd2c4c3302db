"""Small blocks are computed dense where packing, or its launches, would cost more than it saves, with the same result."""

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
    def why(tokens: int, share: float, tasks: int, dtype: torch.dtype = torch.float32) -> str | None:
        active = torch.arange(1024).expand(tasks, 1024) < share * 1024
        return dense.reason(torch.empty(tokens, 256, dtype=dtype), torch.empty(1024, 256), active_index(active))

    assert why(1024, 0.5, 1) is None
    assert why(1024, 0.5, 4) is None
    assert "128 tokens that it saves a task (at least 400)" in str(why(1024, 0.5, 4, torch.bfloat16))
    assert "64 tokens that it saves a task (at least 128)" in str(why(1024, 0.5, 8))
    assert "(at least 128)" in str(why(2**20, 0.99, 2**13))  # however large the whole is


class OnGpu:
    """What the choice looks at of an input on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tokens: int, d_in: int, dtype: torch.dtype) -> None:
        self.dtype, self._numel = dtype, tokens * d_in

    def numel(self) -> int:
        return self._numel


def test_on_a_gpu_the_work_saved_has_to_be_worth_the_launches() -> None:
    def why(tokens: int, d: int, share: float, tasks: int = 1, dtype: torch.dtype = torch.bfloat16) -> str | None:
        active = torch.arange(4 * d).expand(tasks, 4 * d) < share * 4 * d
        x: Any = OnGpu(tokens, d, dtype)
        return dense.reason(x, torch.empty(4 * d, d, device="meta"), active_index(active))

    assert why(16384, 1024, 0.78) is None
    assert "5.4e+09 multiplications that it saves (at least 1.0e+10)" in str(why(16384, 1024, 0.92))
    assert "(at least 1.0e+10)" in str(why(16384, 512, 0.5))
    assert why(16384, 512, 0.5, dtype=torch.float32) is None
    assert why(16384, 512, 0.5, tasks=8) is None  # as many launches as the dense block of several tasks
    assert why(16384, 512, 0.5, dtype=torch.float64) is None


def test_on_a_gpu_nothing_waits_for_the_device_to_choose_and_to_mask() -> None:
    x, w1, b1, w2, b2 = (t.detach().to("meta") for t in inputs(9, 5, 200, torch.float32))
    active = some(200, 0.5).to("meta")  # whose values cannot be read
    assert dense.block(x, w1, b1, w2, b2, active, None).shape == (9, 5)


@pytest.mark.parametrize("frozen", range(5))
def test_several_tasks_give_no_gradient_to_what_wants_none(frozen: int) -> None:
    tensors, active = inputs(9, 5, 200, torch.float32), torch.stack([some(200, 0.5) for _ in range(2)])
    offsets = torch.tensor([0, 4, 9])
    assert chosen(*tensors, active, task_offsets=offsets).backend == "dense"
    whole = torch.autograd.grad(compact_ffn(*tensors, active, task_offsets=offsets).sum(), tensors)
    tensors[frozen].requires_grad_(False)
    wanted = [t for t in tensors if t.requires_grad]
    part = torch.autograd.grad(compact_ffn(*tensors, active, task_offsets=offsets).sum(), wanted)
    for ours, theirs in zip(part, [g for i, g in enumerate(whole) if i != frozen]):
        assert torch.equal(ours, theirs)


def test_several_tasks_without_biases() -> None:
    x, w1, _, w2, _ = inputs(9, 5, 200, torch.float32)
    active, offsets = torch.stack([some(200, 0.5) for _ in range(2)]), torch.tensor([0, 4, 9])
    y = compact_ffn(x, w1, None, w2, None, active, task_offsets=offsets)
    parts = [torch.relu(x[s] @ w1[a].t()) @ w2[:, a].t() for s, a in zip((slice(0, 4), slice(4, 9)), active)]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-4, atol=1e-4)
