"""What happens around backward passes: second derivatives, autocast, forward mode, batches of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from nspec.kernels.common.active import active_index, places_of
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.gated_activation import gated_activation
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

ACTIVE = torch.arange(200) % 2 == 0
WIDTH = active_index(ACTIVE).shape[1]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return leaf(200, 8, seed=1), leaf(200, seed=2), leaf(6, 200, seed=3), leaf(6, seed=4)


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear_relu_count": lambda x, h: linear_relu_count(x, *weights()[:2])[0],
    "compact_ffn": lambda x, h: compact_ffn(x, *weights(), ACTIVE),
    "compact_fc1": lambda x, h: compact_fc1(x, *weights()[:2], ACTIVE),
    "compact_fc2": lambda x, h: compact_fc2(h, weights()[1], *weights()[2:], ACTIVE),
    "gated_activation": lambda x, h: gated_activation(h, h.sin(), "silu"),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_is_an_error_however_it_is_asked_for(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", backend)
    x, h = leaf(5, 8), leaf(5, WIDTH)
    # Behind a sum the incoming gradient needs none, and only the inputs would carry the second derivative.
    y = OPERATORS[name](x, h).sum()
    source = x if name in ("linear_relu_count", "compact_ffn", "compact_fc1") else h
    (first,) = torch.autograd.grad(y, source, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        first.square().sum().backward()


def test_a_second_derivative_of_several_tasks_computed_densely_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSPEC_BACKEND", raising=False)
    x, active = leaf(5, 8), torch.stack([ACTIVE, ~ACTIVE])
    y = compact_ffn(x, *weights(), active, task_offsets=torch.tensor([0, 2, 5])).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        first.square().sum().backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_around_a_backward_pass_changes_nothing(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", backend)
    found = []
    for enabled in (False, True):
        x, h = leaf(5, 8), leaf(5, WIDTH)
        y = OPERATORS[name](x, h)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.backward(torch.ones_like(y))
        found.append([t.grad for t in (x, h) if t.grad is not None])
    for plain, within in zip(*found, strict=True):
        assert torch.equal(plain, within)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_around_the_weight_gradient_changes_nothing(
    backend: str, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", backend)
    dh, x = leaf(9, 200).detach(), leaf(9, 8, seed=1).detach()
    active = ACTIVE if tasks == 1 else torch.stack([ACTIVE, ~ACTIVE, ACTIVE])
    offsets = None if tasks == 1 else torch.tensor([0, 4, 4, 9])
    plain = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
    with torch.autocast("cpu", torch.bfloat16):
        within = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
    for one, other in zip(plain, within):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


def test_forward_mode_gets_the_tangent_of_every_input_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSPEC_BACKEND", raising=False)
    x, (w1, b1, w2, b2) = leaf(5, 8).detach(), [t.detach() for t in weights()]
    masked = w1 * ACTIVE[:, None]
    tangent = leaf(*w2.shape, seed=9).detach()
    want = torch.relu(x @ masked.t() + b1) @ tangent.t()
    with torch.no_grad(), fwad.dual_level():
        y = compact_ffn(x, w1, b1, fwad.make_dual(w2, tangent), b2, ACTIVE)
        torch.testing.assert_close(fwad.unpack_dual(y).tangent, want, rtol=1e-4, atol=1e-4)
    _, got = torch.func.jvp(lambda x: linear_relu_count(x, w1, b1)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(got, (x @ w1.t() + b1 > 0) * w1.sum(1), rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("NSPEC_BACKEND", "native")
    with torch.no_grad(), fwad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        compact_ffn(x, w1, b1, fwad.make_dual(w2, tangent), b2, ACTIVE)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_come_in_batches_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", backend)
    x = leaf(3, 8)
    y = compact_ffn(x, *weights(), ACTIVE)
    batch = torch.eye(y.numel()).view(-1, *y.shape)
    (got,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in batch])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_caller_keeps_of_the_active_set_has_to_be_of_it() -> None:
    x, ws, dh = leaf(4, 8), weights(), leaf(4, 200)
    two = torch.stack([ACTIVE, ~ACTIVE])
    index, offsets = active_index(ACTIVE), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"index is torch.int64 \[1, 128\], expected torch.int64 \[2, width\]"):
        compact_ffn(x, *ws, two, task_offsets=offsets, index=index)
    with pytest.raises(ValueError, match=r"index is torch.int32"):
        row_sparse_wgrad(dh, x, ACTIVE, index=index.int())
    places = places_of(index, 200)
    with pytest.raises(ValueError, match=r"places is torch.int64 \[1, 200\], expected torch.int32 \[1, 200\]"):
        row_sparse_wgrad(dh, x, ACTIVE, index=index, places=places.long())
    with pytest.raises(ValueError, match=r"places is torch.int32 \[1, 199\]"):
        compact_ffn(x, *ws, ACTIVE, index=index, places=places[:, 1:])


def test_what_is_added_to_is_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    dh, x, total = leaf(4, 200).detach(), leaf(4, 8).detach(), torch.zeros(200, 8)
    before = total._version
    row_sparse_wgrad(dh, x, ACTIVE, add_to=total)
    assert total._version > before
    with pytest.raises(ValueError, match="leaf that requires a gradient"):
        row_sparse_wgrad(dh, x, ACTIVE, add_to=torch.zeros(200, 8, requires_grad=True))


def test_a_small_block_can_be_traced_and_run_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.delenv("NSPEC_BACKEND", raising=False)
    x, ws, index = leaf(4, 8).detach(), [t.detach() for t in weights()], active_index(ACTIVE)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, *ws, ACTIVE)]
        assert compact_ffn(*fake, index=mode.from_tensor(index)).shape == (4, 6)
    traced = make_fx(lambda x: compact_ffn(x, *ws, ACTIVE, index=index))(x)
    torch.testing.assert_close(traced(x + 1), compact_ffn(x + 1, *ws, ACTIVE), rtol=1e-4, atol=1e-4)
