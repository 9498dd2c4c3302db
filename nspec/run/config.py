"""The options of a run: every section, which stands beside what it configures, and the run's own.

The YAML files in ``configs/`` and the help come from here. Reading and writing them (YAML, ``--set key=value``, the
commented template) is in :mod:`nspec.run.yaml`. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nspec.mt.config import AdaptersConfig, HeadsConfig, LassConfig, ModelConfig, ProfileConfig, SelectConfig
from nspec.mt.scoring.config import DecodeConfig, ScoreConfig
from nspec.mt.text.config import CorpusConfig, TokenizerConfig
from nspec.mt.training.config import (
    BilingualConfig,
    CurriculumConfig,
    FinetuneConfig,
    ReptileConfig,
    SpecializeConfig,
    SurgeryConfig,
    TrainConfig,
)
from nspec.options import Option, option, options_of


@dataclass
class PlaceConfig:
    folder: str = option("runs/run", "where everything is written; a run started again goes on in it", path=True)
    seed: int = option(1, "of initialisation, sampling, dropout and random masks", least=0, most=2**32 - 1)
    threads: int = option(0, "CPU threads of PyTorch; 0: as PyTorch chooses", least=0, most=1024)
    device: str = option("auto", "auto takes the first GPU, else the CPU", ("auto", "cpu", "cuda"))


@dataclass
class RunConfig(PlaceConfig):
    systems: list[str] = option(
        ["dense", "continued", "forward", "update", "random"],
        "what is trained and compared; dense is always first, the others start from it with a fresh optimiser and train "
        "for the same number of updates: continued (dense), forward and update (specialised), these two with _encoder or "
        "_decoder (on that side only), random (forward, with random masks of the same sizes), neurons and neurons+shared "
        "(the neurons of each direction get parameters of their own; the rest is frozen, or trains on too), heads (of "
        "attention, those that matter most to each direction) and random_heads (as many, at random), lass (masks of single "
        "weights), adapters and adapters_family (a bottleneck for each direction or language family, the rest "
        "frozen), adapters+shared (for each direction, the rest trains on too); pcgrad and gradvac (gradient surgery "
        "between the directions of an update), temperature and curriculum (a temperature that changes, easy sentences "
        "first) and reptile (meta-updates first), all dense; and finetuned "
        "(from dense) and bilingual (from new weights), a model for each direction",
    )
    variants: list[str] = option(
        [],
        "further systems: one of the above with other options of profile, select, specialize, heads, lass, adapters, "
        "finetune, bilingual, surgery, curriculum or reptile, each a line such as forward-k70 = forward select.k=0.7",
    )
    hypothesis: str = option("", "what the run is to show, written before it; it stands first on the page")
    primary: str = option(
        "",
        "the comparison with score.baseline that tests it, declared before the run: a system, a metric (loss, bleu, "
        "chrf) and an average (all, from_en, to_en, level:low, ...), such as forward loss all; it is not corrected for "
        "others",
    )


class Sections:
    """What is configured by sections of options, each a dataclass: a run of translation, or one of fine-tuning."""

    run: PlaceConfig


@dataclass
class Config(Sections):
    """A whole run. Sections are attributes: ``config.train.lr``."""

    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    specialize: SpecializeConfig = field(default_factory=SpecializeConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    lass: LassConfig = field(default_factory=LassConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    bilingual: BilingualConfig = field(default_factory=BilingualConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    reptile: ReptileConfig = field(default_factory=ReptileConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


def types(root: type[Sections] = Config) -> dict[str, dict[str, Any]]:
    """Section -> option -> type, in the order of ``root``."""
    of: Any = root  # mypy takes no class for hashable
    return _types(of)


def fields(section: str, root: type[Sections] = Config) -> dict[str, Option]:
    """The options of a section by name, with what :func:`nspec.options.option` says of them."""
    return options_of(_sections(root)[section])


def each_option(
    sections: Iterable[str] | None = None, root: type[Sections] = Config
) -> Iterator[tuple[str, str, Option]]:
    """Section, key and declaration of every option, in order (of some sections alone)."""
    for section in types(root) if sections is None else sections:
        for key, declared in fields(section, root).items():
            yield section, key, declared


@functools.cache
def _types(root: Any) -> dict[str, dict[str, Any]]:
    return {name: typing.get_type_hints(section) for name, section in _sections(root).items()}


def _sections(root: type[Sections]) -> dict[str, type]:
    hints = typing.get_type_hints(root)
    return {field.name: hints[field.name] for field in dataclasses.fields(root)}  # type: ignore[arg-type]
