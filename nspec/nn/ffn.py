"""The specialised feed-forward pair: fc1 and fc2 of a layer whose code is not touched, computed as one block.

A Transformer layer computes ``fc2(relu(fc1(x)))`` in its own code, with nothing between that changes a value (dropout
of 0). Under a task, fc1 computes the whole compact block at once, hands the result to fc2, and returns a small probe in
place of the activations; the layer's ReLU runs over the probe; fc2 gives the result. The first pass in training and the
first in evaluation check through the probe that what the layer does between the two is ReLU, exactly, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.reference import Packed, forward_packed, pack

from .active import ActiveSet
from .masked_linear import MaskedLinear

_PROBE = 64  # wide enough that dropout of 0.1 goes unseen once in a thousand for a single token


class TaskLinear(MaskedLinear):
    """A masked layer that knows the active sets of several tasks. ``nn.Linear`` modules are turned into it in place."""

    _sets: dict[str, ActiveSet]
    _task: str | None

    def add_tasks(self, masks: dict[str, Tensor]) -> None:
        """Sets the active neurons of each task, bool ``[out_features]``."""
        self._sets = {task: ActiveSet(mask) for task, mask in masks.items()}
        self._task = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._sets)

    @property
    def task(self) -> str | None:
        """The current task; None is dense."""
        return self._task

    def set_task(self, task: str | None) -> None:
        """Switches to the mask of ``task``; None makes the layer dense."""
        self._task = task
        self._use(None if task is None else self._sets[task])


class CompactFc1(TaskLinear):
    """fc1 of a specialised pair in mode ``forward``. Without a task it is an ordinary linear layer."""

    fc2: CompactFc2
    _packed: Packed | None
    _packed_of: tuple[Any, ...]
    _checked: set[bool]

    def pair_with(self, fc2: CompactFc2) -> None:
        """Makes the two a pair. A plain attribute, not a submodule: the state dict must not change."""
        self.__dict__["fc2"] = fc2
        fc2._result, fc2._checking = None, False
        self._packed, self._packed_of, self._checked = None, (), set()

    def _use(self, active: ActiveSet | None) -> None:
        super()._use(active)
        self.__dict__["_packed"] = None

    def forward(self, x: Tensor) -> Tensor:
        """Under a task: runs the block, leaves the result with fc2 and returns a probe ``[..., small]``."""
        fc2 = self.__dict__["fc2"]
        if self._active is None:
            fc2._result = None
            return super().forward(x)
        self.note_use()
        if torch.is_grad_enabled():
            active = self._active.on(self.weight.device)
            y = compact_ffn(x, self.weight, self.bias, fc2.weight, fc2.bias, active.active, index=active.index)
        else:
            y = self._without_grad(x)
        fc2._result = y
        if torch.compiler.is_compiling() or self.training in self._checked:
            fc2._checking = False
            return y.new_zeros((*x.shape[:-1], 1))
        fc2._checking = True
        self._checked.add(self.training)
        return probe(x, y.dtype)

    def _without_grad(self, x: Tensor) -> Tensor:
        """The block with packed weights that are kept between calls: a decoding step is mostly packing otherwise."""
        fc2 = self.__dict__["fc2"]
        assert self._active is not None
        weights = (self.weight, self.bias, fc2.weight, fc2.bias)
        x, w1, b1, w2, b2 = cast_inputs(x, *weights)
        # A version counts in-place changes, a pointer changes with .data; a task switch drops the packed weights too.
        of = tuple((w.data_ptr(), w._version) for w in weights if w is not None) + (x.dtype,)
        if self._packed is None or self._packed_of != of or torch.compiler.is_compiling():
            self._packed = pack(w1, b1, w2, b2, self._active.on(self.weight.device).index[0])
            self._packed_of = of
        y, _ = forward_packed(x.reshape(-1, self.in_features), self._packed)
        return y.view(*x.shape[:-1], fc2.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_packed": None, "_packed_of": ()}


class CompactFc2(nn.Linear):
    """fc2 of a specialised pair in mode ``forward``. Without a task it is an ordinary linear layer."""

    _result: Tensor | None
    _checking: bool

    def forward(self, h: Tensor) -> Tensor:
        """Under a task: the result that fc1 left; else ``h [..., d_ff]`` -> ``[..., out_features]``."""
        if self._result is None:
            return F.linear(h, self.weight, self.bias)
        y, self._result = self._result, None
        if h.shape[:-1] != y.shape[:-1] or h.shape[-1] not in (1, _PROBE):
            raise RuntimeError(
                f"fc2 got an input of shape {list(h.shape)} where fc1 had handed over {list(y.shape[:-1])} tokens: the "
                "layer reshapes or replaces the activations between fc1 and fc2; use mode='update'"
            )
        if self._checking:
            check_probe(h)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"_result": None}


def probe(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., small]``: -1 and 2 in turn, which ReLU turns into 0 and 2."""
    row = torch.tensor([-1.0, 2.0], dtype=dtype, device=x.device).repeat(_PROBE // 2)
    return row.expand(*x.shape[:-1], _PROBE)


def check_probe(h: Tensor) -> None:
    """Raises ValueError unless the probe came through ReLU and nothing else."""
    pairs = h.detach().reshape(-1, 2)
    if not bool((pairs == pairs.new_tensor([0.0, 2.0])).all()):
        bad = pairs[(pairs != pairs.new_tensor([0.0, 2.0])).any(1)][0].tolist()
        raise ValueError(
            f"what the layer does between fc1 and fc2 is not ReLU alone: it turned (-1, 2) into ({bad[0]:g}, {bad[1]:g}). "
            "Mode 'forward' needs ReLU and an activation dropout of 0; set that dropout to 0, or use mode='update'"
        )
