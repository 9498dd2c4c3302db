"""Putting masks on a model, taking them off, and folding one task's masks into plain weights."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nspec.nn.ffn import CompactFc1, TaskLinear
from nspec.nn.masked_linear import Mode, check_mode
from nspec.nn.switched import Shared, TaskSwitched

from .feed_forward import FeedForward
from .layers import (
    activation_dropouts,
    batch_dim_of,
    check_relu,
    fast_paths,
    find_blocks,
    flattens,
    is_routed,
)
from .masks import NeuronMasks
from .naming import Layer
from .patterns import alike, nearest
from .tasks import PLACES, calls_its_class, check_task, refuse_other_threads, specialized_layers

# What specialisation leaves on the modules, and despecialisation takes away.
_STATE = (
    "mode",
    "_active",
    "_batch",
    "_set_in",
    "_passes",
    "_touched",
    "_arrivals",
    "_sets",
    "_stacks",
    "_task",
    "_packed",
    "_shared",
    "_first",
    "_routed",
    "_batch_dim",
    "_flattens",
    "_block",
    "qualified_name",
)
_BEFORE = "_nspec_before"  # on a module of which an attribute was changed: what it was


def specialize(
    model: nn.Module,
    masks: NeuronMasks,
    mode: Mode = "forward",
    *,
    layers: Iterable[Layer] | None = None,
    activation_dropout: float | None = None,
) -> nn.Module:
    """Makes the feed-forward layers of ``model`` use, or train, only the neurons of the current task. In place.

    Modules keep their identity, parameters, hooks and state-dict keys; optimisers and references stay valid. Until a task
    is set (``nspec.task``, ``nspec.set_task``) the model computes what it did before.

    ``nn.TransformerEncoder`` leaves its fused inference path, which calls no layers: with a padding mask that path gives 0
    at padded positions, and the ordinary one does not.

    In mode ``forward`` what runs between fc1 and fc2 (the activation, hooks on it or on the two layers) gets a value that
    stands for the activations and takes ReLU alone: anything else there is an error in every pass, not a number.

    Args:
        model: any module with the layers that ``masks`` names; not yet wrapped for distributed training or compiled.
        masks: the neurons of each task.
        mode: ``forward``: only active neurons are computed, in training and decoding, as in Tan et al. 2024; equals
            multiplying the mask into the rows of fc1.weight. ``update``: the forward pass is dense, and only the
            gradient of fc1.weight is masked.
        layers: as in ``find_blocks`` and ``profile``, for layers that are not found by structure and name. Masks may name
            fewer layers than are given or found; those without masks stay dense.
        activation_dropout: 0 sets the dropouts between fc1 and fc2 that are known by structure and name to 0 in mode
            ``forward``, until ``despecialize``; None: one above 0 is an error.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an unknown mode; masks of another model (the message names the layer and both sizes or the nearest
            names); a model that is specialised already; a layer that is not a plain ``nn.Linear`` or whose ``forward`` was
            replaced; in mode ``forward`` an activation that is not ReLU or an activation dropout above 0.
        TypeError: ``masks`` is not a ``NeuronMasks``.
    """
    check_mode(mode)
    if not isinstance(masks, NeuronMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected nspec.NeuronMasks")
    if activation_dropout not in (None, 0):
        raise ValueError(f"activation_dropout is {activation_dropout}, expected 0 (switch it off) or None (leave it)")
    if any(isinstance(module, TaskLinear) for module in model.modules()):
        raise ValueError("the model is specialised already: call nspec.despecialize(model) first")
    known = {block.name: block for block in find_blocks(model, layers)}
    masks = _fitting(model, masks, known)
    pairs = [known[layer] for layer in masks.layers]
    for pair in pairs:
        _check_plain(pair)
        if mode == "forward":
            check_relu(pair, dropout=activation_dropout is None)
    changes = fast_paths(model, pairs)
    if mode == "forward":
        changes += [(module, name, 0.0) for pair in pairs for module, name, _ in activation_dropouts(pair)]
    for module, name, value in changes:
        module.__dict__.setdefault(_BEFORE, {}).setdefault(name, getattr(module, name))
        setattr(module, name, value)
    shared = Shared()
    for pair in pairs:
        pair.fc1.__class__ = TaskLinear if mode == "update" else CompactFc1
        fc1 = pair.fc1
        assert isinstance(fc1, TaskLinear)
        fc1._attach(mode)
        sets = {task: masks[task][pair.name] for task in masks.tasks}
        fc1.add_tasks(
            sets,
            pair.name,
            shared=shared,
            first=pair is pairs[0],
            routed=is_routed(model, pair.name),
            batch_dim=batch_dim_of(pair),
            flattens=flattens(pair),
        )
        _rebind(fc1)
        holder, _, attribute = pair.name.rpartition(".")
        model.get_submodule(holder).__dict__.setdefault(PLACES, {})[attribute] = pair.name
    return model


def _check_plain(pair: FeedForward) -> None:
    """Raises ValueError unless fc1 is an ``nn.Linear`` that computes what its class says."""
    fc1: Any = pair.fc1
    if type(fc1) is not nn.Linear:
        way = (
            "make its weight permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
            if hasattr(fc1, "parametrizations")
            else "put an nn.Linear with its weight and bias in its place, or leave it out (masks.only, layers)"
        )
        raise ValueError(f"{pair.name} is {type(fc1).__name__}, expected a plain nn.Linear layer: {way}")
    if "forward" in fc1.__dict__ and not calls_its_class(fc1):
        raise ValueError(
            f"{pair.name} has a forward of its own, put on the module by something else, which would compute the dense "
            "layer: take it off first (del layer.forward), specialise, and put it on again"
        )


def _rebind(module: nn.Linear) -> None:
    """Has a ``forward`` that accelerate put on a module (device maps, offloading) call the one of its class now."""
    if getattr(module.__dict__.get("_old_forward"), "__self__", None) is module:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def _fitting(model: nn.Module, masks: NeuronMasks, known: Mapping[str, FeedForward]) -> NeuronMasks:
    """The masks by the model's own names of layers; every named layer must be there, equally wide."""
    modules = dict(model.named_modules())
    if wrapped := [n for n in masks.layers if f"module.{n}" in modules or f"_orig_mod.{n}" in modules]:
        raise ValueError(f"the model is wrapped: specialise it first, then wrap or compile it ({wrapped[0]} is inside)")
    names = alike(masks.layers, known)
    if missing := [layer for layer in masks.layers if layer not in names]:
        raise ValueError(
            f"masks name layer {missing[0]!r}, which the model does not have; {nearest(missing[0], known)}"
        )
    masks = masks.renamed(names)
    for layer in masks.layers:
        width = len(masks[masks.tasks[0]][layer])
        if width != known[layer].d_ff:
            raise ValueError(
                f"masks are of another model: {layer} has d_ff={width} in the masks, {known[layer].d_ff} in the model"
            )
    return masks


