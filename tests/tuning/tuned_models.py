"""Small models with tuned neurons, for the tests of this folder."""

from __future__ import annotations

import copy
from typing import Any

from small_models import inputs, make
from test_finetune import LLAMA, loss_of, masks_of, near, own
from torch import Tensor, nn

import nspec


def tuned(family: Any = LLAMA, tasks: tuple[str, ...] = ("cy",), **options: Any) -> tuple[Any, Any]:
    base = make(family)
    return base, nspec.finetune(copy.deepcopy(base), masks_of(base, tasks), quiet=True, **options)


def gradients(model: nn.Module, family: Any = LLAMA) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(family, model, inputs(family)).backward()
    return {name: p.grad.clone() for name, p in own(model).items() if p.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(near(a[name], b[name]) for name in a)
