"""A converted model that computes something else than the model is found, whatever the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, Family
from test_families import llama, of, specialised

import nspec
from nspec.serving import ctranslate2 as converter
from nspec.serving.same_scores import check_scores

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")


def plain(family: Family) -> tuple[Any, Any]:
    """A random model without tasks, and its tokenizer."""
    model, _, tokenizer = specialised(family)
    return nspec.despecialize(model), tokenizer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"hidden_act": "gelu"}),
        ("Falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("GPT2", {"layer_norm_epsilon": 0.1}),
    ],
)
def test_options_that_a_converter_passes_by_are_found(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    converter.convert(*plain(of(name)), tmp_path / "out")
    model, tokenizer = plain(of(name, **options))
    with pytest.raises(
        ValueError, match="is another model: log-probabilities of 40 tokens are off by .* and spread by"
    ):
        converter.convert(model, tokenizer, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["T5, gated-gelu", "Llama"])
def test_weights_of_another_model_are_found_and_rounded_ones_taken(name: str, tmp_path: Path) -> None:
    model, tokenizer = plain(of(name))
    for quantization in (None, "int8", "bfloat16"):
        converter.convert(model, tokenizer, folder := tmp_path / str(quantization), quantization=quantization)
        assert check_scores(model, folder, quantization) == ""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1, 0))
    for quantization in (None, "int8", "bfloat16"):
        assert "are off by" in check_scores(model, tmp_path / str(quantization), quantization)


def test_a_window_of_attention_is_refused_unless_no_text_is_longer(tmp_path: Path) -> None:
    """What is converted has none, or another one, which shows on texts that are longer."""
    windowed = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    for number, family in enumerate(
        [of("Qwen2", **windowed), of("Qwen3", **windowed), llama("Mistral", sliding_window=16)]
    ):
        model, tokenizer = plain(family)
        with pytest.raises(ValueError, match="is over a window of 16 tokens, and that of what CTranslate2"):
            converter.convert(model, tokenizer, tmp_path / "no")
        model.config.sliding_window = model.config.max_position_embeddings  # as the message says
        converter.convert(model, tokenizer, tmp_path / str(number))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["T5, gated-gelu", "Llama", "Gemma2"])
def test_the_model_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    """Converters of language models take the layers out of what they are given."""
    model, tokenizer = plain(FAMILIES[name]._replace(options=of(name).options))
    before, config, modules = model.state_dict(), model.config.to_dict(), [name for name, _ in model.named_modules()]
    weights = {key: value.clone() for key, value in before.items()}
    for quantization in (None, "int8"):
        try:
            converter.convert(model, tokenizer, tmp_path / str(quantization), quantization=quantization)
        except ValueError:
            assert name == "Gemma2"
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
