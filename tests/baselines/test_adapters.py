"""Adapters: exact at the start, separate by group, switched by task, and trained without touching the model."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import pytest
import torch
from adapted import GROUPS, TASKS, Seq2Seq, adapted, close, gradients, layers_of, m2m100, same, under, x_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import nspec
from nspec.baselines.adapters import (
    TaskAdapters,
    adapter_parameters,
    add_adapters,
    freeze_all_but_adapters,
    remove_adapters,
)


def test_a_bottleneck_is_added_to_the_hidden_state_as_in_the_paper() -> None:
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0).double())
    x, part = x_of(), layer.adapters.groups["germanic"]
    dense = layer(x)
    hidden = nn.functional.layer_norm(dense, (8,), part.norm.weight, part.norm.bias)
    want = dense + torch.relu(hidden @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias
    assert close(under(layer, "en-de", x), want)


def test_new_adapters_change_no_bit_and_leave_the_random_state_alone() -> None:
    model = m2m100(torch.float32)
    ids = torch.randint(4, 60, (6, 7))
    with torch.no_grad():
        before, state = model(input_ids=ids, labels=ids).logits, torch.get_rng_state()
        add_adapters(model, GROUPS, 4)
        assert torch.equal(torch.get_rng_state(), state)
        for task in (None, "en-de", TASKS):
            with nspec.task(model, task):
                assert torch.equal(model(input_ids=ids, labels=ids).logits, before)
        assert [p.dtype for p in adapter_parameters(model)] == [torch.float32] * (4 * 3 * 6)  # layers, groups, tensors


def test_the_same_seed_gives_the_same_adapters_and_another_gives_others() -> None:
    first, same, other = (adapter_parameters(add_adapters(Seq2Seq(), GROUPS, 4, seed=s)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert len({p.data.sum().item() for p in first if p.dim() == 2 and p.data.any()}) == 4 * 3  # each is its own draw


def test_only_the_group_of_the_task_gets_gradients() -> None:
    model = adapted()
    under(model, "en-nl", x_of()).square().sum().backward()
    for layer in layers_of(model):
        assert list(layer.groups) == ["germanic", "romance", "to%2Een"]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.groups["germanic"].parameters())
        assert all(p.grad is None for key in ("romance", "to%2Een") for p in layer.groups[key].parameters())


def test_tasks_of_one_group_share_and_those_of_others_do_not() -> None:
    model, x = adapted(), x_of()
    found = {task: under(model, task, x) for task in (None, *GROUPS)}
    assert torch.equal(found["en-de"], found["en-nl"])
    for a, b in (("en-de", "en-fr"), ("en-fr", "de-en"), ("en-de", None)):
        assert not torch.allclose(found[a], found[b])
    remove_adapters(model)
    assert torch.equal(model(x), found[None])


@pytest.mark.parametrize("tasks", [TASKS, sorted(TASKS), ["en-de", "en-nl"], ["de-en"]])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mixed_batch_has_the_values_and_gradients_of_separate_ones(tasks: list[str], batch_first: bool) -> None:
    model, x = adapted(Seq2Seq(batch_first)), x_of(len(tasks))
    put = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    want = torch.empty_like(x)
    for task in dict.fromkeys(tasks):
        mine = torch.tensor([name == task for name in tasks])
        y = put(under(model, task, put(x[mine])))
        y.square().sum().backward()
        want[mine] = y.detach()
    wanted = gradients(model)
    with nspec.task(model, tasks, batch_dim=0 if batch_first else 1):
        y = put(model(put(x)))
    y.square().sum().backward()
    assert close(y.detach(), want)
    found = gradients(model)
    assert same(found, wanted)
    used = {name.split(".")[-3] for name, gradient in found.items() if ".groups." in name and gradient is not None}
    assert used == {GROUPS[task].replace(".", "%2E") for task in tasks}


def test_beams_are_rows_of_their_sentence() -> None:
    model, x = adapted(), x_of(rows=6)
    together = under(model, ["en-fr", "en-de"], x)
    for task, rows in (("en-fr", slice(0, 3)), ("en-de", slice(3, 6))):
        assert close(under(model, task, x[rows]), together[rows])
    for tasks in (["en-fr", "en-de"], ["en-nl", "en-de"]):
        with pytest.raises(ValueError, match="multiple of the 2 sentences"):
            under(model, tasks, x[:5])


def test_generate_uses_the_adapters_of_each_sentence() -> None:
    model = adapted(m2m100())
    for parameter in adapter_parameters(model):
        parameter.data.mul_(4)
    ids = torch.randint(4, 60, (len(TASKS), 7), generator=torch.Generator().manual_seed(3))

    def generate(task: Any, rows: Any) -> Tensor:
        with torch.no_grad(), nspec.task(model, task):
            return model.generate(ids[rows], num_beams=2, max_new_tokens=6, min_new_tokens=6)

    together = generate(TASKS, slice(None))
    for task in dict.fromkeys(TASKS):
        mine = torch.tensor([name == task for name in TASKS])
        assert torch.equal(generate(task, mine), together[mine])
    assert not (generate(None, slice(None)) == together).all(dim=1).any()


def test_the_task_block_restores_what_was_before() -> None:
    model = adapted()
    nspec.set_task(model, "en-fr")
    with nspec.task(model, TASKS):
        with nspec.task(model, None):
            assert {layer.task for layer in layers_of(model)} == {None}
        assert {layer.task for layer in layers_of(model)} == {tuple(TASKS)}
    assert {layer.task for layer in layers_of(model)} == {"en-fr"}
    assert all(layer.decodes_by_task and layer.tasks == list(GROUPS) for layer in layers_of(model))


def test_training_leaves_a_frozen_model_and_other_groups_bitwise_as_they_were() -> None:
    model = m2m100(torch.float32).train()
    ids = torch.randint(4, 60, (4, 7))
    model(input_ids=ids, labels=ids).loss.backward()  # gradients from before must not move the model
    freeze_all_but_adapters(add_adapters(model, GROUPS, 4))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(8):
        with nspec.task(model, "en-de"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (".groups.germanic." in name), name


def test_copies_and_pickles_compute_the_same_and_are_switched_apart() -> None:
    model, x = adapted(), x_of()
    nspec.set_task(model, "en-de")
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        nspec.set_task(twin, "en-fr")
        assert not torch.allclose(twin(x), want)
        assert not any(module._forward_hooks for module in remove_adapters(twin).modules())
        assert torch.equal(model(x), want)


def test_a_hook_registered_after_unpickling_does_not_replace_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model, x = adapted(nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0).double()), x_of()
    want, data = under(model, "en-de", x), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    twin = pickle.loads(data)
    twin.register_forward_hook(lambda module, inputs, output: None)
    assert torch.equal(under(twin, "en-de", x), want)


def test_the_state_dict_goes_into_a_model_with_the_same_adapters_and_no_other() -> None:
    model, x = adapted(), x_of()
    twin = add_adapters(Seq2Seq(), dict(reversed(GROUPS.items())), 4, seed=9)
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(under(model, task, x), under(twin, task, x)) for task in GROUPS)
    with pytest.raises(RuntimeError, match="groups.romance"):
        add_adapters(Seq2Seq(), {"en-de": "germanic"}, 4).load_state_dict(model.state_dict())


def test_removing_gives_the_model_back() -> None:
    plain, model = Seq2Seq().eval(), adapted(Seq2Seq().eval())
    remove_adapters(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert model.encoder.use_nested_tensor is plain.encoder.use_nested_tensor is True
    assert torch.equal(model(x_of()), plain(x_of()))
    adapted(model)  # may be put on again


def test_padding_without_gradients_works_where_torch_would_make_nested_tensors() -> None:
    model, x = adapted().eval(), x_of()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2], [4], [5], [1]])
    nspec.set_task(model, TASKS)
    with torch.no_grad():
        found = model(x, padding)
    assert close(found, model(x, padding))


@pytest.mark.parametrize("mode", ["forward", "update"])
@pytest.mark.parametrize("masks_first", [True, False])
def test_masks_and_adapters_of_one_model_switch_together(mode: str, masks_first: bool) -> None:
    x, model = x_of(), Seq2Seq()
    g = torch.Generator().manual_seed(4)
    names = [f"{layer}.linear1" for layer in ("encoder.layers.0", "encoder.layers.1", "layers.0", "layers.1")]
    masks = nspec.NeuronMasks({task: {name: torch.rand(24, generator=g) < 0.5 for name in names} for task in GROUPS})
    nspec.specialize(model if masks_first else adapted(model), masks, mode=mode)
    model = adapted(model) if masks_first else model
    alone = adapted(nspec.merge(nspec.specialize(Seq2Seq(), masks, mode=mode), "en-fr"))
    want, found = under(alone, "en-fr", x), under(model, "en-fr", x)
    assert close(found, want)
    found.sum().backward()
    assert not model.layers[0].linear1.weight.grad[~masks["en-fr"]["layers.0.linear1"]].any()
    assert all(p.grad is None for p in layers_of(model)[0].groups["germanic"].parameters())
    rows = [task == "en-fr" for task in TASKS]
    assert close(under(model, TASKS, x)[rows], want[rows])
    assert torch.equal(nspec.despecialize(remove_adapters(model))(x), Seq2Seq()(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("task", ["en-de", TASKS, None])
def test_checkpointing_computes_again_with_the_adapters_of_the_forward_pass(reentrant: bool, task: Any) -> None:
    model, x = adapted(), x_of().requires_grad_()
    under(model, task, x).mul_(2).square().sum().backward()
    wanted, dx = gradients(model), x.grad
    x.grad = None
    nspec.set_task(model, "en-fr")  # what the backward pass finds
    with nspec.task(model, task):
        y = checkpoint(lambda t: model(t).mul_(2), x, use_reentrant=reentrant)  # models may write into what they get
    y.square().sum().backward()
    assert same(gradients(model), wanted)
    assert close(x.grad, dx)


def test_one_backward_pass_may_compute_tasks_of_one_group_again_and_others_by_their_contexts() -> None:
    model, x = adapted(), x_of()

    def loss(*tasks: str, **options: Any) -> Tensor:
        run = lambda t: checkpoint(model, t, use_reentrant=False, **options) if options else model(t)
        ys = []
        for task in tasks:
            with nspec.task(model, task):
                ys.append(run(x))
        return torch.stack(ys).square().sum()

    alone, own = {"debug": False}, {"context_fn": nspec.checkpoint_contexts(model)}
    for options, *tasks in ((alone, "en-de", "en-nl"), (own, "en-de", "en-fr")):
        loss(*tasks).backward()
        wanted = gradients(model)
        loss(*tasks, **options).backward()
        assert same(gradients(model), wanted)
    with pytest.raises(RuntimeError, match="several tasks"):
        loss("en-de", "en-fr", **alone).backward()


@pytest.mark.parametrize("name", ["a.b", "%2E", "keys", "training", "forward", "x", "pt-br.v2"])
def test_any_name_may_be_that_of_a_group(name: str) -> None:
    model = add_adapters(nn.TransformerEncoderLayer(8, 2, 24).double(), {"t": name, "u": "a%2Eb"}, 2)
    assert len(layers_of(model)[0].groups) == 2
    under(model, "t", x_of()).sum().backward()
    assert sum(p.grad is not None for p in adapter_parameters(model)) == 6


def test_named_layers_alone_get_adapters() -> None:
    model = adapted(layers=["encoder.layers.1", "layers.1"])
    found = [name for name, module in model.named_modules() if isinstance(module, TaskAdapters)]
    assert found == ["encoder.layers.1.adapters", "layers.1.adapters"]


def test_layers_that_adapters_cannot_follow_are_refused_with_the_way_out() -> None:
    """Offloaded weights have no values here; quantised ones have no gradients."""
    with pytest.raises(ValueError, match=r"weights of layers.0 are on the meta device .*load the model whole"):
        add_adapters(Seq2Seq().to("meta"), GROUPS, 4, layers=["layers.0"])
    model = Seq2Seq()
    quantised = model.layers[0].linear2
    quantised.weight = nn.Parameter(quantised.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weights of layers.0 are torch.int8 \(quantised\)"):
        add_adapters(model, GROUPS, 4)
    assert not layers_of(model)


def test_a_forward_of_its_own_a_parametrised_weight_and_a_namedtuple_make_no_difference() -> None:
    Output = collections.namedtuple("Output", ["hidden", "cache"])
    layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, batch_first=True).double()
    nn.utils.parametrizations.weight_norm(layer.linear2)
    adapted(layer)
    x = x_of()
    task = next(iter(GROUPS))
    expected = under(layer, task, x)
    assert not torch.equal(expected, under(layer, None, x))
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: Output(plain(*args, **kwargs), None)  # as accelerate's hooks leave it
    with nspec.task(layer, task):
        found = layer(x)
    assert isinstance(found, Output)
    assert torch.equal(found.hidden, expected)


def test_an_output_of_another_width_is_an_error() -> None:
    layer = add_adapters(nn.TransformerEncoderLayer(8, 2, 24), GROUPS, 4)
    layer.forward = lambda x: x.new_zeros(3, 5, 6)
    with pytest.raises(ValueError, match=r"output is 6 wide, its adapters 8.* layers="):
        layer(torch.zeros(3, 5, 8))


@pytest.mark.parametrize("output", [{"hidden": 1}, (), ("text", 1), None])
def test_a_layer_that_gives_no_hidden_state_is_an_error(output: Any) -> None:
    layer = add_adapters(nn.TransformerEncoderLayer(8, 2, 24), GROUPS, 4)
    layer.forward = lambda x: output
    with pytest.raises(TypeError, match=r"gave a .*expected its hidden state"):
        layer(x_of())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"groups": {}}, ValueError, "groups is empty"),
        ({"groups": ["en-de"]}, TypeError, "groups is a list, expected a mapping"),
        ({"groups": {"en-de": 1}}, TypeError, "'en-de': 1, expected the name"),
        ({"groups": {"en-de": ""}}, ValueError, "not empty"),
        ({"bottleneck": 0}, ValueError, "bottleneck is 0, expected 1 or more"),
        ({"bottleneck": 2.0}, TypeError, "bottleneck is 2.0, expected an int"),
        ({"seed": "x"}, TypeError, "seed is 'x', expected an int"),
        ({"layers": ["encoder.layers.7"]}, ValueError, "no layer 'encoder.layers.7'; known: encoder.layers"),
        ({"layers": ["layers.0", "layers.0"]}, ValueError, "'layers.0' is named twice"),
        ({"layers": "layers.0"}, TypeError, "expected a list of names"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": ["layers"]}, ValueError, "layers is a ModuleList, which cannot hold adapters"),
        ({"layers": ["layers.0.norm1"]}, ValueError, "'layers.0.norm1' has no feed-forward block"),
        ({"model": lambda: nn.Linear(2, 2)}, ValueError, "no feed-forward block.*For adapters, name whole layers"),
        ({"model": lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))}, ValueError, "is a Sequential"),
        ({"model": lambda: "model"}, TypeError, "model is a str, expected an nn.Module"),
        ({"model": lambda: nn.DataParallel(Seq2Seq())}, ValueError, "wrapped .DataParallel.: add adapters first"),
    ],
)
def test_errors_say_what_was_found_and_expected(options: dict[str, Any], error: type[Exception], match: str) -> None:
    options = {"model": Seq2Seq, "groups": GROUPS, "bottleneck": 4} | options
    model = options.pop("model")()
    with pytest.raises(error, match=match):
        add_adapters(model, **options)
    assert not isinstance(model, nn.Module) or not layers_of(model)


def test_adapters_twice_or_of_other_tasks_than_the_masks_or_none_at_all_are_errors() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, GROUPS, 4)
    with pytest.raises(ValueError, match=r"no adapters of task 'en-d'; known: en-de"):
        layers_of(model)[0].set_task("en-d")
    with pytest.raises(ValueError, match="no masks of task 'fr-en'"):
        nspec.set_task(model, "fr-en")
    masks = nspec.NeuronMasks({"en-de": {"layers.0.linear1": torch.ones(24, dtype=torch.bool)}})
    with pytest.raises(ValueError, match="different tasks: de-en, en-fr, en-nl"):
        add_adapters(nspec.specialize(Seq2Seq(), masks), GROUPS, 4)
    for function in (remove_adapters, adapter_parameters, freeze_all_but_adapters):
        with pytest.raises(ValueError, match="Seq2Seq has no adapters: call add_adapters"):
            function(Seq2Seq())
