"""Both engines find the same translations, with the same options and the same limit for each line."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nspec.mt.config import ModelConfig
from nspec.mt.model import build_model
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.ctranslate2_search import why_not
from nspec.mt.scoring.engine import CTRANSLATE2, choose
from nspec.mt.scoring.translate import Translator
from nspec.mt.text import vocabulary
from nspec.mt.text.config import TokenizerConfig

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["ab", "ba", "aab", "bba", "abab"]
Build = Callable[[int], Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabulary")
    model = vocabulary.train_sentencepiece(["ab ba aab bba abab"] * 9, TokenizerConfig(vocab_size=13))
    vocabulary.export_tokenizer(model, ["de", "en"], folder)
    return vocabulary.load_tokenizer(folder)


@pytest.fixture(scope="module")
def build(tokenizer: Any) -> Build:
    """Random models that end some sentences early and some never."""

    def made(seed: int) -> Any:
        sizes = ModelConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1, max_positions=64)
        model = build_model(sizes, tokenizer, seed).eval()
        assert model.config.vocab_size == len(tokenizer), "rows that no token has would count in transformers alone"
        for parameter in model.parameters():
            parameter.data *= 2.5
        return model

    return made


def lines(count: int) -> list[str]:
    chance = random.Random(1)
    return [" ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 14))) for _ in range(count)]


def translate(model: Any, tokenizer: Any, decode: DecodeConfig, text: list[str], engine: str) -> list[str]:
    return list(Translator(model, tokenizer, decode, engine=engine).translate(text, "en-de"))


def test_x(build, tokenizer):
    text = lines(200)
    for seed in (1, 2, 3):
        for options in [{"beam": 1}, {"beam": 2}, {"beam": 5}, {"beam": 5, "length_penalty": 0.0}, {"beam": 5, "length_penalty": -1.0},{"beam": 5, "length_penalty": 2.0},  {"beam": 4, "max_length_ratio": 0.1}, {"beam": 1, "no_repeat_ngram_size": 2}, {"beam": 1, "repetition_penalty": 1.5}]:
            d = DecodeConfig(**options)
            a, b = (translate(build(seed), tokenizer, d, text, e) for e in ("transformers", "ctranslate2"))
            print(seed, options, sum(x != y for x, y in zip(a, b)), sum(len(x) for x in a)/200, len(set(a)))
