"""Taking neurons with parameters of their own off a model, and folding one task's into plain weights."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nspec.nn.state import Around
from nspec.nn.tuned_block import TunedBlock, untuned_block
from nspec.nn.tuned_linear import TunedLayer, untuned

from .quantised import kind_of
from .tasks import calls_its_class, refuse_other_threads

TRAINED = "_nspec_trained"
"""On a module of which parameters were frozen: their names."""


class TuningHook:
    """A forward hook that fine-tuning put on a module; see :func:`nspec.finetune`."""


def is_tuned(model: nn.Module) -> bool:
    """Whether a model has layers whose neurons have parameters of their own."""
    return any(isinstance(module, TunedLayer) for module in model.modules())


def take_off(model: nn.Module, task: str | None = None) -> nn.Module:
    """Makes a model plain in place: the base as it was, or with the rows of a task in its weights.

    Raises:
        ValueError: a weight is sharded or elsewhere now, or something was put on a layer since.
        RuntimeError: another thread has switched the model.
    """
    layers = [module for module in model.modules() if isinstance(module, TunedLayer)]
    for layer in layers:
        _check_undoable(layer)
    refuse_other_threads(layers)
    with torch.no_grad():
        for layer in layers:
            if layer.is_writable():
                layer.bring_anew(None if task is None else layer._nspec.sets[task])
    for module in list(model.modules()):
        if isinstance(module, TunedBlock):
            untuned_block(module)
        if isinstance(module, TunedLayer):
            untuned(module)
            rebind(module)
        for name in module.__dict__.pop(TRAINED, ()):
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, TuningHook)]:
            del module._forward_hooks[key]
    restore_modules(model.modules())
    return model


def fold(model: nn.Module, task: str) -> nn.Module:
    """A plain copy of a model whose weights hold the rows of a task.

    Raises:
        ValueError: as of :func:`take_off`, or a weight is packed.
    """
    for layer in (module for module in model.modules() if isinstance(module, TunedLayer)):
        if layer._nspec.sets[task] is not None and not layer.is_writable():
            raise ValueError(
                f"the weight of {layer.qualified_name} is {_kind(layer)}, and rows cannot be written into it: save the "
                "neurons (nspec.save_neurons), load the base in floating point, put them there (nspec.load_neurons(base, "
                "folder, verify=False)), and merge that"
            )
    return take_off(copy.deepcopy(model), task)


def restore_modules(modules: Iterable[nn.Module]) -> None:
    """Gives modules the attributes back that were changed."""
    for module in modules:
        if isinstance(around := module.__dict__.get("_nspec"), Around):
            del module.__dict__["_nspec"]
            for name, before in around.before.items():
                setattr(module, name, *before) if before else delattr(module, name)


def rebind(module: nn.Module) -> None:
    """Has a ``forward`` that accelerate put on a module (device maps, offloading) call the one of its class now."""
    if getattr(module.__dict__.get("_old_forward"), "__self__", None) is module:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def _check_undoable(layer: Any) -> None:
    if "forward" in layer.__dict__ and not calls_its_class(layer):
        raise ValueError(
            f"{layer.qualified_name} has a forward of its own, put on the module since, which would go on calling the "
            "layer as it is: take it off first (del layer.forward)"
        )
    if hasattr(layer.weight, "placements") or layer.weight.is_meta:
        raise ValueError(
            f"the weight of {layer.qualified_name} is {_kind(layer)}: save the neurons (nspec.save_neurons), load the base "
            "anew, and nspec.load_neurons there"
        )


def _kind(layer: Any) -> str:
    weight = layer.weight
    return "sharded" if hasattr(weight, "placements") else "elsewhere (meta)" if weight.is_meta else kind_of(layer)
