"""The whole chain, from parallel text to a report: which arrows there are, what each reads, and who does the work.

    prepare -> train -> profile -> select (-> random_masks) -> specialize:* -> evaluate:* -> score:* -> report

Each arrow is a :class:`~nspec.mt.stages.Stage` of the run folder; see there for what happens in a second run.
Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nspec.files import read_json, write_json, write_text
from nspec.mt.config import Config
from nspec.mt.display import Display, duration
from nspec.mt.options import render
from nspec.mt.stages import Run, Stage
from nspec.mt.world import World

if TYPE_CHECKING:
    from nspec.mt.data import PreparedData

MODES: dict[str, Literal["forward", "update"] | None] = {
    "continued": None,
    "forward": "forward",
    "update": "update",
    "random": "forward",
}
"""How each system that starts from the dense one is specialised."""

_MASK_STAGES = {"masks": "select", "random_masks": "random_masks"}  # which stage makes which folder
_PREPARED = ("prepared/meta.json", "prepared/tokenizer/*")


def masks_of(system: str) -> str | None:
    """The folder (in the run folder) with the masks of a system, None where it has none."""
    if MODES.get(system) is None:
        return None
    return "random_masks" if system == "random" else "masks"


def baseline_of(config: Config) -> str:
    """The system that the others are tested against: ``score.baseline``, or dense where that is not in the run."""
    return config.score.baseline if config.score.baseline in config.run.systems else "dense"


def stages_of(config: Config) -> list[Stage]:
    """The arrows of a run with this configuration, in an order in which they can be done."""
    others = [system for system in config.run.systems if system != "dense"]
    modes = [MODES[system] for system in others]
    # Validation BLEU translates greedily up to this length; it matters only where it picks the checkpoint.
    length = ("decode.max_length_ratio",)
    picks = {name: length if getattr(config, name).best == "bleu" else () for name in ("train", "specialize")}
    text = ("corpus", "tokenizer", "model.pretrained", "model.max_positions", "run.seed")
    stages = [
        Stage("prepare", "prepared", options=text),
        Stage(
            "train",
            "systems/dense",
            options=("model", "train", "run.seed", *picks["train"]),
            inputs=_PREPARED,
            after=("prepare",),
            resumable=True,
        ),
    ]
    if any(modes):
        profiled = (*_PREPARED, *_weights("dense"))
        stages += [
            Stage("profile", "profile", ("profile",), profiled, ("train",)),
            Stage("select", "masks", ("select",), ("profile/counts.*",), ("profile",)),
        ]
    if "random" in others:
        stages.append(Stage("random_masks", "random_masks", ("run.seed",), ("masks/masks.*",), ("select",)))
    for system in others:
        masks = masks_of(system)
        stages.append(
            Stage(
                f"specialize:{system}",
                f"systems/{system}",
                options=("specialize", "run.seed", *picks["specialize"]),
                inputs=(*_PREPARED, *_weights("dense"), *([f"{masks}/masks.*"] if masks else [])),
                after=("train", *([_MASK_STAGES[masks]] if masks else [])),
                resumable=True,
            )
        )
    for system in config.run.systems:
        trained = "train" if system == "dense" else f"specialize:{system}"
        inputs = (*_PREPARED, *_weights(system))
        stages.append(Stage(f"evaluate:{system}", f"scores/{system}", ("decode",), inputs, (trained,), resumable=True))
    for system in config.run.systems:
        folders = dict.fromkeys([system, baseline_of(config)])
        stages.append(
            Stage(
                f"score:{system}",
                f"scores/{system}",
                options=("score",),
                inputs=tuple(f"scores/{name}/stage.json" for name in folders),
                after=(f"evaluate:{system}",),
                derived=True,
                record="stage-score.json",
            )
        )
    results = ["config.yaml", "masks/masks.*", "random_masks/masks.*"]
    for system in config.run.systems:
        results += [f"systems/{system}/summary.json", f"systems/{system}/log.jsonl", f"scores/{system}/scores.json"]
    stages.append(Stage("report", "report", inputs=tuple(results), after=("prepare",), derived=True))
    return stages


def _weights(system: str) -> tuple[str, ...]:
    folder = f"systems/{system}/model"
    return f"{folder}/*.safetensors", f"{folder}/config.json", f"{folder}/masks/*", f"{folder}/nspec.json"


class Pipeline:
    """The arrows of a run as methods. Use as a context: it locks the run folder and joins the other processes.

    Args:
        config: a validated configuration.
        redo: stages (or groups: ``specialize``) whose folders are moved away first, with all that follows from them.
        display: where progress is shown.

    Raises:
        ValueError: another process works in the run folder, or what is there was made with other options.
    """

    def __init__(self, config: Config, redo: tuple[str, ...] = (), display: Display | None = None) -> None:
        self.config = config
        self.world = World()
        self.display = display or Display(quiet=self.world.rank > 0)
        self.run = Run(config, stages_of(config), self.world)
        self.folder = self.run.folder
        self._redo = redo

    def __enter__(self) -> Pipeline:
        self.world.connect(self.config.run.device)
        self.world.lead(self._enter)
        return self

    def _enter(self) -> None:
        self.run.__enter__()
        try:
            again = self.run.following(self._redo)
            self.run.check(again)
            for folder in self.run.set_aside(again):
                self.display.line(f"the old results are kept in {folder}")
            write_text(self.folder / "config.yaml", render(self.config))
        except BaseException:
            self.run.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.run.__exit__()
        self.world.close()

    def _do(self, name: str, work: Callable[[Path], None], everyone: bool = False) -> None:
        def quietly(folder: Path) -> None:
            quieten(self.config.run.threads)
            work(folder)

        begun = time.monotonic()
        if self.run.do(name, quietly, everyone=everyone, tell=self.display.line):
            self.display.line(f"{name}: done in {duration(time.monotonic() - begun)}")
        gc.collect()  # a model and its optimiser hold each other; the next stage needs the memory

    def all(self) -> Path:
        """Every arrow that is not done yet.

        Returns:
            The page.
        """
        self.prepare()
        self.train()
        if "profile" in self.run.stages:
            self.profile()
            self.select()
        self.specialize()
        self.evaluate()
        return self.report()

    # The arrows

    def prepare(self) -> None:
        """Text to token ids: ``prepared/``."""

        def work(folder: Path) -> None:
            from nspec.mt.prepare import prepare, summary

            with self.display.bar("prepare") as progress:
                prepare(self.config, folder, progress=progress)
            for line in summary(read_json(folder / "meta.json")):
                self.display.line(f"  {line}")

        self._do("prepare", work)

    def train(self) -> None:
        """The dense model: ``systems/dense/``."""

        def work(folder: Path) -> None:
            from nspec.mt.model import build_model
            from nspec.mt.training import train_system

            data = self._data()
            model = build_model(self.config.model, data.tokenizer, self.config.run.seed)
            train_system("dense", self.config, self.config.train, data, model, folder)

        self._do("train", work, everyone=True)

    def profile(self) -> None:
        """How often each feed-forward neuron of the dense model fires, for each direction: ``profile/``."""
        self._needs_masks("profile")

        def work(folder: Path) -> None:
            from nspec.mt.profiling import profile_tasks

            model, _ = self._system("dense")
            with self.display.bar("profile") as progress:
                counts = profile_tasks(
                    model, self._data(), self.config.profile, self.config.train.batch_tokens, progress=progress
                )
            if self.world.rank == 0:
                counts.save(folder)

        self._do("profile", work, everyone=True)

    def select(self) -> None:
        """The neurons that each direction keeps: ``masks/``, and as many random ones: ``random_masks/``."""
        self._needs_masks("select")

        def work(folder: Path) -> None:
            import nspec

            masks = nspec.select(nspec.ActivationCounts.load(self.folder / "profile"), k=self.config.select.k)
            masks.save(folder)
            shares = [share for layers in masks.density().values() for share in layers.values()]
            self.display.line(f"  a direction keeps {sum(shares) / len(shares):.1%} of the neurons on average")

        def random(folder: Path) -> None:
            import nspec

            masks = nspec.NeuronMasks.load(self.folder / "masks")
            nspec.random_masks(masks, seed=self.config.run.seed).save(folder)

        self._do("select", work)
        if "random_masks" in self.run.stages:
            self._do("random_masks", random)

    def specialize(self, system: str | None = None) -> None:
        """Trains a system on from the dense one, with a fresh optimiser (all of them: None): ``systems/<system>/``.

        Raises:
            ValueError: the run has no such system, or it is the dense one.
        """
        if system == "dense":
            raise ValueError("--system dense: it is trained by `nspec train`; the others continue from it")
        for name in [self._known(system)] if system else [s for s in self.config.run.systems if s != "dense"]:
            self._do(f"specialize:{name}", functools.partial(self._continue, name), everyone=True)

    def _continue(self, system: str, folder: Path) -> None:
        import nspec
        from nspec.mt.training import train_system

        model, _ = self._system("dense", device="cpu")  # the trainer moves it
        place = masks_of(system)
        masks = nspec.NeuronMasks.load(self.folder / place) if place else None
        settings, mode = self.config.specialize, MODES[system]
        if mode is None:  # with every row in the task, row_sparse_adamw is this
            settings = dataclasses.replace(settings, optimizer="adamw")
        train_system(system, self.config, settings, self._data(), model, folder, masks=masks, mode=mode)

    def evaluate(self, system: str | None = None) -> None:
        """Translates and scores the test sets of a system (of all of them: None): ``scores/<system>/``.

        Raises:
            ValueError: the run has no such system.
        """
        chosen = [self._known(system)] if system else self.config.run.systems
        for name in chosen:
            self._do(f"evaluate:{name}", functools.partial(self._translate, name), everyone=True)
        for name in self.config.run.systems:  # the tests of others may be new too, when this is their baseline
            if self.run.finished(f"evaluate:{name}"):
                self._do(f"score:{name}", functools.partial(self._score, name))

    def _translate(self, system: str, folder: Path) -> None:
        """Each direction once, on one of the processes; what an earlier attempt translated is kept."""
        from nspec.mt.translate import Translator

        data = self._data()
        left = [task for task in data.tasks if not _decoded(folder, task).is_file()]
        total = sum(len(data.text("test", task)[0]) for task in left)
        self.world.wait()  # so that all see the same tasks left
        model, tokenizer = self._system(system)
        translator = Translator(model, tokenizer, self.config.decode)
        done = 0
        with self.display.bar(f"evaluate {system}", "sentences") as progress:
            for task in left[self.world.rank :: self.world.size]:
                begun = time.monotonic()
                sources, _ = data.text("test", task)
                hypotheses = []
                for line in translator.translate(sources, task):
                    hypotheses.append(line)
                    done += 1
                    progress("", min(done * self.world.size, total), total)
                write_text(folder / f"{task}.hyp.txt", "".join(f"{line}\n" for line in hypotheses))
                # Last, as it says that the direction is done.
                write_json(_decoded(folder, task), {"sentences": len(hypotheses), "seconds": time.monotonic() - begun})

    def _score(self, system: str, folder: Path) -> None:
        from nspec.mt.scoring import score_system

        data, base = self._data(), baseline_of(self.config)
        baseline = None
        if base != system and self.run.finished(f"evaluate:{base}"):
            baseline = (base, self._hypotheses(base, data))
        references = {task: data.text("test", task)[1] for task in data.tasks}
        pivot = self.config.corpus.pivot
        scores = score_system(self._hypotheses(system, data), references, self.config.score, pivot, baseline)
        seconds = sum(read_json(_decoded(folder, task))["seconds"] for task in data.tasks)
        decode = vars(self.config.decode)
        write_json(folder / "scores.json", {"system": system, "decode": decode, **scores, "seconds": round(seconds, 3)})

    def _hypotheses(self, system: str, data: PreparedData) -> dict[str, list[str]]:
        folder = self.folder / "scores" / system
        return {task: (folder / f"{task}.hyp.txt").read_text("utf-8").split("\n")[:-1] for task in data.tasks}

    def report(self) -> Path:
        """The page with scores, masks, curves and settings: ``report/index.html``.

        Returns:
            The page.
        """

        def work(folder: Path) -> None:
            from nspec.report import build_report

            build_report(self.folder)

        self._do("report", work)
        return self.folder / "report" / "index.html"

    # Helpers

    def _data(self) -> PreparedData:
        from nspec.mt.data import PreparedData

        return PreparedData(self.folder / "prepared")

    def _system(self, system: str, device: str = "") -> tuple[Any, Any]:
        from nspec.mt.distributed import resolve_device
        from nspec.mt.model import load_system

        place = device or resolve_device(self.config.run.device)
        return load_system(self.folder / "systems" / system / "model", place)

    def _known(self, system: str) -> str:
        if system not in self.config.run.systems:
            raise ValueError(f"--system {system}: run.systems has {', '.join(self.config.run.systems)}")
        return system

    def _needs_masks(self, arrow: str) -> None:
        if arrow not in self.run.stages:
            raise ValueError(
                f"{arrow}: no system of this run needs masks (run.systems is {self.config.run.systems}); "
                "add forward, update or random"
            )


def _decoded(folder: Path, task: str) -> Path:
    return folder / f"{task}.decode.json"


def quieten(threads: int = 0) -> None:
    """Keeps libraries from writing between the lines of a run, and sets PyTorch's threads (0: as it chooses)."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
