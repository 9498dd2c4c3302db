"""Reads a run folder into one object, whatever part of the run is there."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nspec.analysis import order_tasks
from nspec.files import read_json
from nspec.mt.scoring.averages import kind_of_group
from nspec.mt.training.checkpoints import LOSS_OF, read_log
from nspec.report import words
from nspec.report.words import METRICS
from nspec.run.config import Config
from nspec.run.read import check_written, read_config
from nspec.run.stages import trained_systems
from nspec.run.systems import SYSTEMS, Variant, masks_folder, system_names, variants_of

if TYPE_CHECKING:
    from nspec import NeuronMasks

_SCORE_KEYS = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
_TEST_KEYS = ["bleu_delta", "bleu_p", "chrf_delta", "chrf_p"]
_LATER_TEST_KEYS = ["bleu_p_ar", "chrf_p_ar"]  # scores.json of older runs has none
_SUMMARY_KEYS = ["updates", "micro_batches", "tokens", "tokens_per_second", "train_seconds", "density", "threads"]
_SUMMARY_KEYS += [
    "parameters",
    "parameters_added",
    "parameters_trained",
    "mask_bytes",
    "best_step",
    "peak_memory_bytes",
]


@dataclass
class SystemData:
    """One system of a run; what is not there yet is None or empty.

    ``losses`` are nats per target token on the validation text by direction, of the best checkpoint.
    """

    name: str
    summary: dict[str, Any] | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] | None = None
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class RunData:
    """A run folder.

    ``baseline`` is the system that the scores were tested against; ``missing`` says what is not there yet; ``sizes`` are
    training sentences by direction (empty before the text is prepared); ``variant_masks`` are the neurons of those variants
    that have a selection of their own.
    """

    folder: Path
    config: Config
    config_text: str
    systems: dict[str, SystemData]
    masks: NeuronMasks | None
    tasks: list[str]
    baseline: str
    stages: list[dict[str, Any]]
    missing: list[str]
    variants: dict[str, Variant]
    sizes: dict[str, int]
    variant_masks: dict[str, NeuronMasks]

    def name(self, system: str) -> str:
        """A system's name for readers, see :func:`nspec.report.words.system_name`."""
        return words.system_name(system, self.variants)

    def short(self, system: str) -> str:
        """A system's name where there is little room: what a variant is shows elsewhere."""
        return system if system in self.variants else self.name(system)

    def base_of(self, system: str) -> str:
        """What a system is a variant of; itself where it is none."""
        return self.variants[system].of if system in self.variants else system

    def masks_at(self, folder: str | None) -> NeuronMasks | None:
        """The neuron masks in a folder of the run; None where there are none."""
        return self.masks if folder == "masks" else _masks(self.folder / folder) if folder else None

    def changes(self, system: str, than: str, metric: str) -> dict[str, float]:
        """Score of ``system`` minus that of ``than`` in points, for each direction that both have been scored in."""
        one, other = (self.scored.get(name, {"tasks": {}})["tasks"] for name in (system, than))
        return {task: one[task][metric] - other[task][metric] for task in self.tasks if task in one and task in other}

    @property
    def earlier(self) -> list[str]:
        """Systems that the run has from before, which its configuration asks for no more; in the order of the page."""
        asked = {"dense", *trained_systems(self.config)}
        return [name for name in self.systems if name not in asked]

    @property
    def metric_names(self) -> dict[str, str]:
        """The metrics' names for readers, see :func:`nspec.report.words.metric_names`."""
        return words.names_of_scores(self.scored.values())

    @property
    def main_groups(self) -> list[str]:
        """The averages that are of all directions or of those from or to the pivot, not of levels or families."""
        found = dict.fromkeys(group for scores in self.scored.values() for group in scores["average"])
        return [group for group in found if not kind_of_group(group)[0]]

    @property
    def tests(self) -> list[dict[str, Any]]:
        """Every test against a baseline that the scores hold."""
        entries = [e for s in self.scored.values() for part in ("tasks", "average") for e in s[part].values()]
        return [entry["baseline"] for entry in entries if entry.get("baseline")]

    @property
    def two_sided(self) -> bool | None:
        """Whether all tests of the run are approximate randomisation; None where some are and some are not."""
        kinds = {"bleu_p_ar" in test for test in self.tests}
        return None if len(kinds) == 2 else kinds != {False}

    @property
    def scored(self) -> dict[str, dict[str, Any]]:
        """The scores of the systems that have them."""
        return {name: system.scores for name, system in self.systems.items() if system.scores is not None}

    @property
    def pivot(self) -> str:
        """The language that directions go to and from; empty where there is none."""
        return self.config.corpus.pivot


