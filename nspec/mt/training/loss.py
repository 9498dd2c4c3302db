"""The training loss: label-smoothed cross entropy, normalised by the tokens of the whole update."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nspec.mt.text.collate import IGNORED


def label_smoothed_loss(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, num_items: torch.Tensor | int
) -> torch.Tensor:
    """Sum over the target tokens of ``(1-e) * -log p[label] + e * mean_v(-log p[v])``, divided by ``num_items``.

    ``e`` is spread evenly over all V entries of the vocabulary, the label among them (PyTorch's form). fairseq spreads
    it over the V-1 others, which is this form with ``e * V / (V-1)``.

    Args:
        logits: float [..., V] in any precision; the loss is computed in float32 at least.
        labels: int64 [...], -100 where no loss counts.
        epsilon: e, in [0, 1).
        num_items: target tokens that the sum is divided by. Those of all micro-batches of an update on all processes
            make the gradient that of one large batch, however it is split.

    Returns:
        A float32 (float64 for float64 logits) scalar, in nats per target token.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=epsilon,
        reduction="sum",
    )
    return total / num_items


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without smoothing, for validation.

    Args:
        logits: float [..., V].
        labels: int64 [...], -100 where no loss counts.

    Returns:
        (sum of ``-log p[label]`` in nats, number of target tokens), both float64 scalars on the device of ``logits``.
    """
    total = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return total.double(), labels.ne(IGNORED).sum().double()
