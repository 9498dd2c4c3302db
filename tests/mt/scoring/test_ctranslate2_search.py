"""Both engines find the same translations, with the same options and the same limit for each line."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch

import nspec
from nspec.baselines import adapters
from nspec.mt.config import ModelConfig
from nspec.mt.model import build_model
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.ctranslate2_search import why_not
from nspec.mt.scoring.engine import CTRANSLATE2, TRANSFORMERS, Engine, choose
from nspec.mt.scoring.search import SpecialTokens, TransformersSearch
from nspec.mt.scoring.translate import Translator, choose_for, converted
from nspec.mt.text import vocabulary
from nspec.mt.text.config import TokenizerConfig

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = (TRANSFORMERS, CTRANSLATE2)
DRAWN = random.Random(0)
WORDS = ["".join(DRAWN.choice("abcdefghijklmnopqrst") for _ in range(DRAWN.randint(2, 6))) for _ in range(150)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabulary")
    model = vocabulary.train_sentencepiece([" ".join(WORDS)] * 9, TokenizerConfig(vocab_size=205))
    vocabulary.export_tokenizer(model, ["de", "en"], folder)
    return vocabulary.load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A random one that ends some sentences early and some never, and chooses no special token."""
    sizes = ModelConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1, max_positions=64)
    found = build_model(sizes, tokenizer, 1).eval()
    assert found.config.vocab_size == len(tokenizer), "rows that no token has would count in transformers alone"
    for parameter in found.parameters():
        parameter.data *= 2.5
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.all_special_ids], bias[tokenizer.eos_token_id] = -30.0, 0.0
    found.lm_head.bias = torch.nn.Parameter(bias)
    return found


