"""Moses, TSV and JSONL files: names, splits, both orders of a pair, and what is wrong with them."""

from __future__ import annotations

import json
import re

import pytest
from text_files import DE, EN, PAIRS, jsonl, moses, tsv, write, write_file

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import CorpusError, open_corpus, tasks_of


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("pair", ["en-de", "de-en"])
@pytest.mark.parametrize("valid", ["valid", "dev", "val", "validation"])
def test_moses_pairs_are_read_in_either_order_of_the_codes(tmp_path, pair, valid, end):
    config = moses(tmp_path, "train", valid, "test", pair=pair, end=end)
    corpus = open_corpus(config, 1)
    assert corpus.pairs == [("de", "en")]
    assert tasks_of(config, corpus) == ["en-de", "de-en"]
    for split in ("train", "valid", "test"):
        assert list(corpus.read(("de", "en"), split)) == PAIRS


def test_moses_files_without_a_pair_in_the_name_are_read_where_there_are_two_languages(tmp_path):
    config = write(
        tmp_path, train_de=DE, train_en=EN, dev_de=DE, dev_en=EN, test_de=DE, test_en=EN, README_md="# no text"
    )
    assert list(open_corpus(config, 1).read(("de", "en"), "valid")) == PAIRS


def test_moses_files_of_three_languages_need_the_pair_in_the_name_or_a_choice(tmp_path):
    files = {f"{split}_{code}": DE for split in ("train", "dev", "test") for code in ("de", "en", "fr")}
    config = write(tmp_path, **files)
    with pytest.raises(CorpusError, match=r"such as train.de in de, en, fr; .* there must be two languages"):
        open_corpus(config, 1)
    config.languages = ["de", "en"]
    assert len(list(open_corpus(config, 1).read(("de", "en"), "train"))) == 2


def test_opus_names_are_training_data_and_other_test_sets_are_left_alone(tmp_path):
    moses(tmp_path, "Europarl", "OpenSubtitles", "newstest2013", "newstest2014", "test_2016", pair="de-en")
    config = CorpusConfig(type="files", path=str(tmp_path), valid_split="newstest2013", test_split="newstest2014")
    corpus = open_corpus(config, 1)
    assert list(corpus.read(("de", "en"), "train")) == PAIRS * 2
    assert list(corpus.read(("de", "en"), "test")) == PAIRS


def test_empty_sides_are_skipped_and_counted_once(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    (tmp_path / "train.en-de.de").write_text("Hallo Welt\n \n")
    corpus = open_corpus(config, 1)
    for _ in range(2):
        assert list(corpus.read(("de", "en"), "train")) == PAIRS[:1]
        assert corpus.skipped == {"empty side": 1}


@pytest.mark.parametrize(("extra_de", "extra_en"), [("mehr\nund\n", ""), ("", "more\nand\n")])
def test_unequal_moses_sides_are_named_with_their_line_counts(tmp_path, extra_de, extra_en):
    config = moses(tmp_path, "train", "valid", "test")
    (tmp_path / "train.en-de.de").write_text(DE + extra_de)
    (tmp_path / "train.en-de.en").write_text(EN + extra_en)
    counts = (4, 2) if extra_de else (2, 4)
    message = (
        f"{tmp_path / 'train.en-de.de'} has {counts[0]} lines and {tmp_path / 'train.en-de.en'} has {counts[1]}; "
        "line n of one must be the translation of line n of the other"
    )
    with pytest.raises(CorpusError, match=re.escape(message)):
        list(open_corpus(config, 1).read(("de", "en"), "train"))


def test_a_moses_file_without_its_counterpart_is_named(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    (tmp_path / "test.en-de.en").unlink()
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'test.en-de.de'} has no counterpart in en")):
        open_corpus(config, 1)


def test_tsv_columns_follow_the_name_of_the_file(tmp_path):
    config = tsv(tmp_path, "train", "valid", "test")
    (tmp_path / "test.de-en.tsv").unlink()
    write_file(tmp_path / "test.en-de.tsv.gz", "Hello world\tHallo Welt\nGood day\tGuten Tag\n")
    corpus = open_corpus(config, 1)
    for split in ("train", "valid", "test"):
        assert list(corpus.read(("de", "en"), split)) == PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nonly one\n", "line 2: found 1 column, expected 2 (de<TAB>en)"),
        (b"a\tb\n\n", "line 2: found 1 column, expected 2 (de<TAB>en)"),
        (b"a\tb\nc\td\te\n", "line 2: found 3 columns, expected 2 (de<TAB>en)"),
        (b"a\tb\nc\td\ne\t\xff\n", "line 3: not valid UTF-8 (byte 0xff at position 3)"),
    ],
)
def test_a_malformed_tsv_line_is_named(tmp_path, content, message):
    config = tsv(tmp_path, "train", "valid", "test")
    write_file(tmp_path / "train.de-en.tsv", content)
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'train.de-en.tsv'}, {message}")):
        list(open_corpus(config, 1).read(("de", "en"), "train"))


