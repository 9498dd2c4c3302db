"""What users' training does around a model: checkpoints, compilation, several processes, hooks, patches, copies."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, inputs, make, output
from test_finetune import LLAMA, loss_of, masks_of, near, own, state, steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nspec


def tuned(family: Any = LLAMA, tasks: tuple[str, ...] = ("cy",), **options: Any) -> tuple[Any, Any]:
    base = make(family)
    return base, nspec.finetune(copy.deepcopy(base), masks_of(base, tasks), quiet=True, **options)


def gradients(model: nn.Module, family: Any = LLAMA) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(family, model, inputs(family)).backward()
    return {name: p.grad.clone() for name, p in own(model).items() if p.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(near(a[name], b[name]) for name in a)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "M2M100"])
def test_checkpointing_of_both_kinds_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    family = LLAMA if name == "Llama" else FAMILIES[name]
    _, model = tuned(family)
    wanted = gradients(model, family)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert equal(gradients(model, family), wanted)


def test_a_checkpoint_finds_the_task_of_its_forward_pass() -> None:
    _, model = tuned(tasks=("a", "b"))
    given = inputs(LLAMA)
    with nspec.task(model, "a"):
        wanted = gradients(model)
    model.zero_grad()
    with nspec.task(model, "a"):
        loss = checkpoint(partial(loss_of, LLAMA), model, given, use_reentrant=False)
    with nspec.task(model, "b"), torch.no_grad():
        output(LLAMA, model, given)
    loss.backward()
    assert equal({name: p.grad for name, p in own(model).items() if p.grad is not None}, wanted)


def test_passes_of_other_tasks_between_forward_and_backward_change_no_gradient() -> None:
    _, model = tuned(tasks=("a", "b"))
    with torch.no_grad():
        for p in own(model).values():
            p *= 1.5
    given = inputs(LLAMA)
    wanted = {}
    for task in ("a", "b"):
        with nspec.task(model, task):
            wanted |= {name: g for name, g in gradients(model).items() if name.endswith(task)}
    model.zero_grad()
    losses = []
    for task in ("a", None, "b"):
        with nspec.task(model, task):
            losses.append(loss_of(LLAMA, model, given))
    with nspec.task(model, ["a", "b", None, "a"]), torch.no_grad():
        output(LLAMA, model, given)
    sum(losses).backward()
    assert equal({name: p.grad for name, p in own(model).items()}, wanted)


def test_the_gradient_of_a_pass_of_the_base_is_that_of_the_base() -> None:
    base, model = tuned(FAMILIES["torch.nn, time first"])
    with torch.no_grad():
        for p in own(model).values():
            p *= 1.5
    x = torch.randn(5, 4, 16, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(base(x).square().sum(), x)
    with nspec.task(model, None):
        y = model(x)
    model(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert near(found, wanted)


@pytest.mark.parametrize("task", ["a", None])
def test_a_compiled_model_gives_what_the_eager_one_does(task: str | None) -> None:
    _, model = tuned(tasks=("a", "b"))
    steps_of = torch.optim.SGD(own(model).values(), lr=0.1)
    with nspec.task(model, "a"):
        gradients(model)
        steps_of.step()
        given = inputs(LLAMA)
        output(LLAMA, model, given)  # leaves the rows of a in the weights
    compiled = torch.compile(model, backend="aot_eager")
    with nspec.task(model, task):
        wanted = output(LLAMA, model, given)
        assert near(output(LLAMA, compiled, given), wanted)
        if task is not None:
            eager = gradients(model)
            model.zero_grad()
            loss_of(LLAMA, compiled, given).backward()
            assert equal({name: p.grad for name, p in own(model).items() if p.grad is not None}, eager)


def test_torch_func_takes_derivatives_of_any_kind() -> None:
    _, model = tuned(FAMILIES["torch.nn, time first"])
    parameters = {name: p.detach() for name, p in own(model).items()}
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).square().sum(), list(own(model).values()))
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    assert all(near(found[name], one) for name, one in zip(parameters, wanted))


def test_a_forward_that_liger_puts_on_the_block_is_run() -> None:
    """As its kernels do: a function on the instance, with an autograd function that writes into what it has saved."""
    _, model = tuned()
    _, other = tuned()
    calls = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, dh: Tensor) -> Any:
            gate, up = ctx.saved_tensors
            with torch.enable_grad():
                g, u = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
                dg, du = torch.autograd.grad(F.silu(g) * u, (g, u), dh)
            gate.data.copy_(dg)
            up.data.copy_(du)
            return gate, up

    def swiglu(self: Any, x: Tensor) -> Tensor:
        calls.append(self)
        y: Tensor = self.down_proj(Product.apply(self.gate_proj(x), self.up_proj(x)))
        return y

    for layer in other.model.layers:
        layer.mlp.forward = MethodType(swiglu, layer.mlp)
    steps(LLAMA, model)
    steps(LLAMA, other)
    assert len(calls) == 9
    assert all(near(p, own(other)[name]) for name, p in own(model).items())
    base = make(LLAMA)
    for layer in base.model.layers:
        layer.mlp.forward = MethodType(swiglu, layer.mlp)
    nspec.finetune(base, masks_of(base), quiet=True)
    steps(LLAMA, base)
    assert len(calls) == 18
    assert all(near(p, own(base)[name]) for name, p in own(model).items())


def test_a_forward_of_its_own_on_a_linear_layer_is_refused() -> None:
    base = make(LLAMA)
    base.model.layers[1].mlp.down_proj.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj has a forward of its own"):
        nspec.finetune(base, masks_of(base), quiet=True)
    assert all(p.requires_grad for p in base.parameters())


def test_hooks_on_the_layers_of_a_block_are_called() -> None:
    _, model = tuned()
    wanted = gradients(model)
    seen: list[Tensor] = []
    mlp = model.model.layers[1].mlp
    handle = mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    assert equal(gradients(model), wanted)
    handle.remove()
    mlp.act_fn.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    assert equal(gradients(model), wanted)
    assert [list(one.shape) for one in seen] == [[4, 6, 72]] * 2


def test_an_activation_that_is_exchanged_later_is_used() -> None:
    base, model = tuned()
    for one in (base, model):
        for layer in one.model.layers:
            layer.mlp.act_fn = nn.ReLU()
    given = inputs(LLAMA)
    assert torch.equal(output(LLAMA, model, given), output(LLAMA, base, given))
    wanted = gradients(model)
    loss_of(LLAMA, base, given).backward()
    name = "model.layers.0.mlp.gate_proj.neurons.cy"
    index = masks_of(base)["cy"]["model.layers.0.mlp.gate_proj"]
    assert near(wanted[name], base.model.layers[0].mlp.gate_proj.weight.grad[index])


def test_copies_and_pickles_go_on_by_themselves() -> None:
    _, model = tuned()
    steps(LLAMA, model, count=1)
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    third = torch.load(file, weights_only=False)
    given = inputs(LLAMA)
    wanted = output(LLAMA, model, given)
    for one in (other, third):
        assert torch.equal(output(LLAMA, one, given), wanted)
        assert [type(m).__mro__[1:] for m in one.modules()] == [type(m).__mro__[1:] for m in model.modules()]
        steps(LLAMA, one, count=1)
        assert not torch.equal(output(LLAMA, one, given), wanted)
        assert same_types(nspec.despecialize(one), make(LLAMA))
    assert torch.equal(output(LLAMA, model, given), wanted)


def same_types(a: nn.Module, b: nn.Module) -> bool:
    return [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


def test_a_state_dict_holds_the_rows_as_they_are_and_comes_back() -> None:
    base, model = tuned()
    steps(LLAMA, model)
    kept = state(model)
    merged = nspec.merge(model, "cy")
    assert all(torch.equal(kept[name], tensor) for name, tensor in merged.state_dict().items())
    other = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    other.load_state_dict(kept)
    given = inputs(LLAMA)
    assert torch.equal(output(LLAMA, other, given), output(LLAMA, model, given))
    other.load_state_dict(kept)
    with nspec.task(other, None):
        assert torch.equal(output(LLAMA, other, given), output(LLAMA, base, given))
    other.load_state_dict(kept)
    restored = nspec.despecialize(other).state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.state_dict().items())


def test_autocast_computes_in_16_bits_and_trains_in_32() -> None:
    base = make(LLAMA).float()
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    given = inputs(LLAMA)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = output(LLAMA, model, given), output(LLAMA, base, given)
        assert torch.equal(y, wanted)
    y.float().square().sum().backward()
    wanted.float().square().sum().backward()
    index = masks_of(base)["cy"]["model.layers.1.mlp.gate_proj"]
    full = base.model.layers[1].mlp.gate_proj.weight.grad[index]
    found = own(model)["model.layers.1.mlp.gate_proj.neurons.cy"].grad
    assert found.dtype == torch.float32
    assert torch.allclose(found, full, rtol=0.05, atol=0.02 * float(full.abs().max()))


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    base, model = tuned()
    optimizer = torch.optim.AdamW(own(model).values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = {name: p.detach().clone() for name, p in own(model).items()}
    (scaler.scale(loss_of(LLAMA, model, inputs(LLAMA))) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], p) for name, p in own(model).items())
    given = inputs(LLAMA)
    assert torch.equal(output(LLAMA, model, given), output(LLAMA, base, given))


class Packed(nn.Linear):
    """A quantised layer: whole numbers of eight bits, and a scale for each output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.compute_dtype = layer.weight.dtype

    def dense(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


def packed(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    return model


@pytest.mark.parametrize("name", ["Llama", "Llama, with biases"])
def test_a_packed_base_is_overlaid(name: str) -> None:
    base = packed(make(FAMILIES[name]))
    dense = copy.deepcopy(base)
    for layer in dense.model.layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            one = getattr(layer.mlp, part)
            plain = nn.Linear(one.in_features, one.out_features, bias=one.bias is not None, dtype=torch.float64)
            plain.weight, plain.bias = nn.Parameter(one.dense()), one.bias
            setattr(layer.mlp, part, plain)
    masks = masks_of(dense)
    model = nspec.finetune(copy.deepcopy(base), masks, quiet=True)
    other = nspec.finetune(copy.deepcopy(dense), masks, quiet=True)
    steps(FAMILIES[name], model)
    steps(FAMILIES[name], other)
    assert all(near(p, own(other)[key]) for key, p in own(model).items())
    given = inputs(FAMILIES[name])
    y = output(FAMILIES[name], model, given)
    assert near(y, output(FAMILIES[name], other, given))
    with pytest.raises(ValueError, match=r"gate_proj is torch.int8, and rows cannot be written into it"):
        nspec.merge(model, "cy")
    restored = nspec.despecialize(model)
    assert all(torch.equal(a, b) for a, b in zip(restored.state_dict().values(), base.state_dict().values()))


def test_what_is_wrong_is_said_before_anything_is_changed() -> None:
    base, model = tuned()
    masks = masks_of(base)
    with pytest.raises(ValueError, match="fine-tuned already"):
        nspec.finetune(model, masks)
    with pytest.raises(ValueError, match="no masks of task 'xx'"), nspec.task(model, "xx"):
        pass
    for wrong, options, said in (
        (masks.renamed({"model.layers.1.mlp.gate_proj": "model.layers.9.mlp.gate_proj"}), {}, "layers.9.mlp.gate_proj"),
        (masks, {"parts": ("fc1",)}, "expected some of gate, up, down"),
        (masks, {"parts": ("gates",)}, "parts has 'gates', expected some of"),
        (masks, {"dtype": torch.int8}, "dtype is torch.int8, expected a floating one"),
    ):
        with pytest.raises(ValueError, match=said):
            nspec.finetune(base, wrong, quiet=True, **options)
    wider = make(LLAMA._replace(options=LLAMA.options | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match="has d_ff=72 in the masks, 80 in the model"):
        nspec.finetune(wider, masks)
    none = nspec.NeuronMasks({"cy": {name: torch.zeros(72, dtype=torch.bool) for name in masks.layers}})
    with pytest.raises(ValueError, match="masks have no neuron of cy"):
        nspec.finetune(base, none)
    with pytest.raises(TypeError, match=r"masks is a dict, expected nspec.NeuronMasks"):
        nspec.finetune(base, {})  # type: ignore[arg-type]
    assert same_types(base, make(LLAMA))
    assert all(p.requires_grad for p in base.parameters())


def test_training_several_sets_without_a_task_is_warned_of() -> None:
    _, model = tuned(tasks=("a", "b"))
    with pytest.warns(UserWarning, match="a training pass runs without a task, and the model has neurons of several"):
        output(LLAMA, model, inputs(LLAMA))


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
