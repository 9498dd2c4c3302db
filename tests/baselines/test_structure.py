"""Feed-forward pairs in modules of their own, inside of the layers that are meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nspec
from nspec.baselines.adapters import TaskAdapters, adapter_parameters, add_adapters
from nspec.baselines.structure import layer_around


def test_a_feed_forward_block_in_a_module_of_its_own_needs_the_names_of_whole_layers() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).double().eval()
    with pytest.raises(
        ValueError, match=r"DenseReluDense holds a feed-forward block alone.*layers=\['encoder.block.0'"
    ):
        add_adapters(model, {"en-de": "germanic"}, 4)
    assert not any(isinstance(module, TaskAdapters) for module in model.modules())
    seen: list[Tensor] = []
    add_adapters(model, {"en-de": "germanic"}, 4, layers=["encoder.block.0", "decoder.block.0"])
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.encoder.final_layer_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor([[3, 4, 5]])
    for task in (None, "en-de"):
        with nspec.task(model, task):
            model(input_ids=ids, decoder_input_ids=ids)
    added = model.encoder.block[0].adapters.groups["germanic"](seen[0])
    torch.testing.assert_close(seen[1], seen[0] + added)  # the residual stream itself is what is adapted
    assert float(added.detach().norm()) > 0


def test_the_layer_around_is_the_outermost_item_of_a_list_with_more_linear_layers() -> None:
    layer = nn.ModuleDict({"q": nn.Linear(4, 4), "ffn": nn.ModuleDict({"wi": nn.Linear(4, 8), "wo": nn.Linear(8, 4)})})
    model = nn.ModuleDict({"block": nn.ModuleList([layer, nn.ModuleDict({"ffn": layer["ffn"]})])})
    modules = dict(model.named_modules(remove_duplicate=False))
    assert layer_around("block.0.ffn", modules) == "block.0"
    assert layer_around("block.1.ffn", modules) is None  # nothing else is around it
    assert layer_around("block.0", modules) is None  # it is the layer itself
    assert layer_around("", {"": layer["ffn"], "wi": layer["ffn"]["wi"], "wo": layer["ffn"]["wo"]}) is None
