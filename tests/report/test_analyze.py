from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricated_run import shown

from nspec import NeuronMasks, cli
from nspec.analysis import layer_iou
from nspec.analysis.heads import HeadImportance
from nspec.analysis.languages import group_of
from nspec.analysis.mantel import mantel
from nspec.analysis.typology import typological_distances
from nspec.files import write_text
from nspec.report import measured_heads
from nspec.report.analyze import COLUMNS, analyze_run, proximity_table
from nspec.run.config import Config
from nspec.run.yaml import render

CODES = ["ar", "de", "es", "fa", "he", "it", "nl", "pl"]
LAYERS = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(2)]


def make_run(run: Path, codes: list[str] = CODES, pivot: str = "en", equal_layer: bool = False) -> Path:
    config = Config()
    config.corpus.pivot = pivot
    write_text(run / "config.yaml", render(config))
    generator = torch.Generator().manual_seed(3)
    tasks = [task for code in codes for task in (f"en-{code}", f"{code}-en")]
    masks = {task: {layer: torch.rand(200, generator=generator) < 0.7 for layer in LAYERS} for task in tasks}
    if equal_layer:
        for task in tasks:
            masks[task][LAYERS[0]] = masks[tasks[0]][LAYERS[0]]
    NeuronMasks(masks).save(run / "masks")
    return run


