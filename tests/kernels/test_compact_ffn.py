"""The compact feed-forward block equals the dense one with masked rows of fc1.weight, in value and in every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.common.active import active_index
from nspec.kernels.compact_ffn import compact_ffn, reference

OPERATOR = "compact_ffn"
NAMES = ("x", "w1", "b1", "w2", "b2")

# tokens, d_in, d_ff, d_out, active neurons, how they lie
CASES = [(0, 8, 130, 8, 50, "random"), (1, 1, 1, 1, 1, "random"), (1, 16, 64, 8, 0, "random"), (17, 3, 7, 1, 1, "ends"),
         (63, 24, 128, 16, 15, "block"), (64, 16, 128, 24, 16, "second"), (65, 40, 200, 3, 63, "random"),
         (129, 8, 200, 40, 64, "ends"), (129, 16, 200, 8, 65, "second"), (64, 16, 64, 16, 64, "random"),
         (65, 1, 200, 17, 199, "random"), (17, 40, 200, 24, 130, "block"), (5, 7, 200, 11, 189, "random"),
         (17, 16, 200, 8, 0, "random")]  # fmt: skip
LARGE = [(65, 1000, 200, 24, 65, "random"), (129, 24, 4096, 16, 1500, "random"), (17, 40, 5000, 1032, 2501, "second"),
         (300, 64, 512, 64, 200, "block")]  # fmt: skip
TASKS = [((), ()), ((0,), (9,)), ((7, 0, 5), (0, 90, 130)), ((0, 12, 0), (1, 64, 65)), ((1, 1, 10), (100, 0, 3)),
         ((64, 1, 65), (64, 63, 1)), ((30, 40), (149, 150))]  # fmt: skip


def masked_dense(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, active: Tensor) -> Tensor:
    """The definition (method of Tan et al. 2024): only the rows of fc1.weight are masked."""
    return F.linear(torch.relu(F.linear(x, w1 * active[:, None], b1)), w2, b2)


def with_gradients(y: Tensor, tensors: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of the tensors that there are."""
    given_ = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given_, dy, allow_unused=True, materialize_grads=True)]


def exact(
    tensors: Sequence[Tensor | None], dy: Tensor, active: Tensor, sizes: Sequence[int] | None = None
) -> list[Tensor]:
    """Output and gradients of the masked dense block in float64 on the CPU, by autograd, task by task."""
    high = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    x, *weights = high
    sets = (active if active.dim() == 2 else active[None]).cpu()
    parts = [x.shape[0]] if sizes is None else list(sizes)
    outputs = [masked_dense(part, *weights, rows) for part, rows in zip(x.split(parts), sets)]
    y = torch.cat([x[:0, :1] * weights[2][:, 0], *outputs])  # an empty start, for the case without tasks
    return with_gradients(y, high, dy.double().cpu())


