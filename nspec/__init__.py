"""Neuron specialisation for PyTorch models: profile, select, specialise, and go on training with sparse updates.

    counts = nspec.profile(model, {"en-de": batches})    # how often each feed-forward neuron fires, per task
    masks = nspec.select(counts, k=0.95)                  # the neurons that carry 95 % of the activations
    nspec.specialize(model, masks, mode="forward")        # in place; the model's code is not touched
    with nspec.task(model, "en-de"):
        model(**batch).loss.backward()

The method is that of Tan, Wu and Monz, "Neuron Specialization" (EMNLP 2024). Importing this package loads torch and
nothing heavier: the names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "ActivationCounts": "nspec.specialization.counts",
    "NeuronScores": "nspec.specialization.scores",
    "NeuronMasks": "nspec.specialization.masks",
    "profile": "nspec.specialization.profiling",
    "select": "nspec.specialization.selection",
    "random_masks": "nspec.specialization.random_sets",
    "load_lape": "nspec.specialization.lape",
    "specialize": "nspec.specialization.apply",
    "despecialize": "nspec.specialization.apply",
    "merge": "nspec.serving.merge",
    "export": "nspec.serving.export",
    "task": "nspec.specialization.tasks",
    "set_task": "nspec.specialization.tasks",
    "checkpoint_contexts": "nspec.specialization.tasks",
    "finetune": "nspec.tuning.finetune",
    "save_neurons": "nspec.tuning.storage",
    "load_neurons": "nspec.tuning.storage",
    "MaskedLinear": "nspec.nn.masked_linear",
    "RowSparseAdamW": "nspec.nn.optimizer",
    "TaskTrainerMixin": "nspec.integrations.trainer",
    "task_collator": "nspec.integrations.collator",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from nspec.integrations.collator import task_collator
    from nspec.integrations.trainer import TaskTrainerMixin
    from nspec.nn.masked_linear import MaskedLinear
    from nspec.nn.optimizer import RowSparseAdamW
    from nspec.serving.export import export
    from nspec.serving.merge import merge
    from nspec.specialization.apply import despecialize, specialize
    from nspec.specialization.counts import ActivationCounts
    from nspec.specialization.lape import load_lape
    from nspec.specialization.masks import NeuronMasks
    from nspec.specialization.profiling import profile
    from nspec.specialization.random_sets import random_masks
    from nspec.specialization.scores import NeuronScores
    from nspec.specialization.selection import select
    from nspec.specialization.tasks import checkpoint_contexts, set_task, task
    from nspec.tuning.finetune import finetune
    from nspec.tuning.storage import load_neurons, save_neurons


def _map_kernels() -> None:
    """Source checkout only: ``nspec.kernels`` is the sibling folder ``kernels/`` (setup.py maps it for installs)."""
    import importlib.machinery
    import importlib.util
    import pathlib
    import sys

    here = pathlib.Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    if not (here / "kernels").is_dir() and (folder / "compact_ffn" / "op.py").is_file():
        spec = importlib.machinery.ModuleSpec(__name__ + ".kernels", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        globals()["kernels"] = sys.modules[spec.name]


_map_kernels()
del _map_kernels


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nspec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
