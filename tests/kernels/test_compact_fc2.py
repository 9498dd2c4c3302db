"""compact_fc2 adds up the active neurons and the constants of the others, in value and in every gradient."""

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
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_fc2.op import _compact_fc2

OPERATOR = "compact_fc2"
NAMES = ("h", "constant", "w", "b")

# tokens, d_ff, d_out, active neurons, how they lie
CASES = [(0, 130, 8, 50, "random"), (1, 1, 1, 1, "random"), (1, 64, 16, 0, "random"), (17, 7, 3, 1, "ends"),
         (63, 128, 24, 15, "block"), (64, 128, 16, 16, "second"), (65, 200, 40, 63, "random"), (129, 200, 8, 64, "ends"),
         (129, 200, 16, 65, "second"), (64, 64, 16, 64, "random"), (65, 200, 1, 199, "random"), (17, 200, 16, 0, "random"),
         (17, 200, 40, 130, "block")]  # fmt: skip
LARGE = [(65, 200, 1000, 65, "random"), (129, 4096, 24, 1500, "random")]
TASKS = [((), ()), ((0,), (9,)), ((7, 0, 5), (0, 90, 130)), ((0, 12, 0), (1, 64, 65)), ((1, 1, 10), (100, 0, 3)),
         ((64, 1, 65), (64, 63, 1)), ((30, 40), (149, 150))]  # fmt: skip


def exact(
    tensors: Sequence[Tensor | None], dy: Tensor, index: Tensor, sizes: Sequence[int] | None = None
) -> list[Tensor]:
    """Output and gradients in float64 on the CPU by autograd, task by task: whole rows of h with the constants in them."""
    high = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    h, constant, w, b = high
    d_ff, start = w.shape[1], 0
    outputs = [h[:0, :1].sum(1, keepdim=True) * w[:, 0]]
    for task, (row, size) in enumerate(zip(index.cpu(), [len(h)] if sizes is None else sizes)):
        places = (row >= 0).nonzero().squeeze(1)
        c = torch.zeros(d_ff, dtype=torch.float64) if constant is None else constant
        c = (c[task] if c.dim() == 2 else c.expand(d_ff)).expand(size, d_ff)
        whole = c.index_copy(1, row[places], h[start : start + size].index_select(1, places))
        outputs.append(F.linear(whole, w, b))
        start += size
    y = torch.cat(outputs)
    given_ = [t for t in high if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given_, dy.double().cpu(), allow_unused=True, materialize_grads=True)]


def inputs(
    draw: Any,
    index: Tensor,
    sizes: Sequence[int],
    d_ff: int,
    d_out: int,
    dtype: torch.dtype = torch.float32,
    constant: str = "each",
) -> list[Tensor | None]:
    """Small integers that require gradients; h is 99 where no neuron is active: it must not count.

    ``constant``: ``none``, ``one``, ``each`` neuron, each ``task``.
    """
    h = draw.integers(sum(sizes), index.shape[1], dtype=dtype, seed=0, size=1)
    absent = torch.cat([(row < 0).expand(size, -1) for row, size in zip(index, sizes)]) if sizes else h != h
    shape = {"none": None, "one": (), "each": (d_ff,), "task": (len(index), d_ff)}[constant]
    made = [
        h.masked_fill(absent.to(h.device), 99),
        None if shape is None else draw.integers(*shape, dtype=dtype, seed=4, size=1),
        draw.integers(d_out, d_ff, dtype=dtype, seed=2, size=1),
        draw.integers(d_out, dtype=dtype, seed=3, size=1),
    ]
    return [None if t is None else t.requires_grad_() for t in made]


def run(tensors: Sequence[Tensor | None], dy: Tensor, active: Tensor, **options: Any) -> list[Tensor]:
    y = compact_fc2(*tensors, active, **options)
    given_ = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given_, dy, allow_unused=True, materialize_grads=True)]


def names_of(tensors: Sequence[Tensor | None]) -> list[str]:
    return ["y", *(name for name, t in zip(NAMES, tensors) if t is not None)]


