"""Scores of neurons: mean abs(h) and abs(h * dL/dh) over real tokens, against autograd by hand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, Family, inputs, make
from torch import Tensor, nn
from torch.nn import functional as F

import nspec
from nspec import NeuronScores
from nspec.specialization.layers import find_blocks

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What fc2 of each block gets, as tensors with a gradient of their own."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h = args[0] + torch.zeros_like(args[0]).requires_grad_()
        h.retain_grad()
        found.setdefault(name, []).append(h)
        return (h, *args[1:])

    with contextlib.ExitStack() as hooks:
        for block in find_blocks(model):
            hook = block.fc2.register_forward_pre_hook(lambda _, args, name=block.name: keep(name, args))
            hooks.callback(hook.remove)
        yield found


def loss_by_hand(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")


def by_hand(model: nn.Module, batch: dict[str, Tensor], shifted: bool, real: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum over real tokens; ``real`` by the half of the model ("encoder", "decoder"), or "" for all."""
    model.eval()
    with recorded(model) as found:
        output = model(**batch)
        loss = output.loss * int((batch["labels"][:, int(shifted) :] != -100).sum())
        torch.testing.assert_close(loss_by_hand(output.logits, batch["labels"], shifted).to(loss.dtype), loss)
        loss.backward()  # that of causal models is in float32
    sums = {}
    for name, [h] in found.items():
        [mask] = [mask for side, mask in real.items() if side in name]
        sums[name] = (h * h.grad).detach().abs().reshape(*mask.shape, -1)[mask].sum(0)
    model.zero_grad()
    model.train()
    return sums


CAUSAL = ["Llama", "Llama, with biases", "Qwen2", "Gemma2", "Phi3", "GPT2", "BLOOM", "OPT"]
PAIRS = ["M2M100", "Marian, swish", "MBart, gelu", "T5", "T5, gated-gelu"]


