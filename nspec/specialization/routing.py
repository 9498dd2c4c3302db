"""Which tokens of a batch a router sent to an expert: found again by their values, as nothing else tells them apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import FeedForward, features
from .layers import routed_within


class Routing:
    """Knows what the modules around the experts got, while a pass runs.

    Args:
        model: with or without experts.
        blocks: the feed-forward blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[FeedForward]) -> None:
        around = {block.name: routed_within(model, block.name) for block in blocks}
        self._around = {name: module for name, module in around.items() if module is not None}
        self._inputs: dict[int, list[Tensor]] = {}

    def __contains__(self, layer: str) -> bool:
        return layer in self._around

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the modules within the block, and gone after it."""
        with contextlib.ExitStack() as hooks:
            for module in dict.fromkeys(self._around.values()):
                hooks.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._end).remove)
            hooks.callback(self._inputs.clear)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = (*args, *kwargs.values())
        self._inputs[id(module)] = [
            v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1
        ]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inputs.pop(id(module), None)

    def place(
        self, block: FeedForward, x: Tensor, lay: Callable[[Tensor], Tensor | None]
    ) -> tuple[bool, Tensor | None]:
        """Whether the mask can be laid over the batch, and the real tokens among ``x [..., d_in]``; None: all are.

        Args:
            block: the expert.
            x: its input.
            lay: gives the mask in the shape of the leading dimensions of the tokens before they are routed; None where
                their order cannot be told.

        Raises:
            ValueError: the rows of ``x`` are not those of the module around the experts, or a real token that some expert
                dropped has the same values as padding.
        """
        width = features(block.fc1)[0]
        for tokens in self._inputs.get(id(self._around[block.name]), ()):
            if tokens.shape[-1] != width:
                continue
            real = lay(tokens)
            if real is None:
                return False, None
            if bool(real.all()):
                return True, None
            rows = tokens.reshape(-1, width).to(x.device, x.dtype)
            found = _real_rows(x.reshape(-1, width), rows, real.reshape(-1).to(x.device))
            if found is not None:
                return True, found.view(x.shape[:-1])
        raise ValueError(
            f"{block.name}: which of the tokens that this expert got are padding cannot be told, as their values are not "
            "those of the batch before it is routed, or of several tokens at once: give batches of one sentence without "
            "padding, or padding='include'"
        )


def _real_rows(x: Tensor, rows: Tensor, real: Tensor) -> Tensor | None:
    """Bool ``[n]``: which rows of ``x [n, d]`` are real ones of ``rows [tokens, d]``; None where that cannot be told."""
    if not len(x):
        return x.new_zeros(0, dtype=torch.bool)
    known, inverse = torch.unique(_keys(rows), return_inverse=True)
    keys = _keys(x)
    at = torch.searchsorted(known, keys).clamp_(max=len(known) - 1)
    if not torch.equal(known[at], keys):
        return None
    together = torch.bincount(inverse, minlength=len(known))
    of_text = torch.bincount(inverse[real], minlength=len(known))
    mixed = (of_text > 0) & (of_text < together)
    found = of_text[at] > 0
    if not bool(mixed[at].any()):
        return found
    # Padding with the values of a real token: the expert got all of them, equally often, or nobody knows which.
    got = torch.bincount(at, minlength=len(known))
    if bool((got[mixed] % together[mixed]).any()):
        return None
    order = torch.sort(at, stable=True).indices
    place = torch.empty_like(at)
    place[order] = torch.arange(len(at), device=at.device) - (got.cumsum(0) - got)[at[order]]
    return found & (place < got[at] // together[at] * of_text[at])


@functools.cache
def _multipliers(width: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def _keys(rows: Tensor) -> Tensor:
    """Int64 ``[n]`` of ``[n, d]``: equal for rows of equal bits, and different for others but for chance (about 2^-48)."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = rows.contiguous().view(size).long()
    mixed = (bits ^ (bits >> 15)) * -7046029254386353131  # an odd number without a pattern: 2^64 over the golden ratio
    return ((mixed ^ (mixed >> 29)) * _multipliers(rows.shape[1]).to(rows.device)).sum(1)
