"""Autocast for custom operators, which autocast itself cannot see into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast_inputs(*tensors: Tensor | None) -> Any:
    """The tensors in the dtype that ``torch.nn.functional.linear`` would compute in.

    Inside an autocast region, floating tensors go to its dtype, differentiably (float64 stays, as in PyTorch). Outside
    it, they are returned as they are.

    Raises:
        TypeError: the dtypes differ where no autocast is on; the message lists them.
    """
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    given = [t for t in tensors if t is not None]
    if torch.is_autocast_enabled(device):
        if all(t.dtype == torch.float64 for t in given):
            return tensors
        dtype = torch.get_autocast_dtype(device)
        return tuple(t if t is None else t.to(dtype) for t in tensors)
    if len({t.dtype for t in given}) > 1:
        raise TypeError(
            f"inputs have dtypes {[str(t.dtype) for t in given]}, expected one dtype (or an autocast region)"
        )
    return tensors
