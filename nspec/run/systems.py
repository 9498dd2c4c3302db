"""The systems that a run trains and compares: what each name means, and variants of them that a configuration declares.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from nspec.mt.config import PARTS
from nspec.mt.training.recipe import SECTIONS, Recipe, RecipeName
from nspec.options import show
from nspec.run.config import Config
from nspec.run.yaml import expand_paths, flatten, set_option

MadeBy = Literal[
    "", "masks", "neurons", "neurons+shared", "heads", "adapters", "adapters+shared", "weight_masks", "each"
]
"""What makes a system: nothing (a dense model), neuron masks, neurons with parameters of their own (over frozen or trained
weights), masks of attention heads, adapters (likewise), masks of single weights, a model for each direction."""


@dataclass(frozen=True)
class System:
    """What a built-in system is.

    Attributes:
        method: see :data:`MadeBy`.
        mode: how neuron masks are used; empty without them.
        masks: where neuron masks come from: ``masks`` (selected) or ``random_masks``; empty without them.
        side: the side that is specialised, ``encoder`` or ``decoder``; empty: both.
        drawn: its attention heads are drawn at random.
        scratch: it starts from new weights rather than from the dense model's.
        recipe: how it trains where that is not plain, see :mod:`nspec.mt.training.recipe`.
    """

    method: MadeBy = ""
    mode: Literal["", "forward", "update"] = ""
    masks: Literal["", "masks", "random_masks"] = ""
    side: Literal["", "encoder", "decoder"] = ""
    scratch: bool = False
    recipe: RecipeName | None = None
    drawn: bool = False

    @property
    def made_by(self) -> tuple[str, str]:
        """Name and mode of its method, as :func:`nspec.mt.model.load_system` takes them; both empty for dense models."""
        return ("", "") if self.method == "each" else (self.method, self.mode)


SYSTEMS: dict[str, System] = {
    "dense": System(scratch=True),
    "continued": System(),
    "forward": System("masks", "forward", "masks"),
    "update": System("masks", "update", "masks"),
    "forward_encoder": System("masks", "forward", "masks", "encoder"),
    "forward_decoder": System("masks", "forward", "masks", "decoder"),
    "update_encoder": System("masks", "update", "masks", "encoder"),
    "update_decoder": System("masks", "update", "masks", "decoder"),
    "random": System("masks", "forward", "random_masks"),
    "neurons": System("neurons", masks="masks"),
    "neurons+shared": System("neurons+shared", masks="masks"),
    "heads": System("heads"),
    "random_heads": System("heads", drawn=True),
    "lass": System("weight_masks"),
    "adapters": System("adapters"),
    "adapters+shared": System("adapters+shared"),
    "adapters_family": System("adapters"),
    "finetuned": System("each"),
    "bilingual": System("each", scratch=True),
    "pcgrad": System(recipe="pcgrad"),
    "gradvac": System(recipe="gradvac"),
    "temperature": System(recipe="temperature"),
    "curriculum": System(recipe="curriculum"),
    "reptile": System(recipe="reptile"),
}
"""Every built-in system by its name."""

VARIED = (
    *("profile", "select", "specialize", "heads", "lass", "adapters", "finetune", "bilingual"),
    *("surgery", "curriculum", "reptile"),
)
"""Sections whose options a variant may change; the text, the vocabulary and the dense model are shared by all."""

SELECT_USES = {
    "share": ("k", *PARTS),
    "lape": ("rate",),
    "top": ("share",),
    "specific": ("share",),
    "random": ("share",),
    "loss": ("tolerance", "grid", "by"),
    "conflict": ("share",),
}
"""The numbers of the section ``select`` that each ``select.rule`` uses; ``random`` those of ``select.like``, if given."""

MEASURED = ("loss", "conflict")
"""The rules that run the dense model on validation text, beside its activation counts."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
_OPTION = r"[a-z_]+\.[a-z_]+=(?:\[.*?\](?!\S)|\S+)"  # a list may hold spaces
_VARIANT = re.compile(rf"\s*(?P<name>\S+)\s*=\s*(?P<of>[a-z_+]+)(?P<options>(\s+{_OPTION})*)\s*")


@dataclass(frozen=True)
class Variant:
    """A system that the configuration declares: a built-in one with other options.

    Attributes:
        name: of the system.
        of: the built-in system.
        overrides: full name of an option -> its value, such as ``{"select.k": 0.7}``.
    """

    name: str
    of: str
    overrides: dict[str, Any] = field(default_factory=dict)


def variants_of(config: Config) -> dict[str, Variant]:
    """The variants of ``run.variants`` by name, in order.

    Raises:
        ValueError: one that cannot be read, has the name of another system, changes what all systems share, or gives an
            option that does not exist or fit.
    """
    return dict(_variants(tuple(config.run.variants)))


