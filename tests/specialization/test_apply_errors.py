"""What cannot be specialised, and layers with other names: what is said then."""

from __future__ import annotations

import pytest
import torch
from models import batch, m2m100, masked_copy, masks_for
from torch import nn

import nspec


def test_masks_of_another_model_are_named_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"model.encoder.layers.0.fc1 has d_ff=200 in the masks, 128 in the model"):
        nspec.specialize(m2m100(d_ff=128), masks_for(m2m100()))


def test_masks_with_other_layer_names_give_the_nearest() -> None:
    masks = nspec.NeuronMasks({"a": {"text.encoder.layers.0.fc1": torch.ones(200, dtype=torch.bool)}})
    with pytest.raises(
        ValueError, match=r"'text.encoder.layers.0.fc1', which the model does not have; known: model.encoder"
    ):
        nspec.specialize(m2m100(), masks)


def test_a_wrapped_model_is_named_as_such() -> None:
    model = m2m100()
    wrapped = nn.Sequential()
    wrapped.module = model
    with pytest.raises(ValueError, match="the model is wrapped: specialise it first"):
        nspec.specialize(wrapped, masks_for(model))


def test_activation_dropout_is_refused_and_other_activations_are_not() -> None:
    model = m2m100(activation_dropout=0.1)
    with pytest.raises(ValueError, match=r"activation_dropout is 0.1, expected 0 in mode 'forward'"):
        nspec.specialize(model, masks_for(model))
    nspec.specialize(model, masks_for(model), mode="update")
    gelu = m2m100(activation_function="gelu")
    nspec.specialize(gelu, masks_for(gelu))


class Secretive(nn.Module):
    """Says nothing of what it computes between fc1 and fc2."""

    def __init__(self, between) -> None:
        super().__init__()
        self.fc1, self.fc2, self._between = nn.Linear(4, 80), nn.Linear(80, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self._between(self.fc1(x)))


@pytest.mark.parametrize("between", [nn.Softmax(-1), lambda h: nn.functional.dropout(torch.relu(h), 0.1)])
def test_what_a_layer_does_in_secret_is_found_by_the_first_pass(between) -> None:
    model = Secretive(between)
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"), pytest.raises(ValueError, match="is not elementwise"):
        model(torch.randn(30, 4))


def test_relu_in_secret_is_fine() -> None:
    model = Secretive(torch.relu)
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"):
        model(torch.randn(30, 4)).sum().backward()


class OtherNames(nn.Module):
    """A feed-forward block whose attributes have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 80), nn.Linear(80, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


def test_layers_with_other_names_are_profiled_and_specialised_when_they_are_given() -> None:
    model, names, x = OtherNames(), [("inner", "outer")], torch.randn(30, 4)
    with pytest.raises(ValueError, match=r"no feed-forward block found in OtherNames.*\('inner', 'outer'\)"):
        nspec.profile(model, {"t": [x]})
    masks = nspec.select(nspec.profile(model, {"t": [x]}, layers=names), k=0.5)
    want = masked_copy(model, masks, "t")(x)
    nspec.specialize(model, masks, layers=names)
    with nspec.task(model, "t"):
        torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match="outer has 4 outputs, but outer has 80 inputs"):
        nspec.specialize(OtherNames(), masks, layers=[("outer", "outer")])


class CallsSuper(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class OwnMethod(nn.Linear):
    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.bias + (nn.functional.linear(input, self.weight) if self.training else self.multiplied(input))


@pytest.mark.parametrize("kind", [CallsSuper, OwnMethod])
def test_a_subclass_that_needs_its_class_is_refused_before_it_breaks(kind: type[nn.Linear]) -> None:
    model = OtherNames()
    model.inner = kind(4, 80)
    masks = nspec.NeuronMasks({"t": {"inner": torch.arange(80) < 40}})
    with pytest.raises(ValueError, match=rf"inner is {kind.__name__}.*calls super\(\) or methods of its class"):
        nspec.specialize(model, masks, layers=[("inner", "outer")])
    assert type(model.inner) is kind
    assert model.training


def test_specialising_twice_and_undoing_nothing_are_errors() -> None:
    model = m2m100()
    with pytest.raises(ValueError, match="is not specialised"):
        nspec.despecialize(model)
    masks = masks_for(model)
    nspec.specialize(model, masks)
    with pytest.raises(ValueError, match="specialised already"):
        nspec.specialize(model, masks)
    with pytest.raises(ValueError, match="mode is 'both'"):
        nspec.specialize(m2m100(), masks, mode="both")


def test_masks_of_a_plain_model_fit_one_with_wrappers_around_it_and_the_other_way() -> None:
    masks = masks_for(m2m100())
    x = batch()
    want = masked_copy(m2m100(), masks, "en-de").eval()(**x).logits
    adapted = nn.Module()  # as PEFT wraps
    adapted.base_model = nn.Module()
    adapted.base_model.model = m2m100().eval()
    nspec.specialize(adapted, masks)
    with nspec.task(adapted, "en-de"):
        torch.testing.assert_close(adapted.base_model.model(**x).logits, want)
    for prefix in ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod."):
        model = nspec.specialize(m2m100().eval(), masks.renamed("", prefix))
        with nspec.task(model, "en-de"):
            torch.testing.assert_close(model(**x).logits, want)
    inner = nspec.specialize(m2m100().model, masks)
    assert inner.encoder.layers[0].fc1.qualified_name == "encoder.layers.0.fc1"


def test_a_layer_in_two_blocks_is_refused_by_name_in_mode_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    layers = [("0", "2"), ("2", "4")]
    masks = nspec.NeuronMasks({"a": {name: torch.arange(8) < 3 for name in "02"}})
    with pytest.raises(ValueError, match="^2 is in two blocks, as fc2 of that of 0 .* use mode='update'"):
        nspec.specialize(model, masks, layers=layers)
    assert type(model[0]) is nn.Linear
    nspec.specialize(model, masks, "update", layers=layers)
    nspec.despecialize(model)
    nspec.specialize(model, masks.only(["0"]), layers=layers)
    with nspec.task(model, "a"):
        model(torch.randn(2, 4))
