"""Counting in the passes of a model: hooks on fc1 and fc2 of each layer, there only while a batch runs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.nn.ffn import CompactFc2, TaskLinear

from .alignment import Alignment
from .layers import Pair
from .padding import TokenMask

Masks = Mapping[str, "TokenMask | Tensor | None"]
"""For each layer the real tokens; a tensor is in the shape of the activations' leading dimensions. None: all count."""


class Counters:
    """Adds up, per layer and neuron, the real tokens with an activation above 0.

    fc1 of a plain layer computes through ``linear_relu_count`` while a batch runs. Where it has a ``forward`` of its own
    (hooks of accelerate, quantised layers), or hooks that may change what it returns, it runs as it is, and what it
    returned is counted.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._alignment = Alignment()
        self._relu_seen: set[str] = set()
        self._suspect: set[str] = set()  # layers whose every batch is looked at for NaN, value by value
        self._totals: dict[str, Tensor] = {}
        self._task, self._batch = "", 0
        self.leading: dict[str, torch.Size] = {}
        """For each layer the leading dimensions of its activations in the last batch."""

    def start(self, task: str) -> None:
        """Begins a task."""
        self._task, self._batch, self._totals = task, 0, {}

    def count(self, run: Callable[[], None], masks: Masks, alone: Callable[[int, int], None] | None) -> None:
        """Runs a batch and adds up what fires in it.

        Args:
            run: runs the batch.
            masks: the real tokens of each layer.
            alone: called as ``alone(sentence, sentences)``: runs one of so many sentences of the batch; None where nobody
                knows how to cut it out.

        Raises:
            ValueError: a mask that does not fit, or in an order that cannot be told; activations that are not finite; a
                layer with something else than ReLU between fc1 and fc2.
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

    def totals(self) -> dict[str, Tensor]:
        """The counts since :meth:`start`, in the order of the layers.

        Raises:
            ValueError: a layer that did not run, or whose fc2 did not.
        """
        if missing := [pair.name for pair in self._pairs if pair.name not in self._totals]:
            raise ValueError(
                f"the batches of task {self._task} did not run layer {missing[0]}; choose layers with layers=[...]"
            )
        for pair in self._pairs:
            if pair.name not in self._relu_seen and bool(self._totals[pair.name].any()):
                raise ValueError(
                    f"{pair.name}: fc2 did not get the activations of fc1 in task {self._task}, so nothing shows that "
                    "there is ReLU between them; choose layers with layers=[...]"
                )
        return {pair.name: self._totals[pair.name].cpu() for pair in self._pairs}

    def _pass(self, run: Callable[[], None], masks: Masks, wanted: set[str]) -> set[str]:
        """Runs a batch and counts ``wanted`` layers; those whose mask cannot be placed are given back uncounted."""
        seen = _Pass(self._alignment, masks, wanted, self._suspect, self._relu_seen, self._where())
        with seen.attached(self._pairs):
            run()
        if strange := {layer for layer, total in seen.sums.items() if not math.isfinite(float(total))}:
            # Padding may be anything: look at what is counted, in this batch and from now on.
            self._suspect |= strange
            again = _Pass(self._alignment, masks, strange, self._suspect, self._relu_seen, self._where())
            with again.attached(self._pairs):
                run()
        self.leading |= seen.leading
        for layer, count in seen.counts.items():
            if layer not in seen.unsettled:
                self._totals[layer] = count if layer not in self._totals else self._totals[layer] + count
        return seen.unsettled

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
        self, alignment: Alignment, masks: Masks, wanted: set[str], suspect: set[str], relu_seen: set[str], where: str
    ) -> None:
        self.counts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.unsettled: set[str] = set()
        self.leading: dict[str, torch.Size] = {}
        self._alignment, self._masks, self._wanted = alignment, masks, wanted
        self._suspect, self._relu_seen, self._where = suspect, relu_seen, where
        self._last: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def attached(self, pairs: Sequence[Pair]) -> Iterator[None]:
        """The hooks are on the layers within the block, and gone after it."""
        with contextlib.ExitStack() as hooks:
            for pair in pairs:
                if pair.name not in self._wanted:
                    continue
                if _is_plain(pair.fc1, TaskLinear) and not pair.fc1._forward_hooks:
                    pair.fc1.forward = functools.partial(self._fused, pair)  # type: ignore[method-assign]
                    hooks.callback(delattr, pair.fc1, "forward")
                else:
                    hook = functools.partial(self._returned, pair)
                    hooks.callback(pair.fc1.register_forward_hook(hook, with_kwargs=True).remove)
                    self._suspect.add(pair.name)
                if not _is_plain(pair.fc2, CompactFc2):
                    self._suspect.add(pair.name)
                before = functools.partial(self._before_fc2, pair)
                hooks.callback(pair.fc2.register_forward_pre_hook(before, with_kwargs=True).remove)
                if pair.name not in self._suspect:
                    after = functools.partial(self._after_fc2, pair)
                    hooks.callback(pair.fc2.register_forward_hook(after).remove)
            yield

    def _fused(self, pair: Pair, input: Tensor) -> Tensor:
        """In place of fc1: the layer's own ReLU changes nothing of what this returns."""
        placed, valid = self._place(pair, input)
        if not placed:
            return nn.functional.linear(input, pair.fc1.weight, pair.fc1.bias)
        h, count = linear_relu_count(input, pair.fc1.weight, pair.fc1.bias, valid=valid)
        self._add(pair, h, valid, count)
        return h

    def _returned(
        self, pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        placed, valid = self._place(pair, args[0] if args else kwargs["input"])
        if placed:
            h = torch.relu(output)
            valid = None if valid is None else valid.to(h.device)
            fired = h > 0 if valid is None else h[valid] > 0
            self._add(pair, h, valid, fired.reshape(-1, h.shape[-1]).sum(0))

    def _place(self, pair: Pair, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the mask of real tokens can be placed, and where they are in ``x [..., d_in]``; None: everywhere."""
        mask = self._masks[pair.name]
        self.leading[pair.name] = x.shape[:-1]
        if mask is None:
            return True, None
        if isinstance(mask, TokenMask):
            placed = self._alignment.place(pair, x, mask)
            if placed is None:
                self.unsettled.add(pair.name)
            return placed is not None, placed
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{pair.name}: valid gave a mask of shape {list(mask.shape)}, expected that of the leading dimensions of "
                f"the activations, {list(x.shape[:-1])}"
            )
        return True, mask.to(x.device)

    def _add(self, pair: Pair, h: Tensor, valid: Tensor | None, count: Tensor) -> None:
        if pair.name in self._suspect:
            counted = h if valid is None else h[valid]
            if not bool(torch.isfinite(counted).all()):
                nan, all_values = int(torch.isnan(counted).sum()), counted.numel()
                raise ValueError(
                    f"{pair.name}: activations are not finite in {self._where}: of {all_values}, {nan} are NaN and "
                    f"{int(torch.isinf(counted).sum())} infinite. Look at the weights, the inputs and the dtype"
                )
        earlier = self.counts.get(pair.name)
        self.counts[pair.name] = count if earlier is None else earlier + count
        self._last[pair.name] = h

    def _before_fc2(self, pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks that fc2 gets what ReLU makes of fc1; done for good once that could be seen of a value above 0."""
        h = self._last.pop(pair.name, None)
        if h is None or pair.name in self._relu_seen:
            return
        got = args[0] if args else kwargs["input"]
        h = h.to(got.device, got.dtype)
        finite = torch.isfinite(h)  # the others are told of after the pass, by what they make of fc2's output
        if got.shape != h.shape or not torch.equal(got[finite], h[finite]):
            raise ValueError(f"{pair.name}: what the layer does between fc1 and fc2 is not ReLU alone in eval mode")
        if bool((h[finite] > 0).any()):
            self._relu_seen.add(pair.name)

    def _after_fc2(self, pair: Pair, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """NaN and infinity of an activation are in every output of its token: a look at fc2's is a quarter of the work."""
        half = output.dtype in (torch.float16, torch.bfloat16)
        total = output.sum(dtype=torch.float32 if half else None)
        earlier = self.sums.get(pair.name)
        self.sums[pair.name] = total if earlier is None else earlier + total


def _is_plain(layer: nn.Linear, ours: type[nn.Linear]) -> bool:
    """Whether the layer computes as ``nn.Linear`` does, by its own code; ``ours`` does so where no task is set."""
    return "forward" not in vars(layer) and (type(layer).forward is nn.Linear.forward or isinstance(layer, ours))


def _take(taken: dict[str, Tensor], layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    taken[layer] = args[0] if args else kwargs["input"]
