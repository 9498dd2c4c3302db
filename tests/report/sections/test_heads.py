"""The section of the page on attention heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from fabricated_run import SIZES, Page, add_heads, make_methods_run

from nspec.files import write_json
from nspec.report import build_report, measured_heads
from nspec.report.run_data import load_run
from nspec.report.sections.heads import heat, layers_of_kind, section, strongest
from nspec.run.stages import stages_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_methods_run(tmp_path / "run", variants=[], layers=1)


def test_a_run_without_measured_heads_says_how_to_get_them(run: Path) -> None:
    page = Page(build_report(run))
    assert f"Not measured. `nspec analyze {run} --heads 100` measures on validation sentences" in page.words
    assert "heads" in page.ids


def test_heads_of_each_kind_have_a_map_with_directions_in_groups(run: Path) -> None:
    importance = add_heads(run)
    found = section(load_run(run))
    assert [each["kind"] for each in found["maps"]] == [
        "Encoder self-attention",
        "Decoder self-attention",
        "Cross-attention",
    ]
    tasks = ["en-de", "en-nl", "en-fr", "de-en", "nl-en", "fr-en"]
    rows = np.concatenate(
        [importance.shares(layer)[[importance.tasks.index(t) for t in tasks]] for layer in importance.layers[:2]],
        axis=1,
    )
    axes = heat(rows, [4, 4], tasks, "en").axes[0]
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(rows)
    assert [label.get_text() for label in axes.get_yticklabels()] == tasks
    assert [text.get_text() for text in axes.texts] == ["Germanic", "Romance"] * 2
    lines = [(line.get_xdata(), line.get_ydata(), line.get_linewidth()) for line in axes.lines]
    assert [x[0] for x, _, _ in lines if x[0] == x[1]] == [3.5]  # between the two layers
    assert [(y[0], width > 2) for _, y, width in lines if y[0] == y[1]] == [(1.5, False), (2.5, True), (4.5, False)]


def test_shares_of_a_layer_sum_to_one(run: Path) -> None:
    importance = add_heads(run)
    for layer in importance.layers:
        rows = importance.shares(layer)
        assert rows.sum(1) == pytest.approx(1)
        assert rows[1] / rows[1, 0] == pytest.approx(importance.matrix(layer)[1] / importance.matrix(layer)[1, 0])


def test_the_head_that_stands_out_most_is_named(run: Path) -> None:
    importance = add_heads(run)
    (layer,) = [name for name in importance.layers if name.endswith("1.encoder_attn")]
    assert layers_of_kind(importance)["cross"][1] == layer
    usual = importance.shares(layer)[:, 2].mean()
    assert strongest(importance, importance.tasks) == (
        "Directions differ most in head 2 of cross-attention, layer 1: it has 100 % of its layer's importance in en-de "
        f"and {100 * usual:.0f} % on average over directions (it would be 25 % if all heads mattered alike)."
    )
    assert strongest(importance, ["en-de"]) == ""


def test_related_languages_are_tested_where_there_are_enough(run: Path) -> None:
    add_heads(run)
    found = section(load_run(run))
    assert found["tested"]
    assert found["relation"].startswith("Do related languages use the same heads? en→x: in ")
    assert "of 6 attention layers closer languages use heads more alike" in found["relation"]
    add_heads(run, list(SIZES)[:3])
    found = section(load_run(run))
    assert not found["tested"]
    assert "is tested where there are 4 languages or more" in found["relation"]


def test_the_page_stays_whole_and_the_same_with_heads(run: Path) -> None:
    add_heads(run)
    first = build_report(run).read_bytes()
    page = Page(run / "report" / "index.html")
    assert page.is_sound()
    assert "on at most 40 validation sentences a direction" in page.words
    assert "trained anew" not in page.words
    assert build_report(run).read_bytes() == first


def test_the_report_stage_sees_heads_that_were_measured_since(run: Path) -> None:
    add_heads(run)
    (report,) = [stage for stage in stages_of(load_run(run).config) if stage.name == "report"]
    read = {path.name for pattern in report.inputs for path in run.glob(pattern)}
    assert {"heads.safetensors", "measured.json"} <= read


def test_heads_of_an_earlier_training_are_said_to_be(run: Path) -> None:
    record = run / "systems" / "dense" / "stage.json"
    write_json(record, {"stage": "train", "seconds": 1.5})
    add_heads(run)
    assert measured_heads.load(run)[2] is False
    write_json(record, {"stage": "train", "seconds": 1.75})
    assert measured_heads.load(run)[2] is True
    assert "trained anew after this was measured" in Page(build_report(run)).words


def test_broken_heads_are_one_error(run: Path) -> None:
    add_heads(run)
    write_json(run / "analysis" / "heads" / "measured.json", [1])
    with pytest.raises(ValueError, match=r"measured.json holds list, expected a JSON object"):
        build_report(run)
    (run / "analysis" / "heads" / "measured.json").unlink()
    (run / "analysis" / "heads" / "heads.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"heads.safetensors is broken"):
        build_report(run)