def padded(family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch with padding, and its real tokens by the half of the model."""
    batch = {name: value.clone() for name, value in inputs(family).items()}
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    real[0, 4:] = real[2, 2:] = False
    batch["attention_mask"] = real.long()
    if family.reads == "text":
        batch["labels"] = batch["input_ids"].masked_fill(~real, -100)
        batch["labels"][:, 1] = -100  # tokens that are read and not predicted count all the same
        return batch, {"": real}
    target = torch.ones_like(batch["labels"], dtype=torch.bool)
    target[1, 3:] = False
    batch["labels"] = batch["labels"].masked_fill(~target, -100)
    return batch, {"encoder": real, "decoder": target}


@pytest.mark.parametrize("name", [*CAUSAL, *PAIRS])
def test_gradient_scores_are_those_of_autograd_over_real_tokens(name: str) -> None:
    family = FAMILIES[name]
    model = make(family)
    batch, real = padded(family)
    want = by_hand(model, batch, shifted=family.reads == "text", real=real)
    trained = [p.requires_grad for p in model.parameters()]
    scores = nspec.profile(model, {"a": [batch]}, score="gradient")
    assert list(scores["a"]) == list(want)
    for layer, value in want.items():
        torch.testing.assert_close(scores["a"][layer], value, **CLOSE)
        assert float(value.max()) > 0
        [mask] = [mask for side, mask in real.items() if side in layer]
        torch.testing.assert_close(scores.means()["a"][layer], value / int(mask.sum()), **CLOSE)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == trained  # Marian's positions are not
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["T5", "M2M100", "Llama"])
def test_sixteen_bits_give_the_scores_but_for_rounding(name: str) -> None:
    family = FAMILIES[name]
    model, (batch, _) = make(family), padded(family)
    want = nspec.profile(model, {"a": [batch]}, score="gradient")
    found = nspec.profile(model.bfloat16(), {"a": [batch]}, score="gradient")
    for layer in want.layers:
        off = (found["a"][layer] - want["a"][layer]).norm() / want["a"][layer].norm()
        assert off < 0.02  # a label in five more or less would be 0.2


class Gated(nn.Module):
    """A block over numbers whose gate is ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def test_scores_of_a_model_of_ones_own_with_a_loss_of_ones_own() -> None:
    model = nn.Sequential(Gated(), Gated()).double()
    model[1].up_proj.weight.requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    first, second = model[0], model[1]
    g, u = first.gate_proj(x), first.up_proj(x)
    h = (g.relu() * u).detach().requires_grad_()
    y = x + first.down_proj(h)
    k = second.gate_proj(y).relu() * second.up_proj(y)
    k.retain_grad()
    (y + second.down_proj(k)).pow(3).sum().backward()
    model.zero_grad()
    scores = nspec.profile(model, {"a": [x]}, score="gradient", loss=lambda output, batch: output.pow(3).sum())
    torch.testing.assert_close(scores["a"]["0.gate_proj"], (h * h.grad).abs().sum(0), **CLOSE)
    torch.testing.assert_close(scores["a"]["1.gate_proj"], (k * k.grad).abs().sum(0).detach(), **CLOSE)
    magnitude = nspec.profile(model, {"a": [x]}, score="magnitude")
    torch.testing.assert_close(magnitude["a"]["1.gate_proj"], k.detach().abs().sum(0), **CLOSE)
    assert (scores.score, magnitude.score, magnitude.tokens) == ("gradient", "magnitude", {"a": 5})
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.up_proj.weight"]


@pytest.mark.parametrize("name", ["Llama", "M2M100"])
@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_any_split_into_batches_and_processes_adds_up_to_the_whole(name: str, score: Any) -> None:
    family = FAMILIES[name]
    model = make(family)
    batch, _ = padded(family)
    other = {key: value.roll(1, 0) if key == "input_ids" else value for key, value in batch.items()}
    whole = nspec.profile(model, {"a": [batch], "b": [other]}, score=score)
    parts = [{key: value[s] for key, value in batch.items()} for s in (slice(0, 1), slice(1, 4))]
    split = nspec.profile(model, {"a": [parts[0]]}, score=score)
    split += nspec.profile(model, {"a": [parts[1]], "b": [other]}, score=score)
    assert split.tokens == whole.tokens
    for task in whole.tasks:
        for layer in whole.layers:
            torch.testing.assert_close(split[task][layer], whole[task][layer], rtol=1e-10, atol=1e-12)
    assert any(not torch.allclose(whole["a"][layer], whole["b"][layer]) for layer in whole.layers)


def test_experts_are_scored_on_the_real_tokens_that_they_get() -> None:
    model = make(FAMILIES["NLLB-MoE"])
    batch, _ = padded(FAMILIES["NLLB-MoE"])
    magnitude = nspec.profile(model, {"a": [batch]}, score="magnitude")
    counts = nspec.profile(model, {"a": [batch]})
    assert magnitude.tokens == counts.tokens
    gradient = nspec.profile(
        model, {"a": [batch]}, score="gradient", loss=lambda output, b: loss_by_hand(output.logits, b["labels"], False)
    )
    assert gradient.tokens == counts.tokens
    for layer in counts.layers:  # ReLU: a neuron that never fired has no magnitude, and no score
        assert torch.equal(magnitude["a"][layer] > 0, counts["a"][layer] > 0)
        assert not bool((gradient["a"][layer] > 0)[counts["a"][layer] == 0].any())
    assert sum(float(gradient["a"][layer].sum()) for layer in gradient.layers) > 0


def test_padding_may_be_anything_and_a_real_value_may_not() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(2, 3, 4)
    real = torch.tensor([[True, True, True], [True, False, False]])
    x[1, 1:] = float("nan")
    options: dict[str, Any] = {"valid": lambda layer, batch: real, "loss": lambda out, _: out[real].square().sum()}
    for score in ("gradient", "magnitude"):
        taken = options if score == "gradient" else {"valid": options["valid"]}
        found = nspec.profile(model, {"a": [x]}, score=score, **taken)
        assert found.tokens == {"a": 4}
        x[0, 0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"not finite|the loss is (nan|inf) in batch 1 of task a"):
            nspec.profile(model, {"a": [x]}, score=score, **taken)
        x[0, 0, 0] = 1.0
    assert all(p.requires_grad for p in model.parameters())  # after an error too


def test_checkpointed_layers_are_seen_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Gated(), Gated()])
            self.active = True

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.active else block(x)
            return x

    model, x = Checkpointed().double(), torch.randn(5, 4, dtype=torch.float64)
    found = []
    for model.active in (True, False):
        found.append(nspec.profile(model, {"a": [x]}, score="gradient", loss=lambda out, _: out.square().sum()))
    assert found[0].tokens == found[1].tokens == {"a": 5}
    for layer in found[0].layers:
        torch.testing.assert_close(found[0]["a"][layer], found[1]["a"][layer], **CLOSE)


