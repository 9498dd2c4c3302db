"""Which stages a run has, what each reads, and what it depends on.

    prepare -> train -> profile -> select (-> random_masks) -> specialize:* -> evaluate:* -> score:* -> report

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nspec.mt.training.config import SpecializeConfig, TrainConfig
from nspec.mt.training.recipe import SECTIONS
from nspec.run.config import Config
from nspec.run.systems import (
    MEASURED,
    config_of,
    finetuned_system,
    heads_folder,
    masked_systems,
    masks_folder,
    profile_folder,
    recipe_of,
    selected_folder,
    system_names,
    system_of,
    variants_of,
)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: for the terminal and ``--redo``, such as ``train`` or ``specialize:forward``.
        folder: inside the run folder.
        options: names of the options, or whole sections (``corpus``), that its result depends on.
        inputs: glob patterns inside the run folder; what they match is hashed.
        after: names of the stages whose results it reads; all of them must be finished.
        resumable: an unfinished one goes on, instead of starting over.
        raisable: names of options with which it goes on where they are raised after it has finished (patience 0 is the
            highest), from one of its checkpoints.
        derived: cheap and wholly made from its inputs, so that it is made anew where they or the options changed.
        overrides: options that have another value here than in the configuration: those of a variant.
        record: file in the folder that says that it is finished; another where two stages share a folder.
        outputs: glob patterns inside its folder: what others read of what it writes.
        summaries: glob pattern inside its folder, where it consists of trainings that keep no checkpoints: raisable options
            may be raised as long as none of these summaries says that its training stopped early.
    """

    name: str
    folder: str
    options: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resumable: bool = False
    raisable: tuple[str, ...] = ()
    derived: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    record: str = "stage.json"
    outputs: tuple[str, ...] = ()
    summaries: str = ""


_PREPARED = ("prepared/meta.json", "prepared/tokenizer/*")
_TRAINED = ("summary.json", "log.jsonl", "model/**/*")  # not its checkpoints, which are in nobody's way when deleted


def baseline_of(config: Config) -> str:
    """The system that the others are tested against: ``score.baseline``, or dense where that is not in the run."""
    return config.score.baseline if config.score.baseline in system_names(config) else "dense"


