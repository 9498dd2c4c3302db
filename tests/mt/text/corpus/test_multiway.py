"""Folders with one ``<lang>.tsv[.gz]`` for each language and ``splits.json``."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

import pytest

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of

MULTI30K = Path(__file__).resolve().parents[5] / "shared" / "data" / "multi30k"
LISTS = {"valid": ["v1", "v2"], "test": ["t1"], "test_2017": ["u1"], "note": "u1 is for later", "more": {"t": ["a1"]}}


def write(folder: Path, lists: object = LISTS, **texts: str | bytes) -> CorpusConfig:
    for code, text in texts.items():
        content = text.encode() if isinstance(text, str) else text
        (folder / f"{code}.tsv.gz").write_bytes(gzip.compress(content))
    if lists is not None:
        (folder / "splits.json").write_text(json.dumps(lists))
    return CorpusConfig(type="files", path=str(folder))


def lines(code: str, *ids: str) -> str:
    return "".join(f"{name}\t{code} text of {name}\n" for name in ids)


def test_parts_are_read_and_no_listed_id_reaches_training(tmp_path):
    ids = ("a1", "v1", "a2", "t1", "u1", "v2", "a3")
    config = write(tmp_path, de=lines("de", *ids), en=lines("en", *reversed(ids)), fr=lines("fr", "a2", "v1", "t1"))
    corpus = open_corpus(config, 1)
    assert corpus.languages == ["de", "en", "fr"]
    assert corpus.pairs == [("de", "en"), ("de", "fr"), ("en", "fr")]
    assert tasks_of(config, corpus) == ["en-de", "de-en", "en-fr", "fr-en"]
    assert list(corpus.read(("de", "en"), "train")) == [
        (f"de text of {n}", f"en text of {n}") for n in ("a1", "a2", "a3")
    ]
    assert list(corpus.read(("de", "en"), "valid")) == [(f"de text of {n}", f"en text of {n}") for n in ("v1", "v2")]
    assert list(corpus.read(("de", "fr"), "test")) == [("de text of t1", "fr text of t1")]
    assert list(corpus.read(("en", "fr"), "train")) == [("en text of a2", "fr text of a2")]


def test_another_list_can_be_the_test_part(tmp_path):
    config = write(tmp_path, de=lines("de", "a", "v1", "t1", "u1"), en=lines("en", "a", "v1", "t1", "u1"))
    config.test_split = "test_2017"
    corpus = open_corpus(config, 1)
    assert list(corpus.read(("de", "en"), "test")) == [("de text of u1", "en text of u1")]
    assert list(corpus.read(("de", "en"), "train")) == [("de text of a", "en text of a")]


def test_plain_files_and_a_byte_order_mark_are_read(tmp_path):
    config = write(tmp_path, en=lines("en", "a", "v1", "t1"))
    (tmp_path / "de.tsv").write_bytes(b"\xef\xbb\xbf" + lines("de", "a", "v1", "t1").replace("\n", "\r\n").encode())
    assert list(open_corpus(config, 1).read(("de", "en"), "train")) == [("de text of a", "en text of a")]


def test_empty_texts_are_left_out_and_counted(tmp_path):
    config = write(tmp_path, de=lines("de", "a", "v1", "t1") + "b\t  \n", en=lines("en", "a", "b", "v1", "t1"))
    corpus = open_corpus(config, 1)
    assert len(list(corpus.read(("de", "en"), "train"))) == 1
    assert corpus.skipped == {"empty side": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tx\nno tab here\n", "line 2: found 1 column, expected 2 (id<TAB>text)"),
        (b"a\tx\ny\tz\tw\n", "line 2: found 3 columns, expected 2 (id<TAB>text)"),
        (b"a\tx\nb\tcaf\xe9\n", "line 2: not valid UTF-8 (byte 0xe9 at position 6)"),
        (b"a\tx\nb\ty\na\tz\n", "line 3: the id 'a' stands there for the second time"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, content, message):
    config = write(tmp_path, de=content, en=lines("en", "a", "v1", "t1"))
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'de.tsv.gz'}, {message}")):
        open_corpus(config, 1)


def test_a_cut_gzip_file_is_named(tmp_path):
    config = write(tmp_path, de=lines("de", "a", "v1", "t1"), en=lines("en", *map(str, range(5000))))
    whole = (tmp_path / "en.tsv.gz").read_bytes()
    (tmp_path / "en.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'en.tsv.gz'} is not whole gzip data")):
        open_corpus(config, 1)
    (tmp_path / "en.tsv.gz").write_bytes(b"plain text")
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'en.tsv.gz'} is not whole gzip data")):
        open_corpus(config, 1)


def test_a_missing_language_is_named_with_those_present(tmp_path):
    config = write(tmp_path, de=lines("de", "a"), en=lines("en", "a"))
    config.languages = ["de", "it", "pt_BR"]
    with pytest.raises(CorpusError, match=r"has no it, pt_BR; it has de, en"):
        open_corpus(config, 1)


def test_a_missing_list_is_named_with_those_present(tmp_path):
    config = write(tmp_path, de=lines("de", "a"), en=lines("en", "a"))
    config.test_split = "test_2019"
    with pytest.raises(CorpusError, match=r"no list 'test_2019' \(corpus.test_split\); it has valid, test, test_2017"):
        open_corpus(config, 1)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (None, "splits.json is missing"),
        (["a"], "expected an object of lists of ids, found a list"),
        ({"valid": [1], "test": []}, "list 'valid' holds 1; ids are strings"),
        ({"valid": ["a", "b"], "test": ["b", "c"]}, "splits.json: 1 ids are in both lists 'valid' and 'test': 'b'"),
        ({"valid": ["a", "b", "a"], "test": ["c"]}, "list 'valid' has the id 'a' 2 times"),
    ],
)
def test_wrong_splits_are_explained(tmp_path, lists, message):
    config = write(tmp_path, lists=lists, de=lines("de", "a"), en=lines("en", "a"))
    with pytest.raises(CorpusError, match=re.escape(message)):
        open_corpus(config, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", " is not valid JSON"),
        (b'{"valid": ' + b"[" * 100_000, " is not valid JSON (nested too deeply)"),
        (b'{"n": ' + b"9" * 5000 + b"}", " is not valid JSON (a number has too many digits)"),
        (b'{"valid": ["a"], "test": ["b"], "valid": []}', ": 'valid' stands there 2 times; keep one"),
        (b'{"valid": "\xff"}', " is not UTF-8: byte 11 is 0xff"),
    ],
)
def test_splits_that_are_not_json_are_named(tmp_path, content, message):
    config = write(tmp_path, de=lines("de", "a"), en=lines("en", "a"))
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'splits.json'}{message}")):
        open_corpus(config, 1)


def test_splits_may_begin_with_a_byte_order_mark(tmp_path):
    config = write(tmp_path, de=lines("de", "a", "v1", "t1"), en=lines("en", "a", "v1", "t1"))
    path = tmp_path / "splits.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(open_corpus(config, 1).read(("de", "en"), "train")) == [("de text of a", "en text of a")]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("té", unicodedata.normalize("NFD", "té")), ("t", "t "), ("t", "\u00a0t")]
)
def test_a_listed_id_in_another_spelling_is_no_training_data(tmp_path, ours, theirs):
    lists = {"valid": ["v1"], "test": [theirs, "t1"]}
    ids = ("a", "v1", "t1", ours)
    config = write(tmp_path, lists, de=lines("de", *ids), en=lines("en", *ids))
    with pytest.raises(
        CorpusError, match=r"splits.json: 1 listed ids differ from ids of the files only in spaces or Uni"
    ):
        open_corpus(config, 1)


def test_ids_that_do_not_match_are_counted_with_a_hint(tmp_path):
    composed = ["é1", "é2", "x3", "v1", "t1"]
    apart = [unicodedata.normalize("NFD", name) for name in composed[:2]] + ["y3", "v1", "t1"]
    lists = {"valid": ["v1"], "test": ["t1"]}
    config = write(tmp_path, lists, de=lines("de", *composed), en=lines("en", *apart))
    message = "none of 3 and 3 ids that are in no list of splits.json is in both de.tsv.gz and en.tsv.gz, such as "
    with pytest.raises(CorpusError, match=re.escape(message) + ".*; 2 would be with the same spaces and Unicode form"):
        open_corpus(config, 1)
    config = write(tmp_path, lists, de=lines("de", *composed, "a"), en=lines("en", *apart, "a"))
    corpus = open_corpus(config, 1)
    assert len(list(corpus.read(("de", "en"), "train"))) == 1
    assert "2 ids differ from others only in spaces or Unicode form" in corpus.notes[0]


def test_files_of_codes_with_hyphens_are_read_or_named(tmp_path):
    ids = ("a", "v1", "t1")
    config = write(tmp_path, **{"en": lines("en", *ids), "zh-Hans": lines("zh", *ids), "pt_BR": lines("pt", *ids)})
    assert open_corpus(config, 1).languages == ["en", "pt_BR", "zh_Hans"]
    config.languages = ["zh-Hans"]
    assert tasks_of(config, open_corpus(config, 1)) == ["en-zh_Hans", "zh_Hans-en"]
    write(tmp_path, **{"de-orig": lines("de", *ids)})
    with pytest.raises(CorpusError, match=r"de-orig.tsv.gz: de-orig is no language code"):
        open_corpus(config, 1)


def test_a_language_without_test_data_is_an_error_that_says_where_it_was_looked_for(tmp_path):
    ids = ("a1", "v1", "t1")
    config = write(tmp_path, de=lines("de", *ids), en=lines("en", *ids), cs=lines("cs", "a1", "v1"))
    message = (
        "there is no test data for cs-en: none of the 1 ids in list 'test' of splits.json is in both cs.tsv.gz and "
        "en.tsv.gz"
    )
    with pytest.raises(CorpusError, match=message):
        open_corpus(config, 1)
    config.languages = ["de"]
    assert open_corpus(config, 1).pairs == [("de", "en")]


def test_a_corpus_without_training_data_names_the_pair(tmp_path):
    config = write(tmp_path, de=lines("de", "v1", "t1"), en=lines("en", "v1", "t1", "a"))
    with pytest.raises(CorpusError, match="there is no training data for de-en: every id that is in both de.tsv.gz"):
        open_corpus(config, 1)


def test_the_same_language_twice_is_an_error(tmp_path):
    config = write(tmp_path, de=lines("de", "a"), en=lines("en", "a"))
    (tmp_path / "de.tsv").write_text(lines("de", "a"))
    with pytest.raises(CorpusError, match="are both there; keep one"):
        open_corpus(config, 1)


def test_the_fingerprint_follows_content_and_not_the_place(tmp_path):
    prints = []
    for number, word in enumerate(("x", "x", "y")):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = write(folder, de=f"a\t{word}\n" + lines("de", "v1", "t1"), en=lines("en", "a", "v1", "t1"))
        prints.append(open_corpus(config, 1).fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no {MULTI30K}")
def test_multi30k_has_its_official_sizes():
    config = CorpusConfig(type="files", path=str(MULTI30K))
    corpus = open_corpus(config, 1)
    assert tasks_of(config, corpus) == ["en-cs", "cs-en", "en-de", "de-en", "en-fr", "fr-en"]
    sizes = [sum(1 for _ in corpus.read(("de", "en"), split)) for split in ("train", "valid", "test")]
    assert sizes == [29000, 1014, 1000]
    assert next(corpus.read(("de", "en"), "train"))[1] == "Two young, White males are outside near many bushes."


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no {MULTI30K}")
def test_multi30k_limits_take_the_same_captions_for_all_pairs():
    config = CorpusConfig(type="files", path=str(MULTI30K), languages=["de", "fr"], train_sentences=500)
    corpus = open_corpus(config, 1)
    german = [english for _, english in corpus.read(("de", "en"), "train")]
    french = [english for english, _ in corpus.read(("en", "fr"), "train")]
    assert len(german) == 500
    assert german == french


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no {MULTI30K}")
def test_multi30k_czech_has_no_2017_test():
    config = CorpusConfig(type="files", path=str(MULTI30K), languages=["de", "cs"], test_split="test_2017_flickr")
    with pytest.raises(CorpusError, match="no test data for cs-en"):
        open_corpus(config, 1)
