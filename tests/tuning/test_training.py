"""What users' training does around a model: checkpoints, compilation, several processes, hooks, patches, copies."""

from __future__ import annotations

import copy
import io
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, inputs, make, output
from test_finetune import LLAMA, loss_of, masks_of, near, own, state, steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tuned_models import equal, gradients, tuned

import nspec


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "M2M100"])
def test_checkpointing_of_both_kinds_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    family = LLAMA if name == "Llama" else FAMILIES[name]
    _, model = tuned(family)
    wanted = gradients(model, family)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert equal(gradients(model, family), wanted)


def test_a_gradient_that_is_accumulated_goes_through_autograd() -> None:
    """Hooks get what a pass adds, not what is there; ``torch.autograd.grad`` leaves that as it was."""
    _, model = tuned()
    wanted = gradients(model)
    before = {name: p.grad for name, p in own(model).items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
    nodes = []  # a parameter does not hold its own
    for name, p in own(model).items():
        p.register_hook(seen[name].append)
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))
        node: Any = torch.autograd.graph.get_gradient_edge(p).node
        node.register_prehook(lambda grads, name=name: seen[name].append(grads[0]))
        nodes.append(node)
    asked = torch.autograd.grad(loss_of(LLAMA, model, inputs(LLAMA)), list(own(model).values()))
    assert equal(dict(zip(wanted, asked)), wanted)
    assert all(near(p.grad, wanted[name]) for name, p in own(model).items())
    for found in seen.values():
        found.clear()
    loss_of(LLAMA, model, inputs(LLAMA)).backward()
    for name, p in own(model).items():
        assert p.grad is before[name]
        assert [near(one, scale * wanted[name]) for one, scale in zip(seen[name], (1, 1, 2))] == [True] * 3


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
    with pytest.raises(
        ValueError, match=r"gate_proj is quantised \(packed, int8\), and rows cannot be written into it"
    ):
        nspec.merge(model, "cy")
    restored = nspec.despecialize(model)
    assert all(torch.equal(a, b) for a, b in zip(restored.state_dict().values(), base.state_dict().values()))


def test_what_is_wrong_is_said_before_anything_is_changed() -> None:
    base, model = tuned()
    masks = masks_of(base)
    with pytest.raises(ValueError, match="fine-tuned already"):
        nspec.finetune(model, masks)
    with pytest.raises(ValueError, match="no neurons of task 'xx'"), nspec.task(model, "xx"):
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


def test_a_task_without_neurons_is_warned_of_and_named_in_the_backward_pass_of_its_loss() -> None:
    base = make(LLAMA)
    masks = {task: dict(layers.items()) for task, layers in masks_of(base, ("a", "b")).items()}
    masks["b"] = {name: torch.zeros_like(mask) for name, mask in masks["b"].items()}
    with pytest.warns(UserWarning, match="masks have no neuron of b: batches of that train none"):
        model = nspec.finetune(copy.deepcopy(base), nspec.NeuronMasks(masks), quiet=True)
    given = inputs(LLAMA) | {"labels": inputs(LLAMA)["input_ids"]}
    model.train()
    for task in ("b", ["b", None, "b", "b"]):
        with (
            nspec.task(model, task),
            pytest.raises(RuntimeError, match="this loss: the masks have no neuron of b. Leave"),
        ):
            model(**given).loss.backward()
    with nspec.task(model, ["b", "a", "b", "b"]):
        model(**given).loss.backward()
    assert all(p.grad is not None for p in own(model).values())


def test_training_several_sets_without_a_task_is_warned_of() -> None:
    _, model = tuned(tasks=("a", "b"))
    with pytest.warns(UserWarning, match="a training pass runs without a task, and the model has neurons of several"):
        output(LLAMA, model, inputs(LLAMA))


@pytest.mark.filterwarnings("ignore:.*a training pass runs without a task")
def test_the_gradient_of_a_loss_without_a_task_says_so_and_the_loss_is_that_of_the_base() -> None:
    base, model = tuned(tasks=("a", "b"))
    given = inputs(LLAMA) | {"labels": inputs(LLAMA)["input_ids"]}
    loss = model.train()(**given).loss
    assert torch.equal(loss, base.train()(**given).loss)
    with pytest.raises(RuntimeError, match=r"neurons of a, b, and none of them was switched on .*TaskTrainerMixin"):
        loss.backward()
    with nspec.task(model, "a"):
        gain = model(**given).loss - model(**given).loss.detach()
    (gain + model(**given).loss).backward()  # beside another loss that has a part of the neurons it is a constant
    assert any(parameter.grad is not None for parameter in own(model).values())
    with nspec.task(model, None):
        assert not model(**given).loss.requires_grad  # the base is meant
    nspec.despecialize(model)
    assert not model._forward_hooks


def test_numbers_are_trained_in_the_dtype_that_is_asked_for() -> None:
    base = make(LLAMA).float()
    model = nspec.finetune(base, masks_of(base), dtype=torch.bfloat16, quiet=True)
    assert {p.dtype for p in own(model).values()} == {torch.bfloat16}
    loss_of(LLAMA, model, {"input_ids": inputs(LLAMA)["input_ids"]}).backward()
    assert {p.grad.dtype for p in own(model).values()} == {torch.bfloat16}


def test_an_activation_that_writes_into_its_input_is_left_to_the_block_itself() -> None:
    base = make(LLAMA)
    for layer in base.model.layers:
        layer.mlp.act_fn = nn.SiLU(inplace=True)
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    found = gradients(model)
    loss_of(LLAMA, base, inputs(LLAMA)).backward()
    for i in range(3):
        index = masks_of(base)["cy"][f"model.layers.{i}.mlp.gate_proj"]
        full = base.model.layers[i].mlp.gate_proj.weight.grad
        assert near(found[f"model.layers.{i}.mlp.gate_proj.neurons.cy"], full[index])
