"""Which directions a run averages apart, and that its scores have them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nspec.files import read_json, write_json, write_text
from nspec.mt.scoring.averages import families, kind_of_group, resource_levels, run_groups
from nspec.run.config import Config
from nspec.run.pipeline import Pipeline

FAMILIES = {"en": "Germanic", "de": "Germanic", "nl": "Germanic", "fr": "Romance", "es": "Romance", "ru": "Slavic"}


def family_of(code: str) -> str:
    return FAMILIES.get(code, "")


def both_ways(*codes: str) -> list[str]:
    return [task for code in codes for task in (f"en-{code}", f"{code}-en")]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5000, 5000, 1000, 100], {"high": [0, 1], "medium": [2], "low": [3]}),
        # the two widest of three gaps
        ([100000, 40000, 1000, 10], {"high": [0, 1], "medium": [2], "low": [3]}),
        ([100, 5000, 120, 4000], {"high": [1, 3], "low": [0, 2]}),
        # no gap of more than 2, but thirds that differ by more: 8/6, 4/3, 2/1.5
        ([8000, 6000, 3100, 2900, 1500, 1000], {"high": [0, 1], "medium": [2, 3], "low": [4, 5]}),
        ([2000, 1500, 1000], {}),
        ([2000, 1000], {}),  # a factor of 2, not more
        ([2000, 999], {"high": [0], "low": [1]}),
        ([700, 700, 700], {}),
        ([], {}),
    ],
)
def test_levels_are_cut_where_training_pairs_differ_by_more_than_a_factor_of_two(
    sizes: list[int], expected: dict[str, list[int]]
) -> None:
    found = resource_levels({f"en-{number}": size for number, size in enumerate(sizes)})
    assert found == {name: [f"en-{number}" for number in members] for name, members in expected.items()}
    assert list(found) == list(expected)


def test_a_direction_belongs_to_the_family_of_its_language_beside_the_pivot() -> None:
    found = families(both_ways("de", "nl", "fr", "es", "ru"), "en", family_of)
    # the pivot is Germanic, and in every direction; Slavic is one language
    assert found == {"Germanic": both_ways("de", "nl"), "Romance": both_ways("fr", "es")}


def test_without_the_pivot_a_direction_belongs_to_the_families_of_both_languages() -> None:
    tasks = ["en-de", "de-fr", "es-nl", "fr-es"]
    assert families(tasks, "en", family_of) == {"Germanic": tasks[:3], "Romance": tasks[1:]}
    assert families(tasks, "", family_of)["Germanic"] == ["en-de", "de-fr", "es-nl"]


def test_a_language_of_unknown_family_is_in_none_and_one_family_alone_is_no_group() -> None:
    assert families(both_ways("de", "nl", "xx", "yy"), "en", family_of) == {}
    assert families(both_ways("de", "fr"), "en", family_of) == {}
    found = families([*both_ways("de", "nl", "ru"), "en-xx", "xx-ru"], "en", family_of)
    assert found == {"Germanic": both_ways("de", "nl")}


def test_a_run_has_levels_before_families() -> None:
    tasks = both_ways("de", "nl", "ru")
    sizes = dict(zip(tasks, [1000, 1000, 1000, 1000, 10, 0]))
    assert run_groups(tasks, sizes, "en", family_of) == {
        "level:high": both_ways("de", "nl"),
        "level:low": ["en-ru"],  # a direction without training sentences is in no level
        "family:Germanic": both_ways("de", "nl"),
    }
    assert run_groups(tasks, dict.fromkeys(tasks, 7), "en", lambda code: "") == {}


@pytest.mark.parametrize(
    ("average", "parts"),
    [
        ("level:high", ("level", "high", "")),
        ("family:Indo-Aryan/from_en", ("family", "Indo-Aryan", "from_en")),
        ("all", ("", "all", "")),
        ("from_en", ("", "from_en", "")),
        ("low/to_en", ("", "low/to_en", "")),
        ("mine:low", ("", "mine:low", "")),
    ],
)
def test_the_name_of_an_average_says_what_it_is_of(average: str, parts: tuple[str, str, str]) -> None:
    assert kind_of_group(average) == parts


def test_the_score_stage_averages_and_tests_levels_and_families(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    generator = random.Random(1)
    tasks = both_ways("de", "nl", "fr", "es")
    references = {task: [" ".join(generator.choices("abcdefgh", k=9)) for _ in range(8)] for task in tasks}
    for system in ("continued", "forward"):
        for task in tasks:
            folder = tmp_path / "scores" / system
            # forward is right in Romance directions alone
            right = system == "forward" and {"fr", "es"} & set(task.split("-"))
            said = references[task] if right else [line[:9] for line in references[task]]
            write_text(folder / f"{task}.hyp.txt", "".join(f"{line}\n" for line in said))
            write_json(folder / f"{task}.decode.json", {"sentences": 8, "seconds": 0.5})
    run: Any = Pipeline.__new__(Pipeline)
    run.config, run.folder = Config(), tmp_path
    run.config.corpus.pivot, run.config.score.bootstrap = "en", 40
    run.run = SimpleNamespace(finished=lambda stage: True)
    run._data = lambda: SimpleNamespace(
        tasks=tasks,
        text=lambda split, task: ([""] * 8, references[task]),
        size=lambda split, task: 1000 if "de" in task else 10,
    )
    run._score("forward", tmp_path / "scores" / "forward")
    scores = read_json(tmp_path / "scores" / "forward" / "scores.json")
    assert scores["groups"] == {
        "level:high": both_ways("de"),
        "level:low": both_ways("nl", "fr", "es"),
        "family:Germanic": both_ways("de", "nl"),
        "family:Romance": both_ways("fr", "es"),
    }
    halves = [f"{group}{end}" for group in scores["groups"] for end in ("", "/from_en", "/to_en")]
    assert list(scores["average"]) == ["all", "from_en", "to_en", *halves]
    romance, germanic = scores["average"]["family:Romance"], scores["average"]["family:Germanic"]
    assert romance["bleu"] == pytest.approx(100)
    assert romance["baseline"]["system"] == "continued"
    assert romance["baseline"]["bleu_p_ar"] < 0.01
    assert germanic["baseline"]["bleu_delta"] == 0
    assert germanic["baseline"]["bleu_p_ar"] == 1
