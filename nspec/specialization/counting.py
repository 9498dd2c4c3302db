"""Counting in the passes of a model: hooks on the linear layers of each block, there only while a batch runs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.nn import global_hooks
from nspec.nn.task_layers import TaskLayer

from .alignment import Alignment
from .between import Between, Sample
from .feed_forward import FeedForward, is_transposed
from .passes import Pass, Tally, TokenMasks
from .routing import Routing


class Counters(Tally):
    """Adds up, per layer and neuron, the real tokens with a pre-activation above 0.

    That is what fc1 gives, of a gated block the gate projection: ReLU, GELU, SiLU and their like are above 0 exactly where
    it is, in any dtype. Where the activation is ReLU alone, fc1 computes through ``linear_relu_count`` while a batch runs;
    all other layers run as they are (also those with a ``forward`` of their own, as hooks of accelerate, or with hooks that
    may change what they return), and what they returned is counted.

    Args:
        model: holds the blocks.
        blocks: what to count.
    """

    _DTYPE = torch.int64

    def __init__(self, model: nn.Module, blocks: Sequence[FeedForward]) -> None:
        super().__init__(model, blocks)
        self._between = {block.name: Between(block) for block in blocks}
        self._suspect: set[str] = set()  # layers whose every batch is looked at for NaN, value by value

    def totals(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The counts, and the tokens that were counted, since :meth:`start`, in the order of the layers.

        A layer that did not run has counted 0 tokens.

        Raises:
            ValueError: a layer whose fc2 did not get what fc1 gave.
        """
        for block in self._blocks:
            count = self._totals.get(block.name)
            if count is not None and not self._between[block.name].passed and bool(count.any()):
                raise ValueError(
                    f"{block.name}: fc2 did not get the activations of fc1 in task {self._task}, so nothing shows what the "
                    "block computes; choose layers with layers=[...]"
                )
        return super().totals()

    def _run(self, run: Callable[[], Any], masks: TokenMasks, wanted: set[str]) -> _Pass:
        seen = self._once(run, masks, wanted)
        if strange := {layer for layer, total in seen.sums.items() if not math.isfinite(float(total))}:
            # Padding may be anything: look at what is counted, in this batch and from now on.
            self._suspect |= strange
            self._once(run, masks, strange)
        return seen

    def _once(self, run: Callable[[], Any], masks: TokenMasks, wanted: set[str]) -> _Pass:
        seen = _Pass(self._alignment, self._routing, self._between, masks, wanted, self._suspect, self._where())
        with seen.attached(self._blocks), self._routing.attached():
            run()
        return seen


class _Pass(Pass):
    """One run of the model: what its layers count, and what was seen on the way."""

    def __init__(
        self,
        alignment: Alignment,
        routing: Routing,
        between: Mapping[str, Between],
        masks: TokenMasks,
        wanted: set[str],
        suspect: set[str],
        where: str,
    ) -> None:
        super().__init__(alignment, routing, masks, wanted)
        self.sums: dict[str, Tensor] = {}
        self._between, self._suspect, self._where = between, suspect, where
        self._rectified: dict[str, Tensor] = {}
        self._samples: dict[str, Sample] = {}
        self._ups: dict[str, Sample] = {}

    @contextlib.contextmanager
    def attached(self, blocks: Sequence[FeedForward]) -> Iterator[None]:
        """The hooks are on the layers within the block, and gone after it."""
        with contextlib.ExitStack() as hooks:
            for block in blocks:
                if block.name not in self._wanted:
                    continue
                between = self._between[block.name]
                hooked = bool(block.fc1._forward_hooks) or global_hooks.on_outputs()
                if between.relu and not hooked and _is_plain(block.fc1):
                    block.fc1.forward = functools.partial(self._fused, block)
                    hooks.callback(delattr, block.fc1, "forward")
                else:
                    hook = functools.partial(self._returned, block)
                    hooks.callback(block.fc1.register_forward_hook(hook, with_kwargs=True).remove)
                if hooked or not all(_is_plain(layer) or is_transposed(layer) for layer in (block.fc1, block.fc2)):
                    self._suspect.add(block.name)
                if block.up is not None and not between.shown:
                    up = functools.partial(self._up_returned, block.name)
                    hooks.callback(block.up.register_forward_hook(up).remove)
                before = functools.partial(self._before_fc2, block)
                hooks.callback(block.fc2.register_forward_pre_hook(before, with_kwargs=True).remove)
                if block.name not in self._suspect:
                    after = functools.partial(self._after_fc2, block)
                    hooks.callback(block.fc2.register_forward_hook(after).remove)
            yield

    def _fused(self, block: FeedForward, input: Tensor) -> Tensor:
        """In place of fc1: the layer's own ReLU changes nothing of what this returns."""
        weight: Any = block.fc1.weight
        bias: Any = block.fc1.bias
        placed, valid = self._place(block, input)
        if not placed:
            return nn.functional.linear(input, weight, bias)
        h, count = linear_relu_count(input, weight, bias, valid=valid)
        self._add(block, h, valid, count)
        self._rectified[block.name] = h
        return h

    def _returned(
        self, block: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        placed, valid = self._place(block, args[0] if args else next(iter(kwargs.values())))
        if not placed:
            return
        z = output[..., : block.d_ff]
        valid = None if valid is None else valid.to(z.device)
        fired = z > 0 if valid is None else (z > 0) & valid.unsqueeze(-1)
        self._add(block, z, valid, fired.reshape(-1, block.d_ff).sum(0))
        if not self._between[block.name].shown:
            self._samples[block.name] = Sample(z)
            if block.fused:
                self._ups[block.name] = Sample(output[..., block.d_ff :])

    def _up_returned(self, layer: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._ups[layer] = Sample(output)

    def _add(self, block: FeedForward, h: Tensor, valid: Tensor | None, count: Tensor) -> None:
        if block.name in self._suspect:
            counted = torch.relu(h if valid is None else h[valid])  # minus infinity has not fired
            if not bool(torch.isfinite(counted).all()):
                nan, all_values = int(torch.isnan(counted).sum()), counted.numel()
                raise ValueError(
                    f"{block.name}: activations are not finite in {self._where}: of {all_values}, {nan} are NaN and "
                    f"{int(torch.isinf(counted).sum())} infinite. Look at the weights, the inputs and the dtype"
                )
        self._sum(block.name, count, torch.tensor(h[..., 0].numel()) if valid is None else valid.sum())

    def _before_fc2(self, block: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks what comes between the layers; done for good once that could be seen of a value that is not 0."""
        between, layer = self._between[block.name], block.name
        h, z, up = self._rectified.pop(layer, None), self._samples.pop(layer, None), self._ups.pop(layer, None)
        if between.shown or (h is None and z is None):
            return
        got = args[0] if args else next(iter(kwargs.values()))
        if h is not None:
            between.see_rectified(h, got)
        elif z is not None and (up is not None or not block.gated):
            between.see(z, up, got)

    def _after_fc2(self, block: FeedForward, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """NaN and infinity of an activation are in every output of its token: a look at fc2's is a quarter of the work."""
        half = output.dtype in (torch.float16, torch.bfloat16)
        total = output.sum(dtype=torch.float32 if half else None)
        earlier = self.sums.get(block.name)
        self.sums[block.name] = total if earlier is None else earlier + total


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes what ``nn.Linear`` does: its class is that or ours, and so is ``forward``."""
    of_class = type(layer).forward is nn.Linear.forward or isinstance(layer, TaskLayer)
    return of_class and "forward" not in vars(layer)
