"""What a merged model is: how wide its layers are, which share of the neurons it keeps, and a model card that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

import nspec
from nspec.nn.task_layers import TaskLayer
from nspec.specialization.feed_forward import features
from nspec.specialization.layers import find_blocks
from nspec.specialization.naming import Layer
from nspec.specialization.tasks import check_task, specialized_layers
from nspec.tuning.layers import tuned_layers


def widths(model: nn.Module, layers: Iterable[Layer] | None = None) -> dict[str, int]:
    """The number of neurons of each feed-forward block, by the name of fc1, in the order of the model.

    Args:
        model: any plain module, merged or not.
        layers: as of :func:`nspec.specialize`, for blocks that are not found by structure and name.

    Raises:
        ValueError: no blocks are found.

    Example:
        >>> from nspec.serving import widths
        >>> widths(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        {'0': 8}
    """
    return {block.name: block.d_ff for block in find_blocks(model, layers)}


def densities(model: nn.Module, task: str) -> dict[str, float]:
    """The share of the neurons of each block with masks that ``task`` keeps, by the name of fc1.

    Args:
        model: specialised, in either mode; of a model with neurons of their own it is empty.
        task: its name.

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.

    Example:
        >>> from nspec.serving import densities
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> densities(model, "en-de")
        {'0': 0.75}
    """
    return {name: kept / max(1, d_ff) for name, (kept, d_ff) in _kept(model, task).items()}


def model_card(
    model: nn.Module,
    task: str,
    merged: nn.Module,
    *,
    base: str | None = None,
    languages: Iterable[str] = (),
    text: str = "",
) -> str:
    """A model card in Markdown, the ``README.md`` of a folder: the task, each layer's density and width, how it was made.

    Args:
        model: specialised, or with neurons of their own.
        task: that was merged.
        merged: what :func:`nspec.merge` made of it.
        base: the model that was specialised: a name on the hub, or a path, whose end alone is told
            (:func:`base_name`).
        languages: codes of languages (``["en", "de"]``).
        text: Markdown that follows the first paragraph, such as how to use it.

    Returns:
        The text, which ends with a newline.

    Raises:
        ValueError: the model is not specialised, or has no masks of that task.

    Example:
        >>> from nspec.serving import model_card
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> card = model_card(model, "en-de", nspec.merge(model, "en-de", compact=True))
        >>> card.splitlines()[-1]
        '| `0` | 8 | 6 | 0.750 | 6 |'
    """
    kept = _kept(model, task)
    head = ["---", "tags:", "- neuron-specialization"]
    head += [f"base_model: {_quoted(base)}"] if base and _on_hub(base) else []
    head += ["language:", *(f"- {_quoted(code)}" for code in languages)] if (languages := list(languages)) else []
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, merged))
    lines = [*head, "---", "", f"# {task}", "", _told(model, task, bool(kept), base), ""]
    lines += [text.strip(), ""] if text.strip() else []
    if not kept:
        return "\n".join([*lines, f"It has {after:,} parameters.", ""])
    neurons, of = (sum(counts) for counts in zip(*kept.values()))
    lines += [
        f"{task} keeps {neurons:,} of {of:,} feed-forward neurons (density {neurons / max(1, of):.3f}). The model has "
        f"{after:,} parameters, the dense one {before:,}.",
        "",
        "| layer | neurons, dense | kept | density | neurons here |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (count, d_ff) in kept.items():
        here = _width(merged, name, d_ff, model.get_submodule(name))
        lines.append(f"| `{name}` | {d_ff} | {count} | {count / max(1, d_ff):.3f} | {here} |")
    return "\n".join([*lines, ""])


def base_name(base: str) -> str:
    """What others are told of a model: its name on the hub; of a path, which is of this machine, its end.

    That is the folder's name; within a folder of a run (one with a ``config.yaml``) the way from that.
    """
    if _on_hub(base):
        return base
    path = Path(base).expanduser().resolve()
    run = next((place for place in path.parents if (place / "config.yaml").is_file()), path)
    return path.relative_to(run.parent).as_posix()


def _on_hub(base: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) is not None and not Path(base).exists()


def _told(model: nn.Module, task: str, masked: bool, base: str | None) -> str:
    """How the model was made, in a sentence or two."""
    of = f" of `{base_name(base)}`" if base else ""
    forward = any(isinstance(layer, TaskLayer) and layer.mode == "forward" for layer in model.modules())
    if not masked and not any(layer._nspec.sets.get(task) is not None for layer in tuned_layers(model)):
        what = f"The shared weights{of}: the task {task} has no neurons of its own"
    elif not masked:
        what = f"The weights{of} with the neurons that were fine-tuned for the task {task} in their places"
    elif forward:
        what = f"The feed-forward neurons{of} that the task {task} keeps; those that it masks give constants"
    else:
        what = f"The weights{of} as they were trained with sparse updates of each task's neurons; all neurons compute"
    return (
        f"{what}. Made by `nspec.merge` of nspec {nspec.__version__} (neuron specialisation, Tan et al., EMNLP 2024)."
    )


def _kept(model: nn.Module, task: str) -> dict[str, tuple[int, int]]:
    """How many neurons of how many the task keeps, by the name of fc1."""
    check_task(task, specialized_layers(model))
    found: dict[str, tuple[int, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TaskLayer) and layer._nspec.beside is not None:
            active = layer._nspec.sets[task].active
            active = active[: len(active) // 2] if layer._nspec.doubled and layer.mode == "update" else active
            found[name] = int(active.sum()), len(active)
    return found


def _width(merged: nn.Module, name: str, d_ff: int, before: Any) -> int:
    """The number of neurons that the block called ``name`` has in a merged model."""
    return features(merged.get_submodule(name))[1] * d_ff // max(1, features(before)[1])


def _quoted(value: str | None) -> str:
    """A text of YAML."""
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
