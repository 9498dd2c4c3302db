"""Preparing a corpus: what is kept, what is left out and counted, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_translation import text_options

from nspec.mt.text import prepare as module
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import Corpus, Pair, Segment
from nspec.mt.text.prepare import prepare_corpus, summary
from nspec.mt.text.prepared import PreparedData
from nspec.mt.text.vocabulary import load_tokenizer
from nspec.run.config import Config

ALPHABETS = {"aa": "aeiklmnorst", "bb": "äeiklmnörst", "cc": "абвгдежзик", "dd": "אבגדהוזחטי"}
TASKS = ["aa-bb", "bb-aa", "aa-cc", "cc-aa", "dd-aa"]
SIZES = {"train": 200, "valid": 12, "test": 9}


def word(language: str, number: int) -> str:
    rng = random.Random(f"{language} {number}")
    return "".join(rng.choices(ALPHABETS[language], k=rng.randint(2, 6)))


class Invented(Corpus):
    """Word-for-word translations between made-up languages; ``extra`` adds segments of a pair and split."""

    def __init__(self, extra: dict[tuple[Pair, str], list[Pair]] | None = None, sizes: dict[str, int] = SIZES) -> None:
        codes = sorted(ALPHABETS)
        super().__init__(CorpusConfig(), 1, codes, [("aa", code) for code in codes[1:]])
        self.extra, self.amount = extra or {}, sizes
        self.reads: list[tuple[Pair, str]] = []

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        self.reads.append((pair, split))
        rng = random.Random(f"{pair} {split}")
        for number in range(self.amount[split]):
            words = rng.choices(range(60), k=rng.randint(3, 12))
            yield str(number), *(" ".join(word(code, one) for one in words) + f" {number}" for code in pair)
        for number, (first, second) in enumerate(self.extra.get((pair, split), [])):
            yield f"x{number}", first, second

    def identity(self) -> str:
        return "invented"


def config_with(**options: object) -> Config:
    config = Config()
    config.tokenizer.vocab_size = 180
    for name, value in options.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "prepared"
    prepare_corpus(Invented(), TASKS, text_options(config_with()), folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is there


def test_the_folder_holds_what_the_run_folder_is_said_to_hold(prepared):
    names = set(files(prepared))
    assert {"meta.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/spm.model"} <= names
    for pair in ("aa-bb", "aa-cc", "aa-dd"):
        for language in pair.split("-"):
            assert {f"text/{split}/{pair}.{language}.txt" for split in ("valid", "test")} <= names
            for split in ("train", "valid", "test"):
                assert {f"{split}/{pair}.{language}.{kind}.npy" for kind in ("ids", "offsets")} <= names
    assert len(names) == 4 + 3 * 2 * (2 + 6)
    assert not list(prepared.parent.glob(".prepared*"))


def test_decoding_the_arrays_gives_the_text_with_the_tags_of_both_sides(prepared):
    data = PreparedData(prepared)
    corpus = Invented()
    for task in TASKS:
        source, target = task.split("-")
        for split, size in SIZES.items():
            assert data.size(split, task) == size
            segments = list(corpus.segments(tuple(sorted((source, target))), split))
            for index in (0, size - 1):
                texts = dict(zip(sorted((source, target)), segments[index][1:]))
                for ids, language in zip(data.ids(split, task, index), (source, target)):
                    assert ids[0] == data.tokenizer.convert_tokens_to_ids(f"__{language}__")
                    assert ids[-1] == data.tokenizer.eos_token_id
                    assert data.tokenizer.decode(ids[1:-1]) == texts[language]


def test_validation_and_test_text_stands_there_as_in_the_corpus(prepared):
    segments = list(Invented().segments(("aa", "dd"), "test"))
    assert PreparedData(prepared).text("test", "dd-aa") == ([s[2] for s in segments], [s[1] for s in segments])


def test_preparing_twice_gives_the_same_bytes_reads_the_corpus_once_and_tells_its_progress(prepared, tmp_path):
    corpus, seen = Invented(), []
    prepare_corpus(corpus, TASKS, text_options(config_with()), tmp_path / "prepared", lambda *step: seen.append(step))
    assert files(tmp_path / "prepared") == files(prepared)
    assert len(corpus.reads) == len(set(corpus.reads)) == 9
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["read valid and test", "read", "vocabulary", "encode"]
    assert [step for step in seen if step[0] == "encode"] == [("encode", done, 3) for done in range(4)]


def test_ids_take_two_bytes_where_the_vocabulary_allows_it(prepared, monkeypatch, tmp_path):
    assert np.load(prepared / "train" / "aa-bb.aa.ids.npy").dtype == np.uint16
    assert np.load(prepared / "train" / "aa-bb.aa.offsets.npy").dtype == np.int64
    # An id beyond two bytes, as language tags of M2M100 have that its length does not count.
    monkeypatch.setattr("nspec.mt.text.prepare.token_ids", lambda tokenizer: [0, 65536])
    prepare_corpus(Invented(), TASKS, text_options(config_with()), tmp_path / "prepared")
    wide = np.load(tmp_path / "prepared" / "train" / "aa-bb.aa.ids.npy")
    assert wide.dtype == np.uint32
    assert wide.tolist() == np.load(prepared / "train" / "aa-bb.aa.ids.npy").tolist()


def test_a_person_is_shown_two_pairs_in_tokens_with_their_tags(prepared):
    lines = summary(PreparedData(prepared).meta)
    assert lines[0].startswith("5 directions between 4 languages, 600 training sentences, ")
    first, last = lines[-2:]
    assert first.startswith("aa-bb: __aa__ ▁")
    assert " </s> => __bb__ ▁" in first
    assert last.startswith("dd-aa: __dd__ ▁")
    assert " => __aa__ ▁" in last
    assert last.endswith(" </s>")


def test_training_text_does_not_stay_on_the_disk(prepared):
    assert not [name for name in files(prepared) if "spool" in name or name.startswith("text/train")]


# What is left out


def test_training_pairs_with_a_side_from_valid_or_test_are_left_out_and_counted(tmp_path):
    corpus = Invented()
    valid, test = (next(corpus.segments(("aa", "bb"), split)) for split in ("valid", "test"))
    leaks = [(valid[1], "something else"), ("something else", test[2]), (valid[1], valid[2])]
    extra = {(("aa", "bb"), "train"): [*leaks, ("kept", "kept")], (("aa", "cc"), "train"): [(valid[1], "кади")]}
    for across in (True, False):
        config = config_with(corpus__filter_across_pairs=across)
        prepare_corpus(Invented(extra), TASKS, text_options(config), tmp_path / "prepared")
        data = PreparedData(tmp_path / "prepared")
        assert data.size("train", "aa-bb") == data.size("train", "bb-aa") == SIZES["train"] + 1
        assert data.meta["dropped"]["aa-bb"] == {"in valid or test": 3}
        assert "aa-bb: training sentences left out: 3 in valid or test" in summary(data.meta)
        # That text is held out for aa-bb; in aa-cc it is training text where the user wants it.
        assert data.size("train", "aa-cc") == SIZES["train"] + (not across)
        assert data.meta["dropped"]["aa-cc"] == ({"in valid or test of another pair": 1} if across else {})


def test_a_pair_that_another_one_leaves_nothing_of_names_the_option(tmp_path):
    held_out = [segment[1] for segment in Invented().segments(("aa", "cc"), "test")]
    corpus = Invented({(("aa", "bb"), "train"): [(text, "köln") for text in held_out]})
    segments = corpus.segments
    corpus.segments = lambda pair, split: (  # type: ignore[method-assign]
        segment for segment in segments(pair, split) if pair != ("aa", "bb") or split != "train" or segment[0][0] == "x"
    )
    message = r"no train data \(left out: 9 in valid or test of another pair\); .*corpus\.filter_across_pairs=false"
    with pytest.raises(ValueError, match=message):
        prepare_corpus(corpus, TASKS, text_options(config_with()), tmp_path / "prepared")


def test_duplicates_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    first = next(Invented().segments(("aa", "bb"), "train"))[1:]
    extra = {(("aa", "bb"), "train"): [first, (first[0], "köln"), first]}
    prepare_corpus(Invented(extra), TASKS, text_options(config_with(corpus__deduplicate=True)), tmp_path / "prepared")
    data = PreparedData(tmp_path / "prepared")
    assert data.size("train", "aa-bb") == SIZES["train"] + 1
    assert data.meta["dropped"] == {"aa-bb": {"duplicate": 2}, "aa-cc": {}, "aa-dd": {}}
    assert "aa-bb: training sentences left out: 2 duplicate" in summary(data.meta)


def test_characters_that_the_vocabulary_lacks_are_counted_by_language_and_said(tmp_path, prepared):
    assert PreparedData(prepared).meta["unknown_characters"]["bb"]["unknown"] == {"train": 0, "valid": 0, "test": 0}
    assert not [line for line in summary(PreparedData(prepared).meta) if "lacks" in line]
    extra = {
        (("aa", "bb"), "valid"): [("ae \U0001f642\U0001f642 \u2585", "äe")],
        (("aa", "bb"), "test"): [("aé \U0001f642", "äe \u0416"), ("lo \u0323", "äe")],
        (("aa", "cc"), "test"): [("ae \U0001f642", "а")],
    }
    prepare_corpus(Invented(extra), TASKS, text_options(config_with()), tmp_path / "prepared")
    data = PreparedData(tmp_path / "prepared")
    found = data.meta["unknown_characters"]
    assert found["aa"]["unknown"] == {"train": 0, "valid": 3, "test": 4}
    assert found["bb"]["unknown"] == {"train": 0, "valid": 0, "test": 1}
    assert found["cc"]["unknown"] == {"train": 0, "valid": 0, "test": 0}
    texts = [data.text("valid", task)[0] for task in ("aa-bb", "aa-cc")] + [data.text("valid", "dd-aa")[1]]
    assert found["aa"]["characters"]["valid"] == sum(len(line) for side in texts for line in side)
    said = [line for line in summary(data.meta) if line.startswith("warning: characters that the vocabulary lacks")]
    assert said == [
        "warning: characters that the vocabulary lacks, which are lost as <unk>: "
        "aa 3 in valid, 4 in test (\U0001f642 é U+0323 \u2585); bb 1 in test (\u0416)"
    ]


def test_notes_of_the_corpus_are_kept(tmp_path):
    corpus = Invented()
    corpus.note("one key was left out")
    prepare_corpus(corpus, TASKS, text_options(config_with()), tmp_path / "prepared")
    assert PreparedData(tmp_path / "prepared").meta["corpus"]["notes"] == ["one key was left out"]


def test_too_long_and_too_uneven_training_pairs_are_left_out_and_counted(tmp_path):
    word = "ae "
    extra = {
        (("aa", "bb"), "train"): [
            (word * 40, "el"),  # too long, on the first side
            ("el", word * 40),  # on the second
            (word * 9, "el"),  # 9 or more tokens against at most 2
        ]
    }
    for ratio, expected in [(0.0, {}), (4.0, {"length ratio": 1})]:
        options = {"corpus__max_ratio": ratio, "corpus__max_tokens": 39}
        prepare_corpus(Invented(extra), TASKS, text_options(config_with(**options)), tmp_path / "prepared")
        data = PreparedData(tmp_path / "prepared")
        found = data.meta["dropped"]["aa-bb"]
        long = found.pop("too long")
        assert long >= 2
        assert found == expected
        assert data.size("train", "aa-bb") == SIZES["train"] + 3 - long - sum(expected.values())
        for side in data.lengths("train", "aa-bb"):
            assert side.max() <= 39 + 2


def test_training_pairs_that_the_model_cannot_take_are_left_out_whatever_max_tokens_is(tmp_path):
    options = {"corpus__max_tokens": 500, "model__max_positions": 30}
    prepare_corpus(Invented(), TASKS, text_options(config_with(**options)), tmp_path / "prepared")
    data = PreparedData(tmp_path / "prepared")
    assert data.meta["dropped"]["aa-bb"]["too long"] > 0
    assert max(int(side.max()) for task in TASKS for side in data.lengths("train", task)) <= 30


def test_long_evaluation_pairs_are_cut_for_the_loss_and_counted_and_their_text_is_whole(tmp_path):
    long = " ".join(["aeiklm"] * 60)
    extra = {(("aa", "bb"), "valid"): [(long, "el"), ("el", long)]}
    options = {"model__max_positions": 50}
    prepare_corpus(Invented(extra), TASKS, text_options(config_with(**options)), tmp_path / "prepared")
    data = PreparedData(tmp_path / "prepared")
    assert data.size("valid", "aa-bb") == SIZES["valid"] + 2
    assert data.meta["truncated"]["aa-bb"]["valid"] >= 2
    assert data.text("valid", "aa-bb")[0][-2] == long
    source, _ = data.ids("valid", "aa-bb", SIZES["valid"])
    assert len(source) == 50
    assert source[-1] == data.tokenizer.eos_token_id
    assert any("cut to 50 tokens for the loss" in line for line in summary(data.meta))


# Errors


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_direction_without_text_is_an_error_that_names_it(tmp_path, split):
    with pytest.raises(ValueError, match=f"aa-bb and bb-aa: there is no {split} data"):
        prepare_corpus(Invented(sizes=SIZES | {split: 0}), TASKS, text_options(config_with()), tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []


def test_a_direction_of_which_nothing_is_left_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"aa-bb and bb-aa: there is no train data \(left out: 200 too long\)"):
        prepare_corpus(Invented(), TASKS, text_options(config_with(corpus__max_tokens=1)), tmp_path / "prepared")


def test_a_line_break_in_a_sentence_is_an_error(tmp_path):
    extra = {(("aa", "bb"), "valid"): [("one\ntwo", "el")]}
    with pytest.raises(ValueError, match="aa-bb valid: a sentence holds a line break: 'one"):
        prepare_corpus(Invented(extra), TASKS, text_options(config_with()), tmp_path / "prepared")


# Pretrained vocabularies


@pytest.fixture
def pretrained(prepared, tmp_path) -> Path:
    shutil.copytree(prepared / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "m2m_100", "max_position_embeddings": 40}), encoding="utf-8"
    )
    return tmp_path / "model"


def test_a_pretrained_model_gives_the_vocabulary_and_the_longest_sequence(pretrained, prepared, tmp_path):
    config = config_with(model__pretrained=str(pretrained))
    prepare_corpus(Invented(), TASKS, text_options(config), tmp_path / "prepared")
    data, trained = PreparedData(tmp_path / "prepared"), PreparedData(prepared)
    assert data.tokenizer.get_vocab() == load_tokenizer(prepared / "tokenizer").get_vocab()
    assert data.ids("valid", "aa-cc", 0)[0].tolist() == trained.ids("valid", "aa-cc", 0)[0].tolist()
    assert data.meta["max_positions"] == 40


def test_a_language_that_a_pretrained_vocabulary_lacks_is_an_error(pretrained, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = pretrained / name
        path.write_text(path.read_text("utf-8").replace("__dd__", "__zz__"), encoding="utf-8")
    with pytest.raises(ValueError, match="no tag for the language 'dd'; it has aa, bb, cc, zz"):
        prepare_corpus(
            Invented(), TASKS, text_options(config_with(model__pretrained=str(pretrained))), tmp_path / "prepared"
        )


def test_a_pretrained_model_that_is_not_there_is_one_clear_line(tmp_path):
    config = config_with(model__pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere: there is no such folder") as caught:
        prepare_corpus(Invented(), TASKS, text_options(config), tmp_path / "prepared")
    assert "\n" not in str(caught.value)


# Kills


def test_an_error_leaves_nothing_behind_and_what_was_there_stays(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    before = files(folder)
    monkeypatch.setattr(module._Preparation, "_encode", lambda self, pair: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_corpus(Invented(), TASKS, text_options(config_with()), folder)
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_a_full_disk_is_named_and_what_was_there_stays(prepared, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # fails as a full disk does, in the same calls
    try:
        with pytest.raises(OSError, match=r"cannot write .*spool.aa-bb\.aa\.txt: File too large"):
            prepare_corpus(Invented(), TASKS, text_options(config_with()), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {beside!r}]
import test_prepare as t
from toy_translation import text_options
from nspec.mt.text import prepare as module

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
module.prepare_corpus(t.Invented(), t.TASKS, text_options(t.config_with()), t.Path({folder!r}))
"""


