"""bench.profiling: the hooks count what they should, a wrong count is noticed, and every way is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nspec

pytest.importorskip("transformers")

from bench import profiling
from bench.steps import model as step_model
from nspec.specialization.layers import find_blocks

CPU = torch.device("cpu")
WORK = profiling.SETS["cpu"]["smoke"][0]


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return profiling.build(WORK.model, profiling.DTYPES[request.param], CPU)


def by_hand(model: nn.Module, text: profiling.Corpus, padding: str) -> dict[str, dict[str, torch.Tensor]]:
    """The counts by adding up ``h > 0``, with the masks of the batch."""
    totals: dict[str, dict[str, torch.Tensor]] = {}
    for task, batches in text.items():
        counts = totals.setdefault(task, {pair.name: torch.zeros(pair.d_ff).long() for pair in find_blocks(model)})
        for batch in batches:
            seen: dict[str, torch.Tensor] = {}
            hooks = [
                pair.fc2.register_forward_pre_hook(
                    lambda _, args, name=pair.name, seen=seen: seen.update({name: args[0]})
                )
                for pair in find_blocks(model)
            ]
            with torch.no_grad():
                model(**batch)
            for hook in hooks:
                hook.remove()
            for name, h in seen.items():
                real = batch["decoder_attention_mask" if "decoder" in name else "attention_mask"][..., None] > 0
                counts[name] += ((h > 0) & (real | (padding == "include"))).flatten(0, 1).sum(0)
    return totals


def test_the_hooks_count_what_counting_by_hand_gives(model: nn.Module) -> None:
    text = profiling.corpus(WORK)
    found = profiling.release(model, text, CPU).totals
    expected = by_hand(model, text, "include")
    for task, layers in expected.items():
        for name, count in layers.items():
            assert torch.equal(found[task][name], count), (task, name)
            assert 0 < int(count.sum()) < count.numel() * sum(b["input_ids"].numel() for b in text[task])
    real = profiling.HookCounts(find_blocks(model), list(text), profiling.RealTokens(model))
    with real.attached():
        profiling.run(model, text, CPU, real)
    for task, layers in by_hand(model, text, "exclude").items():
        for name, count in layers.items():
            assert torch.equal(real.totals[task][name], count), (task, name)
    assert not any(pair.fc2._forward_pre_hooks for pair in find_blocks(model)), "the hooks are gone afterwards"
    profiling.verify(model, text, CPU)  # ours counts the same


@pytest.mark.parametrize("padding", ["include", "exclude"])
def test_one_count_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    model = profiling.build(WORK.model, torch.float32, CPU)
    real = nspec.profile

    def wrong(*args: Any, **kwargs: Any) -> dict[str, dict[str, torch.Tensor]]:
        counts = {task: dict(layers) for task, layers in real(*args, **kwargs).items()}
        if kwargs["padding"] == padding:
            name = list(counts["task-1"])[-1]
            counts["task-1"][name] = counts["task-1"][name] + torch.eye(WORK.model.d_ff, dtype=torch.int64)[3]
        return counts

    monkeypatch.setattr(profiling.nspec, "profile", wrong)
    with pytest.raises(RuntimeError, match=rf"padding {padding}: nspec.profile counts 1 of {WORK.model.d_ff} neurons"):
        profiling.verify(model, profiling.corpus(WORK), CPU)


def test_a_corpus_has_full_batches_padding_and_sentences_of_many_lengths() -> None:
    work = profiling.SETS["cpu"]["quick"][0]
    text = profiling.corpus(work)
    assert len(text) == work.tasks
    for batches in text.values():
        assert len(batches) == work.batches
        for batch in batches:
            longest = max(batch["input_ids"].shape[1], batch["labels"].shape[1])
            assert 0.5 * work.batch_tokens < len(batch["input_ids"]) * longest <= work.batch_tokens
            for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
                assert torch.equal(batch[ids] == step_model.PAD, batch[mask] == 0)
            assert torch.equal(batch["labels"] == -100, batch["decoder_attention_mask"] == 0)
            shifted, labels = batch["decoder_input_ids"][:, 1:], batch["labels"]
            real = labels[:, 1:] != -100
            assert torch.equal(shifted[real], labels[:, :-1][real]), "the decoder reads the label before"
    lengths = torch.cat([batch["attention_mask"].sum(1) for batches in text.values() for batch in batches])
    assert lengths.min() * 2 < lengths.max()
    shares = [1 - batch["attention_mask"].float().mean() for batches in text.values() for batch in batches]
    assert 0.02 < sum(shares) / len(shares) < 0.3


def test_the_command_writes_a_row_for_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = ["--set", "smoke", "--device", "cpu", "--threads", "1", "--json", str(tmp_path / "rows.jsonl")]
        assert profiling.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    ways = [("no counting", "include"), ("release", "include"), ("ours", "include"), ("ours", "exclude")]
    found = [(row["dtype"], row["way"], row["padding"]) for row in rows]
    assert found == [(dtype, *way) for dtype in ("float32", "bfloat16") for way in ways]
    for row in rows:
        assert row["kind"] == "profiling"
        assert row["baseline"] == "release"
        assert row["tokens_per_second"] == pytest.approx(
            row["tokens"] / row["batches"] / row["milliseconds"] * 1e3, rel=0.01
        )
        assert row["peak_bytes"] > 0
        assert row["rounds"] >= 3
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert all(row["speedup"] == 1 for row in rows if row["way"] == "release")
    assert "ours, padding excluded" in capsys.readouterr().out
