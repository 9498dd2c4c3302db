"""Data sets that the datasets library loads: folders in place of the hub, and what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of
from nspec.mt.text.corpus.hub import INSTALL

ROWS: list[dict] = [
    {"translation": {"de": "Hallo  Welt", "en": "Hello world"}},
    {"translation": {"de": None, "en": "nothing"}},
    {"translation": {"de": "Guten Tag", "en": "Good day"}},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(
    folder: Path, subset: str, rows: list[dict] = ROWS, splits: tuple[str, ...] = ("train", "validation", "test")
):
    """Adds a subset (configuration) to a data set in a folder."""
    target = folder / subset
    target.mkdir(parents=True)
    for split in splits:
        (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["---", "configs:"]
    for found in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines += [f"- config_name: {found.name}", "  data_files:"]
        for path in sorted(found.iterdir()):
            lines += [f"  - split: {path.stem}", f"    path: {found.name}/{path.name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def config(folder: Path, *languages: str, **options: object) -> CorpusConfig:
    return CorpusConfig(type="hub", name=str(folder), languages=list(languages), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("subset", ["de-en", "en-de"])
def test_a_subset_is_found_in_either_order_of_the_codes(tmp_path, subset):
    write(tmp_path / "data", subset)
    settings = config(tmp_path / "data", "de")
    corpus = open_corpus(settings, 1)
    assert tasks_of(settings, corpus) == ["en-de", "de-en"]
    for split in ("train", "valid", "test"):
        assert list(corpus.read(("de", "en"), split)) == [("Hallo Welt", "Hello world"), ("Guten Tag", "Good day")]
    assert corpus.skipped == {"empty side": 3}


def test_a_pattern_names_the_subset(tmp_path):
    write(tmp_path / "data", "news_en_to_de")
    corpus = open_corpus(config(tmp_path / "data", "de", subset="news_{source}_to_{target}"), 1)
    assert len(list(corpus.read(("de", "en"), "test"))) == 2


def test_one_table_with_a_column_for_each_language_serves_every_pair(tmp_path):
    rows = [{"id": 1, "de": "eins", "en": "one", "fr": "un"}, {"id": 2, "de": "zwei", "en": "two", "fr": None}]
    write(tmp_path / "data", "default", rows, splits=("train", "dev", "devtest"))
    settings = config(tmp_path / "data", "de", "fr", subset="", test_split="devtest", valid_split="dev")
    corpus = open_corpus(settings, 1)
    assert corpus.pairs == [("de", "en"), ("en", "fr")]
    assert list(corpus.read(("de", "en"), "train")) == [("eins", "one"), ("zwei", "two")]
    assert list(corpus.read(("en", "fr"), "test")) == [("one", "un")]


def test_a_missing_subset_is_named_with_what_was_tried(tmp_path):
    write(tmp_path / "data", "de-en")
    with pytest.raises(CorpusError, match=r"no subset for en-fr: tried en-fr, fr-en .*Available: \['de-en'\]"):
        open_corpus(config(tmp_path / "data", "de", "fr"), 1)


def test_a_missing_split_is_named_with_those_there(tmp_path):
    write(tmp_path / "data", "de-en", splits=("train", "validation"))
    with pytest.raises(
        CorpusError, match=r"no test data for de-en: .* has the splits train, validation; corpus.test_split"
    ):
        open_corpus(config(tmp_path / "data", "de"), 1)


def test_a_missing_language_is_named_with_the_columns(tmp_path):
    write(tmp_path / "data", "de-en", [{"german": "eins", "english": "one"}])
    with pytest.raises(CorpusError, match=r"no text for de, en; expected translation.de .*; found german, english"):
        open_corpus(config(tmp_path / "data", "de"), 1)


def test_a_text_that_is_no_string_is_named_with_its_row(tmp_path):
    write(tmp_path / "data", "de-en", [{"de": "eins", "en": 1}])
    with pytest.raises(CorpusError, match=r"row 1 of train: the text for en is 1, expected a string"):
        open_corpus(config(tmp_path / "data", "de"), 1)


def test_languages_must_be_given(tmp_path):
    write(tmp_path / "data", "de-en")
    with pytest.raises(CorpusError, match="set corpus.languages or corpus.directions"):
        open_corpus(config(tmp_path / "data"), 1)
    corpus = open_corpus(config(tmp_path / "data", directions=["de-en"]), 1)
    assert corpus.languages == ["de", "en"]
    with pytest.raises(CorpusError, match="corpus.name is empty"):
        open_corpus(CorpusConfig(type="hub", languages=["de"]), 1)


def test_no_network_is_one_clear_error():
    with pytest.raises(CorpusError, match="data set nobody/nothing could not be loaded, is there a network") as caught:
        open_corpus(config(Path("nobody/nothing"), "de"), 1)
    assert "\n" not in str(caught.value)


def test_malformed_data_is_one_clear_error(tmp_path):
    write(tmp_path / "data", "de-en")
    (tmp_path / "data" / "de-en" / "train.jsonl").write_text("{{{\n")
    with pytest.raises(CorpusError, match="is malformed: .*JSON parse error") as caught:
        open_corpus(config(tmp_path / "data", "de"), 1)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_script_is_one_clear_error_and_is_not_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        CorpusError, match=r"data set .* is a program \(.*data\.py\), which is not run; write its rows"
    ) as caught:
        open_corpus(config(tmp_path / "data", "de"), 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("nested", [True, False])
def test_codes_with_hyphens_in_subsets_and_columns_are_found(tmp_path, nested):
    texts = {"en": "a", "zh-Hans": "b"}
    write(tmp_path / "data", "en-zh-Hans", [{"translation": texts} if nested else texts])
    settings = config(tmp_path / "data", "zh-Hans")
    corpus = open_corpus(settings, 1)
    assert tasks_of(settings, corpus) == ["en-zh_Hans", "zh_Hans-en"]
    assert list(corpus.read(("en", "zh_Hans"), "test")) == [("a", "b")]


def test_a_missing_library_is_an_error_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install .\.\[mt\]") as caught:
        open_corpus(config(tmp_path, "de"), 1)
    assert str(caught.value) == INSTALL


def test_the_fingerprint_follows_the_data(tmp_path):
    for name, rows in (("first", ROWS), ("second", ROWS[:1])):
        write(tmp_path / name, "de-en", rows)
    prints = [open_corpus(config(tmp_path / name, "de"), 1).fingerprint() for name in ("first", "first", "second")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("nested", [True, False])
def test_two_columns_of_one_language_are_an_error(tmp_path, nested):
    row = {"en": "a", "zh_Hans": "b", "zh-Hans": "c"}
    write(tmp_path / "data", "en-zh_Hans", [{"translation": row} if nested else row])
    with pytest.raises(CorpusError, match=r"zh(_|-)Hans and zh(-|_)Hans are the same language; keep one"):
        list(open_corpus(config(tmp_path / "data", "zh_Hans"), 1).read(("en", "zh_Hans"), "train"))


def test_the_test_split_is_not_the_validation_split_under_another_name(tmp_path):
    write(tmp_path / "data", "de-en", splits=("train", "validation"))
    with pytest.raises(CorpusError, match=r"has the splits train, validation; corpus\.valid_split names the split"):
        corpus = open_corpus(config(tmp_path / "data", "de", test_split="validation"), 1)
        corpus.check(("de", "en"))
