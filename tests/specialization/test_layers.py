"""Feed-forward blocks are found in every family, by structure and by name, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn
from torch.nn.utils import prune

import nspec
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.layers import activation_of, computes_linear, find_blocks, is_relu


def named(blocks: list[FeedForward]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_family_are_found_and_no_attention(family: str) -> None:
    model = build(family, meta=True)
    blocks = find_blocks(model)
    assert named(blocks) == FAMILIES[family][2]
    for block in blocks:
        assert block.fc1 is model.get_submodule(block.name)
        assert block.d_ff in (40, 96)
        assert any(module is block.fc2 for module in block.parent.modules())


@pytest.mark.parametrize(
    ("family", "up", "fused"),
    [("Llama", "up_proj", False), ("T5 gated", "wi_1", False), ("Phi3", None, True), ("Bert", None, False)],
)
def test_a_gated_block_has_its_projections(family: str, up: str | None, fused: bool) -> None:
    block = find_blocks(build(family, meta=True))[0]
    assert block.up is (None if up is None else getattr(block.parent, up))
    assert block.fused == fused
    assert block.gated == (fused or up is not None)


def test_the_activation_is_what_the_module_around_says() -> None:
    assert is_relu(activation_of(find_blocks(build("T5", meta=True))[0]))
    assert not is_relu(activation_of(find_blocks(build("Bert", meta=True))[0]))
    relu = build("Bert", meta=True, hidden_act="relu")
    assert is_relu(activation_of(find_blocks(relu)[0]))
    sequence = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 4))
    assert activation_of(find_blocks(sequence)[0]) is sequence[2]


class Quick(nn.Module):
    """An activation of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ((nn.ReLU(),), True),
        ((nn.GELU(), nn.Dropout(0.1)), True),
        ((nn.Dropout(0.1), nn.SiLU()), True),
        ((Quick(),), True),
        ((nn.Softmax(-1),), False),
        ((nn.LayerNorm(8),), False),
        ((nn.LayerNorm(8, elementwise_affine=False),), False),
        ((nn.Flatten(),), False),
        ((nn.LayerNorm(8), nn.ReLU()), False),
        ((), False),
    ],
)
def test_a_sequence_needs_an_elementwise_activation(between: tuple[nn.Module, ...], found: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, 4))
    if found:
        assert named(find_blocks(model)) == ["0"]
    else:
        with pytest.raises(ValueError, match="no feed-forward block found in Sequential"):
            find_blocks(model)


def test_a_block_gives_back_the_width_that_it_gets_and_a_classifier_does_not() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model = nn.ModuleList(
        [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), head, Block(fc1=(4, 8), fc2=(8, 3))]
    )
    assert named(find_blocks(model)) == ["0.0"]
    assert named(find_blocks(model, [("1.0", "1.2"), ("2.fc1", "2.fc2")])) == ["1.0", "2.fc1"]


class Block(nn.Module):
    """Linear layers of given names and sizes."""

    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs))


def test_a_third_layer_of_the_first_ones_size_may_be_a_gate_and_is_left_to_the_caller() -> None:
    model = Block(fc1=(4, 8), other=(4, 8), fc2=(8, 4))
    with pytest.raises(ValueError, match=r"perhaps \('fc1', 'other', 'fc2'\)"):
        find_blocks(model)
    [block] = find_blocks(model, [("other", "fc1", "fc2")])
    assert (block.name, block.up) == ("other", model.fc1)
    assert find_blocks(Block(fc1=(4, 8), other=(4, 6), fc2=(8, 4)))[0].up is None


def test_a_gated_block_with_a_projection_of_another_class_is_not_a_plain_one() -> None:
    model = Block(gate_proj=(4, 8), up_proj=(4, 8), down_proj=(8, 4))
    model.gate_proj = nn.Identity()
    with pytest.raises(ValueError, match="no feed-forward block"):
        find_blocks(model)


def test_widths_decide() -> None:
    assert find_blocks(Block(fc1=(4, 16), fc2=(8, 4)))[0].fused
    with pytest.raises(ValueError, match="no feed-forward block"):
        find_blocks(Block(fc1=(4, 12), fc2=(8, 4)))
    assert find_blocks(nn.ModuleDict({"shared_mlp": Block(input_linear=(4, 16), output_linear=(8, 4))}))[0].fused
    assert find_blocks(Block(w1=(4, 8), w2=(8, 4)))[0].up is None
    assert find_blocks(Block(w1=(4, 8), w2=(8, 4), w3=(4, 8)))[0].up is not None


