"""Fine-tuning a few neurons: everything else of the model is frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspec.specialization.apply import check_plain, fitting
from nspec.specialization.feed_forward import FeedForward, features, is_linear
from nspec.specialization.layers import find_blocks
from nspec.specialization.masks import NeuronMasks
from nspec.specialization.naming import Layer
from nspec.specialization.patterns import matches, nearest
from nspec.specialization.quantised import check_differentiable, computes_itself, is_packed
from nspec.specialization.tasks import specialized_layers
from nspec.specialization.tuned import TRAINED, is_tuned

from .hooks import add_hooks
from .layers import (
    GATED,
    PLAIN,
    Tuning,
    Values,
    attach,
    base_values,
    index_in,
    layer_of,
    parameters_of,
    parts_of,
    prepare,
    tuned_layers,
)
from .sharing import check_apart


def finetune(
    model: nn.Module,
    masks: NeuronMasks,
    *,
    parts: Sequence[str] | None = None,
    biases: bool = True,
    dtype: torch.dtype | None = None,
    also: Iterable[str] = (),
    layers: Iterable[Layer] | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Gives the neurons of each task parameters of their own and freezes everything else. In place.

    Neuron i of a gated block is row i of gate and of up and column i of down; of a plain one, row i of fc1 (and its bias)
    and column i of fc2. Each part's numbers are one leaf of ``model.parameters()``, ``[k, d]``, columns transposed; of a
    fused projection ``[2k, d]``, gate first. They begin as what the base has, and their gradients are of that size, and
    so is what optimisers hold and processes exchange: any optimiser, clipping, accumulation, GradScaler, Trainer,
    DistributedDataParallel, FSDP2, checkpointing and ``torch.compile`` work as they do for other parameters.

    With one task the model computes with its neurons from now on, and ``nspec.task(model, None)`` with the base; with
    several, ``nspec.task(model, name)`` says with whose, or a list that of each sentence of a batch. Several in several
    processes need ``find_unused_parameters=True`` of DistributedDataParallel where a step has not all of them.

    Where one task computes, its rows are written into the weights of the base before each use, and the forward pass is
    that of the merged model, bit for bit; ``state_dict`` has them so. Batches of several tasks, packed weights, weights
    that train on (``also``) and compiled graphs compute the neurons beside the base, which differs by rounding.

    Args:
        model: any module with the blocks that ``masks`` names; not yet wrapped for distributed training or compiled.
            Weights may be packed (quantised).
        masks: the neurons of each task, none in a layer too; a task that has none at all is warned of. Where tasks share
            neurons, each gets its own numbers.
        parts: which parts of a neuron are trained: some of ``gate``, ``up`` and ``down``, or of ``fc1`` and ``fc2``; None:
            all.
        biases: whether the biases of gate, up and fc1 belong to the neuron. Those of down and fc2 belong to none.
        dtype: of the trained numbers; None: float32, or that of the weight where it is wider. The base keeps its dtype.
        also: modules or parameters that are trained in full: names, or patterns as in ``find_blocks``. They belong to the
            model, to no task: ``nspec.task(model, None)`` and ``nspec.despecialize`` leave what they have become, and
            ``nspec.save_neurons`` does not write them (``nspec.merge`` and ``state_dict`` have them).
        layers: as in ``nspec.specialize``.
        quiet: whether nothing is printed of how many numbers are trained.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: masks of another model or without a neuron; parts that no block has; a model that is specialised or
            wrapped; a layer that does not compute what a linear layer does, has a ``forward`` of its own, or is part of
            something else too, as is its weight or the memory of it (a whole block may be in several places); a 4-bit
            weight that was packed for inference; ``also`` that matches nothing; a dtype that is not floating.
        TypeError: ``masks`` is not a ``NeuronMasks``, ``dtype`` none of PyTorch's.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = NeuronMasks({"cy": {"0": torch.arange(8) < 2}})
        >>> model = finetune(model, masks, quiet=True)
        >>> {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'0.neurons.cy': [2, 4], '0.neuron_biases.cy': [2], '2.neurons.cy': [2, 4]}
    """
    if not isinstance(masks, NeuronMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected nspec.NeuronMasks")
    check_dtype(dtype)
    blocks, masks = tunable(model, masks, layers)
    used = [block for block in blocks if any(bool(masks[task][block.name].any()) for task in masks.tasks)]
    if not used:
        raise ValueError(f"masks have no neuron of {', '.join(masks.tasks)}: there is nothing to train")
    chosen = chosen_parts(used, parts)
    check_layers(model, used, chosen)
    check_differentiable(model)
    found = _found(model, also)
    tuning = Tuning(chosen, biases)
    if without := [task for task in masks.tasks if not any(bool(masks[task][block.name].any()) for block in used)]:
        warnings.warn(
            f"masks have no neuron of {', '.join(without)}: batches of that train none, and where also names nothing "
            "PyTorch says of their loss that it does not require grad. Leave them out, or select neurons for them",
            stacklevel=2,
        )
    freeze(model)
    for parameter in found:
        parameter.requires_grad_(True)
    prepare(model, used, tuning)
    for task in masks.tasks:
        index = {block.name: masks[task][block.name].nonzero().squeeze(1) for block in used}
        values = {b.name: initial(b, chosen[b.name], index[b.name], biases, dtype) for b in used if len(index[b.name])}
        attach(model, used, task, index, values, tuning, trained=True)
    default_task(model, masks.tasks)
    add_hooks(model)
    if not quiet and not (torch.distributed.is_available() and torch.distributed.is_initialized() and _rank() > 0):
        print(summary(model, masks.tasks, tuning))
    return model


def _rank() -> int:
    return torch.distributed.get_rank()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises TypeError or ValueError unless parameters may have that dtype; None: it is chosen."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, expected one of PyTorch's, such as torch.float32")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a floating one such as torch.float32")


