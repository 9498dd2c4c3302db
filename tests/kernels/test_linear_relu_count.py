"""fc1, ReLU and activation counts: exact counts of the rounded output, of real tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.linear_relu_count import linear_relu_count, reference
from nspec.kernels.linear_relu_count.op import _linear_relu_count

OPERATOR = "linear_relu_count"

# tokens, d_in, d_ff: zero, one, odd sizes, one off the tile sizes, d_in that is no multiple of 8.
SHAPES = [(0, 8, 31), (1, 1, 1), (1, 16, 64), (17, 3, 7), (63, 24, 128), (64, 16, 64), (65, 40, 200), (129, 8, 31),
          (129, 40, 128), (17, 16, 1)]  # fmt: skip
LARGE = [(65, 1000, 128), (129, 1024, 200), (17, 1032, 4096), (64, 24, 5000), (1000, 3, 63)]
TASKS = [(), (0,), (0, 0), (5, 0, 3), (1, 1, 1), (0, 17, 0), (64, 1, 65), (63, 2)]


def exact_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x Wᵀ + b) in float64 on the CPU, written out."""
    z = (x.double().cpu()[..., None, :] * weight.double().cpu()).sum(-1)
    return (z if bias is None else z + bias.double().cpu()).clamp(min=0)


def loop_counts(h: Tensor, valid: Tensor | None, sizes: tuple[int, ...]) -> list[list[int]]:
    """How many valid tokens of each task have h > 0, token by token."""
    counts = [[0] * h.shape[1] for _ in sizes]
    of_token = [task for task, size in enumerate(sizes) for _ in range(size)]
    keep = [True] * len(of_token) if valid is None else valid.tolist()
    for fired, task, kept in zip((h > 0).tolist(), of_token, keep):
        if kept:
            counts[task] = [n + f for n, f in zip(counts[task], fired)]
    return counts


