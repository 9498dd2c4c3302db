"""What searches for the translations of a run: one engine for all of them.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nspec.files import read_json
from nspec.mt.scoring.decoded import decoding, engine_of
from nspec.run.config import Config
from nspec.run.systems import system_names, system_of

if TYPE_CHECKING:
    import torch

    from nspec.mt.scoring.engine import Engine

_ANEW = "--redo evaluate makes them all anew"


def recorded_engine(config: Config, but: Collection[str] = ()) -> tuple[str, str]:
    """What the translations that are there were made by, and the first system that has some; both empty without any.

    Args:
        config: of the run.
        but: names of stages that are to be made anew.

    Raises:
        ValueError: some were made by one engine and some by another, or ``decode.engine`` is another one.
    """
    found: dict[str, str] = {}  # engine -> system
    for system in system_names(config):
        if f"evaluate:{system}" in but:
            continue
        folder = Path(config.run.folder) / "scores" / system
        for path in sorted(folder.glob("*.decode.json")):
            with contextlib.suppress(ValueError, OSError):  # what is broken is translated again
                found.setdefault(engine_of(decoding(folder, path.name.removesuffix(".decode.json"))), system)
    if len(found) > 1:
        parts = " and ".join(f"those of {system} by {engine}" for engine, system in found.items())
        raise ValueError(f"{config.run.folder} has translations of two engines, {parts}; {_ANEW}")
    engine, system = next(iter(found.items()), ("", ""))
    if engine and config.decode.engine not in ("auto", engine):
        raise ValueError(
            f"decode.engine is {config.decode.engine}, but the translations of {system} were made by {engine}, and one run "
            f"has one engine: take decode.engine={engine}, or {_ANEW}"
        )
    return engine, system


def choose_engine(config: Config, device: torch.device) -> Engine:
    """The engine of a run: that of the translations that are there, else what ``decode.engine`` means on this machine.

    Raises:
        ValueError: see :func:`recorded_engine`; or CTranslate2 is asked for, or was taken, and cannot search here.
    """
    from nspec.mt.scoring.engine import Engine, choose

    before, system = recorded_engine(config)
    obstacle = _obstacle(config)
    if not before or config.decode.engine == before:
        return choose(config.decode, device, obstacle)
    if before == "transformers":
        return Engine(before, f"the translations of {system} were made by it")
    try:
        choose(replace(config.decode, engine=before), device, obstacle)
    except ValueError as error:
        reason = str(error).partition(": ")[2].removesuffix("; take auto or transformers")
        raise ValueError(
            f"the translations of {system} were made by ctranslate2, and one run has one engine, but it cannot go on: "
            f"{reason}; {_ANEW}"
        ) from None
    return Engine(before, f"the translations of {system} were made by it")


def _obstacle(config: Config) -> str:
    """What CTranslate2 cannot do of a run; empty where it can do all."""
    from nspec.mt.plain import ADAPTERS

    for system in system_names(config):
        if system_of(config, system).method.startswith("adapters"):
            return f"the system {system} cannot be converted: {ADAPTERS}"
    path = Path(config.run.folder) / "systems" / "dense" / "model" / "config.json"
    if path.is_file():
        described = read_json(path)
        return _why_not_of(described.get("model_type"), described.get("activation_function"))
    if config.model.pretrained:  # before hours of training
        from nspec.mt.model_files import load_config

        own = load_config(config.model.pretrained)
        return _why_not_of(own.model_type, getattr(own, "activation_function", None))
    return ""


def _why_not_of(model_type: str | None, activation: str | None) -> str:
    from nspec.mt.scoring.engine import why_not_converted

    reason = why_not_converted(model_type, activation)
    if model_type == "marian" and not reason:
        return "training moves the embedding of <pad>, which starts Marian's decoder and which CTranslate2 takes to be zero"
    return reason