def inputs(
    draw: Any, tokens: int, d_in: int, d_ff: int, d_out: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Small integers that require gradients."""
    shapes = ((tokens, d_in), (d_ff, d_in), (d_ff,), (d_out, d_ff), (d_out,))
    return [draw.integers(*s, dtype=dtype, seed=i, size=1).requires_grad_() for i, s in enumerate(shapes)]


def normal(
    draw: Any, tokens: int, d_in: int, d_ff: int, d_out: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Normal numbers that require gradients; the weights scaled as in a network."""
    shapes = ((tokens, d_in, 1.0), (d_ff, d_in, d_in**-0.5), (d_ff, 1, 1.0), (d_out, d_ff, d_ff**-0.5), (d_out, 1, 1.0))
    made = [(draw.normal(a, b, dtype=torch.float64, seed=i) * c).to(dtype) for i, (a, b, c) in enumerate(shapes)]
    made[2], made[4] = made[2][:, 0], made[4][:, 0]
    return [t.contiguous().requires_grad_() for t in made]


def run(tensors: Sequence[Tensor | None], dy: Tensor, active: Tensor, **options: Any) -> list[Tensor]:
    y = compact_ffn(*tensors, active, **options)
    return with_gradients(y, tensors, dy)


def assert_equal(ours: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str] = ("y", *NAMES)) -> None:
    for name, a, b in zip(names, ours, want, strict=True):
        assert torch.equal(a.double().cpu(), b.double().cpu()), f"{name}, {a.dtype}"


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_integers_are_exact_in_value_and_in_every_gradient(place: Any, draw: Any, poison: Any, case: tuple) -> None:
    tokens, d_in, d_ff, d_out, n, kind = case
    if case in LARGE:
        place.skip_interpreter()
    active = draw.active(d_ff, n, kind)
    tensors, dy = inputs(draw, *case[:4]), draw.integers(tokens, d_out, seed=9, size=1)
    want = exact(tensors, dy, active)
    for dtype in place.dtypes:
        # Every sum of a small case is held by every dtype; the sums of the large ones by float32.
        if max(t.abs().max() for t in want if t.numel()) > (256 if dtype == torch.bfloat16 else 2048):
            assert case in LARGE
            if dtype.itemsize < 4:
                continue
        low = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with poison(*(t.shape for t in want), (tokens, n), (d_ff, d_in)):
            ours = run(low, dy.to(dtype), active)
        assert all(t.dtype == dtype for t in ours)
        assert_equal(ours, want)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 128, 190, 199, 200])
def test_both_layouts_of_a_given_index_are_the_same_set(place: Any, draw: Any, poison: Any, n: int) -> None:
    active = draw.active(200, n)
    tensors, dy = inputs(draw, 33, 19, 200, 12), draw.integers(33, 12, seed=9)
    want = exact(tensors, dy, active)
    in_place = torch.where(active, torch.arange(200, device=place.device), -1)[None]
    for index in (active_index(active), in_place):
        with poison(*(t.shape for t in want), (33, n)):
            ours = run(tensors, dy, active, index=index)
        assert_equal(ours, want)
        assert (ours[2][~active] == 0).all()


@pytest.mark.parametrize(("sizes", "widths"), TASKS, ids=str)
def test_grouped_equals_task_by_task(
    place: Any, draw: Any, poison: Any, sizes: tuple[int, ...], widths: tuple[int, ...]
) -> None:
    tokens, d_ff = sum(sizes), 150
    tensors, dy = inputs(draw, tokens, 9, d_ff, 12), draw.integers(tokens, 12, seed=9)
    sets = [draw.active(d_ff, n, seed=i) for i, n in enumerate(widths)]
    active = torch.stack(sets) if sets else torch.zeros(0, d_ff, dtype=torch.bool, device=place.device)
    want = exact(tensors, dy, active, sizes)
    for device in place.offset_devices:
        for dtype in (torch.int32, torch.int64):
            with poison(*(t.shape for t in want), (tokens, 64)):
                ours = run(tensors, dy, active, task_offsets=draw.offsets(sizes, dtype, device))
            assert_equal(ours, want)


def test_sums_over_many_tasks_are_kept_in_float32(place: Any, draw: Any) -> None:
    # After the first task the sum is so large that one more would be rounded away in a lower dtype.
    for dtype, large in ((torch.bfloat16, 256), (torch.float16, 2048)):
        if dtype in place.dtypes:
            x, w1, w2 = (torch.ones(s, dtype=dtype, device=place.device) for s in ((9, 1), (70, 1), (3, 70)))
            b1, b2 = w1.new_zeros(70), w1.new_zeros(3)
            w2[1:] = 0
            dy = torch.ones_like(x.expand(9, 3))
            dy[0] = large
            active = draw.active(70, 20).expand(9, 70)
            tensors = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]
            _, _, dw1, db1, dw2, db2 = run(tensors, dy, active, task_offsets=draw.offsets((1,) * 9))
            for sums in (dw1[active[0]], db1[active[0]], dw2[:, active[0]], db2):
                assert (sums == large + 8).all()


