"""What makes a system other than dense: applied to a model in place, and kept beside its weights in ``nspec.json``."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nspec
from nspec import processes
from nspec.baselines import adapters, heads, lass
from nspec.baselines.lass import kept_weights_only
from nspec.files import read_json, write_json
from nspec.nn.masked_linear import MODES, Mode
from nspec.tuning.layers import parameters_of

_WIDEST = 1 << 20  # of an adapter: more is no adapter, and would be allocated before anything else notices
NSPEC_FILE = "nspec.json"
NEURONS = ("neurons", "neurons+shared")
"""Names of :class:`Neurons`, over frozen weights and over weights that are trained too."""
ADAPTERS = ("adapters", "adapters+shared")
"""The same of :class:`Adapters`."""
_MASKS, _WEIGHT_MASKS, _HEAD_MASKS = "masks", "weight_masks", "head_masks"  # folders beside it


class Method(ABC):
    """A way to specialise a model for tasks.

    Attributes:
        name: in ``nspec.json`` and ``summary.json``.
        mode: ``forward`` or ``update`` of neuron masks; None for other methods.
        tasks: the directions that it knows.
        by_rows: RowSparseAdamW has rows to leave alone.
        leaves_parameters: a step trains only a part of the parameters, which DistributedDataParallel must be told.
        has_weights: it brings parameters of its own, which stand with those of the model.
        lr: highest learning rate of these; 0: that of the others.
    """

    name: str
    mode: Mode | None = None
    by_rows = False
    leaves_parameters = False
    has_weights = False
    lr = 0.0

    @property
    @abstractmethod
    def tasks(self) -> list[str]: ...

    @abstractmethod
    def digest(self) -> str:
        """What tells it from another of its kind."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Changes a dense model in place, so that ``nspec.task`` switches it."""

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those that it has brought to a model."""
        return []

    def stepping(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tasks: Iterable[str]
    ) -> AbstractContextManager[None]:
        """Around a step of the optimiser, after passes of these tasks in this process."""
        return nullcontext()

    def check(self, folder: Path, stored: Mapping[str, Sequence[int]]) -> None:  # noqa: B027 (most have no weights)
        """Raises ValueError where the weights in a folder, name -> shape, are not of this method; before it is attached."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what :func:`load_method` reads, but for weights."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """``density`` (None without masks) and ``mask_bytes`` for ``summary.json``."""


