"""The specialised feed-forward pair: fc1 and fc2 of a layer whose code is not touched, computed as one block.

A Transformer layer computes ``fc2(relu(fc1(x)))`` in its own code, with nothing between that changes a value (dropout
of 0). Under a task, fc1 computes the whole compact block at once, hands the result to fc2, and returns a small probe in
place of the activations; the layer's ReLU runs over the probe; fc2 gives the result. The first pass in training and the
first in evaluation check through the probe that what the layer does between the two is ReLU, exactly, and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.reference import Packed, forward_packed, pack

from .active import ActiveSet
from .batch import TaskBatch, reorder
from .captured import capturing, keep
from .masked_linear import MaskedLinear
from .recompute import backward_pass
from .switched import TaskSwitched

_STACKS = 16  # sets of several tasks kept for each layer; a training that mixes tasks comes back to the same ones
_PROBE = 64  # wide enough that dropout of 0.1 goes unseen once in a thousand for a single token


class TaskState(NamedTuple):
    """What a layer is switched to: a task, or the tasks of a batch, and the backward pass in which it was set."""

    task: str | tuple[str, ...] | None
    active: ActiveSet | None
    batch: TaskBatch | None
    set_in: int


class TaskLinear(MaskedLinear, TaskSwitched):
    """A masked layer that knows the active sets of several tasks. ``nn.Linear`` modules are turned into it in place."""

    _sets: dict[str, ActiveSet]
    _stacks: dict[tuple[str, ...], ActiveSet]
    _task: str | tuple[str, ...] | None

    def add_tasks(self, masks: dict[str, Tensor]) -> None:
        """Sets the active neurons of each task, bool ``[out_features]``."""
        self._sets = {task: ActiveSet(mask) for task, mask in masks.items()}
        self._stacks, self._task = {}, None

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._sets)

    @property
    def decodes_by_task(self) -> bool:
        """In mode ``forward`` alone: in mode ``update`` the forward pass is dense."""
        return self.mode == "forward"

    @property
    def task(self) -> str | tuple[str, ...] | None:
        """The current task, or the task of each sentence of a batch; None is dense."""
        return self._task

    def set_task(self, task: str | TaskBatch | None) -> None:
        """Switches to the mask of a task, or of each task of a batch; None makes the layer dense."""
        if isinstance(task, TaskBatch):
            self._task = task.tasks
            self._use(self._stack(task.names), task)
        else:
            self._task = task
            self._use(None if task is None else self._sets[task])

    def _stack(self, names: tuple[str, ...]) -> ActiveSet:
        """The sets of several tasks as one; the set itself of a single one."""
        if len(names) == 1:
            return self._sets[names[0]]
        if names not in self._stacks:
            if len(self._stacks) >= _STACKS:
                del self._stacks[next(iter(self._stacks))]
            self._stacks[names] = ActiveSet.stack([self._sets[name].on(self.weight.device) for name in names])
        return self._stacks[names]

    def state(self) -> TaskState:
        """What the layer is switched to, for :meth:`restore`."""
        return TaskState(self._task, self._active, self._batch, self._set_in)

    def restore(self, state: TaskState) -> None:
        """Switches back to an earlier state."""
        self._task = state.task
        self._use(state.active, state.batch)
        self._set_in = state.set_in

    def again(self, state: TaskState) -> TaskState:
        """The same, set in the backward pass that is running."""
        return state._replace(set_in=backward_pass())


class CompactFc1(TaskLinear):
    """fc1 of a specialised pair in mode ``forward``. Without a task it is an ordinary linear layer."""

    fc2: CompactFc2
    _packed: list[Packed] | None
    _packed_of: tuple[Any, ...]
    _checked: set[bool]

    def pair_with(self, fc2: CompactFc2) -> None:
        """Makes the two a pair. A plain attribute, not a submodule: the state dict must not change."""
        self.__dict__["fc2"] = fc2
        fc2._result, fc2._checking = None, False
        self._packed, self._packed_of, self._checked = None, (), set()

    def _use(self, active: ActiveSet | None, batch: TaskBatch | None = None) -> None:
        super()._use(active, batch)
        self._forget_packed()

    def _forget_packed(self) -> None:
        self.__dict__["_packed"], self.__dict__["_packed_of"] = None, ()

    def forward(self, x: Tensor) -> Tensor:
        """Under a task: runs the block, leaves the result with fc2 and returns a probe ``[..., small]``.

        A CUDA graph of a pass without gradients keeps the weights packed before its capture: replays do not see later
        updates of them.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the layer has not run in this way before.
        """
        fc2 = self.__dict__["fc2"]
        (active, batch), x, w1, b1, w2, b2 = self._begin(x, self.weight, self.bias, fc2.weight, fc2.bias)
        if active is None:
            fc2._result = None
            return F.linear(x, w1, b1)
        if hasattr(w2, "placements") and not hasattr(w1, "placements"):
            raise RuntimeError(
                "fc1 computes with the weights of fc2, which are sharded apart from its own: apply fully_shard to the "
                "layer that holds both, not to fc1 or fc2 alone"
            )
        if w1.device != w2.device:
            raise RuntimeError(
                f"fc1 is on {w1.device} and fc2 on {w2.device}, and mode 'forward' computes both in one: put them on one "
                "device, and use DistributedDataParallel instead of nn.DataParallel, whose replicas lose the pair"
            )
        active = active.on(w1.device)
        keep(x.device, active)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            y = self._with_grad(x, (w1, b1, w2, b2), active, batch)
        else:
            y = self._without_grad(x, active, batch)
        fc2._result = y
        if torch.compiler.is_compiling() or self.training in self._checked:
            fc2._checking = False
            return y.new_zeros((*x.shape[:-1], 1))
        _refuse_capture(x.device)  # the check reads the probe on the host
        fc2._checking = True
        self._checked.add(self.training)
        return probe(x, y.dtype)

    def _with_grad(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        active: ActiveSet,
        batch: TaskBatch | None,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self._forget_packed()  # what follows a training pass is an update, and wrappers write weights unseen
        if batch is None:
            return compact_ffn(x, *weights, active.active, index=active.index)
        order, inverse, offsets = batch.layout(x)
        tokens = reorder(x.reshape(-1, self.in_features), order, inverse)
        y = compact_ffn(tokens, *weights, active.active, task_offsets=offsets, index=active.index)
        return reorder(y, inverse, order).view(*x.shape[:-1], -1)

    def _without_grad(self, x: Tensor, active: ActiveSet, batch: TaskBatch | None) -> Tensor:
        """The block with packed weights that are kept between calls: a decoding step is mostly packing otherwise.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the weights as they are now have not been packed.
        """
        fc2 = self.__dict__["fc2"]
        weights = (self.weight, self.bias, fc2.weight, fc2.bias)
        x, w1, b1, w2, b2 = cast_inputs(x, *weights)
        # A version counts in-place changes, a pointer changes with .data; a task switch drops the packed weights too.
        of = (active, *((w.data_ptr(), w._version) for w in weights if w is not None), x.dtype)
        if self._packed is None or self._packed_of != of:
            _refuse_capture(x.device)  # packing reads the sizes of the active sets on the host
            self._packed = [pack(w1, b1, w2, b2, row) for row in active.index]
            self._packed_of = of
        keep(x.device, self._packed)
        tokens = x.reshape(-1, self.in_features)
        if batch is None:
            y, _ = forward_packed(tokens, self._packed[0])
        else:
            order, inverse, _ = batch.layout(x)
            tokens, bounds = reorder(tokens, order, inverse), batch.bounds(x)
            parts = [tokens[start:stop] for start, stop in zip(bounds, bounds[1:])]
            y = torch.cat([forward_packed(part, packed)[0] for part, packed in zip(parts, self._packed)])
            y = reorder(y, inverse, order)
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


def _refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError if a CUDA graph is being captured."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured with a layer that has not run with this task and these weights: run it once "
            "before the capture, within the same nspec.task block"
        )


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