def test_jsonl_rows_may_be_nested_or_flat(tmp_path):
    jsonl(
        tmp_path,
        "train.en-de.jsonl",
        {"translation": {"en": "Hello world", "de": "Hallo Welt"}},
        {"de": "x", "en": "y"},
    )
    jsonl(tmp_path, "valid.de-en.jsonl", {"de": "a", "en": "b", "id": "7"})
    config = jsonl(tmp_path, "test.de-en.jsonl.gz", {"de": "c", "en": "d"}, {"de": None, "en": "e"})
    corpus = open_corpus(config, 1)
    assert list(corpus.read(("de", "en"), "train")) == [("Hallo Welt", "Hello world"), ("x", "y")]
    assert list(corpus.read(("de", "en"), "valid")) == [("a", "b")]
    assert list(corpus.read(("de", "en"), "test")) == [("c", "d")]


def test_mixed_jsonl_gives_every_pair_its_rows(tmp_path):
    rows = [{"translation": {"en": "a", "de": "b"}}, {"en": "c", "fr": "d"}, {"en": "e", "de": "f", "fr": "g"}]
    for split in ("train", "valid", "test"):
        config = jsonl(tmp_path, f"{split}.jsonl", *rows)
    corpus = open_corpus(config, 1)
    assert corpus.languages == ["de", "en", "fr"]
    assert list(corpus.read(("de", "en"), "train")) == [("b", "a"), ("f", "e")]
    assert list(corpus.read(("en", "fr"), "test")) == [("c", "d"), ("e", "g")]
    assert list(corpus.read(("de", "fr"), "train")) == [("f", "g")]
    config.languages = ["fr"]
    assert open_corpus(config, 1).pairs == [("en", "fr")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("", "line 2: not valid JSON"),
        ('{"de": ' + "[" * 100_000, "line 2: not valid JSON (nested too deeply)"),
        ('{"de": ' + "9" * 5000 + ', "en": "x"}', "line 2: not valid JSON (a number has too many digits)"),
        ('{"de": "x", "en": "y \\udc00"}', "line 2: the text for en has half a character (the lone surrogate U+DC00"),
        ("7", "line 2: expected an object of texts by language, found a int"),
        ('{"translation": ["a", "b"]}', "line 2: expected an object of texts by language, found a list"),
        ('{"de": "x", "it": "y"}', "line 2: no text for en; found the keys de, it, expected de and en"),
        ('{"de": "x", "en": 5}', "line 2: the text for en is 5, expected a string"),
    ],
)
def test_a_malformed_jsonl_line_is_named(tmp_path, line, message):
    for split in ("train", "valid", "test"):
        config = jsonl(tmp_path, f"{split}.de-en.jsonl", {"de": "a", "en": "b"})
    write_file(tmp_path / "train.de-en.jsonl", '{"de": "a", "en": "b"}\n' + line + '\n{"de": "c", "en": "d"}\n')
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'train.de-en.jsonl'}, {message}")):
        list(open_corpus(config, 1).read(("de", "en"), "train"))


@pytest.mark.parametrize("depth", [*range(930, 1010, 4), 5000])
def test_a_text_that_is_nested_is_one_line_at_any_depth(tmp_path, depth):
    for split in ("train", "valid", "test"):
        config = jsonl(tmp_path, f"{split}.de-en.jsonl", {"de": "a", "en": "b"})
    write_file(tmp_path / "test.de-en.jsonl", '{"de": "a", "en": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(
        CorpusError, match=r"test\.de-en\.jsonl, line 1: (not valid JSON|the text for en is )"
    ) as caught:
        open_corpus(config, 1)
    assert len(str(caught.value)) < 400


