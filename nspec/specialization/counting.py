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
from nspec.nn.task_layers import TaskLayer

from .alignment import Alignment
from .between import Between, Sample
from .feed_forward import FeedForward, is_transposed
from .padding import TokenMask
from .routing import Routing

Masks = Mapping[str, "TokenMask | Tensor | None"]
"""For each layer the real tokens; a tensor is in the shape of the activations' leading dimensions. None: all count."""


class Counters:
    """Adds up, per layer and neuron, the real tokens with a pre-activation above 0.

    That is what fc1 gives, of a gated block the gate projection: ReLU, GELU, SiLU and their like are above 0 exactly where
    it is, in any dtype. Where the activation is ReLU alone, fc1 computes through ``linear_relu_count`` while a batch runs;
    all other layers run as they are (also those with a ``forward`` of their own, as hooks of accelerate, or with hooks that
    may change what they return), and what they returned is counted.

    Args:
        model: holds the blocks.
        blocks: what to count.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[FeedForward]) -> None:
        self._pairs = blocks
        self._alignment, self._routing = Alignment(), Routing(model, blocks)
        self._between = {block.name: Between(block) for block in blocks}
        self._suspect: set[str] = set()  # layers whose every batch is looked at for NaN, value by value
        self._tokens: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._task, self._batch = "", 0
        self.leading: dict[str, torch.Size] = {}
        """For each layer the leading dimensions of its activations in the last batch."""

    def start(self, task: str) -> None:
        """Begins a task."""
        self._task, self._batch, self._totals, self._tokens = task, 0, {}, {}

    def count(self, run: Callable[[], None], masks: Masks, alone: Callable[[int, int], None] | None) -> None:
        """Runs a batch and adds up what fires in it.

        Args:
            run: runs the batch.
            masks: the real tokens of each layer.
            alone: called as ``alone(sentence, sentences)``: runs one of so many sentences of the batch; None where nobody
                knows how to cut it out.

        Raises:
            ValueError: a mask that does not fit, or in an order that cannot be told; tokens of an expert of which nobody
                knows whether they are padding; activations that are not finite; a block in which something else than an
                activation function comes before fc2.
        """
        self._batch += 1
        unsettled = self._pass(run, masks, {pair.name for pair in self._pairs})
        if unsettled:
            try:
                self._run_alone(unsettled, masks, alone)
                unsettled = self._pass(run, masks, unsettled)
            finally:
                self._alignment.alone = {}
            if unsettled:
                raise self._cannot_tell(unsettled, masks)

    def totals(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The counts, and the tokens that were counted, since :meth:`start`, in the order of the layers.

        A layer that did not run has counted 0 tokens.

        Raises:
            ValueError: a layer whose fc2 did not get what fc1 gave.
        """
        for pair in self._pairs:
            count = self._totals.get(pair.name)
            if count is not None and not self._between[pair.name].passed and bool(count.any()):
                raise ValueError(
                    f"{pair.name}: fc2 did not get the activations of fc1 in task {self._task}, so nothing shows what the "
                    "block computes; choose layers with layers=[...]"
                )
        counts = {
            pair.name: self._totals[pair.name].cpu() if pair.name in self._totals else torch.zeros(pair.d_ff).long()
            for pair in self._pairs
        }
        return counts, {name: int(self._tokens.get(name, 0)) for name in counts}

    def did_not_run(self) -> list[str]:
        """The layers that got nothing since :meth:`start`, but for experts, to which nothing may have been sent."""
        names = [pair.name for pair in self._pairs]
        return [name for name in names if name not in self._totals and name not in self._routing]

    def _pass(self, run: Callable[[], None], masks: Masks, wanted: set[str]) -> set[str]:
        """Runs a batch and counts ``wanted`` layers; those whose mask cannot be placed are given back uncounted."""
        seen = self._run(run, masks, wanted)
        if strange := {layer for layer, total in seen.sums.items() if not math.isfinite(float(total))}:
            # Padding may be anything: look at what is counted, in this batch and from now on.
            self._suspect |= strange
            self._run(run, masks, strange)
        self.leading |= seen.leading
        for layer, count in seen.counts.items():
            if layer not in seen.unsettled:
                self._totals[layer] = count if layer not in self._totals else self._totals[layer] + count
                self._tokens[layer] = self._tokens.get(layer, 0) + seen.tokens[layer]
        return seen.unsettled

    def _run(self, run: Callable[[], None], masks: Masks, wanted: set[str]) -> _Pass:
        seen = _Pass(self._alignment, self._routing, self._between, masks, wanted, self._suspect, self._where())
        with seen.attached(self._pairs), self._routing.attached():
            run()
        return seen

    def _where(self) -> str:
        return f"batch {self._batch} of task {self._task}"

    def _run_alone(self, layers: set[str], masks: Masks, alone: Callable[[int, int], None] | None) -> None:
        """Runs one sentence by itself: its rows show in which order a layer has those of the batch."""
        mask = masks[min(layers)]
        assert isinstance(mask, TokenMask)
        if alone is None or not mask.batch_first:
            raise self._cannot_tell(layers, masks)
        self._alignment.sentence = int(mask.real.sum(1).argmax())
        with contextlib.ExitStack() as hooks:
            for pair in self._pairs:
                if pair.name in layers:
                    take = functools.partial(_take, self._alignment.alone, pair.name)
                    hooks.callback(pair.fc1.register_forward_pre_hook(take, with_kwargs=True).remove)
            try:
                alone(self._alignment.sentence, len(mask.real))
            except Exception as error:  # of the model: its batches cannot be cut into sentences
                raise self._cannot_tell(layers, masks) from error

    def _cannot_tell(self, layers: set[str], masks: Masks) -> ValueError:
        layer = min(layers)
        mask = masks[layer]
        assert isinstance(mask, TokenMask)
        leading, way_out = list(self.leading.get(layer, ())), ""
        if len(leading) > 1:
            way_out = ", or batches with another number of sentences than tokens in each, one such batch first"
        return ValueError(
            f"{layer}: {mask.name} gives a mask of shape {list(mask.real.shape)}, the activations have {leading}, and in "
            f"which order those are cannot be told in {self._where()}: give valid={way_out}"
        )


