"""A feed-forward block as a model has it: modules, forward and backward, 16 bits by autocast as mixed precision trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nspec
from bench.cases import Case
from bench.providers.problem import (
    CHECK,
    Computes,
    Problem,
    Provider,
    Results,
    input_sets,
    noise,
    random_sets,
    small_integers,
)
from nspec.nn.masked_linear import Mode

Call = Callable[[int], tuple[Tensor | None, ...]]


class _MaskedWeight(nn.Linear):
    """The authors' release: the mask times the weight in each forward pass."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: as of compact_ffn; mode `update` saves one product of six. Weights and gradients are float32."""
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    dense = nn.Sequential(nn.Linear(d, d_ff), nn.ReLU(), nn.Linear(d_ff, d)).to(device)
    active = random_sets(1, d_ff, case.active, device)[0]
    masks = nspec.NeuronMasks({"task": {"0": active.cpu()}})
    count = input_sets(8 * tokens * (d + d_ff))
    inputs = [
        (noise(tokens, d, device=device).requires_grad_(), noise(tokens, d, device=device).to(dtype))
        for _ in range(count)
    ]
    check = [small_integers(tokens, d, device=device, dtype=kind) for kind in (torch.float32, dtype)]
    check[0].requires_grad_()
    kept = {name: p.detach().clone() for name, p in dense.named_parameters()}
    exact = {name: small_integers(*p.shape, device=device, dtype=p.dtype) for name, p in kept.items()}
    exact["0.bias"] += 0.5
    results = lambda answer: dict(zip(("y", "dx", *(f"gradient of {n}" for n, _ in dense.named_parameters())), answer))

    def step(model: nn.Module) -> Call:
        parameters = list(model.parameters())

        def call(number: int) -> tuple[Tensor | None, ...]:
            if number != CHECK:
                return compute(*inputs[number % count])
            model.load_state_dict(exact, strict=False)
            try:
                return compute(*check)
            finally:
                model.load_state_dict(kept, strict=False)

        def compute(x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
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

    def release() -> nn.Module:
        model = copy.deepcopy(dense)
        first = _MaskedWeight(d, d_ff, device=device)
        first.load_state_dict(model[0].state_dict())
        first.register_buffer("mask", active[:, None].expand(d_ff, d).clone())  # one byte a weight, as theirs
        return nn.Sequential(first, *list(model)[1:])

    def expected(computes: Computes) -> Results:
        wide: Any = copy.deepcopy(dense).double()
        wide.load_state_dict(exact)
        x, dy = check[0].detach().double().requires_grad_(), check[1]
        if computes == "active":
            nn.utils.parametrize.register_parametrization(wide[0], "weight", _Times(active[:, None].double()))
        y = wide(x)
        y.backward(dy.double())
        weights = [wide[0].bias.grad, wide[2].weight.grad, wide[2].bias.grad]
        first = wide[0].parametrizations.weight.original.grad if computes == "active" else wide[0].weight.grad
        return results((y.detach(), x.grad, first, *weights))

    def work(computes: Computes) -> tuple[int, int]:
        n = case.active if computes == "active" else d_ff
        moved = dtype.itemsize * (7 * tokens * n + 6 * tokens * d) + 4 * (4 * n * d + 2 * d_ff * d)
        return 12 * tokens * d * n, moved

    made = Problem(
        case,
        [
            Provider("dense", step(dense), results, computes="all"),
            Provider("weight x mask", step(release()), results),
        ],
        expected,
        work,
        count,
    )
    made.providers.append(Provider("mode forward", step(specialized("forward")), results, ours=True))
    made.providers.append(
        # Forward as dense; of the gradients all but that of fc1.weight are dense's, which the other providers hold.
        Provider("mode update", step(specialized("update")), lambda a: _update(results(a), active), "all", ours=True)
    )
    return made


class _Times(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _update(found: Results, active: Tensor) -> Results:
    """The results of mode ``update`` that equal the dense ones; that inactive rows have no gradient is asserted here."""
    rows = found.pop("gradient of 0.weight")[~active]
    if rows.any():
        raise AssertionError(f"mode update: {int(rows.any(1).sum())} inactive rows have a gradient")
    return found
