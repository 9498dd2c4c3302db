"""AdamW over active rows equals PyTorch's AdamW there, and leaves everything else bitwise alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nspec.kernels.row_sparse_adamw import reference, row_sparse_adamw_
from nspec.kernels.row_sparse_adamw.op import _row_sparse_adamw
from nspec.kernels.write_neurons import write_neurons_

OPERATOR = "row_sparse_adamw"

# eps is large enough to see where it stands in the formula.
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 0.05, "weight_decay": 0.1}
SHAPES = [(7, 33), (64, 128), (40, 1), (13,), (5, 2, 3), (1, 1), (0, 4), (3, 1000), (17, 8), (1,)]
LARGE = [(512, 301), (2048,), (3, 20000)]
State = list[list[Tensor]]  # params, grads, first and second moments


def make(
    draw: Any, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> State:
    """Params, grads and first moments normal, second moments positive."""
    lists = [[draw.normal(*s, dtype=dtype, seed=seed + 10 * k + i) for i, s in enumerate(shapes)] for k in range(4)]
    return [*lists[:3], [t.square() for t in lists[3]]]


def sets(draw: Any, density: float | None, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor | None]:
    return [None if density is None else draw.mask(s[0], share=density, seed=i) for i, s in enumerate(shapes)]


def copies(state: State, dtype: torch.dtype | None = None, device: str | None = None) -> State:
    return [[t.to(device or t.device, dtype or t.dtype, copy=True) for t in tensors] for tensors in state]


def pytorch(state: State, step: int, options: dict[str, Any]) -> State:
    """One step of torch.optim.AdamW from that state, over all rows, in the dtypes of the state."""
    params, grads, exp_avgs, exp_avg_sqs = copies(state)
    weights = [torch.nn.Parameter(p) for p in params]
    optimizer = torch.optim.AdamW(weights, foreach=False, **options)
    for weight, grad, exp_avg, exp_avg_sq in zip(weights, grads, exp_avgs, exp_avg_sqs):
        weight.grad = grad
        optimizer.state[weight] = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.step()
    return [[w.detach() for w in weights], grads, exp_avgs, exp_avg_sqs]


def rows_of(rows: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape[:1], dtype=torch.bool, device=tensor.device) if rows is None else rows


@pytest.mark.parametrize("density", [None, 0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("step", [1, 7, 100000])
def test_active_rows_follow_pytorch_adamw_and_the_others_keep_their_bits(
    place: Any, draw: Any, compare: Any, density: float | None, step: int
) -> None:
    shapes = SHAPES if place.interpreted else SHAPES + LARGE
    before, active = make(draw, shapes), sets(draw, density, shapes)
    after = copies(before)
    for grad, rows in zip(after[1], active):
        grad[~rows_of(rows, grad)] = float("nan")  # what is there must not be read
    row_sparse_adamw_(*after, active, step=step, **OPTIONS)
    want, theirs = pytorch(copies(before, torch.float64, "cpu"), step, OPTIONS), pytorch(before, step, OPTIONS)
    for kind, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for i, (shape, rows) in enumerate(zip(shapes, active)):
            old, new, exact = before[kind][i], after[kind][i], want[kind][i]
            rows = rows_of(rows, new)
            assert compare.same_bits(new[~rows], old[~rows]), (name, shape)
            torch.testing.assert_close(new[rows].double().cpu(), exact[rows.cpu()], rtol=5e-7, atol=2e-7)
            if rows.any():
                assert not torch.equal(new[rows], old[rows]), (name, shape)
        of = [torch.cat([t[rows_of(rows, t)].flatten() for t, rows in zip(x[kind], active)]) for x in (after, theirs)]
        exact = torch.cat([t[rows_of(rows, t).cpu()].flatten() for t, rows in zip(want[kind], active)])
        compare.no_worse_than_twice(name, *of, exact)


def test_float64_follows_pytorch_over_several_steps(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float64)
    ours, active = make(draw, dtype=torch.float64), sets(draw, 0.5)
    theirs = copies(ours)
    for step in range(1, 6):
        row_sparse_adamw_(*ours, active, step=step, **OPTIONS)
        theirs = pytorch(theirs, step, OPTIONS)
        for a, b in zip((*ours[0], *ours[2], *ours[3]), (*theirs[0], *theirs[2], *theirs[3])):
            rows = rows_of(active[0], a) if a.shape == SHAPES[0] else None
            if rows is not None:
                torch.testing.assert_close(a[rows], b[rows], rtol=1e-13, atol=1e-14)


def test_rows_that_lie_in_weights_are_written_there_as_they_are_after_the_step(
    place: Any, draw: Any, compare: Any
) -> None:
    shapes = [(7, 33), (64, 128), (40, 1), (13,), (0, 4), (3, 1000), (17, 8), (5, 6)]
    if not place.interpreted:
        shapes.append((3, 20000))
    for dtype in place.dtypes:
        for own in (
            [dtype]
            if dtype == torch.float64
            else {dtype, torch.float32}
            if place.backend != "native"
            else {torch.float32}
        ):
            state = make(draw, shapes, own)
            want = copies(state)
            writes: list[Any] = []
            for i, shape in enumerate(shapes):
                rows, size = shape[0], shape[1] if len(shape) > 1 else 1
                index = torch.randperm(rows + 9, generator=torch.Generator().manual_seed(i))[:rows].to(place.device)
                weight = draw.normal(*((size, rows + 9) if i % 2 else (rows + 9, size)), dtype=dtype, seed=50 + i)
                writes.append((weight, index, bool(i % 2)))
            writes[-1] = None
            before = [None if write is None else write[0].clone() for write in writes]
            versions = [p._version for p in state[0]]
            row_sparse_adamw_(*state, [None] * len(shapes), step=3, **OPTIONS, writes=writes)
            row_sparse_adamw_(*want, [None] * len(shapes), step=3, **OPTIONS)
            for kind in (0, 2, 3):
                assert all(compare.same_bits(a, b) for a, b in zip(state[kind], want[kind]))
            assert all(p._version > version for p, version in zip(state[0], versions))
            for p, write, old in zip(want[0], writes, before):
                if write is not None:
                    weight, index, columns = write
                    write_neurons_([old], [p.reshape(len(index), old.shape[0 if columns else 1])], [index], [columns])
                    assert compare.same_bits(weight, old)


def test_a_weight_that_does_not_fit_its_rows_is_named() -> None:
    state, index = [[torch.ones(2, 3)] for _ in range(4)], torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"params\[0\] has shape \[2, 3\], expected rows of 4"):
        row_sparse_adamw_(*state, [None], step=1, lr=0.1, writes=[(torch.ones(5, 4), index, False)])
    with pytest.raises(ValueError, match="an active set and a weight"):
        row_sparse_adamw_(*state, [index > 0], step=1, lr=0.1, writes=[(torch.ones(5, 3), index, False)])
    with pytest.raises(ValueError, match="writes has length 2, expected that of params, 1"):
        row_sparse_adamw_(*state, [None], step=1, lr=0.1, writes=[None, None])


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.0}, {"eps": 1e-8}, {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.9999)}, {"lr": 0.0}, {"lr": 1.0}],
    ids=str,
)
def test_every_option_means_what_it_means_in_pytorch(place: Any, draw: Any, change: dict[str, Any]) -> None:
    options = OPTIONS | change
    state = make(draw)
    want = pytorch(copies(state, torch.float64, "cpu"), 3, options)
    row_sparse_adamw_(*state, [None] * len(SHAPES), step=3, **options)
    for kind in (0, 2, 3):
        for a, b in zip(state[kind], want[kind]):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "dtypes", ["16 16 16 16", "16 16 32 32", "32 16 32 32", "bf bf bf bf", "bf bf 32 32", "32 bf 32 32"]
)
def test_lower_and_mixed_dtypes_are_as_exact_as_their_rounding(place: Any, draw: Any, dtypes: str) -> None:
    of = {"16": torch.float16, "bf": torch.bfloat16, "32": torch.float32}
    kinds = [of[name] for name in dtypes.split()]
    for dtype in kinds:
        place.skip_unless(dtype)
    state = [[t.to(dtype) for t in tensors] for tensors, dtype in zip(make(draw), kinds)]
    active = sets(draw, 0.5)
    want, before = copies(state, torch.float64, "cpu"), copies(state)
    reference.row_sparse_adamw_(*want, [None] * len(SHAPES), step=3, **OPTIONS)
    with place.may_refuse():
        row_sparse_adamw_(*state, active, step=3, **OPTIONS)
    for kind in (0, 2, 3):
        for new, old, exact, rows in zip(state[kind], before[kind], want[kind], active):
            rows = rows_of(rows, new)
            assert torch.equal(new[~rows], old[~rows])
            # The update itself is below 0.1: the reference rounds its parts in the dtype, then the sum.
            tolerance = 3 * torch.finfo(new.dtype).eps
            torch.testing.assert_close(new[rows].double().cpu(), exact[rows.cpu()], rtol=tolerance, atol=tolerance)


def test_no_active_row_and_no_row_change_nothing(place: Any, draw: Any, compare: Any) -> None:
    state = make(draw)
    before = copies(state)
    row_sparse_adamw_(*state, sets(draw, 0.0), step=1, **OPTIONS)
    assert all(compare.same_bits(a, b) for now, then in zip(state, before) for a, b in zip(now, then))
    empty = [[torch.zeros(0, 5, device=place.device)] for _ in range(4)]
    row_sparse_adamw_(*empty, [None], step=1, **OPTIONS)
    row_sparse_adamw_(*empty, [torch.zeros(0, dtype=torch.bool, device=place.device)], step=1, **OPTIONS)


def test_no_tensors_are_no_error() -> None:
    row_sparse_adamw_([], [], [], [], [], step=1, **OPTIONS)


def test_neighbours_in_one_storage_keep_their_bits(place: Any, draw: Any, compare: Any) -> None:
    # Parameters in a flat buffer, as some optimisers keep them, one element apart: addresses of every alignment.
    shapes = [(7, 33), (3,), (16, 16), (9, 5), (1, 1)]
    state, active = make(draw, shapes), sets(draw, 0.5, shapes)
    active[1] = None
    alone = copies(state)
    row_sparse_adamw_(*alone, active, step=3, **OPTIONS)
    size = sum(t.numel() + 1 for t in state[0]) + 1
    flat = [torch.full((size,), 7.0, device=place.device) for _ in range(4)]
    views: State = [[], [], [], []]
    for k in range(4):
        at = 1
        for t in state[k]:
            views[k].append(flat[k][at : at + t.numel()].view(t.shape).copy_(t))
            at += t.numel() + 1
    row_sparse_adamw_(*views, active, step=3, **OPTIONS)
    for k in range(4):
        assert all(compare.same_bits(a, b) for a, b in zip(views[k], alone[k]))
        between = torch.ones(size, dtype=torch.bool)
        for t in views[k]:
            between[t.storage_offset() : t.storage_offset() + t.numel()] = False
        assert flat[k][between].tolist() == [7.0] * (len(shapes) + 1)


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, compare: Any, layout: Any) -> None:
    state, active = make(draw, [(37, 19)]), draw.mask(37)
    want = copies(state)
    row_sparse_adamw_(*want, [active], step=3, **OPTIONS)
    for which in range(5):
        changed = copies(state)
        if which < 4:
            changed[which] = [layout(changed[which][0])]
        with place.may_refuse():
            row_sparse_adamw_(*changed, [layout(active[None])[0] if which == 4 else active], step=3, **OPTIONS)
        for now, then in zip(changed, want):
            assert compare.same_bits(now[0], then[0]), which


@pytest.mark.parametrize("kind", ["random", "block", "second", "ends"])
def test_repeats_and_threads_give_the_same_bits(place: Any, draw: Any, compare: Any, threads: Any, kind: str) -> None:
    shapes = [(130, 77), (130,)] if place.interpreted else [(512, 301), (512, 77), (512,)]
    n = shapes[0][0]
    before = make(draw, shapes)
    active = [draw.active(n, n * 7 // 10, kind), *[None] * (len(shapes) - 1)]
    results = []
    for count in (1, 1, 2, 3, 7) if place.device == "cpu" and not place.interpreted else (1, 1):
        threads(count)
        results.append(copies(before))
        row_sparse_adamw_(*results[-1], active, step=2, **OPTIONS)
    for other in results[1:]:
        assert all(compare.same_bits(a, b) for first, second in zip(results[0], other) for a, b in zip(first, second))


def test_tensors_that_come_back_at_the_address_of_others_are_not_mistaken_for_them(place: Any, draw: Any) -> None:
    # A backend may keep what it knows of a call by the addresses in it; allocators hand out an address again at once.
    memory = [torch.empty(384, device=place.device) for _ in range(4)]
    flags = torch.empty(384, dtype=torch.bool, device=place.device)
    for i, shape in enumerate([(24, 16), (16, 24), (24, 16), (48, 8), (384,), (2, 6, 32), (24, 15), (3, 8)]):
        state = [
            [buffer[: t.numel()].view(shape).copy_(t)] for buffer, (t,) in zip(memory, make(draw, [shape], seed=i))
        ]
        for rows in (draw.mask(shape[0], seed=i), draw.mask(shape[0], seed=i + 1), None):
            active = None if rows is None else flags[: shape[0]].copy_(rows)
            options = OPTIONS | {"lr": 0.1 / (i + 1)}
            want = copies(state, torch.float64)
            reference.row_sparse_adamw_(*want, [active], step=i + 1, **options)
            row_sparse_adamw_(*state, [active], step=i + 1, **options)
            for now, then in zip(state, want):
                torch.testing.assert_close(now[0].double(), then[0], rtol=1e-6, atol=1e-6)


def test_any_list_of_tensors_equals_the_reference(place: Any, draw: Any, examples: Any) -> None:
    shape = st.tuples(st.integers(0, 40), st.integers(1, 90))

    @examples(40)
    @given(
        shapes=st.lists(shape, max_size=6), density=st.sampled_from([None, 0.0, 0.2, 0.8, 1.0]), seed=st.integers(0, 9),
        step=st.integers(1, 1000), lr=st.floats(0, 0.1), beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.999),
        weight_decay=st.floats(0, 1),
    )  # fmt: skip
    def holds(
        shapes: list[tuple[int, int]], density: float | None, seed: int, step: int, lr: float, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if not shapes and place.backend != "reference":
            return  # without a tensor there is no device to choose a backend for
        state, active = make(draw, shapes, seed=seed), sets(draw, density, shapes)
        want = copies(state, torch.float64)
        options = {"lr": lr, "betas": (beta1, beta2), "eps": 0.01, "weight_decay": weight_decay}
        reference.row_sparse_adamw_(*want, active, step=step, **options)
        row_sparse_adamw_(*state, active, step=step, **options)
        for kind in (0, 2, 3):
            for a, b in zip(state[kind], want[kind]):
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)

    holds()


def test_nan_infinity_and_denormals_in_active_rows_pass_through(place: Any) -> None:
    state = [[torch.ones(5, 40, device=place.device)] for _ in range(4)]
    grads = state[1][0]
    grads[0], grads[1], grads[2], grads[3] = float("nan"), float("inf"), 1e30, 1e-40
    row_sparse_adamw_(*state, [None], step=1, **OPTIONS)
    params, _, exp_avg, exp_avg_sq = (tensors[0].cpu() for tensors in state)
    assert params[0].isnan().all()
    assert exp_avg[0].isnan().all()
    assert exp_avg[1].isposinf().all()
    assert exp_avg_sq[1].isposinf().all()
    assert params[1].isnan().all()  # infinity over infinity
    assert exp_avg_sq[2].isposinf().all()  # 1e30 squared
    torch.testing.assert_close(params[2], torch.full((40,), 1 - 3e-4))  # and so no step, only the decay
    assert params[3:].isfinite().all()
    assert (params[3] != 1).all()


def test_autograd_notices_that_a_saved_parameter_was_changed(place: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, device=place.device))
    loss = (weight * weight).sum()
    state = [torch.ones(2, 3, device=place.device) for _ in range(3)]
    row_sparse_adamw_([weight], *([t] for t in state), [None], step=1, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_schema_and_mutation_pass_opcheck(place: Any, draw: Any) -> None:
    shapes = [(7, 33), (5,)]
    for active in ([None, None], sets(draw, 0.5, shapes)):
        torch.library.opcheck(
            _row_sparse_adamw, (*make(draw, shapes), active, 1, 0.01, 0.9, 0.98, 1e-6, 0.1),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_it_compiles_to_one_graph(place: Any, draw: Any, compare: Any) -> None:
    torch._dynamo.reset()
    state, rows = make(draw, [(7, 33)]), draw.mask(7)
    want = copies(state)
    row_sparse_adamw_(*want, [rows], step=3, **OPTIONS)
    compiled = torch.compile(row_sparse_adamw_, fullgraph=True, backend="aot_eager")
    compiled(*state, [rows], step=3, **OPTIONS)
    assert all(compare.same_bits(a[0], b[0]) for a, b in zip(state, want))


def test_explain_names_the_backend_that_then_runs(place: Any, draw: Any, ran: list[str]) -> None:
    asked: Any = row_sparse_adamw_
    state, active = make(draw), sets(draw, 0.5)
    assert asked(*state, active, step=1, **OPTIONS, explain=True).backend == place.backend
    assert ran == []
    row_sparse_adamw_(*state, active, step=1, **OPTIONS)
    assert ran == ["row_sparse_adamw_"]


def test_errors_name_what_was_found() -> None:
    p, ok = [torch.zeros(4, 2)], [torch.zeros(4, 2)]
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \[4, 3\], expected \[4, 2\]"):
        row_sparse_adamw_(p, [torch.zeros(4, 3)], ok, ok, [None], step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"active\[0\] has shape \[5\]"):
        row_sparse_adamw_(p, ok, ok, ok, [torch.ones(5, dtype=torch.bool)], step=1, lr=0.1)
    with pytest.raises(TypeError, match=r"active\[0\] has dtype"):
        row_sparse_adamw_(p, ok, ok, ok, [torch.ones(4)], step=1, lr=0.1)
    with pytest.raises(ValueError, match="step is 0"):
        row_sparse_adamw_(p, ok, ok, ok, [None], step=0, lr=0.1)
    with pytest.raises(ValueError, match=r"lengths \[1, 2, 1, 1, 1\]"):
        row_sparse_adamw_(p, ok * 2, ok, ok, [None], step=1, lr=0.1)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu: Any, no_waiting: Any) -> None:
    state = [[torch.rand(200, 64, device="cuda"), torch.rand(200, device="cuda")] for _ in range(4)]
    rows = torch.rand(200, device="cuda") < 0.5
    no_waiting(lambda: row_sparse_adamw_(*state, [rows, None], step=1, **OPTIONS))


@pytest.mark.gpu
def test_another_stream_and_a_busy_device_change_nothing(on_gpu: Any, beside_others: Any) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    before = [
        [torch.rand(s, generator=g, device="cuda") for s in ((2048, 512), (2048,), (512, 2048))] for _ in range(4)
    ]
    rows = torch.rand(2048, generator=g, device="cuda") < 0.5

    def stepped() -> list[torch.Tensor]:
        state = copies(before)
        row_sparse_adamw_(*state, [rows, rows, None], step=2, **OPTIONS)
        return [t for tensors in state for t in tensors]

    beside_others(stepped)
