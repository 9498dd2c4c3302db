"""Blocks that give their activations to a function with a backward of its own, as Liger's kernels do."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nspec


class SiLUMul(torch.autograd.Function):
    """Of the structure of Liger's: takes both projections, and computes ``silu(gate) * up`` with its own backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        return dh * up * (s + gate * s * (1 - s)), dh * F.silu(gate)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.view(h.shape)

    @staticmethod
    def backward(ctx, dh):
        return -dh


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 24), nn.Linear(6, 24)
        self.down_proj, self.act_fn = nn.Linear(24, 6), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Mlps(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = kind()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class LigerMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


class Hidden(Mlp):
    """Whose code does not name the function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(reverse(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def reverse(h: Tensor) -> Tensor:
    return Reversed.apply(h)


def patched() -> nn.Module:
    """As ``apply_liger_kernel_to_llama(model=...)`` leaves a model."""
    model = Mlps(Mlp)
    model.mlp.forward = types.MethodType(LigerMlp.forward, model.mlp)
    return model


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def masks_of(model: nn.Module) -> nspec.NeuronMasks:
    return nspec.select(nspec.profile(model, {"a": [X], "b": [-X]}, padding="include"), k=0.7)


def test_mode_update_trains_through_a_kernel_as_through_the_layers_own_forward() -> None:
    gradients = []
    for model in (patched(), Mlps(Mlp)):
        masks = masks_of(model)
        nspec.specialize(model, masks, mode="update")
        with nspec.task(model, "a"):
            model(X).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        off = ~masks["a"]["mlp.gate_proj"]
        assert not model.mlp.gate_proj.weight.grad[off].any()
        assert model.mlp.gate_proj.bias.grad[off].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize(
    ("build", "way"),
    [(patched, "del its .forward; Liger: swiglu=False"), (lambda: Mlps(LigerMlp), "take another class")],
    ids=["put on the instance", "a class of its own"],
)
def test_mode_forward_refuses_a_kernel_before_anything_is_changed(build, way: str) -> None:
    model = build()
    masks = masks_of(model)
    with pytest.raises(
        ValueError, match=rf"^mlp.gate_proj: the forward of \w+ mlp gives .*\.SiLUMul, .*{way}.*'update'"
    ):
        nspec.specialize(model, masks, mode="forward")
    assert type(model.mlp.gate_proj) is nn.Linear
    if "forward" in model.mlp.__dict__:
        del model.mlp.forward
        nspec.specialize(model, masks, mode="forward")
        with nspec.task(model, "a"):
            model(X).sum().backward()


def test_a_function_that_the_code_does_not_name_is_an_error_of_the_pass_that_names_it() -> None:
    model = Mlps(Hidden)
    nspec.specialize(model, masks_of(model), mode="forward")
    with (
        nspec.task(model, "a"),
        pytest.raises(ValueError, match=r"mlp.gate_proj: .* gives them to Reversed, a torch.auto"),
    ):
        model(X)


def test_a_layer_that_names_a_function_for_something_else_is_taken() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.gelu(self.fc1(Reversed.apply(self.norm(x)))))

    model = Mlps(Layer)
    nspec.specialize(model, masks_of(model), mode="forward")
    with nspec.task(model, "a"):
        model(X).sum().backward()
    assert model.mlp.fc1.weight.grad.any()