@pytest.mark.parametrize(
    ("patch", "whole"),
    [
        ("module._Preparation._encode = die", False),
        (
            "replace = os.replace\n"
            "module.os.replace = lambda a, b: die() if str(b).endswith('prepared/valid') else replace(a, b)",
            False,
        ),
        ("module.summary = die", True),
    ],
    ids=["while encoding", "while moving in place", "at the very end"],
)
def test_a_killed_preparation_is_not_taken_for_a_whole_one_and_can_be_started_again(prepared, tmp_path, patch, whole):
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "started.json").write_text("{}", encoding="utf-8")
    here, beside = (str(Path(__file__).parents[up]) for up in (0, 1))
    script = KILLED.format(here=here, beside=beside, patch=patch, folder=str(folder))
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[3])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert (folder / "meta.json").exists() == whole
    if not whole:
        with pytest.raises(ValueError, match="no prepared text"):
            PreparedData(folder)
    prepare_corpus(Invented(), TASKS, text_options(config_with()), folder)
    assert (folder / "started.json").read_text("utf-8") == "{}"  # others may keep files there
    assert files(folder).keys() - {"started.json"} == files(prepared).keys()
    assert all(files(folder)[name] == content for name, content in files(prepared).items())
    assert not list(tmp_path.glob(".prepared*"))