def lines(count: int) -> list[str]:
    chance = random.Random(1)
    return [" ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 9))) for _ in range(count)]


def translate(model: Any, tokenizer: Any, decode: DecodeConfig, text: list[str], engine: str) -> list[str]:
    return list(Translator(model, tokenizer, decode, engine=engine).translate(text, "en-de"))


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 1},
        {"beam": 4},
        {"beam": 4, "length_penalty": 0.0},
        {"beam": 3, "length_penalty": -1.0},
        {"beam": 4, "max_length_ratio": 0.1},
        {"beam": 1, "no_repeat_ngram_size": 2},
        {"beam": 1, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_the_translations_are_the_same(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    text = lines(60)
    decode = DecodeConfig(**({"max_length_ratio": 0.5} | options))
    transformers, ctranslate2 = (translate(model, tokenizer, decode, text, name) for name in ENGINES)
    assert ctranslate2 == transformers
    assert len(set(transformers)) > 25


def test_directions_of_a_specialised_model_come_without_a_word(model: Any, tokenizer: Any) -> None:
    """No layer of it runs: CTranslate2 has the merged models."""
    layers = [name for name, _ in model.named_modules() if name.endswith("fc1")]
    sizes = {"en-de": 20, "de-en": 21}
    kept = {task: {layer: torch.arange(32) < size for layer in layers} for task, size in sizes.items()}
    special = nspec.specialize(copy.deepcopy(model), nspec.NeuronMasks(kept))
    search = Translator(special, tokenizer, DecodeConfig(beam=1, max_length_ratio=0.5), engine="ctranslate2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for task in list(sizes) * 5:
            assert len(list(search.translate(lines(2), task))) == 2


def test_those_that_differ_had_an_end_among_the_first_words_and_are_as_good(model: Any, tokenizer: Any) -> None:
    """The one known difference: CTranslate2 keeps a translation of no word only where it is the best first step."""
    sources, decode, special = encoded(tokenizer, lines(120)), DecodeConfig(beam=4), special_tokens(tokenizer)
    limits = [len(source) // 3 + 8 for source in sources]
    eager = copy.deepcopy(model)
    firsts = [logits(model, special, source, [])[0] for source in sources]
    gaps = [first.topk(2).values[1] - first[special.end] for first in firsts]
    eager.lm_head.bias.data[special.end] = torch.stack(gaps).median()
    found = [
        search(sources, limits, decode, special) for search in (TransformersSearch(eager), converted(eager, tokenizer))
    ]
    differing = [i for i in range(len(sources)) if found[0][i] != found[1][i]]
    assert 0 < len(differing) < 0.25 * len(sources)
    better = []
    for i in differing:
        first = logits(eager, special, sources[i], [])[0]
        assert 0 < int((first > first[special.end]).sum()) < decode.beam
        theirs, ours = (score(eager, special, sources[i], rows[i], limits[i]) for rows in found)
        better.append(ours - theirs)  # nats a token, by the model in transformers
    assert min(better) > -0.3
    assert sum(better) > 0


def encoded(tokenizer: Any, text: list[str]) -> list[list[int]]:
    """English sources, as the model gets them."""
    tag, end = tokenizer.convert_tokens_to_ids("__en__"), tokenizer.eos_token_id
    return [[tag, *ids, end] for ids in vocabulary.encode(tokenizer, text)]


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Those of a translation into German."""
    end = tokenizer.eos_token_id
    return SpecialTokens(end, tokenizer.convert_tokens_to_ids("__de__"), end, tokenizer.pad_token_id)


def logits(model: Any, special: SpecialTokens, source: list[int], words: list[int]) -> torch.Tensor:
    """Those of each next word behind the tag, and of what comes after the last [words + 1, vocabulary]."""
    with torch.no_grad():
        given = torch.tensor([[special.start, special.tag, *words]])
        found: torch.Tensor = model(input_ids=torch.tensor([source]), decoder_input_ids=given).logits
    return found[0, 1:]


def score(model: Any, special: SpecialTokens, source: list[int], row: list[int], limit: int) -> float:
    """The log-probability of a translation over its length, its tag and end counted, as ``generate`` scores it."""
    words = row[1:] + ([special.end] if len(row) < limit else [])  # it ended, or was cut
    each = logits(model, special, source, words[:-1]).log_softmax(-1)
    return float(each[range(len(words)), words].sum()) / (len(words) + 1)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_line_comes_out_alike_alone_and_in_any_batch_in_order(model: Any, tokenizer: Any, beam: int) -> None:
    text = ["", *lines(12), "  \t"]
    decode = DecodeConfig(beam=beam, max_length_ratio=0.5)
    alone = [out for line in text for out in translate(model, tokenizer, decode, [line], CTRANSLATE2)]
    assert alone[0] == alone[-1] == ""
    for batch_tokens in (4096, 25):
        decode = DecodeConfig(beam=beam, max_length_ratio=0.5, batch_tokens=batch_tokens)
        assert translate(model, tokenizer, decode, text, CTRANSLATE2) == alone
    torch.set_num_threads(2)
    assert translate(model, tokenizer, decode, text, CTRANSLATE2) == alone


def test_a_line_that_ends_at_its_limit_in_a_batch_of_longer_ones_is_searched_again(model: Any, tokenizer: Any) -> None:
    decode = DecodeConfig(beam=3, max_length_ratio=0.5)
    search, limits = converted(model, tokenizer), []
    translate_batch = search.translator.translate_batch

    class Counting:
        def translate_batch(self, *given: Any, **options: Any) -> Any:
            limits.append((len(given[0]), options["max_decoding_length"]))
            return translate_batch(*given, **options)

    search.translator = Counting()
    special, sources = special_tokens(tokenizer), encoded(tokenizer, lines(8))
    own = [5 + i % 3 for i in range(8)]
    found = search(sources, own, decode, special)
    assert all(len(row) <= limit for row, limit in zip(found, own))
    assert limits[0] == (8, 7)
    assert {limit for _, limit in limits[1:]} <= {5, 6}
    assert len(limits) > 1


def test_what_it_searches_otherwise_is_not_left_to_it() -> None:
    cpu = torch.device("cpu")
    for name, value in (("no_repeat_ngram_size", 2), ("repetition_penalty", 1.5)):
        assert not why_not(DecodeConfig(**{"beam": 1, name: value}))
        own: Any = {"beam": 2, name: value}
        assert choose(DecodeConfig(**own), cpu).name == TRANSFORMERS
        with pytest.raises(ValueError, match=f"decode.engine is ctranslate2, which cannot be: .*decode.{name}"):
            choose(DecodeConfig(engine=CTRANSLATE2, **own), cpu)


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose(DecodeConfig(), cpu).name == CTRANSLATE2
    assert choose(DecodeConfig(engine=TRANSFORMERS), cpu) == Engine(TRANSFORMERS, "decode.engine says so")
    assert "where ctranslate2 is taken only if" in choose(DecodeConfig(), torch.device("cuda", 0)).reason
    assert choose(DecodeConfig(), cpu, "no way").reason == "no way"
    monkeypatch.setattr("nspec.serving.ctranslate2.why_not", lambda: "it is not installed")
    assert choose(DecodeConfig(), cpu) == Engine(TRANSFORMERS, "it is not installed")
    with pytest.raises(ValueError, match="which cannot be: it is not installed; take auto or transformers"):
        choose(DecodeConfig(engine=CTRANSLATE2), cpu)


def test_a_combined_direction_and_adapters_are_searched_by_transformers(model: Any) -> None:
    layers = {"model.encoder.layers.0.fc1": torch.arange(32) < 20}
    masked = nspec.specialize(copy.deepcopy(model), nspec.NeuronMasks({"en-de": layers, "de-en": layers}))
    assert choose_for(masked, DecodeConfig(), "en-de").name == CTRANSLATE2
    for task, pivot in (("en-de", "de"), ("de-fr", "")):
        assert "is combined from two directions" in choose_for(masked, DecodeConfig(), task, pivot).reason
    with pytest.raises(ValueError, match="is combined from two directions"):
        choose_for(masked, DecodeConfig(engine=CTRANSLATE2), "de-fr")
    adapters.add_adapters(adapted := copy.deepcopy(model), {"en-de": "all"}, 2)
    assert "adapters are layers of their own" in choose_for(adapted, DecodeConfig(), "en-de").reason
