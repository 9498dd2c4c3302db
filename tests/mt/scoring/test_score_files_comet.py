"""COMET beside BLEU and chrF++: a module in the place of the package, which is large."""

import csv
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sacrebleu")

from scored_files import SAMPLES, score, texts, write

from nspec import cli
from nspec.mt.scoring import comet as comet_score

# COMET: a module in the place of the package, which is large


@pytest.fixture
def comet(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A package ``comet`` that scores by length, a model ``place/wmt-da`` and sources; what the package was asked."""
    asked: dict = {"samples": []}

    class Model:
        def predict(self, samples: list[dict], batch_size: int, gpus: int, progress_bar: bool) -> types.SimpleNamespace:
            asked["samples"].append(samples)
            return types.SimpleNamespace(scores=[len(s["mt"]) / len(s["ref"]) + len(s["src"]) for s in samples])

    def load(path: str, local_files_only: bool = False) -> Model:
        asked.update(path=path, local=local_files_only, offline=os.environ.get("HF_HUB_OFFLINE"))
        return Model()

    package = types.ModuleType("comet")
    package.load_from_checkpoint = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comet", package)
    monkeypatch.setattr(comet_score.importlib.metadata, "version", lambda name: f"{name} 9")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")  # so that what the code sets is undone
    hub = types.ModuleType("huggingface_hub.constants")
    hub.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", hub)
    asked["hub"] = hub
    (place / "wmt-da/checkpoints").mkdir(parents=True)
    (place / "wmt-da/checkpoints/model.ckpt").touch()
    (place / "wmt-da/hparams.yaml").touch()
    write(place / "sources", {"en-de.en": ["one"] * 20, "de-en.src.txt": ["eins"] * 20})
    return asked


@pytest.mark.parametrize("model", ["wmt-da", "wmt-da/checkpoints/model.ckpt"])
def test_comet_is_the_mean_over_sentences_and_over_directions(place: Path, comet: dict, model: str) -> None:
    references, _, ours = texts()
    scored = score(place, "ours", comet=str(place / model), sources=str(place / "sources"), pivot="en")["ours"]
    assert comet["path"] == str(place / "wmt-da/checkpoints/model.ckpt")
    assert comet["samples"][1][0] == {"src": "one", "mt": ours["en-de"][0], "ref": references["en-de"][0]}
    means = {
        task: np.mean([len(h) / len(r) for h, r in zip(ours[task], references[task])]) + length
        for task, length in (("en-de", 3), ("de-en", 4))
    }
    for task, mean in means.items():
        assert scored["tasks"][task]["comet"] == pytest.approx(mean)
    assert scored["average"]["all"]["comet"] == pytest.approx(np.mean(list(means.values())))
    assert scored["average"]["to_en"]["comet"] == pytest.approx(means["de-en"])
    assert scored["signatures"]["comet"] == "model:wmt-da|version:unbabel-comet 9"


def test_comet_is_kept_from_the_network(place: Path, comet: dict) -> None:
    score(place, "ours", comet=str(place / "wmt-da"), sources=str(place / "sources"))
    assert comet["local"] is True
    assert comet["offline"] == "1", "before the package is asked for the model"
    assert comet["hub"].HF_HUB_OFFLINE is True


def test_comet_stands_in_table_and_files(place: Path, comet: dict, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--references", place / "refs", "--system", f"ours={place / 'ours'}", "--bootstrap", SAMPLES]
    arguments += ["--comet", place / "wmt-da", "--sources", place / "sources", "--out", place / "out"]
    assert cli.main(["score", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((place / "out/ours/scores.json").read_text())
    for row, entry in (("all directions", scores["average"]["all"]), ("de-en", scores["tasks"]["de-en"])):
        part = shown[shown.index(" COMET") :]
        assert f"{entry['comet']:.4f}" in part[part.index(f"\n {row} ") + 1 :].splitlines()[0]
    assert "COMET signature: model:wmt-da|" in shown
    with open(place / "out/scores.tsv", encoding="utf-8", newline="") as file:
        rows = {row["direction"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert float(rows["average:all"]["comet"]) == pytest.approx(scores["average"]["all"]["comet"], rel=1e-5)


def test_comet_that_is_not_there_is_one_error(place: Path, comet: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--comet .*/none: there is no .*/none; .*nspec does not download"):
        score(place, "ours", comet=str(place / "none"), sources=str(place / "sources"))
    (place / "wmt-da/hparams.yaml").unlink()
    with pytest.raises(ValueError, match=r"--comet .*: there is no .*/hparams.yaml"):
        score(place, "ours", comet=str(place / "wmt-da"), sources=str(place / "sources"))
    (place / "wmt-da/hparams.yaml").touch()
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(ImportError, match="--comet needs the package unbabel-comet, which is not installed: pip"):
        score(place, "ours", comet=str(place / "wmt-da"), sources=str(place / "sources"))
    assert "path" not in comet


def test_sources_that_do_not_fit_are_named(place: Path, comet: dict) -> None:
    write(place / "sources", {"en-de.en": ["one"] * 3})
    with pytest.raises(ValueError, match=r"sources/en-de.en has 3 lines and .*/refs/en-de.ref.txt has 20"):
        score(place, "ours", comet=str(place / "wmt-da"), sources=str(place / "sources"))
    (place / "sources/en-de.en").unlink()
    with pytest.raises(
        ValueError, match=r"no sources of direction en-de: expected en-de.src.txt, en-de.txt or en-de.en"
    ):
        score(place, "ours", comet=str(place / "wmt-da"), sources=str(place / "sources"))
