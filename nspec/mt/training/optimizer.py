"""The optimiser of a training, and the schedule of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import nspec
from nspec.mt.training.config import TrainConfig


def inverse_square_root(update: int, warmup: int) -> float:
    """The factor on the learning rate at an update (from 1) after ``w`` of warm-up, ``min(u / w, sqrt(w / u))``.

    It is fairseq's. transformers' ``get_inverse_sqrt_schedule`` is one update behind, so that the first one does
    nothing. A warm-up of 0 counts as 1.
    """
    warmup = max(warmup, 1)
    return min(update / warmup, math.sqrt(warmup / update))


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` names. Weight decay is for matrices, not for biases and norms.

    Raises:
        ValueError: ``row_sparse_adamw`` for a model that is not specialised.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    if settings.optimizer == "row_sparse_adamw":
        return nspec.RowSparseAdamW(groups, **options)
    # With loss scaling the fused one would skip a step by itself, where nobody sees it and the schedule goes on.
    return torch.optim.AdamW(groups, fused=settings.precision != "fp16", **options)
