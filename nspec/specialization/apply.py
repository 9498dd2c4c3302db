"""Putting masks on a model, taking them off, and folding one task's masks into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from nspec.nn.ffn import CompactFc1, CompactFc2, TaskLinear
from nspec.nn.masked_linear import Mode, check_mode

from .layers import Pair, check_relu, disable_fast_path, find_pairs, nearest, restore_fast_path
from .masks import NeuronMasks
from .tasks import set_task

# What specialisation leaves on the modules, and despecialisation takes away.
_STATE = (
    "mode",
    "_active",
    "_batch",
    "_set_in",
    "_passes",
    "_touched",
    "_sets",
    "_stacks",
    "_task",
    "fc2",
    "_packed",
    "_packed_of",
    "_checked",
    "_result",
    "_checking",
)


def specialize(
    model: nn.Module,
    masks: NeuronMasks,
    mode: Mode = "forward",
    *,
    layers: Iterable[str | tuple[str, str]] | None = None,
) -> nn.Module:
    """Makes the feed-forward layers of ``model`` use, or train, only the neurons of the current task. In place.

    Modules keep their identity, parameters, hooks and state-dict keys; optimisers and references stay valid. Until a task
    is set (``nspec.task``, ``nspec.set_task``) the model computes what it did before.

    Args:
        model: any module with the layers that ``masks`` names; not yet wrapped for distributed training or compiled.
        masks: the neurons of each task.
        mode: ``forward``: only active neurons are computed, in training and decoding, as in Tan et al. 2024; equals
            multiplying the mask into the rows of fc1.weight. ``update``: the forward pass is dense, and only the
            gradient of fc1.weight is masked.
        layers: as in ``find_pairs`` and ``profile``, for layers that are not found by structure and name. Masks may name
            fewer layers than are given or found; those without masks stay dense.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an unknown mode; masks of another model (the message names the layer and both sizes or the nearest
            names); a model that is specialised already; in mode ``forward`` an activation that is not ReLU or an
            activation dropout above 0.
        TypeError: ``masks`` is not a ``NeuronMasks``.
    """
    check_mode(mode)
    if not isinstance(masks, NeuronMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected nspec.NeuronMasks")
    if any(isinstance(module, TaskLinear) for module in model.modules()):
        raise ValueError("the model is specialised already: call nspec.despecialize(model) first")
    pairs = _matching_pairs(model, masks, layers)
    for pair in pairs:
        if type(pair.fc1) is not nn.Linear or (mode == "forward" and type(pair.fc2) is not nn.Linear):
            raise ValueError(
                f"{pair.name} is {type(pair.fc1).__name__} with {type(pair.fc2).__name__}, expected plain nn.Linear layers"
            )
        if mode == "forward":
            check_relu(pair)
    if mode == "forward":
        fast_path = {id(module): value for module, value in disable_fast_path(pairs)}
    for pair in pairs:
        sets = {task: masks[task][pair.name] for task in masks.tasks}
        _become(pair, mode)
        assert isinstance(pair.fc1, TaskLinear)
        pair.fc1.add_tasks(sets)
        if mode == "forward" and id(pair.parent) in fast_path:
            pair.fc1.__dict__["_fast_path"] = (pair.parent, fast_path[id(pair.parent)])
    return model


def _matching_pairs(model: nn.Module, masks: NeuronMasks, layers: Iterable[str | tuple[str, str]] | None) -> list[Pair]:
    """The model's layers that the masks name; every named layer must be there, equally wide."""
    known = {pair.name: pair for pair in find_pairs(model, layers)}
    modules = dict(model.named_modules())
    for layer in masks.layers:
        pair = known.get(layer)
        if pair is None:
            if f"module.{layer}" in modules or f"_orig_mod.{layer}" in modules:
                raise ValueError(
                    f"the model is wrapped: specialise it first, then wrap or compile it ({layer} is inside)"
                )
            raise ValueError(f"masks name layer {layer!r}, which the model does not have; {nearest(layer, known)}")
        width = len(masks[masks.tasks[0]][layer])
        if width != pair.d_ff:
            raise ValueError(
                f"masks are of another model: {layer} has d_ff={width} in the masks, {pair.d_ff} in the model"
            )
    return [known[layer] for layer in masks.layers]


def _become(pair: Pair, mode: Mode) -> None:
    """Turns the plain layers into specialised ones. The class changes, so that identity, hooks and keys stay."""
    fc1, fc2 = pair.fc1, pair.fc2
    fc1.__class__ = TaskLinear if mode == "update" else CompactFc1
    assert isinstance(fc1, TaskLinear)
    if isinstance(fc1, CompactFc1):
        fc2.__class__ = CompactFc2
        assert isinstance(fc2, CompactFc2)
        fc1.pair_with(fc2)
    fc1._attach(mode)


def despecialize(model: nn.Module) -> nn.Module:
    """Makes the model plain again, in place: the same parameters, bitwise as they are now, and the same state dict.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is not specialised.
    """
    set_task(model, None)  # raises where there is nothing to undo
    for module in model.modules():
        if isinstance(module, (TaskLinear, CompactFc2)):
            if "_fast_path" in module.__dict__:
                restore_fast_path([module.__dict__.pop("_fast_path")])
            module.__class__ = nn.Linear  # type: ignore[assignment]
            for name in _STATE:
                module.__dict__.pop(name, None)
    return model


def merge(model: nn.Module, task: str) -> nn.Module:
    """A plain dense copy of the model that computes what ``task`` computes; ``model`` itself is not changed.

    In mode ``forward`` the masked rows of fc1.weight are zero in the copy; in mode ``update`` the forward pass is dense
    anyway, and the copy is the dense model.

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.
    """
    merged = copy.deepcopy(model)
    set_task(merged, task)
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, CompactFc1) and module._active is not None:
                active = module._active.on(module.weight.device).active
                module.weight.masked_fill_(~active[:, None], 0)
    return despecialize(merged)