def test_a_mixed_row_with_one_language_is_named(tmp_path):
    for split in ("valid", "test", "train"):
        config = jsonl(tmp_path, f"{split}.jsonl", {"de": "a", "en": "b"}, {"de": "c", "text": "d"})
    with pytest.raises(CorpusError, match=re.escape("line 2: found the keys de, text, expected text in two languages")):
        open_corpus(config, 1)


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n \r\n\n"])
def test_blank_lines_at_the_end_of_jsonl_are_none(tmp_path, end):
    for split in ("train", "valid", "test"):
        config = jsonl(tmp_path, f"{split}.de-en.jsonl", {"de": "a", "en": "b"})
    write_file(tmp_path / "train.de-en.jsonl", '{"de": "c", "en": "d"}' + end)
    assert list(open_corpus(config, 1).read(("de", "en"), "train")) == [("c", "d")]


# Codes with hyphens


@pytest.mark.parametrize(
    ("pair", "ends"),
    [
        ("en-zh-Hans", ("en", "zh-Hans")),
        ("zh-Hans-en", ("en", "zh-Hans")),
        ("en-pt-br", ("en", "pt-br")),
        ("pt_BR-en", ("en", "pt_BR")),
        ("sr-Latn-sr-Cyrl", ("sr-Cyrl", "sr-Latn")),
        ("zh-cn-zh-tw", ("zh-cn", "zh-tw")),
        ("deu_Latn-zho_Hans", ("deu_Latn", "zho_Hans")),
    ],
)
def test_codes_with_hyphens_are_read_from_names_of_every_kind(tmp_path, pair, ends):
    codes = tuple(end.replace("-", "_") for end in ends)
    in_name = tuple(sorted(ends, key=pair.startswith, reverse=True))
    kinds = {
        "moses": {f".{pair}.{end}": f"text {end}\n" for end in ends},
        "bare": {f".{end}": f"text {end}\n" for end in ends},
        "tsv": {f".{pair}.tsv": "\t".join(f"text {end}" for end in in_name) + "\n"},
        "headed": {f".{pair}.tsv.gz": "".join("\t".join(f"{t}{end}" for end in ends) + "\n" for t in ("", "text "))},
        "jsonl": {f".{pair}.jsonl": json.dumps({end: f"text {end}" for end in ends}) + "\n"},
        "mixed": {".jsonl": json.dumps({end: f"text {end}" for end in ends}) + "\n"},
    }
    for kind, files in kinds.items():
        (tmp_path / kind).mkdir()
        for name, text in files.items():
            for split in ("train", "valid", "test"):
                write_file(tmp_path / kind / f"{split}{name}", text)
        for languages in ([], list(ends), list(codes)):
            config = CorpusConfig(type="files", path=str(tmp_path / kind), languages=languages, pivot="")
            corpus = open_corpus(config, 1)
            assert tasks_of(config, corpus) == [f"{codes[0]}-{codes[1]}", f"{codes[1]}-{codes[0]}"], kind
            for split in ("train", "valid", "test"):
                assert list(corpus.read(codes, split)) == [(f"text {ends[0]}", f"text {ends[1]}")], kind


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("de", "en"), ("en", "zh-Hans"), ("pt-BR", "zh-Hans"), ("sr-Cyrl", "sr-Latn"), ("en", "zh_Hant"), ("de", "fr-CA")],
)
@pytest.mark.parametrize("named", ["named", "turned", "bare"])
def test_moses_files_are_the_same_text_plain_and_compressed(tmp_path, first, second, named, gz):
    pair = {"named": f".{first}-{second}", "turned": f".{second}-{first}", "bare": ""}[named]
    for split in ("train", "dev", "test"):
        for code in (first, second):
            write_file(tmp_path / f"{split}{pair}.{code}{gz}", f"{split} {code}\n")
    corpus = open_corpus(CorpusConfig(type="files", path=str(tmp_path), pivot=""), 1)
    codes = (first.replace("-", "_"), second.replace("-", "_"))
    assert corpus.pairs == [codes]
    for split, name in {"train": "train", "valid": "dev", "test": "test"}.items():
        assert list(corpus.read(codes, split)) == [(f"{name} {first}", f"{name} {second}")]