def assert_equal(ours: Sequence[Tensor], want: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    for name, a, b in zip(names_of(tensors), ours, want, strict=True):
        assert torch.equal(a.double().cpu(), b.double().cpu()), f"{name}, {a.dtype}"


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_integers_are_exact_in_value_and_in_every_gradient(place: Any, draw: Any, poison: Any, case: tuple) -> None:
    tokens, d_ff, d_out, n, kind = case
    if case in LARGE:
        place.skip_interpreter()
    active = draw.active(d_ff, n, kind)
    for layout, dtype, constant in itertools.product(LAYOUTS, place.dtypes, ("each", "none")):
        if case in LARGE and dtype.itemsize < 4:
            continue
        index = layout(active)
        tensors = inputs(draw, index, [tokens], d_ff, d_out, dtype, constant)
        dy = draw.integers(tokens, d_out, dtype=dtype, seed=9, size=1)
        want = exact(tensors, dy, index)
        with poison(*(t.shape for t in want), (tokens, n), (d_out, n), (index.shape[1], d_out)):
            ours = run(tensors, dy, active, index=index)
        assert all(t.dtype == dtype for t in ours)
        assert_equal(ours, want, tensors)


@pytest.mark.parametrize("constant", ["none", "one", "each", "task"])
@pytest.mark.parametrize(("sizes", "widths"), TASKS, ids=str)
def test_grouped_equals_task_by_task(
    place: Any, draw: Any, poison: Any, sizes: tuple[int, ...], widths: tuple[int, ...], constant: str
) -> None:
    tokens, d_ff = sum(sizes), 150
    sets = [draw.active(d_ff, n, seed=i) for i, n in enumerate(widths)]
    active = torch.stack(sets) if sets else torch.zeros(0, d_ff, dtype=torch.bool, device=place.device)
    dy = draw.integers(tokens, 12, seed=9, size=1)
    for layout, device in itertools.product(LAYOUTS, place.offset_devices):
        index = layout(active)
        tensors = inputs(draw, index, sizes, d_ff, 12, constant=constant)
        want = exact(tensors, dy, index, sizes)
        with poison(*(t.shape for t in want), (tokens, 64)):
            ours = run(tensors, dy, active, task_offsets=draw.offsets(sizes, torch.int32, device), index=index)
        assert_equal(ours, want, tensors)


def test_sums_over_many_tasks_are_kept_in_float32(place: Any, draw: Any) -> None:
    # After the first task the sum is so large that one more would be rounded away in a lower dtype.
    for dtype, large in ((torch.bfloat16, 256), (torch.float16, 2048)):
        if dtype in place.dtypes:
            active = draw.active(70, 20).expand(9, 70)
            for layout in LAYOUTS:
                index = layout(active)
                h, c, b = (torch.ones(s, dtype=dtype, device=place.device) for s in ((9, index.shape[1]), (70,), (3,)))
                w = torch.zeros((3, 70), dtype=dtype, device=place.device)
                w[0] = 1
                dy = torch.ones_like(h[:, :3])
                dy[0] = large
                tensors = [t.requires_grad_() for t in (h, c, w, b)]
                _, _, dc, dw, db = run(tensors, dy, active, task_offsets=draw.offsets((1,) * 9), index=index)
                for sums in (dc[~active[0]], dw, db):
                    assert (sums == large + 8).all()


def test_a_column_of_active_and_constant_neurons_is_rounded_once(place: Any, draw: Any) -> None:
    if place.backend != "triton":
        pytest.skip("the CPU rounds the product of each task")
    # 2048 + 1 where the neuron is active, 1 where it is constant: float16 holds 2048 and 2050, and nothing between them.
    active = torch.tensor([[True], [False]], device=place.device).expand(2, 70)
    h, w, c, dy = (torch.ones(s, dtype=torch.float16, device=place.device) for s in ((3, 70), (1, 70), (70,), (3, 1)))
    dy[0] = 2048
    index = in_place_index(active)
    tensors = [t.requires_grad_() for t in (h, c, w)]
    y = compact_fc2(*tensors, None, active, task_offsets=draw.offsets((2, 1)), index=index)
    assert (torch.autograd.grad(y, w, dy)[0] == 2050).all()


@pytest.mark.parametrize("missing", [(1,), (3,), (1, 3)], ids=str)
def test_missing_constant_and_bias(place: Any, draw: Any, missing: tuple[int, ...]) -> None:
    for layout, n in itertools.product(LAYOUTS, (0, 40, 150)):
        active, dy = draw.active(150, n), draw.integers(33, 12, seed=9)
        index = layout(active)
        tensors = [None if i in missing else t for i, t in enumerate(inputs(draw, index, [33], 150, 12))]
        assert_equal(run(tensors, dy, active, index=index), exact(tensors, dy, index), tensors)
        two, sizes = torch.stack([active, draw.active(150, 9)]), (20, 13)
        index = layout(two)
        tensors = [None if i in missing else t for i, t in enumerate(inputs(draw, index, sizes, 150, 12))]
        ours = run(tensors, dy, two, task_offsets=draw.offsets(sizes), index=index)
        assert_equal(ours, exact(tensors, dy, index, sizes), tensors)


def test_the_constant_of_active_neurons_and_weights_without_one_are_never_read(place: Any, draw: Any) -> None:
    for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float16)):
        active, dy = draw.active(200, 90), draw.integers(33, 4, dtype=dtype, seed=9)
        index = layout(active)
        h, c, w, b = inputs(draw, index, [33], 200, 4, dtype)
        want = exact((h, c, w, b), dy, index)
        with torch.no_grad():
            c[active] = float("nan")
        assert_equal(run((h, c, w, b), dy, active, index=index), want, (h, c, w, b))
        both, offsets = torch.stack([active, active]), draw.offsets((20, 13))
        ours = run((h, c, w, b), dy, both, task_offsets=offsets, index=layout(both))
        assert_equal(ours, want, (h, c, w, b))
        want = exact((h, None, w, b), dy, index)
        with torch.no_grad():
            w[:, ~active] = float("nan")
        assert_equal(run((h, None, w, b), dy, active, index=index), want, (h, None, w, b))
        if layout is active_index:
            ours = run((h, None, w, b), dy, both, task_offsets=offsets, index=layout(both))
            assert_equal(ours, want, (h, None, w, b))