def inputs(draw: Any, tokens: int, d_in: int, d_ff: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integers whose products, with 1032 of them in a sum, stay below 256: exact in bfloat16."""
    size = 2 if d_in <= 64 else 1
    shapes = ((tokens, d_in), (d_ff, d_in), (d_ff,))
    return tuple(draw.integers(*s, dtype=dtype, seed=i, size=size) for i, s in enumerate(shapes))


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_integers_and_their_counts_are_exact(place: Any, draw: Any, poison: Any, shape: tuple[int, int, int]) -> None:
    tokens = shape[0]
    if shape in LARGE:
        place.skip_interpreter()
    x, w, b = inputs(draw, *shape, torch.float64 if place.device == "cpu" else torch.float32)
    masks = [None, draw.mask(tokens, share=0), draw.mask(tokens, share=1), draw.mask(tokens, share=0.6)]
    for bias in (b, None):
        want = exact_output(x, w, bias)
        assert tokens == 0 or want.max() <= 256  # so that every dtype holds every sum
        for dtype in place.dtypes:
            for valid in masks if bias is not None else masks[-1:]:
                with poison(want.shape, want.t().shape):
                    h, counts = linear_relu_count(
                        x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype), valid=valid
                    )
                assert h.dtype == dtype
                assert torch.equal(h.double().cpu(), want), dtype
                assert counts.dtype == torch.int64
                assert counts.tolist() == loop_counts(want, valid, (tokens,))[0], dtype


@pytest.mark.parametrize("sizes", TASKS, ids=str)
def test_counts_by_task_are_those_of_its_tokens(place: Any, draw: Any, poison: Any, sizes: tuple[int, ...]) -> None:
    tokens = sum(sizes)
    x, w, b = inputs(draw, tokens, 5, 33, torch.float32)
    want = exact_output(x, w, b)
    for device in place.offset_devices:
        for dtype, valid in ((torch.int32, None), (torch.int64, draw.mask(tokens, seed=3))):
            offsets = draw.offsets(sizes, dtype, device)
            with poison(want.shape, (len(sizes), 33)):
                h, counts = linear_relu_count(x, w, b, valid=valid, task_offsets=offsets)
            assert torch.equal(h.double().cpu(), want)
            assert counts.shape == (len(sizes), 33)
            assert counts.tolist() == loop_counts(want, valid, sizes)
            if sizes:
                assert torch.equal(counts.sum(0), linear_relu_count(x, w, b, valid=valid)[1])


@pytest.mark.parametrize("shape", [(65, 40, 200), (129, 100, 70), (300, 512, 300)], ids=str)
def test_error_is_bounded_and_at_most_twice_that_of_pytorch(
    place: Any, draw: Any, compare: Any, shape: tuple[int, int, int]
) -> None:
    tokens, d_in, d_ff = shape
    if tokens > 200:
        place.skip_interpreter()
    for dtype in place.dtypes:
        x, w = draw.normal(tokens, d_in, dtype=dtype), draw.normal(d_ff, d_in, dtype=dtype, seed=1)
        b = draw.normal(d_ff, dtype=dtype, seed=2)
        h, counts = linear_relu_count(x, w, b)
        want = exact_output(x, w, b)
        # One rounding of the result, and of each of the d_in + 1 terms in float32 (float64: in itself).
        terms = x.double().abs().cpu() @ w.double().abs().cpu().t() + b.double().abs().cpu()
        inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
        bound = torch.finfo(dtype).eps / 2 * want + (d_in + 2) * inner * terms
        compare.within(f"h in {dtype}", h, want, bound)
        assert torch.equal(counts, (h > 0).sum(0))
        if dtype != torch.float64:
            compare.no_worse_than_twice(f"h in {dtype}", h, torch.relu(F.linear(x, w, b)), want)


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    x, w, b = inputs(draw, 37, 19, 45, torch.float32)
    valid = draw.mask(37)
    want, counts = linear_relu_count(x, w, b, valid=valid)
    strided = layout(b[None])[0], layout(valid[None])[0]
    changed = [(layout(x), w, b, valid), (x, layout(w), b, valid), (x, w, strided[0], valid), (x, w, b, strided[1]),
               (layout(x), layout(w), *strided)]  # fmt: skip
    for x, w, b, valid in changed:
        h, n = linear_relu_count(x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), valid=valid)
        assert torch.equal(h, want)
        assert torch.equal(n, counts)


def test_expanded_inputs_are_taken(place: Any, draw: Any) -> None:
    x, w, b = inputs(draw, 1, 19, 1, torch.float32)
    x, w, b = x.expand(9, 19), w.expand(33, 19), b.expand(33)
    h, counts = linear_relu_count(x, w, b)
    assert torch.equal(h.double().cpu(), exact_output(x, w, b))
    assert counts.tolist() == [9 * (h[0, 0] > 0).item()] * 33


def test_leading_dimensions_are_kept(place: Any, draw: Any) -> None:
    x, w, b = draw.integers(4, 9, 5), draw.integers(31, 5, seed=1), draw.integers(31, seed=2)
    valid = draw.mask(4, 9)
    h, counts = linear_relu_count(x, w, b, valid=valid)
    assert torch.equal(h.double().cpu(), exact_output(x, w, b))
    assert counts.tolist() == loop_counts(h.view(36, 31), valid.view(36), (36,))[0]


def test_results_of_earlier_calls_stay(place: Any, draw: Any) -> None:
    x, w, b = inputs(draw, 65, 19, 45, torch.float32)
    offsets = draw.offsets((40, 25))
    h, counts = linear_relu_count(x, w, b, task_offsets=offsets)
    kept = h.clone(), counts.clone()
    linear_relu_count(-x, w, b, task_offsets=offsets)
    linear_relu_count(x[:9], w[:7], b[:7])
    assert torch.equal(h, kept[0])
    assert torch.equal(counts, kept[1])


def test_values_that_round_to_zero_do_not_count(place: Any) -> None:
    place.skip_unless(torch.float16)
    tiny = torch.tensor([[1e-5]], dtype=torch.float16, device=place.device)
    h, counts = linear_relu_count(tiny, torch.tensor([[1e-4]], dtype=torch.float16, device=place.device))
    assert h.item() == 0
    assert counts.item() == 0


def test_overflow_to_infinity_counts(place: Any) -> None:
    for dtype, large in ((torch.float16, 6e4), (torch.float32, 1e30), (torch.bfloat16, 1e30)):
        if dtype in place.dtypes:
            w = torch.tensor([[large], [-large]], dtype=dtype, device=place.device)
            h, counts = linear_relu_count(w[:1], w)
            assert h.tolist() == [[float("inf"), 0.0]]
            assert counts.tolist() == [1, 0]


def test_nan_infinity_and_zeros_pass_as_in_pytorch(place: Any) -> None:
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 1.0]
    x = torch.tensor(values, device=place.device)[:, None]
    w = torch.tensor([[1.0], [-1.0]], device=place.device)
    h, counts = linear_relu_count(x, w)
    nan, inf = float("nan"), float("inf")
    want = torch.tensor([[nan, nan], [inf, 0], [0, inf], [0, 0], [0, 0], [0, 0], [0, 0], [1e30, 0], [0, 1e30], [1, 0]])
    torch.testing.assert_close(h.cpu(), want, rtol=0, atol=1e-39, equal_nan=True)  # denormals may be flushed,
    assert torch.equal(counts, (h > 0).sum(0))  # and count if they are not
    assert counts.tolist()[0] in (3, 4)


def test_nan_is_not_counted_and_stays_in_its_row_and_column(place: Any, draw: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        x, w, b = inputs(draw, 70, 19, 70, dtype)
        want = exact_output(x, w, b)
        x[33], w[2], b[68] = float("nan"), float("nan"), float("nan")
        h, counts = linear_relu_count(x, w, b)
        spoiled = torch.zeros(70, 70, dtype=torch.bool)
        spoiled[33], spoiled[:, 2], spoiled[:, 68] = True, True, True
        assert torch.equal(h.isnan().cpu(), spoiled)
        assert torch.equal(h.double().cpu()[~spoiled], want[~spoiled])
        assert torch.equal(counts.cpu(), ((want > 0) & ~spoiled).sum(0))


def test_repeats_and_threads_give_the_same_bits_and_counts(place: Any, draw: Any, threads: Any, compare: Any) -> None:
    x, w, b = draw.normal(129, 40), draw.normal(200, 40, seed=1), draw.normal(200, seed=2)
    offsets = draw.offsets((50, 0, 79))
    h, counts = linear_relu_count(x, w, b, task_offsets=offsets)
    for _ in range(2 if place.interpreted else 20):
        again = linear_relu_count(x, w, b, task_offsets=offsets)
        assert compare.same_bits(again[0], h)
        assert torch.equal(again[1], counts)
    x, w, b = inputs(draw, 200 if place.interpreted else 3000, 40, 70, torch.float32)
    results = []
    for n in (1, 2) if place.device == "cpu" else ():
        threads(n)
        results.append(linear_relu_count(x, w, b))
    for h, counts in results:
        assert torch.equal(h, results[0][0])
        assert torch.equal(counts, results[0][1])


def test_any_shape_layout_and_grouping_equals_the_reference(
    place: Any, draw: Any, examples: Any, layouts: dict[str, Any]
) -> None:
    names = st.sampled_from(list(layouts))

    @examples(60)
    @given(
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), d_in=st.integers(1, 70), d_ff=st.integers(1, 140),
        dtype=st.sampled_from(place.dtypes), seed=st.integers(0, 9), has_bias=st.booleans(), has_valid=st.booleans(),
        x_layout=names, w_layout=names,
    )  # fmt: skip
    def holds(
        sizes: list[int], d_in: int, d_ff: int, dtype: torch.dtype, seed: int, has_bias: bool, has_valid: bool,
        x_layout: str, w_layout: str,
    ) -> None:  # fmt: skip
        tokens = sum(sizes)
        x, w = draw.integers(tokens, d_in, seed=seed, size=1), draw.integers(d_ff, d_in, seed=seed + 1, size=1)
        b = draw.integers(d_ff, seed=seed + 2) if has_bias else None
        valid = draw.mask(tokens, seed=seed) if has_valid else None
        offsets = draw.offsets(sizes)
        given_ = layouts[x_layout](x.to(dtype)), layouts[w_layout](w.to(dtype)), None if b is None else b.to(dtype)
        h, counts = linear_relu_count(*given_, valid=valid, task_offsets=offsets)
        want = reference.forward(*(None if t is None else t.double() for t in (x, w, b)), valid, offsets)
        assert torch.equal(h.double(), want[0])
        assert torch.equal(counts, want[1])

    holds()


def test_gradients_are_those_of_linear_and_relu(place: Any, draw: Any) -> None:
    given_ = [t.requires_grad_() for t in inputs(draw, 33, 19, 45, torch.float32)]
    plain = [t.detach().double().requires_grad_() for t in given_]
    dh = draw.integers(33, 45, seed=5)
    want = torch.autograd.grad(torch.relu(F.linear(*plain)), plain, dh.double())
    for ours, theirs in zip(torch.autograd.grad(linear_relu_count(*given_)[0], given_, dh), want):
        assert torch.equal(ours.double(), theirs)
    if torch.float64 in place.dtypes:
        shapes = ((6, 4), (9, 4), (9,))
        tensors = [draw.normal(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]
        assert torch.autograd.gradcheck(lambda *t: linear_relu_count(*t)[0], tensors)


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any) -> None:
    x, w, b = (t.requires_grad_() for t in inputs(draw, 6, 4, 9, torch.float32))
    torch.library.opcheck(_linear_relu_count, (x, w, b, None, None))
    torch.library.opcheck(_linear_relu_count, (x, w, None, draw.mask(6), draw.offsets((2, 4))))


def test_offsets_that_do_not_cover_the_tokens_are_named(place: Any, draw: Any) -> None:
    x, w, b = inputs(draw, 6, 4, 9, torch.float32)
    for offsets in ([0, 7, 6], [0, 3, 5], [1, 3, 6]):
        with pytest.raises(ValueError, match=r"task_offsets is .*, expected numbers that rise from 0 to the 6 tokens"):
            linear_relu_count(x, w, b, task_offsets=torch.tensor(offsets))


def test_errors_name_what_was_found() -> None:
    make = torch.zeros
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], expected \[2, 4\]"):
        linear_relu_count(make(2, 3), make(5, 4))
    with pytest.raises(ValueError, match=r"bias has shape \[4\], expected \[5\]"):
        linear_relu_count(make(2, 4), make(5, 4), make(4))
    with pytest.raises(ValueError, match=r"valid has shape \[3\], expected \[2\]"):
        linear_relu_count(make(2, 4), make(5, 4), valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"valid has dtype torch.int64"):
        linear_relu_count(make(2, 4), make(5, 4), valid=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"task_offsets has dtype torch.float32"):
        linear_relu_count(make(2, 4), make(5, 4), task_offsets=torch.tensor([0.0, 2.0]))
    with pytest.raises(TypeError, match="expected one dtype"):
        linear_relu_count(make(2, 4), make(5, 4).double())


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    x, w, b = (torch.randn(s, device="cuda").bfloat16() for s in ((300, 64), (200, 64), (200,)))
    valid, offsets = torch.rand(300, device="cuda") < 0.5, torch.tensor([0, 100, 100, 300])
    for where in (offsets, offsets.cuda()):
        no_waiting(lambda where=where: linear_relu_count(x, w, b, valid=valid, task_offsets=where))


@pytest.mark.gpu
def test_outputs_beyond_two_to_the_31_elements(on_gpu: Any, needs_memory: Any) -> None:
    needs_memory(24)
    tokens, d_in, d_ff = 2**20 + 3, 16, 2048 + 1024
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randint(-1, 2, (tokens, d_in), generator=g, device="cuda").to(torch.bfloat16)
    w = torch.randint(-1, 2, (d_ff, d_in), generator=g, device="cuda").to(torch.bfloat16)
    assert tokens * d_ff > 2**31
    h, counts = linear_relu_count(x, w)
    total = torch.zeros_like(counts)
    for rows in torch.arange(tokens, device="cuda").split(2**17):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        want = torch.relu(x[part] @ w.t())
        assert torch.equal(h[part], want)
        total += (want > 0).sum(0)
    assert torch.equal(counts, total)


@pytest.mark.gpu
def test_another_stream_and_a_busy_device_change_nothing(on_gpu: Any, beside_others: Any) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, device="cuda").bfloat16() for s in ((4099, 512), (2048, 512), (2048,)))
    offsets = torch.tensor([0, 1000, 1000, 4099])
    beside_others(lambda: linear_relu_count(x, w, b, task_offsets=offsets))
