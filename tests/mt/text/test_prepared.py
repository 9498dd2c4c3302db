"""Reading prepared text: what batches are made of, without the corpus, and clear errors where it is damaged."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader
from toy_translation import text_options

from nspec.files import read_json, write_json
from nspec.mt.text import prepared as module
from nspec.mt.text.batches import TaskBatchSampler, evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import Corpus, Pair, Segment
from nspec.mt.text.prepare import prepare_corpus
from nspec.mt.text.prepared import Examples, PreparedData, languages_of_task, pair_of_task
from nspec.run.config import Config

TASKS = ["en-de", "de-en", "en-ti"]
SIZES = {"train": 150, "valid": 11, "test": 7}
ALPHABETS = {"de": "aeiklmnörst", "en": "aeiklmnorst", "ti": "ሀለመረሰሸቀበተኀ"}
ODD = "a\u2028b\x85c\x0bd \x1ce"  # characters at which str.splitlines() splits


class Invented(Corpus):
    """Random words; the last test sentence has odd white space in it."""

    def __init__(self) -> None:
        super().__init__(CorpusConfig(), 1, ["de", "en", "ti"], [("de", "en"), ("en", "ti")])

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        rng = random.Random(f"{pair} {split}")
        for number in range(SIZES[split]):
            texts = [
                " ".join("".join(rng.choices(ALPHABETS[code], k=3)) for _ in range(rng.randint(2, 9))) for code in pair
            ]
            if split == "test" and number == SIZES[split] - 1:
                texts[0] += ODD
            yield str(number), texts[0], texts[1]

    def identity(self) -> str:
        return "invented"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "prepared"
    config = Config()
    config.tokenizer.vocab_size = 120
    prepare_corpus(Invented(), TASKS, text_options(config), folder)
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "prepared"))


def test_tasks_languages_and_sizes_are_those_of_the_corpus(prepared):
    data = PreparedData(prepared)
    assert data.tasks == TASKS
    assert data.languages == ["de", "en", "ti"]
    assert {split: data.size(split, "en-de") for split in SIZES} == SIZES


def test_both_directions_read_the_same_arrays(prepared):
    data = PreparedData(prepared)
    for index in range(data.size("valid", "en-de")):
        english, german = data.ids("valid", "en-de", index)
        source, target = data.ids("valid", "de-en", index)
        assert source[1:].tolist() == german[1:].tolist()
        assert target[1:].tolist() == english[1:].tolist()
        assert english.dtype == german.dtype == np.int64


def test_pairs_are_framed_by_the_tags_that_the_tokenizer_has(prepared):
    data = PreparedData(prepared)
    source, target = data.ids("train", "en-ti", 3)
    assert [source[0], target[0]] == [data.frame.tags["en"], data.frame.tags["ti"]]
    assert data.tokenizer.convert_ids_to_tokens([data.frame.tags["en"], data.frame.tags["ti"]]) == [
        "__en__",
        "__ti__",
    ]
    assert source[-1] == target[-1] == data.frame.end_id == data.tokenizer.eos_token_id
    assert data.frame.pad_id == data.tokenizer.pad_token_id


def test_lengths_are_those_of_the_pairs(prepared):
    data = PreparedData(prepared)
    for split in SIZES:
        for task in TASKS:
            lengths = data.lengths(split, task)
            pairs = [data.ids(split, task, index) for index in range(data.size(split, task))]
            for side in (0, 1):
                assert lengths[side].dtype == np.int64
                assert lengths[side].tolist() == [len(pair[side]) for pair in pairs]


def test_text_is_split_at_line_feeds_only(prepared):
    german, english = PreparedData(prepared).text("test", "de-en")
    assert len(german) == len(english) == SIZES["test"]
    assert german[-1].endswith(ODD)


def test_arrays_are_mapped_and_opened_when_first_used(copy):
    shutil.rmtree(copy / "train")
    data = PreparedData(copy)
    assert len(data.ids("valid", "en-de", 0)) == 2
    assert all(isinstance(array, np.memmap) for arrays in data._arrays.values() for array in arrays)
    with pytest.raises(ValueError, match=r"train/de-en\.en\.ids\.npy is not there; prepare the text anew"):
        data.ids("train", "en-de", 0)


def test_a_pickled_copy_maps_the_arrays_anew(prepared):
    data = PreparedData(prepared)
    data.lengths("train", "en-de")
    blob = pickle.dumps(data)
    assert len(blob) < 20_000
    assert pickle.loads(blob).ids("train", "en-de", 5)[0].tolist() == data.ids("train", "en-de", 5)[0].tolist()


def test_sampler_dataset_and_collate_make_task_pure_batches_for_a_data_loader(prepared):
    data = PreparedData(prepared)
    sampler = TaskBatchSampler(data, "train", 150, 5.0, 40, 1)
    batches = list(DataLoader(Examples(data, "train"), batch_sampler=sampler, collate_fn=collate))
    assert len(batches) == 40
    assert {batch["task"] for batch in batches} == set(TASKS)
    for number, batch in enumerate(batches):
        source, target = languages_of_task(batch["task"])
        assert batch["task"] == TASKS[sampler.plan[number]]
        assert set(batch["input_ids"][:, 0].tolist()) == {data.frame.tags[source]}
        assert set(batch["decoder_input_ids"][:, 1].tolist()) == {data.frame.tags[target]}
        assert set(batch["labels"][:, 0].tolist()) == {-100}
        assert set(batch["decoder_input_ids"][:, 0].tolist()) == {data.frame.end_id}
        rows, width = batch["input_ids"].shape
        assert rows * (width + batch["labels"].shape[1]) <= 150 or rows == 1


def test_every_validation_pair_is_in_one_evaluation_batch(prepared):
    data = PreparedData(prepared)
    dataset = Examples(data, "valid")
    batches = evaluation_batches(data, "valid", "en-ti", 60)
    assert sorted(index for batch in batches for index in batch) == list(range(SIZES["valid"]))
    tokens = sum(int(collate([dataset[2, i] for i in batch])["attention_mask"].sum()) for batch in batches)
    assert tokens == int(data.lengths("valid", "en-ti")[0].sum())


def test_prepared_text_is_used_without_babel_and_datasets(prepared):
    script = (
        "import sys\n"
        "for name in ('babel', 'datasets', 'sentencepiece'): sys.modules[name] = None\n"
        "from nspec.mt.text.prepared import PreparedData\n"
        f"data = PreparedData({str(prepared)!r})\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "print(data.ids('train', 'en-de', 0)[0].tolist(), len(data.tokenizer))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    data = PreparedData(prepared)
    assert done.stdout.split("\n")[0] == f"{data.ids('train', 'en-de', 0)[0].tolist()} {len(data.tokenizer)}", (
        done.stderr
    )


# Errors


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere has no prepared text: meta.json is not there; run `nspec prepare`"):
        PreparedData(tmp_path / "nowhere")


def test_another_format_version_is_an_error(copy):
    write_json(copy / "meta.json", read_json(copy / "meta.json") | {"format": 99})
    with pytest.raises(ValueError, match="has format 99, expected 1; prepare the text anew"):
        PreparedData(copy)


def test_another_tokenizer_is_an_error(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("__ti__", "__am__"), encoding="utf-8")
    with pytest.raises(ValueError, match="is not the tokenizer that the text was encoded with"):
        PreparedData(copy)


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_a_truncated_array_is_an_error_that_names_the_file(copy, keep):
    path = copy / "valid" / "de-en.de.ids.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"de-en\.de\.(ids|\*)\.npy .*prepare the text anew"):
        PreparedData(copy).ids("valid", "en-de", 0)


def test_arrays_that_do_not_belong_together_are_an_error(copy):
    shutil.copy(copy / "valid" / "en-ti.ti.ids.npy", copy / "valid" / "de-en.de.ids.npy")
    with pytest.raises(ValueError, match=r"expected 11 sentences and \d+ tokens; prepare the text anew"):
        PreparedData(copy).lengths("valid", "en-de")


def test_text_with_another_number_of_lines_is_an_error(copy):
    path = copy / "text" / "test" / "de-en.de.txt"
    path.write_text("one\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"de-en\.de\.txt has 1 lines, expected 7"):
        PreparedData(copy).text("test", "en-de")


def test_unknown_names_are_errors_that_list_the_known_ones(prepared):
    data = PreparedData(prepared)
    with pytest.raises(ValueError, match="no direction 'ti-en'; it has en-de, de-en, en-ti"):
        data.size("train", "ti-en")
    with pytest.raises(ValueError, match="no split 'dev'; expected train, valid, test"):
        data.size("dev", "en-de")
    with pytest.raises(ValueError, match="training text is not kept"):
        data.text("train", "en-de")
    with pytest.raises(IndexError, match="valid en-de has 11 sentences; there is none at 11"):
        data.ids("valid", "en-de", 11)
    with pytest.raises(IndexError):
        data.ids("valid", "en-de", -1)


@pytest.mark.parametrize("task", ["en", "en-", "-de", "en-de-fr", ""])
def test_what_is_no_direction_is_an_error(task):
    with pytest.raises(ValueError, match="expected two language codes"):
        languages_of_task(task)


def test_a_direction_and_its_reverse_share_a_pair():
    assert pair_of_task("en-de") == pair_of_task("de-en") == "de-en"
    assert pair_of_task("pt_BR-en") == "en-pt_BR"
