"""fc1, ReLU and activation counts. The baseline does not count at all: what counting costs is the question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.providers import shared
from bench.providers.shared import Computes, Problem, Results
from nspec.kernels.linear_relu_count import linear_relu_count


def _counted(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(F.linear(x, w, b))
    return h, (h > 0).sum(0)


def problem(case: Case, device: torch.device) -> Problem:
    """Least work: one product; x, W and h moved once, and the counts."""
    tokens, d, d_ff, dtype = case.tokens, case.d_model, case.d_ff, getattr(torch, case.dtype)
    size = dtype.itemsize * (tokens * d + d_ff * d)
    draw = lambda *shape, scale=1.0: shared.noise(*shape, device=device).mul_(scale).to(dtype)
    count = shared.input_sets(size + dtype.itemsize * tokens * d_ff)
    sets = [(draw(tokens, d), draw(d_ff, d, scale=d**-0.5), draw(d_ff)) for _ in range(count)]
    take = lambda number: sets[number % count]  # CHECK takes the last

    def results(answer: Any) -> Results:
        """Counts are those of the rounded h that was computed, or an activation near 0 would decide."""
        found = dict(zip(("h", "surplus of counts"), answer))
        return found if len(answer) == 1 else found | {"surplus of counts": answer[1] - (answer[0] > 0).sum(0)}

    def expected(_: Computes) -> Results:
        with shared.backend("reference"):
            h, counts = linear_relu_count(*(t.double() for t in take(shared.CHECK)))
        return {"h": h, "surplus of counts": torch.zeros_like(counts)}

    work = 2 * tokens * d * d_ff, size + dtype.itemsize * (tokens * d_ff + d_ff) + 8 * d_ff
    made = Problem(case, take, results, expected, lambda _: work, count)
    if device.type == "cuda":
        made.add("addmm_activation", lambda x, w, b: (torch._addmm_activation(b, x, w.t()),))
    made.add("relu(linear)", lambda x, w, b: (torch.relu_(F.linear(x, w, b)),))
    made.add("relu(linear), count", _counted)
    made.compiled("relu(linear), count", _counted)
    made.ours(linear_relu_count, linear_relu_count, *sets[0])
    return made
