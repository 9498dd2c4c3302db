"""compact_fc1 computes the rows of the active neurons, in value and in every gradient, and nothing of the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from active_sets import LAYOUTS, in_place_index
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.common.active import active_index
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc1.op import _compact_fc1

OPERATOR = "compact_fc1"
NAMES = ("x", "w", "b")

# tokens, d_in, d_ff, active neurons, how they lie
CASES = [(0, 8, 130, 50, "random"), (1, 1, 1, 1, "random"), (1, 16, 64, 0, "random"), (17, 3, 7, 1, "ends"),
         (63, 24, 128, 15, "block"), (64, 16, 128, 16, "second"), (65, 40, 200, 63, "random"), (129, 8, 200, 64, "ends"),
         (129, 16, 200, 65, "second"), (64, 16, 64, 64, "random"), (65, 1, 200, 199, "random"), (17, 16, 200, 0, "random"),
         (17, 40, 200, 130, "block")]  # fmt: skip
LARGE = [(65, 1000, 200, 65, "random"), (129, 24, 4096, 1500, "random")]
TASKS = [((), ()), ((0,), (9,)), ((7, 0, 5), (0, 90, 130)), ((0, 12, 0), (1, 64, 65)), ((1, 1, 10), (100, 0, 3)),
         ((64, 1, 65), (64, 63, 1)), ((30, 40), (149, 150))]  # fmt: skip


def exact(
    x: Tensor, w: Tensor, b: Tensor | None, dz: Tensor, index: Tensor, sizes: Sequence[int] | None = None
) -> list[Tensor]:
    """Value where a neuron is active, NaN elsewhere, and gradients, in float64 on the CPU by autograd, task by task."""
    high = [None if t is None else t.detach().double().cpu().requires_grad_() for t in (x, w, b)]
    z = torch.full(dz.shape, float("nan"), dtype=torch.float64)
    total, start = high[0].sum() * 0 + high[1].sum() * 0 + (0 if b is None else high[2].sum() * 0), 0
    for row, size in zip(index.cpu(), [x.shape[0]] if sizes is None else sizes):
        places = (row >= 0).nonzero().squeeze(1)
        rows, part = row[places], slice(start, start + size)
        own = F.linear(high[0][part], high[1][rows], None if b is None else high[2][rows])
        z[part] = z[part].index_copy(1, places, own.detach())
        total = total + (own * dz[part].double().cpu()[:, places]).sum()
        start += size
    return [z, *torch.autograd.grad(total, [t for t in high if t is not None])]


def inputs(draw: Any, tokens: int, d_in: int, d_ff: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Small integers that require gradients."""
    shapes = ((tokens, d_in), (d_ff, d_in), (d_ff,))
    return [draw.integers(*s, dtype=dtype, seed=i, size=1).requires_grad_() for i, s in enumerate(shapes)]


