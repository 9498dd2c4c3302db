"""Language activation probability entropy (LAPE, Tang et al. 2024): its rule, and its files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .counts import ActivationCounts
from .layers import find_blocks
from .masks import NeuronMasks
from .naming import Layer

_QUANTILE = 0.95


def lape(counts: ActivationCounts, rate: float) -> NeuronMasks:
    """The neurons of the whole model that fire for few tasks and often for those, as the authors' release selects them.

    With p the share of tokens of a task that fire a neuron, q = p over the sum of the tasks' p (0 where that is 0), and the
    entropy - sum q ln q: a neuron is out unless p > tau for some task, where tau is the round(0.95 n)-th smallest of all n
    probabilities (neurons times tasks). Of the others those of the round(rate * neurons) smallest entropies are kept, over
    all layers; ties (entropies that agree to 12 decimals) go to the earlier layer, then to the lower index. A kept neuron
    is of every task with p > tau.

    So a task may have none, in a layer or at all, and neurons may be of several. A neuron that never fires has entropy 0
    and is out by tau. Probabilities of a layer without tokens are 0. Rounding is Python's, of the product in floating
    point, as in the release. The order of the tasks does not matter.

    Args:
        counts: of two tasks or more, with their numbers of tokens.
        rate: in (0, 1].

    Raises:
        ValueError: there is one task; a number of tokens is not known, or 0; the rate is of no neuron; no neuron is left.

    Warns:
        UserWarning: where fewer neurons are left than the rate asks for, and where a task has none.
    """
    tasks = counts.tasks
    if len(tasks) < 2:
        raise ValueError("rule 'lape' compares tasks, and the counts have one: profile several")
    rates = counts.rates()
    if empty := [task for task in tasks if not counts.tokens[task]]:
        raise ValueError(
            f"no token of task {empty[0]} was counted, so its probabilities are not known: profile it on text"
        )
    p = torch.stack([torch.cat([*rates[task].values()]) for task in tasks], 1)
    neurons = len(p)
    wanted = round(neurons * rate)
    if not wanted:
        raise ValueError(f"rate {rate} of {neurons} neurons is less than one: take a higher rate")
    tau = p.flatten().kthvalue(round(p.numel() * _QUANTILE)).values
    above = p > tau
    entropy = _entropy(p).masked_fill(~above.any(1), float("inf"))
    order = torch.sort(entropy, stable=True).indices[:wanted]
    kept = torch.zeros(neurons, dtype=torch.bool).index_fill_(0, order, True) & torch.isfinite(entropy)
    if not bool(kept.any()):
        raise ValueError(
            f"no neuron fires for a task more often than {float(tau):.3g} of its tokens, the 95 % quantile of all "
            "probabilities, so none is selected: profile more text"
        )
    if (left := int(kept.sum())) < wanted:
        warnings.warn(
            f"rule 'lape' keeps {left} neurons, expected {wanted} (rate {rate} of {neurons}): no other fires for a task "
            f"more often than {float(tau):.3g} of its tokens, the 95 % quantile of all probabilities",
            UserWarning,
            stacklevel=3,
        )
    widths = [len(rate_of) for rate_of in rates[tasks[0]].values()]
    chosen = (kept.unsqueeze(1) & above).unbind(1)
    _warn_of_none(tasks, chosen, stacklevel=4)
    return NeuronMasks({task: dict(zip(rates[task], mask.split(widths))) for task, mask in zip(tasks, chosen)})


def _entropy(p: Tensor) -> Tensor:
    """Of the tasks' shares of each neuron's probabilities, float64 ``[neurons]`` to 12 decimals; 0 where it never fires."""
    p = p.sort(1).values  # equal for equal probabilities, whatever task has which
    total = p.sum(1, keepdim=True)
    q = torch.where(total > 0, p / total, 0)
    return (-torch.xlogy(q, q).sum(1)).round(decimals=12)


def _warn_of_none(tasks: Sequence[str], masks: Iterable[Tensor], stacklevel: int) -> None:
    if none := [task for task, mask in zip(tasks, masks) if not bool(mask.any())]:
        warnings.warn(f"no neuron is of {', '.join(none)}", UserWarning, stacklevel=stacklevel)


def load_lape(
    path: str | os.PathLike[str], tasks: Sequence[str], model: nn.Module, *, layers: Iterable[Layer] | None = None
) -> NeuronMasks:
    """Reads the neurons that releases of LAPE keep in ``.pth`` files: ``list[language][layer]``, int64 indices, ascending.

    The file names neither languages nor layers. It may have fewer lists than there are languages: those that are missing
    are of the last ones, which got no neuron. It is read without running code from it (``weights_only``).

    Args:
        path: the file.
        tasks: the names of the languages, in the order in which they were selected.
        model: that of the file, whose feed-forward blocks are the layers in their order. Its weights are not read.
        layers: as in ``find_blocks``; None takes all blocks.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it cannot be read, or is no such list; it has more languages than ``tasks``, another number of layers
            than the model, or indices that are not ascending or not below d_ff; a task is named twice.
        TypeError: ``tasks`` is a text, or has something else than names.

    Warns:
        UserWarning: where a task has no neuron.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save([[torch.tensor([0, 3])], [torch.tensor([3])]], file.name)
        ...     masks = load_lape(file.name, ["cy", "lv"], model)
        >>> {task: layers["0"].nonzero().flatten().tolist() for task, layers in masks.items()}
        {'cy': [0, 3], 'lv': [3]}
    """
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"tasks is {tasks!r}, expected a list of the names of the languages, in the order of the file")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks is {list(tasks)}, expected one or more different names")
    widths = {block.name: block.d_ff for block in find_blocks(model, layers)}
    lists = _read(path)
    if len(lists) > len(tasks):
        raise ValueError(
            f"{path} has neurons of {len(lists)} languages, but {len(tasks)} are named: {', '.join(tasks)}"
        )
    masks = {task: {layer: torch.zeros(d_ff, dtype=torch.bool) for layer, d_ff in widths.items()} for task in tasks}
    for task, indices in zip(tasks, lists):
        if len(indices) != len(widths):
            raise ValueError(
                f"{path} has {len(indices)} layers for {task}, but the model {len(widths)} feed-forward blocks: give the "
                "model of the file, or choose its blocks with layers=[...]"
            )
        for (layer, mask), index in zip(masks[task].items(), indices):
            _check_index(f"{path}: {task}, {layer}", index, len(mask))
            mask[index] = True
    _warn_of_none(tasks, [torch.cat([*of_task.values()]) for of_task in masks.values()], stacklevel=3)
    return NeuronMasks(masks)


def _read(path: str | os.PathLike[str]) -> list[list[Tensor]]:
    expected = "expected a torch.save of list[language][layer] of int64 tensors [neurons]"
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of the unpickler, the archive, or what it would not run
        said = str(error).strip() or type(error).__name__
        raise ValueError(f"{path} cannot be read ({said.splitlines()[0][:200]}): {expected}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, {expected}")
    for place, language in enumerate(found):
        if not isinstance(language, list) or not all(isinstance(index, Tensor) for index in language):
            raise ValueError(f"{path} holds something else than a list of tensors at place {place}, {expected}")
    return found


def _check_index(where: str, index: Tensor, d_ff: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"{where}: found {index.dtype} {list(index.shape)}, expected an int64 tensor [neurons]")
    if not len(index):
        return
    if int(index.min()) < 0 or int(index.max()) >= d_ff:
        raise ValueError(
            f"{where}: found neurons {int(index.min())} to {int(index.max())}, expected 0 to {d_ff - 1}: the file is of a "
            "model of another width"
        )
    if not bool((index.diff() > 0).all()):
        raise ValueError(f"{where}: the neurons are not ascending, or one stands there twice")
