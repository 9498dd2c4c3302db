"""The corpus composed from CLDR: aligned, deterministic, disjoint, and the same whatever else was loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of

pytest.importorskip("babel", reason="Babel is not installed")

from nspec.mt.text.corpus.cldr import DEFAULT_LANGUAGES, shared_inventory
from nspec.mt.text.corpus.cldr_content import FRAMES, SLOT, Composer
from nspec.mt.text.corpus.cldr_render import INVISIBLE, Renderer

REPOSITORY = Path(__file__).resolve().parents[4]


def config(*languages: str, train: int = 300, valid: int = 40, test: int = 40, **options: object) -> CorpusConfig:
    sizes = {"train_sentences": train, "valid_sentences": valid, "test_sentences": test}
    return CorpusConfig(type="cldr", languages=list(languages), **sizes, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def default():
    return open_corpus(config(train=2000), 1)


def test_the_defaults_are_the_iwslt_languages_in_both_directions_and_20000_200_200_sentences():
    corpus = open_corpus(CorpusConfig(), 1)
    assert corpus.languages == ["fa", "pl", "ar", "he", "nl", "de", "it", "es", "en"]
    assert len(tasks_of(CorpusConfig(), corpus)) == 16
    assert [sum(1 for _ in corpus.read(("de", "en"), split)) for split in ("train", "valid", "test")] == [
        20000,
        200,
        200,
    ]


def test_every_pair_says_the_same_contents(default):
    english = {
        other: [pair[0 if other > "en" else 1] for pair in default.read(tuple(sorted(("en", other))), "train")]
        for other in default.languages
        if other != "en"
    }
    assert len(set(map(tuple, english.values()))) == 1
    assert len(set(english["de"])) == len(english["de"]) == 2000


def test_numbers_agree_between_languages(default):
    """Rounding, clocks and date order differ; a whole number of a quantity does not."""
    number = re.compile(r"(?<![\w.,:])\d+(?![\w.,:]*\d)")
    checked = 0
    for german, english in default.read(("de", "en"), "train"):
        if re.fullmatch(r"[^:]*: \d+ (?:kilograms|meters|liters|euros|pixels).*", english):
            checked += 1
            assert sorted(number.findall(german)) == sorted(number.findall(english)), (german, english)
    assert checked > 5


def test_splits_share_no_english_text_even_across_seeds(default):
    other = open_corpus(config("de", train=2000, seed=2), 2)
    texts = {
        (corpus.seed, split): {english for _, english in corpus.read(("de", "en"), split)}
        for corpus in (default, other)
        for split in ("train", "valid", "test")
    }
    train = texts[1, "train"] | texts[2, "train"]
    valid = texts[1, "valid"] | texts[2, "valid"]
    test = texts[1, "test"] | texts[2, "test"]
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert texts[1, "train"] != texts[2, "train"]


def test_sentences_are_clean_and_of_sensible_length(default):
    for language in ("fa", "ar", "he", "de"):
        for pair in default.read(tuple(sorted((language, "en"))), "train"):
            for text in pair:
                assert text == unicodedata.normalize("NFC", text)
                assert text == " ".join(text.split())
                assert not INVISIBLE.search(text)
    lengths = [len(english.split()) for _, english in default.read(("de", "en"), "train")]
    assert min(lengths) >= 4
    assert max(lengths) <= 20


def test_words_are_translated_and_not_only_numbers(default):
    words = {
        word for _, english in default.read(("de", "en"), "train") for word in re.findall(r"[^\W\d_]{3,}", english)
    }
    assert len(words) > 1200
    same = sum(german == english for german, english in default.read(("de", "en"), "train"))
    assert same < 40
    assert any("وقت" in persian and "Time" in english for english, persian in default.read(("en", "fa"), "train"))


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(default):
    small = list(open_corpus(config("de", train=100), 1).read(("de", "en"), "train"))
    assert small == list(default.read(("de", "en"), "train"))[:100]


@pytest.mark.parametrize("order", [["pl", "de", "he"], ["he", "pl", "de"]])
def test_text_does_not_depend_on_the_languages_loaded_before(default, order):
    """Babel shares resolved aliases between locales: quarters in German came out in Polish."""
    corpus = open_corpus(config(*order), 1)
    for language in order:
        pair = tuple(sorted((language, "en")))
        assert list(corpus.read(pair, "train")) == list(default.read(pair, "train"))[:300]


def test_the_same_seed_gives_the_same_text_in_processes_with_other_hash_seeds(default):
    script = (
        "from nspec.run.config import CorpusConfig; from nspec.mt.text.corpus import open_corpus\n"
        "c = open_corpus(CorpusConfig(languages=['fa', 'de'], train_sentences=300, valid_sentences=40,"
        " test_sentences=40), 1)\n"
        "import hashlib; print(c.fingerprint())\n"
        "print(hashlib.sha256(repr([list(c.read(p, s)) for p in (('en', 'fa'), ('de', 'en'))"
        " for s in ('train', 'valid', 'test')]).encode()).hexdigest())"
    )
    outputs = set()
    for seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(result.stdout)
    assert len(outputs) == 1


def test_the_fingerprint_tells_seeds_sizes_and_languages_apart():
    prints = [
        open_corpus(config("de"), 1).fingerprint(),
        open_corpus(config("de"), 2).fingerprint(),
        open_corpus(config("de", train=301), 1).fingerprint(),
        open_corpus(config("nl"), 1).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert prints[0] == open_corpus(config("de"), 1).fingerprint()


def test_every_slot_can_be_said_in_every_default_language():
    composer = Composer(shared_inventory(), "all")
    renderers = [Renderer(code) for code in DEFAULT_LANGUAGES]
    slots = {slot for _, frames in FRAMES.values() for frame in frames for slot in SLOT.findall(frame)}
    for slot in slots:
        for _ in range(20):
            fragment = getattr(composer, "_" + slot)()
            for renderer in renderers:
                text = renderer.say(["", ""], [fragment])
                assert text, (slot, fragment, renderer.locale)
                assert "{" not in text, (slot, fragment, renderer.locale)


def test_quantities_use_the_short_form_where_a_language_has_no_long_one():
    assert Renderer("fa").unit(3, "duration-hour", "long") == "3 ساعت"
    assert Renderer("nl").unit(3, "duration-hour", "long") == "3 uur"


def test_the_plural_form_of_money_is_that_of_the_amount_as_written():
    polish = Renderer("pl")
    assert polish.money(487.75, "ISK") == "488 koron islandzkich"
    assert polish.money(12.5, "PLN") == "12,50 złotego polskiego"
    assert polish.money(5, "PLN") == "5 złotych polskich"


def test_plural_rules_lists_and_punctuation_are_those_of_the_language():
    polish = Renderer("pl")
    assert [polish.unit(n, "duration-hour", "long") for n in (1, 3, 5)] == ["1 godzina", "3 godziny", "5 godzin"]
    assert polish.relative("month", -5) == "5 miesięcy temu"
    three = tuple(("territory", code) for code in ("DE", "FR", "IT"))
    assert Renderer("de").listing("or", three) == "Deutschland, Frankreich oder Italien"
    assert Renderer("en").listing("standard", three) == "Germany, France, and Italy"
    assert Renderer("ar").say(["", ", ", "; ", ""], [three[0], three[1], three[2]]) == "ألمانيا، فرنسا؛ إيطاليا"
    assert Renderer("ja").say(["", ", ", ""], three[:2]) == "ドイツ、フランス"


def test_languages_of_other_scripts_and_varieties_work():
    corpus = open_corpus(config("zh_Hans", "pt_BR", "sr_Latn", "hi", "ti"), 1)
    for pair in corpus.pairs:
        assert sum(1 for _ in corpus.read(pair, "train")) == 300


@pytest.mark.parametrize("code", ["xx", "qqq_Latn", "english"])
def test_an_unknown_locale_is_named(code):
    with pytest.raises(CorpusError, match=f"no locale '{code}'"):
        open_corpus(config("de", code), 1)


def test_a_missing_library_is_an_error_with_the_line_that_installs_it(monkeypatch):
    for name in ("nspec.mt.text.corpus.cldr", "nspec.mt.text.corpus.cldr_render"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(ImportError, match=r'needs Babel; install it with: pip install "\.\[mt\]"'):
        open_corpus(config("de"), 1)
