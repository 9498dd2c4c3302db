"""Putting neurons with parameters of their own on the blocks of a model, and taking them off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nspec.nn.neurons import NeuronSet
from nspec.nn.switched import Shared
from nspec.nn.tuned_block import TunedBlock, recognised, tuned_block
from nspec.nn.tuned_linear import TunedLayer, tuned
from nspec.specialization.apply import change
from nspec.specialization.feed_forward import FeedForward, features, is_transposed
from nspec.specialization.layers import batch_dim_of, fast_paths, flattens, is_routed
from nspec.specialization.quantised import is_packed, packed_rows
from nspec.specialization.tasks import remember_place
from nspec.specialization.tuned import rebind

GATED, PLAIN = ("gate", "up", "down"), ("fc1", "fc2")


class Values(NamedTuple):
    """What the neurons of a task are in one part of a block.

    Attributes:
        rows: ``[k, d]``.
        bias: ``[k]``, or None.
    """

    rows: Tensor
    bias: Tensor | None


class Tuning(Shared):
    """What the layers of a fine-tuned model have in common.

    Attributes:
        parts: of each block, which of them have parameters.
        biases: whether biases belong to a neuron.
        index: the neurons of each task and block, int64 ``[k]``.
        places: of each block and part: the name of its layer, and how many parts precede it there.
        sizes: ``d_ff`` and ``d_model`` of each block.
        dtypes: of the base's weights by block and part; "" where they are packed.
    """

    def __init__(self, parts: Mapping[str, tuple[str, ...]], biases: bool) -> None:
        super().__init__()
        self.parts, self.biases = dict(parts), biases
        self.index: dict[str, dict[str, Tensor]] = {}
        self.places: dict[str, list[tuple[str, str, int]]] = {}
        self.sizes: dict[str, list[int]] = {}
        self.dtypes: dict[str, dict[str, str]] = {}


def parts_of(block: FeedForward) -> tuple[str, ...]:
    """The names of a block's parts."""
    return GATED if block.gated else PLAIN


def layer_of(block: FeedForward, part: str) -> nn.Module:
    """The linear layer that a part of a block is in."""
    if part in ("down", "fc2"):
        return block.fc2
    return block.up if part == "up" and block.up is not None else block.fc1


def index_in(block: FeedForward, part: str, index: Tensor) -> Tensor:
    """Where the neurons ``index`` of a block are in the layer of a part: behind those of gate where that is fused."""
    return index + block.d_ff if part == "up" and block.fused else index


def base_values(layer: Any, index: Tensor, outputs: bool) -> tuple[Tensor, Tensor | None]:
    """What a layer has for the neurons ``index``: rows ``[k, d]``, transposed of a last layer, and of outputs the bias."""
    if is_packed(layer):
        rows = packed_rows(layer, index, outputs)
    else:
        dim = int(outputs == is_transposed(layer))
        rows = layer.weight.detach().index_select(dim, index.to(layer.weight.device))
        rows = rows.t().contiguous() if dim == 1 else rows
    bias = (
        layer.bias.detach().index_select(0, index.to(layer.bias.device)) if outputs and layer.bias is not None else None
    )
    return rows.clone(), bias


def prepare(model: nn.Module, blocks: Sequence[FeedForward], tuning: Tuning) -> None:
    """Turns the layers of blocks into ones that know tasks. They have no neurons of their own yet.

    What was changed on the model's modules is remembered for :func:`nspec.despecialize`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for module, attribute, value in fast_paths(model, blocks):
        change(module, attribute, value)
    first = True
    for block in blocks:
        around = _around(block)
        in_layer: dict[str, int] = {}
        places = tuning.places[block.name] = []
        for part in tuning.parts[block.name]:
            of: Any = layer_of(block, part)
            name = names[id(of)]
            places.append((part, name, in_layer.setdefault(name, 0)))
            in_layer[name] += 1
            dtype = "" if is_packed(of) else str(of.weight.dtype).removeprefix("torch.")
            tuning.dtypes.setdefault(block.name, {})[part] = dtype
        tuning.sizes[block.name] = [block.d_ff, features(block.fc1)[0]]
        taken = {id(layer_of(block, part)) for part in tuning.parts[block.name]}
        taken |= {id(layer) for layer in (block.fc1, block.up, block.fc2) if around is not None}
        for layer, outputs in ((block.fc1, True), (block.up, True), (block.fc2, False)):
            if (
                layer is None or id(layer) not in taken or isinstance(layer, TunedLayer)
            ):  # blocks may share what is not chosen
                continue
            turned = tuned(layer, names[id(layer)], outputs, tuning)
            rebind(layer)
            kept = turned._nspec
            kept.first, first = first, False
            kept.routed, kept.batch_dim = is_routed(model, block.name), batch_dim_of(model, block)
            kept.flattens = flattens(block)
            remember_place(model, turned.qualified_name)
        if around is not None:
            module, *about = around
            tuned_block(module, *about)


def _around(block: FeedForward) -> Any:
    """The module around a block that can be computed at once, and what it is; None where there is none."""
    if isinstance(block.parent, TunedBlock):
        return None
    found = recognised(block.parent, _layers(block), block.gated)
    return None if found is None else (block.parent, *found, block.gated)


def attach(
    model: nn.Module,
    blocks: Sequence[FeedForward],
    task: str,
    index: Mapping[str, Tensor],
    values: Mapping[str, Mapping[str, Values]],
    tuning: Tuning,
    trained: bool,
) -> None:
    """Gives the neurons of a task parameters of their own.

    Args:
        model: with layers that :func:`prepare` made.
        blocks: of it.
        task: a new one.
        index: the neurons of each block, int64 ``[k]``.
        values: of each block and part.
        tuning: what the layers have in common.
        trained: whether the parameters require gradients.
    """
    tuning.index[task] = dict(index)
    for known in tuned_layers(model):
        known._nspec.sets.setdefault(task, None)
    for block in blocks:
        chosen = index[block.name]
        if not len(chosen):
            continue
        parts = tuning.parts[block.name]
        for own in ([part for part in parts if layer_of(block, part) is one] for one in _layers(block)):
            if not own:
                continue
            layer: Any = layer_of(block, own[0])
            outputs = own[0] not in ("down", "fc2")
            where = torch.cat([index_in(block, part, chosen) for part in own])
            base, base_bias = base_values(layer, where, outputs)
            packed = is_packed(layer)
            own_values = [values[block.name][part] for part in own]
            device = layer.weight.device
            layer._nspec.sets[task] = NeuronSet(task, where.to(device), None if packed else base, base_bias)
            layer.neurons.add(task, torch.cat([one.rows for one in own_values]).to(device), trained)
            biases = [one.bias for one in own_values if one.bias is not None]
            if biases:
                layer.neuron_biases.add(task, torch.cat(biases).to(device), trained)
            if layer.is_writable():
                layer.look()


def _layers(block: FeedForward) -> list[nn.Module]:
    return [layer for layer in (block.fc1, block.up, block.fc2) if layer is not None]


def tuned_layers(model: nn.Module) -> list[TunedLayer]:
    """The layers of a model that have, or may have, neurons with parameters of their own."""
    return [module for module in model.modules() if isinstance(module, TunedLayer)]


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of neurons of a model."""
    for layer in tuned_layers(model):
        yield from layer.neurons.parameters()
        yield from layer.neuron_biases.parameters()
