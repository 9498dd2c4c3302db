"""Perplexity of a language model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nspec.lm.sequences import batches


class Perplexity(NamedTuple):
    """How well text is predicted.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        tokens: that were predicted: all but the first of each sequence.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """``exp(loss)``: as uncertain as a choice among so many equally likely tokens."""
        return math.exp(min(self.loss, 700.0))


def perplexity(
    model: nn.Module,
    pieces: Sequence[Tensor],
    size: int,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measures a causal language model on sequences, in evaluation mode, as it stands (its task too).

    Args:
        model: of Transformers.
        pieces: token ids, int64 ``[length]`` each.
        size: sequences of a pass.
        progress: called with the number of sequences done.

    Raises:
        ValueError: the loss is not a number: the model has diverged.
    """
    device = next(model.parameters()).device
    total, tokens, done, training = 0.0, 0, 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches(pieces, size):
                ids = batch.to(device)
                logits: Any = model(input_ids=ids, use_cache=False).logits
                # float32 for the softmax, and sums in float64: a mean over many tokens must not depend on their order.
                losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
                total += float(losses.double().sum())
                tokens += losses.numel()
                done += len(ids)
                if progress is not None:
                    progress(done)
    finally:
        model.train(training)
    if not math.isfinite(total):
        raise ValueError(
            f"the mean loss on {tokens} held-out tokens is {total / tokens}: the model has diverged; take a smaller "
            "learning rate"
        )
    return Perplexity(total / tokens, tokens)