def stage_name(verb: str, folder: str) -> str:
    """The name of the stage that makes a folder of masks or counts: ``select``, or ``select:NAME`` for a variant's."""
    parts = folder.split("/")
    return verb if len(parts) == 1 else f"{verb}:{parts[1]}"


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run with this configuration, in an order in which they can be done."""
    text = ("corpus", "tokenizer", "model.pretrained", "model.max_positions", "run.seed")
    stages = [
        Stage("prepare", "prepared", options=text, outputs=("**/*",)),
        Stage(
            "train",
            "systems/dense",
            options=("model", "train", "run.seed", *_length(config, "train")),
            inputs=_PREPARED,
            after=("prepare",),
            resumable=True,
            outputs=_TRAINED,
            raisable=_raisable("train"),
        ),
        *_masks(config),
        *_head_masks(config),
    ]
    trained = [_training(config, system) for system in trained_systems(config)]
    weights = [_weight_masks(config, system) for system in system_names(config) if _is_lass(config, system)]
    first = [stage for stage in trained if stage.name.removeprefix("specialize:") not in _lass(config)]
    stages += [*first, *weights, *(stage for stage in trained if stage not in first)]
    for system in system_names(config):
        inputs, own = (*_PREPARED, *_weights(config, system)), training_stage(system)
        translated = ("*.hyp.txt", "*.decode.json")
        stages.append(
            Stage(
                f"evaluate:{system}",
                f"scores/{system}",
                ("decode",),
                inputs,
                (own,),
                resumable=True,
                outputs=translated,
            )
        )
    for system in system_names(config):
        folders = dict.fromkeys([system, baseline_of(config)])
        stages.append(
            Stage(
                f"score:{system}",
                f"scores/{system}",
                options=("score",),
                inputs=tuple(f"scores/{name}/stage.json" for name in folders),
                after=(f"evaluate:{system}",),
                derived=True,
                record="stage-score.json",
                outputs=("scores.json",),
            )
        )
    results = ["config.yaml", "protocol.json", "prepared/meta.json"]
    results += ["masks/masks.*", "random_masks/masks.*", "variants/*/*/masks.*"]
    results += ["analysis/heads/heads.*", "analysis/heads/measured.json"]  # what `nspec analyze --heads` left
    results += ["analysis/halves/*/masks.*", "analysis/halves/measured.json", "profile/counts.*"]
    for system in system_names(config):
        results += [f"systems/{system}/summary.json", f"systems/{system}/log.jsonl", f"scores/{system}/scores.json"]
    stages.append(Stage("report", "report", inputs=tuple(results), after=("prepare",), derived=True, outputs=("*",)))
    return stages


def trained_systems(config: Config) -> list[str]:
    """The systems that are trained after the dense one; a LaSS system brings the fine-tuned ones that it prunes."""
    found: dict[str, None] = {}
    for system in system_names(config):
        if system != "dense":
            if _is_lass(config, system):
                found[finetuned_system(config, system)] = None
            found[system] = None
    return list(found)


def training_stage(system: str) -> str:
    """The name of the stage that trains a system."""
    return "train" if system == "dense" else f"specialize:{system}"


def weight_masks_folder(config: Config, system: str) -> str:
    """The folder with the masks of a LaSS system."""
    return f"variants/{system}/weight_masks" if system in variants_of(config) else "weight_masks"


def weight_masks_stage(config: Config, system: str) -> str | None:
    """The name of the stage that makes them; None for a system that is not LaSS."""
    return stage_name("weight_masks", weight_masks_folder(config, system)) if _is_lass(config, system) else None


def head_masks_stage(config: Config, system: str) -> str | None:
    """The name of the stage that chooses the attention heads of a system; None for one without."""
    has = system_of(config, system).method == "heads"
    return stage_name("head_masks", heads_folder(config, system)) if has else None


def _is_lass(config: Config, system: str) -> bool:
    return system_of(config, system).method == "weight_masks"


def _lass(config: Config) -> set[str]:
    return {system for system in system_names(config) if _is_lass(config, system)}


def _length(config: Config, section: str) -> tuple[str, ...]:
    # Validation BLEU translates greedily up to this length; it matters only where it picks the checkpoint.
    return ("decode.max_length_ratio",) if getattr(config, section).best == "bleu" else ()


def _raisable(section: str) -> tuple[str, ...]:
    return (f"{section}.updates", f"{section}.patience")


def _but_updates(section: str) -> tuple[str, ...]:
    """The options of a training whose number of updates stands elsewhere."""
    return tuple(f"{section}.{f.name}" for f in fields(TrainConfig) if f.name != "updates")


def _overrides(config: Config, system: str) -> dict[str, object]:
    variant = variants_of(config).get(system)
    return dict(variant.overrides) if variant else {}


def _masks(config: Config) -> list[Stage]:
    """Profile, select and random masks, once for each folder that a system reads; the run's own first."""
    stages: dict[str, Stage] = {}
    systems = sorted(masked_systems(config), key=lambda system: system in variants_of(config))
    for system in systems:
        changed = _overrides(config, system)
        counts, masks = profile_folder(config, system), selected_folder(config, system)
        profile, select = stage_name("profile", counts), stage_name("select", masks)
        profiled = (*_PREPARED, *_weights(config, "dense"))
        stages.setdefault(
            profile,
            Stage(
                profile,
                counts,
                ("profile",),
                profiled,
                ("train",),
                overrides=changed if "/" in counts else {},
                outputs=("counts.*",),
            ),
        )
        own_select = config_of(config, system).select
        needs, read = ["select"], [f"{counts}/counts.*"]
        if own_select.rule == "random":
            needs.append("run.seed")
        if own_select.sized_by in MEASURED:
            more = ("profile.split", "profile.share") if own_select.sized_by == "conflict" else ()
            needs += ["profile.sentences", *more]
            read += profiled
        stages.setdefault(
            select,
            Stage(
                select,
                masks,
                tuple(needs),
                tuple(read),
                (profile,),
                overrides=changed if "/" in masks else {},
                outputs=("masks.*", "chosen.json"),
            ),
        )
        own = masks_folder(config, system)
        if own is not None and own != masks:
            random = stage_name("random_masks", own)
            stages.setdefault(
                random,
                Stage(random, own, ("run.seed",), (f"{masks}/masks.*",), (select,), outputs=("masks.*",)),
            )
    return list(stages.values())


