"""Gradient surgery between the directions of an update: PCGrad and Gradient Vaccine.

Each direction of an update has a gradient g_i, the sum over its micro-batches, in the units of the whole update, so that
their sum is the gradient of plain training. Both methods change g_i by adding multiples of the others, one after another
in random order, and then take the sum:

- PCGrad (Yu et al., Gradient Surgery for Multi-Task Learning, 2020): where g_i' g_j < 0, g_i' loses its part along g_j, so
  that the two are orthogonal.
- Gradient Vaccine (Wang et al., 2021): where cos(g_i', g_j) is below a target, g_i' gets as much of g_j as brings the
  cosine there. The target of two directions is a moving average of their cosines, 0 at the start.

All of it happens among the inner products of the g_i, T x T for T directions: the gradients themselves are read once to
get these, and once for the weighted sum.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nspec.mt.training.config import SurgeryConfig

Floats = npt.NDArray[np.float64]

_PARTS = {"pcgrad": "model", "gradvac": "layer"}  # what the papers take
_MOST = 1 - 1e-6  # cosine of a target: at 1 two gradients would have to be parallel
_LAYER = re.compile(r".*\.layers\.\d+")


def part_of(parameter: str, parts: str) -> str:
    """The part of the model that a parameter belongs to.

    Args:
        parameter: its qualified name, such as ``model.encoder.layers.0.fc1.weight``.
        parts: ``model``, ``side``, ``layer`` or ``tensor``; what is in no layer is a part by its module.
    """
    if parts == "side":
        return next((side for side in ("encoder", "decoder") if side in parameter.split(".")), "rest")
    if parts == "layer":
        found = _LAYER.match(parameter)
        return found[0] if found else parameter.rpartition(".")[0]
    return parameter if parts == "tensor" else "model"


def pcgrad(gram: Floats, orders: Sequence[Sequence[int]]) -> Floats:
    """The gradients that PCGrad makes of those of T directions, as multiples of these.

    Args:
        gram: float64 [parts, T, T], inner products of the gradients in each part of the model.
        orders: for each direction, the others in the order in which it is compared with them.

    Returns:
        float64 [parts, T, T]: row i has what the new g_i takes of each gradient.
    """
    made = np.tile(np.eye(gram.shape[1]), (len(gram), 1, 1))
    for i, order in enumerate(orders):
        for j in order:
            dot = np.einsum("pt,pt->p", made[:, i], gram[:, :, j])
            conflict = dot < 0
            made[conflict, i, j] -= dot[conflict] / gram[conflict, j, j]
    return made


def gradvac(gram: Floats, orders: Sequence[Sequence[int]], targets: Floats, beta: float) -> Floats:
    """The same for Gradient Vaccine; ``targets`` move on in place.

    Args:
        gram: as for :func:`pcgrad`.
        orders: likewise.
        targets: float64 [parts, T, T], the cosine that direction i is to have with j at least.
        beta: weight of the present cosine in the next target.

    Returns:
        As :func:`pcgrad`.
    """
    made = np.tile(np.eye(gram.shape[1]), (len(gram), 1, 1))
    for i, order in enumerate(orders):
        for j in order:
            own, other = made[:, i], np.sqrt(gram[:, j, j])
            dot = np.einsum("pt,pt->p", own, gram[:, :, j])
            length = np.sqrt(np.maximum(np.einsum("pt,ptu,pu->p", own, gram, own), 0))
            there = (length > 0) & (other > 0)  # a part that a direction has no gradient in has no angle
            cosine = np.clip(dot[there] / (length[there] * other[there]), -1, 1)
            wanted = np.minimum(targets[there, i, j], _MOST)
            more = length[there] * (wanted * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - wanted**2))
            more /= other[there] * np.sqrt(1 - wanted**2)
            made[there, i, j] += np.where(wanted > cosine, more, 0)
            targets[there, i, j] = (1 - beta) * targets[there, i, j] + beta * cosine
    return made


class Surgery:
    """The surgery of one training. Its targets stand in checkpoints; the orders follow from seed and update.

    Args:
        rule: ``pcgrad`` or ``gradvac``.
        options: of the surgery.
        model: whose gradients it takes and changes.
        tasks: the directions of the training.
        seed: of the orders.
    """

    def __init__(self, rule: str, options: SurgeryConfig, model: nn.Module, tasks: Sequence[str], seed: int) -> None:
        self.rule, self.beta, self.tasks, self.seed = rule, options.beta, list(tasks), seed
        parts = _PARTS[rule] if options.parts == "auto" else options.parts
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        names = [part_of(name, parts) for name, _ in trained]
        self.parts = list(dict.fromkeys(names))
        self.parameters = [(p, self.parts.index(name)) for (_, p), name in zip(trained, names)]
        self.targets = np.zeros((len(self.parts), len(tasks), len(tasks)))
        self.taken: dict[str, list[Tensor | None]] = {}

    def take(self, task: str) -> None:
        """Takes the gradient that stands on the model as that of a direction, and leaves none there."""
        self.taken[task] = [parameter.grad for parameter, _ in self.parameters]
        for parameter, _ in self.parameters:
            parameter.grad = None

    def put(self, update: int) -> None:
        """Puts the sum of the changed gradients of all directions taken onto the model; none is taken then.

        Args:
            update: the number of updates done, which the orders depend on.
        """
        taken, self.taken = self.taken, {}
        weights = np.ones((len(self.parts), len(taken)))
        if len(taken) > 1:
            weights = self._made(list(taken), self._gram(list(taken.values())), update).sum(1)
        for number, (parameter, part) in enumerate(self.parameters):
            total: Tensor | None = None
            for gradients, weight in zip(taken.values(), weights[part].tolist()):
                if (gradient := gradients[number]) is not None:
                    total = gradient.mul_(weight) if total is None else total.add_(gradient, alpha=weight)
            parameter.grad = total

    def _gram(self, gradients: Sequence[Sequence[Tensor | None]]) -> Floats:
        products = torch.zeros(len(self.parts), len(gradients), len(gradients), dtype=torch.float64)
        for number, (parameter, part) in enumerate(self.parameters):
            rows = [torch.zeros_like(parameter) if each[number] is None else each[number] for each in gradients]
            flat = torch.stack([row.detach().float().flatten() for row in rows if row is not None])
            products[part] += (flat @ flat.T).double().cpu()
        return products.numpy()

    def _made(self, tasks: list[str], gram: Floats, update: int) -> Floats:
        key = np.random.SeedSequence([self.seed, zlib.crc32(b"surgery"), update])
        draws = np.random.Generator(np.random.Philox(key)).random((len(tasks), len(tasks)))
        orders = [[j for j in np.argsort(row, kind="stable").tolist() if j != i] for i, row in enumerate(draws)]
        if not np.isfinite(gram).all():  # the loop says so; targets must not take it in
            return np.tile(np.eye(len(tasks)), (len(self.parts), 1, 1))
        if self.rule == "pcgrad":
            return pcgrad(gram, orders)
        mine = np.ix_(range(len(self.parts)), *[[self.tasks.index(task) for task in tasks]] * 2)
        targets = self.targets[mine]
        made = gradvac(gram, orders, targets, self.beta)
        self.targets[mine] = targets
        return made

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs."""
        return {"targets": torch.from_numpy(self.targets.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another surgery of the same training was."""
        self.targets = state["targets"].numpy().copy()
