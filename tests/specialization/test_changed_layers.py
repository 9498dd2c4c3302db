"""Layers that are not what they seem: patched, remade by hooks, wrapped or replaced since. Right, or a clear error."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import batch, m2m100, masks_for
from torch import Tensor, nn

import nspec

BOTH = pytest.mark.parametrize("mode", ["forward", "update"])


@pytest.fixture
def small() -> tuple[nn.Sequential, nspec.NeuronMasks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4)).double()
    return model, masks_for(model)


# A forward on the instance.


@BOTH
@pytest.mark.parametrize("patch", [lambda fc1: fc1.forward, lambda fc1: functools.partial(nn.Linear.forward, fc1)])
def test_a_forward_of_its_own_is_refused_with_the_way_out(
    mode: str, patch: Callable[[Any], Any], small: tuple[nn.Sequential, nspec.NeuronMasks]
) -> None:
    model, masks = small
    model[0].forward = patch(model[0])
    with pytest.raises(ValueError, match=r"^0 has a forward of its own.*del layer.forward"):
        nspec.specialize(model, masks, mode=mode)
    assert type(model[0]) is nn.Linear
    del model[0].forward
    nspec.specialize(model, masks, mode=mode)


@BOTH
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [False, True])
def test_hooks_of_accelerate_are_honoured_whenever_they_are_put_on(mode: str, when: str, offload: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = m2m100(torch.float32).eval()
    masks, dense = masks_for(model), model(**batch()).logits
    plain = nspec.specialize(copy.deepcopy(model), masks, mode=mode)
    with nspec.task(plain, "en-de"), torch.set_grad_enabled(not offload):
        want = plain(**batch()).logits

    def hook(target: nn.Module) -> None:
        if offload:
            accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
        else:
            accelerate.dispatch_model(target, {"": "cpu"}, force_hooks=True)

    hook(model) if when == "before" else None
    nspec.specialize(model, masks, mode=mode)
    hook(model) if when == "after" else None
    for _ in range(2):
        with nspec.task(model, "en-de"), torch.set_grad_enabled(not offload):
            assert torch.equal(model(**batch()).logits, want)
    if not offload:
        with nspec.task(model, "en-de"):
            model(**batch()).loss.backward()
        masked = ~masks["en-de"]["model.encoder.layers.0.fc1"]
        assert not model.model.encoder.layers[0].fc1.weight.grad[masked].any()
        torch.testing.assert_close(nspec.merge(model, "en-de")(**batch()).logits, want)
    nspec.despecialize(model)
    torch.testing.assert_close(model(**batch()).logits, dense)


def test_a_forward_that_was_put_on_since_is_named_before_it_computes_something_else(
    small: tuple[nn.Sequential, nspec.NeuronMasks],
) -> None:
    model, masks = small
    nspec.specialize(model, masks)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    for use in (nspec.despecialize, lambda m: nspec.merge(m, "en-de"), lambda m: nspec.set_task(m, "en-de")):
        with pytest.raises(ValueError, match=r"^0 has a forward of its own, put on the module since"):
            use(model)
    del model[0].forward
    nspec.despecialize(model)


# Weights that are made anew in each pass.


def remade(how: str, layer: nn.Module) -> None:
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    torch.manual_seed(3)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.3)
    elif how == "parametrisation":
        parametrizations.weight_norm(layer)
    else:
        {"weight_norm": weight_norm, "spectral_norm": spectral_norm}[how](layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm", "parametrisation"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_hooks_remake_are_read_when_they_are_made(
    how: str, place: int, when: str, small: tuple[nn.Sequential, nspec.NeuronMasks]
) -> None:
    """Through updates: a layer that kept the weights of the last pass would drift from the definition."""
    model, masks = small
    if how == "parametrisation" and place == 0 and when == "before":
        remade(how, model[0])
        with pytest.raises(ValueError, match="is ParametrizedLinear.*remove_parametrizations"):
            nspec.specialize(model, masks)
        return
    other = copy.deepcopy(model)
    remade(how, model[place]) if when == "before" else None
    nspec.specialize(model, masks)
    remade(how, model[place]) if when == "after" else None
    remade(how, other[place])
    active, x = masks["en-de"]["0"][:, None], torch.randn(6, 4, dtype=torch.float64)

    def wanted() -> Tensor:
        other[0](x)  # its hooks make the weight
        h = F.linear(x, other[0].weight * active, other[0].bias).relu()
        return other[2](h)

    for step in range(4):
        training = step < 3
        model.train(training), other.train(training)
        with nspec.task(model, "en-de"), torch.set_grad_enabled(training):
            ours, theirs = model(x), wanted()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        if training:
            ours.square().sum().backward(), theirs.square().sum().backward()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
                with torch.no_grad():
                    a.sub_(0.1 * b.grad), b.sub_(0.1 * b.grad)
                a.grad = b.grad = None
    if place == 0:
        with pytest.raises(ValueError, match=r"^the weight of 0 is made anew in each pass"):
            nspec.merge(model, "en-de")


def test_weights_that_are_exchanged_between_passes_without_gradients_are_seen(
    small: tuple[nn.Sequential, nspec.NeuronMasks],
) -> None:
    """A new parameter may lie where the old one lay, with the same version."""
    model, masks = small
    nspec.specialize(model, masks)
    x = torch.ones(2, 4, dtype=torch.float64)
    with torch.no_grad(), nspec.task(model, "en-de"):
        for value in range(20):
            model[2].weight = None
            model[2].weight = nn.Parameter(torch.full((4, 72), float(value), dtype=torch.float64))
            masked = (masks["en-de"]["0"][:, None] * model[0].weight, model[0].bias)
            torch.testing.assert_close(model(x), F.linear(F.linear(x, *masked).relu(), model[2].weight, model[2].bias))


# What stands in a layer's place.


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT puts it there."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        options = {"bias": False, "dtype": base_layer.weight.dtype}
        self.down = nn.Linear(base_layer.in_features, 2, **options)
        self.up = nn.Linear(2, base_layer.out_features, **options)

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) + self.up(self.down(x))


@BOTH
@pytest.mark.parametrize("other", [Adapted, lambda fc1: nn.Linear(4, 72).double(), lambda fc1: nn.Identity()])
def test_another_module_in_the_place_of_a_layer_is_named(
    mode: str, other: Callable[[Any], nn.Module], small: tuple[nn.Sequential, nspec.NeuronMasks]
) -> None:
    plain, masks = small
    model = nn.Sequential(plain, nn.Linear(4, 4).double(), copy.deepcopy(plain))
    masks = masks_for(model)
    nspec.specialize(model, masks, mode=mode)
    fc1, model[2][0] = model[2][0], other(model[2][0])
    for wrapped in (model, nn.DataParallel(model), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"^2\.0 was specialised, and .* stands in its place now"):
            nspec.set_task(wrapped, "en-de")
    model[2][0] = fc1
    nspec.set_task(model, "en-de")
    nspec.despecialize(model)


def test_a_layer_that_is_compiled_or_checkpointed_by_itself_still_stands(
    small: tuple[nn.Sequential, nspec.NeuronMasks],
) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, masks = small
    x = torch.ones(2, 4, dtype=torch.float64)
    nspec.specialize(model, masks, mode="update")
    with nspec.task(model, "en-de"):
        want = model(x)
    for wrap in (lambda m: torch.compile(m, backend="eager"), checkpoint_wrapper):
        wrapped = nn.Sequential(wrap(model[0]), *model[1:])
        with nspec.task(wrapped, "en-de"):
            torch.testing.assert_close(wrapped(x), want)


def test_adapters_on_fc2_are_exact_and_on_attention_too() -> None:
    model = m2m100()
    masks = masks_for(model)
    merged = copy.deepcopy(model)
    nspec.specialize(model, masks)
    with torch.no_grad():
        for layer, mask in masks["en-de"].items():
            merged.get_submodule(layer).weight.mul_(mask[:, None])
    for name in ("model.encoder.layers.0.fc2", "model.decoder.layers.1.self_attn.q_proj"):
        adapted = Adapted(model.get_submodule(name))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapted)
        with torch.no_grad():
            merged.get_submodule(name).weight.add_(adapted.up.weight @ adapted.down.weight)
    with nspec.task(model, "en-de"):
        loss = model(**batch()).loss
        loss.backward()
    torch.testing.assert_close(loss, merged(**batch()).loss, rtol=0, atol=1e-10)
    assert model.model.encoder.layers[0].fc2.up.weight.grad.abs().max() > 0


# PyTorch's own layers, which read weights without calling the layers where nothing keeps them from it.


@pytest.mark.parametrize("whole", [False, True])
def test_padding_masks_and_nested_tensors_of_torch_encoders(whole: bool) -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True}
    if whole:
        model: nn.Module = nn.Transformer(8, 2, 1, 1, 96, **options)
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 96, **options), 2)
    model.double().eval()
    masks = masks_for(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in masks["en-de"].items():
            other.get_submodule(layer).weight.mul_(mask[:, None])
    x, padding = torch.randn(3, 5, 8).double(), torch.arange(5) >= torch.tensor([[5], [3], [1]])

    def run(m: nn.Module) -> Tensor:
        if whole:
            return m(x, x, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return m(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)

    nspec.specialize(model, masks)
    with torch.no_grad(), nspec.task(model, "en-de"):
        torch.testing.assert_close(run(model), run(other), rtol=0, atol=1e-10)
    nspec.despecialize(model)
    encoder: Any = model.encoder if whole else model
    assert encoder.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 1 for layer in encoder.layers)


def test_a_masked_layer_put_into_a_torch_encoder_layer_by_hand_is_called() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 96, dropout=0.0, batch_first=True).double().eval()
    mask, other = torch.rand(96) < 0.5, copy.deepcopy(layer)
    layer.linear1 = nspec.MaskedLinear.from_linear(layer.linear1)
    layer.linear1.set_mask(mask)
    x = torch.randn(2, 5, 8).double()
    with torch.no_grad():
        other.linear1.weight.mul_(mask[:, None])
        torch.testing.assert_close(layer(x), other(x), rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="nested tensor, expected a padded one"):
            nn.TransformerEncoder(layer, 1)(x, src_key_padding_mask=torch.arange(5).expand(2, 5) > 2)
