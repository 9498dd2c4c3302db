from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import edited, make_methods_run

from nspec.report.run_data import load_run
from nspec.report.sections.training import continued_systems, cost_rows, size


def test_costs_stand_beside_scores_and_what_is_not_said_is_a_dash(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=1)
    with edited(run / "systems" / "lass" / "summary.json") as summary:
        for key in ("parameters_added", "parameters_trained", "mask_bytes", "density"):
            del summary[key]
    (run / "scores" / "random" / "scores.json").unlink()
    rows = {row["id"]: row for row in cost_rows(load_run(run))}
    assert rows["forward"] == {
        **{"id": "forward", "name": "Specialised (forward)", "is_baseline": False, "bleu": "21.50", "chrf": "43.00"},
        **{"parameters_added": "4\u202f096", "parameters_trained": "5\u202f555", "masks": "98.3 kB", "density": "1"},
        **{"updates": "300", "tokens": "1\u202f234\u202f567", "seconds": "1 min 01 s", "speed": "4\u202f321"},
        "memory": "–",
    }
    old = rows["lass"]
    assert [old[key] for key in ("parameters_added", "parameters_trained", "masks", "density")] == ["–"] * 4
    assert old["updates"] == "300"
    assert rows["random"]["bleu"] == rows["random"]["chrf"] == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (960, "960 B"), (1000, "1 kB"), (98304, "98.3 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB"), (None, "–")],
)
def test_bytes_are_said_in_decimal_units(value: float | None, text: str) -> None:
    assert size(value) == text


def test_models_for_single_directions_are_not_among_the_curves(tmp_path: Path) -> None:
    data = load_run(make_methods_run(tmp_path / "run", layers=1))
    point = [{"step": 1, "loss": 2.0, "valid_loss": 2.0}]
    for system in data.systems.values():
        system.training = system.validation = point
    shown = continued_systems(data)
    assert "forward-k70" in shown
    assert not {"dense", "bilingual"} & set(shown)
