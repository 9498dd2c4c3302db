"""The trained systems in a run folder, as readers outside the chain take them.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.read import check_run, check_written, read_config
from nspec.run.systems import SYSTEMS, system_names, system_of
from nspec.run.yaml import expand_paths


@dataclass(frozen=True)
class TrainedSystem:
    """The model of a system, or of one direction of it.

    Attributes:
        folder: with the model.
        config: of the run.
        made_by: name and mode of what makes the system, as :func:`nspec.mt.model.load_system` takes them.
        each: whether each direction has a model of its own.
    """

    folder: Path
    config: Config
    made_by: tuple[str, str]
    each: bool


def run_config(run: Path) -> Config:
    """The validated configuration of a run.

    Raises:
        ValueError: its configuration is broken.
    """
    config, _ = read_config(run)
    expand_paths(config)
    validate(config)
    return config


def trained_model(run: Path, system: str, task: str, *, translating: bool = False) -> TrainedSystem:
    """The model of a system as the run wrote it.

    Args:
        run: the run folder.
        system: its name.
        task: the direction; a system that has a model for each must have one of it.
        translating: for `nspec translate`, which takes the run as ``--run``, and a folder as it is as ``--model``.

    Raises:
        ValueError: there is no run, no such system, or no model of that direction; the model is not as it was written.
    """
    check_run(run, "--run" if translating else "RUN")
    systems = run / "systems"
    each: dict[str, dict[str, Path]] = {}  # a model for each direction
    for path in sorted(systems.glob("*/*/model")):
        each.setdefault(path.parents[1].name, {})[path.parent.name] = path
    folders = {path.parent.name: path for path in systems.glob("*/model")}
    if system not in folders and system not in each:
        found = f"--system {system}" if system else "give --system"
        names = ", ".join(sorted({*folders, *each})) or "none"
        raise ValueError(f"{found}: {run} has the trained systems {names}")
    config = run_config(run)
    if system not in [*SYSTEMS, *system_names(config)]:
        way = "give its folder as --model to take it as it is" if translating else "`nspec translate --model` takes it"
        raise ValueError(f"--system {system}: {run}/config.yaml does not say what it is; {way}")
    kind = system_of(config, system)
    if kind.method == "each" and task not in each.get(system, {}):
        known = ", ".join(each.get(system, {})) or "none"
        raise ValueError(f"--system {system} has a model for each of {known}, none for {task}")
    folder = each[system][task] if kind.method == "each" else systems / system / "model"
    stage = "train" if system == "dense" else f"specialize:{system}"
    remedy = f"put it back as it was, or make it anew with `nspec run` and --redo {stage}"
    remedy += f"; --model {folder} takes the folder as it is" if translating else ""
    check_written(folder, systems / system / "stage.json", remedy)
    return TrainedSystem(folder, config, kind.made_by, kind.method == "each")
