"""Text of another folder, encoded for a run's model and profiled like its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_translation import Toy

from nspec.mt.config import ProfileConfig
from nspec.mt.profiling import profile_tasks
from nspec.mt.text.other import OtherText
from nspec.run.pipeline import Pipeline
from nspec.run.readiness import check_other_texts

pytestmark = pytest.mark.usefixtures("one_thread")


def other(toy: Toy, folder: Path, split: str = "valid") -> OtherText:
    config = toy.config()
    config.profile.path, config.profile.path_split = str(folder), split
    return OtherText(config.profile, config.corpus, config.run.seed, toy.data)


def test_the_same_text_from_elsewhere_gives_the_same_ids_and_counts(toy: Toy) -> None:
    text, data = other(toy, toy.folder / "corpus"), toy.data
    assert text.tasks == data.tasks
    for task in data.tasks:
        assert text.size("valid", task) == data.size("valid", task)
        for index in range(text.size("valid", task)):
            for mine, own in zip(text.ids("valid", task, index), data.ids("valid", task, index)):
                assert mine.tolist() == own.tolist()
    model = toy.model().eval()
    counts, own = (profile_tasks(model, each, ProfileConfig(), 256) for each in (text, data))
    assert all((counts[t][layer] == own[t][layer]).all() for t in own.tasks for layer in own.layers)


def test_another_part_of_the_folder_can_be_meant(toy: Toy) -> None:
    task = toy.data.tasks[0]
    source, _ = other(toy, toy.folder / "corpus", "test").ids("valid", task, 0)
    assert source.tolist() == toy.data.ids("test", task, 0)[0].tolist()


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


def test_the_limits_of_the_own_text_are_not_those_of_another(toy: Toy, tmp_path: Path) -> None:
    for language in ("de", "fr"):
        for side in (language, "en"):
            shutil.copy(toy.folder / "corpus" / f"valid.{language}-en.{side}", tmp_path)
    config = toy.config()
    config.profile.path, config.corpus.valid_sentences, config.corpus.test_sentences = str(tmp_path), 1, 1
    assert (
        OtherText(config.profile, config.corpus, config.run.seed, toy.data).size("valid", "en-de")
        == toy.data.size("valid", "en-de")
        > 1
    )


BROKEN = {
    "no text of the part": ("news", "valid.de-en.de", "a\n", r"has no news text for "),
    "one side is longer": ("valid", "valid.fr-en.fr", "a\n" * 999, "en has 40 lines and .*fr has 999"),
    "no UTF-8": ("valid", "valid.fr-en.en", "\udce9\n", r"valid\.fr-en\.en, line 1: not valid UTF-8"),
    "empty": ("valid", "valid.fr-en.en", "\n", "has 1 lines"),
}


@pytest.mark.parametrize("system", ["forward", "a variant"])
@pytest.mark.parametrize("wrong", BROKEN)
def test_what_profiling_will_read_is_read_before_training(toy: Toy, tmp_path: Path, system: str, wrong: str) -> None:
    for path in (toy.folder / "corpus").glob("valid.*"):
        shutil.copy(path, tmp_path)
    config = toy.config()
    part, file, content, message = BROKEN[wrong]

    def choose(part: str) -> None:
        if system == "forward":
            config.profile.path, config.profile.path_split = str(tmp_path), part
        else:
            config.run.systems = ["dense"]
            config.run.variants = [f"other = update profile.path={tmp_path} profile.path_split={part}"]

    choose("valid")
    check_other_texts(config, toy.data.languages, toy.data.tasks)
    choose(part)
    (tmp_path / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        check_other_texts(config, toy.data.languages, toy.data.tasks)
    config.run.folder = str(tmp_path / "run")
    with Pipeline(config) as pipeline:
        pipeline.run.do("prepare", lambda folder: shutil.copytree(toy.folder / "prepared", folder, dirs_exist_ok=True))
        with pytest.raises(ValueError, match=message):
            pipeline.train()
    assert not (tmp_path / "run" / "systems").exists()


def test_what_no_system_profiles_is_not_read(toy: Toy, tmp_path: Path) -> None:
    config = toy.config()
    config.run.systems, config.profile.path = ["dense", "continued"], str(tmp_path)
    check_other_texts(config, toy.data.languages, toy.data.tasks)
