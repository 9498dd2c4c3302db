"""What a merged model is: how wide its layers are, which share of the neurons it keeps, and a model card that says so."""

from __future__ import annotations

from torch import nn

from nspec.nn.task_layers import TaskLayer
from nspec.specialization.layers import find_blocks
from nspec.specialization.tasks import check_task, specialized_layers


def widths(model: nn.Module) -> dict[str, int]:
    """The number of neurons of each feed-forward block, by the name of fc1, in the order of the model.

    Args:
        model: dense, merged or specialised; blocks are found as :func:`nspec.specialize` finds them.

    Raises:
        ValueError: the model has no feed-forward blocks that are found by structure and name.

    Example:
        >>> widths(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        {'0': 8}
    """
    return {block.name: block.d_ff for block in find_blocks(model)}


def densities(model: nn.Module, task: str) -> dict[str, float]:
    """The share of the neurons of each specialised block that ``task`` keeps, by the name of fc1.

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> densities(model, "en-de")
        {'0': 0.75}
    """
    check_task(task, specialized_layers(model))
    found: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TaskLayer) and layer._nspec.beside is not None:
            active = layer._nspec.sets[task].active
            found[name] = float(active.sum()) / max(1, len(active))
    return found