@pytest.mark.parametrize("kind", ["moses", "tsv", "jsonl"])
def test_files_of_a_split_are_read_in_the_order_of_their_names(tmp_path, kind):
    names = ["train.a.de-en", "train.de-en", "train.en-de.de-en", "train.z.en-de", "Zeitung.de-en"]
    for split in ("valid.de-en", "test.de-en", *names):
        de, en = f"{split} de", f"{split} en"
        if kind == "moses":
            write_file(tmp_path / f"{split}.de{'.gz' if split == names[1] else ''}", f"{de}\n")
            write_file(tmp_path / f"{split}.en", f"{en}\n")
        elif kind == "tsv":
            turned = split.endswith("en-de")
            write_file(tmp_path / f"{split}.tsv", "\t".join((en, de) if turned else (de, en)) + "\n")
        else:
            jsonl(tmp_path, f"{split}.jsonl", {"de": de, "en": en})
    read = list(open_corpus(CorpusConfig(type="files", path=str(tmp_path)), 1).read(("de", "en"), "train"))
    assert read == [(f"{name} de", f"{name} en") for name in sorted(names)]


@pytest.mark.parametrize("name", ["train.en-zh-Hans.jsonl", "train.jsonl"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"en": "a", "zh_Hans": "b", "zh-Hans": "c"}', "the keys zh_Hans and zh-Hans are the same language; keep one"),
        ('{"translation": {"zh-Hans": "b", "en": "a", "zh_Hans": "b"}}', "the keys zh-Hans and zh_Hans are the same"),
        ('{"en": "a", "zh_Hans": "b", "en": "c"}', "'en' stands there 2 times; keep one"),
        ('{"translation": {"en": "a", "zh_Hans": "b", "zh_Hans": "b"}}', "'zh_Hans' stands there 2 times; keep one"),
    ],
)
def test_a_language_that_a_row_has_twice_is_an_error_with_file_and_line(tmp_path, name, row, message):
    for file in {name, name.replace("train", "valid"), name.replace("train", "test")}:
        write_file(tmp_path / file, '{"en": "x", "zh_Hans": "y"}\n' + (f"{row}\n" if file == name else ""))
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / name}, line 2: {message}")):
        list(open_corpus(CorpusConfig(type="files", path=str(tmp_path)), 1).read(("en", "zh_Hans"), "train"))


@pytest.mark.parametrize("name", ["train.en-zh-foo.en", "test.en-de-fr.tsv", "Europarl.en-de-fr.jsonl"])
def test_a_name_whose_languages_cannot_be_told_is_an_error(tmp_path, name):
    config = moses(tmp_path, "train", "valid", "test")
    write_file(tmp_path / name, "x\ty\n")
    with pytest.raises(
        CorpusError, match=re.escape(f"{tmp_path / name}: the two languages of ") + ".* write '_' inside"
    ):
        open_corpus(config, 1)