def trained_dtype(layer: Any, given: torch.dtype) -> torch.dtype:
    """In which numbers are trained that are given in a dtype: float32, or that, or that of the weight, if it is wider."""
    wider = torch.promote_types(given, torch.float32)
    return wider if is_packed(layer) else torch.promote_types(wider, layer.weight.dtype)


def tunable(
    model: nn.Module, masks: NeuronMasks, layers: Iterable[Layer] | None
) -> tuple[list[FeedForward], NeuronMasks]:
    """The blocks that masks name, and the masks by the model's own names of them.

    Raises:
        ValueError: as of :func:`finetune`.
    """
    try:
        specialized_layers(model)
    except ValueError:
        pass
    else:
        what = "fine-tuned" if is_tuned(model) else "specialised"
        raise ValueError(f"the model is {what} already: call nspec.despecialize(model) first")
    known = {block.name: block for block in find_blocks(model, layers)}
    masks = fitting(model, masks, known)
    return [known[layer] for layer in known if layer in masks.layers], masks


def chosen_parts(blocks: Sequence[FeedForward], parts: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The parts of each block that are trained.

    Raises:
        ValueError: a part that no block has, or a block of which none is wanted.
        TypeError: ``parts`` is one text.
    """
    if parts is None:
        return {block.name: parts_of(block) for block in blocks}
    if isinstance(parts, str):
        raise TypeError(f"parts is {parts!r}, expected a list such as [{parts!r}]")
    for part in parts:
        if part not in (*GATED, *PLAIN):
            raise ValueError(f"parts has {part!r}, expected some of {', '.join(GATED)} or {', '.join(PLAIN)}")
    chosen = {block.name: tuple(part for part in parts_of(block) if part in parts) for block in blocks}
    for block in blocks:
        if not chosen[block.name]:
            kind = "gated" if block.gated else "not gated"
            raise ValueError(
                f"parts is {tuple(parts)}, and {block.name} is {kind}: expected some of {', '.join(parts_of(block))}"
            )
    return chosen


def check_layers(model: nn.Module, blocks: Sequence[FeedForward], parts: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError where a layer is not one whose rows or columns can be replaced."""
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        for part in parts[block.name]:
            if not is_packed(layer := layer_of(block, part)):
                check_plain(layer, names[id(layer)])
    check_apart(model, blocks, parts)


def _found(model: nn.Module, also: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that ``also`` names."""
    if isinstance(also, str):
        raise TypeError(f"also is {also!r}, expected a list of names such as [{also!r}]")
    found: list[nn.Parameter] = []
    for pattern in also:
        mine = [p for name, p in model.named_parameters(remove_duplicate=False) if matches(name, pattern)]
        if not mine:
            names = [name for name, _ in model.named_modules() if name]
            raise ValueError(f"also has {pattern!r}, which matches no parameter; {nearest(pattern, names)}")
        if packed := [p for p in mine if not p.is_floating_point() or computes_itself(p)]:
            what = type(packed[0]).__name__ if computes_itself(packed[0]) else packed[0].dtype
            raise ValueError(f"also has {pattern!r}, which matches a weight in {what}: it cannot be trained")
        found += mine
    return found


def initial(
    block: FeedForward, parts: Sequence[str], index: Tensor, biases: bool, dtype: torch.dtype | None
) -> dict[str, Values]:
    """What the base has for the neurons ``index`` of a block, by part, in the dtype in which they are trained."""
    found = {}
    for part in parts:
        rows, bias = base_values(layer_of(block, part), index_in(block, part, index), part not in ("down", "fc2"))
        wanted = dtype or trained_dtype(layer_of(block, part), rows.dtype)
        found[part] = Values(rows.to(wanted), bias.to(wanted) if biases and bias is not None else None)
    return found


def freeze(model: nn.Module) -> None:
    """Freezes every parameter, and remembers which were not."""
    for module in model.modules():
        names = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        if names:
            module.__dict__[TRAINED] = tuple(names)
        for name in names:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]


def default_task(model: nn.Module, tasks: Sequence[str]) -> None:
    """Has a model that has neurons of one task compute with them, and one that has several with the base."""
    for layer in tuned_layers(model):
        layer.set_task(tasks[0] if len(tasks) == 1 else None)


def summary(model: nn.Module, tasks: Sequence[str], tuning: Tuning) -> str:
    """One line: how many numbers are trained, and of how many."""
    own = {id(p) for p in parameters_of(model)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    packed: list[Any] = [module for module in model.modules() if is_linear(module) and is_packed(module)]
    base += sum(math.prod(features(layer)) - layer.weight.numel() for layer in packed)  # four bits: two numbers in one
    neurons = ", ".join(f"{sum(map(len, tuning.index[task].values())):,} of {task}" for task in tasks)
    also = f", and {others:,} of other modules" if others else ""
    return (
        f"training {trained:,} numbers beside a base of {base:,} ({trained / max(1, base):.2%}): the neurons {neurons} in "
        f"{len(tuning.parts)} blocks{also}"
    )
