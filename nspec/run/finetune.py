"""Fine-tuning a language model for each of several languages, by several methods, and what each costs the others.

    text -> base -> profile -> select:METHOD -> base_perplexity -> tune:METHOD:LANGUAGE -> report

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path

from nspec.lm.config import RANDOM, RULES
from nspec.run.finetune_config import TuningConfig, like_of
from nspec.run.folder import Run
from nspec.run.machine import quieten
from nspec.run.stages import Stage
from nspec.run.tuning_work import Work
from nspec.terminal import Display, duration

_TEXT = ("text/*.txt",)
_BASE = ("base/base.json", "base/model/*")


def stages_of(config: TuningConfig) -> list[Stage]:
    """The stages of a run with this configuration, in an order in which they can be done."""
    rules = [method for method in config.tune.methods if method in RULES]
    stages = [
        Stage("text", "text", options=("text", "run.seed"), outputs=("*.txt",)),
        Stage("base", "base", ("model", "text.length", "run.seed"), _TEXT, ("text",), outputs=("base.json", "model/*")),
        Stage(
            "base_perplexity",
            "base_perplexity",
            ("text.length", "model.pretrained", "model.dtype"),
            (*_TEXT, *_BASE),
            ("base",),
            outputs=("result.json",),
        ),
    ]
    if rules:
        profiled = ("neurons.profile_tokens", "text.length", "model.pretrained", "model.dtype")
        stages.append(Stage("profile", "profile", profiled, (*_TEXT, *_BASE), ("base",), outputs=("counts.*",)))
    for method in sorted(rules, key=lambda method: method == RANDOM):  # random ones copy the sizes of others
        like = like_of(config) if method == RANDOM else None
        stages.append(
            Stage(
                f"select:{method}",
                f"masks/{method}",
                _selected_by(method),
                (("profile/counts.*",) if like is None else ("profile/counts.*", f"masks/{like}/masks.*")),
                ("profile",) if like is None else ("profile", f"select:{like}"),
                outputs=("masks.*",),
            )
        )
    for method in config.tune.methods:
        options = ("text.length", "model.pretrained", "model.dtype", "run.seed", *_tuned_by(config, method))
        for language in config.text.languages:
            masks, after = ((f"masks/{method}/masks.*",), (f"select:{method}",)) if method in RULES else ((), ())
            stages.append(
                Stage(
                    f"tune:{method}:{language}",
                    f"tuned/{method}/{language}",
                    options,
                    (*_TEXT, *_BASE, *masks),
                    ("base", *after),
                    outputs=("result.json", "neurons.*", "adapter_*", "model/*"),
                )
            )
    results = ("config.yaml", "base/base.json", "base_perplexity/result.json", "tuned/*/*/result.json")
    stages.append(Stage("report", "report", inputs=results, after=("base_perplexity",), derived=True, outputs=("*",)))
    return stages


def _selected_by(method: str) -> tuple[str, ...]:
    used = {"lape": ("neurons.rate",), "share": ("neurons.k",), RANDOM: ("neurons.share", "run.seed")}
    return used.get(method, ("neurons.share",))


def _tuned_by(config: TuningConfig, method: str) -> tuple[str, ...]:
    """The options of a fine-tuning that are of its method."""
    own = {
        "lora": ("tune.lr_lora", "tune.lora_rank", "tune.lora_alpha", "tune.lora_dropout"),
        "full": ("tune.lr_full",),
    }
    shared = ("updates", "sequences", "accumulate", "schedule", "weight_decay", "clip", "precision")
    mine = own.get(method, ("tune.lr_neurons", "neurons.parts", "neurons.biases"))
    saved = ("tune.save_full",) if method == "full" else ()
    return (*(f"tune.{name}" for name in shared), *mine, *saved)


class TuningRun:
    """The stages of a run of fine-tuning. Use as a context: it locks the run folder.

    Args:
        config: a validated configuration.
        redo: stages (or all of a kind: ``tune``) whose folders are moved away first, with all that follows from them.
        display: where progress is shown.

    Raises:
        ValueError: another process works in the run folder, or what is there was made with other options.
    """

    def __init__(self, config: TuningConfig, redo: tuple[str, ...] = (), display: Display | None = None) -> None:
        self.config = config
        self.display = display or Display()
        self.run = Run(config, stages_of(config))
        self.folder = self.run.folder
        self._redo = redo
        self._taken: dict[str, list[float]] = {}  # seconds of the fine-tunings done, by method

    def __enter__(self) -> TuningRun:
        if self.run.world.size > 1:
            raise ValueError(
                f"`nspec finetune` is one process, and was started as {self.run.world.size}: start it without torchrun"
            )
        self.run.begin(self._redo, self.display.line)
        return self

    def __exit__(self, *_: object) -> None:
        self.run.__exit__()

    def _do(self, name: str, work: Callable[[Path], None]) -> float | None:
        """Seconds that a stage took; None where it was done."""

        def quietly(folder: Path) -> None:
            quieten(self.config.run.threads)
            folder.mkdir(parents=True, exist_ok=True)
            work(folder)

        begun = time.monotonic()
        ran = self.run.do(name, quietly, tell=self.display.line)
        gc.collect()
        return time.monotonic() - begun if ran else None

    def all(self) -> Path:
        """Every stage that is not done yet.

        Returns:
            The page.
        """
        if self.config.model.pretrained:
            from nspec.lm.model import check_pretrained

            check_pretrained(self.config.model.pretrained)  # before text is read
        work = Work(self.config, self.folder, self.display)
        steps: dict[str, Callable[..., None]] = {
            "text": work.text,
            "base": work.base,
            "base_perplexity": work.base_perplexity,
            "profile": work.profile,
            "select": work.select,
            "tune": work.tune,
        }
        for name in self.run.stages:
            step, *of = name.split(":")
            if step != "report":
                seconds = self._do(name, functools.partial(steps[step], *of))
                if step == "base" and seconds is None and self._to_tune():
                    work.check()  # other methods or parts than those that the base was made for
                if seconds is not None and step == "tune":
                    self._taken.setdefault(of[0], []).append(seconds)
                self._tell(name, seconds)
        self._do("report", work.report)
        return self.folder / "report" / "index.html"

    def _to_tune(self) -> bool:
        """Whether a fine-tuning is to come."""
        return any(name.startswith("tune:") and not self.run.finished(name) for name in self.run.stages)

    def _tell(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            left = self._left()
            more = f"; about {duration(left)} of fine-tuning left" if left else ""
            self.display.line(f"{name}: done in {duration(seconds)}{more}")

    def _left(self) -> float:
        """Seconds that the fine-tunings to come will take: as those of their method, or of all where there is none."""
        every = [seconds for taken in self._taken.values() for seconds in taken]
        left = 0.0
        for name in self.run.stages:
            if name.startswith("tune:") and not self.run.finished(name) and every:
                mine = self._taken.get(name.split(":")[1], every)
                left += sum(mine) / len(mine)
        return left
