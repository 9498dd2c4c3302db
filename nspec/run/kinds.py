"""Which command a configuration is for, told by its sections. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from nspec.run import checks, finetune_config
from nspec.run.config import Config, Sections, types
from nspec.run.finetune_config import TuningConfig
from nspec.run.yaml import find_config
from nspec.yaml_text import Loader, read_text

COMMANDS: dict[str, type[Sections]] = {"run": Config, "finetune": TuningConfig}
"""The commands that have configurations of their own, and what these hold."""


def sections_of(path: Path, command: str) -> list[str]:
    """The sections of a file that configurations of this command alone have; none of a file that is no mapping."""
    others = {section for name, root in COMMANDS.items() if name != command for section in types(root)}
    mine = [section for section in types(COMMANDS[command]) if section not in others]
    try:
        node = Loader(read_text(path)).get_single_node()
    except (yaml.YAMLError, ValueError, OSError):  # what is wrong says who reads it
        return []
    keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return [key for key in dict.fromkeys(keys) if key in mine]


def command_of(path: Path) -> str | None:
    """The command that a file is for, by more of its sections than any other; None where they do not tell."""
    found = {command: len(sections_of(path, command)) for command in COMMANDS}
    most = max(found.values())
    likely = [command for command, count in found.items() if count == most]
    return likely[0] if len(likely) == 1 else None


def find_config_for(command: str, name: str) -> Path:
    """A configuration file as of :func:`nspec.run.yaml.find_config`, for this command.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is for another command; the message says which.
    """
    path = find_config(name)
    other = command_of(path)
    if other not in (None, command):
        raise ValueError(
            f"{name} is a configuration of `nspec {other}`, by its sections {', '.join(sections_of(path, other))}: "
            f"start it with `nspec {other} {name}`"
        )
    return path


def load_any(name: str, overrides: Iterable[str], finetune: bool) -> Sections:
    """A configuration of whichever command it is for, validated.

    Args:
        name: a file, or the name of one that comes with nspec; empty: the defaults.
        overrides: ``section.key=value``.
        finetune: whether it is one of ``nspec finetune`` where the file does not tell, or there is none.

    Raises:
        OSError, ValueError: as of the command's own ``load``; ``finetune``, and a file of another command.
    """
    if finetune and name:
        find_config_for("finetune", name)
    path = find_config(name) if name else None
    if finetune or (path is not None and command_of(path) == "finetune"):
        return finetune_config.load(path, overrides)
    return checks.load(path, overrides)