def gradient(draw: Any, index: Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, and 99 where no neuron is active: it must not count."""
    dz = draw.integers(sum(sizes), index.shape[1], dtype=dtype, seed=9, size=1)
    absent = torch.cat([(row < 0).expand(size, -1) for row, size in zip(index, sizes)]) if sizes else dz != dz
    return dz.masked_fill(absent.to(dz.device), 99)


def run(tensors: Sequence[Tensor | None], dz: Tensor, active: Tensor, **options: Any) -> list[Tensor]:
    z = compact_fc1(*tensors, active, **options)
    given_ = [t for t in tensors if t is not None]
    return [z.detach(), *torch.autograd.grad(z, given_, dz, allow_unused=True, materialize_grads=True)]


def assert_equal(
    ours: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str] = ("z", *NAMES), finite: bool = True
) -> None:
    """Equal where the expected one is a number; what stands elsewhere in z is finite."""
    for name, a, b in zip(names, ours, want, strict=True):
        a, b = a.double().cpu(), b.double().cpu()
        assert torch.equal(torch.where(b.isnan(), b, a).nan_to_num(), b.nan_to_num()), name
        assert not finite or a.isfinite().all(), name


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_integers_are_exact_in_value_and_in_every_gradient(place: Any, draw: Any, poison: Any, case: tuple) -> None:
    tokens, d_in, d_ff, n, kind = case
    if case in LARGE:
        place.skip_interpreter()
    active = draw.active(d_ff, n, kind)
    for layout, dtype in itertools.product(LAYOUTS, place.dtypes):
        if case in LARGE and dtype.itemsize < 4:
            continue
        index = layout(active)
        tensors, dz = inputs(draw, tokens, d_in, d_ff, dtype), gradient(draw, index, [tokens], dtype)
        want = exact(*tensors, dz, index)
        with poison(*(t.shape for t in want), (tokens, n), (n, d_in), (index.shape[1], d_in)):
            ours = run(tensors, dz, active, index=index)
        assert all(t.dtype == dtype for t in ours)
        assert_equal(ours, want)
        assert (ours[2][~active] == 0).all()
        assert (ours[3][~active] == 0).all()


def test_padding_repeats_an_active_neuron_and_an_inactive_one_in_place_has_its_bias(place: Any, draw: Any) -> None:
    x, w, b = inputs(draw, 33, 19, 200)
    for n in (1, 63, 130):
        active = draw.active(200, n)
        z = compact_fc1(x, w, b, active, index=active_index(active))
        first = F.linear(x, w, b)[:, active][:, :1]
        assert torch.equal(z[:, n:], first.expand(-1, z.shape[1] - n))
        in_place = compact_fc1(x, w, b, active, index=in_place_index(active))
        assert torch.equal(in_place[:, ~active], b[~active].expand(33, -1))
        assert (compact_fc1(x, w, None, active, index=in_place_index(active))[:, ~active] == 0).all()
    two, offsets = torch.stack([draw.active(200, 0), draw.active(200, 90)]), draw.offsets((20, 13))
    index = active_index(two)
    z = compact_fc1(x, w, b, two, task_offsets=offsets, index=index)
    assert (z[:20] == 0).all()  # a task without active neurons has nothing to repeat
    assert torch.equal(z[20:, 90:], z[20:, :1].expand(-1, index.shape[1] - 90))
    z = compact_fc1(x, w, b, two, task_offsets=offsets, index=in_place_index(two))
    assert torch.equal(z[:20], b.expand(20, -1))


@pytest.mark.parametrize(("sizes", "widths"), TASKS, ids=str)
def test_grouped_equals_task_by_task(
    place: Any, draw: Any, poison: Any, sizes: tuple[int, ...], widths: tuple[int, ...]
) -> None:
    tokens, d_ff = sum(sizes), 150
    tensors = inputs(draw, tokens, 9, d_ff)
    sets = [draw.active(d_ff, n, seed=i) for i, n in enumerate(widths)]
    active = torch.stack(sets) if sets else torch.zeros(0, d_ff, dtype=torch.bool, device=place.device)
    for layout, device in itertools.product(LAYOUTS, place.offset_devices):
        index = layout(active)
        dz = gradient(draw, index, sizes)
        want = exact(*tensors, dz, index, sizes)
        for dtype in (torch.int32, torch.int64):
            with poison(*(t.shape for t in want), (tokens, 64)):
                ours = run(tensors, dz, active, task_offsets=draw.offsets(sizes, dtype, device), index=index)
            assert_equal(ours, want)


def test_sums_over_many_tasks_are_kept_in_float32(place: Any, draw: Any) -> None:
    # After the first task the sum is so large that one more would be rounded away in a lower dtype.
    for dtype, large in ((torch.bfloat16, 256), (torch.float16, 2048)):
        if dtype in place.dtypes:
            x, w, b = (
                torch.ones(s, dtype=dtype, device=place.device).requires_grad_() for s in ((9, 1), (70, 1), (70,))
            )
            active = draw.active(70, 20).expand(9, 70)
            for layout in LAYOUTS:
                index = layout(active)
                dz = torch.ones((9, index.shape[1]), dtype=dtype, device=place.device)
                dz[0] = large
                _, _, dw, db = run((x, w, b), dz, active, task_offsets=draw.offsets((1,) * 9), index=index)
                assert (dw[active[0]] == large + 8).all()
                assert (db[active[0]] == large + 8).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_bias(place: Any, draw: Any, layout: Any) -> None:
    (x, w, _), names = inputs(draw, 33, 9, 150), ("z", "x", "w")
    for n in (0, 40, 150):
        active = draw.active(150, n)
        index = layout(active)
        dz = gradient(draw, index, [33])
        assert_equal(run((x, w, None), dz, active, index=index), exact(x, w, None, dz, index), names)
    active = torch.stack([draw.active(150, 40), draw.active(150, 9)])
    index, sizes = layout(active), (20, 13)
    dz = gradient(draw, index, sizes)
    ours = run((x, w, None), dz, active, task_offsets=draw.offsets(sizes), index=index)
    assert_equal(ours, exact(x, w, None, dz, index, sizes), names)


def test_error_is_at_most_twice_that_of_pytorch(place: Any, draw: Any, compare: Any) -> None:
    active = draw.active(200, 100)
    for dtype in place.dtypes:
        tensors = [draw.normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((65, 40), (200, 40), (200,)))]
        tensors = [t.requires_grad_() for t in tensors]
        index = active_index(active)
        dz = draw.normal(65, index.shape[1], dtype=dtype, seed=9)
        ours, want = run(tensors, dz, active, index=index), exact(*tensors, dz, index)
        z = F.linear(*tensors)
        theirs = [z, *torch.autograd.grad(z[:, active], tensors, dz[:, :100])]
        ours[0], want[0], theirs[0] = ours[0][:, :100], want[0][:, :100], z.detach()[:, active]
        for name, a, b, c in zip(("z", *NAMES), ours, theirs, want, strict=True):
            if dtype == torch.float64:
                assert (a - c).norm() <= 1e-14 * c.norm()
            else:
                compare.no_worse_than_twice(f"{name} in {dtype}", a, b, c)


def test_inactive_weights_are_never_read(place: Any, draw: Any) -> None:
    for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float16)):
        active = draw.active(200, 90)
        index = layout(active)
        tensors, dz = inputs(draw, 33, 9, 200, dtype), gradient(draw, index, [33], dtype)
        want = exact(*tensors, dz, index)
        with torch.no_grad():
            tensors[1][~active] = float("nan")
            if layout is active_index:
                tensors[2][~active] = float("nan")
        assert_equal(run(tensors, dz, active, index=index), want)
        if layout is active_index:
            both = torch.stack([active, active])
            index = layout(both)
            ours = run(tensors, dz, both, task_offsets=draw.offsets((20, 13)), index=index)
            assert_equal(ours, want)


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    for n, dtype in ((70, torch.float32), (149, torch.float32), (70, torch.float16)):
        active = draw.active(150, n)
        index = active_index(active)
        tensors, dz = inputs(draw, 37, 19, 150, dtype), gradient(draw, index, [37], dtype)
        want = exact(*tensors, dz, index)
        changed = [layout(t.detach()) if t.dim() == 2 else layout(t.detach()[None])[0] for t in tensors]
        for which in (*range(3), None):
            args = [c if which in (i, None) else t.detach() for i, (t, c) in enumerate(zip(tensors, changed))]
            given_ = [a.requires_grad_() for a in args]
            assert_equal(run(given_, layout(dz) if which is None else dz, active, index=index), want)


def test_expanded_inputs_and_leading_dimensions_are_taken(place: Any, draw: Any) -> None:
    active = draw.active(150, 64)
    x, w, b = (t.detach() for t in inputs(draw, 1, 19, 150))
    tensors = [t.requires_grad_() for t in (x.expand(6, 19), w, b[:1].expand(150))]
    index = active_index(active)
    ones = torch.ones((1, 1), device=place.device).expand(6, index.shape[1])
    assert_equal(run(tensors, ones, active, index=index), exact(*tensors, ones, index))
    z = compact_fc1(tensors[0].reshape(2, 3, 19), w, b, active, index=index)
    assert torch.equal(z, compact_fc1(tensors[0], w, b, active, index=index).view(2, 3, -1))
    assert compact_fc1(x[:0].view(0, 5, 19), w, b, active, index=index).shape == (0, 5, index.shape[1])


def test_any_shape_and_grouping_equals_autograd(place: Any, draw: Any, examples: Any, layouts: dict[str, Any]) -> None:
    @examples(40)
    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4), d_in=st.integers(1, 40), d_ff=st.integers(1, 200),
        share=st.floats(0, 1), kind=st.sampled_from(["random", "block", "second", "ends"]), in_place=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 9),
        layout=st.sampled_from(list(layouts)),
    )  # fmt: skip
    def holds(
        sizes: list[int], d_in: int, d_ff: int, share: float, kind: str, in_place: bool, dtype: torch.dtype, seed: int,
        layout: str,
    ) -> None:  # fmt: skip
        active = draw.sets(d_ff, share, len(sizes), kind, seed)
        index = LAYOUTS[in_place](active)
        x, w, b = (t.detach() for t in inputs(draw, sum(sizes), d_in, d_ff, dtype))
        tensors, dz = [t.requires_grad_() for t in (x, layouts[layout](w), b)], gradient(draw, index, sizes, dtype)
        ours = run(tensors, dz, active, task_offsets=draw.offsets(sizes), index=index)
        assert_equal(ours, exact(*tensors, dz, index, sizes))

    holds()


def test_repeats_give_the_same_bits(place: Any, draw: Any, compare: Any) -> None:
    active, offsets = torch.stack([draw.active(200, 90), draw.active(200, 64, seed=1)]), draw.offsets((60, 69))
    tensors = [draw.normal(*s, seed=i).requires_grad_() for i, s in enumerate(((129, 40), (200, 40), (200,)))]
    dz = draw.normal(129, active_index(active).shape[1], seed=9)
    once = run(tensors, dz, active, task_offsets=offsets, index=active_index(active))
    for _ in range(2 if place.interpreted else 10):
        again = run(tensors, dz, active, task_offsets=offsets, index=active_index(active))
        assert all(compare.same_bits(a, b) for a, b in zip(again, once))


def test_gradients_pass_gradcheck(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float64)
    shapes = ((5, 3), (70, 3), (70,))
    tensors = [draw.normal(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    two, offsets = torch.stack([draw.active(70, 64), draw.active(70, 64, seed=1)]), draw.offsets((2, 3))
    for active, options in ((two[0], {}), (two, {"task_offsets": offsets})):
        index = active_index(active)  # without padding, whose gradient is ignored
        assert torch.autograd.gradcheck(lambda *t: compact_fc1(*t, active, index=index, **options), tensors)  # noqa: B023


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any) -> None:
    tensors = inputs(draw, 6, 7, 200)
    two = torch.stack([draw.active(200, 64), draw.active(200, 9)])
    for active, offsets in ((two[0], None), (two, draw.offsets((2, 4)))):
        torch.library.opcheck(_compact_fc1, (*tensors, active_index(active), offsets))
    torch.library.opcheck(_compact_fc1, (*tensors[:2], None, active_index(two[0]), None))


def test_wrong_arguments_are_named() -> None:
    x, w, b = (torch.zeros(s) for s in ((6, 7), (200, 7), (200,)))
    active = torch.arange(200) < 70
    two, offsets = torch.stack([active, active]), torch.tensor([0, 2, 6])
    for args, options, message in (
        ((x[:, :6], w, b, active), {}, r"x has shape \[6, 6\], expected \[6, 7\]"),
        ((x, w[0], b, active), {}, r"w has shape \[7\]"),
        ((x, w, b[:9], active), {}, r"b has shape \[9\], expected \[200\]"),
        ((x, w, b, active[:9]), {}, r"active has shape \[9\]"),
        ((x, w, b, active), {"index": active_index(two)}, r"index has shape \[2, 128\], expected \[1, any\]"),
        ((x, w, b, two), {"task_offsets": offsets + 1}, r"task_offsets is \[1, 3, 7\], expected numbers that rise"),
    ):
        with pytest.raises(ValueError, match=message):
            compact_fc1(*args, **options)
    with pytest.raises(TypeError, match=r"active has dtype torch.int64, expected torch.bool"):
        compact_fc1(x, w, b, active.long())
    with pytest.raises(TypeError, match="expected one dtype"):
        compact_fc1(x.double(), w, b, active)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    tensors = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in ((300, 64), (200, 64), (200,))]
    active, offsets = torch.rand(3, 200, device="cuda") < 0.5, torch.tensor([0, 100, 100, 300])
    index = active_index(active)
    dz = torch.randn(300, index.shape[1], device="cuda").bfloat16()
    for where in (offsets, offsets.cuda()):
        no_waiting(lambda where=where: run(tensors, dz, active, task_offsets=where, index=index))
