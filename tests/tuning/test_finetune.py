"""Neurons with parameters of their own: gradients, what moves and what does not, merging and undoing, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import FAMILIES, Family, inputs, make, output
from torch import Tensor, nn

import nspec
from nspec.specialization.feed_forward import is_transposed
from nspec.specialization.layers import find_blocks
from nspec.tuning.layers import index_in, layer_of, parts_of

NAMES = (
    *("Llama", "Llama, with biases", "Qwen2", "Gemma2", "Mistral", "Phi3", "T5, gated-gelu", "M2M100", "Marian, swish"),
    *("GPT2", "torch.nn, time first"),
)
EACH = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=NAMES)
LLAMA = FAMILIES["Llama"]._replace(options=FAMILIES["Llama"].options | {"num_hidden_layers": 3})


def masks_of(model: nn.Module, tasks: tuple[str, ...] = ("cy",), share: float = 0.1) -> nspec.NeuronMasks:
    """A few neurons of each task, which overlap; the last task has none in the first block."""
    generator = torch.Generator().manual_seed(7)
    blocks = find_blocks(model)
    drawn = {t: {b.name: torch.rand(b.d_ff, generator=generator) < share for b in blocks} for t in tasks}
    for task in tasks:
        for mask in drawn[task].values():
            mask[5] = True
    if len(blocks) > 1 and len(tasks) > 1:
        drawn[tasks[-1]][blocks[0].name].fill_(False)
    return nspec.NeuronMasks(drawn)


def loss_of(family: Family, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    y = output(family, model, given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return (y * weights).sum() + y.square().mean()


def rows_of(base: nn.Module, task: str, masks: nspec.NeuronMasks, of: str = "grad") -> dict[str, Tensor]:
    """What the full gradients, or weights, of a plain model have in the neurons, by the names of their parameters."""
    names = {id(module): name for name, module in base.named_modules()}
    found: dict[str, list[Tensor]] = {}
    for block in find_blocks(base):
        mine = masks[task][block.name].nonzero()[:, 0]
        for part in parts_of(block) if len(mine) else ():
            layer: Any = layer_of(block, part)
            outputs, index = part not in ("down", "fc2"), index_in(block, part, mine)
            dim = int(outputs == is_transposed(layer))
            whole = layer.weight.grad if of == "grad" else layer.weight.detach()
            rows = whole.index_select(dim, index)
            found.setdefault(f"{names[id(layer)]}.neurons.{task}", []).append(rows.t() if dim else rows)
            if outputs and layer.bias is not None:
                bias = layer.bias.grad if of == "grad" else layer.bias.detach()
                found.setdefault(f"{names[id(layer)]}.neuron_biases.{task}", []).append(bias[index])
    return {name: torch.cat(parts) for name, parts in found.items()}


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.detach().abs().max())))


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".neuron" in name}


def steps(family: Family, model: nn.Module, count: int = 3, **options: Any) -> None:
    settings = {"lr": 0.05, "weight_decay": 0.1} | options
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(family, model, inputs(family)).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@EACH
def test_the_forward_pass_is_the_base_and_gradients_are_rows_of_the_full_ones(family: Family) -> None:
    base = make(family)
    model = nspec.finetune(copy.deepcopy(base), masks := masks_of(base), quiet=True)
    given = inputs(family)
    assert torch.equal(output(family, model, given), output(family, base, given))
    loss_of(family, model, given).backward()
    loss_of(family, base, given).backward()
    wanted = rows_of(base, "cy", masks)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(near(found[name], wanted[name]) for name in wanted)


@EACH
def test_steps_move_the_neurons_alone_and_merging_and_undoing_are_bitwise(family: Family) -> None:
    base = make(family)
    model = nspec.finetune(copy.deepcopy(base), masks := masks_of(base), quiet=True)
    steps(family, model, fused=True)
    given = inputs(family)
    y = output(family, model, given)
    assert not torch.equal(y, output(family, base, given))
    merged = nspec.merge(model, "cy")
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(output(family, merged, given), y)
    rows = rows_of(merged, "cy", masks, "weight")
    assert all(torch.equal(rows[name], p.detach()) for name, p in own(model).items())
    with nspec.task(model, None):
        assert torch.equal(output(family, model, given), output(family, base, given))
    assert torch.equal(output(family, model, given), y)
    # What is not a neuron's is the base's, in the merged copy too.
    with torch.no_grad():
        for name, p in own(nspec.finetune(merged, masks, quiet=True)).items():
            p.copy_(rows_of(base, "cy", masks, "weight")[name])
    assert same(state(nspec.merge(merged, "cy")), state(base))
    assert same(state(nspec.despecialize(model)), state(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]


@EACH
def test_a_mixed_batch_is_its_parts_in_outputs_and_gradients(family: Family) -> None:
    if not family.mixes:
        pytest.skip("its sentences depend on each other")
    base = make(family)
    masks = masks_of(base, ("a", "b", "c"))
    model = nspec.finetune(copy.deepcopy(base), masks, quiet=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in own(model).values():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    tasks = ["b", None, "a", "b"]
    given = inputs(family)
    with nspec.task(model, tasks):
        y = output(family, model, given)
    weights = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    (y * weights).sum().backward()
    mixed = {name: p.grad for name, p in own(model).items()}
    model.zero_grad()
    for task in ("a", "b", None):
        mine = [place for place, one in enumerate(tasks) if one == task]
        with nspec.task(model, task):
            part = output(family, model, {name: tensor[mine] for name, tensor in given.items()})
        assert near(y[mine], part)
        if task is not None:
            (part * weights[mine]).sum().backward()
    apart = {name: p.grad for name, p in own(model).items()}
    assert any(gradient is not None for gradient in apart.values())
    for name, gradient in apart.items():
        assert (gradient is None) == (mixed[name] is None or not mixed[name].any()), name
        assert gradient is None or near(mixed[name], gradient), name


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_everything_else_is_bitwise_unmoved_under_every_adamw(kind: dict[str, bool]) -> None:
    base = make(LLAMA)
    masks = masks_of(base)
    model = nspec.finetune(copy.deepcopy(base), masks, quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, **kind)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(LLAMA, model, inputs(LLAMA)).backward()
        optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for p in own(model).values()}
    merged, rows = nspec.merge(model, "cy"), own(model)
    for name, p in base.named_parameters():
        got = merged.get_parameter(name)
        if (mine := f"{name.removesuffix('.weight')}.neurons.cy") in rows:
            block = name.rpartition(".mlp")[0] + ".mlp.gate_proj"
            index, dim = masks["cy"][block].nonzero()[:, 0], int("down" in name)
            written = rows[mine].detach()
            assert torch.equal(got.index_select(dim, index), written.t() if dim else written)
            got, p = got.detach().index_fill(dim, index, 0), p.detach().index_fill(dim, index, 0)
        assert torch.equal(got, p), name


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_a_step_is_seen_by_the_next_pass_however_it_writes(kind: dict[str, bool]) -> None:
    base = make(LLAMA)
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    given = inputs(LLAMA)
    steps(LLAMA, model, count=1, **kind)
    with torch.no_grad():
        assert torch.equal(output(LLAMA, model, given), output(LLAMA, nspec.merge(model, "cy"), given))
        for p in own(model).values():
            p.data.mul_(1.5)
        assert torch.equal(output(LLAMA, model, given), output(LLAMA, nspec.merge(model, "cy"), given))


@pytest.mark.parametrize("tasks", [["cy"] * 3, ["cy"] * 5, ["cy", "mt", "cy"]])
@pytest.mark.parametrize("own_numbers", [True, False], ids=["tuned", "specialised"])
def test_a_list_of_another_length_than_the_batch_is_an_error(tasks: list[str], own_numbers: bool) -> None:
    base = make(LLAMA)
    masks, given = masks_of(base, ("cy", "mt")), inputs(LLAMA)
    model = nspec.finetune(base, masks, quiet=True) if own_numbers else nspec.specialize(base, masks)
    with nspec.task(model, tasks), pytest.raises(ValueError, match=f"4 rows along .* multiple of the {len(tasks)} sen"):
        output(LLAMA, model, given)


def test_a_list_of_one_task_is_that_task_for_beams_too() -> None:
    base = make(LLAMA)
    model, given = nspec.finetune(base, masks_of(base, ("cy", "mt")), quiet=True), inputs(LLAMA)
    with torch.no_grad():
        for p in own(model).values():
            p += 0.3
    with nspec.task(model, "cy"):
        wanted = gradients_and_output(model, given)
    for tasks in (["cy"] * 4, ["cy"] * 2):
        with nspec.task(model, tasks):
            found = gradients_and_output(model, given)
            assert torch.equal(found[0], wanted[0])
            assert same(found[1], wanted[1])
            held, merged = model.state_dict(), nspec.merge(model, "cy").state_dict()
            assert all(torch.equal(held[name], weight) for name, weight in merged.items())


def gradients_and_output(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss_of(LLAMA, model, given).backward()
    y = output(LLAMA, model, given).detach()
    return y, {name: p.grad for name, p in own(model).items() if p.grad is not None}


def test_training_follows_the_full_one_masked_to_the_neurons() -> None:
    base = make(LLAMA)
    masks = masks_of(base)
    model = nspec.finetune(copy.deepcopy(base), masks, quiet=True)
    steps(LLAMA, model, weight_decay=0.0)
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(LLAMA, base, inputs(LLAMA)).backward()
        for name, p in base.named_parameters():
            trained = torch.zeros_like(p, dtype=torch.bool)
            if ".mlp." in name:
                index = masks["cy"][name.rpartition(".mlp")[0] + ".mlp.gate_proj"].nonzero()[:, 0]
                trained.index_fill_(int("down" in name), index, True)
            p.grad.mul_(trained)
        optimizer.step()
    rows = rows_of(base, "cy", masks, "weight")
    assert all(near(p.detach(), rows[name]) for name, p in own(model).items())


def test_accumulation_over_four_batches_equals_one() -> None:
    base = make(LLAMA)
    model = nspec.finetune(base, masks_of(base), quiet=True)
    ids = inputs(LLAMA)["input_ids"]
    (model(input_ids=ids).logits.square().sum()).backward()
    at_once = {name: p.grad.clone() for name, p in own(model).items()}
    model.zero_grad()
    for sentence in ids:
        model(input_ids=sentence[None]).logits.square().sum().backward()
    assert all(near(p.grad, at_once[name]) for name, p in own(model).items())


@pytest.mark.parametrize("parts", [("gate",), ("up", "down"), ("down",), ("gate", "up")])
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_parts_choose_what_is_trained(name: str, parts: tuple[str, ...]) -> None:
    base = make(FAMILIES[name])
    masks = masks_of(base)
    model = nspec.finetune(copy.deepcopy(base), masks, parts=parts, quiet=True)
    loss_of(FAMILIES[name], model, inputs(FAMILIES[name])).backward()
    loss_of(FAMILIES[name], base, inputs(FAMILIES[name])).backward()
    block = find_blocks(base)[0]
    index = masks["cy"][block.name].nonzero()[:, 0]
    wanted = []
    for part in parts:
        weight = layer_of(block, part).weight.grad
        wanted.append(weight[:, index].t() if part == "down" else weight[index_in(block, part, index)])
    found = torch.cat([p.grad for p in own(model).values()])
    assert near(found, torch.cat(wanted))


def test_a_base_in_bfloat16_has_masters_in_float32_and_computes_what_the_merged_model_does() -> None:
    base = make(LLAMA).to(torch.bfloat16)
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in own(model).items()}
    steps(LLAMA, model, lr=1e-5)
    assert all(not torch.equal(before[name], p) for name, p in own(model).items())
    assert all(p.grad.dtype == torch.float32 for p in own(model).values())
    given = inputs(LLAMA)
    merged = nspec.merge(model, "cy")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(output(LLAMA, model, given), output(LLAMA, merged, given))
    assert same(state(nspec.despecialize(model)), state(base))


def test_modules_of_also_are_trained_in_full() -> None:
    base = make(LLAMA)
    model = nspec.finetune(base, masks_of(base), also=["model.norm", "*.input_layernorm"], quiet=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norms = {"model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in range(3))}
    assert trained == norms | set(own(model))
    with pytest.raises(ValueError, match="also has 'nrm', which matches no parameter"):
        nspec.finetune(make(LLAMA), masks_of(base), also=["nrm"])


def test_shared_weights_that_train_on_get_no_gradient_where_a_task_has_its_own() -> None:
    base = make(LLAMA)
    masks = masks_of(base)
    model = nspec.finetune(base, masks, also=["mlp"], quiet=True)
    given = inputs(LLAMA)
    start = state(model)
    steps(LLAMA, model, weight_decay=0.0)
    index = masks["cy"]["model.layers.1.mlp.gate_proj"]
    mlp: Any = model.model.layers[1].mlp
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        layer = getattr(mlp, name)
        moved = (layer.weight != start[f"model.layers.1.mlp.{name}.weight"]).any(1 - dim)
        assert torch.equal(moved, ~index)
    y = output(LLAMA, model, given)
    assert near(output(LLAMA, nspec.merge(model, "cy"), given), y)


def test_shared_weights_that_were_trained_are_those_that_are_loaded() -> None:
    """A training that goes on starts from the first base, whose rows must not come back."""

    def begun() -> nn.Module:
        base = make(LLAMA)
        return nspec.finetune(base, masks_of(base, ("cy", "mt")), also=["mlp"], quiet=True)

    model, again, given = begun(), begun(), inputs(LLAMA)
    with nspec.task(model, "mt"):  # moves rows that are neurons of cy
        steps(LLAMA, model)
    again.load_state_dict(state(model))
    for task in ("cy", "mt", None):
        with nspec.task(model, task), nspec.task(again, task):
            assert torch.equal(output(LLAMA, model, given), output(LLAMA, again, given))
    assert same(state(model), state(again))


def test_it_says_how_many_numbers_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    base = make(LLAMA)
    masks = masks_of(base)
    count = sum(int(mask.sum()) for mask in masks["cy"].values())
    total = sum(p.numel() for p in base.parameters())
    nspec.finetune(base, masks)
    assert f"training {3 * 16 * count:,} numbers beside a base of {total:,} " in capsys.readouterr().out


def test_a_block_without_neurons_of_any_task_stays_as_it_is() -> None:
    base = make(LLAMA)
    masks = {task: dict(layers.items()) for task, layers in masks_of(base).items()}
    masks["cy"]["model.layers.0.mlp.gate_proj"] = torch.zeros(72, dtype=torch.bool)
    model = nspec.finetune(copy.deepcopy(base), nspec.NeuronMasks(masks), quiet=True)
    assert [type(m) for m in model.model.layers[0].modules()] == [type(m) for m in base.model.layers[0].modules()]
    loss_of(LLAMA, model, inputs(LLAMA)).backward()
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"1", "2"}
