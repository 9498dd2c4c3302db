"""The page of a run that compares methods."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import METHODS, Page, make_methods_run

from nspec.files import write_json
from nspec.mt.systems import KINDS, Variant
from nspec.report import build_report, published, words
from nspec.report.run_data import load_run
from nspec.report.sections.masks import iou_masks
from nspec.report.sections.training import cost_rows, size


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_methods_run(tmp_path_factory.mktemp("runs") / "methods", layers=2)
    build_report(run)
    return run


def test_every_built_in_system_has_a_name_a_meaning_and_a_colour_of_its_own() -> None:
    from nspec.report.drawing import COLOURS

    assert set(words.SYSTEMS) == set(KINDS) == set(COLOURS)
    assert len({name for name, _ in words.SYSTEMS.values()}) == len(set(COLOURS.values())) == len(KINDS)
    assert all(meaning for _, meaning in words.SYSTEMS.values())


def test_a_variant_is_called_by_what_it_varies() -> None:
    variants = {"forward-k70": Variant("forward-k70", "forward", {"select.k": 0.7, "profile.split": "train"})}
    said = words.system_name("forward-k70", variants)
    assert said == "forward-k70: Specialised (forward), select.k = 0.7, profile.split = train"
    assert words.in_sentence("Dense continued") == "dense continued"
    assert words.in_sentence("LaSS") == "LaSS"
    assert words.in_sentence("K: LaSS, lass.alpha = 0.5") == "K: LaSS, lass.alpha = 0.5"


def test_page_has_every_part_and_stays_whole(built: Path) -> None:
    page = Page(built / "report" / "index.html")
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    inside = {r[1:] for r in page.references if r.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert inside <= set(page.ids)
    assert not re.search(r"url\((?!#)|@import|<script|https?://", page.source)
    assert {"levels", "costs", "ablations", "masks", "relations"} <= set(page.ids)
    for name in [
        *(words.SYSTEMS[system][0] for system in METHODS),
        "forward-k70: Specialised (forward), select.k = 0.7",
    ]:
        assert name in page.words
    labels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)"', page.source)
    for part in ("published values", "level of training pairs", "against an option", "variants", "Tree of languages"):
        assert any(part in label for label in labels), part
    assert "this run (k = 0.95)" in page.words
    assert "published (k = 0.95)" in page.words
    assert "published (k = 0.7)" in page.words
    assert "Germanic" in page.words


def test_tests_are_those_of_approximate_randomisation_where_it_is_there(built: Path, tmp_path: Path) -> None:
    # The bootstrap of the invented scores says p = 0.5, randomisation 0.01.
    text = Page(built / "report" / "index.html").words
    assert "All p values and arrows are those of two-sided approximate randomisation (10 000 trials)." in text
    assert (
        "Specialised (forward) is significantly better than dense continued: +1.50 BLEU on average (p = 0.010)." in text
    )
    assert "(12 significantly)" in text
    assert "one direction in twenty is marked by chance" in text
    old = make_methods_run(tmp_path / "old", variants=[], layers=1)
    for path in old.glob("scores/*/scores.json"):
        scores = json.loads(path.read_text())
        for entry in [*scores["tasks"].values(), *scores["average"].values()]:
            for key in ("bleu_p_ar", "chrf_p_ar", "ar_trials"):
                (entry["baseline"] or {}).pop(key, None)
        write_json(path, scores)
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
    assert words.two_sided(data) is None
    assert "where scores are older than that test, of the paired bootstrap" in words.test_sentence(data)
    test = data.scored["lass"]["average"]["all"]["baseline"]
    assert words.p_value(test, "bleu") == 0.5
    assert words.arrow(test, "bleu") == ""


def test_costs_stand_beside_scores_and_what_is_not_said_is_a_dash(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[], layers=1)
    path = run / "systems" / "lass" / "summary.json"
    summary = json.loads(path.read_text())
    for key in ("parameters_added", "parameters_trained", "mask_bytes", "density"):
        del summary[key]
    write_json(path, summary)
    (run / "scores" / "random" / "scores.json").unlink()
    rows = {row["id"]: row for row in cost_rows(load_run(run))}
    assert rows["forward"] == {
        **{"id": "forward", "name": "Specialised (forward)", "is_baseline": False, "bleu": "21.50", "chrf": "43.00"},
        **{"parameters_added": "4\u202f096", "parameters_trained": "5\u202f555", "masks": "98.3 kB", "density": "1"},
        **{"updates": "300", "tokens": "1\u202f234\u202f567", "seconds": "1 min 01 s", "speed": "4\u202f321"},
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


def test_published_iou_is_compared_with_the_masks_of_the_nearest_k(tmp_path: Path) -> None:
    data = load_run(make_methods_run(tmp_path / "run", layers=1))
    assert published.IOU_K == 0.7
    chosen, k = iou_masks(data)
    assert k == 0.7
    assert chosen is data.variant_masks["forward-k70"]
    data.variant_masks.clear()
    assert iou_masks(data) == (data.masks, 0.95)


def test_published_numbers_are_shares_of_six_layers() -> None:
    for table in (published.MASKED, published.IOU):
        assert all(len(values) == 6 and all(0 < value < 1 for value in values) for values in table.values())
    mean = [sum(values) / 6 for values in published.MASKED.values()]
    assert 1 - sum(mean) / 4 == pytest.approx(0.78, abs=0.005)  # the density that these shares stand for


def test_masks_of_few_languages_are_not_tested_for_relation(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", sizes={"de": 10, "fr": 10, "ru": 10}, variants=[], layers=1)
    text = Page(build_report(run)).words
    assert "This is tested where masks cover 4 languages or more beside the pivot." in text
    assert not (run / "analysis").exists()


def test_relations_of_the_page_are_those_of_the_analysis(built: Path) -> None:
    from nspec import NeuronMasks
    from nspec.analysis.proximity import proximity
    from nspec.report.analyze import script_control

    found = proximity(NeuronMasks.load(built / "masks"), "en", grouping="ec30", control=script_control)
    text = Page(built / "report" / "index.html").words
    for row in found.layers:
        assert row.test is not None
        assert f"{words.signed(row.test.r)}" in text
        held = f"{words.signed(row.partial.r)} {row.partial_p_holm:.4f}" if row.partial else "– –"
        assert f"{row.test.p:.4f} {row.p_holm:.4f} {held} {row.within:.3f} {row.across:.3f}" in text
    assert "Groups: EC30's own groups" in text


def test_models_that_only_another_system_needs_do_not_make_a_run_unfinished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_methods_run(run)
    before = load_run(run).missing
    write_json(run / "systems" / "needed" / "summary.json", {"system": "needed", "updates": 1})
    data = load_run(run)
    assert data.systems["needed"].scores is None
    assert data.missing == before == []
