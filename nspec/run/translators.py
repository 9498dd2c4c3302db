"""What translates each direction of a system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nspec
from nspec.mt.methods import NEURONS
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.engine import TRANSFORMERS
from nspec.mt.scoring.translate import Translator


def translator_of(
    system: str,
    method: str,
    load: Callable[[str], tuple[Any, Any]],
    decode: DecodeConfig,
    engine: str = TRANSFORMERS,
) -> Callable[[str], Translator]:
    """A function that gives the translator of a direction.

    Args:
        system: its name.
        method: of the system: a model for each direction, neurons that are merged for each, or one model for all.
        load: gives model and tokenizer of a system, or of its model for one direction (``SYSTEM/DIRECTION``).
        decode: the search.
        engine: what searches.
    """
    if method == "each":
        return lambda task: Translator(*load(f"{system}/{task}"), decode, engine=engine)
    model, tokenizer = load(system)
    if method in NEURONS:  # plain weights: no neuron is replaced at every token

        def of_task(task: str) -> Translator:
            merged: Any = nspec.merge(model, task)
            return Translator(merged, tokenizer, decode, engine=engine)

        return of_task
    for_all = Translator(model, tokenizer, decode, engine=engine)
    return lambda task: for_all
