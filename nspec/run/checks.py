"""What is wrong with a configuration beyond types and choices, each with an error that names the option; :func:`load`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable

from nspec.mt.config import PARTS, SelectConfig
from nspec.mt.training.config import TrainConfig
from nspec.options import check_option, cut, show
from nspec.run.config import Config, each_option, types
from nspec.run.protocol import primary_of
from nspec.run.systems import (
    SELECT_USES,
    SYSTEMS,
    VARIED,
    config_of,
    masked_systems,
    recipe_of,
    system_names,
    system_of,
    variants_of,
)
from nspec.run.yaml import expand_paths, parse, set_option
from nspec.specialization.patterns import matching
from nspec.yaml_text import read_text

_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(_[A-Za-z0-9]+)*")
_MOST_BATCHES = 100_000_000  # which direction each one is of is drawn before training, some 30 bytes for each
_LONGEST = 1000  # characters of a message that names all layers


def _ranges(config: Config, sections: Iterable[str] | None = None) -> None:
    """Every option by itself, as :mod:`nspec.run.config` declares it."""
    for section, key, declared in each_option(sections):
        check_option(declared, types()[section][key], f"{section}.{key}", getattr(getattr(config, section), key))


def _distinct(name: str, values: list[str]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise ValueError(f"{name}: {cut(value)} stands in the list more than once")


def _languages(config: Config) -> None:
    corpus = config.corpus
    _distinct("corpus.languages", corpus.languages)
    _distinct("corpus.directions", corpus.directions)
    given = [("corpus.languages", language) for language in corpus.languages]
    for name, language in [*given, ("corpus.pivot", corpus.pivot)] if corpus.pivot else given:
        if not _LANGUAGE.fullmatch(language):
            raise ValueError(
                f"{name}: expected language codes such as de or pt_BR (a hyphen separates the two languages "
                f"of a direction), found {show(language)}"
            )
    known = {*corpus.languages, corpus.pivot} if corpus.languages else set()
    for direction in corpus.directions:
        source, hyphen, target = direction.partition("-")
        if not (hyphen and _LANGUAGE.fullmatch(source) and _LANGUAGE.fullmatch(target) and source != target):
            raise ValueError(f"corpus.directions: expected source-target such as en-de, found {show(direction)}")
        for language in (source, target):
            if known and language not in known:
                raise ValueError(
                    f"corpus.directions: {direction} needs {language}, neither in corpus.languages nor corpus.pivot"
                )
    if corpus.type == "files" and not corpus.path:
        raise ValueError("corpus.path: a corpus of type files needs the folder with the text; give corpus.path")
    if corpus.valid_split == corpus.test_split:
        raise ValueError(
            f"corpus.test_split: expected another one than corpus.valid_split, which picks the checkpoint, found "
            f"{show(corpus.test_split)} for both"
        )
    if corpus.type == "hub" and not corpus.name:
        raise ValueError("corpus.name: a corpus of type hub needs the name of the dataset; give corpus.name")
    if corpus.max_ratio and corpus.max_ratio < 1:
        raise ValueError(f"corpus.max_ratio: expected 0 (keep all) or at least 1, found {corpus.max_ratio}")


def _training(config: Config, section: str) -> None:
    train: TrainConfig = getattr(config, section)
    if train.updates < 1 and not (section == "train" and config.model.pretrained):
        hint = "; 0 takes model.pretrained as it is, which is empty" if section == "train" else ""
        raise ValueError(f"{section}.updates: expected at least 1, found {train.updates}{hint}")
    _batches(config, f"{section}.updates", train.updates, section)
    if len(train.betas) != 2:
        raise ValueError(f"{section}.betas: expected two numbers, found {show(train.betas)}")
    if train.precision == "fp16" and config.run.device == "cpu":
        raise ValueError(f"{section}.precision: fp16 needs a GPU, and run.device is cpu; take bf16, fp32 or auto")
    if section == "train" and train.optimizer != "adamw":
        raise ValueError(f"train.optimizer: the dense model is trained with adamw, found {train.optimizer}")
    if train.best == "bleu" and not train.valid_bleu_sentences:
        raise ValueError(f"{section}.best: bleu needs {section}.valid_bleu_sentences above 0")
    least, parts = config.corpus.max_tokens * train.tasks_per_batch, f" for each of {section}.tasks_per_batch"
    if train.batch_tokens < least:
        raise ValueError(
            f"{section}.batch_tokens: expected at least corpus.max_tokens ({config.corpus.max_tokens})"
            f"{parts if train.tasks_per_batch > 1 else ''}, so that the longest sentence fits, found {train.batch_tokens}"
        )


def _batches(config: Config, name: str, updates: int, section: str) -> None:
    train: TrainConfig = getattr(config, section)
    if updates * train.accumulate * train.tasks_per_batch > _MOST_BATCHES:
        raise ValueError(
            f"{name}: expected at most {_MOST_BATCHES} for updates x {section}.accumulate x {section}.tasks_per_batch, "
            f"found {updates} x {train.accumulate} x {train.tasks_per_batch}"
        )


def _layers(config: Config) -> None:
    """Patterns of layers, before hours of training: those of a new model are known, of a pretrained one they are not."""
    if config.model.pretrained:
        return
    counts = {"encoder": config.model.encoder_layers, "decoder": config.model.decoder_layers}
    check_layers(
        config, [f"model.{side}.layers.{number}.fc1" for side, count in counts.items() for number in range(count)]
    )
    kinds = [("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn")]
    attention = [f"model.{side}.layers.{number}.{kind}" for side, kind in kinds for number in range(counts[side])]
    for system in system_names(config):
        patterns = config_of(config, system).heads.layers if system_of(config, system).method == "heads" else []
        try:
            matching(attention, patterns or attention)
        except ValueError as error:
            raise ValueError(cut(f"heads.layers of {system}: {error}", _LONGEST)) from None


def check_layers(config: Config, names: list[str]) -> None:
    """Checks that every masked system keeps some of the feed-forward layers ``names``, and of its side.

    Raises:
        ValueError: a system, its patterns and what they match.
    """
    for system in masked_systems(config):
        patterns, side = config_of(config, system).select.layers, system_of(config, system).side
        try:
            kept = matching(names, patterns) if patterns else names
        except ValueError as error:
            raise ValueError(cut(f"select.layers of {system}: {error}", _LONGEST)) from None
        if side and not any(side in name.split(".") for name in kept):
            raise ValueError(
                f"select.layers of {system}: expected a layer of the {side}, found {show(patterns or kept)}"
            )
        _parts(config, system, kept)
        select = config_of(config, system).select
        if select.sized_by == "loss":
            if not select.grid:
                raise ValueError(f"select.grid of {system}: expected one k or more for select.rule loss, found none")
            if system_of(config, system).method.startswith("neurons"):
                raise ValueError(
                    f"select.rule of {system}: loss says what masking does, and nothing is masked where neurons get "
                    "parameters of their own; take another rule"
                )
        if select.sized_by == "conflict" and config_of(config, system).profile.path:
            raise ValueError(
                f"profile.path of {system}: select.rule conflict takes gradients on the run's own text; leave it out, or "
                "take another rule"
            )


def _directions(config: Config) -> None:
    """Neurons for some directions alone, of systems in which a direction without any computes or trains nothing."""
    for system in masked_systems(config):
        if (
            config_of(config, system).select.directions != "all"
            and system_of(config, system).method != "neurons+shared"
        ):
            raise ValueError(
                f"select.directions of {system}: a direction without neurons has nothing to compute with, or to train, in "
                "it; make it an option of neurons+shared alone, in run.variants: NAME = neurons+shared select.directions=to"
            )


def _neurons_lr(config: Config) -> None:
    """A learning rate of neurons in a variant that has none of its own."""
    for system, variant in variants_of(config).items():
        if "specialize.neurons_lr" in variant.overrides and not system_of(config, system).method.startswith("neurons"):
            raise ValueError(
                f"specialize.neurons_lr of {system}: no neurons have parameters of their own in it; make it an option of "
                "neurons or neurons+shared, or give specialize.lr"
            )


def _silent(config: Config) -> None:
    """Silent neurons, of systems in which all neurons compute."""
    for system in system_names(config):
        kind, variant = system_of(config, system), variants_of(config).get(system)
        varied = variant is not None and "specialize.silent" in variant.overrides
        if config_of(config, system).specialize.silent and (
            kind.mode == "update" or (varied and kind.mode != "forward")
        ):
            raise ValueError(
                f"specialize.silent of {system}: all neurons compute in it, and none can be silent; make it an option of "
                "systems with masks in both passes alone, in run.variants: NAME = forward specialize.silent=true"
            )


def _parts(config: Config, system: str, layers: list[str]) -> None:
    """The ks of single parts of the model that a masked system has, with the layers that it keeps by name."""
    select, kind = config_of(config, system).select, system_of(config, system)
    if select.sized_by != "share" or not select.parts:
        return
    given = ", ".join(f"select.{name}" for name in select.parts)
    if not config.corpus.pivot:
        raise ValueError(
            f"{given} of {system}: directions go neither from nor to a pivot, as corpus.pivot is empty; give select.k alone"
        )
    if kind.method.startswith("neurons") and (whole := [name for name, k in select.parts.items() if k == 1]):
        raise ValueError(
            f"select.{whole[0]} of {system}: expected a k below 1, since all neurons of a layer would get parameters of "
            "their own; leave layers out with select.layers"
        )
    sides = [side for side in ("encoder", "decoder") if kind.side in ("", side)]
    specialised = [side for side in sides if any(select.parts.get(f"k_{way}_{side}") != 1 for way in ("from", "to"))]
    if not any(side in name.split(".") for side in specialised for name in layers):
        raise ValueError(f"{given} of {system}: no layer is left that is specialised; give a k below 1")


def _recipes(config: Config) -> None:
    """Systems that train in another way, which does not go with every option."""
    for system in system_names(config):
        if (kind := system_of(config, system)).recipe is not None:
            own = config_of(config, system)
            try:
                recipe_of(kind, own).check(own.specialize)
            except ValueError as error:
                raise ValueError(f"specialize, of the system {system}: {error}") from None


def _varied(config: Config) -> None:
    """What variants may change."""
    _training(config, "specialize")
    _batches(config, "finetune.updates", config.finetune.updates, "specialize")
    _batches(config, "bilingual.updates", config.bilingual.updates, "train")


def _used(select: SelectConfig, overrides: Iterable[str]) -> None:
    """Raises ValueError where a variant changes a number of another rule, which would change nothing."""
    rule, used = select.rule, SELECT_USES[select.sized_by]
    used = ("like", *used) if rule == "random" else used
    for name in dict.fromkeys(("like", *(number for numbers in SELECT_USES.values() for number in numbers))):
        if f"select.{name}" in overrides and name not in used:
            uses = " and ".join(f"select.{one}" for one in used if one not in PARTS)
            like = f" with select.like {select.like}" if rule == "random" and select.like else ""
            raise ValueError(f"select.{name} is not of select.rule {rule}{like}, which uses {uses}")


def validate(config: Config) -> None:
    """Checks the values of all options, alone and against each other.

    Raises:
        ValueError: the first that does not hold: the option, what was expected and what was found.
        TypeError: a value of another type, which only code can give.
    """
    _ranges(config)
    systems = config.run.systems
    for system in systems:
        if system not in SYSTEMS:
            raise ValueError(f"run.systems: expected systems out of {', '.join(SYSTEMS)}, found {show(system)}")
    _distinct("run.systems", systems)
    if systems[:1] != ["dense"]:
        raise ValueError(f"run.systems: must begin with dense, which the others start from, found {show(systems)}")
    if not config.run.folder.strip():
        raise ValueError("run.folder: expected a folder, found nothing")
    _languages(config)
    model = config.model
    if model.d_model % model.heads:
        raise ValueError(f"model.d_model: {model.d_model} is not divisible by model.heads ({model.heads})")
    if not model.pretrained and model.max_positions < config.corpus.max_tokens:
        raise ValueError(
            f"model.max_positions: expected at least corpus.max_tokens ({config.corpus.max_tokens}), "
            f"found {model.max_positions}"
        )
    _training(config, "train")
    _varied(config)
    beam, vocabulary = config.decode.beam, config.tokenizer.vocab_size
    if 2 * beam > vocabulary and not model.pretrained:
        raise ValueError(f"decode.beam: expected at most half of tokenizer.vocab_size ({vocabulary}), found {beam}")
    known = dict.fromkeys([*SYSTEMS, *system_names(config)])
    if config.score.baseline not in known:
        raise ValueError(f"score.baseline: expected one of {', '.join(known)}, found {show(config.score.baseline)}")
    for variant in variants_of(config):
        try:
            own = config_of(config, variant)
            _ranges(own, VARIED)
            _used(own.select, variants_of(config)[variant].overrides)
            _varied(own)
        except ValueError as error:
            raise ValueError(f"run.variants: {variant}: {error}") from None
    _silent(config)
    _neurons_lr(config)
    _directions(config)
    _layers(config)
    _recipes(config)
    primary_of(config)


def load(path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a YAML file, with ``--set`` assignments applied over it, in order, and paths expanded.

    Args:
        path: of the file; None: the defaults.
        overrides: ``section.key=value``, see :func:`nspec.run.yaml.set_option`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file or an assignment cannot be read, or :func:`validate` raises; one line that says what to change.
    """
    config = Config() if path is None else parse(read_text(path), str(path))
    for assignment in overrides:
        set_option(config, assignment)
    expand_paths(config)
    validate(config)
    return config
