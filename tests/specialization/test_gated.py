"""Gated, fused and other blocks than ReLU's in what training does around them: checkpoints, autocast, copies, hooks."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nspec

D_FF = 96


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, D_FF), nn.Linear(6, D_FF), nn.Linear(D_FF, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(6, 2 * D_FF), nn.Linear(D_FF, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).split(D_FF, dim=-1)
        return x + self.down_proj(torch.tanh(gate) * up)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, D_FF), nn.Linear(D_FF, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


EACH = pytest.mark.parametrize("kind", [Gated, Fused, Plain])
BOTH = pytest.mark.parametrize("mode", ["forward", "update"])


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module], run: Any = None) -> None:
        super().__init__()
        self.blocks, self.run = nn.ModuleList([kind(), kind()]), run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
        return x


def specialised(kind: type[nn.Module], mode: str, run: Any = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    from nspec.specialization.layers import find_blocks

    torch.manual_seed(0)
    model = Model(kind, run).to(dtype)
    g = torch.Generator().manual_seed(1)
    names = [block.name for block in find_blocks(model)]
    masks = {task: {name: torch.rand(D_FF, generator=g) < 0.4 for name in names} for task in "ab"}
    return nspec.specialize(model, nspec.NeuronMasks(masks), mode=mode)


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@BOTH
@EACH
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_uses_the_neurons_of_its_forward_pass(
    kind: type[nn.Module], mode: str, reentrant: bool
) -> None:
    plain, model = specialised(kind, mode), specialised(kind, mode, partial(checkpoint, use_reentrant=reentrant))
    for switch in ("a", None, ["a", "b", "a", "a"]):
        found = []
        for one in (plain, model):
            with nspec.task(one, switch):
                loss = one(x_of()).square().sum()
            nspec.set_task(one, "b")
            loss.backward()
            found.append(gradients(one))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@EACH
def test_autocast_is_close_to_float32_and_copies_compute_the_same(kind: type[nn.Module]) -> None:
    model, x = specialised(kind, "forward", dtype=torch.float32), x_of(torch.float32)
    for switch in ("a", ["b", "a", "b", "b"]):
        with nspec.task(model, switch):
            want = model(x)
            want.square().sum().backward()
            exact = gradients(model)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(x)
                found.square().sum().backward()
            for a, b in zip(gradients(model), exact, strict=True):
                assert a.dtype == torch.float32
                assert (a - b).norm() < 0.1 * b.norm() + 1e-3
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(other(x), want)
                nspec.despecialize(other)
                assert not [name for module in other.modules() for name in vars(module) if "nspec" in name]


@BOTH
@EACH
def test_only_the_rows_of_its_neurons_are_stepped(kind: type[nn.Module], mode: str) -> None:
    model = specialised(kind, mode)
    optimizer = nspec.RowSparseAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with nspec.task(model, "a"):
            model(x_of()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    g = torch.Generator().manual_seed(1)
    active = torch.rand(D_FF, generator=g) < 0.4
    changed = {name: (p != before[name]).flatten(1).any(1) for name, p in model.named_parameters() if p.dim() == 2}
    first = {Gated: ["gate_proj", "up_proj"], Fused: ["gate_up_proj"], Plain: ["fc1"]}[kind]
    for name in first:
        rows = changed[f"blocks.0.{name}.weight"]
        assert torch.equal(rows, active.repeat(len(rows) // D_FF))


def test_the_halves_of_a_fused_projection_are_taken_apart_or_refused() -> None:
    ways: dict[str, Any] = {
        "chunk": lambda h: h.chunk(2, -1),
        "torch.chunk": lambda h: torch.chunk(h, 2, dim=2),
        "by name": lambda h: torch.chunk(input=h, chunks=2, dim=-1),
        "split": lambda h: h.split([D_FF, D_FF], dim=-1),
        "slices": lambda h: (h[..., :D_FF], h[..., D_FF:]),
        "tokens": lambda h: [half.view(4, 3, D_FF) for half in h.view(-1, 2 * D_FF).clone().chunk(2, -1)],
    }
    wrong: dict[str, tuple[Any, str]] = {
        "three": (lambda h: h.chunk(3, -1), r"chunk\(3, dim=-1\)"),
        "another dimension": (lambda h: h.chunk(2, 1), "dim=1"),
        "a third": (lambda h: (h[..., :10], h[..., 10:]), "neither gate nor up"),
        "at once": (lambda h: (torch.tanh(h), h), "before it takes them apart"),
        "ReLU of both": (lambda h: F.relu(h).chunk(2, -1), "relu on gate and up"),
        "ReLU of both in place": (lambda h: F.relu_(h).chunk(2, -1), "relu on gate and up"),
        "dropout of both": (lambda h: F.dropout(h, 0.5).chunk(2, -1), "before it takes them apart"),
        "three parts": (lambda h: h.view(4, 3, -1).view(4, 6, D_FF).chunk(2, 1), "expected 192 at its end"),
    }
    model = specialised(Fused, "forward")
    with nspec.task(model, "a"):
        want = model(x_of())
        for way in (*ways.values(), *wrong.values()):
            take, message = way if isinstance(way, tuple) else (way, None)

            def forward(self: Any, x: Tensor, take: Any = take) -> Tensor:
                gate, up = take(self.gate_up_proj(x))
                return x + self.down_proj(torch.tanh(gate) * up)

            for block in model.blocks:
                block.forward = forward.__get__(block)
            if message is None:
                torch.testing.assert_close(model(x_of()), want)
            else:
                with pytest.raises(ValueError, match=f"^blocks.0.gate_up_proj: .*{message}"):
                    model(x_of())


def test_a_product_of_two_blocks_or_passes_is_refused() -> None:
    model = specialised(Gated, "forward")
    one, two = model.blocks
    x = x_of()
    with nspec.task(model, "a"):
        gate = one.gate_proj(x)
        with pytest.raises(ValueError, match=r"activations of blocks.1.up_proj in another pass"):
            F.silu(gate) * two.up_proj(x)
    with nspec.task(model, "b"), pytest.raises(ValueError, match="in another pass"):
        gate * one.up_proj(x)


def test_statistics_over_neurons_are_refused_by_name() -> None:
    """Gemma-3n keeps the largest gates alone, by their mean and deviation."""
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": 50, "vocab_size_per_layer_input": 50, "hidden_size": 16, "hidden_size_per_layer_input": 8,
        "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4, "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0], "pad_token_id": 1,
    }  # fmt: skip
    model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**options))
    from nspec.specialization.layers import find_blocks

    masks = {"a": {block.name: torch.arange(block.d_ff) % 2 == 0 for block in find_blocks(model)}}
    nspec.specialize(model, nspec.NeuronMasks(masks))
    with (
        nspec.task(model, "a"),
        pytest.raises(ValueError, match=r"mlp.gate_proj: .*not elementwise: it calls (mean|std)"),
    ):
        model(torch.tensor([[3, 4, 5]]))


def test_columns_of_a_transposed_layer_are_refused_by_the_row_optimiser() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from nspec.specialization.layers import find_blocks

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    masks = {"a": {block.name: torch.arange(block.d_ff) % 2 == 0 for block in find_blocks(model)}}
    nspec.specialize(model, nspec.NeuronMasks(masks))
    with pytest.raises(ValueError, match="its neurons are columns.*torch.optim.AdamW"):
        nspec.RowSparseAdamW(model.parameters())


@BOTH
@EACH
def test_specialisation_leaves_one_object_on_a_module_and_takes_it_off(kind: type[nn.Module], mode: str) -> None:
    plain, model = Model(kind), specialised(kind, mode)
    for (name, before), (_, after) in zip(plain.named_modules(), model.named_modules(), strict=True):
        left = set(vars(after)) - set(vars(before))
        assert left <= {"_nspec"}, name
        if type(before) is nn.Linear:
            assert bool(left) == (type(after) is not nn.Linear), name
    nspec.despecialize(model)
    for (name, before), (_, after) in zip(plain.named_modules(), model.named_modules(), strict=True):
        assert (set(vars(after)), type(after)) == (set(vars(before)), type(before)), name
