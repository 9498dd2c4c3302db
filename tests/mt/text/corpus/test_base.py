"""Directions, language codes, clean-up and the options that all corpora share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of
from nspec.mt.text.corpus.base import AlignedCorpus, Corpus, clean, requested_languages, split_direction


class Pairs(Corpus):
    """A corpus that has the given pairs and no text."""

    def segments(self, pair: tuple[str, str], split: str) -> Iterator[tuple[str, str, str]]:
        return iter(())

    def identity(self) -> None:
        return None


class Aligned(AlignedCorpus):
    def identity(self) -> None:
        return None


def corpus_of(*pairs: str, config: CorpusConfig | None = None) -> Corpus:
    split = [split_direction(pair) for pair in pairs]
    languages = list(dict.fromkeys(code for pair in split for code in pair))
    return Pairs(config or CorpusConfig(), 1, languages, split)


def test_tasks_are_to_and_from_the_pivot():
    corpus = corpus_of("de-en", "en-fr", "de-fr")
    assert tasks_of(CorpusConfig(pivot="en"), corpus) == ["en-de", "de-en", "en-fr", "fr-en"]
    assert tasks_of(CorpusConfig(pivot="fr"), corpus) == ["fr-de", "de-fr", "fr-en", "en-fr"]


def test_without_a_pivot_tasks_are_all_pairs_both_ways():
    assert tasks_of(CorpusConfig(pivot=""), corpus_of("de-en", "de-fr")) == ["de-en", "en-de", "de-fr", "fr-de"]


def test_given_directions_are_taken_as_they_are():
    config = CorpusConfig(directions=["fr-de", "en-de"])
    assert tasks_of(config, corpus_of("de-en", "de-fr")) == ["fr-de", "en-de"]


def test_the_pivot_need_not_be_listed_beside_directions_either():
    config = CorpusConfig(languages=["de", "fr"], directions=["en-de", "fr-de"])
    assert requested_languages(config) == ["de", "fr", "en"]
    assert requested_languages(CorpusConfig(languages=["de", "fr"], directions=["fr-de"])) == ["de", "fr"]
    with pytest.raises(ValueError, match=r"needs en, which corpus.languages \(de, fr\) lacks"):
        requested_languages(CorpusConfig(languages=["de", "fr"], directions=["en-de"], pivot=""))


@pytest.mark.parametrize("direction", ["en", "en-en", "en-de-fr", "en-", "-", "e n-de", "en_de"])
def test_a_malformed_direction_is_quoted(direction):
    with pytest.raises(ValueError, match="is not a direction; expected two different language codes") as caught:
        tasks_of(CorpusConfig(directions=[direction]), corpus_of("de-en"))
    assert repr(direction) in str(caught.value)


def test_a_direction_that_the_corpus_lacks_is_named_with_what_it_has():
    with pytest.raises(CorpusError, match=r"no training data for de-fr: .*pairs with training data: de-en, en-fr"):
        tasks_of(CorpusConfig(directions=["fr-de"]), corpus_of("de-en", "en-fr"))
    with pytest.raises(CorpusError, match=r"the corpus has no it; it has de, en"):
        tasks_of(CorpusConfig(directions=["it-en"]), corpus_of("de-en"))


def test_a_pivot_that_the_corpus_lacks_is_named():
    with pytest.raises(CorpusError, match=r"corpus.pivot: the corpus has no en; it has de, fr"):
        tasks_of(CorpusConfig(), corpus_of("de-fr"))


def test_languages_without_the_pivot_are_left_out_unless_asked_for():
    corpus = corpus_of("de-en", "de-fr")
    assert tasks_of(CorpusConfig(), corpus) == ["en-de", "de-en"]
    with pytest.raises(CorpusError, match="no training data for en-fr"):
        tasks_of(CorpusConfig(languages=["de", "fr", "en"]), corpus)


def test_the_pivot_joins_the_languages_and_directions_bring_theirs():
    assert requested_languages(CorpusConfig(languages=["de", "fr", "de"])) == ["de", "fr", "en"]
    assert requested_languages(CorpusConfig(languages=["de", "fr"], pivot="")) == ["de", "fr"]
    assert requested_languages(CorpusConfig(directions=["de-fr", "fr-it"])) == ["de", "fr", "it"]
    assert requested_languages(CorpusConfig()) == []


def test_a_direction_outside_the_listed_languages_is_an_error():
    with pytest.raises(ValueError, match=r"needs it, which corpus.languages \(de, en\) lacks"):
        requested_languages(CorpusConfig(languages=["de", "en"], directions=["en-it"]))


@pytest.mark.parametrize("code", ["en-de", "", "d", "de en"])
def test_a_malformed_language_code_is_quoted(code):
    with pytest.raises(ValueError, match="is not a language code"):
        requested_languages(CorpusConfig(languages=["de", code]))


def test_hyphens_in_the_codes_of_options_are_underscores_in_the_run():
    config = CorpusConfig(languages=["pt-BR", "en"], pivot="pt-BR")
    assert requested_languages(config) == ["pt_BR", "en"]
    assert tasks_of(config, corpus_of("en-pt_BR", "de-en")) == ["pt_BR-en", "en-pt_BR"]
    config = CorpusConfig(directions=["en-zh-Hans", "pt-BR-en"])
    assert tasks_of(config, corpus_of("en-zh_Hans", "en-pt_BR")) == ["en-zh_Hans", "pt_BR-en"]


def test_text_is_composed_stripped_and_on_one_line():
    assert clean(" Cafe\u0301 \u00a0au\tlait\r\n\u2028 noir\u202f! ") == "Café au lait noir !"


def test_limits_take_nested_samples_that_are_the_same_for_every_pair():
    ids = [f"s{number}" for number in range(500)]
    texts = {code: {name: f"{code} {name}" for name in ids} for code in ("de", "en", "fr")}

    def sample(limit: int, pair: tuple[str, str], seed: int = 1) -> list[str]:
        config = CorpusConfig(train_sentences=limit)
        corpus = Aligned(config, seed, texts, {"train": ids, "valid": [], "test": []})
        return [first.split()[1] for first, _ in corpus.read(pair, "train")]

    small, large = sample(50, ("de", "en")), sample(200, ("de", "en"))
    assert len(small) == 50
    assert len(large) == 200
    assert set(small) < set(large)
    assert small == sorted(small, key=ids.index)
    assert small != ids[:50]
    assert small == sample(50, ("en", "fr"))
    assert small != sample(50, ("de", "en"), seed=2)


def test_only_the_training_text_follows_the_seed_of_the_run() -> None:
    ids = [str(number) for number in range(200)]
    texts = {"de": {name: f"d{name}" for name in ids}, "en": {name: f"e{name}" for name in ids}}

    def samples(seed: int, own: int = 1) -> dict[str, list[tuple[str, str]]]:
        config = CorpusConfig(train_sentences=20, valid_sentences=20, test_sentences=20, seed=own)
        corpus = Aligned(config, seed, texts, dict.fromkeys(("train", "valid", "test"), ids))
        return {split: list(corpus.read(("de", "en"), split)) for split in ("train", "valid", "test")}

    one, two, other = samples(1), samples(2), samples(1, own=2)
    assert [one[split] == two[split] for split in one] == [False, True, True]
    assert [one[split] == other[split] for split in one] == [True, False, False]


@pytest.mark.parametrize("limit", [6, 7, 1000])
def test_a_limit_above_the_corpus_takes_all_without_ranking_it(limit, monkeypatch):
    ids = [f"s{number}" for number in range(6)]
    texts = {code: {name: f"{code} {name}" for name in ids} for code in ("de", "en")}
    corpus = Aligned(CorpusConfig(train_sentences=limit), 1, texts, {"train": ids, "valid": [], "test": []})
    monkeypatch.setattr(Corpus, "_rank", lambda *_: pytest.fail("there is nothing to choose"))
    assert list(corpus.read(("de", "en"), "train")) == [(f"de {name}", f"en {name}") for name in ids]


def test_an_unknown_split_or_pair_is_an_error():
    corpus = corpus_of("de-en")
    with pytest.raises(ValueError, match="no split 'dev'; expected train, valid or test"):
        list(corpus.read(("de", "en"), "dev"))
    with pytest.raises(ValueError, match="no pair de-fr; it has de-en"):
        list(corpus.read(("de", "fr"), "train"))


def test_an_unknown_type_and_a_negative_size_are_errors():
    with pytest.raises(ValueError, match="corpus.type is 'opus'; expected one of cldr, files, hub"):
        open_corpus(CorpusConfig(type="opus"), 1)
    with pytest.raises(ValueError, match="corpus.test_sentences is -1"):
        open_corpus(CorpusConfig(test_sentences=-1), 1)
