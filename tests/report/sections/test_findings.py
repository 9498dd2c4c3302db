from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import Page, make_methods_run

from nspec.files import write_json
from nspec.report.page import build_report
from nspec.report.run_data import load_run
from nspec.report.sections.findings import score_chart, section


def test_the_picture_has_every_system_in_its_interval_and_dense_as_a_line(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=["k = forward select.k=0.7"], layers=1)
    data = load_run(run)
    axes = score_chart(data, "bleu").axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [data.short(system) for system in data.scored]
    assert names[-1] == "k"
    at = names.index("Specialised (forward)")
    drawn = [list(line.get_xdata()) for line in axes.lines if line.get_ydata()[0] == at]
    assert [20.5, 22.5] in drawn
    assert [21.5] in drawn
    assert axes.texts[at].get_text() == "21.50 ▲"
    assert axes.texts[names.index("Dense continued")].get_text() == "20.00"
    (reference,) = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]  # the height of the panel
    assert list(reference.get_xdata()) == [19.0, 19.0]
    low, high = axes.get_xlim()
    assert low < 18
    assert high > 22.5


def test_without_dense_another_system_is_the_line_and_without_scores_there_is_no_picture(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=1)
    assert section(load_run(run))["reference"] == "dense"
    (run / "scores" / "dense" / "scores.json").unlink()
    assert section(load_run(run))["reference"] == "dense continued"
    for path in run.glob("scores/*/scores.json"):
        path.unlink()
    found = section(load_run(run))
    assert (found["chart"], found["reference"]) == ([], "")


def test_what_was_declared_comes_first_with_its_result_and_whether_it_came_before(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=1)
    assert section(load_run(run))["declared"] is None
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("primary: ''", "primary: forward bleu all"))
    noted = {"hypothesis": "It helps.", "primary": "forward bleu all", "date": "2026-11-29", "scored": []}
    write_json(run / "protocol.json", [noted])
    words = Page(build_report(run)).words
    assert "Hypothesis. It helps." in words
    assert "Specialised (forward) against dense continued, BLEU, all directions: +1.50 points" in words
    assert "Declared on 2026-11-29, before anything was scored." in words
    write_json(run / "protocol.json", [noted, {**noted, "scored": ["forward"]}])
    declared = section(load_run(run))["declared"]
    assert "when there were scores of specialised (forward) already" in declared["when"]
    assert "declared otherwise before (1 time)" in declared["when"]
