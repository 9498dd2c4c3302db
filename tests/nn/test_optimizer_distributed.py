"""Two processes with different tasks step the same rows: the union of what both used."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

SCRIPT = """
import sys, torch, nspec
import torch.distributed as dist
from torch import nn

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
masks = nspec.NeuronMasks({"a": {"0": torch.arange(64) < 20}, "b": {"0": torch.arange(64) >= 50}})
nspec.specialize(model, masks)
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = nspec.RowSparseAdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
before = model[0].weight.detach().clone()
with nspec.task(wrapped, "ab"[rank]):
    wrapped(torch.randn(5, 4)).square().mean().backward()
optimizer.step()
torch.save({"changed": (model[0].weight != before).any(1), "weight": model[0].weight.detach()}, sys.argv[3])
"""


def test_the_union_over_processes_is_updated_alike(tmp_path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / f"{rank}.pt")],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    union = (torch.arange(64) < 20) | (torch.arange(64) >= 50)
    assert torch.equal(first["changed"], union)
    assert torch.equal(second["changed"], union)
    assert torch.equal(first["weight"], second["weight"])
