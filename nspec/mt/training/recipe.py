"""What makes a training other than plain: how it samples, and what becomes of the gradients of its directions.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from nspec.mt.training.config import CurriculumConfig, ReptileConfig, SurgeryConfig, TrainConfig

RecipeName = Literal["pcgrad", "gradvac", "temperature", "curriculum", "reptile"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
"""Every recipe by its name."""

SECTIONS: dict[RecipeName, Literal["surgery", "curriculum", "reptile"]] = {
    "pcgrad": "surgery",
    "gradvac": "surgery",
    "temperature": "curriculum",
    "curriculum": "curriculum",
    "reptile": "reptile",
}
"""The section of the configuration that a recipe has its options from."""


@dataclass(frozen=True)
class Recipe:
    """A recipe and its options.

    Attributes:
        name: which.
        options: its section.
    """

    name: RecipeName
    options: SurgeryConfig | CurriculumConfig | ReptileConfig

    @property
    def surgery(self) -> SurgeryConfig | None:
        """The options of gradient surgery; None for another recipe."""
        return self.options if isinstance(self.options, SurgeryConfig) else None

    @property
    def reptile(self) -> ReptileConfig | None:
        """The options of Reptile; None for another recipe."""
        return self.options if isinstance(self.options, ReptileConfig) else None

    @property
    def curriculum(self) -> CurriculumConfig | None:
        """The options of the difficulty curriculum; None for another recipe."""
        return self.options if isinstance(self.options, CurriculumConfig) and self.name == "curriculum" else None

    @property
    def has_length(self) -> bool:
        """Whether its updates depend on how many there are, so that a finished training cannot go on."""
        return self.surgery is None

    def described(self, settings: TrainConfig) -> dict[str, Any]:
        """What must be the same where a training goes on."""
        length = {"updates": settings.updates} if self.has_length else {}
        return {"name": self.name, **asdict(self.options), **length}

    def sampling(self, settings: TrainConfig) -> dict[str, Any]:
        """How :class:`nspec.mt.text.batches.TaskBatchSampler` samples for it."""
        if isinstance(self.options, CurriculumConfig) and self.name == "temperature":
            return {"temperature_end": self.options.temperature}
        if (own := self.curriculum) is not None:
            return {"competence": (own.start, own.until, own.difficulty)}
        return {"runs": (self.meta_updates(settings), settings.accumulate)} if self.reptile else {}

    def meta_updates(self, settings: TrainConfig) -> int:
        """How many of the updates are meta-updates."""
        return round(self.reptile.share * settings.updates) if self.reptile else 0

    def inner_steps(self, settings: TrainConfig) -> int:
        """Inner steps of a meta-update."""
        return (self.reptile.inner or settings.accumulate) if self.reptile else 1

    def check(self, settings: TrainConfig, world: int = 1) -> None:
        """Whether it goes with the other options of a training.

        Args:
            settings: the others.
            world: number of processes.

        Raises:
            ValueError: it does not.
        """
        if self.surgery is None and self.reptile is None:
            return
        if world > 1:
            raise ValueError(f"{self.name} takes one process, found {world}; start it without torchrun")
        if settings.tasks_per_batch > 1:
            raise ValueError(
                f"{self.name} takes micro-batches of one direction each: expected tasks_per_batch 1, found "
                f"{settings.tasks_per_batch}"
            )
        if settings.precision == "fp16":
            raise ValueError(f"{self.name} does not go with the loss scaling of precision fp16; take bf16 or fp32")
        if settings.accumulate < 2 and not (self.reptile and self.reptile.inner == 1):
            what = "compares the directions of an update" if self.surgery else "takes several inner steps an update"
            raise ValueError(
                f"{self.name} {what}, and accumulate is 1: each update has one micro-batch, and this would be plain "
                "training; expected accumulate of 2 or more (with fewer updates, for as many tokens)"
            )
        if settings.accumulate % self.inner_steps(settings):
            raise ValueError(
                f"reptile.inner: expected a divisor of accumulate ({settings.accumulate}), whose micro-batches the inner "
                f"steps share out, found {self.inner_steps(settings)}"
            )
