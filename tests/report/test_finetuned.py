"""The page of fine-tuning: changes of perplexity from hand-made losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nspec.report.finetuned import build_report, load, percent, summary_table


def entry(loss: float) -> dict[str, float]:
    return {"loss": loss, "tokens": 100, "perplexity": math.exp(loss)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    for code, losses in {"aa": (2 - math.log(2), 3 + math.log(2)), "bb": (2.0, 3.0)}.items():
        place = folder / "tuned" / "lape" / code
        place.mkdir(parents=True)
        result = {
            **{"method": "lape", "language": code, "neurons": 4 if code == "aa" else 0, "of": 1000},
            **{"trained": 40 if code == "aa" else 0, "bytes": 160 if code == "aa" else 0, "peak_bytes": 0},
            **{"tokens": 50 if code == "aa" else 0, "seconds": 2.0 if code == "aa" else 0.0, "loss": None},
            "perplexity": dict(zip(("aa", "bb"), map(entry, losses))),
        }
        (place / "result.json").write_text(json.dumps(result))
    for name, value in {
        "base/base.json": {"name": "tiny", "new": False, "kind": "llama", "parameters": 1000},
        "base_perplexity/result.json": {"perplexity": {"aa": entry(2.0), "bb": entry(3.0)}},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "config.yaml").write_text("run: {folder: <own>}\n")
    return folder


def test_changes_are_those_of_perplexity_and_means_those_of_losses(run: Path) -> None:
    data = load(run)
    assert percent(data.change("lape", "aa", "aa")) == "−50.0 %"
    assert percent(data.change("lape", "aa", "bb")) == "+100.0 %"
    assert data.own("lape") == {"aa": pytest.approx(-math.log(2)), "bb": 0.0}
    assert data.others("lape") == {"aa": pytest.approx(math.log(2)), "bb": 0.0}
    cells = next(summary_table(run).columns[2].cells)
    assert cells == "−29.3 %"  # halved in one language and as it was in the other: 1 / sqrt(2)


def test_the_page_and_the_tables_hold_every_pair(run: Path) -> None:
    page = build_report(run).read_text(encoding="utf-8")
    assert "Neurons, LAPE gave bb no neuron" in page
    assert "&lt;own&gt;" in page  # a configuration is text
    assert page.count("<svg") == 1
    lines = (run / "report" / "perplexity.tsv").read_text().splitlines()
    assert lines[0].split("\t")[-1] == "change"
    found = {tuple(line.split("\t")[1:3]): float(line.split("\t")[-1]) for line in lines[1:]}
    assert found == {("aa", "aa"): -0.5, ("aa", "bb"): 1.0, ("bb", "aa"): 0.0, ("bb", "bb"): 0.0}
    again = (run / "report" / "index.html").read_bytes()
    build_report(run)
    assert (run / "report" / "index.html").read_bytes() == again


def test_a_run_without_fine_tunings_is_an_error(run: Path) -> None:
    for path in run.glob("tuned/*/*/result.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no finished fine-tuning yet"):
        load(run)
