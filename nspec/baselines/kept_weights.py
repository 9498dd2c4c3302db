"""Steps of any optimiser that leave alone what no task keeps of a model with masks of single weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .lass import TaskMaskedWeight


@contextmanager
def kept_weights_only(model: nn.Module, optimizer: torch.optim.Optimizer, tasks: Iterable[str]) -> Iterator[None]:
    """Within the block a step of the optimiser leaves alone, bit for bit, the weights that none of the tasks keeps.

    Their gradient is zero, but AdamW and its like would move them by momentum and shrink them by weight decay. What the
    optimiser holds of them (moments) is left alone too. Weights without masks and biases get their ordinary step. The
    masked matrices and their moments are copied for as long as the block lasts.

    Args:
        model: with weight masks, see :func:`nspec.baselines.lass.apply_weight_masks`.
        optimizer: of its parameters.
        tasks: of all passes that the gradients come from; where processes share a step, those of all of them.

    Raises:
        ValueError: the model has no weight masks, or one of the tasks has none.
    """
    masked = [module for module in model.modules() if isinstance(module, TaskMaskedWeight)]
    if not masked:
        raise ValueError(f"{type(model).__name__} has no weight masks: call apply_weight_masks(model, masks) first")
    names = list(dict.fromkeys(tasks))
    if lost := [name for name in names if name not in masked[0].tasks]:
        raise ValueError(f"no weight masks for {', '.join(lost)}; there are masks for {', '.join(masked[0].tasks)}")
    before = []
    for module in masked:
        weight = module.weight
        held = [value for value in optimizer.state.get(weight, {}).values() if isinstance(value, Tensor)]
        tensors = [weight.detach(), *(tensor for tensor in held if tensor.shape == weight.shape)]
        before.append((module, [(tensor, tensor.clone()) for tensor in tensors]))
    yield
    with torch.no_grad():
        for module, pairs in before:
            kept = module.kept_by(names)
            for tensor, old in pairs:
                tensor.copy_(torch.where(kept, tensor, old))
