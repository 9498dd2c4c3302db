"""A whole tiny run through the command line, which the tests of this folder share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nspec.files import read_json
from tests.system.own_lines import own_lines

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "mt"))  # for marian_folder

# The merge key gives continued training the settings of the dense one, with fewer updates. One thread: the results
# are then the same bits on every machine with the same libraries, however busy it is.
TINY = """
run: {folder: %s, threads: 1}
corpus: {languages: [de, en], train_sentences: 400, valid_sentences: 16, test_sentences: 12, max_tokens: 64}
tokenizer: {vocab_size: 300, sentences: 2000}
model: {d_model: 32, d_ff: 64, heads: 2, encoder_layers: 1, decoder_layers: 1, max_positions: 128}
train: &training
  {updates: 12, batch_tokens: 256, accumulate: 2, lr: 3e-3, warmup: 3, valid_every: 4, valid_bleu_sentences: 2,
   log_every: 1}
specialize: {<<: *training, updates: 4, valid_every: 2}
decode: {beam: 2, max_length_ratio: 1.0}
score: {bootstrap: 40}
"""


@dataclass
class Tiny:
    """A tiny run: its configuration file, its folder, and what the command that made it said."""

    config: Path
    folder: Path
    output: str = ""
    errors: str = ""


def tiny_config(folder: Path) -> Tiny:
    """Writes the configuration of a tiny run in ``folder``."""
    pytest.importorskip("babel", reason="the cldr corpus needs Babel")
    config = folder / "tiny.yaml"
    config.write_text(TINY % (folder / "run"), encoding="utf-8")
    return Tiny(config, folder / "run")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A finished run; tests must not change it."""
    run = tiny_config(tmp_path_factory.mktemp("tiny"))
    command = [sys.executable, "-m", "nspec.cli", "run", str(run.config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    run.output, run.errors = done.stdout, own_lines(done.stderr)
    return run


@pytest.fixture(scope="session")
def another(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Writes the configuration of a run that has not begun, for a module that shares it."""
    return lambda name: tiny_config(tmp_path_factory.mktemp(name))


@pytest.fixture
def fresh(tmp_path: Path) -> Tiny:
    """A run that has not begun."""
    return tiny_config(tmp_path)


@pytest.fixture(scope="session")
def result() -> Callable[[Path], dict[str, Any]]:
    """Everything that the run in a folder comes to, without times."""
    return _result


def _tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (str(tensor.dtype), list(tensor.shape), tensor.numpy().tobytes())
        for name, tensor in load_file(path).items()
    }


def _result(folder: Path) -> dict[str, Any]:
    timed = {"seconds", "tokens_per_second", "train_seconds", "peak_memory_bytes"}
    found: dict[str, Any] = {}
    for system in sorted(path.name for path in (folder / "scores").iterdir() if ".old-" not in path.name):
        lines = (folder / f"systems/{system}/log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[f"{system} log"] = [{key: value for key, value in row.items() if key not in timed} for row in rows]
        summary = read_json(folder / f"systems/{system}/summary.json")
        found[f"{system} summary"] = {key: value for key, value in summary.items() if key not in timed}
        scores = read_json(folder / f"scores/{system}/scores.json")
        found[f"{system} scores"] = {key: value for key, value in scores.items() if key not in timed}
    patterns = ["profile/counts.safetensors", "masks/masks.safetensors", "random_masks/masks.safetensors"]
    patterns += ["systems/*/model/*.safetensors", "scores/*/*.hyp.txt"]
    files = [str(path.relative_to(folder)) for pattern in patterns for path in sorted(folder.glob(pattern))]
    files = [name for name in files if ".old-" not in name]
    for name in files:
        path = folder / name
        # The order of a safetensors file's metadata changes from process to process; its tensors are what counts.
        found[name] = _tensors(path) if path.suffix == ".safetensors" else path.read_bytes()
    for name in ("", "systems", "scores"):
        found[f"folders {name}"] = sorted(path.name for path in (folder / name).iterdir() if path.is_dir())
    return found
