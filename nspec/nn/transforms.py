"""``torch.func``: whether code runs under one of its transforms (grad, jvp, vmap), and how to step out of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` runs this code; False while a graph is compiled."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def outside_transforms() -> AbstractContextManager[Any]:
    """Within, tensors are ordinary ones: they may be written to and kept."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context
