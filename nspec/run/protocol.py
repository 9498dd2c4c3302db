"""What was declared of a run before its results were there: a hypothesis, and the one comparison that tests it.

``RUN/protocol.json`` notes each declaration with the systems that had scores when it was made, so that the page can say
which came first.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspec.files import read_json, write_json
from nspec.options import show
from nspec.run.config import Config
from nspec.run.stages import baseline_of
from nspec.run.systems import system_names

FILE = "protocol.json"
METRICS = ("loss", "bleu", "chrf")
_AVERAGE = re.compile(r"all|(from|to)_\w+|(level|family):[^\s/]+(/(from|to)_\w+)?")


@dataclass(frozen=True)
class Primary:
    """The comparison that was declared: of a system with ``score.baseline``.

    Attributes:
        system: its name.
        metric: ``loss`` (of the validation text), ``bleu`` or ``chrf``.
        average: ``all``, ``from_en``, ``to_en``, ``level:low`` or another that scores have.
    """

    system: str
    metric: str
    average: str


def primary_of(config: Config) -> Primary | None:
    """What ``run.primary`` says; None where it is empty, or where the run compares nothing (the dense model alone).

    Raises:
        ValueError: it cannot be read, or names the baseline or no system of the run.
    """
    if not (text := config.run.primary.strip()):
        return None
    system, *rest = text.split()
    metric, average, *more = [*rest, *("loss", "all")[len(rest) :]]
    if metric not in METRICS or not _AVERAGE.fullmatch(average) or more:
        raise ValueError(
            f"run.primary: expected SYSTEM METRIC AVERAGE, with a metric of {', '.join(METRICS)} and an average such as "
            f"all, from_en or level:low, found {show(text)}"
        )
    names, baseline = system_names(config), baseline_of(config)
    if set(names) <= {"dense", baseline}:
        return None  # the dense model that others will start from is trained with the same configuration
    if system not in names or system == baseline:
        others = ", ".join(name for name in names if name != baseline)
        raise ValueError(f"run.primary: expected one of {others}, to compare with the baseline, found {show(system)}")
    return Primary(system, metric, average)


def declare(folder: Path, config: Config) -> None:
    """Notes in a run folder what the configuration declares, where that is not what it declared last.

    Raises:
        ValueError: what is noted there is broken.
        OSError: it cannot be written.
    """
    said = {"hypothesis": config.run.hypothesis.strip(), "primary": config.run.primary.strip()}
    before = declarations(folder)
    last = {key: before[-1][key] for key in said} if before else dict.fromkeys(said, "")
    if said != last:
        scored = sorted(path.parent.name for path in folder.glob("scores/*/scores.json") if ".old-" not in str(path))
        write_json(folder / FILE, [*before, said | {"date": time.strftime("%Y-%m-%d"), "scored": scored}])


def declarations(folder: Path) -> list[dict[str, Any]]:
    """What was declared in a run folder, the oldest first.

    Returns:
        For each ``hypothesis``, ``primary``, ``date`` and ``scored`` (systems that had scores then).

    Raises:
        ValueError: the file is broken.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    found = read_json(path)
    if not isinstance(found, list) or not all(_is_whole(entry) for entry in found):
        raise ValueError(f"{path} holds {show(found)}; expected a list of what was declared; put it back as it was")
    return found


def _is_whole(entry: Any) -> bool:
    texts = ("hypothesis", "primary", "date")
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in texts)
        and isinstance(entry.get("scored"), list)
    )
