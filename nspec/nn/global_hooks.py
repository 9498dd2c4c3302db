"""Hooks of all modules (``torch.nn.modules.module.register_module_forward_hook`` and its like), in no module's own lists.

Code that computes a layer without calling its module would pass them by.
"""

from __future__ import annotations

from torch.nn.modules import module as of_torch


def on_outputs() -> bool:
    """Whether any gets what modules return."""
    return bool(of_torch._global_forward_hooks)


def on_gradients() -> bool:
    """Whether any gets gradients."""
    return bool(of_torch._global_backward_hooks or of_torch._global_backward_pre_hooks)


def anywhere() -> bool:
    """Whether there are any."""
    return on_outputs() or on_gradients() or bool(of_torch._global_forward_pre_hooks)
