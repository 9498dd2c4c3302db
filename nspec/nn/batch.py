"""Batches whose sentences are of several tasks: which token belongs to which task, and the order in which they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .active import let_sizes_vary
from .captured import capturing, keep
from .transforms import in_transform

_LAYOUTS = 8  # input shapes remembered for a batch: encoder, decoder and a decoding step are three


class Layout(NamedTuple):
    """How the tokens of one input are sorted by task.

    Attributes:
        order: int64 ``[tokens]``, the flattened input's tokens in the order of the tasks; None where they stand so.
        inverse: the permutation that undoes it.
        offsets: int64 ``[tasks + 1]``, on the CPU: the tokens of task t are ``offsets[t]:offsets[t + 1]`` of the sorted
            ones. In the capture of a CUDA graph on the device, since a copy from the CPU cannot be captured.
    """

    order: Tensor | None
    inverse: Tensor | None
    offsets: Tensor


class TaskBatch:
    """The task of each sentence of a batch; all layers of a model share one.

    Sentences are sorted by task, stably, in the order in which the tasks first appear.

    Args:
        tasks: of each sentence, a name; or None, where the layers know it in a batch.
        batch_dim: the dimension of a layer's input along which sentences lie. There may be ``n * k`` rows for n
            sentences: those of a sentence follow one another (beams, or a batch flattened to tokens). None: that which
            a layer knows of itself, else 0.
        flattened: whether the rows of a matrix are the tokens of the batch, equally many of each sentence.

    Attributes:
        tasks: the same.
        names: the distinct tasks, in the order in which they appear.
        single: whether there is one only.
        given: whether ``batch_dim`` was.
    """

    def __init__(self, tasks: Sequence[Any], batch_dim: int | None = None, flattened: bool = False) -> None:
        self.tasks, self.batch_dim, self.flattened = tuple(tasks), batch_dim or 0, flattened
        self.given = batch_dim is not None
        self._along: dict[int, TaskBatch] = {}
        self.names = tuple(dict.fromkeys(self.tasks))
        self.single = len(self.names) == 1
        numbers = {name: number for number, name in enumerate(self.names)}
        with torch.inference_mode(False):  # validation may be the first to need it, and training saves it
            of_sentence = torch.tensor([numbers[task] for task in self.tasks])
            self._sorted = bool((of_sentence.diff() >= 0).all())
            self._order = torch.sort(of_sentence, stable=True).indices
            counts = torch.bincount(of_sentence, minlength=len(self.names))
            self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        let_sizes_vary((self._order, (0,)), (self._starts, (0,)))
        self._layouts: dict[Any, tuple[Layout, Tensor | None]] = {}
        self._shapes: set[tuple[int, ...]] = (
            set()
        )  # leading shapes of the layers' inputs, where they are more than rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskBatch) and (self.tasks, self.batch_dim) == (other.tasks, other.batch_dim)

    def __hash__(self) -> int:
        return hash((self.tasks, self.batch_dim))

    def along(self, dim: int | None) -> TaskBatch:
        """The batch for a layer whose sentences lie along ``dim`` (None: nothing says it); itself where that was given."""
        if self.given or dim is None or dim == self.batch_dim:
            return self
        if dim not in self._along:
            other = TaskBatch(self.tasks, dim, self.flattened)
            other.given, other._shapes = False, self._shapes
            self._along[dim] = other
        return self._along[dim]

    def check(self, x: Tensor, layer: str = "the layer") -> int:
        """Tokens of each sentence in the input ``x [..., d_in]`` of a layer, which is named in errors.

        Raises:
            ValueError: ``x`` has no dimension ``batch_dim`` before its last, or its rows there are not ``n * k``.
        """
        if self.batch_dim >= x.dim() - 1:
            raise ValueError(
                f"batch_dim is {self.batch_dim}, but the input of {layer} has shape {list(x.shape)}: expected a dimension "
                "before the last"
            )
        sentences, rows = self._order.shape[0], x.shape[self.batch_dim]
        if rows % sentences:
            raise ValueError(
                f"the input of {layer} has {rows} rows along dimension {self.batch_dim}, expected a multiple of the "
                f"{sentences} sentences whose tasks were given; models that keep time first need batch_dim=1"
            )
        tokens = rows // sentences
        for dim, size in enumerate(x.shape[:-1]):
            if dim != self.batch_dim:
                tokens = tokens * size
        return tokens

    def check_rows(self, x: Tensor, layer: str) -> None:
        """Whether the rows of a layer's input can be those of the sentences, as far as the inputs of others show it.

        Raises:
            ValueError: ``x`` is a matrix with neither a row for each sentence nor, as far as known, the tokens of the
                batch.
        """
        sentences, compiling = self._order.shape[0], torch.compiler.is_compiling()  # no number that compiled code fixes
        if x.dim() == 2:
            tokens = x.shape[0]
            known = {sentences} if compiling else {math.prod(shape) for shape in self._shapes} or {sentences}
            if not self.flattened and tokens not in known and tokens > 0:
                raise ValueError(
                    f"{layer} gets {tokens} tokens in one dimension, for {sentences} sentences, and nothing says which "
                    "sentence each is of (a router may have chosen them, or padding is left out). Give flattened=True if "
                    "they are the whole batch, equally many of each sentence; else run one task at a time, or leave the "
                    "layer out of the masks"
                )
        elif not compiling:
            self._shapes.add(tuple(x.shape[:-1]))

    def check_dimension(self, x: Tensor, layer: str, settled: set[str]) -> None:
        """Whether sentences lie along dimension 0 of the input ``x [..., d_in]`` of a layer of which nothing says it.

        A second dimension with no multiple of the sentences rules out time first, and so for every later input of the
        layer. Not for compiled code, where each answer would cost a graph.

        Args:
            x: of three dimensions or more.
            layer: its name.
            settled: the layers of which it is known; this one is added where ``x`` shows it.

        Raises:
            ValueError: they may lie along dimension 1 as well.
        """
        if self.single or not x.numel() or layer in settled:
            return
        sentences, (rows, second) = self._order.shape[0], x.shape[:2]
        if second % sentences:
            settled.add(layer)
        elif rows != sentences or second == sentences:
            raise ValueError(
                f"{layer} gets an input of shape {list(x.shape)} for {sentences} sentences, which may lie along dimension "
                "0 (several rows each, as beams) or, where the layer keeps time first, along dimension 1: say which with "
                "batch_dim=0 or batch_dim=1, as in nspec.task(model, tasks, batch_dim=0)"
            )

    def layout(self, x: Tensor) -> Layout:
        """The order of the tokens of ``x [..., d_in]`` by task, on its device. Computed once per shape.

        Raises:
            ValueError: see :meth:`check`.
            RuntimeError: a CUDA graph is being captured, and this shape has not been seen before.
        """
        tokens = self.check(x)
        if torch.compiler.is_compiling():
            return self._sort(x, tokens)
        key = (x.shape[:-1], x.device)
        known = self._layouts.get(key)
        if known is None:
            if capturing(x.device):
                raise RuntimeError(
                    "a CUDA graph is being captured with a list of tasks that the model has not run with: run it once "
                    "before the capture, within the same nspec.task block"
                )
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            with torch.inference_mode(False):
                layout = self._sort(x, tokens)
                on_device = layout.offsets.to(x.device, non_blocking=True) if x.is_cuda else None
            self._layouts[key] = known = layout, on_device
        layout, on_device = known
        if capturing(x.device):
            assert on_device is not None
            keep(x.device, layout, on_device)
            return layout._replace(offsets=on_device)
        return layout

    def bounds(self, x: Tensor) -> list[int]:
        """The offsets of :meth:`layout` as numbers."""
        tokens = self.check(x)
        return [start * tokens for start in self._starts.tolist()]

    def _sort(self, x: Tensor, tokens: int) -> Layout:
        offsets = self._starts * tokens
        if self._sorted and (self.batch_dim == 0 or math.prod(x.shape[: self.batch_dim]) == 1):
            return Layout(None, None, offsets)
        if self._order.device != x.device:
            self._order = self._order.to(x.device, non_blocking=True)
        places = torch.arange(x.numel() // x.shape[-1], device=x.device)
        by_sentence = places.view(x.shape[:-1]).movedim(self.batch_dim, 0).reshape(self._order.shape[0], tokens)
        order = by_sentence.index_select(0, self._order).reshape(-1)
        return Layout(order, torch.empty_like(order).scatter_(0, order, places), offsets)


def check_sentences(x: Tensor, batch: TaskBatch, layer: Any) -> None:
    """Raises ValueError where the rows of a layer's input ``x`` do not say which sentence they are of.

    Args:
        x: ``[..., d_in]``.
        batch: of several tasks.
        layer: its state: ``name``, ``routed``, ``batch_dim``, ``flattens`` and ``shared``.
    """
    name, dim = layer.name, layer.batch_dim
    if layer.routed:
        raise ValueError(
            f"{name} is an expert: the tokens that a router sends it do not say which sentence they are "
            "of. Run one task at a time (nspec.task(model, name)), or leave the experts out of the masks"
        )
    if dim is not None and x.dim() > 2 and batch.batch_dim != dim:
        raise ValueError(
            f"batch_dim is {batch.batch_dim}, and {name} says batch_first={dim == 0}: expected batch_dim={dim}, or none, "
            "with which each layer takes its own"
        )
    batch.check(x, name)
    if not layer.flattens:
        batch.check_rows(x, name)
    if not torch.compiler.is_compiling() and x.dim() > 2 and dim is None and not batch.given:
        batch.check_dimension(x, name, layer.shared.sentences_first)


class _Reorder(torch.autograd.Function):
    """Rows in another order. Its gradient is the inverse permutation, not a sum with atomics."""

    # With a setup_context apart PyTorch would look up the signature of forward in each call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(dy, inverse, order), None, None


def reorder(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """``x[order]`` along dimension 0, differentiably; ``x`` itself without an order."""
    if order is None or inverse is None:
        return x
    if in_transform():
        return x.index_select(0, order)  # whose derivatives torch.func knows
    y: Tensor = _Reorder.apply(x, order, inverse)
    return y
