"""The neurons that each direction of a run keeps, as the section ``select`` says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import nspec
from nspec.analysis.overlap import layer_side
from nspec.files import write_json
from nspec.mt.config import PARTS, SelectConfig
from nspec.mt.languages import languages_of_task
from nspec.mt.masked_loss import MaskedLoss
from nspec.mt.neuron_conflict import neuron_conflict
from nspec.mt.text.prepared import PreparedData
from nspec.run.config import Config
from nspec.run.loss_rule import CHOSEN, ByLoss
from nspec.run.systems import SELECT_USES
from nspec.specialization.ranking import largest
from nspec.terminal import Display

Conflict = Mapping[str, Mapping[str, torch.Tensor]]
_NO_CONFLICT = (
    "select.rule conflict: no neuron of {} would train better apart from the other directions; take another rule"
)


def way_of(task: str, pivot: str) -> str:
    """``from`` or ``to``: where a direction goes, seen from the pivot.

    Raises:
        ValueError: it does neither.
    """
    source, target = languages_of_task(task)
    if pivot not in (source, target):
        raise ValueError(
            f"direction {task} goes neither from nor to corpus.pivot ({pivot or 'empty'}), so none of the ks of parts of "
            "the model is its own: leave them out, or the direction"
        )
    return "from" if source == pivot else "to"


def select_neurons(
    counts: nspec.ActivationCounts,
    select: SelectConfig,
    pivot: str,
    seed: int = 0,
    by_loss: ByLoss | None = None,
    conflict: Conflict | None = None,
) -> nspec.NeuronMasks:
    """The masks of the directions, without the layers in which no direction is specialised.

    Args:
        counts: of the dense model.
        select: the rule and its numbers, and the layers.
        pivot: of the run's directions; needed with a k for single parts of the model.
        seed: of the rule random.
        by_loss: measures losses for the rule loss.
        conflict: of each direction at each neuron, for the rule conflict.

    Raises:
        ValueError: a pattern that matches no layer, a direction without a part, no layer that is left, or what
            :func:`nspec.select` raises.

    Warns:
        UserWarning: as :func:`nspec.select`.
    """
    if select.layers:
        try:
            counts = counts.only(select.layers)
        except ValueError as error:
            raise ValueError(f"select.layers: {error}") from None
    rule = select.sized_by
    if rule == "random":
        masks = nspec.select(counts, rule="random", share=select.share, seed=seed)
        return _of_directions(masks, select.directions, pivot)
    if rule == "loss":
        if by_loss is None:
            raise ValueError("select.rule loss measures the dense model: give by_loss")
        masks = by_loss.select(counts, select)
    elif rule == "conflict":
        if conflict is None:
            raise ValueError("select.rule conflict measures the dense model: give conflict")
        values = {task: {layer: conflict[task][layer] for layer in counts.layers} for task in counts.tasks}
        masks = largest(values, Fraction(repr(select.share)), by_layer=False, none=_NO_CONFLICT)
    elif rule == "share" and select.parts:
        masks = _by_parts(counts, select, pivot)
    else:
        options: dict[str, float] = {used: getattr(select, used) for used in SELECT_USES[rule] if used not in PARTS}
        masks = nspec.select(counts, rule=rule, **options)  # type: ignore[arg-type]
    masks = _of_directions(masks, select.directions, pivot)
    return nspec.random_masks(masks, seed) if select.rule == "random" else masks


def _of_directions(masks: nspec.NeuronMasks, way: str, pivot: str) -> nspec.NeuronMasks:
    """Without the neurons of the directions that do not go ``from`` or ``to`` the pivot; ``all``: as they are."""
    if way == "all":
        return masks
    return nspec.NeuronMasks(
        {
            task: {
                layer: mask if way_of(task, pivot) == way else torch.zeros_like(mask) for layer, mask in layers.items()
            }
            for task, layers in masks.items()
        }
    )


def _by_parts(counts: nspec.ActivationCounts, select: SelectConfig, pivot: str) -> nspec.NeuronMasks:
    """By the rule share, each part of the model with its own k."""
    sides = {layer: layer_side(layer) for layer in counts.layers}
    kept: dict[str, dict[str, torch.Tensor]] = {task: {} for task in counts.tasks}
    dense = set(counts.layers)
    for task in counts.tasks:
        way = way_of(task, pivot)
        for layer in counts.layers:
            count = counts[task][layer]
            if getattr(select, f"k_{way}_{sides[layer]}") == 1:
                kept[task][layer] = torch.ones(len(count), dtype=torch.bool)
                continue
            dense.discard(layer)
            alone = nspec.ActivationCounts({task: {layer: count}})
            kept[task][layer] = nspec.select(alone, select.k_of(way, sides[layer]))[task][layer]
    if not (left := [layer for layer in counts.layers if layer not in dense]):
        parts = ", ".join(f"select.{name}" for name in select.parts)
        raise ValueError(f"{parts}: no layer is left in which a direction is specialised; give one of them a k below 1")
    return nspec.NeuronMasks({task: {layer: masks[layer] for layer in left} for task, masks in kept.items()})


def select_into(
    folder: Path,
    counts: Path,
    config: Config,
    dense: Callable[[], Any],
    data: Callable[[], PreparedData],
    display: Display,
) -> None:
    """Selects the neurons of a system and writes them into a folder, with what the rule loss has measured.

    Args:
        folder: where the masks go.
        counts: the folder with the activation counts.
        config: of the system.
        dense: loads the dense model, for the rules loss and conflict.
        data: loads the prepared text, likewise.
        display: is told how many neurons are kept, and shows progress.

    Raises:
        ValueError: see :func:`select_neurons`.
    """
    found, select = nspec.ActivationCounts.load(counts), config.select
    measured: ByLoss | None = None
    conflict: Conflict | None = None
    with warnings.catch_warnings(record=True) as said, ExitStack() as shown:
        warnings.simplefilter("always", UserWarning)
        if select.sized_by == "loss":
            loss = MaskedLoss(dense(), data(), config.train.batch_tokens, config.profile.sentences)
            measured = ByLoss(loss, shown.enter_context(display.bar("select", "parts")))
        elif select.sized_by == "conflict":
            progress = shown.enter_context(display.bar("select", "directions"))
            text = config.profile.split, config.profile.sentences, config.profile.share
            conflict = neuron_conflict(dense(), data(), config.train.batch_tokens, *text, progress)
        masks = select_neurons(found, select, config.corpus.pivot, config.run.seed, measured, conflict)
    for warning in said:
        display.line(f"  {warning.message}")
    masks.save(folder)
    if measured is not None:
        write_json(folder / CHOSEN, measured.record)
    shares = [share for layers in masks.density().values() for share in layers.values()]
    some = len(masks.layers) < len(found.layers) or select.layers
    of = f" of {len(masks.layers)} of {len(found.layers)} layers" if some else ""
    display.line(f"  a direction keeps {sum(shares) / len(shares):.1%} of the neurons{of} on average")
