from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from nspec.mt.config import ModelConfig
from nspec.mt.model import build_model
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.search import SpecialTokens, check_beam, search
from nspec.mt.scoring.translate import Translator
from nspec.mt.text import vocabulary
from nspec.mt.text.config import TokenizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["ab", "ba", "aab"]
LINES = [" ".join(WORDS[i % 3] for i in range(length)) for length in range(1, 12)]

Build = Callable[[int], Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabulary")
    model = vocabulary.train_sentencepiece(["ab ba aab bba"] * 9, TokenizerConfig(vocab_size=12))
    vocabulary.export_tokenizer(model, ["de", "en"], folder)
    return vocabulary.load_tokenizer(folder)


@pytest.fixture(scope="module")
def build(tokenizer: Any) -> Build:
    """Random models that do not stop at once, in float64."""

    def made(seed: int) -> Any:
        sizes = ModelConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1, max_positions=64)
        model = build_model(sizes, tokenizer, seed).double().eval()
        for parameter in model.parameters():
            parameter.data *= 2.5
        return model

    return made


def encoded(tokenizer: Any, line: str) -> list[int]:
    """An English source, as the model gets it."""
    tag = tokenizer.convert_tokens_to_ids("__en__")
    return [tag, *vocabulary.encode(tokenizer, [line])[0], tokenizer.eos_token_id]


def translate(model: Any, tokenizer: Any, decode: DecodeConfig, lines: list[str] = LINES) -> list[str]:
    return list(Translator(model, tokenizer, decode).translate(lines, "en-de"))