@pytest.mark.parametrize("wrapped", ["fc1", "fc2"])
def test_an_adapter_on_a_layer_of_the_block_is_an_error_that_says_what_to_do(wrapped: str) -> None:
    model = nn.ModuleList([Block(fc1=(4, 8), fc2=(8, 4)) for _ in range(2)])
    adapter = nn.Module()
    adapter.base_layer = getattr(model[1], wrapped)
    setattr(model[1], wrapped, adapter)
    assert named(find_blocks(model, ["0.fc1"])) == ["0.fc1"]
    for layers in (None, [("1.fc1", "1.fc2")], [f"1.{wrapped}"]):
        with pytest.raises(
            ValueError, match=rf"^1\.{wrapped} carries an adapter .*merge it first .*or specialise first"
        ):
            find_blocks(model, layers)


def test_a_shared_first_layer_is_an_error() -> None:
    model = nn.ModuleList([Block(fc1=(4, 8), fc2=(8, 4)) for _ in range(2)])
    model[1].fc1.weight = model[0].fc1.weight
    with pytest.raises(ValueError, match=r"1.fc1.weight and 0.fc1.weight are one parameter"):
        find_blocks(model)
    gated = nn.ModuleList([Block(gate_proj=(4, 8), up_proj=(4, 8), down_proj=(8, 4)) for _ in range(2)])
    gated[1].up_proj.weight = gated[0].up_proj.weight
    with pytest.raises(ValueError, match=r"1.up_proj.weight and 0.up_proj.weight are one parameter: a projection"):
        find_blocks(gated)


def test_a_layer_of_two_different_blocks_is_an_error_and_a_block_in_two_places_is_taken_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Block(fc1=(4, 8), fc2=(8, 4)) for _ in range(2)])
    model[1].fc1 = model[0].fc1
    with pytest.raises(ValueError, match=r"1.fc1.weight and 0.fc1.weight are one parameter: .* \(a whole block can"):
        find_blocks(model)
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    model = nn.Sequential(nn.ModuleDict({"ffn": block})["ffn"], nn.Sequential(block)).double()
    assert named(find_blocks(model)) == ["0.0"]
    active, x = torch.arange(8) < 3, torch.randn(3, 4).double()
    masked = lambda x: block[2](block[1](nn.functional.linear(x, block[0].weight * active[:, None], block[0].bias)))
    want = masked(masked(x))
    wanted = torch.autograd.grad(want.sum(), [*block.parameters()])
    nspec.specialize(model, nspec.NeuronMasks({"a": {"0.0": active}}))
    with nspec.task(model, "a"):
        y = model(x)
        found = torch.autograd.grad(y.sum(), [*block.parameters()])
    for ours, theirs in zip((y, *found), (want, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


class Same(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.1 * super().forward(input)


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Sums(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum(-1)


class Adapted(nn.Linear):
    """An adapter that begins as nothing."""

    def __init__(self, inputs: int, outputs: int, device: Any = None) -> None:
        super().__init__(inputs, outputs, device=device)
        self.adapter = nn.Linear(inputs, outputs, bias=False, device=device)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.adapter(input)


class Bounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1e4, 1e4)


class OfBatches(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(1) if input.dim() == 3 else input)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (nn.Linear, None),
        (Same, None),
        (Scaled, "computes something else than nn.Linear"),
        (Noisy, "computes something else"),
        (Sums, "another shape"),
        (Adapted, "it has adapter.weight beside weight and bias"),
        (OfBatches, "computes something else"),
        (Bounded, "computes something else"),
    ],
)
def test_a_subclass_is_taken_where_it_computes_what_linear_does(kind: Any, why: str | None, dtype: torch.dtype) -> None:
    if kind is Bounded and dtype == torch.float16:
        pytest.skip("it has no larger numbers to speak of")
    torch.manual_seed(0)
    layer = kind(256, 40).to(dtype)
    state = torch.get_rng_state()
    found = computes_linear(layer.eval())
    assert found is None if why is None else why in str(found)
    assert not layer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert (computes_linear(kind(256, 40, device="meta")) is None) == (kind is not Adapted)


def test_a_forward_of_its_own_a_mask_and_a_parametrisation_are_seen() -> None:
    from transformers.pytorch_utils import Conv1D

    assert computes_linear(Conv1D(40, 4)) is None
    layer = nn.Linear(4, 40)
    layer.forward = layer.forward
    assert computes_linear(layer) is None
    layer.forward = lambda x: -nn.functional.linear(x, layer.weight)
    assert "computes something else" in str(computes_linear(layer))
    masked = nspec.MaskedLinear(4, 40)
    assert computes_linear(masked) is None
    masked.set_mask(torch.arange(40) < 20)
    assert "computes something else" in str(computes_linear(masked))
    pruned = Same(4, 40)
    prune.l1_unstructured(pruned, "weight", 0.5)
    assert computes_linear(pruned) is None
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 40))
    assert "make it permanent first" in str(computes_linear(normed))
    assert "quantised" in str(computes_linear(_Packed(4, 40)))


class _Packed(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(outputs * inputs // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input
