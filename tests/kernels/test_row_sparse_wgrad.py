"""The weight gradient of the active rows, zeros elsewhere, and the dense bias gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nspec.kernels.common.active import active_index
from nspec.kernels.row_sparse_wgrad import native, reference, row_sparse_wgrad

OPERATOR = "row_sparse_wgrad"

# tokens, d_in, d_ff, active neurons, how they lie
CASES = [(0, 8, 31, 15, "random"), (1, 1, 1, 1, "random"), (1, 16, 64, 0, "random"), (17, 3, 7, 1, "ends"),
         (63, 24, 128, 15, "block"), (64, 16, 128, 16, "second"), (65, 40, 200, 63, "random"),
         (129, 8, 200, 64, "ends"), (129, 40, 200, 65, "second"), (64, 16, 64, 64, "random"), (65, 1, 200, 199, "random"),
         (17, 40, 200, 130, "block")]  # fmt: skip
LARGE = [(65, 1000, 200, 65, "random"), (129, 1024, 4096, 1500, "random"), (17, 1032, 5000, 2501, "second"),
         (1000, 24, 300, 64, "block")]  # fmt: skip
TASKS = [((), ()), ((0,), (9,)), ((5, 0, 3), (20, 70, 100)), ((1, 1, 1), (100, 0, 64)), ((0, 17, 0), (10, 65, 150)),
         ((64, 1, 65), (64, 63, 1)), ((30, 40), (149, 150))]  # fmt: skip


@pytest.fixture(autouse=True)
def _a_product_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU few tokens a task, as here, take one product for all: test_row_sparse_wgrad_native.py has both ways."""
    monkeypatch.setattr(native, "LEAST_TOKENS", 0.0)


