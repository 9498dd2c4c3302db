"""gated_activation gives act(gate) · up and its gradients, rounded as Hugging Face's blocks round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nspec.kernels.gated_activation import KINDS, gated_activation, gated_gradients
from nspec.kernels.gated_activation.op import _gated_activation

OPERATOR = "gated_activation"


def exact_activation(x: Tensor, kind: str) -> Tensor:
    """The definitions in float64, gelu from the complementary error function, which does not cancel."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if kind == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def run(gate: Tensor, up: Tensor, kind: str, dh: Tensor) -> list[Tensor]:
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    h = gated_activation(gate, up, kind)
    return [h.detach(), *torch.autograd.grad(h, (gate, up), dh)]


def exact(gate: Tensor, up: Tensor, kind: str, dh: Tensor) -> list[Tensor]:
    gate, up = (t.detach().double().cpu().requires_grad_() for t in (gate, up))
    h = exact_activation(gate, kind) * up
    return [h.detach(), *torch.autograd.grad(h, (gate, up), dh.double().cpu())]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_good_to_a_few_roundings_over_the_whole_range(place: Any, kind: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-6, 6, 20001)]).to(place.device)
    ones = torch.ones_like(x)
    h, dgate, dup = run(x, ones, kind, ones)
    want = exact(x, ones, kind, ones)
    size = x.double().cpu().abs().clamp(min=1)
    for name, ours, exact_, bound in zip(("h", "dgate", "dup"), (h, dgate, dup), want, (3.6e-7, 4.1e-7, 3.6e-7)):
        error = ((ours.double().cpu() - exact_).abs() / size).max().item()
        assert error <= bound, f"{name}: {error:.3g}"


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_at_most_twice_that_of_pytorch(place: Any, draw: Any, compare: Any, kind: str) -> None:
    for dtype in place.dtypes:
        gate, up, dh = (draw.normal(37, 150, dtype=dtype, seed=i) for i in range(3))
        ours, want = run(gate, up, kind, dh), exact(gate, up, kind, dh)
        a, b = (t.detach().requires_grad_() for t in (gate, up))
        act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
        h = act[kind](a) * b
        theirs = [h.detach(), *torch.autograd.grad(h, (a, b), dh)]
        for name, found, other, exact_ in zip(("h", "dgate", "dup"), ours, theirs, want, strict=True):
            assert found.dtype == dtype
            if dtype == torch.float64:
                assert (found - exact_).norm() <= 1e-14 * exact_.norm(), name
            else:
                compare.no_worse_than_twice(f"{name} in {dtype}", found, other, exact_)


@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_is_rounded_before_it_is_multiplied(place: Any, draw: Any, kind: str) -> None:
    gate, up = (draw.normal(4000, dtype=place.low, seed=i) for i in range(2))
    act = exact_activation(gate.double().cpu(), kind).float().to(place.low)
    h, _, dup = run(gate, up, kind, up)
    rounded = (act.float() * up.float().cpu()).to(place.low)
    # The float32 activation may round to the other side where the exact one is half way.
    assert (h.cpu() != rounded).float().mean() < 2e-3
    assert (dup.cpu() != rounded).float().mean() < 2e-3
    once = (exact_activation(gate.double().cpu(), kind) * up.double().cpu()).to(place.low)
    assert kind == "relu" or (once != rounded).float().mean() > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_beside_the_blocks_leave_nothing_unwritten(place: Any, draw: Any, poison: Any, kind: str) -> None:
    for shape in ((0,), (1,), (), (511,), (512,), (513,), (3, 0, 2), (5, 7, 11), (2, 1031), (40000,)):
        if place.interpreted and len(shape) == 1 and shape[0] > 1000:
            continue
        for dtype in place.dtypes:
            gate, up, dh = (draw.normal(*shape, dtype=dtype, seed=i) for i in range(3))
            with poison(shape, shape):
                ours = run(gate, up, kind, dh)
            for found, want in zip(ours, exact(gate, up, kind, dh)):
                assert found.shape == shape
                limit = 8 * torch.finfo(dtype).eps
                torch.testing.assert_close(found.double().cpu(), want, rtol=limit, atol=limit)


