"""LaSS (Lin et al. 2021): for each task a sub-network of single weights, found by magnitude after fine-tuning.

    dense = ...                                                     # trained on all tasks
    parts = []
    for task in tasks:
        tuned = ...                                                 # a copy of it, fine-tuned on the task alone
        parts.append(WeightMasks({task: magnitude_masks(tuned, alpha=0.3)}))
    apply_weight_masks(dense, WeightMasks.union_of_tasks(parts))    # in place; its code is not touched
    with nspec.task(dense, "en-de"):
        dense(**batch).loss.backward()
    with kept_weights_only(dense, optimizer, ["en-de"]):            # else momentum and decay move all
        optimizer.step()

With the mask M of a task, a layer computes ``y = x (M ⊙ W)ᵀ + b``, and the gradient of a masked weight is exactly zero.
"""

from .layer import LassLinear, apply_weight_masks, merge_weight_masks, remove_weight_masks
from .masks import PackedMask, WeightMasks
from .optimizer import kept_weights_only
from .pruning import magnitude_masks, prunable_layers

__all__ = [
    "LassLinear",
    "PackedMask",
    "WeightMasks",
    "apply_weight_masks",
    "kept_weights_only",
    "magnitude_masks",
    "merge_weight_masks",
    "prunable_layers",
    "remove_weight_masks",
]