@pytest.mark.parametrize("relation", ["identical", "disjoint", "nested"])
def test_sets_of_tasks_may_overlap_in_any_way(place: Any, draw: Any, relation: str) -> None:
    first = draw.active(130, 50, "block")
    second = {"identical": first, "disjoint": ~first, "nested": first & draw.mask(130)}[relation]
    active, sizes = torch.stack([first, second]), (40, 25)
    tensors, dy = inputs(draw, 65, 9, 130, 12), draw.integers(65, 12, seed=9)
    assert_equal(run(tensors, dy, active, task_offsets=draw.offsets(sizes)), exact(tensors, dy, active, sizes))


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)], ids=str)
def test_missing_biases(place: Any, draw: Any, missing: tuple[int, ...]) -> None:
    tensors, dy = inputs(draw, 33, 9, 150, 12), draw.integers(33, 12, seed=9)
    tensors = [None if i in missing else t for i, t in enumerate(tensors)]
    names = ["y", *(name for name, t in zip(NAMES, tensors) if t is not None)]
    for n in (40, 150):
        active = draw.active(150, n)
        assert_equal(run(tensors, dy, active), exact(tensors, dy, active), names)
    active = torch.stack([draw.active(150, 40), draw.active(150, 9)])
    ours = run(tensors, dy, active, task_offsets=draw.offsets((20, 13)))
    assert_equal(ours, exact(tensors, dy, active, (20, 13)), names)


