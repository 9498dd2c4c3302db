"""Sharded training in two processes gives the losses and weights of one, and leaves inactive rows alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# A batch of six sentences in one process; three and three in two, whose gradients are averaged.
SCRIPT = """
import sys
import torch
import nspec
from torch import nn

out, mode, how, world, rank = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=world)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 67, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
model.double()  # in float32 AdamW would make steps of rounding errors, where a gradient is 0
generator = torch.Generator().manual_seed(1)
layers = [f"layers.{i}.linear1" for i in range(2)]
masks = {task: {layer: torch.rand(67, generator=generator) < 0.3 for layer in layers} for task in ("a", "b", "c")}
nspec.specialize(model, nspec.NeuronMasks(masks), mode=mode)

wrapped = model
if how == "ddp":
    wrapped = nn.parallel.DistributedDataParallel(model)
if how == "fully_shard":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

optimizer = nspec.RowSparseAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
names = [name for name, _ in model.named_parameters()]
whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
start = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
data = torch.randn(4, 6, 5, 8, generator=generator, dtype=torch.float64)
share = slice(6 // world * rank, 6 // world * (rank + 1))
losses = []
for step, tasks in enumerate([["a"] * 6, ["a", "b", "a", "b", "a", "b"], ["b", "b", "b", "a", "a", "a"], ["a"] * 6]):
    switch = "a" if step == 0 else tasks[share]
    with nspec.task(wrapped, switch):
        loss = (wrapped(data[step, share]) - data[3, share]).square().mean()
        loss.backward()
    with torch.no_grad(), nspec.task(wrapped, None):
        wrapped(data[0, share])  # evaluation between backward pass and step
    optimizer.step()
    optimizer.zero_grad()
    if world > 1:
        torch.distributed.all_reduce(loss.detach())
    losses.append(loss.item() / world)
weights = {name: whole(p).detach() for name, p in model.named_parameters()}
torch.save({"losses": losses, "weights": weights, "start": start, "masks": masks, "names": names}, f"{out}.{rank}.pt")
"""


def run(script: str, folder: Path, name: str, world: int, *arguments: str) -> tuple[list[int], str]:
    """Runs a script once for each rank, with the output path, the arguments, the number of ranks and the rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder / name), *arguments, str(world), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(errors)


def trained(folder: Path, mode: str, how: str, world: int) -> list[dict[str, Any]]:
    name = f"{mode}_{how}_{world}"
    codes, errors = run(SCRIPT, folder, name, world, mode, how)
    assert not any(codes), errors
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module", params=["forward", "update"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A mode, and what a single process makes of it."""
    return request.param, trained(tmp_path_factory.mktemp("alone"), request.param, "alone", 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_two_processes_train_like_one(tmp_path: Path, alone: tuple[str, dict[str, Any]], how: str) -> None:
    mode, one = alone
    first, second = trained(tmp_path, mode, how, 2)
    assert first["names"] == one["names"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-9)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-8)
        assert torch.equal(first["weights"][name], second["weights"][name])
    for layer in one["masks"]["a"]:
        used = one["masks"]["a"][layer] | one["masks"]["b"][layer]
        for found in (one, first):
            changed = (found["weights"][f"{layer}.weight"] != found["start"][f"{layer}.weight"]).any(1)
            assert not used.all()
            assert torch.equal(changed, used)


ALONE = """
import sys
import torch
import nspec
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

out, how, world, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=world)
model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
nspec.specialize(model, nspec.NeuronMasks({"a": {"0": torch.arange(64) < 20}}))
if how == "apart":
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    model = FullyShardedDataParallel(model, use_orig_params=how == "with", device_id=torch.device("cpu"))
with nspec.task(model, "a"):
    model(torch.randn(5, 4)).sum().backward()
nspec.RowSparseAdamW(model.parameters())
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("apart", "one of their weights is sharded now: apply fully_shard to the layer that holds both"),
        ("with", "a wrapper flattens it; shard the model with torch.distributed.fsdp.fully_shard"),
        ("without", "no parameter belongs to a specialised layer"),
    ],
)
def test_sharding_that_cannot_be_stepped_by_rows_is_an_error_that_says_what_to_do(
    tmp_path: Path, how: str, message: str
) -> None:
    codes, errors = run(ALONE, tmp_path, how, 2, how)
    assert all(codes)
    assert message in errors