class NeuronSpecialization(Method):
    """Neuron masks in mode ``forward`` or ``update``.

    Args:
        masks: the neurons of each direction.
        mode: see :func:`nspec.specialize`; so is ``silent``.
    """

    name = "masks"
    by_rows = True
    mode: Mode

    def __init__(self, masks: nspec.NeuronMasks, mode: Mode, silent: bool = False) -> None:
        self.masks, self.mode, self.silent = masks, mode, silent

    @property
    def tasks(self) -> list[str]:
        return list(self.masks.tasks)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for task in self.masks.tasks:
            for layer, mask in self.masks[task].items():
                digest.update(f"{task} {layer} ".encode() + bytes(mask.to(torch.uint8).tolist()))
        if self.silent:
            digest.update(b"silent")
        return digest.hexdigest()

    def attach(self, model: nn.Module) -> None:
        nspec.specialize(model, self.masks, mode=self.mode, silent=self.silent)

    def save(self, folder: Path) -> None:
        self.masks.save(folder / _MASKS)
        write_json(folder / NSPEC_FILE, {"mode": self.mode} | ({"silent": True} if self.silent else {}))

    def facts(self) -> dict[str, Any]:
        shares = [share for layers in self.masks.density().values() for share in layers.values()]
        bits = [-(-len(mask) // 8) for layers in self.masks.values() for mask in layers.values()]
        return {"density": sum(shares) / len(shares), "mask_bytes": sum(bits)}


class Adapters(Method):
    """Bottlenecks after each layer, one set for each group of directions.

    Args:
        groups: task -> name of its group.
        bottleneck: their width.
        seed: of their initialisation.
        shared: whether the dense weights are trained on too, by all directions; else they are frozen.
        lr: see :class:`Method`.
    """

    leaves_parameters = True
    has_weights = True

    def __init__(
        self, groups: Mapping[str, str], bottleneck: int, seed: int = 0, shared: bool = False, lr: float = 0.0
    ) -> None:
        self.groups, self.bottleneck, self.seed, self.shared, self.lr = dict(groups), bottleneck, seed, shared, lr
        self.name = ADAPTERS[shared]

    @property
    def tasks(self) -> list[str]:
        return list(self.groups)

    def digest(self) -> str:
        described = json.dumps([self.groups, self.bottleneck, self.seed], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def attach(self, model: nn.Module) -> None:
        adapters.add_adapters(model, self.groups, self.bottleneck, seed=self.seed)
        if not self.shared:
            adapters.freeze_all_but_adapters(model)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return adapters.adapter_parameters(model)

    def check(self, folder: Path, stored: Mapping[str, Sequence[int]]) -> None:
        widths = {shape[0] for name, shape in stored.items() if ".adapters." in name and name.endswith(".down.weight")}
        if widths != {self.bottleneck}:
            raise ValueError(
                f"{folder / NSPEC_FILE} says bottleneck {self.bottleneck}, but the weights beside it have adapters of "
                f"width {', '.join(map(str, sorted(widths))) or 'none'}; copy the whole folder of the system again"
            )

    def save(self, folder: Path) -> None:
        described = {"method": self.name, "groups": self.groups, "bottleneck": self.bottleneck, "seed": self.seed}
        write_json(folder / NSPEC_FILE, described)

    def facts(self) -> dict[str, Any]:
        return {"density": None, "mask_bytes": 0}


class Lass(Method):
    """Masks of single weights (Lin et al. 2021)."""

    name = "weight_masks"

    def __init__(self, masks: lass.WeightMasks) -> None:
        self.masks = masks

    @property
    def tasks(self) -> list[str]:
        return list(self.masks.tasks)

    def digest(self) -> str:
        return self.masks.digest()

    def attach(self, model: nn.Module) -> None:
        lass.apply_weight_masks(model, self.masks)

    def stepping(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tasks: Iterable[str]
    ) -> AbstractContextManager[None]:
        everywhere = {task for part in processes.gather(sorted(tasks)) for task in part}
        return kept_weights_only(model, optimizer, everywhere)

    def save(self, folder: Path) -> None:
        self.masks.save(folder / _WEIGHT_MASKS)
        write_json(folder / NSPEC_FILE, {"method": self.name})

    def facts(self) -> dict[str, Any]:
        shares = [share for layers in self.masks.density().values() for share in layers.values()]
        return {"density": sum(shares) / len(shares), "mask_bytes": self.masks.nbytes}


class Heads(Method):
    """Attention heads of each direction; the others' outputs are zero.

    Args:
        masks: bool ``[heads]`` of each direction and attention module.
    """

    name = "heads"

    def __init__(self, masks: nspec.NeuronMasks) -> None:
        self.masks = masks

    @property
    def tasks(self) -> list[str]:
        return list(self.masks.tasks)

    def digest(self) -> str:
        return NeuronSpecialization(self.masks, "update").digest()

    def attach(self, model: nn.Module) -> None:
        heads.mask_heads(model, self.masks)

    def save(self, folder: Path) -> None:
        self.masks.save(folder / _HEAD_MASKS)
        write_json(folder / NSPEC_FILE, {"method": self.name})

    def facts(self) -> dict[str, Any]:
        return NeuronSpecialization(self.masks, "update").facts()


class Neurons(Method):
    """Neurons of each direction with parameters of their own beside the dense model.

    Args:
        masks: the neurons of each direction.
        shared: whether the dense weights are trained on too, by all directions; else they are frozen.
        lr: see :class:`Method`.
    """

    leaves_parameters = True
    has_weights = True

    def __init__(self, masks: nspec.NeuronMasks, shared: bool = False, lr: float = 0.0) -> None:
        self.masks, self.shared, self.lr = masks, shared, lr
        self.name = NEURONS[shared]

    @property
    def tasks(self) -> list[str]:
        return list(self.masks.tasks)

    def digest(self) -> str:
        return NeuronSpecialization(self.masks, "update").digest()

    def attach(self, model: nn.Module) -> None:
        none = [task for task in self.tasks if not any(bool(mask.any()) for mask in self.masks[task].values())]
        if none and not self.shared:
            raise ValueError(
                f"{none[0]} has no neuron in the masks, and nothing else is trained: select more (select.rate, "
                "select.share), or by another select.rule"
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with warnings.catch_warnings():
            if self.shared:  # a direction without neurons trains the shared weights
                warnings.filterwarnings("ignore", message="masks have no neuron of")
            nspec.finetune(model, self.masks, quiet=True)
        if self.shared:
            for parameter in trained:
                parameter.requires_grad_(True)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return list(parameters_of(model))

    def save(self, folder: Path) -> None:
        self.masks.save(folder / _MASKS)
        write_json(folder / NSPEC_FILE, {"method": self.name})

    def facts(self) -> dict[str, Any]:
        return NeuronSpecialization(self.masks, "update").facts()


def load_method(folder: Path) -> Method | None:
    """What makes the system in a folder; None for a dense one.

    Raises:
        ValueError: ``nspec.json`` says something else or is gone from beside its masks, or masks are broken.
        FileNotFoundError: the masks are not there.
    """
    file = Path(folder) / NSPEC_FILE
    if not file.is_file():
        if left := [name for name in (_MASKS, _WEIGHT_MASKS, _HEAD_MASKS) if (file.parent / name).exists()]:
            raise ValueError(
                f"{file} is not there, but {left[0]}/ is: the system would be taken for a dense one; copy the "
                f"whole folder of the system again, or delete {left[0]}/"
            )
        return None
    described: Any = read_json(file)
    if isinstance(described, dict):
        silent = described.get("silent", False)
        if (mode := described.get("mode")) in MODES and (silent is False or (silent is True and mode == "forward")):
            return NeuronSpecialization(nspec.NeuronMasks.load(file.parent / _MASKS), described["mode"], silent)
        if (name := described.get("method")) in NEURONS:
            return Neurons(nspec.NeuronMasks.load(file.parent / _MASKS), NEURONS.index(name) == 1)
        if described.get("method") == Heads.name:
            return Heads(nspec.NeuronMasks.load(file.parent / _HEAD_MASKS))
        if described.get("method") == Lass.name:
            return Lass(lass.WeightMasks.load(file.parent / _WEIGHT_MASKS))
        if described.get("method") in ADAPTERS and _fits_adapters(described):
            shared = described["method"] == ADAPTERS[1]
            return Adapters(described["groups"], described["bottleneck"], described.get("seed") or 0, shared)
    raise ValueError(
        f'{file} is {repr(described)[:200]}; expected {{"mode": "forward"}}, with "silent": true or without, {{"mode": '
        f'"update"}}, or the method {" or ".join(ADAPTERS)} (with groups, names by direction, and bottleneck, from 1 to '
        f"{_WIDEST}), weight_masks, heads, {' or '.join(NEURONS)}"
    )


def _fits_adapters(described: dict[str, Any]) -> bool:
    groups, width, seed = (described.get(key) for key in ("groups", "bottleneck", "seed"))
    named = isinstance(groups, dict) and len(groups) > 0 and all(isinstance(n, str) and n for n in groups.values())
    return named and type(width) is int and 1 <= width <= _WIDEST and (seed is None or type(seed) is int)
