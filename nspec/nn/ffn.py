"""The specialised feed-forward pair: fc1 and fc2 of a layer whose code is not touched, computed as one block.

A Transformer layer computes ``fc2(relu(fc1(x)))`` in its own code. Under a task fc1 returns :class:`Activations`, a value
that stands for its output; the layer's own ReLU marks it; fc2, which stays the plain linear layer that it is, takes it,
and with that the whole compact block is computed at once.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.reference import Packed, forward_packed, pack

from .activations import Activations
from .active import ActiveSet
from .batch import TaskBatch, reorder
from .captured import capturing, keep
from .masked_linear import MaskedLinear, Mode
from .recompute import Use, backward_pass
from .steps import optimizer_steps
from .switched import Shared, TaskSwitched

_STACKS = 16  # sets of several tasks kept for each layer; a training that mixes tasks comes back to the same ones


class TaskState(NamedTuple):
    """What a layer is switched to: a task, or the tasks of a batch, and the backward pass in which it was set."""

    task: str | tuple[str | None, ...] | None
    active: ActiveSet | None
    batch: TaskBatch | None
    set_in: int


class TaskLinear(MaskedLinear, TaskSwitched):
    """A masked layer that knows the active sets of several tasks. ``nn.Linear`` modules are turned into it in place."""

    _sets: dict[str, ActiveSet]
    _stacks: dict[tuple[str | None, ...], ActiveSet]
    _task: str | tuple[str | None, ...] | None
    qualified_name: str

    _shared: Shared
    _routed: bool
    _batch_dim: int | None
    _flattens: bool

    def add_tasks(
        self,
        masks: dict[str, Tensor],
        name: str = "fc1",
        *,
        shared: Shared | None = None,
        first: bool = True,
        routed: bool = False,
        batch_dim: int | None = None,
        flattens: bool = False,
    ) -> None:
        """Sets the active neurons of each task, bool ``[out_features]``.

        Args:
            masks: of each task.
            name: of the layer in its model, for messages.
            shared: what the layers of a model have in common.
            first: whether it is the first of them.
            routed: whether a router chooses the tokens of the layer, so that their sentences are not known.
            batch_dim: the dimension of sentences in the layer's input, where the model says it.
            flattens: whether the model is known to flatten a batch to tokens before the layer.
        """
        self._sets = {task: ActiveSet(mask) for task, mask in masks.items()}
        self._stacks, self._task = {}, None
        self.qualified_name, self._shared, self._first = name, shared or Shared(), first
        self._routed, self._batch_dim, self._flattens = routed, batch_dim, flattens

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._sets)

    def knows(self, task: str | None) -> bool:
        """Whether the layer has a mask of the task. None, with all neurons, may be among the tasks of a batch."""
        return task is None or task in self._sets

    @property
    def decodes_by_task(self) -> bool:
        """In mode ``forward`` alone: in mode ``update`` the forward pass is dense."""
        return self.mode == "forward"

    @property
    def task(self) -> str | tuple[str | None, ...] | None:
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

    def _stack(self, names: tuple[str | None, ...]) -> ActiveSet:
        """The sets of several tasks as one, all neurons for None; the set itself of a single one."""
        if len(names) == 1 and names[0] is not None:
            return self._sets[names[0]]
        stack = self._stacks.get(names)
        if stack is None:
            if len(self._stacks) >= _STACKS:
                del self._stacks[next(iter(self._stacks))]
            sets = [self._every() if name is None else self._sets[name] for name in names]
            if not self.weight.is_meta:  # weights that are offloaded come when the layer runs
                sets = [one.on(self.weight.device) for one in sets]
            self._stacks[names] = stack = ActiveSet.stack(sets)
        return stack

    def _every(self) -> ActiveSet:
        return ActiveSet(torch.ones(self.out_features, dtype=torch.bool, device="cpu"))

    def _begin(self, x: Tensor) -> Use:
        self.check_thread()
        if self._batch is not None:
            self._check_rows(x, self._batch)
        use = super()._begin(x)
        if use[0] is None and not torch.compiler.is_compiling() and self._trains_untold():
            self._shared.told = True
            warnings.warn(
                f"{self.qualified_name} is specialised, and a training pass runs without a task: it is dense, and every "
                "row is trained. Set the task of each batch (with nspec.task(model, name)), or say that the base is meant "
                "(with nspec.task(model, None)). This is said once",
                stacklevel=2,
            )
        return use

    def _check_rows(self, x: Tensor, batch: TaskBatch) -> None:
        """Raises ValueError where the rows of ``x`` do not say which sentence they are of."""
        if self._routed:
            raise ValueError(
                f"{self.qualified_name} is an expert: the tokens that a router sends it do not say which sentence they are "
                "of. Run one task at a time (nspec.task(model, name)), or leave the experts out of the masks"
            )
        if self._batch_dim is not None and x.dim() > 2 and batch.batch_dim != self._batch_dim:
            raise ValueError(
                f"batch_dim is {batch.batch_dim}, and {self.qualified_name} says batch_first={self._batch_dim == 0}: "
                f"expected batch_dim={self._batch_dim}"
            )
        if not self._flattens:
            batch.check_rows(x, self.qualified_name)

    def _trains_untold(self) -> bool:
        """Whether this is a training pass of which nobody has said that it has no task."""
        if self._shared.told or not self.training:
            return False
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        held = self._block is not None and self._block.open
        return trains and not held and backward_pass() < 0

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


class _Kept(NamedTuple):
    """Packed weights, and what they were made of."""

    of: tuple[Any, ...]
    weights: list[weakref.ref[Tensor]]
    packed: list[Packed]


class CompactFc1(TaskLinear):
    """fc1 of a specialised pair in mode ``forward``. Without a task it is an ordinary linear layer."""

    _packed: _Kept | None

    def _attach(self, mode: Mode) -> None:
        super()._attach(mode)
        self._packed = None

    def _use(self, active: ActiveSet | None, batch: TaskBatch | None = None) -> None:
        super()._use(active, batch)
        self.__dict__["_packed"] = None

    def forward(self, x: Tensor) -> Any:
        """Without a task ``[..., d_ff]``; under one :class:`Activations` of that shape, for ReLU and fc2."""
        use = self._begin(x)
        weight = self.note_use(use[0], self.weight)
        if use[0] is None:
            return F.linear(*self._noted(use, x, weight, self.bias))
        if not torch.compiler.is_compiling():
            self._check_hooks()
        return Activations(self, use, (x, weight, self.bias), rectified=False)

    def _check_hooks(self) -> None:
        """What hooks on the layer would miss without a word: they get what stands for the activations, and no gradient."""
        if self._backward_hooks or self._backward_pre_hooks:
            raise ValueError(
                f"{self.qualified_name} has backward hooks, and there is no gradient of its activations under a task in "
                "mode 'forward': take them off, or use mode='update'"
            )
        if self._forward_hooks and not self._shared.hooked:
            self._shared.hooked = True
            warnings.warn(
                f"{self.qualified_name} has forward hooks, which get a value that stands for its activations under a task "
                "in mode 'forward': its shape, dtype and device can be read, all else is an error, and a hook that looks "
                "whether it got a tensor did not. Use mode='update' for activations. This is said once",
                stacklevel=2,
            )

    def block(self, h: Activations, w2: Tensor, b2: Tensor | None) -> Tensor:
        """What fc2 gives for the activations ``h``: ``[..., d_out]``.

        A CUDA graph of a pass without gradients keeps the weights packed before its capture: replays do not see later
        updates of them.

        Args:
            h: what :meth:`forward` returned, after ReLU.
            w2: fc2.weight, ``[d_out, d_ff]``.
            b2: fc2.bias, ``[d_out]`` or None.

        Raises:
            RuntimeError: the two layers are on different devices or sharded apart; or a CUDA graph is being captured, and
                the layer has not run in this way before.
        """
        (active, batch), (x, w1, b1) = h.use, h.inputs
        if not hasattr(self.weight, "placements") == hasattr(w1, "placements") == hasattr(w2, "placements"):
            raise RuntimeError(
                f"{self.qualified_name} and its fc2 are computed as one, and one of their weights is sharded now: apply "
                "fully_shard to the layer that holds both, not to fc1 or fc2 alone"
            )
        if w1.device != w2.device:
            raise RuntimeError(
                f"{self.qualified_name} is on {w1.device} and its fc2 on {w2.device}, and mode 'forward' computes both in "
                "one: put them on one device"
            )
        x, w1, b1, w2, b2 = self._noted(h.use, x, w1, b1, w2, b2)
        if capturing(x.device) and not active.is_on(w1.device):
            _refuse_capture()  # the set is copied from the host
        active = active.on(w1.device)
        keep(x.device, active)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return self._without_grad(x, (w1, b1, w2, b2), active, batch)
        if not torch.compiler.is_compiling():
            self.__dict__["_packed"] = (
                None  # what follows a training pass is an update, and wrappers write weights unseen
            )
        if batch is None:
            return compact_ffn(x, w1, b1, w2, b2, active.active, index=active.index, places=active.places)
        order, inverse, offsets = batch.layout(x)
        tokens = reorder(x.reshape(-1, self.in_features), order, inverse)
        sets = {"index": active.index, "places": active.places}
        y = compact_ffn(tokens, w1, b1, w2, b2, active.active, task_offsets=offsets, **sets)
        return reorder(y, inverse, order).view(*x.shape[:-1], w2.shape[0])

    def _without_grad(
        self, x: Tensor, weights: tuple[Tensor | None, ...], active: ActiveSet, batch: TaskBatch | None
    ) -> Tensor:
        """The block with packed weights that are kept between calls: a decoding step is mostly packing otherwise.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the weights as they are now have not been packed.
        """
        packed = self._packed_weights(x, weights, active)
        keep(x.device, packed)
        tokens = x.reshape(-1, self.in_features).to(packed[0].w1.dtype)
        if batch is None:
            y, _ = forward_packed(tokens, packed[0])
        else:
            order, inverse, _ = batch.layout(x)
            tokens, bounds = reorder(tokens, order, inverse), batch.bounds(x)
            parts = [tokens[start:stop] for start, stop in zip(bounds, bounds[1:])]
            y = torch.cat([forward_packed(part, one)[0] for part, one in zip(parts, packed)])
            y = reorder(y, inverse, order)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _packed_weights(self, x: Tensor, weights: tuple[Tensor | None, ...], active: ActiveSet) -> list[Packed]:
        device, given = x.device.type, [w for w in weights if w is not None]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # A version counts in-place changes, a pointer changes with .data, and fused optimisers tell of themselves alone. A
        # task switch drops the packed weights too.
        versions = (None if w.is_inference() else w._version for w in given)
        of = (active, x.dtype, autocast, optimizer_steps(), *zip((w.data_ptr() for w in given), versions))
        known = None if torch.jit.is_tracing() else self._packed
        if known is not None and known.of == of and all(ref() is w for ref, w in zip(known.weights, given)):
            return known.packed
        if capturing(x.device):
            _refuse_capture()  # packing reads the sizes of the active sets on the host
        _, w1, b1, w2, b2 = cast_inputs(x, *weights)
        packed = [pack(w1, b1, w2, b2, row) for row in active.index]
        # Only parameters last from pass to pass: what a hook makes anew may come to lie where the last one lay.
        lasting = all(isinstance(w, nn.Parameter) and not w.is_inference() for w in given)
        if lasting and "forward" not in self.__dict__ and not torch.jit.is_tracing():
            self.__dict__["_packed"] = _Kept(of, [weakref.ref(w) for w in given], packed)
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_packed": None}


def _refuse_capture() -> NoReturn:
    raise RuntimeError(
        "a CUDA graph is being captured with a layer that has not run with this task and these weights: run it once "
        "before the capture, within the same nspec.task block"
    )