def test_the_verb_prints_a_row_per_layer_and_writes_its_files(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run", equal_layer=True)
    assert cli.main(["analyze", str(run), "--permutations", "99"]) == 0
    printed = capfd.readouterr().out
    assert len(re.findall(r"coder \d +(en→x|x→en)", printed)) == 8
    assert f"analysis: {run / 'analysis'}" in printed
    assert re.search(
        r"script held constant .*: r [+-]0\.\d\d to [+-]0\.\d\d, Holm p < 0\.05 in \d of 6 rows",
        " ".join(printed.split()),
    )
    with open(run / "analysis" / "analysis.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == COLUMNS
    assert [(row["layer"], row["direction"]) for row in rows] == [
        (layer, d) for layer in LAYERS for d in ("from", "to")
    ]
    assert rows[0]["p"] == rows[0]["r"] == ""
    assert rows[0]["reason"] == "every two masks overlap alike"
    saved = json.loads((run / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    assert saved["languages"] == {"from": CODES, "to": CODES}
    assert saved["layers"][0]["test"] is None
    assert saved["layers"][0]["p_holm"] is None
    for row, entry in zip(rows[2:], saved["layers"][2:]):
        assert float(row["p"]) == pytest.approx(entry["test"]["p"], rel=1e-5)
        assert float(row["partial_p"]) == pytest.approx(entry["partial"]["p"], rel=1e-5)
        assert float(row["density_p"]) == pytest.approx(entry["density"]["p"], rel=1e-5)
        assert float(row["iou_within"]) == pytest.approx(entry["within"], rel=1e-5)
        assert row["exact"] == "false"
    assert [(tree["side"], tree["direction"]) for tree in saved["trees"]] == [
        (side, direction) for side in ("encoder", "decoder") for direction in ("from", "to")
    ]
    for tree in saved["trees"]:
        assert sorted(tree["order"]) == CODES
        assert sorted(re.findall(r"[a-z]{2}", tree["newick"])) == CODES
        svg = (run / "analysis" / f"dendrogram_{tree['side']}_{tree['direction']}_en.svg").read_text(encoding="utf-8")
        drawn = re.findall(r">([a-z]{2})</text>", svg)
        assert drawn == tree["order"]
        assert "Germanic" in svg


def test_distances_in_structure_are_taken_by_name(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    assert cli.main(["analyze", str(run), "--permutations", "99", "--distances", "uriel-syntax"]) == 0
    assert "Distance of masks against uriel-syntax" in " ".join(capfd.readouterr().out.split())
    saved = json.loads((run / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    assert saved["distances"] == "uriel-syntax"
    far = typological_distances("syntax")(CODES)
    masks = NeuronMasks.load(run / "masks")
    iou = layer_iou(masks, [LAYERS[0]], [f"en-{code}" for code in CODES])[0]
    expected = mantel(1 - iou, far, method="spearman", alternative="greater", permutations=99, seed=0)
    assert saved["layers"][0]["test"]["r"] == pytest.approx(expected.r)
    assert cli.main(["analyze", str(run), "--distances", "uriel-colour"]) == 2
    assert "URIEL has no 'colour' here, expected one of syntax" in capfd.readouterr().err


def test_the_same_masks_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    analyze_run(run, permutations=99)
    before = {path.name: path.read_bytes() for path in (run / "analysis").iterdir()}
    assert len(before) == 6
    analyze_run(run, permutations=99)
    assert {path.name: path.read_bytes() for path in (run / "analysis").iterdir()} == before


def test_the_table_fits_eighty_columns(tmp_path: Path) -> None:
    (result,) = analyze_run(make_run(tmp_path / "run"), permutations=9)
    text = shown(proximity_table(result.proximity), 80)
    assert "…" not in text
    assert len(re.findall(r"\n *encoder \d", text)) == 4


def test_heads_are_tested_beside_neurons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that follow the branches of the languages are found to, whatever the neurons do."""
    run = make_run(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    branches = sorted(set(map(group_of, CODES)))
    of_branch = {name: 0.05 + torch.eye(8)[number] for number, name in enumerate(branches)}  # a head for each branch
    layers = [f"model.{side}.layers.0.self_attn" for side in ("encoder", "decoder")]
    importance = {
        task: {layer: of_branch[group_of(code)] + 0.01 * torch.rand(8, generator=generator) for layer in layers}
        for code in CODES
        for task in (f"en-{code}", f"{code}-en")
    }
    asked: list[Any] = []
    monkeypatch.setattr(
        measured_heads, "measure_heads", lambda run, sentences: asked.append(sentences) or HeadImportance(importance)
    )
    neurons, heads = analyze_run(run, permutations=999, heads=50)
    assert asked == [50]
    assert (neurons.what, heads.what) == ("neurons", "heads")
    assert {row.layer for row in heads.proximity.layers} == set(layers)
    assert all(row.test is not None and row.test.p < 0.2 for row in heads.proximity.layers)
    assert all(row.within > row.across for row in heads.proximity.layers)
    assert HeadImportance.load(run / "analysis" / "heads").tasks == list(importance)
    assert (run / "analysis" / "heads" / "analysis.tsv").is_file()


def test_heads_of_few_languages_are_measured_and_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "run", ["de", "fr", "ru"])
    importance = HeadImportance({"en-de": {"model.encoder.layers.0.self_attn": torch.tensor([0.25, 0.5])}})
    monkeypatch.setattr(measured_heads, "measure_heads", lambda run, sentences: importance)
    assert cli.main(["analyze", str(run), "--heads", "30"]) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines() == [
        "heads: measured, not tested: that needs 4 languages or more beside the pivot",
        f"analysis: {run / 'analysis' / 'heads'}",
    ]
    loaded = measured_heads.load(run)
    assert loaded is not None
    assert loaded[0].matrix(importance.layers[0]).tolist() == [[0.25, 0.5]]
    assert loaded[1:] == (30, False)
    assert sorted(path.name for path in run.glob("analysis/**/*") if path.is_file()) == [
        "heads.json",
        "heads.safetensors",
        "measured.json",
    ]


def test_what_cannot_be_analyzed_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def fails(*arguments: str) -> str:
        assert cli.main(["analyze", *arguments]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "has no masks/masks.safetensors; `nspec select CONFIG`" in fails(str(tmp_path))
    three = make_run(tmp_path / "three", ["de", "fr", "ru"])
    assert "are of 3 languages (de, fr, ru) from en, expected 4 or more" in fails(str(three))
    assert not (three / "analysis").exists()
    unknown = make_run(tmp_path / "unknown", [*CODES, "qq"])
    assert "the family of language 'qq' is not known: Glottolog has no such language" in fails(str(unknown))
    without = make_run(tmp_path / "without", pivot="")
    assert "names no pivot: give the language that directions come from and go to, such as --pivot en" in fails(
        str(without)
    )
    assert cli.main(["analyze", str(without), "--pivot", "en", "--permutations", "9"]) == 0
    capfd.readouterr()
    known = make_run(tmp_path / "known")
    assert fails(str(known), "--distances", "nosuch") == (
        "nspec: error: --distances: nosuch is no file; expected one with lines such as de nl 0.2, or one of uriel-syntax, "
        "uriel-phonology, uriel-inventory\n"
    )
    assert not (known / "analysis").exists()


def test_distances_of_ones_own_test_languages_that_the_table_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    codes = ["aa1", "aa2", "bb1", "bb2", "de", "nl"]
    run = make_run(tmp_path / "run", codes)
    # The distances are those of the masks in one layer, so that layer follows them wholly.
    masks = NeuronMasks.load(run / "masks")
    iou = layer_iou(masks, [LAYERS[1]], [f"en-{code}" for code in codes])[0]
    pairs = [f"{codes[i]} {codes[j]} {1 - iou[i, j]}" for i in range(6) for j in range(i)]
    path = tmp_path / "far.tsv"
    path.write_text("\n".join(pairs), encoding="utf-8")
    assert cli.main(["analyze", str(run), "--distances", str(path), "--permutations", "720"]) == 0
    assert "Distance of masks against far.tsv" in " ".join(capfd.readouterr().out.split())
    saved = json.loads((run / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    assert saved["distances"] == str(path)
    rows = {(row["layer"], row["direction"]): row for row in saved["layers"]}
    assert rows[LAYERS[1], "from"]["test"]["r"] == pytest.approx(1)
    assert rows[LAYERS[1], "from"]["test"]["p"] == pytest.approx(1 / 720)
    assert rows[LAYERS[1], "from"]["partial"] is None
    # Of the known languages both are Germanic: nothing is known of pairs of two groups.
    assert rows[LAYERS[1], "from"]["within"] == pytest.approx(iou[4, 5])
    assert rows[LAYERS[1], "from"]["across"] is None
    path.write_text("\n".join(pairs[1:]), encoding="utf-8")
    assert cli.main(["analyze", str(run), "--distances", str(path)]) == 2
    assert "far.tsv has no distance of aa1 and aa2" in capfd.readouterr().err
