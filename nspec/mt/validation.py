"""Checks of a configuration that go beyond types and choices, each with an error that names the option."""

from __future__ import annotations

import re
from typing import Any

from nspec.mt.config import Config, TrainConfig
from nspec.mt.systems import KINDS, config_of, kind_of, masked_systems, system_names, variants_of
from nspec.specialization.patterns import matching

_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(_[A-Za-z0-9]+)*")


def _at_least(config: Config, low: float, *names: str) -> None:
    for name in names:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, found {value}")


def _positive(config: Config, *names: str) -> None:
    for name in names:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, found {value}")


def _share(name: str, value: float, *, zero: bool, one: bool) -> None:
    """``value`` in the interval from 0 to 1, whose ends belong to it or not."""
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name}: expected a number in {interval}, found {value}")


def _distinct(name: str, values: list[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name}: {value} stands in the list more than once")


def _languages(config: Config) -> None:
    corpus = config.corpus
    _distinct("corpus.languages", corpus.languages)
    _distinct("corpus.directions", corpus.directions)
    for language in [*corpus.languages, *([corpus.pivot] if corpus.pivot else [])]:
        if not _LANGUAGE.fullmatch(language):
            raise ValueError(
                f"corpus.languages: expected language codes such as de or pt_BR (a hyphen separates the two languages "
                f"of a direction), found {language!r}"
            )
    for direction in corpus.directions:
        source, hyphen, target = direction.partition("-")
        if not (hyphen and _LANGUAGE.fullmatch(source) and _LANGUAGE.fullmatch(target) and source != target):
            raise ValueError(f"corpus.directions: expected source-target such as en-de, found {direction!r}")
        for language in (source, target):
            if corpus.languages and language not in corpus.languages:
                raise ValueError(f"corpus.directions: {direction} needs {language}, which is not in corpus.languages")
    if corpus.type == "files" and not corpus.path:
        raise ValueError("corpus.path: a corpus of type files needs the folder with the text; give corpus.path")
    if corpus.type == "hub" and not corpus.name:
        raise ValueError("corpus.name: a corpus of type hub needs the name of the dataset; give corpus.name")
    if corpus.max_ratio and corpus.max_ratio < 1:
        raise ValueError(f"corpus.max_ratio: expected 0 (keep all) or at least 1, found {corpus.max_ratio}")


def _training(config: Config, section: str) -> None:
    train: TrainConfig = getattr(config, section)
    counts = ("batch_tokens", "tasks_per_batch", "accumulate", "warmup", "valid_every", "log_every")
    _at_least(config, 1, *(f"{section}.{key}" for key in counts))
    if section == "train" and config.model.pretrained:
        _at_least(config, 0, "train.updates")
    elif train.updates < 1:
        hint = "; 0 takes model.pretrained as it is, which is empty" if section == "train" else ""
        raise ValueError(f"{section}.updates: expected at least 1, found {train.updates}{hint}")
    _positive(config, *(f"{section}.{key}" for key in ("temperature", "lr", "eps")))
    zeros = ("weight_decay", "clip_norm", "valid_bleu_sentences", "patience")
    _at_least(config, 0, *(f"{section}.{key}" for key in zeros))
    _share(f"{section}.label_smoothing", train.label_smoothing, zero=True, one=False)
    if len(train.betas) != 2:
        raise ValueError(f"{section}.betas: expected two numbers, found {train.betas}")
    for beta in train.betas:
        _share(f"{section}.betas", beta, zero=True, one=False)
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


def _layers(config: Config) -> None:
    """Patterns of layers, before hours of training: those of a new model are known, of a pretrained one they are not."""
    if config.model.pretrained:
        return
    counts = {"encoder": config.model.encoder_layers, "decoder": config.model.decoder_layers}
    check_layers(
        config, [f"model.{side}.layers.{number}.fc1" for side, count in counts.items() for number in range(count)]
    )


def check_layers(config: Config, names: list[str]) -> None:
    """Checks that every masked system keeps some of the feed-forward layers ``names``, and of its half of the model.

    Raises:
        ValueError: a system, its patterns and what they match.
    """
    for system in masked_systems(config):
        patterns, side = config_of(config, system).select.layers, kind_of(config, system).side
        try:
            kept = matching(names, patterns) if patterns else names
        except ValueError as error:
            raise ValueError(f"select.layers of {system}: {error}") from None
        if side and not any(side in name.split(".") for name in kept):
            raise ValueError(f"select.layers of {system}: expected a layer of the {side}, found {patterns or kept}")


def _within(config: Config, name: str, low: float, high: float) -> None:
    section, key = name.split(".")
    value = getattr(getattr(config, section), key)
    if not low <= value <= high:  # NaN is not
        raise ValueError(f"{name}: expected a number from {low} to {high}, found {value}")


def _decoding(config: Config) -> None:
    """The largest values are what the search can compute with: a score is divided by length to the power of the penalty."""
    _at_least(config, 1, "decode.beam", "decode.batch_tokens")
    _at_least(config, 0, "decode.no_repeat_ngram_size")
    _within(config, "decode.beam", 1, 1000)
    _within(config, "decode.length_penalty", -1, 10)
    _positive(config, "decode.max_length_ratio", "decode.repetition_penalty")
    _within(config, "decode.max_length_ratio", 0, 1000)
    _within(config, "decode.repetition_penalty", 0, 100)
    beam, vocabulary = config.decode.beam, config.tokenizer.vocab_size
    if 2 * beam > vocabulary and not config.model.pretrained:
        raise ValueError(f"decode.beam: expected at most half of tokenizer.vocab_size ({vocabulary}), found {beam}")


def _varied(config: Config) -> None:
    """What variants may change."""
    _training(config, "specialize")
    _at_least(config, 0, "profile.sentences")
    _share("profile.share", config.profile.share, zero=False, one=True)
    _share("select.k", config.select.k, zero=False, one=True)
    _at_least(config, 1, "finetune.updates", "adapters.bottleneck", "bilingual.updates")
    _positive(config, "finetune.lr", "adapters.lr")
    _share("lass.alpha", config.lass.alpha, zero=True, one=False)


def validate(config: Config) -> None:
    """Checks the values of all options, alone and against each other.

    Raises:
        ValueError: the first that does not hold: the option, what was expected and what was found.
    """
    systems = config.run.systems
    for system in systems:
        if system not in KINDS:
            raise ValueError(f"run.systems: expected systems out of {', '.join(KINDS)}, found {system!r}")
    _distinct("run.systems", systems)
    if systems[:1] != ["dense"]:
        raise ValueError(f"run.systems: must begin with dense, which the others start from, found {systems}")
    if not config.run.folder.strip():
        raise ValueError("run.folder: expected a folder, found nothing")
    _at_least(config, 0, "run.seed", "run.threads")
    if config.run.seed >= 2**32:
        raise ValueError(f"run.seed: expected less than 2**32, found {config.run.seed}")
    _languages(config)
    _at_least(config, 0, *(f"corpus.{split}_sentences" for split in ("train", "valid", "test")))
    _at_least(config, 1, "corpus.max_tokens", "tokenizer.vocab_size", "tokenizer.sentences")
    _share("tokenizer.character_coverage", config.tokenizer.character_coverage, zero=False, one=True)
    _positive(config, "tokenizer.temperature")
    sizes = ("d_model", "d_ff", "heads", "encoder_layers", "decoder_layers", "max_positions")
    _at_least(config, 1, *(f"model.{key}" for key in sizes))
    model = config.model
    if model.d_model % model.heads:
        raise ValueError(f"model.d_model: {model.d_model} is not divisible by model.heads ({model.heads})")
    if not model.pretrained and model.max_positions < config.corpus.max_tokens:
        raise ValueError(
            f"model.max_positions: expected at least corpus.max_tokens ({config.corpus.max_tokens}), "
            f"found {model.max_positions}"
        )
    _share("model.dropout", model.dropout, zero=True, one=False)
    _share("model.attention_dropout", model.attention_dropout, zero=True, one=False)
    _training(config, "train")
    _varied(config)
    _decoding(config)
    _at_least(config, 40, "score.bootstrap")  # with fewer samples there is no 95 % interval
    known = dict.fromkeys([*KINDS, *system_names(config)])
    if config.score.baseline not in known:
        raise ValueError(f"score.baseline: expected one of {', '.join(known)}, found {config.score.baseline!r}")
    for variant in variants_of(config):
        try:
            _varied(config_of(config, variant))
        except ValueError as error:
            raise ValueError(f"run.variants: {variant}: {error}") from None
    _layers(config)
