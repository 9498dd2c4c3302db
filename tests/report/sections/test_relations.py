from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import Page, make_methods_run

from nspec import NeuronMasks
from nspec.analysis.proximity import mask_chance, proximity
from nspec.report import build_report, words
from nspec.report.analyze import script_control
from nspec.report.run_data import load_run
from nspec.report.sections.relations import section


def test_masks_of_few_languages_are_not_tested_for_relation(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", sizes={"de": 10, "fr": 10, "ru": 10}, variants=[], layers=1)
    expected = "This is tested where masks cover 4 languages or more beside the pivot."
    assert section(load_run(run)) == {"reason": expected}


def test_relations_of_the_page_are_those_of_the_analysis(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=2)
    found = proximity(
        NeuronMasks.load(run / "masks"), "en", grouping="ec30", control=script_control, expected=mask_chance
    )
    text = Page(build_report(run)).words
    for row in found.layers:
        assert row.test is not None
        assert f"{words.signed(row.test.r)}" in text
        held = f"{words.signed(row.partial.r)} {row.partial_p_holm:.4f}" if row.partial else "– –"
        held += f" {words.signed(row.density.r)} {row.density_p_holm:.4f}" if row.density else " – –"
        assert f"{row.test.p:.4f} {row.p_holm:.4f} {held} {row.within:.3f} {row.across:.3f}" in text
    assert "Groups: EC30's own groups" in text
    assert not (run / "analysis").exists()