def test_error_is_at_most_twice_that_of_pytorch(place: Any, draw: Any, compare: Any) -> None:
    active = draw.active(200, 64)
    index = active_index(active)
    for dtype in place.dtypes:
        shapes = ((65, 64), (200,), (24, 200), (24,))
        tensors = [draw.normal(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]
        dy = draw.normal(65, 24, dtype=dtype, seed=9)
        ours, want = run(tensors, dy, active, index=index), exact(tensors, dy, index)
        whole = tensors[1].expand(65, -1).index_copy(1, index[0], tensors[0])
        y = F.linear(whole, *tensors[2:])
        theirs = [y.detach(), *torch.autograd.grad(y, tensors, dy)]
        theirs[2] = (dy.sum(0) @ tensors[2].detach()).masked_fill(active, 0)
        for name, a, b, c in zip(("y", *NAMES), ours, theirs, want, strict=True):
            if dtype == torch.float64:
                assert (a - c).norm() <= 1e-14 * c.norm()
            else:
                compare.no_worse_than_twice(f"{name} in {dtype}", a, b, c)


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    for n, dtype in ((70, torch.float32), (149, torch.float32), (70, torch.float16)):
        active, dy = draw.active(150, n), draw.integers(37, 12, dtype=dtype, seed=9)
        index = active_index(active)
        tensors = inputs(draw, index, [37], 150, 12, dtype)
        want = exact(tensors, dy, index)
        changed = [layout(t.detach()) if t.dim() == 2 else layout(t.detach()[None])[0] for t in tensors]
        for which in (*range(4), None):
            args = [c if which in (i, None) else t.detach() for i, (t, c) in enumerate(zip(tensors, changed))]
            given_ = [a.requires_grad_() for a in args]
            assert_equal(run(given_, layout(dy) if which is None else dy, active, index=index), want, tensors)


def test_expanded_inputs_and_leading_dimensions_are_taken(place: Any, draw: Any) -> None:
    active = draw.active(150, 64)
    index = active_index(active)
    h, c, w, b = (t.detach() for t in inputs(draw, index, [1], 150, 12))
    tensors = [t.requires_grad_() for t in (h.expand(6, -1), c[:1].expand(150), w, b[:1].expand(12))]
    ones = torch.ones((1, 1), device=place.device).expand(6, 12)  # as y.sum().backward() gives it
    assert_equal(run(tensors, ones, active, index=index), exact(tensors, ones, index), tensors)
    y = compact_fc2(tensors[0].reshape(2, 3, -1), *tensors[1:], active, index=index)
    assert torch.equal(y, compact_fc2(*tensors, active, index=index).view(2, 3, 12))
    assert compact_fc2(h[:0].view(0, 5, h.shape[1]), c, w, b, active).shape == (0, 5, 12)
    # No neuron, hence no columns, but tokens.
    none = torch.zeros_like(active)
    assert torch.equal(compact_fc2(h.new_empty(2, 3, 0), c, w, b, none), (w @ c + b).expand(2, 3, 12))


def test_any_shape_and_grouping_equals_autograd(place: Any, draw: Any, examples: Any, layouts: dict[str, Any]) -> None:
    @examples(40)
    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4), d_ff=st.integers(1, 200), d_out=st.integers(1, 40),
        share=st.floats(0, 1), kind=st.sampled_from(["random", "block", "second", "ends"]), in_place=st.booleans(),
        constant=st.sampled_from(["none", "one", "each", "task"]), dtype=st.sampled_from([torch.float32, torch.float16]),
        seed=st.integers(0, 9), layout=st.sampled_from(list(layouts)),
    )  # fmt: skip
    def holds(
        sizes: list[int], d_ff: int, d_out: int, share: float, kind: str, in_place: bool, constant: str,
        dtype: torch.dtype, seed: int, layout: str,
    ) -> None:  # fmt: skip
        active = draw.sets(d_ff, share, len(sizes), kind, seed)
        index = LAYOUTS[in_place](active)
        h, c, w, b = inputs(draw, index, sizes, d_ff, d_out, dtype, constant)
        w = layouts[layout](w.detach()).requires_grad_()
        dy = draw.integers(sum(sizes), d_out, dtype=dtype, seed=seed, size=1)
        ours = run((h, c, w, b), dy, active, task_offsets=draw.offsets(sizes), index=index)
        want = exact((h, c, w, b), dy, index, sizes)
        if constant == "one" and dtype == torch.float16:  # its gradient is a sum too large for float16
            ours[2] = want[2]
        assert_equal(ours, want, (h, c, w, b))

    holds()


