"""Counts and scores that processes made of their shares of the text add up to those of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from nspec import ActivationCounts, NeuronScores

SCRIPT = """
import sys
import torch
from torch import nn
import nspec

folder, world, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
torch.manual_seed(0)
block = lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
model = nn.Sequential(block(), block()).double()
batches = {task: list(torch.randn(6, 5, 4, dtype=torch.float64)) for task in ("a", "b")}
share = {task: some[rank::world] for task, some in batches.items()}
loss = lambda output, batch: output.pow(3).sum()
counts = nspec.profile(model, share).all_reduce()
scores = nspec.profile(model, share, score="gradient", loss=loss).all_reduce()
if rank:  # of one process the tokens of a task are not known
    unknown = nspec.ActivationCounts(dict(counts), {"a": counts.tokens["a"]}).all_reduce()
elif world > 1:
    unknown = counts.all_reduce()
if rank == world - 1:
    counts.save(f"{folder}/{world}")
    scores.save(f"{folder}/{world}")
    if world > 1:
        assert unknown.tokens == {"a": 2 * counts.tokens["a"], "b": None}, unknown.tokens
if world > 1:
    torch.distributed.destroy_process_group()
"""


def run(folder: Path, world: int) -> tuple[ActivationCounts, NeuronScores]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(world)]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **options) for rank in range(world)]  # type: ignore[call-overload]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    return ActivationCounts.load(folder / f"{world}"), NeuronScores.load(folder / f"{world}")


def test_processes_add_up_to_the_whole(tmp_path: Path) -> None:
    (counts, scores), (all_counts, all_scores) = run(tmp_path, 2), run(tmp_path, 1)
    assert counts.tokens == all_counts.tokens == scores.tokens == {"a": 30, "b": 30}
    for task in all_counts.tasks:
        for layer in all_counts.layers:
            assert torch.equal(counts[task][layer], all_counts[task][layer])
            torch.testing.assert_close(scores[task][layer], all_scores[task][layer], rtol=1e-12, atol=0)
            assert float(all_scores[task][layer].min()) > 0
    assert (scores.score, scores.layers) == ("gradient", ["0.0", "1.0"])
