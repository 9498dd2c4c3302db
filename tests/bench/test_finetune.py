"""The bench of fine-tuning: what it times does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import finetune as bench

TINY, CPU = bench.SHAPES["tiny"], torch.device("cpu")


def built(name: str, share: float = 0.1) -> bench.System:
    return bench.build(name, bench.base(TINY, CPU, torch.float32), TINY, share)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, bench.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))


def test_neurons_and_rows_as_published_learn_the_same() -> None:
    ours, theirs = built("neurons"), built("published")
    bench.check(ours, theirs, ids())
    losses = []
    for system in (ours, theirs):
        for number in range(3):
            system.step(ids(number))
        assert all(p.grad is None for p in system.trained)
        losses.append(float(system.model(input_ids=ids(9), labels=ids(9)).loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] != float(bench.base(TINY, CPU, torch.float32)(input_ids=ids(9), labels=ids(9)).loss)


def test_other_neurons_than_the_published_ones_are_found_out() -> None:
    ours, theirs = built("neurons"), built("published")
    theirs.model.model.layers[1].mlp.index += 1
    with pytest.raises(ValueError, match="gradients differ from the published way's"):
        bench.check(ours, theirs, ids())


def test_a_row_for_each_system_with_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figure = tmp_path / "rows.jsonl", tmp_path / "figure.svg"
    given = ["--shape", "tiny", "--rounds", "3", "--seconds", "0.5", "--shares", "0.05", "0.2"]
    assert bench.main([*given, "--device", "cpu", "--json", str(path), "--figure", str(figure)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [row["system"] for row in rows]
    assert [name for name in names if name != "lora"] == ["full", "published", "neurons", "neurons"]
    full, few = rows[0], rows[-2]
    assert full["trained"] == full["parameters"]
    assert full["saved_bytes"] == 4 * full["parameters"]
    assert few["trained"] == 2 * 3 * 32 * 3  # layers, neurons, d, parts
    assert few["state_bytes"] == 16 * few["trained"]
    assert 4 * few["trained"] < few["saved_bytes"] < 4 * few["trained"] + 4000
    assert few["over_published"] > 0
    assert few["peak_bytes"] > 0
    assert "neurons, 5.0%" in capsys.readouterr().out
    assert figure.stat().st_size > 0
