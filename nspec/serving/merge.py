"""One task's masks or neurons folded into plain weights, for a model that serves this task alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nspec.nn.ffn import CompactLayer
from nspec.nn.task_layers import TaskLayer
from nspec.specialization.apply import despecialize
from nspec.specialization.tasks import check_task, specialized_layers
from nspec.specialization.tuned import fold, is_tuned

from .compact import drop_masked
from .constants import Constants, blocks_of


def merge(
    model: nn.Module,
    task: str,
    *,
    compact: bool = False,
    ragged: bool = False,
    multiple: int = 1,
    batch: Any = None,
) -> nn.Module:
    """A plain dense copy of the model that computes what ``task`` computes; ``model`` itself is not changed.

    In mode ``forward`` the masked rows of the weights of fc1, or of gate and up, are zero in the copy; in mode ``update``
    the forward pass is dense anyway, and the copy is the dense model. Of a model with neurons of their own the weights of
    the base hold those of the task.

    With ``compact=True`` the copy has no masked neurons: what they add is the same for every token, and is added to the
    bias of fc2. It computes the same up to rounding, and no layer is wider than that of the dense model. A model of
    Transformers keeps its class: the layers that one option of its configuration makes (those of the encoder, of the
    decoder, or of both) are padded with zero neurons to the widest of them, and the configuration is changed, so that
    ``from_pretrained`` and converters load what ``save_pretrained`` writes. Layers without masks keep their width, and so
    do those that share its option with them. Where fc2 has no bias and what is folded is not zero, one neuron of such a
    model gives it; any other module gets the bias. Modules that are no model of Transformers have layers as wide as each
    one's neurons are many.

    Args:
        model: specialised, or with neurons of their own.
        task: its name.
        compact: drop the masked neurons; in mode ``forward`` alone.
        ragged: with ``compact``, each layer of a model of Transformers has its own width too. No configuration says that,
            so ``save_pretrained`` of the copy is an error: its state dict is loaded into a copy that was merged in the
            same way, or ``torch.save`` writes the module.
        multiple: with ``compact``, widths are rounded up to a multiple of this, but not beyond the dense model's. Matrix
            products in 16 and 8 bits want 8 on many devices.
        batch: with ``compact``, what ``model(batch)`` or ``model(**batch)`` takes, for models whose blocks cannot be run
            on their own, which an error says; the model runs once on it.

    Raises:
        ValueError: the model is not specialised or was changed since, has no masks of that task, or a weight is made anew
            by a hook in each pass. With ``compact``: mode ``update``, or neurons of their own, where no neuron is masked;
            a layer that is shared, sharded or elsewhere; code between fc1 and fc2 that is not elementwise, or cannot be
            run; a model of Transformers whose configuration has no option for the width. The message says the way out.
        TypeError: ``task`` is not the name of one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> german, x = nspec.merge(model, "en-de"), torch.randn(3, 4)
        >>> with nspec.task(model, "en-de"):
        ...     print(torch.allclose(german(x), model(x), atol=1e-6))
        True
        >>> type(german[0]) is nn.Linear, int(german[0].weight[6:].count_nonzero())
        (True, 0)
        >>> small = nspec.merge(model, "en-de", compact=True)
        >>> small[0].out_features, torch.allclose(small(x), german(x), atol=1e-6)
        (6, True)
    """
    if not isinstance(task, str):
        raise TypeError(f"task is {task!r}, expected the name of a task")
    _check_options(compact, ragged, multiple, batch)
    layers = specialized_layers(model)
    check_task(task, layers)
    if is_tuned(model):
        if compact:
            raise ValueError(
                "the model has neurons of their own (nspec.finetune, nspec.load_neurons), of which none is masked, so "
                "there is nothing to drop: merge it without compact=True"
            )
        return fold(model, task)
    for module in model.modules():
        if isinstance(module, CompactLayer) and "weight" not in module._parameters:
            raise ValueError(
                f"the weight of {module.qualified_name} is made anew in each pass (prune, weight_norm, spectral_norm): "
                "make it permanent first (prune.remove, remove_weight_norm, remove_spectral_norm)"
            )
    if compact:
        _check_masked(layers)
        return _compact(model, task, ragged, multiple, batch)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, CompactLayer):
                inactive = ~module._nspec.sets[task].on(module.weight.device).active
                inactive = inactive.repeat(2) if module._nspec.doubled else inactive
                module.weight.masked_fill_(inactive if module.transposed else inactive[:, None], 0)
    return despecialize(merged)


def _check_options(compact: bool, ragged: bool, multiple: int, batch: Any) -> None:
    if isinstance(multiple, bool) or not isinstance(multiple, int):
        raise TypeError(f"multiple is {multiple!r}, expected a whole number")
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, expected 1 or more")
    if not compact and (ragged or multiple != 1 or batch is not None):
        given = "ragged" if ragged else "multiple" if multiple != 1 else "batch"
        raise ValueError(f"{given} is an option of compact=True, and compact is False: give compact=True as well")


def _check_masked(layers: list[Any]) -> None:
    """Raises ValueError where no layer computes its active neurons alone."""
    if any(isinstance(layer, CompactLayer) for layer in layers):
        return
    if any(isinstance(layer, TaskLayer) for layer in layers):
        raise ValueError(
            "the model is specialised in mode 'update', whose forward pass is dense: every neuron is used, and none can be "
            "dropped. Merge it without compact=True"
        )
    raise ValueError(
        "the model has no masked feed-forward layers, so there is nothing to drop: merge it without compact=True"
    )


def _compact(model: nn.Module, task: str, ragged: bool, multiple: int, batch: Any) -> nn.Module:
    copied = copy.deepcopy(model)
    blocks = blocks_of(copied)
    layers: dict[str, Any] = {name: block.fc1 for name, block in blocks.items()}
    active = {name: layer._nspec.sets[task].active for name, layer in layers.items()}
    masked = {name: block for name, block in blocks.items() if not bool(active[name].all())}
    constants: Mapping[str, Any] = dict.fromkeys(blocks, 0.0) | Constants(copied, masked, task).found(batch)
    plain = despecialize(copied)
    drop_masked(plain, list(blocks.values()), active, constants, ragged=ragged, multiple=multiple)
    return plain