@pytest.mark.parametrize("shape", [(65, 40, 200, 24), (129, 24, 130, 40), (400, 128, 512, 128)], ids=str)
def test_error_is_bounded_and_at_most_twice_that_of_pytorch(
    place: Any, draw: Any, compare: Any, shape: tuple[int, int, int, int]
) -> None:
    if shape[0] > 200:
        place.skip_interpreter()
    active = draw.active(shape[2], shape[2] // 2)
    bounds = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
    for dtype in place.dtypes:
        tensors, dy = normal(draw, *shape, dtype=dtype), draw.normal(shape[0], shape[3], dtype=dtype, seed=9)
        ours, want = run(tensors, dy, active), exact(tensors, dy, active)
        theirs = with_gradients(masked_dense(*tensors, active), tensors, dy)
        for name, a, b, w in zip(("y", *NAMES), ours, theirs, want, strict=True):
            assert (a.double().cpu() - w).norm() <= bounds[dtype] * w.norm(), (name, dtype)
            if dtype != torch.float64:
                compare.no_worse_than_twice(f"{name} in {dtype}", a, b, w)


def test_inactive_weights_are_never_read(place: Any, draw: Any) -> None:
    for n, dtype in itertools.product((90, 198), (torch.float32, torch.float16)):  # compact, in place
        tensors, dy = inputs(draw, 33, 9, 200, 4, dtype), draw.integers(33, 4, dtype=dtype, seed=9)
        active = draw.active(200, n)
        want = exact(tensors, dy, active)
        with torch.no_grad():
            tensors[1][~active] = float("nan")
        assert_equal(run(tensors, dy, active), want)
        both = torch.stack([active, active])
        assert_equal(run(tensors, dy, both, task_offsets=draw.offsets((20, 13))), want)


def test_inactive_neurons_keep_the_constant_output_of_their_bias(place: Any, draw: Any) -> None:
    x, w1, b1, w2, b2 = inputs(draw, 17, 9, 200, 12)
    dy = draw.integers(17, 12, seed=9)
    none = torch.zeros(200, dtype=torch.bool, device=place.device)
    y, dx, dw1, db1, dw2, db2 = run((x, w1, b1, w2, b2), dy, none)
    r, s = b1.detach().clamp(min=0), dy.sum(0)
    assert torch.equal(y, (w2.detach() @ r + b2.detach()).expand(17, 12))
    assert (dx == 0).all()
    assert (dw1 == 0).all()
    assert torch.equal(db1, (s @ w2.detach()) * (b1 > 0))
    assert torch.equal(dw2, torch.outer(s, r))
    assert torch.equal(db2, s)


def test_nan_and_infinity_go_where_the_dense_block_sends_them(place: Any, draw: Any) -> None:
    active = draw.active(130, 60)
    for value, dtype in itertools.product((float("nan"), float("inf")), (torch.float32, torch.float16)):
        tensors = [t.detach() for t in inputs(draw, 65, 9, 130, 12, dtype)]
        want = compact_ffn(*tensors, active)
        tensors[0][64, 8] = value
        got = compact_ffn(*tensors, active)
        assert torch.equal(got[:64], want[:64])
        dense = masked_dense(*(t.double().cpu() for t in tensors), active.cpu())[64]
        # 0 · inf of an inactive row is NaN in the dense block; compact, the row is not there.
        assert got[64].isnan().all() if value != value else not got[64].isfinite().all()
        assert not dense.isfinite().any()
        tensors[0][64, 8] = 1
        inactive = int((~active).nonzero()[5])
        tensors[2][inactive] = value
        assert torch.equal(
            compact_ffn(*tensors, active).isfinite(), (tensors[3][:, inactive] == float("inf")).expand(65, 12)
        )


def test_float16_overflows_to_infinity(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float16)
    x, w1, b1, w2, b2 = (t.detach().abs() + 1 for t in inputs(draw, 5, 9, 130, 12, torch.float16))
    y = compact_ffn(x * 100, w1 * 100, b1, w2, b2, draw.active(130, 60))
    assert y.isposinf().all()


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    for n, dtype in ((70, torch.float32), (149, torch.float32), (70, torch.float16)):
        tensors, dy = inputs(draw, 37, 19, 150, 12, dtype), draw.integers(37, 12, dtype=dtype, seed=9)
        active = draw.active(150, n)
        want = exact(tensors, dy, active)
        changed = [layout(t.detach()) if t.dim() == 2 else layout(t.detach()[None])[0] for t in tensors]
        for which in (*range(5), None):
            args = [c if which in (i, None) else t.detach() for i, (t, c) in enumerate(zip(tensors, changed))]
            ours = run([a.requires_grad_() for a in args], layout(dy) if which is None else dy, active)
            assert_equal(ours, want)


def test_expanded_inputs_and_gradients_are_taken(place: Any, draw: Any) -> None:
    active = draw.active(150, 70)
    x, w1, b1, w2, b2 = (t.detach() for t in inputs(draw, 1, 19, 150, 12))
    tensors = [t.requires_grad_() for t in (x.expand(9, 19), w1, b1[:1].expand(150), w2, b2[:1].expand(12))]
    y = compact_ffn(*tensors, active)
    ours = with_gradients(y, tensors, torch.ones_like(y[:1, :1]).expand(9, 12))  # as y.sum().backward() gives it
    assert_equal(ours, exact(tensors, torch.ones(9, 12), active))


def test_leading_dimensions_are_kept(place: Any, draw: Any) -> None:
    tensors, active = inputs(draw, 15, 7, 200, 11), draw.active(200, 90)
    y = compact_ffn(tensors[0].view(5, 3, 7), *tensors[1:], active)
    assert torch.equal(y, compact_ffn(*tensors, active).view(5, 3, 11))


def test_a_backward_after_other_calls_and_threads_side_by_side(place: Any, draw: Any, at_once: Any) -> None:
    def caller(seed: int, tokens: int, d_ff: int, dtype: torch.dtype) -> Any:
        tensors, active = inputs(draw, tokens, 9, d_ff, 12, dtype), draw.active(d_ff, d_ff // 2, seed=seed)
        dy = draw.integers(tokens, 12, dtype=dtype, seed=9, size=1)
        want = exact(tensors, dy, active)

        def call() -> None:
            y = compact_ffn(*tensors, active)
            run(tensors, 2 * dy, ~active)  # between a forward and its backward
            assert_equal(with_gradients(y, tensors, dy), want)

        return call

    at_once(caller(0, 65, 200, torch.float32), caller(1, 129, 130, torch.float16), caller(2, 40, 300, torch.float32))


def test_repeats_give_the_same_bits_and_threads_the_same_integers(
    place: Any, draw: Any, threads: Any, compare: Any
) -> None:
    active, offsets = torch.stack([draw.active(200, 90), draw.active(200, 64, seed=1)]), draw.offsets((60, 69))
    tensors, dy = normal(draw, 129, 40, 200, 24), draw.normal(129, 24, seed=9)
    once = run(tensors, dy, active, task_offsets=offsets)
    for _ in range(2 if place.interpreted else 20):
        again = run(tensors, dy, active, task_offsets=offsets)
        assert all(compare.same_bits(a, b) for a, b in zip(again, once))
    if place.device == "cpu":
        tensors, dy = inputs(draw, 200, 9, 130, 12), draw.integers(200, 12, seed=9)
        want = exact(tensors, dy, active[0, :130])
        # Products of one term, so that db1 shows nothing but the order of its own sum.
        x, w1, b1, w2 = (torch.ones(s, requires_grad=True) for s in ((2000, 1), (130, 1), (130,), (1, 130)))
        many, sums = draw.normal(2000, 1), []
        for n in (1, 2, 3):
            threads(n)
            assert_equal(run(tensors, dy, active[0, :130]), want)
            if place.backend == "native":
                sums.append(run((x, w1, b1, w2, None), many, active[0, :130])[3])
        assert all(compare.same_bits(other, sums[0]) for other in sums)


def test_any_shape_layout_and_grouping_equals_the_reference(
    place: Any, draw: Any, examples: Any, layouts: dict[str, Any]
) -> None:
    @examples(50)
    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4), d_in=st.integers(1, 40), d_ff=st.integers(1, 200),
        d_out=st.integers(1, 40), share=st.floats(0, 1), kind=st.sampled_from(["random", "block", "second", "ends"]),
        dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 9), biases=st.booleans(),
        layout=st.sampled_from(list(layouts)),
    )  # fmt: skip
    def holds(
        sizes: list[int], d_in: int, d_ff: int, d_out: int, share: float, kind: str, dtype: torch.dtype, seed: int,
        biases: bool, layout: str,
    ) -> None:  # fmt: skip
        tokens = sum(sizes)
        x, w1, b1, w2, b2 = (t.detach() for t in inputs(draw, tokens, d_in, d_ff, d_out))
        dy = draw.integers(tokens, d_out, seed=seed, size=1)
        b1, b2 = (b1, b2) if biases else (None, None)
        active = draw.sets(d_ff, share, len(sizes), kind, seed)
        index, offsets = active_index(active), draw.offsets(sizes)
        high = [None if t is None else t.double() for t in (x, w1, b1, w2, b2)]
        y, kept = reference.forward(*high, index, offsets)
        want = [y, *reference.backward(dy.double(), *high[:4], index, offsets, *kept)]
        given_ = [x, layouts[layout](w1), b1, layouts[layout](w2), b2]
        given_ = [None if t is None else t.to(dtype).requires_grad_() for t in given_]
        ours = run(given_, dy.to(dtype), active, task_offsets=offsets)
        if biases:
            assert_equal(ours, want)
        else:
            assert_equal(ours, [want[i] for i in (0, 1, 2, 4)], ("y", "x", "w1", "w2"))

    holds()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    shapes = ((300, 64), (200, 64), (200,), (40, 200), (40,))
    tensors = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    active, offsets = torch.rand(3, 200, device="cuda") < 0.5, torch.tensor([0, 100, 100, 300])
    index, dy = active_index(active), torch.randn(300, 40, device="cuda").bfloat16()
    for where in (offsets, offsets.cuda()):
        no_waiting(lambda where=where: run(tensors, dy, active, task_offsets=where, index=index))


@pytest.mark.gpu
def test_another_stream_and_a_busy_device_change_nothing(on_gpu: Any, beside_others: Any) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((4099, 512), (2048, 512), (2048,), (512, 2048), (512,))
    tensors = [torch.randn(s, generator=g, device="cuda").bfloat16().requires_grad_() for s in shapes]
    dy = torch.randn(4099, 512, generator=g, device="cuda").bfloat16()
    active = torch.rand(3, 2048, generator=g, device="cuda") < 0.5
    offsets = torch.tensor([0, 1000, 1000, 4099])
    beside_others(lambda: run(tensors, dy, active, task_offsets=offsets))