class _Pass:
    """One run of the model: what its layers count, and what was seen on the way."""

    def __init__(
        self,
        alignment: Alignment,
        routing: Routing,
        between: Mapping[str, Between],
        masks: Masks,
        wanted: set[str],
        suspect: set[str],
        where: str,
    ) -> None:
        self.counts: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.unsettled: set[str] = set()
        self.leading: dict[str, torch.Size] = {}
        self._alignment, self._routing, self._between = alignment, routing, between
        self._masks, self._wanted, self._suspect, self._where = masks, wanted, suspect, where
        self._rectified: dict[str, Tensor] = {}
        self._samples: dict[str, Sample] = {}
        self._ups: dict[str, Sample] = {}

    @contextlib.contextmanager
    def attached(self, pairs: Sequence[FeedForward]) -> Iterator[None]:
        """The hooks are on the layers within the block, and gone after it."""
        with contextlib.ExitStack() as hooks:
            for pair in pairs:
                if pair.name not in self._wanted:
                    continue
                between = self._between[pair.name]
                hooked = bool(pair.fc1._forward_hooks)
                if between.relu and not hooked and _is_plain(pair.fc1):
                    pair.fc1.forward = functools.partial(self._fused, pair)
                    hooks.callback(delattr, pair.fc1, "forward")
                else:
                    hook = functools.partial(self._returned, pair)
                    hooks.callback(pair.fc1.register_forward_hook(hook, with_kwargs=True).remove)
                if hooked or not all(_is_plain(layer) or is_transposed(layer) for layer in (pair.fc1, pair.fc2)):
                    self._suspect.add(pair.name)
                if pair.up is not None and not between.shown:
                    up = functools.partial(self._up_returned, pair.name)
                    hooks.callback(pair.up.register_forward_hook(up).remove)
                before = functools.partial(self._before_fc2, pair)
                hooks.callback(pair.fc2.register_forward_pre_hook(before, with_kwargs=True).remove)
                if pair.name not in self._suspect:
                    after = functools.partial(self._after_fc2, pair)
                    hooks.callback(pair.fc2.register_forward_hook(after).remove)
            yield

    def _fused(self, pair: FeedForward, input: Tensor) -> Tensor:
        """In place of fc1: the layer's own ReLU changes nothing of what this returns."""
        weight: Any = pair.fc1.weight
        bias: Any = pair.fc1.bias
        placed, valid = self._place(pair, input)
        if not placed:
            return nn.functional.linear(input, weight, bias)
        h, count = linear_relu_count(input, weight, bias, valid=valid)
        self._add(pair, h, valid, count)
        self._rectified[pair.name] = h
        return h

    def _returned(
        self, pair: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        placed, valid = self._place(pair, args[0] if args else next(iter(kwargs.values())))
        if not placed:
            return
        z = output[..., : pair.d_ff]
        valid = None if valid is None else valid.to(z.device)
        fired = z > 0 if valid is None else (z > 0) & valid.unsqueeze(-1)
        self._add(pair, z, valid, fired.reshape(-1, pair.d_ff).sum(0))
        if not self._between[pair.name].shown:
            self._samples[pair.name] = Sample(z)
            if pair.fused:
                self._ups[pair.name] = Sample(output[..., pair.d_ff :])

    def _up_returned(self, layer: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._ups[layer] = Sample(output)

    def _place(self, pair: FeedForward, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the mask of real tokens can be placed, and where they are in ``x [..., d_in]``; None: everywhere."""
        mask = self._masks[pair.name]
        self.leading[pair.name] = x.shape[:-1]
        if mask is None:
            return True, None
        lay = functools.partial(self._lay, pair, mask)
        if pair.name in self._routing:
            placed, valid = self._routing.place(pair, x, lay)
        else:
            valid = lay(x)
            placed = valid is not None
        if not placed:
            self.unsettled.add(pair.name)
        return placed, valid

    def _lay(self, pair: FeedForward, mask: TokenMask | Tensor, x: Tensor) -> Tensor | None:
        """The mask in the shape of the leading dimensions of ``x``; None where their order cannot be told."""
        if isinstance(mask, TokenMask):
            return self._alignment.place(pair, x, mask)
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{pair.name}: valid gave a mask of shape {list(mask.shape)}, expected that of the leading dimensions of "
                f"the activations, {list(x.shape[:-1])}"
            )
        return mask.to(x.device)

    def _add(self, pair: FeedForward, h: Tensor, valid: Tensor | None, count: Tensor) -> None:
        if pair.name in self._suspect:
            counted = torch.relu(h if valid is None else h[valid])  # minus infinity has not fired
            if not bool(torch.isfinite(counted).all()):
                nan, all_values = int(torch.isnan(counted).sum()), counted.numel()
                raise ValueError(
                    f"{pair.name}: activations are not finite in {self._where}: of {all_values}, {nan} are NaN and "
                    f"{int(torch.isinf(counted).sum())} infinite. Look at the weights, the inputs and the dtype"
                )
        tokens = torch.tensor(h[..., 0].numel()) if valid is None else valid.sum()
        first = pair.name not in self.counts
        self.counts[pair.name] = count if first else self.counts[pair.name] + count
        self.tokens[pair.name] = tokens if first else self.tokens[pair.name] + tokens.to(self.tokens[pair.name].device)

    def _before_fc2(self, pair: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks what comes between the layers; done for good once that could be seen of a value that is not 0."""
        between, layer = self._between[pair.name], pair.name
        h, z, up = self._rectified.pop(layer, None), self._samples.pop(layer, None), self._ups.pop(layer, None)
        if between.shown or (h is None and z is None):
            return
        got = args[0] if args else next(iter(kwargs.values()))
        if h is not None:
            between.see_rectified(h, got)
        elif z is not None and (up is not None or not pair.gated):
            between.see(z, up, got)

    def _after_fc2(self, pair: FeedForward, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """NaN and infinity of an activation are in every output of its token: a look at fc2's is a quarter of the work."""
        half = output.dtype in (torch.float16, torch.bfloat16)
        total = output.sum(dtype=torch.float32 if half else None)
        earlier = self.sums.get(pair.name)
        self.sums[pair.name] = total if earlier is None else earlier + total


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes what ``nn.Linear`` does: its class is that or ours, and so is ``forward``."""
    of_class = type(layer).forward is nn.Linear.forward or isinstance(layer, TaskLayer)
    return of_class and "forward" not in vars(layer)


def _take(taken: dict[str, Tensor], layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    taken[layer] = args[0] if args else kwargs["input"]
