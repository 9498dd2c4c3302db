"""How many optimiser steps this process has made: fused optimisers write into weights without raising their versions."""

from __future__ import annotations

import itertools
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_count = itertools.count(1)
_steps = 0


def optimizer_steps() -> int:
    """The number of steps of any ``torch.optim`` optimiser since this module was loaded."""
    return _steps


def _note(*_: Any) -> None:
    global _steps
    _steps = next(_count)


register_optimizer_step_post_hook(_note)