def load_run(run: Path) -> RunData:
    """Reads a run folder.

    Raises:
        ValueError: it is no run folder, or a file in it is broken; the message names the file and what is wrong.
    """
    run = Path(run)
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml; `nspec run` makes one")
    config, config_text = read_config(run)
    systems = {name: _system(run, name) for name in _system_names(run, config)}
    masks = _masks(run / "masks")
    scored = [system.scores for system in systems.values() if system.scores is not None]
    tasks = {task for scores in scored for task in scores["tasks"]} | set(masks.tasks if masks else ())
    return RunData(
        folder=run,
        config=config,
        config_text=config_text,
        systems=systems,
        masks=masks,
        tasks=order_tasks(tasks, config.corpus.pivot),
        baseline=_baseline(config, systems),
        stages=_stages(run),
        missing=_missing(run, systems, masks, config),
        variants=variants_of(config),
        sizes=_sizes(run / "prepared" / "meta.json"),
        variant_masks=_variant_masks(run, config),
    )


def _system_names(run: Path, config: Config) -> list[str]:
    """Those of the configuration in its order, then others that left something, but not what ``--redo`` set aside."""
    found = {path.name for part in ("systems", "scores") for path in (run / part).glob("*") if path.is_dir()}
    extra = sorted(name for name in found if not re.search(r"\.old-\d+$", name) and not name.startswith("."))
    return list(dict.fromkeys([*system_names(config), *extra]))


def _system(run: Path, name: str) -> SystemData:
    folder = run / "systems" / name
    system, scores = SystemData(name), run / "scores" / name / "scores.json"
    check_written(
        folder / "summary.json", folder / "stage.json", f"put it back, or `nspec run --redo {_training(name)}`"
    )
    check_written(scores, scores.with_name("stage-score.json"), "`nspec evaluate` makes it anew")
    if (folder / "summary.json").is_file():
        system.summary = _summary(folder / "summary.json")
    rows = read_log(folder / "log.jsonl")
    system.training, system.validation = _by_update(rows, "loss"), _by_update(rows, "valid_loss")
    if scores.is_file():
        system.scores = _scores(scores)
    system.losses = _losses(system.summary, system.validation)
    for part in sorted(folder.glob("*/summary.json")):  # a model for each direction
        system.losses |= _losses(_summary(part), _by_update(read_log(part.with_name("log.jsonl")), "valid_loss"))
    return system


def _losses(summary: dict[str, Any] | None, validation: list[dict[str, Any]]) -> dict[str, float]:
    """The loss of each direction in the validation that picked the checkpoint; empty before training has ended.

    Empty too where an older version measured it, which counted the tag of the target.
    """
    best = (summary or {}).get("best_step")
    found = [row for row in validation if row["step"] == best and row.get("loss_of") == LOSS_OF]
    rows = [row["tasks"] for row in found if isinstance(row.get("tasks"), dict)]
    losses = {task: entry.get("loss") for task, entry in (rows[-1] if rows else {}).items() if isinstance(entry, dict)}
    return {task: float(loss) for task, loss in losses.items() if loss is not None and _number(loss)}