def hostile(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Every field of a generation configuration, with a value that changes or breaks a search which reads it."""
    word = tokenizer.convert_tokens_to_ids("▁ab")
    meant: dict[str, Any] = {
        "max_new_tokens": 3, "min_length": 30, "min_new_tokens": 30, "early_stopping": "never", "num_beams": 3,
        "do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "length_penalty": -5.0,
        "no_repeat_ngram_size": 1, "bad_words_ids": [[word]], "forced_eos_token_id": word, "suppress_tokens": [word],
        "begin_suppress_tokens": [word], "sequence_bias": [[[word], 99.0]], "eos_token_id": word,
        "encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 9.0, "num_return_sequences": 2,
        "exponential_decay_length_penalty": (2, 3.0), "diversity_penalty": 1.0, "num_beam_groups": 2, "max_time": 0.0,
        "decoder_start_token_id": word, "guidance_scale": 3.0, "return_dict_in_generate": True, "top_k": 1,
        "forced_bos_token_id": word, "cache_implementation": "static", "custom_field_of_a_model": 1,
    }  # fmt: skip
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    return {name: meant.get(name, 3) for name in {*fields, *meant}}


@pytest.mark.parametrize("beam", [1, 3])
def test_the_search_follows_decode_and_nothing_of_the_models_generation_config(
    build: Build, tokenizer: Any, beam: int
) -> None:
    decode, lines = DecodeConfig(beam=beam, length_penalty=0.5), LINES[2:4]
    model = build(1)
    expected = translate(model, tokenizer, decode, lines)
    own = model.generation_config
    clean = copy.deepcopy(vars(own))
    fields = hostile(model, tokenizer)
    assert len(fields) > 60
    for name, value in fields.items():
        setattr(own, name, value)
        assert translate(model, tokenizer, decode, lines) == expected, name
        assert model.generation_config is own
        assert getattr(own, name) == value, f"{name} was changed"
        if name in clean:
            setattr(own, name, clean[name])
        else:
            delattr(own, name)
    for name, value in fields.items():
        setattr(own, name, value)
    assert translate(model, tokenizer, decode, lines) == expected


def test_the_models_settings_are_back_after_an_error(
    build: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(1)
    own = model.generation_config
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        translate(model, tokenizer, DecodeConfig())
    assert model.generation_config is own


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": -1.0},
        {"max_length_ratio": 0.1},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_line_comes_out_alike_alone_and_in_any_batch(
    build: Build, tokenizer: Any, beam: int, options: dict[str, Any]
) -> None:
    decode = DecodeConfig(beam=beam, **options)
    for seed in (1, 2):
        model = build(seed)
        alone = [text for line in LINES for text in translate(model, tokenizer, decode, [line])]
        for batch_tokens in (4096, 25):
            assert translate(model, tokenizer, dataclasses.replace(decode, batch_tokens=batch_tokens)) == alone


@pytest.mark.parametrize("beam", [1, 4])
def test_a_line_alone_is_what_generate_gives_with_its_limit(build: Build, tokenizer: Any, beam: int) -> None:
    model = build(2)
    for line, text in zip(LINES, translate(model, tokenizer, DecodeConfig(beam=beam))):
        source = torch.tensor([encoded(tokenizer, line)])
        limit = min(2 * source.shape[1] + 10, 64)
        spare = list(range(len(tokenizer), model.get_input_embeddings().num_embeddings))
        tag = tokenizer.convert_tokens_to_ids("__de__")
        options: dict[str, Any] = {"num_beams": beam, "early_stopping": beam > 1, "max_length": 1 + limit}
        ids = model.generate(source, forced_bos_token_id=tag, suppress_tokens=spare, **options)[0]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_all_lines_of_a_batch_are_searched_in_one_call(
    build: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = build(1), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: (calls.append(1), generate(**options))[1])
    translate(model, tokenizer, DecodeConfig(beam=2))
    assert len(calls) == 1


def tokens(model: Any, tokenizer: Any, decode: DecodeConfig) -> list[list[int]]:
    """The words of each translation: its token ids without the tag."""
    tag, spare = tokenizer.convert_tokens_to_ids("__de__"), list(range(len(tokenizer), model.lm_head.out_features))
    special = SpecialTokens(tokenizer.eos_token_id, tag, tokenizer.eos_token_id, tokenizer.pad_token_id, spare)
    found = []
    for line in LINES[::3]:
        source = torch.tensor([encoded(tokenizer, line)])
        (ids,) = search(model, source, torch.ones_like(source), [30], decode, special)
        assert ids[0] == tag
        found.append(ids[1:])
    return found


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_of_the_forbidden_size_comes_twice(build: Build, tokenizer: Any, beam: int, size: int) -> None:
    def repeats(ids: list[int]) -> bool:
        grams = [tuple(ids[i : i + size]) for i in range(len(ids) + 1 - size)]
        return len(set(grams)) < len(grams)

    assert any(map(repeats, tokens(build(1), tokenizer, DecodeConfig(beam=beam))))
    held = tokens(build(1), tokenizer, DecodeConfig(beam=beam, no_repeat_ngram_size=size))
    assert not any(map(repeats, held))
    assert any(0 < len(ids) < 29 for ids in held), "a sentence can end: the </s> that starts the decoder is no word"


@pytest.mark.parametrize("beam", [1, 3])
def test_a_repetition_penalty_makes_translations_repeat_less(build: Build, tokenizer: Any, beam: int) -> None:
    def distinct(penalty: float) -> float:
        found = tokens(build(1), tokenizer, DecodeConfig(beam=beam, repetition_penalty=penalty))
        return sum(len(set(ids)) / len(ids) for ids in found if ids)

    assert distinct(5.0) > distinct(1.0)


def test_a_beam_wider_than_the_vocabulary_allows_is_an_error(build: Build, tokenizer: Any) -> None:
    check_beam(len(tokenizer) // 2, len(tokenizer))
    with pytest.raises(ValueError, match="a beam of 500 needs a vocabulary of at least 1000"):
        Translator(build(1), tokenizer, DecodeConfig(beam=500))


def test_a_limit_beyond_all_numbers_is_that_of_the_model(build: Build, tokenizer: Any) -> None:
    longest, beyond = (DecodeConfig(beam=1, max_length_ratio=ratio) for ratio in (64, 1e308))
    assert translate(build(1), tokenizer, beyond) == translate(build(1), tokenizer, longest)
