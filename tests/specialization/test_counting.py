"""What fires is a pre-activation above 0, in every family: counts are those of hooks on sentences one by one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn

import nspec
from nspec.specialization.layers import find_blocks

SOURCE, TARGET = torch.tensor([8, 5, 7, 3]), torch.tensor([3, 7, 5, 8])


def text(model: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A padded batch and its sentences without padding, of one side or of two."""
    g = torch.Generator().manual_seed(3)
    lengths = {"": SOURCE} | ({"decoder_": TARGET} if model.config.is_encoder_decoder else {})
    whole: dict[str, Tensor] = {}
    apart: list[dict[str, Tensor]] = [{} for _ in SOURCE]
    for side, of_side in lengths.items():
        padding = torch.arange(8) >= of_side[:, None]
        whole[f"{side}input_ids"] = torch.randint(4, 90, (4, 8), generator=g).masked_fill(padding, 1)
        whole[f"{side}attention_mask"] = (~padding).long()
        for i, length in enumerate(of_side.tolist()):
            apart[i] |= {name: v[i : i + 1, :length] for name, v in whole.items() if name.startswith(f"{side}input")}
    return whole, apart


def by_hooks(model: nn.Module, sentences: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The definition: outputs of fc1 (of a fused one, of its first half) above 0, and how many tokens there were."""
    blocks = find_blocks(model)
    counts = {block.name: torch.zeros(block.d_ff, dtype=torch.int64) for block in blocks}
    tokens = dict.fromkeys(counts, 0)

    def hook(name: str, d_ff: int) -> Any:
        def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            counts[name] += (output[..., :d_ff] > 0).flatten(0, -2).sum(0)
            tokens[name] += output[..., 0].numel()

        return count

    handles = [block.fc1.register_forward_hook(hook(block.name, block.d_ff)) for block in blocks]
    with torch.no_grad():
        for sentence in sentences:
            model(**sentence)
    for handle in handles:
        handle.remove()
    return counts, tokens


@pytest.mark.parametrize(
    "family",
    [
        *("M2M100", "Marian", "T5 gated", "Llama", "Phi3", "ModernBert", "Nemotron", "GPT2", "Bloom", "Falcon", "OPT"),
        *("Bert", "Albert", "CTRL", "NllbMoe", "SwitchTransformers"),
    ],
)
def test_counts_and_tokens_of_a_family(family: str) -> None:
    model = build(family)
    whole, apart = text(model)
    with torch.no_grad():
        before = model(**whole)[0]
    seen: list[Tensor] = []
    watch = model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = nspec.profile(model, {"t": [whole]})
    watch.remove()
    assert torch.equal(seen[0], before), "the model computes what it did, bitwise"
    want, tokens = by_hooks(model, apart)
    assert counts.layers == list(want)
    for layer, count in want.items():
        assert torch.equal(counts["t"][layer], count), layer
        assert int(count.sum()) > 0
    of_layers = counts.tokens["t"]
    assert (of_layers if isinstance(of_layers, dict) else dict.fromkeys(want, of_layers)) == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [nn.functional.relu, nn.functional.gelu, nn.functional.silu, nn.ReLU()])
def test_a_pre_activation_above_0_is_an_activation_above_0(act: Any, dtype: torch.dtype) -> None:
    small = torch.logspace(-37, 0, 500)
    z = torch.cat([torch.linspace(-30, 30, 20001), small, -small]).to(dtype)
    z = z[z.abs() >= torch.finfo(dtype).tiny]  # half of the smallest number below is rounded to 0
    assert torch.equal(act(z) > 0, z > 0)


@pytest.mark.parametrize(
    "act",
    [
        *(nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.LeakyReLU(), nn.Tanh()),
        *(nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(inplace=True)),
    ],
    ids=str,
)
def test_any_activation_also_in_place(act: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), act, nn.Linear(40, 4))
    x, real = torch.randn(30, 4), torch.arange(30) % 3 > 0
    counts = nspec.profile(model, {"t": [x, x[:10]]}, valid=lambda layer, batch: real[: len(batch)])
    assert torch.equal(counts["t"]["0"], (model[0](torch.cat([x[real], x[:10][real[:10]]])) > 0).sum(0))
    assert counts.tokens["t"] == 20 + 6


class OneOfTwo(nn.Module):
    """The second block does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_a_layer_that_did_not_run_counts_0_and_is_warned_of_once() -> None:
    x = torch.randn(9, 4)
    with pytest.warns(UserWarning, match="the batches of task a did not run two.0: their counts are 0") as warned:
        counts = nspec.profile(OneOfTwo(), {"a": [x], "b": [x]})
    assert len(warned) == 1
    assert counts["b"]["two.0"].tolist() == [0] * 8
    assert counts.tokens == {task: {"one.0": 9, "two.0": 0} for task in "ab"}
    assert counts.rates()["a"]["two.0"].tolist() == [0.0] * 8


def test_a_value_that_is_not_finite_is_an_error_without_relu_too() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.GELU(), nn.Linear(40, 4))
    x = torch.randn(20, 4)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^0: activations are not finite in batch 2 of task t: of 800, 40 are NaN"):
        nspec.profile(model, {"t": [torch.randn(20, 4), x]})
    real = torch.arange(20) != 3
    counts = nspec.profile(model, {"t": [x]}, valid=lambda layer, batch: real)
    assert torch.equal(counts["t"]["0"], (model[0](x[real]) > 0).sum(0))


def test_what_cuts_its_gate_off_is_refused() -> None:
    model = build("Llama")
    model.model.layers[0].mlp.activation_sparsity = 0.95
    with pytest.raises(ValueError, match=r"mlp.gate_proj: the block cuts its gate off .*activation_sparsity 0.95"):
        nspec.profile(model, {"t": [text(model)[0]]})
