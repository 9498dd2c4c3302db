"""bench.profiling: a wrong count is noticed, and every way is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nspec

pytest.importorskip("transformers")

from bench import profiling
from bench.rows import read

CPU = torch.device("cpu")
WORK = profiling.SETS["cpu"]["smoke"][0]


def test_one_count_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = profiling.build(WORK.model, torch.float32, CPU), profiling.corpus(WORK)
    real = nspec.profile

    def wrong(*args: Any, **kwargs: Any) -> dict[str, dict[str, torch.Tensor]]:
        counts = {task: dict(layers) for task, layers in real(*args, **kwargs).items()}
        name = list(counts["task-1"])[-1]
        counts["task-1"][name] = counts["task-1"][name] + torch.eye(WORK.model.d_ff, dtype=torch.int64)[3]
        return counts

    profiling.verify(model, text, CPU)
    monkeypatch.setattr(profiling.nspec, "profile", wrong)
    with pytest.raises(RuntimeError, match=rf"nspec.profile counts 1 of {WORK.model.d_ff} neurons"):
        profiling.verify(model, text, CPU)


def test_a_corpus_has_full_batches_with_padding() -> None:
    work = profiling.SETS["cpu"]["quick"][0]
    text = profiling.corpus(work)
    assert [len(batches) for batches in text.values()] == [work.batches] * work.tasks
    for batch in (batch for batches in text.values() for batch in batches):
        longest = max(batch["input_ids"].shape[1], batch["labels"].shape[1])
        assert 0.5 * work.batch_tokens < len(batch["input_ids"]) * longest <= work.batch_tokens
        assert 0 < 1 - batch["attention_mask"].float().mean() < 0.3


def test_the_command_writes_a_row_for_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiling.main(["--set", "smoke", "--device", "cpu", "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = read([tmp_path / "rows.jsonl"])
    ways = [("no counting", "include"), ("release", "include"), ("ours", "include"), ("ours", "exclude")]
    found = [(row["dtype"], row["way"], row["padding"]) for row in rows]
    assert found == [(dtype, *way) for dtype in ("float32", "bfloat16") for way in ways]
    for row in rows:
        rate = row["tokens"] / row["batches"] / row["milliseconds"] * 1e3
        assert row["tokens_per_second"] == pytest.approx(rate, rel=0.01)
        assert row["peak_bytes"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert all(row["speedup"] == 1 for row in rows if row["way"] == row["baseline"] == "release")
    assert "ours, padding excluded" in capsys.readouterr().out
