"""The options of ``nspec finetune``, and what is wrong with them, each with an error that names the option.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nspec.lm.config import METHODS, RANDOM, RULES, LanguageModelConfig, LinesConfig, NeuronsConfig, TuneConfig
from nspec.options import check_option, show
from nspec.run.config import PlaceConfig, Sections, each_option, types
from nspec.run.yaml import expand_paths, parse_into, set_option
from nspec.yaml_text import read_text

_PARTS = ({"gate", "up", "down"}, {"fc1", "fc2"})


@dataclass
class TuningConfig(Sections):
    """A run of fine-tuning. Sections are attributes: ``config.tune.updates``."""

    SECTIONS: ClassVar[dict[str, str]] = {
        "run": "where and on what",
        "text": "the text of each language; no line is both trained and tested on",
        "model": "the language model that everything starts from",
        "neurons": "which neurons each language gets, by how often they fire on its training text",
        "tune": "the fine-tunings: each method on each language, AdamW",
    }

    run: PlaceConfig = field(default_factory=lambda: PlaceConfig(folder="runs/finetune"))
    text: LinesConfig = field(default_factory=LinesConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    neurons: NeuronsConfig = field(default_factory=NeuronsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)


def like_of(config: TuningConfig) -> str | None:
    """The rule whose numbers of neurons the random ones have; None where there is no other."""
    return next((method for method in config.tune.methods if method in RULES and method != RANDOM), None)


def load(path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()) -> TuningConfig:
    """Reads and validates a YAML file, with ``--set`` assignments applied over it, in order, and paths expanded.

    Args:
        path: of the file; None: the defaults.
        overrides: ``section.key=value``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file or an assignment cannot be read, or :func:`validate` raises.
        ImportError: a method needs a library that is not installed.
    """
    config = TuningConfig()
    if path is not None:
        parse_into(config, read_text(path), str(path))
    for assignment in overrides:
        set_option(config, assignment)
    expand_paths(config)
    validate(config)
    return config


def validate(config: TuningConfig) -> None:
    """Checks the values of all options, alone and against each other, and that what they name is there.

    Raises:
        ValueError: the first that does not hold: the option, what was expected and what was found.
        ImportError: ``lora`` without the peft library.
    """
    for section, key, declared in each_option(root=TuningConfig):
        kind = types(TuningConfig)[section][key]
        check_option(declared, kind, f"{section}.{key}", getattr(getattr(config, section), key))
    text, model, methods = config.text, config.model, config.tune.methods
    if not config.run.folder.strip():
        raise ValueError("run.folder: expected a folder, found nothing")
    for name, values in (("text.languages", text.languages), ("tune.methods", methods)):
        if not values:
            raise ValueError(f"{name}: expected one or more, found nothing")
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{name}: {twice[0]} stands in the list more than once")
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"tune.methods: expected methods out of {', '.join(METHODS)}, found {show(unknown[0])}")
    if len(text.languages) < 2 and (relative := [method for method in methods if method in ("lape", "specific")]):
        raise ValueError(
            f"text.languages: {relative[0]} compares languages and needs two or more, found {show(text.languages)}"
        )
    for language in text.languages:
        if not language.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"text.languages: expected codes such as de or zh_Hans, found {show(language)}")
    if text.type == "files" and not text.path:
        raise ValueError("text.path: text of type files needs a folder with CODE.txt for each language; give text.path")
    if text.type == "files" and not Path(text.path).is_dir():
        raise ValueError(f"text.path: {text.path} is no folder; expected one with CODE.txt for each language")
    if text.type == "hub" and not text.name:
        raise ValueError("text.name: text of type hub needs the name of a dataset; give text.name")
    parts = config.neurons.parts
    if parts and not any(set(parts) <= allowed for allowed in _PARTS):
        raise ValueError(f"neurons.parts: expected some of gate, up, down, or of fc1, fc2, found {show(parts)}")
    if not model.pretrained:
        _check_new_model(config)
    if "lora" in methods and importlib.util.find_spec("peft") is None:
        raise ImportError(
            "tune.methods: lora needs the peft library, which is not installed: pip install '.[tuning]' in nspec's "
            "checkout, or take lora out of tune.methods"
        )


def _check_new_model(config: TuningConfig) -> None:
    """What is known of a new model before it is made."""
    model, own = config.model, config.neurons
    if model.d_model % (2 * model.heads):
        raise ValueError(
            f"model.d_model: expected a multiple of twice model.heads ({model.heads}), found {model.d_model}"
        )
    if own.parts and not set(own.parts) <= _PARTS[0]:
        raise ValueError(f"neurons.parts: expected some of gate, up, down of the new model, found {show(own.parts)}")
    neurons = model.layers * model.d_ff
    if "lape" in config.tune.methods and not round(own.rate * neurons):
        raise ValueError(f"neurons.rate: {own.rate} of {neurons} neurons is less than one: take a higher rate")
