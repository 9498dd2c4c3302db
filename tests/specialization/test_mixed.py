"""Batches of several tasks: equal to the same sentences run task by task, in every order and layout."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from models import batch, m2m100, masks_for
from torch import Tensor, nn

import nspec
from nspec.specialization.layers import batch_dim_of, find_blocks

TASKS = ["en-fr", "en-de", "en-fr", "de-en", "en-de", "en-fr"]
SORTED = ["de-en", "de-en", "en-fr", "en-de"]
ALL = ("en-de", "de-en", "en-fr")
BOTH = pytest.mark.parametrize("mode", ["forward", "update"])


def specialised(mode: str = "forward", dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    model = m2m100(dtype, **changes)
    return nspec.specialize(model, masks_for(model, ALL, share=0.4), mode=mode)


def inputs(sentences: int) -> dict[str, Tensor]:
    return batch(sentences=sentences)


def loss_of(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    """The sum over tokens, which does not change when a batch is split."""
    logits = model(**part).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def task_by_task(model: nn.Module, tasks: list[str], whole: dict[str, Tensor]) -> float:
    """The summed loss; the gradients are left on the model."""
    total = 0.0
    for task in dict.fromkeys(tasks):
        mine = torch.tensor([name == task for name in tasks])
        with nspec.task(model, task):
            loss = loss_of(model, {name: value[mine] for name, value in whole.items()})
            loss.backward()
        total += loss.item()
    return total


@BOTH
@pytest.mark.parametrize("tasks", [TASKS, SORTED, ["en-de", "de-en"], ["de-en"]])
def test_loss_and_every_gradient_are_those_of_the_sentences_run_task_by_task(mode: str, tasks: list[str]) -> None:
    model = specialised(mode)
    whole = inputs(len(tasks))
    want = task_by_task(model, tasks, whole)
    wanted = gradients(model)
    with nspec.task(model, tasks):
        loss = loss_of(model, whole)
        loss.backward()
    assert abs(loss.item() - want) < 1e-10
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@BOTH
def test_a_batch_of_one_task_is_bitwise_that_of_the_task_itself(mode: str) -> None:
    model, whole = specialised(mode), inputs(3)
    found = []
    for switch in ("en-de", ["en-de"] * 3):
        with nspec.task(model, switch):
            loss = loss_of(model, whole)
            loss.backward()
        found.append((loss, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@BOTH
def test_the_same_batch_gives_the_same_bits_again(mode: str) -> None:
    model, whole = specialised(mode, torch.float32), inputs(len(TASKS))
    found = []
    for _ in range(2):
        with nspec.task(model, TASKS):
            loss_of(model, whole).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_without_gradients_it_is_the_same_also_after_an_update() -> None:
    model, whole = specialised().eval(), inputs(len(TASKS))
    for _ in range(2):
        with nspec.task(model, TASKS):
            with torch.no_grad():
                first, second = model(**whole).logits, model(**whole).logits
            with_grad = model(**whole).logits
            torch.testing.assert_close(first, with_grad, rtol=0, atol=1e-12)
            assert torch.equal(first, second)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
                changed = model(**whole).logits
            assert not torch.allclose(changed, first)
            torch.testing.assert_close(changed, model(**whole).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_what_generating_task_by_task_gives(beams: int) -> None:
    model, whole = specialised(init_std=0.5).eval(), inputs(len(TASKS))
    with torch.no_grad():
        model.model.decoder.layer_norm.bias.zero_()  # else one token wins everywhere
        for layer in model.model.decoder.layers:
            layer.fc1.weight.mul_(10)
            layer.fc2.weight.mul_(10)
    options = {"num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 8, "forced_bos_token_id": 7}

    def generate(mine: Tensor) -> Tensor:
        with torch.no_grad():
            return model.generate(whole["input_ids"][mine], attention_mask=whole["attention_mask"][mine], **options)

    with nspec.task(model, TASKS):
        together = generate(torch.ones(len(TASKS), dtype=torch.bool))
    for task in ALL:
        mine = torch.tensor([name == task for name in TASKS])
        with nspec.task(model, task):
            assert torch.equal(together[mine], generate(mine))
    with nspec.task(model, "en-de"):
        assert not torch.equal(together, generate(torch.ones(len(TASKS), dtype=torch.bool)))


@BOTH
def test_models_that_keep_time_first_give_the_dimension_of_the_sentences(mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 96, dropout=0.0)  # [length, batch, d]
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    nspec.specialize(model, masks_for(model, ALL), mode=mode)
    x = torch.randn(5, len(TASKS), 8, dtype=torch.float64)
    for task in ALL:
        with nspec.task(model, task):
            model(x[:, [name == task for name in TASKS]]).square().sum().backward()
    wanted = gradients(model)
    with nspec.task(model, TASKS, batch_dim=1):
        y = model(x)
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x), y)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)
    with nspec.task(model, TASKS):  # the layer says it
        torch.testing.assert_close(model(x), y)
    wrong = pytest.raises(ValueError, match="says batch_first=False: expected batch_dim=1")
    with nspec.task(model, TASKS, batch_dim=0), wrong:
        model(x)


@BOTH
def test_a_model_that_flattens_its_batch_to_tokens_has_rows_of_each_sentence_together(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 4)).double()
    nspec.specialize(model, masks_for(model, ALL), mode=mode)
    x = torch.randn(len(TASKS), 5, 4, dtype=torch.float64)
    with nspec.task(model, TASKS):
        want = model(x)
        torch.testing.assert_close(model(x.flatten(0, 1)).view(len(TASKS), 5, 4), want, rtol=0, atol=1e-12)
    with nspec.task(model, TASKS, flattened=True):
        torch.testing.assert_close(model(x.flatten(0, 1)).view(len(TASKS), 5, 4), want, rtol=0, atol=1e-12)
    with nspec.task(model, TASKS), pytest.raises(ValueError, match="gets 30 tokens in one dimension, for 6 sentences"):
        model(x.flatten(0, 1))


def test_rows_that_are_no_multiple_of_the_sentences_are_an_error_that_names_both() -> None:
    model = specialised()
    for tasks in (TASKS[:2], ["en-de", "en-de"]):
        with (
            nspec.task(model, tasks),
            pytest.raises(ValueError, match="3 rows along dimension 0, .* of the 2 sentences"),
        ):
            model(**inputs(3))
    with (
        nspec.task(model, TASKS, batch_dim=2),
        pytest.raises(ValueError, match="batch_dim is 2, .* expected batch_dim=0"),
    ):
        model(**inputs(6))


def test_lists_that_are_none_are_errors_and_change_nothing() -> None:
    model = specialised()
    nspec.set_task(model, "de-en")
    with pytest.raises(TypeError, match="the task of sentence 1 is 0.5, expected the name of a task"):
        nspec.set_task(model, ["en-de", 0.5])
    with pytest.raises(ValueError, match="no masks of task 'en-dd'; known: en-de"):
        nspec.set_task(model, ["en-de", "en-dd"])
    with pytest.raises(ValueError, match="list of tasks is empty"):
        nspec.set_task(model, [])
    with pytest.raises(ValueError, match="batch_dim is -1, expected 0 or more"):
        nspec.set_task(model, TASKS, batch_dim=-1)
    assert model.model.encoder.layers[0].fc1.task == "de-en"


def test_the_batch_before_comes_back_with_its_dimension() -> None:
    model = specialised()
    fc1 = model.model.encoder.layers[0].fc1
    nspec.set_task(model, TASKS, batch_dim=1)
    with nspec.task(model, "en-de"):
        assert fc1.task == "en-de"
    assert fc1.task == tuple(TASKS)
    assert fc1.switched_to().batch.batch_dim == 1
    nspec.profile(model, {"t": [inputs(3)]})
    assert fc1.switched_to().batch.batch_dim == 1


@BOTH
def test_the_optimiser_touches_the_union_of_the_tasks_of_a_batch(mode: str) -> None:
    model = specialised(mode)
    masks = masks_for(m2m100(), ALL, share=0.4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = nspec.RowSparseAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with nspec.task(model, ["en-de", "de-en", "en-de"]):
        loss_of(model, inputs(3)).backward()
    optimizer.step()
    for layer in masks.layers:
        union = masks["de-en"][layer] | masks["en-de"][layer]
        changed = (model.get_submodule(layer).weight != before[f"{layer}.weight"]).any(1)
        assert not union.all()
        assert torch.equal(changed, union)


def test_many_mixes_keep_a_bounded_number_of_stacked_sets() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 4))
    names = tuple(f"t{i}" for i in range(8))
    nspec.specialize(model, masks_for(model, names))
    x = torch.randn(2, 5, 4)
    for first in names:
        for second in names:
            with nspec.task(model, [first, second]):
                y = model(x)
            with nspec.task(model, first):
                torch.testing.assert_close(y[:1], model(x[:1]))
    assert len(model[0]._nspec.stacks) == 16


def test_copies_and_pickles_of_a_switched_model_compute_the_same() -> None:
    model, whole = specialised(), inputs(len(TASKS))
    nspec.set_task(model, TASKS)
    want = model(**whole).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**whole).logits, want)
        nspec.despecialize(other)


def test_what_the_layer_does_between_fc1_and_fc2_is_checked_in_mixed_batches_too() -> None:
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 4))
    nspec.specialize(model, masks_for(model, ALL))
    model[1] = nn.Softmax(-1)
    with nspec.task(model, TASKS), pytest.raises(ValueError, match="is not elementwise: it calls softmax"):
        model(torch.randn(len(TASKS), 4))


@BOTH
def test_autocast(mode: str) -> None:
    model, whole = specialised(mode, torch.float32), inputs(len(TASKS))
    with nspec.task(model, TASKS):
        want = loss_of(model, whole)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, whole)
        loss.backward()
    assert abs(loss.item() - want.item()) < 0.05 * want.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@BOTH
def test_gradients_add_up_over_mixed_and_single_micro_batches(mode: str) -> None:
    model = specialised(mode)
    parts = [(TASKS, inputs(len(TASKS))), ("de-en", batch(seed=1)), (SORTED, batch(seed=2, sentences=4))]
    for tasks, part in parts:
        task_by_task(model, [tasks] * 3 if isinstance(tasks, str) else tasks, part)
    wanted = gradients(model)
    for tasks, part in parts:
        with nspec.task(model, tasks):
            loss_of(model, part).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


# Tokens whose sentence is not known: an error, never a guess.


class Routed(nn.Module):
    """A block, then experts that take the tokens that a router sends them; ``experts`` names their attribute."""

    def __init__(self, experts: str, router: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        ffn = lambda: nn.Sequential(nn.Linear(8, 72), nn.ReLU(), nn.Linear(72, 8))
        self.dense, self._names = ffn(), (experts, router)
        setattr(self, experts, nn.ModuleList([ffn(), ffn()]))
        setattr(self, router, nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        experts, router = (getattr(self, name) for name in self._names)
        chosen, x = router(x).argmax(-1), self.dense(x)
        y = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            mine = chosen == number
            y[mine] = expert(x[mine])
        return y


@BOTH
@pytest.mark.parametrize("names", [("experts", "router"), ("ffns", "gate"), ("ffns", "choice")])
def test_a_list_of_tasks_on_routed_tokens_is_an_error_and_one_task_is_right(mode: str, names: tuple[str, str]) -> None:
    """By the name of the experts, by the router beside them, and where neither says it by the number of tokens."""
    model = Routed(*names).double()
    masks = masks_for(model, ("a", "b"))
    merged = nspec.merge(nspec.specialize(copy.deepcopy(model), masks), "a")
    nspec.specialize(model, masks, mode=mode)
    refused = 0
    for length in range(3, 9):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        try:
            with nspec.task(model, ["a", "b"]):
                mixed = model(x)
        except ValueError as error:
            refused += bool(re.search("router|multiple of the 2 sentences|one dimension", str(error)))
        else:  # an expert that gets all tokens gets them in order
            for sentence, task in enumerate("ab"):
                with nspec.task(model, task):
                    torch.testing.assert_close(mixed[sentence], model(x[sentence : sentence + 1])[0])
        if mode == "forward":
            with nspec.task(model, "a"):
                torch.testing.assert_close(model(x), merged(x))
    assert refused >= 4
    only = masks.only(["dense"])
    with nspec.task(nspec.specialize(nspec.despecialize(model), only, mode=mode), ["a", "b"]):
        model(torch.randn(2, 4, 8, dtype=torch.float64))


@BOTH
def test_layers_that_say_that_time_is_first_need_batch_dim_1_and_others_0(mode: str) -> None:
    for batch_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 72, dropout=0.0, batch_first=batch_first)
        nspec.specialize(layer, masks_for(layer, ("a", "b")), mode=mode)
        x = torch.randn(4, 4, 8)
        with nspec.task(layer, ["a", "b"] * 2, batch_dim=0 if batch_first else 1):
            layer(x)
        error = pytest.raises(ValueError, match=rf"batch_first={batch_first}: expected batch_dim={1 - batch_first}")
        with nspec.task(layer, ["a", "b"] * 2, batch_dim=1 if batch_first else 0), error:
            layer(x)


@BOTH
def test_an_input_that_may_be_time_first_is_an_error_until_the_layer_is_known(mode: str) -> None:
    make = lambda: nn.Sequential(nn.Linear(8, 72), nn.ReLU(), nn.Linear(72, 8))
    model = nn.ModuleList([make(), make()])
    nspec.specialize(model, masks_for(model, ("a", "b")), mode=mode)
    either = lambda: pytest.raises(ValueError, match=r"^1.0 gets .* may lie along dimension 0 .* or batch_dim=1")
    for shape in ((6, 2, 8), (2, 2, 8), (4, 6, 8)):
        for options in ({}, {"flattened": True}):
            with nspec.task(model, ["a", "b"], **options), either():
                model[1](torch.randn(shape))
        nspec.set_task(model, ["a", "b"], batch_dim=1)
        model[1](torch.randn(shape))
    with nspec.task(model, ["a", "b"]):
        model[0](torch.randn(2, 6, 8)), model[1](torch.randn(8, 1, 8))  # beams
        model[1](torch.randn(4, 2, 8))  # which the step before has shown
        with pytest.raises(ValueError, match="^0.0 gets"):
            model[0](torch.randn(4, 2, 8))  # of another layer


@pytest.mark.parametrize("batch_dim", [None, 1])
def test_xlnet_which_is_time_first_inside(batch_dim: int | None) -> None:
    from transformers import XLNetConfig, XLNetModel

    torch.manual_seed(0)
    model = (
        XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=72, dropout=0.0)).double().eval()
    )
    masks = {task: {"layer.0.ff.layer_1": torch.rand(72) < 0.5} for task in "ab"}
    nspec.specialize(model, nspec.NeuronMasks(masks), layers=[("*.ff.layer_1", "*.ff.layer_2")])
    for length in (2, 3, 4):
        ids = torch.randint(9, (2, length))
        options = {} if batch_dim is None else {"batch_dim": batch_dim}
        with nspec.task(model, ["a", "b"], **options):
            mixed = model(ids)[0]
        for sentence, task in enumerate("ab"):
            with nspec.task(model, task):
                torch.testing.assert_close(mixed[sentence], model(ids)[0][sentence])
    with nspec.task(model, ["a", "b"], batch_dim=0), pytest.raises(ValueError, match="layer_1 says batch_first=False"):
        model(ids)


def test_decoders_of_queries_are_time_first_in_models_that_are_not() -> None:
    from transformers import Mask2FormerConfig, OneFormerConfig
    from transformers.models.mask2former import modeling_mask2former as mask2former
    from transformers.models.oneformer import modeling_oneformer as oneformer

    sizes = {"hidden_dim": 8, "encoder_feedforward_dim": 72, "dim_feedforward": 72, "num_attention_heads": 2}
    config = Mask2FormerConfig(feature_size=8, mask_feature_size=8, **sizes)
    model = nn.ModuleList(
        [
            mask2former.Mask2FormerMaskedAttentionDecoderLayer(config),
            oneformer.OneFormerTransformerDecoderFFNLayer(8, 72),
            oneformer.OneFormerTransformerDecoderQueryTransformerDecoderLayer(8, 2, 72),
            oneformer.OneFormerTextTransformerLayer(8, 2, None),
            mask2former.Mask2FormerPixelDecoderEncoderLayer(config),
            oneformer.OneFormerPixelDecoderEncoderLayer(OneFormerConfig(conv_dim=8, encoder_feedforward_dim=72)),
        ]
    )
    assert [batch_dim_of(model, block) for block in find_blocks(model)] == [1, 1, 1, 1, 0, 0]


def test_matrices_are_taken_where_their_rows_are_known() -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(8, 72), nn.ReLU(), nn.Linear(72, 8)) for _ in range(3)])
    nspec.specialize(model, masks_for(model, ("a", "b")))
    with nspec.task(model, ["a", "b"]):
        model[0](torch.randn(2, 6, 8)), model[1](torch.randn(12, 8))
        with pytest.raises(ValueError, match="2.0 gets 2 tokens in one dimension"):
            model[2](torch.randn(2, 8))  # may be a head, or what a router chose
    with nspec.task(model, ["a", "b"]):
        model[2](torch.randn(2, 8))


@BOTH
def test_what_validation_used_first_trains_afterwards(mode: str) -> None:
    """Under inference_mode tensors are made that no backward pass may save."""
    with torch.inference_mode():
        model = m2m100(torch.float32)
    model = m2m100(torch.float32)
    with torch.inference_mode():
        nspec.specialize(model, masks_for(model, ALL), mode=mode)
        for switch in (TASKS, "en-de"):
            with nspec.task(model, switch):
                model(**inputs(len(TASKS)))
    for switch in (TASKS, "en-de"):
        with nspec.task(model, switch):
            model(**inputs(len(TASKS))).loss.backward()
