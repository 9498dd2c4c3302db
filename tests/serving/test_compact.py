"""Models without masked neurons: the same numbers for every family, narrower, and loaded by the stock library."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from models import batch, m2m100, masks_for
from small_models import FAMILIES, Family, inputs, make, output
from torch import Tensor, nn

import nspec
from nspec.serving import widths
from nspec.specialization.layers import find_blocks
from nspec.specialization.naming import Layer

RELOADED = [name for name, family in FAMILIES.items() if not callable(family.config) and name != "BLOOM"]


def masks_of(model: nn.Module, share: float = 0.4, layers: list[Layer] | None = None) -> nspec.NeuronMasks:
    """Random masks of a task ``a``, odd in number, and those of another."""
    g = torch.Generator().manual_seed(5)
    blocks = find_blocks(model, layers)
    return nspec.NeuronMasks({t: {b.name: torch.rand(b.d_ff, generator=g) < share for b in blocks} for t in "ab"})


def by_half(masks: nspec.NeuronMasks, task: str = "a") -> dict[str, int]:
    """The most neurons that a layer keeps of the encoder, of the decoder, and of all."""
    kept = {name: int(mask.sum()) for name, mask in masks[task].items()}
    halves = {half: [n for name, n in kept.items() if half in name] for half in ("encoder", "decoder")}
    return {half: max(numbers) for half, numbers in halves.items() if numbers} | {"all": max(kept.values())}


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(given or batch())).logits
    return found


def compared(family: Family, model: nn.Module, given: dict[str, Tensor], task: str | None = None) -> Tensor:
    """The output, and the loss where there is one, as one row of numbers."""
    with torch.no_grad():
        if task is not None:
            with nspec.task(model, task):
                return compared(family, model, given)
        loss = [] if family.reads in ("vectors", "one", "pictures") else [model(**given).loss.flatten()]
        return torch.cat([output(family, model, given).flatten(), *loss])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compact_model_computes_what_the_task_computes(name: str) -> None:
    family = FAMILIES[name]
    model, given = make(family).eval(), inputs(family)
    masks = masks_of(model)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    nspec.specialize(model, masks)
    want = compared(family, model, given, "a")
    with nspec.task(model, "b"):
        small = nspec.merge(model, "a", compact=True, ragged=name == "BLOOM")
        torch.testing.assert_close(compared(family, model, given), compared(family, model, given, "b"))
    torch.testing.assert_close(compared(family, small, given), want, rtol=0, atol=1e-12)
    assert all(width < len(masks["a"][layer]) for layer, width in widths(small).items())
    assert not any("_nspec" in vars(module) for module in small.modules())
    nspec.despecialize(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RELOADED)
def test_what_is_saved_is_loaded_by_the_stock_library(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, given = make(family).eval(), inputs(family)
    masks = masks_of(model)
    small: Any = nspec.merge(nspec.specialize(model, masks), "a", compact=True)
    small.save_pretrained(tmp_path)
    options = {"dtype": torch.float64, "attn_implementation": "eager", "output_loading_info": True}
    again, told = type(small).from_pretrained(tmp_path, **options)
    assert not any(told.values()), told
    torch.testing.assert_close(compared(family, again, given), compared(family, small, given), rtol=0, atol=1e-12)
    most, separate = by_half(masks), hasattr(small.config, "encoder_ffn_dim")
    for layer, width in widths(again).items():
        half = "encoder" if "encoder" in layer else "decoder"
        assert width == most[half if separate else "all"], layer


# Other names of the option, one that is unset, packed projections, a block used twice, and one that does not run alone.
@pytest.mark.parametrize(
    "name",
    [
        *("SwitchTransformers", "ProphetNet", "Glm", "ModernBert", "Arcee", "Starcoder2", "GPT2", "GPTJ", "MobileBert"),
        *("Albert", "CTRL"),
    ],
)
def test_families_with_options_of_other_kinds_are_loaded_too(name: str, tmp_path: Path) -> None:
    model: Any = build(name, **({"num_hidden_layers": 3} if name == "Albert" else {}))
    ids = torch.arange(4, 12).view(2, 4)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    nspec.specialize(model, masks_of(model), activation_dropout=0)
    small: Any = nspec.merge(model, "a", compact=True)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        with nspec.task(model, "a"):
            want = model(**given)[0]
        for one in (small, again):
            torch.testing.assert_close(one(**given)[0], want, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["M2M100", "Marian, swish", "MBart, gelu", "T5", "T5, gated-gelu", "Llama", "GPT2"])
@pytest.mark.parametrize("beams", [1, 4])
def test_it_generates_the_tokens_of_the_specialised_model(name: str, beams: int) -> None:
    family = FAMILIES[name]
    model: Any = make(family).eval()
    nspec.specialize(model, masks_of(model, 0.55))
    given = {"input_ids": inputs(family)["input_ids"], "max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    with nspec.task(model, "a"):
        want = model.generate(**given)
    small: Any = nspec.merge(model, "a", compact=True)
    assert torch.equal(small.generate(**given), want)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_layer_may_keep_all_of_its_neurons_or_none(ragged: bool) -> None:
    model = m2m100().eval()
    masks = masks_for(model)
    nspec.specialize(model, masks)
    with nspec.task(model, "de-en"):
        want = logits(model)
    small: Any = nspec.merge(model, "de-en", compact=True, ragged=ragged)
    torch.testing.assert_close(logits(small), want, rtol=0, atol=1e-12)
    kept = [int(mask.sum()) for mask in masks["de-en"].values()]
    assert kept[0] == 0
    assert kept[-1] == 200
    found = list(widths(small).values())
    assert found == ([1, *kept[1:]] if ragged else [kept[1], kept[1], 200, 200])
    none = nspec.NeuronMasks({"none": {name: mask & False for name, mask in masks["de-en"].items()}})
    nspec.specialize(nspec.despecialize(model), none)
    with nspec.task(model, "none"):
        want = logits(model)
    small = nspec.merge(model, "none", compact=True)
    torch.testing.assert_close(logits(small), want, rtol=0, atol=1e-12)
    assert set(widths(small).values()) == {1}


def test_a_ragged_model_of_transformers_is_not_saved_as_one_that_nobody_loads(tmp_path: Path) -> None:
    model = nspec.specialize(m2m100().eval(), masks_for(m2m100()))
    small: Any = nspec.merge(model, "en-de", compact=True, ragged=True)
    for part in (small, small.model.encoder):
        with pytest.raises(ValueError, match=r"ragged=True: its layers differ in width.*torch.save"):
            part.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    assert torch.equal(logits(pickle.loads(pickle.dumps(small))), logits(small))
    nspec.specialize(small, masks_of(small))
    with pytest.raises(ValueError, match=r"builds model.encoder.layers.0.fc1 as \[200, 24\] from its configuration"):
        nspec.merge(small, "a", compact=True)


def test_widths_are_rounded_up_but_not_beyond_the_dense_model() -> None:
    model = nspec.specialize(m2m100(d_ff=201).eval(), masks_for(m2m100(d_ff=201)))
    most = by_half(masks_for(m2m100(d_ff=201)), "en-de")
    for multiple in (8, 200, 1000):
        small: Any = nspec.merge(model, "en-de", compact=True, multiple=multiple)
        want = {half: min(201, -(-most[half] // multiple) * multiple) for half in ("encoder", "decoder")}
        assert {half: getattr(small.config, f"{half}_ffn_dim") for half in want} == want
        with nspec.task(model, "en-de"):
            torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-12)


def test_layers_without_masks_and_those_of_their_option_stay_as_wide_as_they_are() -> None:
    masks = masks_for(m2m100())
    for part, encoder in (("encoder", by_half(masks, "en-de")["encoder"]), ("encoder.layers.0", 200)):
        model = nspec.specialize(m2m100().eval(), masks.only([part]))
        small: Any = nspec.merge(model, "en-de", compact=True)
        assert list(widths(small).values()) == [encoder, encoder, 200, 200]
        assert (small.config.encoder_ffn_dim, small.config.decoder_ffn_dim) == (encoder, 200)
        with nspec.task(model, "en-de"):
            torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-12)


def test_a_constant_is_given_by_a_neuron_where_a_stock_model_has_no_bias_for_it(tmp_path: Path) -> None:
    t5 = FAMILIES["T5"]
    family = t5._replace(options=t5.options | {"feed_forward_proj": "sigmoid"})  # 0.5 of neurons that are masked
    model, given = make(family).eval(), inputs(family)
    masks = masks_of(model)
    nspec.specialize(model, masks)
    want = compared(family, model, given, "a")
    small: Any = nspec.merge(model, "a", compact=True)
    torch.testing.assert_close(compared(family, small, given), want, rtol=0, atol=1e-12)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    torch.testing.assert_close(compared(family, again, given), want, rtol=0, atol=1e-12)
    assert set(widths(again).values()) == {by_half(masks)["all"] + 1}
    assert {again.config.d_ff, small.encoder.config.d_ff, small.decoder.config.d_ff} == {by_half(masks)["all"] + 1}
    ragged: Any = nspec.merge(model, "a", compact=True, ragged=True)
    torch.testing.assert_close(compared(family, ragged, given), want, rtol=0, atol=1e-12)
    assert ragged.encoder.block[0].layer[1].DenseReluDense.wo.bias is not None


def test_a_bias_is_added_to_a_module_of_one_s_own_and_the_block_may_stand_in_two_places() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 8, bias=False)).double()
    model = nn.Sequential(block, nn.Tanh(), block).eval()
    masks, x = masks_of(model), torch.randn(3, 8, dtype=torch.float64)
    nspec.specialize(model, masks, activation_dropout=0)
    small: Any = nspec.merge(model, "a", compact=True)
    with nspec.task(model, "a"):
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert small[0] is small[2]
    assert (
        small[0][0].out_features == small[0][3].in_features == len(small[0][0].weight) == int(masks["a"]["0.0"].sum())
    )
    assert small[0][3].bias.requires_grad


def test_layers_of_torch_are_compacted_each_to_its_own_width() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 72, dropout=0.0, batch_first=True, activation="gelu").double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    masks, x = masks_of(model), torch.randn(2, 5, 16, dtype=torch.float64)
    nspec.specialize(model, masks)
    small: Any = nspec.merge(model, "a", compact=True)
    with nspec.task(model, "a"), torch.no_grad():
        torch.testing.assert_close(small(x, x), model(x, x), rtol=0, atol=1e-12)
    for name, mask in masks["a"].items():
        assert small.get_submodule(name).out_features == int(mask.sum())


def test_a_model_of_two_configurations_changes_each_for_itself(tmp_path: Path) -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 72,
    }
    halves = BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    model: Any = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves)).double().eval()
    masks, ids = masks_of(model), torch.arange(6)[None] + 4
    kept = [int(mask.sum()) for mask in masks["a"].values()]
    assert kept[0] != kept[1]
    small: Any = nspec.merge(nspec.specialize(model, masks), "a", compact=True)
    small.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert list(widths(again).values()) == kept
    with nspec.task(model, "a"):
        want = logits(model, input_ids=ids, decoder_input_ids=ids)
    torch.testing.assert_close(logits(again, input_ids=ids, decoder_input_ids=ids), want, rtol=0, atol=1e-12)


class Wrapped(nn.Module):
    """A model in another, with a block whose code does not run on hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = m2m100().eval()
        self.embedding, self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 25), nn.Linear(25, 8)
        self.double()

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        hidden = self.embedding(x) * kept
        return hidden + self.b(torch.tanh(self.a(hidden)) * 2)


