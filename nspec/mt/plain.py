"""The plain model of one direction of a system: what is exported, and what CTranslate2 translates with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

import nspec
from nspec.baselines.adapters import TaskAdapters
from nspec.baselines.heads import TaskHeads, merge_heads
from nspec.baselines.lass import LassLinear, merge_weight_masks
from nspec.nn.ffn import CompactLayer
from nspec.nn.switched import TaskSwitched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTERS = "adapters are layers of their own, which the formats of plain models have no place for"


def decodes_by_task(model: nn.Module) -> bool:
    """Whether what the model computes depends on the task that it is switched to."""
    return any(isinstance(module, TaskSwitched) and module.decodes_by_task for module in model.modules())


def why_not_plain(model: nn.Module) -> str:
    """Why no plain model computes what a direction of this one computes; empty where one does."""
    return ADAPTERS if any(isinstance(module, TaskAdapters) for module in model.modules()) else ""


def plain(model: PreTrainedModel, task: str, compact: bool = True) -> PreTrainedModel:
    """A model of ``transformers`` alone that computes what a direction computes.

    Args:
        model: a system, specialised or dense; it is not changed.
        task: the direction; of a model that computes the same for all, any that it knows.
        compact: without the neurons that the direction does not use, where its masks are in the forward pass.

    Returns:
        ``model`` itself where it is plain, else a copy.

    Raises:
        ValueError: there is none (:func:`why_not_plain`), or the model does not know the direction.
    """
    if reason := why_not_plain(model):
        raise ValueError(f"{task} cannot be merged into a plain model: {reason}")
    switched = [module for module in model.modules() if isinstance(module, TaskSwitched)]
    found: Any = model
    if any(isinstance(module, LassLinear) for module in switched):
        found = merge_weight_masks(model, task)
    elif any(isinstance(module, TaskHeads) for module in switched):
        found = merge_heads(model, task)
    elif decodes_by_task(model):
        masked = any(isinstance(module, CompactLayer) for module in switched)
        found = nspec.merge(model, task, compact=compact and masked)
    elif switched:  # the dense model, whatever the task
        found = nspec.merge(model, switched[0].tasks[0])
    return found
