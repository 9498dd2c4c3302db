"""The specialised feed-forward block: the layers of a block whose code is not touched, over the active neurons alone.

A Transformer layer computes ``fc2(f(fc1(x)))`` or ``fc2(f(gate(x)) * up(x))`` in its own code. Under a task fc1, and up
beside it, return :class:`Activations`, a value that stands for their output; the layer's own functions work on it; fc2,
which stays the layer that it is, takes it. Where the function is ReLU the whole block is computed at once there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.reference import Packed, forward_packed, pack

from . import global_hooks
from .activations import Activations, GateAndUp
from .active import ActiveSet
from .batch import TaskBatch, reorder
from .captured import capturing, keep
from .packed import pack_first, pack_second, refuse_capture
from .state import SwitchedTo
from .task_layers import TaskLayer, TaskLinear, TransposedFeatures


class CompactLayer(TaskLayer):
    """fc1 or up of a specialised block in mode ``forward``. Without a task it is the layer that it was."""

    @property
    def silent(self) -> bool:
        """Whether a neuron that is not active gives nothing, not its constant."""
        return self._nspec.silent

    def switch(self, to: SwitchedTo) -> None:
        """See :meth:`Masked.switch`."""
        super().switch(to)
        self._nspec.packed.clear()

    def forward(self, x: Tensor) -> Any:
        """Without a task ``[..., d_ff]``; under one :class:`Activations` of that shape, for the activation and fc2."""
        use = self._begin(x)
        if use[0] is None:
            return self._dense(use, x)
        weight, bias = self.note_use(use[0], self.weight), self.bias
        if not torch.compiler.is_compiling():
            self._check_hooks()
        if self.transposed:
            weight = weight.t()
        bias = _unwritten(bias)
        if not self.gated:
            uncounted = _is_uncounted(weight)
            value = Activations(self, use, (_unwritten(x), weight if uncounted else _unwritten(weight), bias), False)
            if uncounted:
                value.compute()
            return value
        if not self._nspec.doubled:
            value = Activations(self, use, (x, weight, bias), rectified=False)
            value.compute()
            return value
        biases = (None, None) if bias is None else bias.unflatten(0, (2, -1)).unbind()
        halves = [
            Activations(self, use, (x, half, b), False)
            for half, b in zip(weight.unflatten(0, (2, -1)).unbind(), biases)
        ]
        for value in halves:
            value.compute()
        return GateAndUp(*halves)

    def _check_hooks(self) -> None:
        """What hooks on the layer would miss without a word: they get what stands for the activations, and no gradient."""
        if self._backward_hooks or self._backward_pre_hooks or global_hooks.on_gradients():
            whose = "" if self._backward_hooks or self._backward_pre_hooks else ", those of all modules"
            raise ValueError(
                f"{self.qualified_name} has backward hooks{whose}, and there is no gradient of its activations under a "
                "task in mode 'forward': take them off, or use mode='update'"
            )
        if not self._nspec.shared.hooked and (self._forward_hooks or global_hooks.on_outputs()):
            self._nspec.shared.hooked = True
            warnings.warn(
                f"{self.qualified_name} has forward hooks, which get a value that stands for its activations under a task "
                "in mode 'forward': its shape, dtype and device can be read, all else is an error, and a hook that looks "
                "whether it got a tensor did not. Use mode='update' for activations. This is said once",
                stacklevel=2,
            )

    def pre_activations(self, h: Activations) -> tuple[Tensor, Tensor | float]:
        """What the layer gives, before any activation: the active columns, and the others' constants, their biases.

        Returns:
            ``[..., width]`` in the layout of the index of the set (``[tokens, width]``, sorted by task, of several tasks),
            and ``[d_ff]``, or 0 without a bias or where the others are silent.

        Raises:
            RuntimeError: the layer is sharded; or a CUDA graph is being captured, and the layer has not run in this way.
        """
        (active, batch), (x, w, b) = h.use, h.inputs
        self._check_whole(w)
        x, w, b = self._nspec.note(h.use, x, w, b)
        active = self._on_device(active, x, w)
        order, inverse, offsets = (None, None, None) if batch is None else batch.layout(x)
        tokens = x if batch is None else reorder(x.reshape(-1, x.shape[-1]), order, inverse)
        if self._computes_anew():
            sets = {"index": active.index, "places": active.places}
            z = compact_fc1(tokens, w, b, active.active, task_offsets=offsets, **sets)
        else:
            packed = self._pack("first", x, (w, b), active, pack_first)
            z = _by_task(tokens, packed, batch, x, lambda part, one: F.linear(part, *one))
        if batch is None and h.lead != x.shape[:-1]:
            z = z.view(*h.lead, z.shape[-1])
        given = None if self.silent else h.inputs[2]
        return z, 0.0 if given is None else given if given.dtype == z.dtype else given.to(z.dtype)

    def _check_whole(self, *weights: Tensor) -> None:
        own = _is_sharded(self.weight)
        for weight in weights:
            if _is_sharded(weight) == own:
                continue
            raise RuntimeError(
                f"{self.qualified_name} and its fc2 are computed as one, and one of their weights is sharded now: apply "
                "fully_shard to the layer that holds both, not to fc1 or fc2 alone"
            )

    def _on_device(self, active: ActiveSet, x: Tensor, weight: Tensor) -> ActiveSet:
        if capturing(x.device) and not active.is_on(weight.device):
            refuse_capture()  # the set is copied from the host
        active = active.on(weight.device)
        keep(x.device, active)
        return active

    def block(self, h: Activations, w2: Tensor, b2: Tensor | None) -> Tensor:
        """What fc2 gives for the activations ``h``: ``[..., d_out]``.

        A CUDA graph of a pass without gradients keeps the weights packed before its capture: replays do not see later
        updates of them.

        Args:
            h: what :meth:`forward` returned, after the activation.
            w2: fc2.weight, ``[d_out, d_ff]``.
            b2: fc2.bias, ``[d_out]`` or None.

        Raises:
            RuntimeError: the two layers are on different devices or sharded apart; or a CUDA graph is being captured, and
                the layer has not run in this way before.
        """
        (active, batch), (x, w1, b1) = h.use, h.inputs
        self._check_whole(w1, w2)
        if w1.device != w2.device:
            raise RuntimeError(
                f"{self.qualified_name} is on {w1.device} and its fc2 on {w2.device}, and mode 'forward' computes both in "
                "one: put them on one device"
            )
        if self.silent or h.active is not None or not h.rectified:
            return self._second(h, w2, b2)
        h.check()
        x, w1, b1, w2, b2 = self._nspec.note(h.use, x, w1, b1, w2, b2)
        active = self._on_device(active, x, w1)
        if not self._computes_anew():
            y = self._without_grad(x, (w1, b1, w2, b2), active, batch)
        elif batch is None:
            y = compact_ffn(x, w1, b1, w2, b2, active.active, index=active.index, places=active.places)
        else:
            order, inverse, offsets = batch.layout(x)
            tokens = reorder(x.reshape(-1, x.shape[-1]), order, inverse)
            sets = {"index": active.index, "places": active.places}
            y = compact_ffn(tokens, w1, b1, w2, b2, active.active, task_offsets=offsets, **sets)
            y = reorder(y, inverse, order)
        return y if y.shape[:-1] == h.lead else y.view(*h.lead, w2.shape[0])

    def _second(self, h: Activations, w2: Tensor, b2: Tensor | None) -> Tensor:
        """fc2 of activations that are computed."""
        computed, (active, batch), x = h.compute(), h.use, h.inputs[0]
        active = self._on_device(active, x, w2)
        constant: Tensor | None = None
        if self.silent:
            pass  # whatever the functions between made of the 0 that stands for them
        elif isinstance(h.constant, Tensor):
            constant = h.constant.to(computed.device, computed.dtype)
        elif h.constant != 0:
            constant = computed.new_full((), h.constant)
        order, inverse, offsets = (None, None, None) if batch is None else batch.layout(x)
        y: Tensor
        if self._computes_anew():
            kept = {"index": active.index, "places": active.places}
            y = compact_fc2(computed, constant, w2, b2, active.active, task_offsets=offsets, **kept)
        else:
            sets = active.active if active.active.dim() == 2 else active.active[None]
            added = [b2] * len(sets) if constant is None else [_constant(constant, w2, b2, one) for one in sets]
            packed = list(zip(self._pack("second", computed, (w2,), active, pack_second), added))
            y = _by_task(computed, packed, batch, x, lambda part, one: F.linear(part, *one))
        return y if batch is None else reorder(y, inverse, order).view(*h.lead, w2.shape[0])

    def _computes_anew(self) -> bool:
        """Whether the weights of this pass are not to be kept packed: it has gradients, or is compiled."""
        if torch.compiler.is_compiling():
            return True
        if torch.is_grad_enabled():
            self._nspec.packed.clear()  # what follows a training pass is an update, and wrappers write weights unseen
            return True
        return False

    def _without_grad(
        self, x: Tensor, weights: tuple[Tensor | None, ...], active: ActiveSet, batch: TaskBatch | None
    ) -> Tensor:
        """The block with packed weights that are kept between calls: a decoding step is mostly packing otherwise.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the weights as they are now have not been packed.
        """
        packed: list[Packed] = self._pack("block", x, weights, active, pack)
        tokens = x.reshape(-1, x.shape[-1]).to(packed[0].w1.dtype)
        order, inverse, _ = (None, None, None) if batch is None else batch.layout(x)
        y = _by_task(reorder(tokens, order, inverse), packed, batch, x, lambda part, one: forward_packed(part, one)[0])
        return reorder(y, inverse, order)

    def _pack(
        self, purpose: str, x: Tensor, weights: tuple[Tensor | None, ...], active: ActiveSet, make: Callable[..., Any]
    ) -> list[Any]:
        return self._nspec.packed.of(purpose, x, weights, active, make, "forward" not in self.__dict__)


class CompactFc1(CompactLayer, TaskLinear):
    """A linear layer of that kind."""


class CompactConv1D(TransposedFeatures, CompactLayer):
    """The same of a ``Conv1D``, a linear layer with the weight transposed."""


def _is_sharded(weight: Tensor) -> bool:
    return type(weight) is not nn.Parameter and hasattr(weight, "placements")


def _is_uncounted(tensor: Tensor) -> bool:
    """Whether PyTorch does not count how often it is written to."""
    return not torch.compiler.is_compiling() and tensor.is_inference()


def _unwritten(tensor: Any) -> Any:
    """What the tensor holds now, also for a block that is computed after it was written to.

    Where writes are counted, :meth:`Value.check` finds them. Elsewhere it is copied; Inductor takes needless copies out.
    """
    copied = tensor is not None and (torch.compiler.is_compiling() or _is_uncounted(tensor))
    return tensor.clone() if copied else tensor


def _by_task(
    tokens: Tensor, packed: list[Any], batch: TaskBatch | None, x: Tensor, compute: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """``compute`` of the tokens of each task, which are sorted, with its weights; of all of them for one task."""
    if batch is None:
        return compute(tokens, packed[0])
    bounds = batch.bounds(x)
    return torch.cat([compute(tokens[start:stop], one) for start, stop, one in zip(bounds, bounds[1:], packed)])


def _constant(constant: Tensor, w2: Tensor, b2: Tensor | None, active: Tensor) -> Tensor:
    """What the neurons that are not active add to fc2, with its bias: ``[d_out]``."""
    added = w2.to(constant.dtype) @ constant.masked_fill(active, 0).expand(w2.shape[1])
    return added if b2 is None else added + b2.to(added.dtype)
