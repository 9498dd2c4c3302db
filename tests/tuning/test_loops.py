"""Neurons train in the loops of others: Trainers, accelerate, two processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import inputs, make, output
from test_finetune import LLAMA, masks_of, near, own, steps
from tuned_models import tuned

import nspec

SCRIPT = """
import copy, sys
sys.path[:0] = [{here!r}, {models!r}]
import torch
from test_finetune import LLAMA, masks_of, own
from small_models import inputs, make
import nspec

out, how, world, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{{out}}.rendezvous", rank=rank, world_size=world)
base = make(LLAMA)
model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
wrapped, sent = model, []
if how == "ddp" and world > 1:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    def count(_, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / world)
    wrapped.register_comm_hook(None, count)
if how == "fully_shard" and world > 1:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
ids = inputs(LLAMA)["input_ids"]
share = slice(4 // world * rank, 4 // world * (rank + 1))
losses = []
for step in range(3):
    loss = wrapped(input_ids=ids[share]).logits.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if world > 1:
        torch.distributed.all_reduce(loss := loss.detach())
    losses.append(float(loss.detach()) / world)
nspec.save_neurons(model, f"{{out}}.neurons.{{rank}}")
torch.save({{"losses": losses, "sent": sent}}, f"{{out}}.{{rank}}")
"""


@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_two_processes_equal_one_and_exchange_compact_gradients(how: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(here=str(here), models=str(here.parent / "specialization")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}

    def run(name: str, world: int) -> list[dict[str, Any]]:
        out = tmp_path / name
        started = [
            subprocess.Popen([sys.executable, str(script), str(out), how, str(world), str(rank)], env=environment)
            for rank in range(world)
        ]
        assert [process.wait(timeout=240) for process in started] == [0] * world
        return [torch.load(f"{out}.{rank}") for rank in range(world)]

    one, two = run("one", 1), run("two", 2)
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-12)
    base = make(LLAMA)
    files = [tmp_path / "one.neurons.0", tmp_path / "two.neurons.0", tmp_path / "two.neurons.1"]
    first, *others = [own(nspec.load_neurons(copy.deepcopy(base), folder)) for folder in files]
    for other in others:
        assert all(near(p, other[name]) for name, p in first.items())
    if how == "ddp":
        assert sum(two[0]["sent"]) == 3 * sum(p.numel() * 8 for p in first.values())


def test_the_trainer_of_transformers_trains_and_resumes_with_nothing_else_called(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = make(LLAMA).float()
    ids = inputs(LLAMA)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def train(steps: int, resume: bool) -> Any:
        model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2,
            learning_rate=0.01, weight_decay=0.1, lr_scheduler_type="constant", report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return model

    once = train(4, resume=False)
    resumed = train(4, resume=True)
    assert all(torch.equal(p, own(resumed)[name]) for name, p in own(once).items())
    start = own(nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True))
    assert all(not torch.equal(p, start[name]) for name, p in own(once).items())
    for model in (once, resumed):
        restored = nspec.despecialize(model).state_dict()
        assert all(torch.equal(restored[name], tensor) for name, tensor in base.state_dict().items())


def test_decoding_in_inference_mode_writes_the_rows() -> None:
    base, model = tuned()
    steps(LLAMA, model, count=1)
    given = inputs(LLAMA)
    with torch.inference_mode():
        found = output(LLAMA, model, given)
        with nspec.task(model, None):
            assert torch.equal(output(LLAMA, model, given), output(LLAMA, base, given))
    assert torch.equal(found, output(LLAMA, nspec.merge(model, "cy"), given))
    steps(LLAMA, model, count=1)


def test_hooks_of_accelerate_call_the_layer_as_it_is() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    base, model = tuned()
    hooked = copy.deepcopy(base)
    for layer in hooked.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.down_proj):
            add_hook_to_module(part, ModelHook())
    nspec.finetune(hooked, masks_of(base), quiet=True)
    steps(LLAMA, model)
    steps(LLAMA, hooked)
    assert all(near(p, own(hooked)[name]) for name, p in own(model).items())
    given = inputs(LLAMA)
    assert torch.equal(output(LLAMA, nspec.despecialize(hooked), given), output(LLAMA, base, given))
    remove_hook_from_module(hooked, recurse=True)
    assert torch.equal(output(LLAMA, hooked, given), output(LLAMA, base, given))


def test_a_trainer_with_the_task_of_each_row_trains_the_neurons_of_all(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class TaskTrainer(nspec.TaskTrainerMixin, Trainer):
        pass

    base = make(LLAMA).float()
    model = nspec.finetune(copy.deepcopy(base), masks_of(base, ("a", "b")), quiet=True)
    ids = inputs(LLAMA)["input_ids"]
    data = [{"input_ids": row, "labels": row, "task": task} for row, task in zip(ids, ["a", "b", None, "a"])]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    before = {name: p.detach().clone() for name, p in own(model).items()}
    TaskTrainer(model=model, args=arguments, train_dataset=data).train()
    assert all(not torch.equal(before[name], p) for name, p in own(model).items())
    restored = nspec.despecialize(model).state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.state_dict().items())
