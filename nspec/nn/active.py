"""One task's active neurons of one layer, in the forms that the operators read, kept on the device of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from nspec.kernels.common.active import active_index


class ActiveSet:
    """An active set: ``active`` bool ``[d_ff]``, ``rows`` int64 ``[n]`` and ``index`` int64 ``[1, width]``.

    Built once per task and layer; moved to a device on first use there, so that a step costs no copy and no sync.
    """

    def __init__(self, active: Tensor) -> None:
        if active.dtype != torch.bool or active.dim() != 1:
            raise TypeError(f"a mask must be bool [neurons], found {active.dtype} {list(active.shape)}")
        self.active = active.detach().clone()
        self.rows = self.active.nonzero().squeeze(1)
        self.index = active_index(self.active)

    def on(self, device: torch.device) -> ActiveSet:
        """This set, with its tensors on ``device``."""
        if self.active.device != device:
            self.active, self.rows, self.index = (t.to(device) for t in (self.active, self.rows, self.index))
        return self
