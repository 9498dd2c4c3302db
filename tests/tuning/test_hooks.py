"""Hooks that users register for all modules of the process get what those of a block get and give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import inputs, output
from test_finetune import LLAMA
from torch import nn
from torch.nn.modules import module as of_all
from tuned_models import gradients, tuned


def _scale(module: nn.Module, args: Any, y: Any) -> Any:
    return y * 2 if isinstance(module, nn.Linear) else None


def _scale_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("kind", ["forward", "always", "pre"])
def test_forward_hooks_of_all_modules_are_called(kind: str) -> None:
    base, model = tuned()
    given = inputs(LLAMA)
    handle = (
        of_all.register_module_forward_pre_hook(_scale_input)
        if kind == "pre"
        else of_all.register_module_forward_hook(_scale, always_call=kind == "always")
    )
    try:
        assert torch.equal(output(LLAMA, model, given), output(LLAMA, base, given))
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*backward hook:UserWarning")
@pytest.mark.parametrize("register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_backward_hooks_of_all_modules_are_called(register: str) -> None:
    _, model = tuned()
    wanted = gradients(model)
    names = {module: name for name, module in model.named_modules()}
    seen: set[str] = set()
    handle = getattr(of_all, register)(lambda module, *_: seen.add(names.get(module, "")))
    try:
        found = gradients(model)
    finally:
        handle.remove()
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-12) for name in wanted)
    parts = ("gate_proj", "up_proj", "act_fn", "down_proj")
    assert seen >= {f"model.layers.{layer}.mlp.{part}" for layer in range(3) for part in parts}