def test_repeats_give_the_same_bits(place: Any, draw: Any, compare: Any) -> None:
    active, offsets = torch.stack([draw.active(200, 90), draw.active(200, 64, seed=1)]), draw.offsets((60, 69))
    index = active_index(active)
    shapes = ((129, index.shape[1]), (200,), (24, 200), (24,))
    tensors = [draw.normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    dy = draw.normal(129, 24, seed=9)
    once = run(tensors, dy, active, task_offsets=offsets)
    for _ in range(2 if place.interpreted else 10):
        again = run(tensors, dy, active, task_offsets=offsets)
        assert all(compare.same_bits(a, b) for a, b in zip(again, once))


def test_gradients_pass_gradcheck(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float64)
    two, offsets = torch.stack([draw.active(70, 30), draw.active(70, 9, seed=1)]), draw.offsets((2, 3))
    for active, options in ((two[0], {}), (two, {"task_offsets": offsets})):
        for layout in LAYOUTS:
            index = layout(active)
            for constant in ((), (70,), (2, 70)) if options else ((), (70,)):
                shapes = ((5, index.shape[1]), constant, (4, 70), (4,))
                tensors = [draw.normal(*s, dtype=torch.float64, seed=i) for i, s in enumerate(shapes)]
                given_ = [t.requires_grad_() for t in tensors]
                call = lambda *t: compact_fc2(*t, active, index=index, **options)  # noqa: B023
                assert torch.autograd.gradcheck(call, given_)


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any) -> None:
    two = torch.stack([draw.active(200, 70), draw.active(200, 9)])
    for active, offsets, sizes in ((two[0], None, [6]), (two, draw.offsets((2, 4)), [2, 4])):
        index = active_index(active)
        h, c, w, b = inputs(draw, index, sizes, 200, 4, constant="task")
        torch.library.opcheck(_compact_fc2, (h, c, w, b, index, offsets))
        torch.library.opcheck(_compact_fc2, (h, None, w, None, index, offsets))


def test_wrong_arguments_are_named() -> None:
    active = torch.arange(200) < 70
    h, c, w, b = (torch.zeros(s) for s in ((6, 128), (200,), (4, 200), (4,)))
    two, offsets = torch.stack([active, active]), torch.tensor([0, 2, 6])
    for args, options, message in (
        ((h[:, :70], c, w, b, active), {}, r"h has shape \[6, 70\], expected \[6, 128\]"),
        ((h, c, w[0], b, active), {}, r"w has shape \[200\]"),
        ((h, c, w, b[:3], active), {}, r"b has shape \[3\], expected \[4\]"),
        ((h, c[:9], w, b, active), {}, r"constant has shape \[9\], expected \[200\]"),
        (
            (h, c[None, None], w, b, active),
            {},
            r"constant has shape \[1, 1, 200\], expected \[\], \[200\] or \[1, 200\]",
        ),
        (
            (h, c.expand(3, 200), w, b, two),
            {"task_offsets": offsets},
            r"constant has shape \[3, 200\], expected \[2, 200",
        ),
        ((h, c, w, b, active[:9]), {}, r"active has shape \[9\]"),
        ((h, c, w, b, two), {"task_offsets": offsets + 1}, r"task_offsets is \[1, 3, 7\], expected numbers that rise"),
    ):
        with pytest.raises(ValueError, match=message):
            compact_fc2(*args, **options)
    with pytest.raises(TypeError, match="expected one dtype"):
        compact_fc2(h.double(), c, w, b, active)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    active, offsets = torch.rand(3, 200, device="cuda") < 0.5, torch.tensor([0, 100, 100, 300])
    index = active_index(active)
    shapes = ((300, index.shape[1]), (200,), (40, 200), (40,))
    tensors = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    dy = torch.randn(300, 40, device="cuda").bfloat16()
    for where in (offsets, offsets.cuda()):
        no_waiting(lambda where=where: run(tensors, dy, active, task_offsets=where, index=index))
