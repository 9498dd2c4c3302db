"""Attention heads of each task: zero where they are not kept, switched by task, and no trace of them afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import nspec
from nspec.analysis.heads import attention_layers
from nspec.baselines.heads import mask_heads, merge_heads, unmask_heads
from tests.specialization.models import batch, m2m100

SIZE = 6  # of a head of the small M2M100: 4 heads, width 24


def masks() -> nspec.NeuronMasks:
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for task in ("en-de", "de-en"):
        kept[task] = {
            name: torch.rand(heads, generator=generator) < 0.5 for name, heads in attention_layers(m2m100()).items()
        }
        for mask in kept[task].values():
            mask[0] = True
    return nspec.NeuronMasks(kept)


def pruned(model: nn.Module, kept: nspec.NeuronMasks, task: str) -> nn.Module:
    """The model with the columns of out_proj at zero that belong to other heads: the definition."""
    model = copy.deepcopy(model)
    for name, mask in kept[task].items():
        with torch.no_grad():
            model.get_submodule(name).out_proj.weight[:, ~mask.repeat_interleave(SIZE)] = 0
    return model


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**data).loss
    return value


def test_other_heads_give_zero_and_get_no_gradient() -> None:
    model, data, kept = m2m100().eval(), batch(), masks()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    mask_heads(model, kept)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss(model, data), loss(plain, data))
    for task in kept.tasks:
        want = loss(pruned(plain, kept, task), data)
        with nspec.task(model, task):
            found = loss(model, data)
        torch.testing.assert_close(found, want)
        assert (want - loss(plain, data)).abs() > 1e-6
        model.zero_grad()
        found.backward()
        for name, mask in kept[task].items():
            attention, dropped = model.get_submodule(name), ~mask.repeat_interleave(SIZE)
            assert not attention.out_proj.weight.grad[:, dropped].any()
            assert not attention.v_proj.weight.grad[dropped].any()
            assert not attention.q_proj.weight.grad[dropped].any()
            assert attention.v_proj.weight.grad[~dropped].any()
    unmask_heads(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(loss(model, data), loss(plain, data))
    with pytest.raises(ValueError, match="has no masked heads"):
        unmask_heads(model)


def test_a_batch_of_several_tasks_is_that_of_its_sentences() -> None:
    model, data, kept = m2m100().eval(), batch(), masks()
    mask_heads(model, kept)
    tasks = (["en-de", None, "de-en", "en-de"] * 4)[: len(data["labels"])]
    assert len({*tasks}) > 1
    with nspec.task(model, tasks):
        mixed = model(**data).logits
    for row, task in enumerate(tasks):
        with nspec.task(model, task):
            torch.testing.assert_close(mixed[row], model(**data).logits[row])


def test_copies_and_pickles_keep_their_heads_and_generate_under_the_task() -> None:
    model, kept = m2m100().eval(), masks()
    ids = torch.randint(4, 40, (2, 5))
    want = pruned(model, kept, "en-de").generate(ids, num_beams=2, max_new_tokens=6)
    mask_heads(model, kept)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with nspec.task(other, "en-de"):
            assert torch.equal(other.generate(ids, num_beams=2, max_new_tokens=6), want)


def test_a_merged_model_is_plain_and_computes_what_the_task_computes() -> None:
    plain, data, kept = m2m100().eval(), batch(), masks()
    model = mask_heads(copy.deepcopy(plain), kept)
    merged = merge_heads(model, "en-de")
    assert all(type(module).__module__.split(".")[0] != "nspec" for module in merged.modules())
    expected = pruned(plain, kept, "en-de")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in merged.state_dict().items())
    with nspec.task(model, "en-de"):
        torch.testing.assert_close(loss(merged, data), loss(model, data))
    with pytest.raises(ValueError, match="there are no heads of task 'en-nl'"):
        merge_heads(model, "en-nl")


def test_masks_that_do_not_fit_are_an_error_and_change_nothing() -> None:
    model, kept = m2m100(), masks()
    first = kept.layers[0]
    one = lambda mask, name=first: nspec.NeuronMasks({"en-de": {name: torch.tensor(mask)}})
    for wrong, says in [
        (one([True] * 6), "has 6 heads in the masks, 4 in the model"),
        (one([False] * 4), "en-de keeps no head of"),
        (one([True] * 4, "model.encoder.attn"), "which the model does not have"),
        (one([True] * 4, "model.encoder.layers.0.fc1"), "expected attention that calls an out_proj"),
    ]:
        with pytest.raises(ValueError, match=says):
            mask_heads(model, wrong)
    mask_heads(model, kept)
    with pytest.raises(ValueError, match="has masked heads already"):
        mask_heads(model, kept)
    with pytest.raises(ValueError, match="no heads of task 'en-xx'|en-xx"), nspec.task(model, "en-xx"):
        pass
