"""Which library searches for translations, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from nspec.mt.scoring import ctranslate2_search
from nspec.mt.scoring.config import DecodeConfig
from nspec.serving import ctranslate2

if TYPE_CHECKING:
    import torch

TRANSFORMERS, CTRANSLATE2 = "transformers", "ctranslate2"

FAMILIES = ("m2m_100", "mbart", "marian")
"""The kinds of models (``model_type`` of config.json) that are translated with and that CTranslate2 converts."""


@dataclass(frozen=True)
class Engine:
    """What searches.

    Attributes:
        name: ``transformers`` or ``ctranslate2``.
        reason: why this one.
    """

    name: str
    reason: str

    @property
    def version(self) -> str:
        """Of the library."""
        return metadata.version(self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(decode: DecodeConfig, device: torch.device, obstacle: str = "") -> Engine:
    """The engine that ``decode.engine`` means here.

    Args:
        decode: the search.
        device: of the model.
        obstacle: what about the model or the systems CTranslate2 cannot do; empty: nothing.

    Raises:
        ValueError: CTranslate2 is asked for and cannot search here; says why.
    """
    if decode.engine == TRANSFORMERS:
        return Engine(TRANSFORMERS, "decode.engine says so")
    forced = decode.engine == CTRANSLATE2
    reason = ctranslate2.why_not() or _why_not_on(device, forced) or ctranslate2_search.why_not(decode) or obstacle
    if reason and forced:
        raise ValueError(f"decode.engine is ctranslate2, which cannot be: {reason}; take auto or transformers")
    if reason:
        return Engine(TRANSFORMERS, reason)
    place = f"ctranslate2 {ctranslate2.version()} is installed, the device is the CPU"
    return Engine(CTRANSLATE2, "decode.engine says so" if forced else place)


def _why_not_on(device: torch.device, forced: bool) -> str:
    if device.type == "cpu":
        return ""
    if not forced:
        return f"the device is {device.type}, where ctranslate2 is taken only if decode.engine says so"
    if device.type == "cuda" and ctranslate2.gpus():
        return ""
    return f"ctranslate2 sees no device {device.type}"


def why_not_converted(model_type: str | None, activation: str | None) -> str:
    """Why CTranslate2 converts no model of this kind; empty where it does.

    Args:
        model_type: in its config.json.
        activation: the name of its activation function.
    """
    if model_type not in FAMILIES:
        return f"a model of the kind {model_type} is not converted; {', '.join(FAMILIES)} are"
    known = ctranslate2.activations()
    return "" if activation in known else f"the activation {activation} is not converted; {', '.join(known)} are"
