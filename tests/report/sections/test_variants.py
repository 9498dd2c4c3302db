from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from fabricated_run import make_methods_run

from nspec import NeuronMasks
from nspec.report.run_data import load_run
from nspec.report.sections.variants import curves, section, stabilities, stability

LAYER = "model.encoder.layers.0.fc1"


def test_a_curve_has_the_variants_of_one_option_and_the_runs_own_value(tmp_path: Path) -> None:
    lines = ["a = forward select.k=0.7", "b = forward select.k=0.5", "c = random select.k=0.6"]
    lines += ["d = forward select.k=0.6 profile.split=train", "e = forward profile.split=train"]
    data = load_run(make_methods_run(tmp_path / "run", variants=lines, layers=1))
    (curve,) = curves(data)
    assert (curve.of, curve.option) == ("forward", "select.k")
    assert curve.values == (0.5, 0.7, 0.95)
    assert curve.systems == ("b", "a", "forward")
    assert curve.change["bleu"] == pytest.approx((0.75, 1.0, 1.5))
    assert curve.change["chrf"] == pytest.approx((1.5, 2.0, 3.0))


def test_the_runs_own_value_of_a_part_is_that_of_all_parts(tmp_path: Path) -> None:
    data = load_run(make_methods_run(tmp_path / "run", variants=["a = forward select.k_from_decoder=0.7"], layers=1))
    assert [curve.values for curve in curves(data)] == [(0.7, 0.95)]


def test_one_variant_without_the_system_that_it_varies_is_no_curve(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=["a = forward select.k=0.7"], layers=1)
    assert len(curves(load_run(run))) == 1
    (run / "scores" / "forward" / "scores.json").unlink()
    assert curves(load_run(run)) == []


def test_stability_is_the_mean_iou_of_a_direction_with_itself() -> None:
    def masks(**rows: list[int]) -> NeuronMasks:
        return NeuronMasks({task.replace("_", "-"): {LAYER: torch.tensor(row).bool()} for task, row in rows.items()})

    base = masks(en_de=[1, 1, 1, 0], de_en=[1, 1, 0, 0], en_fr=[1, 0, 0, 0])
    own = masks(en_de=[1, 1, 0, 0], de_en=[0, 0, 1, 1])
    found = stability("v", own, base)
    assert found is not None
    assert found.layers == (LAYER,)
    assert found.iou[0] == pytest.approx((2 / 3 + 0) / 2)
    # densities 2/4 and 3/4, then 2/4 and 2/4: ab / (a + b - ab)
    assert found.chance[0] == pytest.approx((0.375 / 0.875 + 0.25 / 0.75) / 2)
    assert found.density == 0.5
    assert stability("v", masks(it_en=[1, 1, 1, 1]), base) is None


def test_variants_with_a_selection_of_their_own_are_compared_with_the_runs(tmp_path: Path) -> None:
    lines = ["k = forward select.k=0.5", "long = forward specialize.updates=9"]
    data = load_run(make_methods_run(tmp_path / "run", variants=lines, layers=2))
    (found,) = stabilities(data)
    assert found.system == "k"
    own, base = data.variant_masks["k"], data.masks
    assert base is not None
    ratios = [(own[t][found.layers[3]].sum() / base[t][found.layers[3]].sum()).item() for t in own.tasks]
    assert found.iou[3] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)  # the variant's lie within the run's
    found_section = section(data)
    assert found_section is not None
    rows = {row["name"]: row for row in found_section["rows"]}
    assert rows["k"]["density"] == f"{found.density:.3f}"
    assert rows["k"]["iou"] == f"{found.iou.mean():.3f}"
    assert (rows["k"]["k"], rows["long"]["k"]) == ("0.5", "0.95")
    assert rows["long"]["iou"] == "–"
    assert rows["k"]["cells"][0] == {"score": "21.00", "delta": "+1.00 ▲", "p": "p = 0.010"}


def test_a_run_without_variants_has_no_such_section(tmp_path: Path) -> None:
    assert section(load_run(make_methods_run(tmp_path / "run", variants=[], layers=1))) is None
