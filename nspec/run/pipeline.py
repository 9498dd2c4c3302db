"""The whole chain, from parallel text to a report: who does the work of each stage.

Which stages there are stands in :mod:`nspec.run.stages`. Each is a :class:`~nspec.run.stages.Stage` of the run folder; see
there for what happens in a second run.
Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import read_json, sha256, write_json, write_text
from nspec.mt.scoring.decoded import decoding, engine_of, record_of, translations
from nspec.processes import World
from nspec.run.config import Config
from nspec.run.engine import choose_engine, recorded_engine
from nspec.run.estimate import Estimate, estimate, measure
from nspec.run.folder import Run
from nspec.run.machine import check_machine, quieten
from nspec.run.readiness import (
    check_adapters,
    check_model,
    check_other_texts,
    check_precision,
    check_pretrained,
    check_rules,
    check_score,
)
from nspec.run.stages import baseline_of, stage_name, stages_of, trained_systems, training_stage, weight_masks_stage
from nspec.run.systems import (
    SELECT_USES,
    config_of,
    masked_systems,
    masks_folder,
    profile_folder,
    selected_folder,
    system_names,
    system_of,
)
from nspec.terminal import Display, duration

if TYPE_CHECKING:
    from nspec.mt.scoring.engine import Engine
    from nspec.mt.text.prepared import PreparedData


class Pipeline:
    """The stages of a run as methods. Use as a context: it locks the run folder and joins the other processes.

    Args:
        config: a validated configuration.
        redo: stages (or all of a kind: ``specialize``) whose folders are moved away first, with all that follows from them.
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
        self._estimate: Estimate | None = None  # of the whole run, while all of it is done
        self._chosen: Engine | None = None

    def __enter__(self) -> Pipeline:
        self.world.connect(self.config.run.device)
        self.world.lead(self._begin)
        return self

    def _begin(self) -> None:
        recorded_engine(self.config, self.run.following(self._redo))  # raises before anything is changed
        self.run.begin(self._redo, self.display.line)

    def __exit__(self, *_: object) -> None:
        self.run.__exit__()
        self.world.close()

    def _do(self, name: str, work: Callable[[Path], None], everyone: bool = False) -> None:
        def quietly(folder: Path) -> None:
            quieten(self.config.run.threads)
            work(folder)

        begun = time.monotonic()
        if self.run.do(name, quietly, everyone=everyone, tell=self.display.line):
            seconds, left = time.monotonic() - begun, ""
            if self._estimate is not None:
                self._estimate.done(name, seconds)
                left = f"; about {duration(self._estimate.left())} left" if self._estimate.expected else ""
            self.display.line(f"{name}: done in {duration(seconds)}{left}")
        gc.collect()  # a model and its optimiser hold each other; the next stage needs the memory

    def all(self) -> Path:
        """Every stage that is not done yet.

        Returns:
            The page.
        """
        self.prepare()
        self._engine()
        self.world.lead(self._look_ahead)
        self.train()
        if any(masked_systems(self.config)):
            self.profile()
            self.select()
        self.specialize()
        self.evaluate()
        return self.report()

    def _look_ahead(self) -> None:
        """Says how long the run will take, where there is something to train or to translate."""
        to_come = [name for name in self.run.stages if not self.run.finished(name)]
        if not any(name.startswith(("train", "specialize", "evaluate")) for name in to_come):
            return
        quieten(self.config.run.threads)
        speed = measure(self.config, self._data(), self._engine().name)
        gc.collect()
        self._estimate = estimate(self.config, self._data(), to_come, speed, self.world.size)
        self.display.line(
            f"the run will take {self._estimate} on this machine, as a few steps say; trainings may stop early"
        )

    # The stages

    def prepare(self) -> None:
        """Text to token ids: ``prepared/``."""
        self.world.lead(functools.partial(check_score, self.config))

        def work(folder: Path) -> None:
            from nspec.mt.text.prepare import prepare
            from nspec.mt.text.prepared import summary

            check_machine(self.config)  # before text is read, and long before anything is trained
            with self.display.bar("prepare") as progress:
                config = self.config
                if config.model.pretrained:
                    check_pretrained(config)
                prepare(config.corpus, config.tokenizer, config.model, config.run.seed, folder, progress=progress)
            for line in summary(read_json(folder / "meta.json")):
                self.display.line(f"  {line}")

        self._do("prepare", work)
        data = self._data()
        check_adapters(self.config, data.tasks)
        check_rules(self.config, data.tasks)
        check_precision(self.config)

    def train(self) -> None:
        """The dense model: ``systems/dense/``."""
        self.world.lead(functools.partial(check_score, self.config))

        def work(folder: Path) -> None:
            from nspec.mt.model import build_model
            from nspec.mt.scoring.search import check_beam
            from nspec.mt.text.tokenizer_fit import token_ids
            from nspec.mt.training.train import train_system

            data = self._data()
            check_beam(self.config.decode.beam, len(token_ids(data.tokenizer)))
            model = build_model(self.config.model, data.tokenizer, self.config.run.seed)
            if self.config.model.pretrained:
                check_model(self.config, model)
            config, run = self.config, self.config.run
            train_system(
                "dense",
                config.train,
                data,
                model,
                folder,
                seed=run.seed,
                device=run.device,
                decode=config.decode,
                starting=self.run.starting,
            )

        if not self.run.finished("train"):  # here, so that nothing has begun with sizes that must be changed
            check_machine(self.config)
            if self.run.finished("prepare"):
                data = self._data()
                self.world.lead(functools.partial(check_other_texts, self.config, data.languages, data.tasks))
        self._do("train", work, everyone=True)

    def profile(self) -> None:
        """How often each feed-forward neuron of the dense model fires, for each direction: ``profile/``."""
        for folder, system in self._made(profile_folder).items():
            self._do(stage_name("profile", folder), functools.partial(self._profile, system), everyone=True)

    def _profile(self, system: str, folder: Path) -> None:
        from nspec.mt.profiling import profile_tasks
        from nspec.mt.text.other import OtherText

        own = config_of(self.config, system)
        model, _ = self._system("dense")
        with self.display.bar("profile") as progress:
            text = OtherText(own.profile, own.corpus, own.run.seed, self._data()) if own.profile.path else self._data()
            counts = profile_tasks(model, text, own.profile, own.train.batch_tokens, progress=progress)
        if self.world.rank == 0:
            counts.save(folder)

    def select(self) -> None:
        """The neurons that each direction keeps: ``masks/``, and as many random ones: ``random_masks/``."""
        for folder, system in self._made(selected_folder).items():
            self._do(stage_name("select", folder), functools.partial(self._select, system))
        for place, system in self._made(masks_folder).items():
            if system_of(self.config, system).masks == "random_masks":
                self._do(stage_name("random_masks", place), functools.partial(self._randomize, system))

    def _select(self, system: str, folder: Path) -> None:
        import nspec

        counts = nspec.ActivationCounts.load(self.folder / profile_folder(self.config, system))
        all_layers, own = len(counts.layers), config_of(self.config, system).select
        if own.layers:
            try:
                counts = counts.only(own.layers)
            except ValueError as error:
                raise ValueError(f"select.layers: {error}") from None
        options: dict[str, float] = {used: getattr(own, used) for used in SELECT_USES[own.rule]}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            masks = nspec.select(counts, rule=own.rule, **options)  # type: ignore[arg-type]
        for warning in said:
            self.display.line(f"  {warning.message}")
        masks.save(folder)
        shares = [share for layers in masks.density().values() for share in layers.values()]
        of = f" of {len(masks.layers)} of {all_layers} layers" if own.layers else ""
        self.display.line(f"  a direction keeps {sum(shares) / len(shares):.1%} of the neurons{of} on average")

    def _randomize(self, system: str, folder: Path) -> None:
        import nspec

        masks = nspec.NeuronMasks.load(self.folder / selected_folder(self.config, system))
        nspec.random_masks(masks, seed=self.config.run.seed).save(folder)

    def specialize(self, system: str | None = None) -> None:
        """Trains a system on from the dense one, with a fresh optimiser (all of them: None): ``systems/<system>/``.

        Raises:
            ValueError: the run has no such system, or it is the dense one.
        """
        if system == "dense":
            raise ValueError("--system dense: it is trained by `nspec train`; the others continue from it")
        trained = trained_systems(self.config)
        if system is not None and system not in trained:
            self._known(system)  # raises
        for stage in [training_stage(system)] if system else list(self.run.stages):
            if stage.startswith("weight_masks"):
                owner = next(name for name in trained if weight_masks_stage(self.config, name) == stage)
                self._do(stage, functools.partial(self._prune, owner))
            elif stage.startswith("specialize:"):
                self._do(stage, functools.partial(self._make, stage.partition(":")[2]), everyone=True)

    def _make(self, system: str, folder: Path) -> None:
        from nspec.run.train_systems import make_system

        make_system(system, self.config, self.folder, self._data(), folder, self.run.starting)

    def _prune(self, system: str, folder: Path) -> None:
        from nspec.run.train_systems import prune

        with self.display.bar("weight_masks") as progress:
            prune(system, self.config, self.folder, self._data(), folder, progress)

    def evaluate(self, system: str | None = None) -> None:
        """Translates and scores the test sets of a system (of all of them: None): ``scores/<system>/``.

        Raises:
            ValueError: the run has no such system.
        """
        chosen = [self._known(system)] if system else system_names(self.config)
        self.world.lead(functools.partial(check_score, self.config))
        if not all(self.run.finished(f"evaluate:{name}") for name in chosen):
            self.display.line(f"translations are made by {self._engine()}")
        for name in chosen:
            self._do(f"evaluate:{name}", functools.partial(self._translate, name), everyone=True)
        for name in system_names(self.config):  # the tests of others may be new too, when this is their baseline
            if self.run.finished(f"evaluate:{name}"):
                self._do(f"score:{name}", functools.partial(self._score, name))

    def _translate(self, system: str, folder: Path) -> None:
        """Each direction once, on one of the processes; what an earlier attempt translated is kept."""
        from nspec.run.translators import translator_of

        data = self._data()
        left = [task for task in data.tasks if not self._is_translated(folder, task, data)]
        total = sum(len(data.text("test", task)[0]) for task in left)
        self.world.wait()  # so that all see the same tasks left
        method = system_of(self.config, system).method
        engine = self._engine()
        of_task = translator_of(system, method, self._system, self.config.decode, engine.name)
        done = 0
        with self.display.bar(f"evaluate {system}", "sentences") as progress:
            for task in left[self.world.rank :: self.world.size]:
                translator = of_task(task)
                begun = time.monotonic()
                sources, _ = data.text("test", task)
                hypotheses = []
                for line in translator.translate(sources, task):
                    hypotheses.append(line)
                    done += 1
                    progress("", min(done * self.world.size, total), total)
                write_text(folder / f"{task}.hyp.txt", "".join(f"{line}\n" for line in hypotheses))
                # Last, as it says that the direction is done.
                facts: dict[str, Any] = {"sentences": len(hypotheses), "seconds": time.monotonic() - begun}
                facts |= {"engine": engine.name, "version": engine.version}
                write_json(record_of(folder, task), facts | {"sha256": sha256(folder / f"{task}.hyp.txt")})

    def _score(self, system: str, folder: Path) -> None:
        from nspec.analysis.bands import families_of, grouping_of
        from nspec.analysis.languages import why_no_families
        from nspec.mt.scoring.averages import run_groups
        from nspec.mt.scoring.scores import score_system
        from nspec.mt.text.prepared import languages_of_task

        data, base = self._data(), baseline_of(self.config)
        baseline = None
        if base != system and self.run.finished(f"evaluate:{base}"):
            baseline = (base, self._hypotheses(base, data))
        references = {task: data.text("test", task)[1] for task in data.tasks}
        pivot = self.config.corpus.pivot
        others = {code for task in data.tasks for code in languages_of_task(task)} - {pivot}
        if grouping_of(others) != "ec30" and (why := why_no_families()):
            self.display.line(f"  no averages by family: {why}; then `nspec evaluate CONFIG --redo score`")
        sizes = {task: data.size("train", task) for task in data.tasks}
        groups = run_groups(data.tasks, sizes, pivot, families_of(data.tasks, pivot))
        scores = score_system(self._hypotheses(system, data), references, self.config.score, pivot, baseline, groups)
        for warning in scores["warnings"]:
            self.display.line(f"  warning, {system} ({', '.join(warning['directions'])}): {warning['text']}")
        records = [decoding(folder, task) for task in data.tasks]
        seconds = sum(record["seconds"] for record in records)
        decode = vars(self.config.decode) | {"engine": engine_of(records[0])}
        write_json(folder / "scores.json", {"system": system, "decode": decode, **scores, "seconds": round(seconds, 3)})

    def _is_translated(self, folder: Path, task: str, data: PreparedData) -> bool:
        """Whether an earlier attempt has translated a direction; what it left broken is translated again."""
        if not record_of(folder, task).is_file():
            return False
        try:
            decoding(folder, task)
            translations(folder, task, len(data.text("test", task)[0]))
        except (ValueError, OSError) as error:
            self.display.line(f"  {task} is translated again: {error}")
            return False
        return True

    def _hypotheses(self, system: str, data: PreparedData) -> dict[str, list[str]]:
        folder = self.folder / "scores" / system
        try:
            for task in data.tasks:
                decoding(folder, task)
            return {task: translations(folder, task, len(data.text("test", task)[0])) for task in data.tasks}
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; --redo evaluate:{system} translates it again") from error

    def report(self) -> Path:
        """The page with scores, masks, curves and settings: ``report/index.html``.

        Returns:
            The page.
        """

        def work(folder: Path) -> None:
            from nspec.report import build_report

            build_report(self.folder)

        for system in system_names(self.config):  # scores that are not as they were written would change the page
            score = f"score:{system}"
            if self.run.finished(score) and self.run.finished(f"evaluate:{system}") and self.run.damage(score):
                self._do(score, functools.partial(self._score, system))
        self._do("report", work)
        return self.folder / "report" / "index.html"

    # Helpers

    def _engine(self) -> Engine:
        """What translates: chosen once for this command, by one of the processes."""
        if self._chosen is None:
            from nspec.processes import resolve_device

            device = resolve_device(self.config.run.device)
            self._chosen = self.world.lead(lambda: choose_engine(self.config, device))
        return self._chosen

    def _data(self) -> PreparedData:
        from nspec.mt.text.prepared import PreparedData

        return PreparedData(self.folder / "prepared")

    def _system(self, system: str, device: str = "") -> tuple[Any, Any]:
        from nspec.mt.model import load_system
        from nspec.processes import resolve_device

        place = device or resolve_device(self.config.run.device)
        kind = system_of(self.config, system.partition("/")[0])  # system/direction where each has a model
        return load_system(self.folder / "systems" / system / "model", place, kind.made_by)

    def _known(self, system: str) -> str:
        if system not in system_names(self.config):
            raise ValueError(f"--system {system}: the run has {', '.join(system_names(self.config))}")
        return system

    def _made(self, folder_of: Callable[[Config, str], str | None]) -> dict[str, str]:
        """The folders that systems with masks read, each with the first of these systems; the run's own first.

        Raises:
            ValueError: no system has masks.
        """
        found: dict[str, str] = {}
        for system in masked_systems(self.config):
            if folder := folder_of(self.config, system):
                found.setdefault(folder, system)
        if not found:
            raise ValueError(
                f"no system of this run needs neuron masks (run.systems is {self.config.run.systems}); "
                "add forward, update or random"
            )
        return dict(sorted(found.items(), key=lambda item: "/" in item[0]))
