"""Levels, families and transfer: with the tests of the scores, or without where scores are older."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import SIZES, Page, add_groups, edited, make_methods_run, shown

from nspec.report import build_report, score_table
from nspec.report.run_data import load_run
from nspec.report.sections.averages import family_section, level_section, transfer_section


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_methods_run(tmp_path / "run", variants=[], layers=1)


def cells(section: dict, system: str, half: str = "", metric: str = "BLEU") -> list[dict]:
    (part,) = [part for part in section["parts"] if part["half"] == half]
    (table,) = [table for table in part["tables"] if table["metric"] == metric]
    (row,) = [row for row in table["rows"] if row["name"] == system]
    return row["cells"]


def test_p_values_of_levels_are_adjusted_over_systems_and_levels_and_arrows_go_by_that(run: Path) -> None:
    add_groups(run, {"level:high": 0.0002, "level:medium": 0.004, "level:low": 0.3})
    tested = level_section(load_run(run))["tested"]
    assert [head["name"] for head in tested["heads"]] == ["high", "medium", "low"]
    high, medium, low = cells(tested, "Specialised (forward)")
    assert (high["score"], high["interval"], high["delta"]) == ("21.50", "20.5–22.5", "+1.50")
    assert (high["p"], high["holm"], high["mark"]) == ("p < 0.001", "0.004", "▲")  # 18 tests: 18 * 0.0002
    assert (medium["p"], medium["holm"], medium["mark"]) == ("p = 0.004", "0.048", "▲")  # 12 * 0.004
    assert (low["p"], low["holm"], low["mark"]) == ("p = 0.30", "1.00", "")
    assert cells(tested, "Bilingual models")[1]["mark"] == "▼"
    assert [cell["delta"] + cell["holm"] for cell in cells(tested, "Dense continued")] == ["", "", ""]
    # halves have a table, and a family of tests, of their own: of p = 0.01 for all
    half = cells(tested, "Specialised (forward)", "x→en")[0]
    assert (half["p"], half["holm"], half["mark"]) == ("p = 0.010", "0.18", "")


def test_a_family_has_the_scores_of_its_directions(run: Path) -> None:
    with edited(run / "scores" / "forward" / "scores.json") as scores:
        scores["tasks"]["en-nl"]["bleu"] += 4
    add_groups(run)
    section = family_section(load_run(run))
    assert section is not None
    assert [head["name"] for head in section["heads"]] == ["Germanic", "Romance"]  # Slavic, Afro-Asiatic: one language
    assert section["about"] == "Germanic de, nl (4 directions); Romance es, fr (4 directions)"
    assert [cell["score"] for cell in cells(section, "Specialised (forward)")] == ["22.50", "21.50"]
    assert [cell["score"] for cell in cells(section, "Specialised (forward)", "en→x")] == ["23.50", "21.50"]
    assert [cell["best"] for cell in cells(section, "Specialised (forward)")] == [True, True]
    assert not any(cell["best"] for cell in cells(section, "Dense"))


def test_the_page_has_the_tables_once_and_averages_stay_as_they_are(run: Path) -> None:
    add_groups(run)
    page = Page(build_report(run))
    assert page.is_sound()
    averages, _, rest = page.source.partition('id="directions"')
    assert "high" not in averages.partition('id="average"')[2].replace("highest", "")
    assert "They are not adjusted for the number of systems and averages." in page.words
    levels = rest.partition('id="levels"')[2].partition("</section>")[0]
    assert levels.count("adjusted by Holm's method over all systems and levels of a table") == 1
    assert levels.count("adjusted by Holm's method over all systems and families of a table") == 1
    assert levels.count("<summary>en→x and x→en apart</summary>") == 2
    assert "carry no test" not in levels
    tsv = (run / "report" / "scores.tsv").read_text(encoding="utf-8")
    assert "\taverage:family:Romance/to_en\t" in tsv


def test_the_terminal_table_has_no_columns_of_levels(run: Path) -> None:
    def text() -> str:
        return shown(score_table(run), 200)

    before = text()
    add_groups(run)
    assert text() == before


def test_older_scores_keep_untested_means_and_say_how_to_test_them(run: Path) -> None:
    section = level_section(load_run(run))
    assert section["tested"] is None
    page = Page(build_report(run)).words
    assert "These means carry no test: the scores are of an older version, which did not test levels" in page
    assert "which did not test families; `nspec evaluate CONFIG --redo score` makes them anew" in page
    assert "4 of 4 up" in page
    add_groups(run)
    with edited(run / "scores" / "lass" / "scores.json") as scores:  # one system older than the others
        del scores["groups"]
    assert level_section(load_run(run))["tested"] is None
    assert "older version" in (family_section(load_run(run)) or {})["reason"]


def test_a_run_of_one_family_has_no_such_tables_and_says_nothing(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", sizes={"de": 100, "nl": 100}, variants=[], layers=1)
    assert family_section(load_run(run)) is None
    add_groups(run)
    assert family_section(load_run(run)) is None
    assert "By language family" not in Page(build_report(run)).words


def test_groups_that_have_no_average_are_one_error(run: Path) -> None:
    add_groups(run)
    with edited(run / "scores" / "lass" / "scores.json") as scores:
        del scores["average"]["level:high"]
    with pytest.raises(ValueError, match=r"lass/scores.json: average.level:high should be an object, found nothing"):
        load_run(run)


def test_each_level_has_the_mean_change_of_its_directions(tmp_path: Path) -> None:
    section = level_section(load_run(make_methods_run(tmp_path / "run", variants=[])))
    assert section["reason"] == ""
    assert [(head["name"], head["range"], head["directions"]) for head in section["heads"]] == [
        ("high", "5\u202f000", 4),
        ("medium", "1\u202f000", 4),
        ("low", "100", 4),
    ]
    rows = {row["name"]: [(cell["text"], cell["up"]) for cell in row["cells"]] for row in section["rows"]}
    assert "Dense continued" not in rows
    bleu = [("+1.00", "4 of 4 up"), ("−3.00", "0 of 4 up"), ("−3.00", "0 of 4 up")]
    assert rows["Bilingual models"] == bleu + [("+2.00", "4 of 4 up"), ("−6.00", "0 of 4 up"), ("−6.00", "0 of 4 up")]
    assert "<svg" in section["figure"]


def test_equal_data_are_said_in_one_sentence_and_have_no_levels(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", sizes=dict.fromkeys(SIZES, 700), variants=[])
    section = level_section(load_run(run))
    assert section == {"reason": "All directions have the same 700 training sentences, so there are no levels."}
    (run / "prepared" / "meta.json").write_text("{}")
    assert "is not known" in level_section(load_run(run))["reason"]


def test_multilingual_minus_bilingual_is_transfer_or_interference(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[])
    section = transfer_section(load_run(run))
    assert section is not None
    names = [head["name"] for head in section["heads"]]
    assert "Bilingual models" not in names
    cells = {row["task"]: dict(zip(names, row["cells"])) for row in section["rows"]}
    assert cells["en-de"]["Dense"] == {"text": "−2.00", "beside": "−4.00", "kind": "interference"}
    assert cells["ru-en"]["Dense"] == {"text": "+2.00", "beside": "+4.00", "kind": "transfer"}
    assert cells["mean"]["Dense"]["text"] == "+0.67"  # 8 directions of 12 by +2, 4 by -2
    (run / "scores" / "bilingual" / "scores.json").unlink()
    assert transfer_section(load_run(run)) is None