def _head_masks(config: Config) -> list[Stage]:
    """The attention heads of each direction, once for each folder that a system reads."""
    stages: dict[str, Stage] = {}
    for system in sorted(system_names(config), key=lambda system: system in variants_of(config)):
        if name := head_masks_stage(config, system):
            folder = heads_folder(config, system)
            stages.setdefault(
                name,
                Stage(
                    name,
                    folder,
                    ("heads",),
                    (*_PREPARED, *_weights(config, "dense")),
                    ("train",),
                    overrides=_overrides(config, system) if "/" in folder else {},
                    outputs=("masks.*", "heads.*"),
                ),
            )
    return list(stages.values())


def _training(config: Config, system: str) -> Stage:
    """The stage that trains a system other than dense."""
    kind, own = system_of(config, system), config_of(config, system)
    raisable = _raisable("specialize")
    neurons = kind.method.startswith("neurons")
    section = [f.name for f in fields(SpecializeConfig) if neurons or f.name != "neurons_lr"]
    options: tuple[str, ...] = (*(f"specialize.{name}" for name in section), "run.seed", *_length(own, "specialize"))
    inputs: tuple[str, ...] = (*_PREPARED, *_weights(config, "dense"))
    after = ["train"]
    if kind.masks:
        masks = masks_folder(config, system)
        assert masks is not None
        inputs += (f"{masks}/masks.*",)
        after.append(stage_name("random_masks" if kind.masks == "random_masks" else "select", masks))
    elif kind.method == "heads":
        masks = heads_folder(config, system)
        inputs += (f"{masks}/masks.*",)
        after.append(stage_name("head_masks", masks))
    elif kind.method == "weight_masks":
        masks = weight_masks_folder(config, system)
        inputs += (f"{masks}/weight_masks.*",)
        after.append(stage_name("weight_masks", masks))
    elif kind.method.startswith("adapters"):
        options += ("adapters",)
    elif kind.scratch:
        options = ("model", *_but_updates("train"), "bilingual", "run.seed", *_length(own, "train"))
        inputs, after, raisable = _PREPARED, ["prepare"], ("train.patience",)
    elif kind.method == "each":
        options = (*_but_updates("specialize"), "finetune", "run.seed", *_length(own, "specialize"))
        raisable = ("specialize.patience",)
    if kind.recipe is not None:
        options += (SECTIONS[kind.recipe],)
        if recipe_of(kind, own).has_length:
            raisable = ("specialize.patience",)
    return Stage(
        f"specialize:{system}",
        f"systems/{system}",
        options,
        inputs,
        tuple(after),
        resumable=True,
        raisable=raisable,
        summaries="*/summary.json" if kind.method == "each" else "",  # those keep no checkpoints
        overrides=_overrides(config, system),
        outputs=(*_TRAINED, *(f"*/{part}" for part in _TRAINED)) if kind.method == "each" else _TRAINED,
    )


def _weight_masks(config: Config, system: str) -> Stage:
    folder, finetuned = weight_masks_folder(config, system), finetuned_system(config, system)
    return Stage(
        stage_name("weight_masks", folder),
        folder,
        ("lass",),
        (f"systems/{finetuned}/*/model/*.safetensors",),
        (f"specialize:{finetuned}",),
        overrides=_overrides(config, system),
        outputs=("weight_masks.*",),
    )


def _weights(config: Config, system: str) -> tuple[str, ...]:
    each = "*/" if system_of(config, system).method == "each" else ""
    folder = f"systems/{system}/{each}model"
    parts = ("*.safetensors", "config.json", "masks/*", "weight_masks/*", "head_masks/*", "nspec.json")
    return tuple(f"{folder}/{part}" for part in parts)