def despecialize(model: nn.Module) -> nn.Module:
    """Makes the model plain again, in place: the same parameters, bitwise as they are now, and the same state dict.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is not specialised, or a layer was changed since in a way that cannot be undone here.
        RuntimeError: another thread has switched the model.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, TaskLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not specialised: call nspec.specialize(model, masks) first")
    for layer in layers:
        _check_undoable(layer)
    refuse_other_threads(layers)
    for switched in (module for module in modules if isinstance(module, TaskSwitched)):
        switched.set_task(None)
    for layer in layers:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        for name in _STATE:
            layer.__dict__.pop(name, None)
        _rebind(layer)
    for module in modules:
        module.__dict__.pop(PLACES, None)
        for name, value in module.__dict__.pop(_BEFORE, {}).items():
            setattr(module, name, value)
    return model


def _check_undoable(layer: TaskLinear) -> None:
    if type(layer) not in (TaskLinear, CompactFc1):
        raise ValueError(
            f"{layer.qualified_name} is a {type(layer).__name__} now: take off what was put on it since "
            "(torch.nn.utils.parametrize.remove_parametrizations), then despecialise"
        )
    if "forward" in layer.__dict__ and not calls_its_class(layer):
        raise ValueError(
            f"{layer.qualified_name} has a forward of its own, put on the module since it was specialised, which would go "
            "on calling the specialised one: take it off first (del layer.forward)"
        )


def merge(model: nn.Module, task: str) -> nn.Module:
    """A plain dense copy of the model that computes what ``task`` computes; ``model`` itself is not changed.

    In mode ``forward`` the masked rows of fc1.weight are zero in the copy; in mode ``update`` the forward pass is dense
    anyway, and the copy is the dense model.

    Raises:
        ValueError: the model is not specialised or was changed since, has no masks of that task, or a weight is made anew
            by a hook in each pass.
        TypeError: ``task`` is not the name of one.
    """
    if not isinstance(task, str):
        raise TypeError(f"task is {task!r}, expected the name of a task")
    check_task(task, specialized_layers(model))
    for module in model.modules():
        if isinstance(module, CompactFc1) and "weight" not in module._parameters:
            raise ValueError(
                f"the weight of {module.qualified_name} is made anew in each pass (prune, weight_norm, spectral_norm): "
                "make it permanent first (prune.remove, remove_weight_norm, remove_spectral_norm)"
            )
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, CompactFc1):
                active = module._sets[task].on(module.weight.device).active
                module.weight.masked_fill_(~active[:, None], 0)
    return despecialize(merged)
