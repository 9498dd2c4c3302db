"""LaSS: masks drop the lowest magnitudes of each matrix that can be masked: attention and feed-forward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nspec.baselines.lass import WeightMasks, apply_weight_masks, magnitude_masks, prunable_layers


def m2m100() -> nn.Module:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    config = M2M100Config(
        vocab_size=40, d_model=12, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return M2M100ForConditionalGeneration(config)


def one_layer(weight: Tensor) -> nn.Module:
    model = nn.ModuleDict({"only": nn.Linear(weight.shape[1], weight.shape[0])})
    model["only"].weight = nn.Parameter(weight)
    return model


def test_attention_and_feed_forward_of_every_layer_are_pruned_and_nothing_else() -> None:
    attention = [f"{which}.{name}_proj" for which in ("self_attn", "encoder_attn") for name in "qkv"]
    attention += ["self_attn.out_proj", "encoder_attn.out_proj"]
    wanted = {f"model.decoder.layers.{i}.{name}" for i in (0, 1) for name in [*attention, "fc1", "fc2"]}
    encoder = [name for name in attention if name.startswith("self_attn")]
    wanted |= {f"model.encoder.layers.{i}.{name}" for i in (0, 1) for name in [*encoder, "fc1", "fc2"]}
    found = prunable_layers(m2m100())
    assert set(found) == wanted
    assert len(found) == len(wanted) == 2 * 6 + 2 * 10


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    with pytest.raises(ValueError, match="no feed-forward block"):
        prunable_layers(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="self_attn is nn.MultiheadAttention"):
        prunable_layers(nn.TransformerEncoderLayer(8, 2, 16))
    apart = nn.Module()
    apart.block = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "ffn": nn.Module()})])
    apart.block[0]["ffn"].wi, apart.block[0]["ffn"].wo = nn.Linear(4, 8), nn.Linear(8, 4)
    with pytest.raises(ValueError, match="block.0.ffn holds a feed-forward block alone"):
        prunable_layers(apart)


@pytest.mark.parametrize("alpha", [0.1, 0.29, 0.7, 0.999])
def test_exactly_the_lowest_magnitudes_of_each_matrix_are_dropped(alpha: float) -> None:
    model = m2m100()
    masks = magnitude_masks(model, alpha)
    assert list(masks) == prunable_layers(model)
    for layer, mask in masks.items():
        weight = model.get_submodule(layer).weight
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        order = [j for _, j in sorted((abs(w), j) for j, w in enumerate(weight.flatten().tolist()))]
        dropped = {j for j, kept in enumerate(mask.flatten().tolist()) if not kept}
        assert dropped == set(order[: math.floor(round(alpha * 1000) * weight.numel() / 1000)]), layer


def test_the_share_is_the_decimal_number_that_was_written() -> None:
    assert int(0.29 * 100) == 28  # what binary fractions make of it
    mask = magnitude_masks(one_layer(torch.randn(10, 10)), 0.29, ["only"])["only"]
    assert int((~mask).sum()) == 29


def test_alpha_zero_keeps_every_weight() -> None:
    assert all(bool(mask.all()) for mask in magnitude_masks(m2m100(), 0).values())


def test_of_equal_magnitudes_those_with_the_lower_index_go_first() -> None:
    model = one_layer(torch.tensor([[2.0, -1.0, 1.0], [1.0, 0.5, -1.0]]))
    mask = magnitude_masks(model, 0.5, ["only"])["only"]
    assert mask.tolist() == [[True, False, False], [True, False, True]]
    zeros = magnitude_masks(one_layer(torch.zeros(2, 4)), 0.4, ["only"])["only"]
    assert zeros.tolist() == [[False, False, False, True], [True] * 4]


def test_masks_that_cannot_be_made_are_refused() -> None:
    model = one_layer(torch.randn(2, 3))
    for alpha in (-0.1, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"alpha is .*expected a share"):
            magnitude_masks(model, alpha, ["only"])
    with pytest.raises(ValueError, match="'other' is not a linear layer.*only"):
        magnitude_masks(model, 0.1, ["other"])
    with pytest.raises(ValueError, match="layers is empty"):
        magnitude_masks(model, 0.1, [])
    with pytest.raises(ValueError, match=r"only.weight has values that are not finite"):
        magnitude_masks(one_layer(torch.tensor([[math.nan]])), 0.1, ["only"])


def test_layers_whose_weights_are_read_past_them_are_refused() -> None:
    torch_layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match=r"linear1 is inside nn.TransformerEncoderLayer"):
        apply_weight_masks(torch_layer, WeightMasks({"a": {"linear1": torch.ones(16, 8).bool()}}))
    decoder = nn.TransformerDecoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match=r"out_proj is inside nn.MultiheadAttention"):
        apply_weight_masks(decoder, WeightMasks({"a": {"self_attn.out_proj": torch.ones(8, 8).bool()}}))
    with pytest.raises(ValueError, match="0 is Bilinear, expected a plain nn.Linear"):
        apply_weight_masks(
            nn.Sequential(nn.Bilinear(2, 2, 2)), WeightMasks({"a": {"0": torch.ones(2, 2, dtype=torch.bool)}})
        )
