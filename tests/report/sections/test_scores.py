"""Which tests the page goes by, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import Page, edited, make_methods_run

from nspec.files import write_json
from nspec.report import build_report, words
from nspec.report.run_data import load_run
from nspec.report.sections.scores import which_test


def test_tests_are_those_of_approximate_randomisation_where_it_is_there(tmp_path: Path) -> None:
    # The bootstrap of the invented scores says p = 0.5, randomisation 0.01.
    text = Page(build_report(make_methods_run(tmp_path / "new", variants=[], layers=1))).words
    assert "All p values and arrows are those of two-sided approximate randomisation (10 000 trials)." in text
    assert (
        "Specialised (forward) is significantly better than dense continued: +1.50 BLEU on average (p = 0.010)." in text
    )
    assert "(12 significantly)" in text
    assert "one direction in twenty is marked by chance" in text
    old = make_methods_run(tmp_path / "old", variants=[], layers=1)
    for path in old.glob("scores/*/scores.json"):
        with edited(path) as scores:
            for entry in [*scores["tasks"].values(), *scores["average"].values()]:
                for key in ("bleu_p_ar", "chrf_p_ar", "ar_trials"):
                    (entry["baseline"] or {}).pop(key, None)
    text = Page(build_report(old)).words
    assert "All p values and arrows are those of the paired bootstrap (1 000 samples)" in text
    assert "Specialised (forward) shows no significant difference from dense continued" in text
    assert "approximate randomisation" not in text.lower()
    assert "▲" not in text.split("Specialised (forward)")[3]


def test_older_scores_beside_newer_ones_are_said_to_be_of_the_bootstrap(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=1)
    path = run / "scores" / "lass" / "scores.json"
    write_json(path, json.loads(path.read_text().replace("_p_ar", "_p_unknown")))
    data = load_run(run)
    assert data.two_sided is None
    assert "where scores are older than that test, of the paired bootstrap" in which_test(data)
    test = data.scored["lass"]["average"]["all"]["baseline"]
    assert words.p_value(test, "bleu") == 0.5
    assert words.arrow(test, "bleu") == ""
