"""The loss of a batch as a sum over its labels, so that a token weighs the same in a batch of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossOf = Callable[[Any, Any], Tensor]
"""``loss(output, batch)``: the loss of a batch, one number, summed over its labels."""
_WAY_OUT = "give loss=, a function of the model's output and the batch that returns the loss summed over the labels"
_IGNORED = -100
_SURER = 4  # times nearer to the model's loss that one way of counting labels must be than the other


class SummedLoss:
    """Takes the loss that a model gives, the mean over the labels of a batch, times their number.

    Models that predict the next token leave the first label of a sequence out, and others do not: the cross-entropy of the
    first batch's logits shows which it is.

    Args:
        given: the caller's own; None: ``output.loss``.
        encoder_decoder: whether the model says that it is of those of Transformers that take all labels, which decides
            where the cross-entropies are near to one another (models that are not trained, in 16 bits).
    """

    def __init__(self, given: LossOf | None = None, encoder_decoder: bool = False) -> None:
        self._given, self._encoder_decoder = given, encoder_decoder
        self._first: int | None = None  # the first label that counts: 0, or 1 of models that predict the next token

    def __call__(self, output: Any, batch: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, one number.

        Args:
            output: what the model gave.
            batch: what it got.
            inputs: the same by name.

        Raises:
            ValueError: there is no loss or no labels, the loss is not the mean cross-entropy of the labels, is no single
                number, or no gradient flows from it.
            TypeError: the caller's own function gives no tensor.
        """
        loss = self._own(output, inputs) if self._given is None else self._given(output, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss is a {type(loss).__name__}, expected a tensor of one number")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(f"the loss is {loss.dtype} {list(loss.shape)}, expected one floating-point number")
        if not loss.requires_grad:
            raise ValueError(
                "no gradient flows from the loss to the feed-forward layers: the model or the loss is computed under "
                "torch.no_grad, or detached"
            )
        return loss

    def _own(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        loss, logits = (_entry(output, name) for name in ("loss", "logits"))
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"the model gave no loss (a {type(output).__name__}{'' if 'labels' in inputs else ', and no labels'}): "
                f"put labels into the batches of a model that computes a loss of them, or {_WAY_OUT}"
            )
        labels: Any = inputs.get("labels")
        both = isinstance(labels, Tensor) and isinstance(logits, Tensor)
        if not both or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
            raise ValueError(f"of how many labels the model's loss is the mean cannot be told: {_WAY_OUT}")
        if not bool(torch.isfinite(loss).all()):
            return loss
        numbers = [int((labels[..., first:] != _IGNORED).sum()) for first in (0, 1)]
        if numbers[0] == numbers[1]:
            first = 0
        elif self._first is None:
            first = self._first = _first_label(loss.detach(), logits.detach(), labels, self._encoder_decoder)
        else:
            first = self._first
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * numbers[first]


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _first_label(loss: Tensor, logits: Tensor, labels: Tensor, encoder_decoder: bool) -> int:
    """0 or 1: from which label of a sequence on ``loss`` is the mean of, by the logits."""
    labels = labels.to(logits.device)
    exact = torch.promote_types(logits.dtype, torch.float32)
    ways = [(logits, labels), *([(logits[..., :-1, :], labels[..., 1:])] if labels.dim() > 1 else [])]
    means = [
        float(F.cross_entropy(given.reshape(-1, logits.shape[-1]).to(exact), wanted.reshape(-1)))
        for given, wanted in ways
    ]
    off = [abs(mean - float(loss)) / max(abs(float(loss)), 1e-6) for mean in means]
    most = 2e-2 if loss.element_size() == 2 else 1e-3  # a loss of 16 bits is off by so much by itself
    fitting = sorted((at for at in range(len(off)) if off[at] <= most), key=off.__getitem__)
    if encoder_decoder and 0 in fitting:
        return 0
    sure = len(fitting) == 1 or (len(fitting) > 1 and loss.element_size() > 2)
    if not sure or any(_SURER * off[fitting[0]] >= other for at, other in enumerate(off) if at != fitting[0]):
        found = " or ".join(f"{mean:.6g}" for mean in means)
        raise ValueError(
            f"of how many labels the model's loss is the mean cannot be told: it is {float(loss):.6g}, and the "
            f"cross-entropy of the labels {found} (all labels, or all but the first of each sequence): {_WAY_OUT}"
        )
    return fitting[0]
