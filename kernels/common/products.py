"""Which matrix products on compact operands the library (cuBLAS, hipBLASLt) computes, and which a kernel of our own.

Once the active columns are packed, every product of ``compact_ffn`` and ``row_sparse_wgrad`` is a plain one, and the
library is hard to beat at those. A kernel of our own saves a pass over the result where something follows the product,
and takes many tasks in one launch.

NOT YET MEASURED. To set a line, time both ways in one process over d_model 512, 1024, 2048, densities 0.3, 0.5, 0.7 and
4096 to 16384 tokens: ``python -m bench.operators`` with the line set to NEVER and to ONE_TASK, and, for several tasks,
HOST.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = "never"  # always our kernel
ONE_TASK = "one task"  # the library for one task, our kernel for several
HOST = "host"  # the library for one task, and in a loop over several where their offsets are on the CPU

#: h = relu(x W1[A]ᵀ + b1) and dh = (dy W2[:, A]) ⊙ [h > 0] end in something that the library would need a pass for; the
#: others do not.
LIBRARY = {"h": NEVER, "y": ONE_TASK, "dh": NEVER, "dx": ONE_TASK, "dw": ONE_TASK}
#: Full float32 has no tensor cores: our kernel runs at a part of the library's speed there, and what is saved after the
#: product, or by one launch in place of one for each task, is small beside it.
LIBRARY_FLOAT32 = dict.fromkeys(LIBRARY, HOST)


def by_library(product: str, dtype: torch.dtype, task_offsets: Tensor | None) -> bool:
    """Whether the library computes ``product`` (a key of ``LIBRARY``) for operands of ``dtype`` and these tasks."""
    if product == "dw" and dtype != torch.float32 and torch.version.hip is not None:
        return False  # mm_float32 needs a product with an output of another dtype, which CUDA alone has
    way = (LIBRARY_FLOAT32 if dtype == torch.float32 else LIBRARY)[product]
    if task_offsets is None or task_offsets.shape[0] == 2:
        return way != NEVER
    return way == HOST and task_offsets.device.type == "cpu"


class Ways(NamedTuple):
    """:func:`by_library` of every product of a call."""

    h: bool
    y: bool
    dh: bool
    dx: bool
    dw: bool


def ways(dtype: torch.dtype, task_offsets: Tensor | None) -> Ways:
    """How the products of a call are computed, for the key of its plan."""
    return Ways(*[by_library(product, dtype, task_offsets) for product in Ways._fields])


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, summed in float32, whatever the dtype of ``a`` and ``b``."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
