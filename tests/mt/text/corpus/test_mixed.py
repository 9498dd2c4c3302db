"""Rows that name their languages: which keys are languages, which are not, and that both are said."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import Corpus, CorpusError, open_corpus, tasks_of

EN, DE = "one two three", "eins zwei drei"


def folder(path: Path, *rows: dict, **options: object) -> CorpusConfig:
    for split in ("train", "valid", "test"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(type="files", path=str(path), pivot="", **options)  # type: ignore[arg-type]


def opened(path: Path, *rows: dict, **options: object) -> Corpus:
    return open_corpus(folder(path, *rows, **options), 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"id": "train-17"},
        {"id": 17},
        {"no": "17", "url": "https://a.example/b", "src": "web", "ref": "text of a reference", "tag": "x"},
        {"ts": "2020-01-01T10:00", "cat": "news", "doc": "a b c", "score": 0.5, "text": "a b c", "meta": {"x": 1}},
        {"idx": "9", "tgt": "some words", "raw_Text": "some words", "lg": "en"},
    ],
)
def test_fields_beside_the_texts_are_left_out_and_said(tmp_path, caplog, extra):
    with caplog.at_level(logging.WARNING):
        corpus = opened(tmp_path, *[{**extra, "en": f"{EN} {n}", "de": f"{DE} {n}"} for n in range(20)])
    assert corpus.languages == ["de", "en"]
    assert corpus.pairs == [("de", "en")]
    assert len(corpus.notes) == len(caplog.messages) == 1
    assert "the languages are de, en; keys left out: " in corpus.notes[0]
    assert all(f"{key} (" in corpus.notes[0] for key in extra)


@pytest.mark.parametrize(
    "row",
    [
        {"en": EN, "id": "satu dua tiga"},
        {"en": EN, "de": DE, "id": "satu dua tiga"},
        {"en": "one", "id": "satu"},
        {"en": EN, "mt": "wieħed tnejn"},
        {"en": EN, "zh": "一二三", "ja": "一二三"},
        {"eng_Latn": EN, "xyz_Latn": "a b", "cmn": "一二三"},
        {"en": "dog", "de": "Hund", "fr": "chien"},
    ],
)
def test_languages_are_taken_whatever_their_codes(tmp_path, row):
    corpus = opened(tmp_path, *[row] * 10)
    assert corpus.languages == sorted(row)
    assert corpus.notes == []


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"en": EN, "de": DE, "mt": "eins zwei drei vier"}, "mt"),
        ({"en": "dog", "de": "Hund", "id": "x17"}, "id"),
    ],
)
def test_what_may_be_either_is_a_question(tmp_path, row, key):
    config = folder(tmp_path, *[row] * 10)
    message = f"train.jsonl, valid.jsonl: the key {key} may be a language or the name of a field (the first value is "
    with pytest.raises(CorpusError, match=re.escape(message) + ".*set corpus.languages"):
        open_corpus(config, 1)
    config.languages = ["en", "de"]
    assert open_corpus(config, 1).pairs == [("de", "en")]
    config.languages = ["en", "de", key]
    assert len(open_corpus(config, 1).pairs) == 3


def test_named_languages_are_taken_though_they_look_like_fields(tmp_path):
    rows = [{"en": EN, "src": "a b", "id": "x1"}] * 3
    corpus = opened(tmp_path, *rows, languages=["en", "src", "id"])
    assert corpus.pairs == [("en", "id"), ("en", "src"), ("id", "src")]
    assert corpus.notes == []


def test_the_files_of_a_folder_are_judged_together(tmp_path):
    config = folder(tmp_path, *[{"en": EN, "de": DE, "id": f"x{n}"} for n in range(30)])
    (tmp_path / "test.jsonl").write_text(json.dumps({"en": EN, "de": DE, "id": "row 1"}) + "\n")
    assert tasks_of(config, open_corpus(config, 1)) == ["de-en", "en-de"]


def test_keys_with_hyphens_are_codes_with_underscores(tmp_path):
    rows = [{"translation": {"en": "a", "zh-Hans": "b", "pt-br": "c"}}, {"en": "d", "zh_Hans": "e", "sr-Latn": "f"}]
    corpus = opened(tmp_path, *rows)
    assert corpus.languages == ["en", "pt_br", "sr_Latn", "zh_Hans"]
    assert list(corpus.read(("en", "zh_Hans"), "train")) == [("a", "b"), ("d", "e")]
    assert opened(tmp_path, *rows, languages=["en", "zh-Hans"]).pairs == [("en", "zh_Hans")]
    with pytest.raises(CorpusError, match=r"line 1: the keys pt-BR and pt_BR are the same language; keep one"):
        opened(tmp_path, {"en": "a", "pt-BR": "b", "pt_BR": "c"})


def test_null_is_a_text_that_is_not_there(tmp_path):
    corpus = opened(tmp_path, {"en": "a", "de": "b"}, {"en": "c", "de": None})
    assert list(corpus.read(("de", "en"), "train")) == [("b", "a")]
    assert corpus.skipped == {"empty side": 1}