def exact_gradient(dh: Tensor, x: Tensor, active: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The definition in float64 on the CPU: autograd of ``(x (m ⊙ W)ᵀ + b) · dh`` in W and b, task by task."""
    dh, x, active = dh.double().cpu(), x.double().cpu(), active.cpu()
    sets = active if active.dim() == 2 else active[None]
    parts = [dh.shape[0]] if sizes is None else list(sizes)
    weight = torch.zeros(dh.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(dh.shape[1], dtype=torch.float64, requires_grad=True)
    loss = weight.sum() * 0 + bias.sum() * 0
    for dh_, x_, rows in zip(dh.split(parts), x.split(parts), sets):
        loss = loss + ((x_ @ (weight * rows[:, None]).t() + bias) * dh_).sum()
    return torch.autograd.grad(loss, (weight, bias))


def both_layouts(active: Tensor) -> list[Tensor]:
    """Every index tensor of one set: in place always, compact where that is narrower than d_ff."""
    d_ff = active.shape[0]
    width = -(-int(active.sum()) // 64) * 64
    index = [torch.where(active, torch.arange(d_ff, device=active.device), -1)[None]]
    if width < d_ff:
        compact = torch.full((1, width), -1, device=active.device)
        compact[0, : int(active.sum())] = active.nonzero().squeeze(1)
        index.append(compact)
    return index


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_integers_are_exact_and_inactive_rows_are_zero(place: Any, draw: Any, poison: Any, case: tuple) -> None:
    tokens, d_in, d_ff, n, kind = case
    if case in LARGE:
        place.skip_interpreter()
    active = draw.active(d_ff, n, kind)
    dh, x = draw.integers(tokens, d_ff, size=1), draw.integers(tokens, d_in, seed=1)
    want_w, want_b = exact_gradient(dh, x, active)
    assert max(want_w.abs().max(), want_b.abs().max()) <= 256  # so that every dtype holds every sum
    assert int(active.sum()) == n
    for dtype in place.dtypes:
        with poison(want_w.shape, want_b.shape):
            dw, db = row_sparse_wgrad(dh.to(dtype), x.to(dtype), active)
        assert dw.dtype == db.dtype == dtype
        assert torch.equal(dw.double().cpu(), want_w), dtype
        assert torch.equal(db.double().cpu(), want_b), dtype


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 128, 190, 199, 200])
def test_both_layouts_of_a_given_index_are_the_same_set(place: Any, draw: Any, poison: Any, n: int) -> None:
    active = draw.active(200, n)
    dh, x = draw.integers(33, 200), draw.integers(33, 19, seed=1)
    want = exact_gradient(dh, x, active)
    total = draw.integers(200, 19, seed=2)
    for index in (active_index(active), *both_layouts(active)):
        with poison(want[0].shape, want[1].shape):
            dw, db = row_sparse_wgrad(dh, x, active, index=index)
            sums, _ = row_sparse_wgrad(dh, x, active, index=index, add_to=total.clone())
        assert torch.equal(dw.double().cpu(), want[0]), index.shape
        assert torch.equal(db.double().cpu(), want[1])
        assert torch.equal(sums, total + dw)


@pytest.mark.parametrize(("sizes", "widths"), TASKS, ids=str)
def test_grouped_is_the_sum_over_tasks(
    place: Any, draw: Any, poison: Any, sizes: tuple[int, ...], widths: tuple[int, ...]
) -> None:
    tokens, d_ff = sum(sizes), 150
    dh, x = draw.integers(tokens, d_ff), draw.integers(tokens, 19, seed=1)
    sets = [draw.active(d_ff, n, seed=i) for i, n in enumerate(widths)]
    active = torch.stack(sets) if sets else torch.zeros(0, d_ff, dtype=torch.bool, device=place.device)
    want_w, want_b = exact_gradient(dh, x, active, sizes)
    for device in place.offset_devices:
        for dtype in (torch.int32, torch.int64):
            with poison(want_w.shape, want_b.shape):
                dw, db = row_sparse_wgrad(dh, x, active, task_offsets=draw.offsets(sizes, dtype, device))
            assert torch.equal(dw.double().cpu(), want_w)
            assert torch.equal(db.double().cpu(), want_b)
    total = draw.integers(d_ff, 19, seed=2) + 0.25
    sums, db = row_sparse_wgrad(dh, x, active, task_offsets=draw.offsets(sizes), add_to=total.clone())
    assert torch.equal(sums.double().cpu(), total.double().cpu() + want_w)
    assert torch.equal(db.double().cpu(), want_b)


def test_sums_over_many_tasks_are_kept_in_float32(place: Any, draw: Any) -> None:
    # After the first task the sum is so large that one more would be rounded away in a lower dtype.
    for dtype, large in ((torch.bfloat16, 256), (torch.float16, 2048)):
        if dtype in place.dtypes:
            dh, x = (torch.ones(9, n, dtype=dtype, device=place.device) for n in (70, 5))
            dh[0] = large
            active = draw.active(70, 20).expand(9, 70)
            dw, db = row_sparse_wgrad(dh, x, active, task_offsets=draw.offsets((1,) * 9))
            assert (dw[active[0]] == large + 8).all()
            assert (db == large + 8).all()


@pytest.mark.parametrize("relation", ["identical", "disjoint", "nested"])
def test_sets_of_tasks_may_overlap_in_any_way(place: Any, draw: Any, relation: str) -> None:
    first = draw.active(130, 50, "block")
    second = {"identical": first, "disjoint": ~first, "nested": first & draw.mask(130)}[relation]
    active, sizes = torch.stack([first, second]), (40, 25)
    dh, x = draw.integers(65, 130), draw.integers(65, 19, seed=1)
    want = exact_gradient(dh, x, active, sizes)
    for ours, theirs in zip(row_sparse_wgrad(dh, x, active, task_offsets=draw.offsets(sizes)), want):
        assert torch.equal(ours.double().cpu(), theirs)


@pytest.mark.parametrize("tokens", [65, 129, 3000])
def test_error_is_bounded_and_at_most_twice_that_of_pytorch(place: Any, draw: Any, compare: Any, tokens: int) -> None:
    if tokens > 200:
        place.skip_interpreter()
    active = draw.active(200, 90)
    for dtype in place.dtypes:
        dh, x = draw.normal(tokens, 200, dtype=dtype), draw.normal(tokens, 40, dtype=dtype, seed=1)
        ours, want = row_sparse_wgrad(dh, x, active), exact_gradient(dh, x, active)
        terms = exact_gradient(dh.abs(), x.abs(), active)
        theirs = (dh.t() @ x) * active[:, None], dh.sum(0)
        inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
        for name, a, b, w, t in zip(("dw", "db"), ours, theirs, want, terms):
            # One rounding of the result, and of each of the terms in float32 (float64: in itself).
            compare.within(f"{name} in {dtype}", a, w, torch.finfo(dtype).eps / 2 * w.abs() + tokens * inner * t)
            if dtype != torch.float64:
                compare.no_worse_than_twice(f"{name} in {dtype}", a, b, w)


def test_inactive_columns_are_not_read_for_the_weight_gradient(place: Any, draw: Any) -> None:
    for n, dtype in itertools.product((50, 198), (torch.float32, torch.float16)):
        active = torch.stack([draw.active(200, n), draw.active(200, 40, seed=1)])
        dh, x, sizes = draw.integers(65, 200, dtype=dtype), draw.integers(65, 9, dtype=dtype, seed=1), (40, 25)
        want, _ = exact_gradient(dh, x, active, sizes)
        dh[:40, ~active[0]], dh[40:, ~active[1]] = float("nan"), float("nan")
        dw, db = row_sparse_wgrad(dh, x, active, task_offsets=draw.offsets(sizes))
        assert torch.equal(dw.double().cpu(), want)
        assert torch.equal(db.isnan(), ~active.all(0))
        alone, _ = row_sparse_wgrad(dh[:40], x[:40], active[0])
        assert torch.equal(alone.double().cpu(), exact_gradient(dh[:40].nan_to_num(), x[:40], active[0])[0])


def test_nan_and_infinity_stay_in_the_rows_and_columns_that_hold_them(place: Any, draw: Any) -> None:
    active = draw.active(130, 60)
    for dtype in (torch.float32, torch.float16):
        check_spread(draw, active, dtype)


def check_spread(draw: Any, active: Tensor, dtype: torch.dtype) -> None:
    one, other = active.nonzero().squeeze(1)[[3, 40]].tolist()
    dh, x = (draw.integers(65, n, dtype=dtype, seed=n).clamp(min=1) for n in (130, 19))
    want, _ = exact_gradient(dh, x, active)
    dh[64, one], dh[3, other], x[7, 18] = float("nan"), float("inf"), -float("inf")
    dw, db = row_sparse_wgrad(dh, x, active)
    rows, dw = active.cpu(), dw.cpu()
    assert dw[one].isnan().all()
    assert dw[other, :18].isposinf().all()
    assert dw[other, 18].isnan()
    rest = rows.clone()
    rest[[one, other]] = False
    assert (dw[rest][:, 18] == -float("inf")).all()
    assert torch.equal(dw[rest][:, :18].double(), want[rest][:, :18])
    assert (dw[~rows] == 0).all()
    assert db[one].isnan()
    assert db[other].isposinf()


def test_float16_overflows_to_infinity(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float16)
    dh = torch.full((3, 70), 200.0, dtype=torch.float16, device=place.device)
    dw, db = row_sparse_wgrad(dh, dh[:, :5], draw.active(70, 20))
    assert sorted(set(dw.flatten().tolist())) == [0.0, float("inf")]
    assert (db == 600).all()


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    active, total = draw.active(150, 70), draw.integers(150, 19, seed=2)
    flags = layout(active[None])[0]
    for dtype in (torch.float16, torch.float32):
        dh, x = draw.integers(37, 150, dtype=dtype), draw.integers(37, 19, dtype=dtype, seed=1)
        want = exact_gradient(dh, x, active)
        for a, b, rows in ((layout(dh), x, active), (dh, layout(x), active), (layout(dh), layout(x), flags)):
            got = row_sparse_wgrad(a.requires_grad_(), b.requires_grad_(), rows)
            assert all(torch.equal(t.double().cpu(), w) for t, w in zip(got, want))
    into = layout(total)
    assert row_sparse_wgrad(dh, x, active, add_to=into)[0] is into
    assert torch.equal(into.double().cpu(), total.double().cpu() + want[0])


def test_expanded_gradients_are_taken(place: Any, draw: Any) -> None:
    active = draw.active(150, 70)
    dh, x = draw.integers(1, 150).expand(37, 150), draw.integers(37, 1, seed=1).expand(37, 19)
    got = row_sparse_wgrad(dh, x, active)
    assert all(torch.equal(t.double().cpu(), w) for t, w in zip(got, exact_gradient(dh, x, active)))


def test_add_to_sums_in_float32_and_leaves_other_memory_alone(place: Any, draw: Any, compare: Any) -> None:
    # 129 products of 25 make 3225 and a quarter: neither bfloat16 nor float16 holds that, float32 does.
    for kind, n in (("random", 70), ("ends", 65), ("block", 64), ("random", 199), ("random", 0)):
        active = draw.active(200, n, kind)
        for dtype in place.dtypes:
            dh = torch.full((129, 200), 5.0, dtype=dtype, device=place.device)
            dh[:, ~active] = float("nan")
            memory = torch.full((204, 19), float("nan"), device=place.device)
            memory[::7] = draw.normal(30, 19)
            memory[3::7] = -0.0  # which adding zero would change
            total = memory[2:-2]
            total[active] = 0.25
            before = memory.clone()
            dw, db = row_sparse_wgrad(
                dh, dh[:, active][:, :1].expand(129, 19) if n else dh[:, :19], active, add_to=total
            )
            assert dw is total
            assert (total[active] == 3225.25).all(), (dtype, n)
            inactive = torch.cat([torch.ones(2, dtype=torch.bool), ~active.cpu(), torch.ones(2, dtype=torch.bool)])
            assert compare.same_bits(memory.cpu()[inactive], before.cpu()[inactive])
            assert db.dtype == dtype


def test_add_to_is_as_exact_as_float32(place: Any, draw: Any, compare: Any) -> None:
    active = draw.active(200, 90)
    for dtype in place.dtypes:
        dh, x = draw.normal(129, 200, dtype=dtype), draw.normal(129, 40, dtype=dtype, seed=1)
        total = draw.normal(200, 40, seed=2)
        want = exact_gradient(dh, x, active)[0]
        bound = 130 * 2**-24 * (exact_gradient(dh.abs(), x.abs(), active)[0] + total.double().abs().cpu())
        got, _ = row_sparse_wgrad(dh, x, active, add_to=total.clone())
        compare.within(f"add_to from {dtype}", got, want + total.double().cpu(), bound)


def test_add_to_with_no_tokens_changes_nothing(place: Any, draw: Any) -> None:
    total = draw.normal(70, 19)
    kept = total.clone()
    _, db = row_sparse_wgrad(draw.integers(0, 70), draw.integers(0, 19), draw.active(70, 30), add_to=total)
    assert torch.equal(total, kept)
    assert (db == 0).all()


def test_results_of_earlier_calls_stay_and_threads_do_not_meet(place: Any, draw: Any, at_once: Any) -> None:
    def caller(seed: int, tokens: int, d_ff: int, dtype: torch.dtype) -> Any:
        active = draw.active(d_ff, d_ff // 2, seed=seed)
        dh, x = (draw.integers(tokens, n, dtype=dtype, seed=seed, size=1) for n in (d_ff, 19))
        want = exact_gradient(dh, x, active)
        kept = []

        def call() -> None:
            kept.append(row_sparse_wgrad(dh, x, active))
            for got in kept:
                assert all(torch.equal(a.double().cpu(), b) for a, b in zip(got, want))

        return call

    at_once(caller(0, 65, 200, torch.float32), caller(1, 129, 130, torch.float16), caller(2, 40, 300, torch.float32))


def test_repeats_and_threads_give_the_same_bits(place: Any, draw: Any, threads: Any, compare: Any) -> None:
    active = torch.stack([draw.active(200, 90), draw.active(200, 64, seed=1)])
    dh, x, offsets = draw.normal(129, 200), draw.normal(129, 40, seed=1), draw.offsets((60, 69))
    total = draw.normal(200, 40, seed=2)
    once = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
    added, _ = row_sparse_wgrad(dh, x, active, task_offsets=offsets, add_to=total.clone())
    for _ in range(2 if place.interpreted else 20):
        again = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
        assert all(compare.same_bits(a, b) for a, b in zip(again, once))
        sums, _ = row_sparse_wgrad(dh, x, active, task_offsets=offsets, add_to=total.clone())
        assert compare.same_bits(sums, added)
    if place.device == "cpu":
        dh, x, active = draw.integers(200, 130), draw.integers(200, 40, seed=1), draw.active(130, 65)
        many = draw.normal(2000, 130)
        sums = []
        for n in (1, 2, 3):
            threads(n)
            want = exact_gradient(dh, x, active)
            assert all(torch.equal(a.double(), b) for a, b in zip(row_sparse_wgrad(dh, x, active), want))
            if place.backend == "native":
                sums.append(row_sparse_wgrad(many, many[:, :3], active)[1])
        assert all(compare.same_bits(other, sums[0]) for other in sums)


def test_any_shape_layout_and_grouping_equals_the_reference(
    place: Any, draw: Any, examples: Any, layouts: dict[str, Any]
) -> None:
    names = st.sampled_from(list(layouts))

    @examples(60)
    @given(
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), d_in=st.integers(1, 70), d_ff=st.integers(1, 200),
        share=st.floats(0, 1), kind=st.sampled_from(["random", "block", "second", "ends"]),
        dtype=st.sampled_from(place.dtypes), seed=st.integers(0, 9), dh_layout=names, x_layout=names,
    )  # fmt: skip
    def holds(
        sizes: list[int], d_in: int, d_ff: int, share: float, kind: str, dtype: torch.dtype, seed: int, dh_layout: str,
        x_layout: str,
    ) -> None:  # fmt: skip
        dh, x = (
            draw.integers(sum(sizes), d_ff, seed=seed, size=1),
            draw.integers(sum(sizes), d_in, seed=seed + 1, size=1),
        )
        active = draw.sets(d_ff, share, len(sizes), kind, seed)
        offsets = draw.offsets(sizes)
        ours = row_sparse_wgrad(
            layouts[dh_layout](dh.to(dtype)), layouts[x_layout](x.to(dtype)), active, task_offsets=offsets
        )
        want = reference.forward(dh.double(), x.double(), active_index(active), offsets)
        assert all(torch.equal(a.double(), b) for a, b in zip(ours, want))

    holds()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    dh, x = torch.randn(300, 200, device="cuda").bfloat16(), torch.randn(300, 64, device="cuda").bfloat16()
    active, offsets = torch.rand(3, 200, device="cuda") < 0.5, torch.tensor([0, 100, 100, 300])
    index, total = active_index(active), torch.zeros(200, 64, device="cuda")
    for where in (offsets, offsets.cuda()):
        no_waiting(lambda where=where: row_sparse_wgrad(dh, x, active, task_offsets=where, index=index))
        no_waiting(lambda where=where: row_sparse_wgrad(dh, x, active, task_offsets=where, index=index, add_to=total))


@pytest.mark.gpu
def test_gradients_beyond_two_to_the_31_elements(on_gpu: Any, needs_memory: Any) -> None:
    needs_memory(16)
    tokens, d_ff = 2**20 + 3, 3072
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randint(-1, 2, (tokens, 16), generator=g, device="cuda").to(torch.bfloat16)
    dh = torch.randint(-1, 2, (tokens, d_ff), generator=g, device="cuda", dtype=torch.int8).to(torch.bfloat16)
    active = torch.rand(d_ff, generator=g, device="cuda") < 0.5
    assert dh.numel() > 2**31
    want_w, want_b = torch.zeros(d_ff, 16, device="cuda"), torch.zeros(d_ff, device="cuda")
    for start in range(0, tokens, 2**17):
        part = dh[start : start + 2**17].float()
        want_w += part.t() @ x[start : start + 2**17].float()
        want_b += part.sum(0)
    want_w *= active[:, None]
    assert want_w.abs().max() < 2**24  # all sums are exact in float32
    dw, db = row_sparse_wgrad(dh, x, active)
    assert torch.equal(dw, want_w.bfloat16())
    assert torch.equal(db, want_b.bfloat16())


@pytest.mark.gpu
def test_another_stream_and_a_busy_device_change_nothing(on_gpu: Any, beside_others: Any) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    dh, x = (torch.randn(s, generator=g, device="cuda").bfloat16() for s in ((8195, 2048), (8195, 512)))
    active = torch.rand(3, 2048, generator=g, device="cuda") < 0.5
    offsets = torch.tensor([0, 1000, 1000, 8195])
    beside_others(lambda: row_sparse_wgrad(dh, x, active, task_offsets=offsets))
