"""A feed-forward block as a model has it: modules, forward and backward, 16 bits by autocast as mixed precision trains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nspec
from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Provider, Results, Work
from bench.release import mask_weights
from nspec.nn.masked_linear import Mode

Answer = tuple[Tensor | None, ...]


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: gated, three layers without biases, as in Llama."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_model]`` -> ``[..., d_model]``."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def dense_block(activation: str, d_model: int, d_ff: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A block with one of ``cases.ACTIVATIONS``, and its layers whose rows are neurons, that of the masks first."""
    if activation == "swiglu":
        return SwiGLU(d_model, d_ff), ("gate_proj", "up_proj")
    between = nn.ReLU() if activation == "relu" else nn.GELU()
    return nn.Sequential(nn.Linear(d_model, d_ff), between, nn.Linear(d_ff, d_model)), ("0",)


class _Times(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: mode `update` saves one product of six. Weights and gradients are float32.

    With ReLU as of compact_ffn; an activation whose derivative its output does not tell keeps its input too.
    """
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    dense, firsts = dense_block(case.activation, d, d_ff)
    dense = dense.to(device)
    names = [name for name, _ in dense.named_parameters()]
    active = shared.random_sets(1, d_ff, case.active, device)[0]
    masks = nspec.NeuronMasks({"task": {firsts[0]: active.cpu()}})
    count = shared.input_sets(8 * tokens * (d + d_ff))

    def drawn(draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return draw(tokens, d, device=device).float().requires_grad_(), draw(tokens, d, device=device).to(dtype)

    inputs = [drawn(shared.noise) for _ in range(count)]
    exact = kept = {name: p.detach().clone() for name, p in dense.named_parameters()}
    check = drawn(shared.noise)
    if case.activation == "relu":  # the others are smooth: rounding decides nothing
        integers = functools.partial(shared.small_integers, dtype=torch.float32)
        check = drawn(integers)
        exact = {name: integers(*p.shape, device=device) for name, p in kept.items()}
        exact["0.bias"] += 0.5
    take = lambda number: check if number == shared.CHECK else inputs[number % count]
    results = lambda answer: dict(zip(("y", "dx", *(f"gradient of {name}" for name in names)), answer))

    def step(model: nn.Module) -> Callable[[int], Answer]:
        parameters = list(model.parameters())

        def call(number: int) -> Answer:
            if number != shared.CHECK:
                return compute(*take(number))
            model.load_state_dict(exact, strict=False)
            try:
                return compute(*check)
            finally:
                model.load_state_dict(kept, strict=False)

        def compute(x: Tensor, dy: Tensor) -> Answer:
            for tensor in (x, *parameters):
                tensor.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = model(x)
            y.backward(dy)
            return (y.detach(), x.grad, *(p.grad for p in parameters))

        return call

    def specialized(mode: Mode) -> nn.Module:
        model = nspec.specialize(copy.deepcopy(dense), masks, mode=mode)
        nspec.set_task(model, "task")
        return model

    released = mask_weights(copy.deepcopy(dense), {"task": {name: active for name in firsts}})
    for name in firsts:
        layer: Any = released.get_submodule(name)
        layer.mask = layer.masks["task"]

    def update(answer: Answer) -> Results:
        """Forward is dense's, and all gradients but of the masked weights, whose inactive rows have to have none."""
        found = results(answer)
        for name in firsts:
            rows = found.pop(f"gradient of {name}.weight")[~active]
            if rows.any():
                raise AssertionError(
                    f"mode update: {int(rows.any(1).sum())} inactive rows of {name}.weight have a gradient"
                )
        return found

    def expected(computes: Computes) -> Results:
        wide: Any = copy.deepcopy(dense).double()
        wide.load_state_dict(exact)
        x, dy = check[0].detach().double().requires_grad_(), check[1]
        parameters = dict(wide.named_parameters())
        if computes == "active":
            for name in firsts:
                layer = wide.get_submodule(name)
                nn.utils.parametrize.register_parametrization(layer, "weight", _Times(active[:, None].double()))
                parameters[f"{name}.weight"] = layer.parametrizations.weight.original
        y = wide(x)
        y.backward(dy.double())
        return results((y.detach(), x.grad, *(parameters[name].grad for name in names)))

    def work(computes: Computes) -> Work:
        n = case.active if computes == "active" else d_ff
        passes = {"relu": 7, "gelu": 8, "swiglu": 13}[case.activation]  # over matrices [tokens, n]
        moved = dtype.itemsize * (passes * tokens * n + 6 * tokens * d) + 4 * case.matrices * (2 * n * d + d_ff * d)
        return 6 * case.matrices * tokens * d * n, moved

    made = Problem(case, take, results, expected, work, count)
    made.providers += [
        Provider("dense", step(dense), results, "all"),
        Provider("weight x mask", step(released), results),
        Provider("mode forward", step(specialized("forward")), results, ours=True),
        Provider("mode update", step(specialized("update")), update, "all", ours=True),
    ]
    return made
