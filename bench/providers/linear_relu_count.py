"""fc1, ReLU and activation counts. The baseline does not count at all: what counting costs is the question."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Provider, Results
from nspec.kernels.linear_relu_count import linear_relu_count


def _relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.relu_(F.linear(x, w, b))


def _fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch._addmm_activation(b, x, w.t())


def _counted(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(F.linear(x, w, b))
    return h, (h > 0).sum(0)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: one product; x, W and h moved once, and the counts."""
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * (tokens * d + d_ff * d)
    sets = [
        (
            shared.noise(tokens, d, device=device).to(dtype),
            shared.noise(d_ff, d, device=device).div_(d**0.5).to(dtype),
            shared.noise(d_ff, device=device).to(dtype),
        )
        for _ in range(shared.input_sets(size + dtype.itemsize * tokens * d_ff))
    ]
    take = lambda number: sets[number % len(sets)]  # CHECK takes the last
    only = lambda h: {"h": h}
    # Of the rounded h that was computed: near 0 a count depends on rounding. That it is its own h's is what must hold.
    both = lambda answer: {"h": answer[0], "surplus of counts": answer[1] - (answer[0] > 0).sum(0)}

    def expected(_: Computes) -> Results:
        with shared.backend("reference"):
            h, counts = linear_relu_count(*(t.double() for t in take(shared.CHECK)))
        return {"h": h, "surplus of counts": torch.zeros_like(counts)}

    made = Problem(
        case,
        [],
        expected,
        lambda _: (2 * tokens * d * d_ff, size + dtype.itemsize * (tokens * d_ff + d_ff) + 8 * d_ff),
        len(sets),
    )
    plain = Provider("relu(linear)", lambda n: _relu(*take(n)), only)
    if device.type == "cuda":
        made.providers.append(Provider("addmm_activation", lambda n: _fused(*take(n)), only))
    made.providers += [plain, Provider("relu(linear), count", lambda n: _counted(*take(n)), both)]
    counting = torch.compile(_counted, dynamic=False)
    shared.compiled(made, Provider("relu(linear), count, compiled", lambda n: counting(*take(n)), both))
    made.providers += shared.ours(linear_relu_count, sets[0], {}, lambda n: linear_relu_count(*take(n)), both)
    return made
