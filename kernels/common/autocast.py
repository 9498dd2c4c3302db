"""Autocast for custom operators, which autocast itself cannot see into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that ``torch.nn.functional.linear`` would compute in: autocast's within its region (float64 stays).

    Raises:
        TypeError: the dtypes differ where no autocast is on; the message lists them.
    """
    given = [t for t in tensors if t is not None]
    dtype, device = given[0].dtype, given[0].device.type
    same = all(t.dtype == dtype for t in given)
    if torch.is_autocast_enabled(device):
        return dtype if same and dtype == torch.float64 else torch.get_autocast_dtype(device)
    if not same:
        raise TypeError(
            f"inputs have dtypes {[str(t.dtype) for t in given]}, expected one dtype (or an autocast region)"
        )
    return dtype


def cast_inputs(*tensors: Tensor | None) -> Any:
    """The tensors in their :func:`compute_dtype`, differentiably."""
    dtype = compute_dtype(*tensors)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)
