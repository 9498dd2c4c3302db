"""Laying a mask of real tokens over a layer's activations, whose first two dimensions may be the other way round."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .feed_forward import FeedForward
from .padding import TokenMask

_SURE = 20  # times nearer that the rows of a sentence must be in the right order than in the other


class Alignment:
    """Knows for each layer whether its tokens lie as a mask does, or with the first two dimensions swapped.

    A shape tells, where batch and length differ. Where they are equal, or a layer flattens its tokens, an earlier batch
    may have told, or the class of the layer, or a sentence that was run by itself (:attr:`alone`).
    """

    def __init__(self) -> None:
        self._swapped: dict[tuple[str, str | None], set[bool]] = {}
        self.alone: dict[str, Tensor] = {}
        self.sentence = 0

    def place(self, block: FeedForward, x: Tensor, mask: TokenMask) -> Tensor | None:
        """``mask`` in the shape of the leading dimensions of ``x [..., d_in]``; None where its order cannot be told.

        Raises:
            ValueError: the mask fits in neither order.
        """
        real, leading = mask.real.to(x.device), x.shape[:-1]
        orders = {swapped: part.reshape(leading) for swapped, part in _orders(real) if _fits(part, leading)}
        if not orders:
            raise ValueError(
                f"{block.name}: {mask.name} gives a mask of shape {list(real.shape)}, the activations have "
                f"{list(leading)}; give valid= for this model, or padding='include'"
            )
        key = (block.name, None if mask.batch_first else mask.name)
        if len(orders) == 1:
            [(swapped, placed)] = orders.items()
            if real.dim() == 2:
                self._swapped.setdefault(key, set()).add(swapped)
            return placed
        if torch.equal(orders[False], orders[True]):
            return orders[False]
        known = self._swapped.get(key) or self._by_class(block, mask) or self._by_sentence(block, x, mask)
        if len(known) != 1:
            return None
        self._swapped[key] = known
        return orders[next(iter(known))]

    @staticmethod
    def _by_class(block: FeedForward, mask: TokenMask) -> set[bool]:
        if mask.batch_first and isinstance(block.parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return {not block.parent.self_attn.batch_first}
        return set()

    def _by_sentence(self, block: FeedForward, x: Tensor, mask: TokenMask) -> set[bool]:
        """Compares with the sentence that was run by itself: by shape, else by which rows are the same."""
        alone = self.alone.get(block.name)
        if alone is None or not bool(mask.real[self.sentence].any()):
            return set()
        sentences, length = mask.real.shape
        if alone.dim() == 3 and length > 1 and alone.shape[:2] in ((1, length), (length, 1)):
            return {alone.shape[0] != 1}
        if alone[..., 0].numel() != length:
            return set()
        real = mask.real[self.sentence].to(x.device)
        width = x.shape[-1]
        rows = {
            False: x.reshape(sentences, length, width)[self.sentence],
            True: x.reshape(length, sentences, width)[:, self.sentence],
        }
        off = {s: (row - alone.reshape(length, width))[real].abs().max().item() for s, row in rows.items()}
        near = min(off, key=off.__getitem__)
        return {near} if _SURE * off[near] < off[not near] else set()


def _orders(real: Tensor) -> list[tuple[bool, Tensor]]:
    return [(False, real), (True, real.t())] if real.dim() == 2 else [(False, real)]


def _fits(real: Tensor, leading: torch.Size) -> bool:
    """The same shape but for dimensions of 1, or the flattened one."""
    wanted, found = [n for n in leading if n != 1], [n for n in real.shape if n != 1]
    return wanted == found or wanted == [n for n in [real.numel()] if n != 1]