def test_nan_stays_and_large_values_keep_their_limits(place: Any) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 0.0, -0.0], device=place.device)
    for dtype in (torch.float32, torch.float16):
        place.skip_unless(dtype)
        gate, one = special.to(dtype), torch.ones(7, dtype=dtype, device=place.device)
        for kind in KINDS:
            h, dgate, dup = run(gate, one, kind, one)
            assert h[0].isnan()
            assert dup[0].isnan()
            assert dgate[0].isnan() or kind == "relu"
            assert not h[1].isfinite()  # PyTorch's gelu of infinity is NaN
            assert (h[3:] == torch.tensor([1e4, 0, 0, 0], device=place.device).to(dtype)).all()
            assert (dgate[3:5] == torch.tensor([1, 0], device=place.device)).all()
            assert ((dgate[5:] - (0 if kind == "relu" else 0.5)).abs() < 1e-7).all()
    # ReLU passes the gradient on where its input is NaN, and shuts out infinity where it is not above zero.
    gate, up = special[[0, 4]], torch.tensor([2.0, float("inf")], device=place.device)
    assert run(gate, up, "relu", torch.ones_like(up))[1].tolist() == [2.0, 0.0]


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        gate, up, dh = (draw.normal(37, 30, dtype=dtype, seed=i) for i in range(3))
        want = run(gate, up, "silu", dh)
        for changed in (
            (layout(gate), up, dh),
            (gate, layout(up), dh),
            (gate, up, layout(dh)),
            map(layout, (gate, up, dh)),
        ):
            a, b, c = changed
            for x, y in zip(run(a, b, "silu", c), want):
                torch.testing.assert_close(x, y)
    row = draw.normal(1, 30)
    ours, want = (run(*t, "gelu", torch.ones(1, 1, device=place.device).expand(9, 30)) for t in (
        (row.expand(9, 30), row.expand(9, 30)), (row.repeat(9, 1), row.repeat(9, 1))
    ))  # fmt: skip
    for x, y in zip(ours, want):
        torch.testing.assert_close(x, y)


def test_threads_give_the_same_bits(place: Any, draw: Any, threads: Any, compare: Any) -> None:
    place.skip_interpreter()
    gate, up, dh = (draw.normal(300, 301, seed=i) for i in range(3))
    once = run(gate, up, "gelu", dh)
    for n in (1, 2, 3):
        threads(n)
        assert (
            all(compare.same_bits(a, b) for a, b in zip(run(gate, up, "gelu", dh), once))
            or place.backend == "reference"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(place: Any, draw: Any, kind: str) -> None:
    place.skip_unless(torch.float64)
    gate, up = (draw.normal(5, 7, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda a, b: gated_activation(a, b, kind), (gate, up))


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any) -> None:
    gate, up = (draw.normal(5, 7, seed=i).requires_grad_() for i in range(2))
    torch.library.opcheck(_gated_activation, (gate, up, "silu"))


def test_wrong_arguments_are_named() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="kind is 'swish', expected one of silu, gelu, gelu_tanh, relu"):
        gated_activation(one, one, "swish")
    with pytest.raises(ValueError, match=r"up has shape \[3\], expected \[2, 3\]"):
        gated_activation(one, one[0], "silu")
    with pytest.raises(TypeError, match=r"gate has dtype torch.float32 and up torch.float64"):
        gated_activation(one, one.double(), "silu")


def columns_of(width: int, k: int, seed: int = 5) -> Tensor:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return order[:k].sort().values


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_their_columns_are_those_of_the_backward_pass(
    place: Any, draw: Any, poison: Any, kind: str
) -> None:
    for tokens, width, k in ((0, 5, 2), (3, 1, 1), (3, 1, 0), (7, 520, 0), (5, 1031, 9), (4, 1031, 300), (2, 40, 40)):
        for dtype in place.dtypes:
            gate, up, dh = (draw.normal(tokens, width, dtype=dtype, seed=i) for i in range(3))
            _, *want = run(gate, up, kind, dh)
            index = columns_of(width, k).to(place.device)
            with poison((tokens, width), (tokens, k)):
                *found, own_gate, own_up = gated_gradients(dh.clone(), gate, up, kind, index)
            for got, wanted in zip(found, want):
                assert torch.equal(got, wanted)
            assert torch.equal(own_gate, want[0][:, index])
            assert torch.equal(own_up, want[1][:, index])


def test_gradients_of_any_layout_take_columns_too(place: Any, draw: Any, layout: Any) -> None:
    gate, up, dh = (draw.normal(9, 50, seed=i) for i in range(3))
    index = columns_of(50, 7).to(place.device)
    want = gated_gradients(dh.clone(), gate, up, "silu", index)
    for got, wanted in zip(gated_gradients(layout(dh), layout(gate), layout(up), "silu", index), want):
        torch.testing.assert_close(got, wanted)
    whole = gated_gradients(dh.clone(), gate, up, "silu", None)
    assert whole[2] is whole[0]
    assert whole[3] is whole[1]
    for got, wanted in zip(whole[:2], want):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match=r"dh has shape \[9, 49\], expected \[9, 50\]"):
        gated_gradients(dh[:, 1:], gate, up, "silu", index)
