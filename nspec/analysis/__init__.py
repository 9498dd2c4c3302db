"""What masks say about languages: density and overlap."""

from nspec.analysis.overlap import (
    chance_iou,
    density,
    layer_iou,
    layer_matrix,
    layer_numbers,
    layer_side,
    mean_pairwise,
    order_tasks,
    pairwise_iou,
    side_layers,
    sort_layers,
)

__all__ = [
    "chance_iou",
    "density",
    "layer_iou",
    "layer_matrix",
    "layer_numbers",
    "layer_side",
    "mean_pairwise",
    "order_tasks",
    "pairwise_iou",
    "side_layers",
    "sort_layers",
]
