"""Steps of any optimiser that leave alone what no task keeps of a model with masks of single weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .layer import LassLinear


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

    Example:
        >>> from nspec.baselines.lass import apply_weight_masks
        >>> from nspec.baselines.lass import WeightMasks
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> model = apply_weight_masks(model, WeightMasks({"en-de": {"0": torch.tensor([[True, False]])}}))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        >>> with nspec.task(model, "en-de"):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> before = model[0].weight.detach().clone()
        >>> with kept_weights_only(model, optimizer, ["en-de"]):
        ...     optimizer.step()
        >>> (model[0].weight == before).tolist()
        [[False, True]]
    """
    masked = [module for module in model.modules() if isinstance(module, LassLinear)]
    if not masked:
        raise ValueError(f"{type(model).__name__} has no weight masks: call apply_weight_masks(model, masks) first")
    names = list(dict.fromkeys(tasks))
    if lost := [name for name in names if name not in masked[0].tasks]:
        raise ValueError(f"no weight masks for {', '.join(lost)}; there are masks for {', '.join(masked[0].tasks)}")
    before = [(module, {name: tensor.clone() for name, tensor in _tensors(module, optimizer)}) for module in masked]
    yield
    with torch.no_grad():
        for module, old in before:
            kept = module.kept_by(names)
            for name, tensor in _tensors(module, optimizer):
                # A moment that the step has made began with 0.
                tensor.copy_(torch.where(kept, tensor, old.get(name, torch.zeros_like(tensor))))


def _tensors(module: nn.Linear, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The weight and what the optimiser holds of each of its entries, by name."""
    held = optimizer.state.get(module.weight, {})
    shape = module.weight.shape
    moments = [(name, t) for name, t in held.items() if isinstance(t, Tensor) and t.shape == shape]
    return [("", module.weight.detach()), *moments]