def _dictionary(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object; remove it and run again")
    return value


def _training(system: str) -> str:
    return "train" if system == "dense" else f"specialize:{system}"


def _summary(path: Path) -> dict[str, Any]:
    """``summary.json``, checked for what every version wrote, and whose numbers are numbers where they are there."""
    summary = _dictionary(path)
    if type(summary.get("updates")) is not int:
        raise ValueError(f"{path}: found {repr(summary)[:60]}, expected an object with updates, as training leaves it")
    for key in _SUMMARY_KEYS:
        if summary.get(key) is not None and not _number(summary[key]):
            found = reprlib.repr(summary[key])
            raise ValueError(f"{path}: {key} should be a number, found {found}; remove the file and run again")
    return summary


def _number(value: Any, most: float = 1e18) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < most  # NaN is not


def _by_update(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that have ``key``, by update; of an update that was done again after a kill, the last."""
    latest: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = row.get("updates", row["step"])
        if isinstance(row.get(key), (int, float)) and isinstance(step, int):
            latest[step] = row | {"step": step}
    return [latest[step] for step in sorted(latest)]


_FITS: dict[str, Callable[[Any], bool]] = {
    "a number": lambda value: _number(value, 1e9),  # no score, p value or number of sentences is larger
    "an object": lambda value: isinstance(value, dict),
    "an object with directions": lambda value: isinstance(value, dict) and len(value) > 0,
    "an object or null": lambda value: isinstance(value, dict),  # null has been seen to before
    "a list": lambda value: isinstance(value, list),
    "a list of directions": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    **{kind: lambda value: isinstance(value, str) for kind in ("a name", "a signature", "text")},
}


def _scores(path: Path) -> dict[str, Any]:
    """``scores.json``, checked for all that the page reads."""

    def need(holder: Any, key: str, where: str, kind: str) -> Any:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not _FITS[kind](value):
            name = f"{where}.{key}" if where else key
            found = "nothing" if value is None else reprlib.repr(value)[:40]
            raise ValueError(f"{path}: {name} should be {kind}, found {found}; remove the file and run again")
        return value

    def check(holder: Any, key: str, where: str) -> dict[str, Any]:
        entry, where = need(holder, key, where, "an object"), f"{where}.{key}"
        for number in _SCORE_KEYS:
            need(entry, number, where, "a number")
        if entry.get("baseline") is not None:
            test = need(entry, "baseline", where, "an object or null")
            for number in _TEST_KEYS + [key for key in _LATER_TEST_KEYS if key in test]:
                need(test, number, f"{where}.baseline", "a number")
            need(test, "system", f"{where}.baseline", "a name")
        return cast("dict[str, Any]", entry)

    scores = _dictionary(path)
    tasks = need(scores, "tasks", "", "an object with directions")
    for task in tasks:
        entry = check(tasks, task, "tasks")
        need(entry, "sentences", f"tasks.{task}", "a number")
        for metric in METRICS:
            need(entry, f"{metric}_signature", f"tasks.{task}", "a signature")
    average = need(scores, "average", "", "an object")
    for group in {"all": None, **average}:
        check(average, group, "average")
    for group in need(scores, "groups", "", "an object") if "groups" in scores else ():
        need(scores["groups"], group, "groups", "a list")
        need(average, group, "average", "an object")
    for warning in need(scores, "warnings", "", "a list") if "warnings" in scores else ():
        need(warning, "text", "warnings", "text")
        need(warning, "directions", "warnings", "a list of directions")
    return scores


def _baseline(config: Config, systems: dict[str, SystemData]) -> str:
    """The system that the scores name as theirs; before there are any, the one that the configuration asks for."""
    for system in systems.values():
        for entry in (system.scores or {"tasks": {}})["tasks"].values():
            if entry.get("baseline"):
                return str(entry["baseline"]["system"])
    return config.score.baseline if config.score.baseline in systems else "dense"


def _masks(folder: Path) -> NeuronMasks | None:
    if not (folder / "masks.safetensors").is_file():
        return None
    from nspec import NeuronMasks

    return NeuronMasks.load(folder)


def _variant_masks(run: Path, config: Config) -> dict[str, NeuronMasks]:
    found = {}
    for name in variants_of(config):
        place = masks_folder(config, name)
        masks = _masks(run / place) if place and place.startswith("variants/") else None
        if masks is not None:
            found[name] = masks
    return found


def _sizes(path: Path) -> dict[str, int]:
    """Training sentences of each direction, from what preparing the text wrote; empty where that is not there."""
    counts = _dictionary(path).get("counts") if path.is_file() else None
    train = counts.get("train") if isinstance(counts, dict) else None
    if not isinstance(train, dict):
        return {}
    return {task: size for task, size in train.items() if isinstance(size, int) and size > 0}


def _stages(run: Path) -> list[dict[str, Any]]:
    """What each finished step wrote about itself, in the order of a run."""
    order = ["prepared", "systems/dense", "profile", "masks", "random_masks", "variants", "systems", "scores"]

    def place(folder: str) -> tuple[int, str]:
        known = folder if folder in order else folder.partition("/")[0]
        return order.index(known) if known in order else len(order), folder

    records = []
    for path in [
        path
        for pattern in ("*/*stage*.json", "*/*/*stage*.json", "variants/*/*/*stage*.json")
        for path in run.glob(pattern)
    ]:
        folder = path.parent.relative_to(run).as_posix()
        if folder != "report" and not re.search(r"\.old-\d+(/|$)", folder):
            records.append(_dictionary(path) | {"folder": folder})
    return sorted(records, key=lambda record: (place(record["folder"]), str(record.get("stage", ""))))


def _missing(run: Path, systems: dict[str, SystemData], masks: object, config: Config) -> list[str]:
    """What a whole run has and this one has not yet, in the order in which it is made."""
    missing = [] if (run / "prepared" / "meta.json").is_file() else ["the prepared text"]
    wanted = system_names(config)  # what another system only needs, as LaSS does the fine-tuned models, has no scores
    untrained = [name for name in wanted if systems[name].summary is None]
    unscored = [name for name in wanted if systems[name].scores is None]
    if untrained:
        missing.append(f"the training of {', '.join(untrained)}")
    if masks is None and any(SYSTEMS[name].masks for name in config.run.systems if name in SYSTEMS):
        missing.append("the neuron masks")
    return missing + ([f"the scores of {', '.join(unscored)}"] if unscored else [])
