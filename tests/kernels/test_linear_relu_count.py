"""fc1, ReLU and activation counts: exact counts of the rounded output, of real tokens only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.linear_relu_count.op import _linear_relu_count


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_those_of_the_output_exactly(dtype: torch.dtype) -> None:
    x, w, b = draw(4, 9, 5, dtype=dtype), draw(31, 5, dtype=dtype, seed=1), draw(31, dtype=dtype, seed=2)
    valid = torch.rand(4, 9, generator=torch.Generator().manual_seed(3)) > 0.4
    h, counts = linear_relu_count(x, w, b, valid=valid)
    assert torch.equal(h, torch.relu(torch.nn.functional.linear(x, w, b)))
    expected = sum((h[i, j] > 0).long() for i in range(4) for j in range(9) if valid[i, j])
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)


def test_values_that_round_to_zero_do_not_count() -> None:
    tiny = torch.tensor([[1e-5]], dtype=torch.float16)
    h, counts = linear_relu_count(tiny, torch.tensor([[1e-4]], dtype=torch.float16))
    assert h.item() == 0
    assert counts.item() == 0


def test_nan_goes_through_and_is_not_counted() -> None:
    h, counts = linear_relu_count(torch.tensor([[float("nan")], [1.0]]), torch.ones(2, 1))
    assert torch.isnan(h[0]).all()
    assert counts.tolist() == [1, 1]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_counts_by_task_are_those_of_its_tokens(sizes: list[int], seed: int) -> None:
    tokens = sum(sizes)
    x, w = draw(tokens, 3, seed=seed), draw(17, 3, seed=seed + 1)
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    _, counts = linear_relu_count(x, w, task_offsets=offsets)
    for row, start, stop in zip(counts, offsets, offsets[1:]):
        assert torch.equal(row, linear_relu_count(x[start:stop], w)[1])


def test_no_tokens_and_no_valid_tokens_count_nothing() -> None:
    w = draw(7, 3)
    assert linear_relu_count(draw(0, 3), w)[1].tolist() == [0] * 7
    assert linear_relu_count(draw(4, 3), w, valid=torch.zeros(4, dtype=torch.bool))[1].tolist() == [0] * 7


def test_gradients_are_those_of_linear_and_relu() -> None:
    tensors = [draw(6, 4, dtype=torch.float64).requires_grad_(), draw(9, 4, dtype=torch.float64, seed=1).requires_grad_(),
               draw(9, dtype=torch.float64, seed=2).requires_grad_()]  # fmt: skip
    assert torch.autograd.gradcheck(lambda *t: linear_relu_count(*t)[0], tensors)


def test_schema_fake_and_autograd_pass_opcheck_and_it_compiles() -> None:
    x, w, b = (t.requires_grad_() for t in (draw(6, 4), draw(9, 4, seed=1), draw(9, seed=2)))
    torch.library.opcheck(_linear_relu_count, (x, w, b, None, None))
    torch.library.opcheck(_linear_relu_count, (x, w, None, torch.ones(6, dtype=torch.bool), torch.tensor([0, 2, 6])))
    h, counts = torch.compile(linear_relu_count, fullgraph=True, backend="aot_eager")(x, w, b)
    assert torch.equal(h, linear_relu_count(x, w, b)[0])
    assert torch.equal(counts, linear_relu_count(x, w, b)[1])


def test_errors_name_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], expected \[2, 4\]"):
        linear_relu_count(draw(2, 3), draw(5, 4))
    with pytest.raises(ValueError, match=r"valid has shape \[3\], expected \[2\]"):
        linear_relu_count(draw(2, 4), draw(5, 4), valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"valid has dtype torch.int64"):
        linear_relu_count(draw(2, 4), draw(5, 4), valid=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"task_offsets has dtype torch.float32"):
        linear_relu_count(draw(2, 4), draw(5, 4), task_offsets=torch.tensor([0.0, 2.0]))
