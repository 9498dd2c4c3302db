"""What a pass costs: products, what is kept between forward and backward, and memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import nspec

D, F, K, TOKENS = 16, 200, 7, 3


class Blocks(nn.Module):
    """Gated blocks with residual connections, on inputs that need no gradient."""

    def __init__(self, count: int) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=2)
        self.layers = nn.ModuleList([LlamaMLP(config) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def tuned(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = Blocks(3).to(dtype)
    masks = {f"layers.{i}.gate_proj": torch.arange(F) < K for i in range(3)}
    return nspec.finetune(model, nspec.NeuronMasks({"cy": masks}), quiet=True)


def test_products_are_those_of_the_neurons_and_of_what_lies_below() -> None:
    model = tuned()
    with FlopCounterMode(display=False) as flops:
        y = model(torch.randn(TOKENS, D))
    one, compact = 2 * TOKENS * D * F, 2 * TOKENS * D * K
    assert flops.get_total_flops() == 3 * 3 * one
    with FlopCounterMode(display=False) as flops:
        y.square().sum().backward()
    # Of the first block, below which nothing is trained, the columns of the neurons alone. Of the three products of each
    # other one, PyTorch does not count the one that adds in place.
    assert flops.get_total_flops() == 2 * 2 * one + 3 * 3 * compact + compact


def test_what_is_kept_is_the_input_gate_and_up_and_the_columns_of_the_neurons() -> None:
    model = tuned()
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in trained:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(TOKENS, D))
    first = [TOKENS * D, TOKENS * K, TOKENS * K, TOKENS * K]
    assert kept == first + 2 * [TOKENS * D, TOKENS * F, TOKENS * F, TOKENS * K]


class Plain(nn.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def plain(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    base = nn.Module()
    base.blocks = nn.ModuleList([Plain() for _ in range(2)])
    base.forward = lambda x: base.blocks[1](base.blocks[0](x))
    model = copy.deepcopy(base)
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    masks = {f"blocks.{i}.fc1": torch.arange(F) % 29 == 3 for i in range(2)}
    return base, nspec.finetune(model, nspec.NeuronMasks({"cy": masks}), quiet=True, **options)


def test_a_plain_block_below_which_nothing_is_trained_has_the_columns_of_the_neurons_alone() -> None:
    base, model = plain()
    assert type(model.blocks[0]).__name__ == "Plain"
    x = torch.randn(TOKENS, D)
    with FlopCounterMode(display=False) as flops:
        y = model(x)
    assert torch.equal(y, base(x))
    one, compact = 2 * TOKENS * D * F, 2 * TOKENS * D * K
    assert flops.get_total_flops() == 2 * 2 * one
    with FlopCounterMode(display=False) as flops:
        y.square().sum().backward()
    assert flops.get_total_flops() == 2 * one + 2 * 2 * compact + compact


@pytest.mark.parametrize("parts", [None, ("fc1",), ("fc2",)])
@pytest.mark.parametrize("biases", [True, False])
def test_the_gradients_of_the_lowest_plain_block_are_rows_of_the_full_ones(parts: Any, biases: bool) -> None:
    base, model = plain(parts=parts, biases=biases)
    base, model, x = base.double(), model.double(), torch.randn(TOKENS, D, dtype=torch.float64)
    for one in (base, model):
        one(x).square().sum().backward()
    at, layer = (torch.arange(F) % 29 == 3).nonzero()[:, 0], model.blocks[0]
    wanted = [
        base.blocks[0].fc1.weight.grad[at],
        base.blocks[0].fc2.weight.grad[:, at].t(),
        base.blocks[0].fc1.bias.grad[at],
    ]
    found = [layer.fc1.neurons.of("cy"), layer.fc2.neurons.of("cy"), layer.fc1.neuron_biases.of("cy")]
    there = [part is not None for part in found]
    assert there == [parts != ("fc2",), parts != ("fc1",), biases and parts != ("fc2",)]
    for part, gradient in zip(found, wanted):
        if part is not None:
            torch.testing.assert_close(part.grad, gradient, rtol=0, atol=1e-12)


def test_what_looks_into_a_plain_block_finds_whole_gradients() -> None:
    _, model = plain()
    seen: list[Tensor] = []
    model.blocks[0].act.register_full_backward_hook(lambda module, given, came: seen.append(came[0]))
    model(torch.randn(TOKENS, D)).square().sum().backward()
    assert int(seen[0].count_nonzero()) > TOKENS * K


class Made(TorchDispatchMode):
    """Notes the memory that operations make."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.itemsize)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_a_weight_is_made_and_trained_state_is_16_bytes_a_number(dtype: torch.dtype) -> None:
    model = tuned(dtype)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.01)
    with Made({p.untyped_storage().data_ptr() for p in model.parameters()}) as made:
        for _ in range(2):
            model(torch.randn(TOKENS, D, dtype=dtype)).float().square().sum().backward()
            optimizer.step()
    assert made.largest <= max(TOKENS * F, 64 * K)
    state = [t for values in optimizer.state.values() for t in values.values() if t.dim() > 0]
    held = sum(t.nbytes for t in [*own, *(p.grad for p in own), *state])
    assert held == 16 * sum(p.numel() for p in own) == 16 * 3 * 3 * D * K
