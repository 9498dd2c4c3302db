"""Putting masks on a model, and taking them off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nspec.nn.ffn import CompactConv1D, CompactFc1
from nspec.nn.masked_linear import Masked, Mode, check_mode
from nspec.nn.state import Around
from nspec.nn.switched import Shared, TaskSwitched
from nspec.nn.task_layers import TaskConv1D, TaskLayer, TaskLayerState, TaskLinear

from . import own_gradients
from .feed_forward import FeedForward, features, is_linear, is_transposed
from .layers import (
    activation_dropouts,
    batch_dim_of,
    computes_linear,
    fast_paths,
    find_blocks,
    flattens,
    is_routed,
)
from .masks import NeuronMasks
from .naming import Layer
from .patterns import alike, nearest
from .tasks import calls_its_class, refuse_other_threads, remember_place
from .tuned import is_tuned, rebind, restore_modules, take_off


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

    In mode ``forward`` what runs between the layers of a block (the activation, hooks on it or on the layers) gets a value
    that stands for the activations and takes elementwise functions of any kind: anything else there is an error in every
    pass, not a number. The value is no ``torch.Tensor``: code that asks so (``isinstance``, ``torch.is_tensor``) takes its
    other branch there, of which nothing can tell. Of a gated block the rows of gate and up are masked; both biases stay.

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
            names); a model that is specialised already; a layer that does not compute what ``nn.Linear`` or ``Conv1D``
            does; in mode ``forward`` a layer that is in two blocks, an activation dropout above 0, unless the block has no
            biases, or a block that gives its activations to a ``torch.autograd.Function`` (kernels that Liger puts in
            place of a layer's forward).
        TypeError: ``masks`` is not a ``NeuronMasks``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}})
        >>> model = nspec.specialize(model, masks, mode="forward")
        >>> with nspec.task(model, "en-de"):
        ...     model(torch.randn(3, 4)).sum().backward()
        >>> int(model[0].weight.grad[6:].count_nonzero())  # the rows of other neurons get no gradient
        0
    """
    check_mode(mode)
    if not isinstance(masks, NeuronMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected nspec.NeuronMasks")
    if activation_dropout not in (None, 0):
        raise ValueError(f"activation_dropout is {activation_dropout}, expected 0 (switch it off) or None (leave it)")
    if any(isinstance(module, TaskLayer) for module in model.modules()) or is_tuned(model):
        raise ValueError("the model is specialised already: call nspec.despecialize(model) first")
    known = {block.name: block for block in find_blocks(model, layers)}
    masks = fitting(model, masks, known)
    blocks = [known[layer] for layer in masks.layers]
    if mode == "forward":
        _check_apart(blocks)
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        for layer in projections(block):
            check_plain(layer, names[id(layer)])
        if mode == "forward" and activation_dropout is None:
            _check_dropout(block)
    changes = fast_paths(model, blocks)
    if mode == "forward":
        ordinary = [change for block in blocks for change in own_gradients.ordinary(block)]
        for block in blocks:
            own_gradients.check(block, [module for module, _, _ in ordinary])
        changes += ordinary
        changes += [(module, name, 0.0) for block in blocks for module, name, _ in _dropouts(block, activation_dropout)]
    for module, name, value in changes:
        change(module, name, value)
    shared = Shared()
    for block in blocks:
        first: TaskLayer | None = None
        for layer in projections(block):
            _turn(layer, mode, block)
            assert isinstance(layer, TaskLayer)
            if first is None:
                parts = (block.parent, block.up, block.fc2)
                layer._nspec.beside = tuple(None if part is None else names[id(part)] for part in parts)
            layer.add_tasks(
                {task: masks[task][block.name] for task in masks.tasks},
                names[id(layer)],
                shared=shared,
                first=first is None and block is blocks[0],
                routed=is_routed(model, block.name),
                batch_dim=batch_dim_of(model, block),
                flattens=flattens(block),
                with_layer=first,
            )
            first = first or layer
            rebind(layer)
            remember_place(model, layer.qualified_name)
    return model


def _check_apart(blocks: Sequence[FeedForward]) -> None:
    """Raises ValueError where a layer is the last of one block and a projection of another: it gets no tensor then."""
    last = {id(block.fc2): block for block in blocks}
    for block in blocks:
        if (before := next((last[id(layer)] for layer in projections(block) if id(layer) in last), None)) is not None:
            raise ValueError(
                f"{block.name} is in two blocks, as fc2 of that of {before.name} and as a projection of its own, and mode "
                f"'forward' computes each block as one: leave one of them out (masks.only([{before.name!r}, ...])), or use "
                "mode='update'"
            )


def change(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of a module until :func:`despecialize`."""
    before = (module.__dict__[name],) if name in module.__dict__ else ()
    Around.of(module).before.setdefault(name, before)
    setattr(module, name, value)


def projections(block: FeedForward) -> list[nn.Module]:
    """The layers of a block whose rows are masked: fc1, and up where that is another."""
    return [block.fc1] if block.up is None else [block.fc1, block.up]


def _turn(layer: nn.Module, mode: Mode, block: FeedForward) -> None:
    """Makes a layer one of those that know tasks."""
    plain = type(layer)
    if is_transposed(layer):
        layer.__class__ = TaskConv1D if mode == "update" else CompactConv1D
    else:
        layer.__class__ = TaskLinear if mode == "update" else CompactFc1
    assert isinstance(layer, TaskLayer)
    before = None if plain is nn.Linear else plain
    layer._attach(TaskLayerState(mode, gated=block.gated, doubled=block.fused, plain=before))


def _dropouts(block: FeedForward, rate: float | None) -> list[tuple[Any, str, str]]:
    """The dropouts of a block that are set to 0: on request those that are known, else none."""
    return [] if rate is None else activation_dropouts(block)


def _check_dropout(block: FeedForward) -> None:
    """Raises ValueError where activations are dropped out, and neurons that are not active give constants."""
    if all(layer.bias is None for layer in projections(block)):
        return  # they give 0, or the first pass says that they do not
    for module, attribute, shown in activation_dropouts(block):
        if (rate := getattr(module, attribute)) > 0:
            raise ValueError(
                f"{block.name}: {shown} is {rate}, expected 0 in mode 'forward' (the output of a masked neuron is a "
                "constant, and the method trains without it). Set it to 0, which nspec.specialize(..., "
                "activation_dropout=0) does, or use mode='update'"
            )


def check_plain(layer: Any, name: str) -> None:
    """Raises ValueError unless a layer computes what ``nn.Linear`` or ``Conv1D`` does, by its class."""
    if type(layer) is not nn.Linear:
        way: str | None = "put an nn.Linear with its weight and bias in its place, or leave it out (masks.only, layers)"
        if is_linear(layer) and not isinstance(layer, Masked | TaskSwitched):
            way = computes_linear(layer) or _needs_its_class(layer)
        if way is not None:
            raise ValueError(f"{name} is {type(layer).__name__}, expected a plain nn.Linear layer: {way}")
    if "forward" in layer.__dict__ and not calls_its_class(layer):
        raise ValueError(
            f"{name} has a forward of its own, put on the module by something else, which would compute the dense "
            "layer: take it off first (del layer.forward), specialise, and put it on again"
        )


def _needs_its_class(layer: Any) -> str | None:
    """Why the ``forward`` of a layer's class cannot run on a layer of another class, as it does without a task."""
    other: Any = nn.Module() if is_transposed(layer) else nn.Linear(1, 1, device="meta")
    other.__dict__.update(layer.__dict__)
    x = torch.zeros(1, features(layer)[0], device=layer.weight.device, dtype=layer.weight.dtype)
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for other.training in (True, False):
            try:
                type(layer).forward(other, x)
            except (AttributeError, TypeError) as error:
                return (
                    "its forward calls super() or methods of its class, and the layer is of another once it is "
                    f"specialised ({error}). Use nn.functional.linear there with self.weight and self.bias, or put an "
                    "nn.Linear in its place"
                )
    return None


def fitting(model: nn.Module, masks: NeuronMasks, known: Mapping[str, FeedForward]) -> NeuronMasks:
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

    Of a model with neurons of their own (``nspec.finetune``, ``nspec.load_neurons``) it is the base, bitwise as it was,
    with the modules of ``also`` as they are trained; the neurons are gone: save them first (``nspec.save_neurons``).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is not specialised, or a layer was changed since in a way that cannot be undone here.
        RuntimeError: another thread has switched the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> before = model(torch.ones(1, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> model = nspec.despecialize(model)
        >>> type(model[0]) is nn.Linear, torch.equal(model(torch.ones(1, 4)), before)
        (True, True)
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, TaskLayer)]
    if is_tuned(model):
        return take_off(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} is not specialised: call nspec.specialize(model, masks) first")
    for layer in layers:
        _check_undoable(layer)
    refuse_other_threads(layers)
    for switched in (module for module in modules if isinstance(module, TaskSwitched)):
        switched.set_task(None)
    for layer in layers:
        plain: Any = layer.__dict__.pop("_nspec").plain or nn.Linear
        layer.__class__ = plain
        rebind(layer)
    restore_modules(modules)
    return model


def _check_undoable(layer: TaskLayer) -> None:
    if type(layer) not in (TaskLinear, CompactFc1, TaskConv1D, CompactConv1D):
        raise ValueError(
            f"{layer.qualified_name} is a {type(layer).__name__} now: take off what was put on it since "
            "(torch.nn.utils.parametrize.remove_parametrizations), then despecialise"
        )
    if "forward" in layer.__dict__ and not calls_its_class(layer):
        raise ValueError(
            f"{layer.qualified_name} has a forward of its own, put on the module since it was specialised, which would go "
            "on calling the specialised one: take it off first (del layer.forward)"
        )