def test_a_model_that_was_wrapped_since_is_compacted_and_its_configuration_is_changed() -> None:
    model = Wrapped()
    masks = masks_for(model.inner)
    nspec.specialize(model.inner, masks)
    small: Any = nspec.merge(model, "en-de", compact=True)
    with nspec.task(model, "en-de"):
        torch.testing.assert_close(logits(small.inner), logits(model.inner), rtol=0, atol=1e-12)
    assert small.inner.config.encoder_ffn_dim == by_half(masks, "en-de")["encoder"]


def test_a_block_whose_code_does_not_run_alone_wants_a_batch() -> None:
    model = Wrapped()
    nspec.specialize(model, masks_of(model, layers=[("a", "b")]), layers=[("a", "b")])
    with pytest.raises(ValueError, match=r"^a: what its masked neurons give is not known.*compact=True, batch=batch"):
        nspec.merge(model, "a", compact=True)
    given = {"x": torch.randn(2, 3, dtype=torch.float64), "kept": torch.ones(2, 1, dtype=torch.float64)}
    small = nspec.merge(model, "a", compact=True, batch=given)
    with nspec.task(model, "a"):
        torch.testing.assert_close(small(**given), model(**given), rtol=0, atol=1e-12)
    assert small.a.out_features < 25


class TwoInOne(nn.Module):
    """Two blocks in the code of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)
        self.gate_up_proj, self.down_proj = nn.Linear(8, 48), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(torch.sigmoid(self.fc1(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y: Tensor = self.down_proj(torch.sigmoid(gate) * up)
        return y


def test_blocks_of_one_module_are_told_apart_and_packed_projections_have_biases() -> None:
    torch.manual_seed(0)
    model = TwoInOne().double()
    masks, x = masks_of(model), torch.randn(3, 8, dtype=torch.float64)
    nspec.specialize(model, masks)
    small: Any = nspec.merge(model, "a", compact=True)
    with nspec.task(model, "a"):
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    kept = int(masks["a"]["gate_up_proj"].sum())
    assert (small.gate_up_proj.out_features, small.down_proj.in_features) == (2 * kept, kept)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.norm(torch.relu(self.fc1(x))))
        return y


def tied() -> nn.Module:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2)))
    model[1][2].weight = model[0][2].weight
    return model


@pytest.mark.parametrize(
    ("make_model", "said"),
    [
        (
            lambda: make(FAMILIES["BLOOM"]),
            r"BloomForCausalLM has no option for the width of .*dense_h_to_4h.*ragged=True",
        ),
        (tied, r"^0.2.weight and 1.2.weight are one parameter.*merge without compact=True"),
        (Normed, r"^fc1: what the layer does between fc1 and fc2 is not elementwise: it calls layer_norm"),
    ],
)
def test_what_cannot_be_compacted_is_named_with_the_way_out(make_model: Any, said: str) -> None:
    model = make_model()
    nspec.specialize(model, masks_of(model))
    with pytest.raises(ValueError, match=said):
        nspec.merge(model, "a", compact=True)


def test_where_no_neuron_is_masked_compact_is_an_error() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model), "update")
    with pytest.raises(ValueError, match=r"mode 'update', whose forward pass is dense.*without compact=True"):
        nspec.merge(model, "en-de", compact=True)
    nspec.finetune(nspec.despecialize(model), masks_for(model))
    with pytest.raises(ValueError, match=r"nspec.finetune.*nothing to drop: merge it without compact=True"):
        nspec.merge(model, "en-de", compact=True)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ragged": True}, ValueError, "ragged is an option of compact=True"),
        ({"multiple": 8}, ValueError, "multiple is an option of compact=True"),
        ({"compact": True, "multiple": 0}, ValueError, "multiple is 0, expected 1 or more"),
        ({"compact": True, "multiple": 1.5}, TypeError, "multiple is 1.5, expected a whole number"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: Any, error: type[Exception], said: str) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
    nspec.specialize(model, masks_of(model))
    with pytest.raises(error, match=said):
        nspec.merge(model, "a", **options)
