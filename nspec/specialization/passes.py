"""Running the batches of a model and adding up, per layer and neuron, what its real tokens give."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .alignment import Alignment
from .feed_forward import FeedForward
from .padding import TokenMask
from .routing import Routing

TokenMasks = Mapping[str, "TokenMask | Tensor | None"]
"""For each layer the real tokens; a tensor is in the shape of the activations' leading dimensions. None: all count."""


class Tally:
    """Adds up what a batch gives, in the layers whose real tokens could be told; the others are tried once more.

    Subclasses say what is added up, in :meth:`_run`.

    Args:
        model: holds the blocks.
        blocks: what to look at.
    """

    _DTYPE: ClassVar[torch.dtype]
    """Of the sums."""

    def __init__(self, model: nn.Module, blocks: Sequence[FeedForward]) -> None:
        self._blocks = blocks
        self._alignment, self._routing = Alignment(), Routing(model, blocks)
        self._tokens: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._task, self._batch = "", 0
        self.leading: dict[str, torch.Size] = {}
        """For each layer the leading dimensions of its activations in the last batch."""

    def start(self, task: str) -> None:
        """Begins a task."""
        self._task, self._batch, self._totals, self._tokens = task, 0, {}, {}

    def count(self, run: Callable[[], Any], masks: TokenMasks, alone: Callable[[int, int], None] | None) -> None:
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
        unsettled = self._pass(run, masks, {block.name for block in self._blocks})
        if unsettled:
            try:
                self._run_alone(unsettled, masks, alone)
                unsettled = self._pass(run, masks, unsettled)
            finally:
                self._alignment.alone = {}
            if unsettled:
                raise self._cannot_tell(unsettled, masks)

    def totals(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The sums, and the tokens that they are of, since :meth:`start`, in the order of the layers.

        A layer that did not run has 0 tokens.
        """
        sums = {
            block.name: self._totals[block.name].cpu()
            if block.name in self._totals
            else torch.zeros(block.d_ff, dtype=self._DTYPE)
            for block in self._blocks
        }
        return sums, {name: int(self._tokens.get(name, 0)) for name in sums}

    def did_not_run(self) -> list[str]:
        """The layers that got nothing since :meth:`start`, but for experts, to which nothing may have been sent."""
        names = [block.name for block in self._blocks]
        return [name for name in names if name not in self._totals and name not in self._routing]

    def _run(self, run: Callable[[], Any], masks: TokenMasks, wanted: set[str]) -> Pass:
        """Runs a batch and looks at the layers ``wanted``."""
        raise NotImplementedError

    def _pass(self, run: Callable[[], Any], masks: TokenMasks, wanted: set[str]) -> set[str]:
        """Runs a batch and adds up ``wanted`` layers; those whose mask cannot be placed are given back without."""
        seen = self._run(run, masks, wanted)
        self.leading |= seen.leading
        for layer, value in seen.values.items():
            if layer not in seen.unsettled:
                self._totals[layer] = value if layer not in self._totals else self._totals[layer] + value
                self._tokens[layer] = self._tokens.get(layer, 0) + seen.tokens[layer]
        return seen.unsettled

    def _where(self) -> str:
        return f"batch {self._batch} of task {self._task}"

    def _run_alone(self, layers: set[str], masks: TokenMasks, alone: Callable[[int, int], None] | None) -> None:
        """Runs one sentence by itself: its rows show in which order a layer has those of the batch."""
        mask = masks[min(layers)]
        assert isinstance(mask, TokenMask)
        if alone is None or not mask.batch_first:
            raise self._cannot_tell(layers, masks)
        self._alignment.sentence = int(mask.real.sum(1).argmax())
        with contextlib.ExitStack() as hooks:
            for block in self._blocks:
                if block.name in layers:
                    take = functools.partial(_take, self._alignment.alone, block.name)
                    hooks.callback(block.fc1.register_forward_pre_hook(take, with_kwargs=True).remove)
            try:
                alone(self._alignment.sentence, len(mask.real))
            except Exception as error:  # of the model: its batches cannot be cut into sentences
                raise self._cannot_tell(layers, masks) from error

    def _cannot_tell(self, layers: set[str], masks: TokenMasks) -> ValueError:
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


class Pass:
    """One run of the model: what its layers give, and which of their tokens are real.

    Attributes:
        values: for each layer the sum over its real tokens, ``[d_ff]``.
        tokens: their number.
        unsettled: layers whose mask cannot be placed.
        leading: for each layer the leading dimensions of its activations.
    """

    def __init__(self, alignment: Alignment, routing: Routing, masks: TokenMasks, wanted: set[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.unsettled: set[str] = set()
        self.leading: dict[str, torch.Size] = {}
        self._alignment, self._routing = alignment, routing
        self._masks, self._wanted = masks, wanted

    def _sum(self, layer: str, value: Tensor, tokens: Tensor) -> None:
        """Adds what a layer gave for so many real tokens; a layer may be called several times in a pass."""
        first = layer not in self.values
        self.values[layer] = value if first else self.values[layer] + value
        self.tokens[layer] = tokens if first else self.tokens[layer] + tokens.to(self.tokens[layer].device)

    def _place(self, block: FeedForward, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the mask of real tokens can be placed, and where they are in ``x [..., d_in]``; None: everywhere."""
        mask = self._masks[block.name]
        self.leading[block.name] = x.shape[:-1]
        if mask is None:
            return True, None
        lay = functools.partial(self._lay, block, mask)
        if block.name in self._routing:
            placed, valid = self._routing.place(block, x, lay)
        else:
            valid = lay(x)
            placed = valid is not None
        if not placed:
            self.unsettled.add(block.name)
        return placed, valid

    def _lay(self, block: FeedForward, mask: TokenMask | Tensor, x: Tensor) -> Tensor | None:
        """The mask in the shape of the leading dimensions of ``x``; None where their order cannot be told."""
        if isinstance(mask, TokenMask):
            return self._alignment.place(block, x, mask)
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{block.name}: valid gave a mask of shape {list(mask.shape)}, expected that of the leading dimensions of "
                f"the activations, {list(x.shape[:-1])}"
            )
        return mask.to(x.device)


def _take(taken: dict[str, Tensor], layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    taken[layer] = args[0] if args else kwargs["input"]
