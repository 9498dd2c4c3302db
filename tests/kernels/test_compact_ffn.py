"""The compact feed-forward block equals the dense one with masked rows of fc1.weight, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.common.active import IN_PLACE_ABOVE, active_index, padded_width
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.op import _compact_ffn
from nspec.kernels.compact_ffn.reference import forward_packed, pack

NAMES = ("x", "w1", "b1", "w2", "b2")


def masked_dense(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, active: Tensor) -> Tensor:
    """The definition (method of Tan et al. 2024): only the rows of fc1.weight are masked."""
    return F.linear(torch.relu(F.linear(x, w1 * active[:, None], b1)), w2, b2)


def some(d_ff: int, n: int, seed: int = 0) -> Tensor:
    order = torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(d_ff, dtype=torch.bool).index_fill_(0, order[:n], True)


def inputs(
    tokens: tuple[int, ...], d_in: int, d_ff: int, d_out: int, dtype: torch.dtype = torch.float64, seed: int = 0
):
    g = torch.Generator().manual_seed(seed)
    shapes = ((*tokens, d_in), (d_ff, d_in), (d_ff,), (d_out, d_ff), (d_out,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(y: Tensor, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, tensors, dy))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 100, 189, 190, 199, 200])
def test_value_and_all_gradients_equal_the_masked_dense_block(n: int) -> None:
    tensors = inputs((5, 3), 7, 200, 11)
    active = some(200, n)
    y, expected = compact_ffn(*tensors, active), masked_dense(*tensors, active)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(y)
    for name, ours, theirs in zip(NAMES, gradients(y, tensors, dy), gradients(expected, tensors, dy)):
        if name == "w1":
            theirs = theirs * active[:, None]
            assert (ours[~active] == 0).all()
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-11, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


def test_integer_values_are_exact_in_float32_and_float16() -> None:
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randint(-2, 3, s, generator=g).to(torch.float64)
    exact = [draw(33, 5), draw(128, 5), draw(128), draw(3, 128).clamp(-1, 1), draw(3)]
    active = some(128, 50)
    want = masked_dense(*exact, active)
    for dtype in (torch.float32, torch.float16):
        assert want.abs().max() < 2048  # so that float16 holds every sum exactly
        got = compact_ffn(*(t.to(dtype) for t in exact), active)
        assert torch.equal(got.double(), want), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_dense_pytorch(dtype: torch.dtype) -> None:
    exact = inputs((64,), 48, 300, 24)
    active = some(300, 150)
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    high = [t.detach().double().requires_grad_() for t in low]
    dy = torch.randn(64, 24).to(dtype)
    want = [masked_dense(*high, active)]
    want += gradients(want[0], high, dy.double())
    theirs = [masked_dense(*low, active)]
    theirs += gradients(theirs[0], low, dy)
    ours = [compact_ffn(*low, active)]
    ours += gradients(ours[0], low, dy)
    for name, a, b, w in zip(("y", *NAMES), ours, theirs, want):
        if name == "w1":
            w, b = w * active[:, None], b * active[:, None]
        error, allowed = (a.double() - w).norm(), 2 * (b.double() - w).norm() + torch.finfo(dtype).eps * w.norm()
        assert error <= allowed, (name, float(error), float(allowed))


def test_inactive_weights_are_never_read() -> None:
    tensors = inputs((6,), 7, 200, 4)
    active = some(200, 90)
    want = compact_ffn(*tensors, active)
    with torch.no_grad():
        tensors[1][~active] = float("nan")
    y = compact_ffn(*tensors, active)
    assert torch.equal(y, want)
    dw1 = torch.autograd.grad(y.sum(), tensors[1])[0]
    assert torch.isfinite(dw1).all()
    in_place = some(200, 196)
    with torch.no_grad():
        tensors[1][~in_place] = float("nan")
        tensors[1][in_place] = 1
    assert torch.isfinite(compact_ffn(*tensors, in_place)).all()


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_missing_biases(biases: tuple[bool, bool]) -> None:
    for n in (40, 200):
        x, w1, b1, w2, b2 = inputs((9,), 6, 200, 5)
        b1, b2 = b1 if biases[0] else None, b2 if biases[1] else None
        active = some(200, n)
        given = [t for t in (x, w1, b1, w2, b2) if t is not None]
        y, want = compact_ffn(x, w1, b1, w2, b2, active), masked_dense(x, w1, b1, w2, b2, active)
        torch.testing.assert_close(y, want)
        for ours, theirs in zip(gradients(y, given, torch.ones_like(y)), gradients(want, given, torch.ones_like(y))):
            if ours.shape == w1.shape:
                theirs = theirs * active[:, None]
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [(7, 0, 5), (0, 12, 0), (1, 1, 10), (0, 0, 0)])
def test_grouped_equals_task_by_task(sizes: tuple[int, ...]) -> None:
    tokens = sum(sizes)
    tensors = inputs((tokens,), 6, 150, 5)
    active = torch.stack([some(150, n, seed=n) for n in (0, 90, 150)])
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    y = compact_ffn(*tensors, active, task_offsets=offsets)
    want = torch.cat([masked_dense(tensors[0][a:b], *tensors[1:], s) for s, a, b in zip(active, offsets, offsets[1:])])
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    ours, theirs = gradients(y, tensors, dy), gradients(want, tensors, dy)
    for name, a, b in zip(NAMES, ours, theirs):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_no_tokens_give_empty_output_and_zero_gradients() -> None:
    tensors = inputs((0,), 6, 150, 5)
    y = compact_ffn(*tensors, some(150, 70))
    assert y.shape == (0, 5)
    assert all((g == 0).all() for g in gradients(y, tensors, torch.zeros_like(y))[1:])


def test_views_that_are_not_contiguous() -> None:
    x, w1, b1, w2, b2 = inputs((9,), 6, 150, 5)
    args = [
        x.t().contiguous().t(),
        w1.t().contiguous().t(),
        torch.stack([b1, b1], 1)[:, 0],
        w2.t().contiguous().t(),
        b2,
    ]
    args = [a.detach().requires_grad_() for a in args]
    active = some(150, 70)
    y = compact_ffn(*args, active)
    torch.testing.assert_close(y, masked_dense(x, w1, b1, w2, b2, active))
    want = gradients(masked_dense(x, w1, b1, w2, b2, active), [x, w1, b1, w2, b2], torch.ones_like(y))
    for i, (ours, theirs) in enumerate(zip(gradients(y, args, torch.ones_like(y)), want)):
        torch.testing.assert_close(ours, theirs * active[:, None] if i == 1 else theirs)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9), d_in=st.integers(1, 9), d_ff=st.integers(1, 300), d_out=st.integers(1, 9),
    share=st.floats(0, 1), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_and_set(tokens: int, d_in: int, d_ff: int, d_out: int, share: float, seed: int) -> None:
    tensors = inputs((tokens,), d_in, d_ff, d_out, seed=seed)
    active = some(d_ff, round(share * d_ff), seed)
    torch.testing.assert_close(compact_ffn(*tensors, active), masked_dense(*tensors, active))


def test_index_holds_the_active_neurons_in_order_with_padding() -> None:
    active = some(400, 130)
    index = active_index(active)
    assert index.shape == (1, padded_width(130, 400)) == (1, 192)
    assert torch.equal(index[0, :130], active.nonzero().squeeze(1))
    assert (index[0, 130:] == -1).all()
    nearly_all = some(400, round(400 * IN_PLACE_ABOVE) + 1)
    assert torch.equal(active_index(nearly_all)[0] >= 0, nearly_all)


def test_packed_weights_compute_the_same() -> None:
    tensors = inputs((6,), 7, 200, 4)
    for n in (70, 197):
        active = some(200, n)
        packed = pack(*tensors[1:], active_index(active)[0])
        assert torch.equal(forward_packed(tensors[0], packed)[0], compact_ffn(*tensors, active))


def test_schema_fake_and_autograd_pass_opcheck() -> None:
    tensors = inputs((6,), 7, 200, 4, torch.float32)
    for active, offsets in (
        (some(200, 70), None),
        (torch.stack([some(200, 70), some(200, 9)]), torch.tensor([0, 2, 6])),
    ):
        torch.library.opcheck(_compact_ffn, (*tensors, active_index(active), offsets))


def test_compiles_to_one_graph_with_changing_sets() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: compact_ffn(*a), fullgraph=True, backend="aot_eager")
    tensors = inputs((6,), 7, 200, 4, torch.float32)
    for n in (70, 130, 200):
        active = some(200, n)
        y = compiled(*tensors, active)
        ours = gradients(y, tensors, torch.ones_like(y))
        for a, b in zip(ours, gradients(compact_ffn(*tensors, active), tensors, torch.ones_like(y))):
            assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs() -> None:
    tensors = inputs((6,), 7, 200, 4, torch.float32)
    active = some(200, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compact_ffn(*tensors, active)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients(y, tensors, torch.ones_like(y)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 8)}, r"x has shape \[6, 8\], expected \[6, 7\]"),
        ({"w2": (4, 199)}, r"w2 has shape \[4, 199\], expected \[any, 200\]"),
        ({"b1": (199,)}, r"b1 has shape \[199\]"),
        ({"b2": (5,)}, r"b2 has shape \[5\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict, message: str) -> None:
    named = dict(zip(NAMES, inputs((6,), 7, 200, 4)))
    named |= {k: torch.zeros(s, dtype=torch.float64) for k, s in change.items()}
    with pytest.raises(ValueError, match=message):
        compact_ffn(*named.values(), some(200, 5))


def test_wrong_sets_and_offsets_are_errors() -> None:
    tensors = inputs((6,), 7, 200, 4)
    with pytest.raises(TypeError, match=r"active has dtype torch.int64, expected torch.bool"):
        compact_ffn(*tensors, torch.ones(200, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"active has shape \[199\]"):
        compact_ffn(*tensors, some(199, 5))
    two = torch.stack([some(200, 5), some(200, 6)])
    for offsets in ([0, 7, 6], [0, 3, 5], [1, 3, 6]):
        with pytest.raises(ValueError, match=r"task_offsets is .*, expected numbers that rise from 0 to the 6 tokens"):
            compact_ffn(*tensors, two, task_offsets=torch.tensor(offsets))
    with pytest.raises(TypeError, match="expected one dtype"):
        compact_ffn(tensors[0].float(), *tensors[1:], some(200, 5))