def test_a_specialised_model_is_scored_dense_and_gradients_are_recorded_whatever_is_around() -> None:
    family = FAMILIES["Llama"]
    model, batch = make(family), padded(family)[0]
    want = nspec.profile(model, {"a": [batch]}, score="gradient")
    masks = nspec.select(nspec.profile(model, {"a": [batch]}), 0.5)
    nspec.specialize(model, masks, mode="forward")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nspec.profile(model, {"a": [batch]}, score="gradient")
    for layer in want.layers:
        torch.testing.assert_close(found["a"][layer], want["a"][layer], **CLOSE)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"score": "gradients"}, "score is 'gradients', expected one of 'count', 'gradient', 'magnitude'"),
        ({}, {"score": "magnitude", "loss": len}, "loss is given, which is for score='gradient' alone"),
        ({"labels": None}, {}, "the model gave no loss .* put labels into the batches"),
        ({"labels": -100}, {}, r"the loss is nan in batch 1 of task a.*labels \(other than -100\)"),
        ({}, {"loss": lambda output, batch: 0.0}, "the loss is a float, expected a tensor"),
        ({}, {"loss": lambda output, batch: output.logits}, r"the loss is torch.float64 \[4, 6, 50\], expected one"),
        ({}, {"loss": lambda output, batch: output.loss.detach()}, "no gradient flows from the loss"),
        (
            {"other_loss": True},
            {},
            "of how many labels the model's loss is the mean cannot be told: it is .* give loss=",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_clear_error(change: dict[str, Any], options: Any, message: str) -> None:
    family = FAMILIES["Llama"]
    model, (batch, _) = make(family), padded(family)
    if "labels" in change:
        batch = batch | {"labels": None if change["labels"] is None else torch.full_like(batch["labels"], -100)}
    if "other_loss" in change:
        model.loss_function = lambda logits, labels, **_: 1.1 * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    with pytest.raises((ValueError, TypeError), match=message):
        nspec.profile(model, {"a": [batch]}, **({"score": "gradient"} | options))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Bypassed(Gated):
    """Reads the weight of fc2 instead of calling it, or calls it twice."""

    twice = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h) + self.down_proj(h) if self.twice else F.linear(h, self.down_proj.weight)


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_a_block_whose_fc2_is_not_called_once_for_fc1_is_refused(score: Any) -> None:
    model, x = nn.Sequential(Bypassed()), torch.randn(3, 4)
    options: Any = {"score": score} | ({"loss": lambda out, _: out.sum()} if score == "gradient" else {})
    with pytest.raises(ValueError, match=r"0.gate_proj: fc2 did not get the activations of fc1 in batch 1 of task a"):
        nspec.profile(model, {"a": [x]}, **options)
    model[0].twice = True
    with pytest.raises(ValueError, match=r"0.gate_proj: fc2 of this block runs without fc1 before it in batch 1"):
        nspec.profile(model, {"a": [x]}, **options)


def test_a_layer_that_the_loss_does_not_depend_on_is_named() -> None:
    model = nn.Sequential(Detached(), Detached(), Gated())
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"0\.fc1: the loss does not depend on what this layer computes in batch 1"):
        nspec.profile(model, {"a": [x]}, score="gradient", loss=lambda out, _: out.sum())
    nspec.profile(model, {"a": [x]}, score="gradient", loss=lambda out, _: out.sum(), layers=["2"])


def test_scores_save_load_add_and_refuse_what_they_cannot_be(tmp_path: Path) -> None:
    layers = {"x": torch.tensor([1.5, 0.0, 1e-30]), "y": torch.tensor([2.0])}
    one = NeuronScores({"a": layers, "b": layers}, {"a": 4, "b": {"x": 3, "y": 0}}, "gradient")
    one.save(tmp_path)
    again = NeuronScores.load(tmp_path)
    assert (again.score, again.tokens, again.tasks, again.layers) == ("gradient", one.tokens, ["a", "b"], ["x", "y"])
    assert all(torch.equal(again[t][layer], one[t][layer]) for t in one for layer in one.layers)
    assert (one + again).tokens == {"a": 8, "b": {"x": 6, "y": 0}}
    assert (one + again)["a"]["x"].tolist() == (2 * layers["x"]).tolist()
    assert one.means()["b"]["y"].tolist() == [2.0]
    assert one.only(["y"]).renamed({"y": "z"}).score == "gradient"
    with pytest.raises(ValueError, match="scores of gradient and of magnitude do not add up"):
        one + NeuronScores({"a": layers}, {"a": 4}, "magnitude")
    with pytest.raises(ValueError, match="tokens lacks task b"):
        NeuronScores({"a": layers, "b": layers}, {"a": 4}, "gradient")
    with pytest.raises(ValueError, match="negative or not finite somewhere"):
        NeuronScores({"a": {"x": torch.tensor([1.0, float("nan")])}}, {"a": 4}, "gradient")
    with pytest.raises(TypeError, match=r"found torch.int64, expected a float64 tensor \[d_ff\]"):
        NeuronScores({"a": {"x": torch.tensor([1])}}, {"a": 4}, "gradient")
    with pytest.raises(FileNotFoundError, match=r"counts.safetensors does not exist"):
        nspec.ActivationCounts.load(tmp_path)
