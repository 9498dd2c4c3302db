"""A drop-in linear layer: masked in both modes, dense without a mask, the same state dict as nn.Linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nspec import MaskedLinear


def layer(mode: str = "forward", bias: bool = True) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(6, 10, bias=bias, mode=mode, dtype=torch.float64)


MASK = torch.arange(10) % 3 == 0


@pytest.mark.parametrize("bias", [True, False])
def test_forward_mode_equals_a_weight_with_zeroed_rows(bias: bool) -> None:
    masked = layer(bias=bias)
    masked.set_mask(MASK)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    want = nn.functional.linear(x, masked.weight * MASK[:, None], masked.bias)
    torch.testing.assert_close(masked(x), want)
    dy = torch.randn_like(want)
    tensors = [x, masked.weight, *([masked.bias] if bias else [])]
    ours, theirs = torch.autograd.grad(masked(x), tensors, dy), torch.autograd.grad(want, tensors, dy)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    assert (ours[1][~MASK] == 0).all()


def test_update_mode_is_dense_forward_with_row_sparse_weight_gradient() -> None:
    masked = layer("update")
    masked.set_mask(MASK)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    want = nn.functional.linear(x, masked.weight, masked.bias)
    assert torch.equal(masked(x), want)
    tensors = [x, masked.weight, masked.bias]
    ours = torch.autograd.grad(masked(x).square().sum(), tensors)
    theirs = torch.autograd.grad(want.square().sum(), tensors)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1] * MASK[:, None])
    torch.testing.assert_close(ours[2], theirs[2])


def test_without_a_mask_it_is_nn_linear_bitwise() -> None:
    masked = layer()
    plain = nn.Linear(6, 10, dtype=torch.float64)
    plain.load_state_dict(masked.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(masked(x), plain(x))
    masked.set_mask(MASK)
    masked.set_mask(None)
    assert torch.equal(masked(x), plain(x))


def test_all_and_none_active() -> None:
    masked = layer()
    x = torch.randn(3, 6, dtype=torch.float64)
    dense = masked(x)
    masked.set_mask(torch.ones(10, dtype=torch.bool))
    torch.testing.assert_close(masked(x), dense)
    masked.set_mask(torch.zeros(10, dtype=torch.bool))
    assert torch.equal(masked(x), masked.bias.expand(3, 10))


def test_from_linear_shares_the_parameters_and_the_state_dict() -> None:
    plain = nn.Linear(6, 10)
    masked = MaskedLinear.from_linear(plain)
    assert masked.weight is plain.weight
    assert list(masked.state_dict()) == list(plain.state_dict())
    assert (masked.in_features, masked.out_features) == (6, 10)
    assert "density=0.400" in repr(_with_mask(masked))


def _with_mask(masked: MaskedLinear) -> MaskedLinear:
    masked.set_mask(MASK)
    return masked


def test_copies_and_pickles_keep_mask_and_rows() -> None:
    masked = _with_mask(layer())
    x = torch.randn(3, 6, dtype=torch.float64)
    for other in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert torch.equal(other(x), masked(x))
        other(x).sum().backward()
        assert torch.equal(other.take_touched()[0], MASK)


def test_it_compiles_to_one_graph() -> None:
    for mode in ("forward", "update"):
        masked = _with_mask(layer(mode))
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        torch._dynamo.reset()
        compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(x).square().sum(), [x, masked.weight])
        theirs = torch.autograd.grad(masked(x).square().sum(), [x, masked.weight])
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_autocast() -> None:
    masked = MaskedLinear(6, 10)
    masked.set_mask(MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked(torch.randn(3, 6))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert masked.weight.grad.dtype == torch.float32


def test_from_linear_keeps_hooks_and_their_handles() -> None:
    plain, called = nn.Linear(6, 10), []
    handles = [
        plain.register_forward_hook(lambda *_: called.append("forward")),
        plain.register_forward_pre_hook(lambda *_, **__: called.append("pre"), with_kwargs=True),
        plain.register_full_backward_hook(lambda *_: called.append("backward")),
        plain.register_state_dict_pre_hook(lambda *_: called.append("state")),
    ]
    masked = _with_mask(MaskedLinear.from_linear(plain))
    masked(torch.randn(3, 6, requires_grad=True)).sum().backward()
    masked.state_dict()
    assert called == ["pre", "forward", "backward", "state"]
    for handle in handles:
        handle.remove()
    masked(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert len(called) == 4


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_from_linear_refuses_what_it_would_not_compute() -> None:
    for wrap in (
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
    ):
        with pytest.raises(ValueError, match="parametrised.*remove_parametrizations"):
            MaskedLinear.from_linear(wrap(nn.Linear(6, 10)))
    patched = nn.Linear(6, 10)
    patched.forward = patched.forward
    for module in (_Scaled(6, 10), patched):
        with pytest.raises(TypeError, match="with a forward of its own"):
            MaskedLinear.from_linear(module)
    with pytest.raises(TypeError, match="module is Conv1d, expected nn.Linear"):
        MaskedLinear.from_linear(nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize("mask", [MASK.tolist(), MASK.numpy(), MASK.long(), MASK.float()[:3], "a", True, {0}], ids=str)
def test_a_mask_that_is_no_bool_tensor_is_a_type_error(mask: object) -> None:
    with pytest.raises(TypeError, match=r"a mask must be bool \[neurons\], found .*expected a bool tensor \[10\]"):
        layer().set_mask(mask)


def test_errors_name_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \[9\], expected \[10\]"):
        layer().set_mask(MASK[:9])
    with pytest.raises(TypeError, match="must be bool"):
        layer().set_mask(MASK.long())
    with pytest.raises(ValueError, match="mode is 'both'"):
        MaskedLinear(2, 3, mode="both")