@functools.cache  # asked for again and again, by every stage of a run
def _variants(texts: tuple[str, ...]) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for text in texts:
        variant = _variant(text)
        if variant.name in SYSTEMS or variant.name in found:
            raise ValueError(f"run.variants: {variant.name} is the name of another system; rename it ({show(text)})")
        found[variant.name] = variant
    return found


def _variant(text: str) -> Variant:
    parts = _VARIANT.fullmatch(text)
    if not parts or not _NAME.fullmatch(parts["name"]):
        raise ValueError(
            f"run.variants: expected NAME = SYSTEM SECTION.OPTION=VALUE ..., such as "
            f"'forward-k70 = forward select.k=0.7', found {show(text)}"
        )
    if SYSTEMS.get(parts["of"], SYSTEMS["dense"]) == SYSTEMS["dense"]:
        others = ", ".join(name for name in SYSTEMS if name != "dense")
        raise ValueError(
            f"run.variants: expected a variant of one of {others}, found {show(parts['of'])} in {show(text)}"
        )
    scratch, overrides = Config(), {}
    for assignment in re.findall(_OPTION, parts["options"]):
        name = assignment.partition("=")[0]
        try:
            set_option(scratch, assignment)
            expand_paths(scratch)
        except ValueError as error:
            said = str(error).replace(" in --set", "").replace("--set ", "")
            raise ValueError(f"run.variants: {said} (in {show(text)})") from None
        if name.partition(".")[0] not in VARIED:
            raise ValueError(
                f"run.variants: {name} is shared by all systems of a run; a variant may change options of "
                f"{', '.join(VARIED)} (in {show(text)})"
            )
        overrides[name] = flatten(scratch)[name]
    return Variant(parts["name"], parts["of"], overrides)


def system_names(config: Config) -> list[str]:
    """Every system of a run: those of ``run.systems`` in order, then the variants."""
    return [*config.run.systems, *variants_of(config)]


def builtin_of(config: Config, system: str) -> str:
    """The built-in system that a system is, or is a variant of."""
    variants = variants_of(config)
    return variants[system].of if system in variants else system


def system_of(config: Config, system: str) -> System:
    """What a system, or what it is a variant of, is."""
    return SYSTEMS[builtin_of(config, system)]


def config_of(config: Config, system: str) -> Config:
    """The configuration as it is for one system: a copy with the options that a variant changes."""
    variants = variants_of(config)
    if system not in variants:
        return config
    own = copy.deepcopy(config)
    for name, value in variants[system].overrides.items():
        section, _, key = name.partition(".")
        setattr(getattr(own, section), key, value)
    return own


def _varies(config: Config, system: str, *sections: str) -> bool:
    variant = variants_of(config).get(system)
    return variant is not None and any(name.partition(".")[0] in sections for name in variant.overrides)


def profile_folder(config: Config, system: str) -> str:
    """The folder (in the run folder) with the activation counts that a system's masks are selected from."""
    return f"variants/{system}/profile" if _varies(config, system, "profile") else "profile"


def selected_folder(config: Config, system: str) -> str:
    """The folder with the neurons that were selected for a system, or whose sizes its random masks take."""
    return f"variants/{system}/masks" if _varies(config, system, "profile", "select") else "masks"


def heads_folder(config: Config, system: str) -> str:
    """The folder with the attention heads of each direction in a system, or those whose numbers its random ones take."""
    return f"variants/{system}/head_masks" if _varies(config, system, "heads") else "head_masks"


def masks_folder(config: Config, system: str) -> str | None:
    """The folder with the neuron masks of a system; None where it has none."""
    kind = system_of(config, system)
    if not kind.masks:
        return None
    return selected_folder(config, system).removesuffix("masks") + kind.masks


def finetuned_system(config: Config, system: str) -> str:
    """The system of models for each direction that a LaSS system takes its masks from: the one trained alike."""
    variants = variants_of(config)
    wanted = _finetuning(variants[system].overrides) if system in variants else {}
    for name, variant in variants.items():
        if variant.of == "finetuned" and variant.overrides == wanted:
            return name
    if wanted:
        raise ValueError(
            f"run.variants: {system} needs fine-tuned models with {wanted}; add a variant of finetuned with these options"
        )
    return "finetuned"


def _finetuning(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if name.startswith("finetune.")}


def recipe_of(kind: System, own: Config) -> Recipe:
    """How a system with a recipe trains.

    Args:
        kind: of the system.
        own: the configuration as it is for it, see :func:`config_of`.
    """
    assert kind.recipe is not None
    return Recipe(kind.recipe, getattr(own, SECTIONS[kind.recipe]))


def masked_systems(config: Config) -> Iterator[str]:
    """The systems with neuron masks."""
    return (system for system in system_names(config) if system_of(config, system).masks)
