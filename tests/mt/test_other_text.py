"""Text of another folder, encoded for a run's model and profiled like its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_translation import Toy

from nspec.mt.config import ProfileConfig
from nspec.mt.other_text import OtherText
from nspec.mt.profiling import profile_tasks

pytestmark = pytest.mark.usefixtures("one_thread")


def other(toy: Toy, folder: Path, split: str = "valid") -> OtherText:
    config = toy.config()
    config.profile.path, config.profile.path_split = str(folder), split
    return OtherText(config, toy.data)


def test_the_same_text_from_elsewhere_gives_the_same_ids_and_counts(toy: Toy) -> None:
    text, data = other(toy, toy.folder / "corpus"), toy.data
    assert text.tasks == data.tasks
    for task in data.tasks:
        assert text.size("valid", task) == data.size("valid", task)
        for index in range(text.size("valid", task)):
            for mine, own in zip(text.pair("valid", task, index), data.pair("valid", task, index)):
                assert mine.tolist() == own.tolist()
    model = toy.model().eval()
    counts, own = (profile_tasks(model, each, ProfileConfig(), 256) for each in (text, data))
    assert all((counts[t][layer] == own[t][layer]).all() for t in own.tasks for layer in own.layers)


def test_another_part_of_the_folder_can_be_meant(toy: Toy) -> None:
    task = toy.data.tasks[0]
    source, _ = other(toy, toy.folder / "corpus", "test").pair("valid", task, 0)
    assert source.tolist() == toy.data.pair("test", task, 0)[0].tolist()


def test_an_evaluation_set_alone_is_enough(toy: Toy, tmp_path: Path) -> None:
    data = toy.data
    for language in ("de", "fr"):
        for side in (language, "en"):
            shutil.copy(toy.folder / "corpus" / f"valid.{language}-en.{side}", tmp_path)
    assert other(toy, tmp_path).size("valid", "en-de") == data.size("valid", "en-de") > 0
    with pytest.raises(ValueError, match=r"has no news text for any pair.*such as news\.en-de\.en"):
        other(toy, tmp_path, "news")


def test_what_is_wrong_there_is_said_of_the_options_that_name_it(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^profile\.path: .* does not exist"):
        other(toy, tmp_path / "nowhere")
    for code in toy.data.languages:
        (tmp_path / f"{code}.tsv").write_text("1\ta b\n")
    (tmp_path / "splits.json").write_text('{"devtest": ["1"]}')
    with pytest.raises(ValueError, match=r"no list 'dev' \(profile\.path_split\); it has devtest"):
        other(toy, tmp_path, "dev")


def test_a_folder_without_a_direction_of_the_run_is_an_error(toy: Toy, tmp_path: Path) -> None:
    for side in ("de", "en"):
        (tmp_path / f"valid.de-en.{side}").write_text("a b\n")
    with pytest.raises(ValueError, match=r"the valid text in .*fr"):
        other(toy, tmp_path)