def test_names_of_other_files_are_not_taken_for_pairs(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    for name in (
        "notes.to-do-list.txt",
        "corpus.en-de-fr.txt",
        "all.de-en-fr.log",
        "run-all.sh",
        "README.md",
        "vocab.en-de",
        "train.en-de.log",
        "a.b-c.d-e.tsv",
    ):
        write_file(tmp_path / name, "x\n")
    assert list(open_corpus(config, 1).read(("de", "en"), "train")) == PAIRS


@pytest.mark.parametrize("name", ["Test", "flores-test", "wmt.test", "IWSLT.dev", "IWSLT14.TED.tst2012", "news_dev2"])
def test_training_data_that_looks_like_an_evaluation_set_is_said_once(tmp_path, caplog, name):
    config = moses(tmp_path, "train", "valid", "test", name, "latest", "contest2", "train.test", "OpenSubtitles")
    corpus = open_corpus(config, 1)
    assert len(list(corpus.read(("de", "en"), "train"))) == 2 * 6
    assert len(corpus.notes) == len(caplog.messages) == 1
    assert f"read as training data, though {name!r} looks like an evaluation set" in corpus.notes[0]


def test_two_kinds_in_a_folder_are_listed_and_a_file_settles_it(tmp_path):
    moses(tmp_path, "train", "valid", "test")
    config = tsv(tmp_path, "train", "valid", "test", content="eins\tone\n")
    with pytest.raises(CorpusError, match=r"more than one kind of parallel text: moses \(.*\); tsv \(test.de-en.tsv"):
        open_corpus(config, 1)
    config.path = str(tmp_path / "train.de-en.tsv")
    assert list(open_corpus(config, 1).read(("de", "en"), "test")) == [("eins", "one")]
    config.path = str(tmp_path / "train.en-de.de")
    assert list(open_corpus(config, 1).read(("de", "en"), "test")) == PAIRS


def test_a_folder_without_parallel_text_says_what_was_looked_for_and_found(tmp_path):
    config = write(tmp_path, notes_txt="x")
    with pytest.raises(CorpusError, match=r"looked for <lang>.tsv with splits.json, .*; found notes.txt"):
        open_corpus(config, 1)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(CorpusError, match="corpus.path is empty"):
        open_corpus(CorpusConfig(type="files"), 1)
    with pytest.raises(CorpusError, match=re.escape(f"{tmp_path / 'none'} does not exist")):
        open_corpus(CorpusConfig(type="files", path=str(tmp_path / "none")), 1)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "valid"), "no test data for de-en: looked in FOLDER for test.de-en.{de,en}, test.en-de.{de,en}, test."),
        (("train", "test"), "no validation data for de-en: looked in FOLDER for valid.de-en.{de,en}, valid.en-de.{de,en}, "
                            "dev.de-en.{de,en}"),
        (("valid", "test"), "FOLDER has no training data for de-en; expected names such as train.en-de.en and train"),
    ],
)  # fmt: skip
def test_a_missing_split_says_exactly_which_names_were_looked_for(tmp_path, splits, message):
    config = moses(tmp_path, *splits)
    config.languages = ["de"]
    with pytest.raises(CorpusError, match=re.escape(message.replace("FOLDER", str(tmp_path)))):
        open_corpus(config, 1)


def test_a_split_without_any_text_is_an_error(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    for code in ("de", "en"):
        (tmp_path / f"train.en-de.{code}").write_text("\n\n")
    with pytest.raises(CorpusError, match="no training data for de-en: .* has no segment with text in both languages"):
        open_corpus(config, 1)


def test_a_language_that_is_not_there_is_named_with_those_present(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    config.languages = ["de", "nl"]
    with pytest.raises(CorpusError, match="has no nl; it has de, en"):
        open_corpus(config, 1)


def test_the_same_text_twice_is_an_error(tmp_path):
    config = tsv(tmp_path, "train", "valid", "test")
    write_file(tmp_path / "train.en-de.tsv", "x\ty\n")
    with pytest.raises(CorpusError, match="are both there; keep one"):
        open_corpus(config, 1)


def test_limits_take_the_same_lines_of_files_that_are_parallel(tmp_path):
    for code in ("de", "fr"):
        for split, number in (("train", 200), ("valid", 3), ("test", 3)):
            write_file(tmp_path / f"{split}.en-{code}.en", "".join(f"line {n}\n" for n in range(number)))
            write_file(tmp_path / f"{split}.en-{code}.{code}", "".join(f"{code} {n}\n" for n in range(number)))
    corpus = open_corpus(CorpusConfig(type="files", path=str(tmp_path), train_sentences=20, test_sentences=2), 1)
    german = [english for _, english in corpus.read(("de", "en"), "train")]
    french = [english for english, _ in corpus.read(("en", "fr"), "train")]
    assert len(german) == 20
    assert german == french
    assert len(list(corpus.read(("de", "en"), "test"))) == 2


def test_the_fingerprint_changes_with_a_file_and_with_a_size_limit(tmp_path):
    config = moses(tmp_path, "train", "valid", "test")
    first = open_corpus(config, 1).fingerprint()
    assert first == open_corpus(config, 1).fingerprint()
    config.train_sentences = 1
    second = open_corpus(config, 1).fingerprint()
    (tmp_path / "test.en-de.de").write_text("Hallo Wald\nGuten Tag\n")
    third = open_corpus(config, 1).fingerprint()
    assert len({first, second, third}) == 3
