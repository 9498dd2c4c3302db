"""Hooks of all modules (``torch.nn.modules.module.register_module_forward_hook`` and its like), in no module's own lists.

Code that computes a layer without calling its module would pass them by. Those of PyTorch's ``FlopCounterMode`` only note
which module runs, and are not counted: it would measure something else than what is computed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.modules import module as of_torch

_COUNTS = "torch.utils.module_tracker"


def on_outputs() -> bool:
    """Whether any gets what modules return."""
    return _any(of_torch._global_forward_hooks)


def on_gradients() -> bool:
    """Whether any gets gradients."""
    return _any(of_torch._global_backward_hooks) or _any(of_torch._global_backward_pre_hooks)


def anywhere() -> bool:
    """Whether there are any."""
    return on_outputs() or on_gradients() or _any(of_torch._global_forward_pre_hooks)


def _any(hooks: Mapping[int, Any]) -> bool:
    return bool(hooks) and any(getattr(hook, "__module__", None) != _COUNTS for hook in hooks.values())
