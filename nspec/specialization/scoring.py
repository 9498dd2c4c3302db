"""Scoring in the passes of a model: the activations that fc2 gets, and the gradient of the loss in them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import Alignment
from .feed_forward import FeedForward
from .passes import Pass, Tally, TokenMasks
from .routing import Routing


class Scorers(Tally):
    """Adds up, per layer and neuron, the scores of real tokens: ``abs(h)``, or ``abs(h * dL/dh)``, of what fc2 gets.

    The parameters need no gradient while a batch runs, so that none is computed for them: gradients flow from the loss
    through the activations alone, down to those of the first block.

    Args:
        model: holds the blocks.
        blocks: what to score.
        gradient: whether ``run`` gives a function that returns the loss, whose gradient is multiplied in.
    """

    _DTYPE = torch.float64

    def __init__(self, model: nn.Module, blocks: Sequence[FeedForward], gradient: bool) -> None:
        super().__init__(model, blocks)
        self._model, self._gradient = model, gradient

    def _run(self, run: Callable[[], Any], masks: TokenMasks, wanted: set[str]) -> Pass:
        seen = _Pass(self._alignment, self._routing, masks, wanted, self._gradient, self._where())
        with _frozen(self._model), seen.attached(self._blocks), self._routing.attached():
            loss_of = run()
            seen.check_passed()
            if self._gradient:
                seen.differentiate(loss_of())
        return seen


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient within the block; those that did do so again after it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Pass(Pass):
    """One run of the model, with the activations of its blocks."""

    def __init__(
        self, alignment: Alignment, routing: Routing, masks: TokenMasks, wanted: set[str], gradient: bool, where: str
    ) -> None:
        super().__init__(alignment, routing, masks, wanted)
        self._gradient, self._where = gradient, where
        self._laid: dict[str, tuple[bool, Tensor | None]] = {}
        self._kept: list[tuple[FeedForward, Tensor, Tensor | None]] = []
        self._backward = False

    @contextlib.contextmanager
    def attached(self, blocks: Sequence[FeedForward]) -> Iterator[None]:
        """The hooks are on the layers within the block, and gone after it."""
        with contextlib.ExitStack() as hooks:
            for block in blocks:
                if block.name in self._wanted:
                    first = functools.partial(self._before_fc1, block)
                    hooks.callback(block.fc1.register_forward_pre_hook(first, with_kwargs=True).remove)
                    second = functools.partial(self._before_fc2, block)
                    hooks.callback(block.fc2.register_forward_pre_hook(second, with_kwargs=True).remove)
            yield

    def _before_fc1(self, block: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._backward:  # a checkpoint computes again what has been seen
            self._laid[block.name] = self._place(block, args[0] if args else next(iter(kwargs.values())))

    def _before_fc2(
        self, block: FeedForward, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        h: Tensor = args[0] if args else next(iter(kwargs.values()))
        fresh = self._gradient and not h.requires_grad  # nothing below it is of interest: gradients end here
        if fresh:
            h = h.detach().requires_grad_()
        if not self._backward:
            self._see(block, h)
        if not fresh:
            return None
        return ((h, *args[1:]), dict(kwargs)) if args else ((), {next(iter(kwargs)): h})

    def _see(self, block: FeedForward, h: Tensor) -> None:
        if block.name not in self._laid:
            raise ValueError(
                f"{block.name}: fc2 of this block runs without fc1 before it in {self._where}, so its activations are not "
                "those of the block; choose layers with layers=[...]"
            )
        placed, valid = self._laid.pop(block.name)
        if h.shape != (expected := (*self.leading[block.name], block.d_ff)):
            raise ValueError(f"{block.name}: fc2 got {list(h.shape)}, expected {list(expected)}, as fc1 gave")
        if not placed:
            return
        valid = None if valid is None else valid.to(h.device)
        if self._gradient:
            self._kept.append((block, h, valid))
        else:
            self._add(block, h if valid is None else h[valid])

    def check_passed(self) -> None:
        """Raises ValueError where fc1 of a block ran, and fc2 did not."""
        for layer in self._laid:
            raise ValueError(
                f"{layer}: fc2 did not get the activations of fc1 in {self._where}, so nothing shows what the block "
                "computes; choose layers with layers=[...]"
            )

    def differentiate(self, loss: Tensor) -> None:
        """Multiplies the activations by the gradient of a loss.

        Raises:
            ValueError: the loss is not finite, or does not depend on a layer.
        """
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {loss.item()} in {self._where}: look at the weights, the inputs, whether there are labels "
                "(other than -100) in the batch, and the dtype"
            )
        self._backward = True
        kept = [(block, h, valid) for block, h, valid in self._kept if h.numel()]
        gradients = torch.autograd.grad(loss.reshape(()), [h for _, h, _ in kept], allow_unused=True) if kept else ()
        for (block, h, valid), gradient in zip(kept, gradients):
            if gradient is None:
                raise ValueError(
                    f"{block.name}: the loss does not depend on what this layer computes in {self._where}, so its neurons "
                    "have no gradient; leave it out with layers=[...]"
                )
            h, gradient = (v if valid is None else v[valid] for v in (h.detach(), gradient))
            exact = torch.promote_types(h.dtype, torch.float32)
            self._add(block, h.to(exact) * gradient.to(exact))
        self._kept.clear()

    def _add(self, block: FeedForward, values: Tensor) -> None:
        """Adds the absolute values ``[..., d_ff]``, of real tokens."""
        values = values.detach().reshape(-1, block.d_ff)
        total = values.abs().sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"{block.name}: {'activations or their gradients' if self._gradient else 'activations'} are not finite in "
                f"{self._where}. Look at the weights, the inputs and the dtype"
            )
        self._sum(block.name, total, torch.tensor(len(values)))
