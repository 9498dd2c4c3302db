"""The folder of a run: what each stage depends on, whether it is done, and going on after a kill.

A stage owns a folder. While it works, ``started.json`` stands there with its options and the SHA-256 of its inputs;
when it is through, ``stage.json`` takes its place, with what it wrote: of small files the SHA-256, of large ones the
size. Started again, a stage

- that is finished, with the same options and inputs, and with all that it wrote as it was, is skipped;
- that is finished with others is an error that names them, because mixing two settings in one run would be worse;
- that is finished, but whose files are gone or changed, is an error that names them;
- a training that is given more updates, or more patience, goes on where it ended; what was made from its model is set
  aside when that has changed, and made anew;
- that is not finished goes on where it was if it can (training, translating the test sets), else starts over.

Stages that only derive files from others in seconds (scores, the report) are made anew instead of an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from nspec.files import sha256, write_json, write_text
from nspec.processes import World
from nspec.run.config import Sections
from nspec.run.records import (
    height,
    holds_only_parts,
    is_gone,
    move_aside,
    read_record,
    redo_hint,
    started_name,
    stopped_early,
    versions,
    was_made_of,
)
from nspec.run.stages import Stage
from nspec.run.yaml import flatten, render_complete

# These change where, how fast or how verbosely something is computed, not what: results agree to rounding.
# A run may go on with others, for instance on a machine with less memory.
NEUTRAL = {
    "run.folder",
    "run.threads",
    "run.device",
    "run.systems",
    "run.variants",
    "train.log_every",
    "train.compile",
    "specialize.log_every",
    "specialize.compile",
    "decode.engine",  # what was taken stands with the translations, and holds: nspec.run.engine
    "decode.batch_tokens",
}

_CHAINS = {"prepared": "nspec run", "text": "nspec finetune"}
"""The folder of the first stage of each command that makes a run."""

_HASHED = 1 << 24  # bytes; what is larger are weights, which later stages hash as their inputs
_CHECKPOINTS = "checkpoints/checkpoint-*/nspec_state.json"

_PART = re.compile(r"\..+\.(\d+)\.part")  # of nspec.files.replacing


class Run:
    """The run folder of ``config``, with its stages in order; use as a context, which locks the folder.

    Raises:
        ValueError: another process works in the folder; a finished stage was made with other options or inputs.
    """

    def __init__(self, config: Sections, stages: list[Stage], world: World | None = None) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.stages = {stage.name: stage for stage in stages}
        self.world = world or World()
        self._values = flatten(config)
        self._defaults = flatten(type(config)())
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._lock: Any = None
        self._raising: Stage | None = None  # its work has not changed anything yet

    def __enter__(self) -> Run:
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a+", encoding="utf-8")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.seek(0)
                owner = self._lock.read().strip()
                self._lock.close()
                raise ValueError(
                    f"{self.folder} is in use by another process ({owner}); wait for it, or give another run.folder"
                ) from None
            # Only a help for the message above: the lock is the kernel's, and ends with the process.
            self._lock.truncate(0)
            with contextlib.suppress(OSError):
                self._lock.write(f"process {os.getpid()} on {platform.node()}")
                self._lock.flush()
            for part in self.folder.glob(".*.part"):
                if (owner := _PART.fullmatch(part.name)) and is_gone(int(owner[1])):
                    part.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.close()
            self._lock = None

    def begin(self, redo: Iterable[str], tell: Callable[[str], None]) -> None:
        """Enters, and makes the folder ready for work: what is to be made anew stands aside, ``config.yaml`` is written.

        Args:
            redo: stages (or all of a kind) that are made anew, with all that follows from them.
            tell: is told where old results are kept.

        Raises:
            ValueError: the folder is in use, or see :meth:`following` and :meth:`check`; it is not held then.
        """
        self.__enter__()
        try:
            again = self.following(redo)
            self.check(again)
            for folder in self.set_aside(again):
                tell(f"the old results are kept in {folder}")
            write_text(self.folder / "config.yaml", render_complete(self.config))
        except BaseException:
            self.__exit__()
            raise

    # What a stage depends on

    def _options(self, stage: Stage) -> dict[str, Any]:
        return {
            name: value
            for name, value in (self._values | dict(stage.overrides)).items()
            if name not in NEUTRAL and (name in stage.options or name.partition(".")[0] in stage.options)
        }

    def _inputs(self, stage: Stage) -> dict[str, str]:
        return {
            path.relative_to(self.folder).as_posix(): self._hash(path)
            for pattern in stage.inputs
            for path in sorted(self.folder.glob(pattern))
        }

    def _hash(self, path: Path) -> str:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = sha256(path)
        return self._hashes[key]

    def _outputs(self, stage: Stage) -> dict[str, str | int]:
        """What the stage wrote, by path inside its folder: the SHA-256, or the bytes of a large file."""
        folder = self.folder / stage.folder
        found = {path for pattern in stage.outputs for path in folder.glob(pattern) if path.is_file()}
        own = {folder / stage.record, folder / started_name(stage)}
        return {path.relative_to(folder).as_posix(): self._fingerprint(path) for path in sorted(found - own)}

    def _fingerprint(self, path: Path) -> str | int:
        size = path.stat().st_size
        return size if size > _HASHED else self._hash(path)

    def damage(self, name: str) -> list[str]:
        """What a finished stage wrote and is not there as it was, in words; nothing for a stage of an older version."""
        stage = self.stages[name]
        folder, found = self.folder / stage.folder, []
        try:
            outputs = read_record(folder / stage.record)["outputs"]
        except ValueError as error:
            return [str(error)]
        for part, before in outputs.items():
            path = folder / part
            if not path.is_file():
                found.append(f"{path} is gone")
            elif self._fingerprint(path) != before:
                state = "has changed" if path.stat().st_size else "is empty, and was not"
                found.append(f"{path} {state} since it was written")
        return found

    def finished(self, name: str) -> bool:
        """Whether the stage has its record (of whatever options)."""
        stage = self.stages[name]
        return (self.folder / stage.folder / stage.record).is_file()

    def _differences(self, stage: Stage, record: dict[str, Any], to_come: Collection[str]) -> list[str]:
        """What ``record`` says other than the present options and inputs, in words."""
        options = record["options"]
        found = [
            f"{name} was {options.get(name, self._defaults[name])!r}, is {value!r}"
            for name, value in self._options(stage).items()
            if options.get(name, self._defaults[name]) != value
        ]
        before, now = record["inputs"], self._inputs(stage)
        if all(self.finished(name) and name not in to_come for name in stage.after):  # else inputs are looked at later
            found += [f"its input {name} has changed" for name in now if before.get(name) != now[name]]
            found += [f"its input {name} is gone" for name in before if name not in now]
        return found

    def _raised(self, stage: Stage, record: dict[str, Any], differences: list[str]) -> bool:
        """Whether all that differs from ``record`` is that raisable options are higher now."""
        before, now = record.get("options", {}), self._options(stage)
        changed = [name for name in now if before.get(name, self._defaults[name]) != now[name]]
        if len(changed) < len(differences) or not set(changed) <= set(stage.raisable):  # inputs have changed, or others
            return False
        return all(height(name, now[name]) > height(name, before.get(name, self._defaults[name])) for name in changed)

    def _refuse(self, stage: Stage, verb: str, differences: list[str]) -> None:
        listed, hint = "; ".join(differences), ""
        if stage.summaries and stage.raisable:
            hint = (
                f"Its trainings keep no checkpoints: {' or '.join(stage.raisable)} may be raised alone, and where none of "
                "them stopped early. "
            )
        elif stage.raisable and verb == "made":
            there = any((self.folder / stage.folder).glob(_CHECKPOINTS))
            lacking = "" if there else ", and from its last checkpoint, which is not there"
            hint = f"A finished training goes on where {' or '.join(stage.raisable)} alone is raised{lacking}. "
        raise ValueError(
            f"{self.folder / stage.folder} was {verb} with other settings: {listed}. {hint}Give another folder "
            f"(--set run.folder=...), or {redo_hint(stage)}"
        )

    # Before work

    def check(self, but: Collection[str] = ()) -> None:
        """Looks at every stage before anything is written.

        Args:
            but: names of stages that are to be made anew, whatever they were made with.

        Raises:
            ValueError: a finished or resumable stage has other options or inputs, or its record or what it wrote is not
                there as it was (all differences are named), or the folder holds a run of another command.
        """
        first = next(iter(self.stages.values())).folder
        for folder, command in _CHAINS.items():
            if folder != first and any(
                (self.folder / folder / name).is_file() for name in ("stage.json", "started.json")
            ):
                raise ValueError(
                    f"{self.folder} holds a run of `{command}`; give another folder (--set run.folder=...)"
                )
        for stage in self.stages.values():
            if stage.name not in but:
                self._state(stage, but)

    def _state(self, stage: Stage, to_come: Collection[str] = ()) -> str:
        """What becomes of a stage.

        ``done``, ``stale`` (derived: make it anew), ``begun`` (go on), ``raised`` (go on, to a later end), ``partial``
        (start over) or ``new``.
        """
        folder = self.folder / stage.folder
        for record, verb in [(stage.record, "made"), (started_name(stage), "begun")]:
            if not (folder / record).is_file():
                continue
            if verb == "begun" and not stage.resumable:
                return "partial"
            try:
                content = read_record(folder / record)
            except ValueError as error:
                if stage.derived:
                    return "stale"
                raise ValueError(f"{error}. Put it back as it was, or {redo_hint(stage)}") from error
            differences = self._differences(stage, content, to_come)
            damage = self.damage(stage.name) if verb == "made" else []
            if (differences or damage) and stage.derived:
                return "stale"
            raised = bool(differences) and self._raised(stage, content, differences) and self._can_go_on(stage, verb)
            if differences and not raised:
                self._refuse(stage, verb, differences)
            if damage:  # also where it is to go on, which would make what is damaged look whole
                raise ValueError(f"{'; '.join(damage)}. Put it back as it was, or {redo_hint(stage)}")
            if raised:
                return "raised"
            return "done" if verb == "made" else "begun"
        return "new"

    def _can_go_on(self, stage: Stage, verb: str) -> bool:
        folder = self.folder / stage.folder
        if stage.summaries:
            return not any(stopped_early(path) for path in folder.glob(stage.summaries))
        return verb == "begun" or any(folder.glob(_CHECKPOINTS))

    def following(self, names: Iterable[str]) -> list[str]:
        """The stages of these names (or of all ``name:*``), and all that follow from them, in order.

        Raises:
            ValueError: there is no such stage.
        """
        chosen: set[str] = set()
        for name in names:
            found = {stage for stage in self.stages if stage == name or stage.startswith(f"{name}:")}
            if not found:
                raise ValueError(f"--redo {name}: there is no such stage; there are {', '.join(self.stages)}")
            chosen |= found
        for stage in self.stages.values():  # in order, so that one pass reaches all that follow
            if chosen.intersection(stage.after):
                chosen.add(stage.name)
        return [name for name in self.stages if name in chosen]

    def set_aside(self, names: Iterable[str]) -> list[Path]:
        """Moves the folders of stages to ``<folder>.old-N``, so that they are made anew; nothing is deleted.

        Derived stages keep their files, which will be written over, and only lose their record.

        Returns:
            The new folders.
        """
        moved = []
        for stage in [self.stages[name] for name in names]:
            folder = self.folder / stage.folder
            if stage.derived:
                (folder / stage.record).unlink(missing_ok=True)
            elif folder.exists():
                moved.append(move_aside(folder))
        return moved

    # Work

    def do(
        self,
        name: str,
        work: Callable[[Path], None],
        *,
        everyone: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Runs one stage unless it is done.

        Args:
            name: of the stage.
            work: does it, given the stage's folder, in which it may find what an unfinished attempt left. That of a stage
                that can be raised calls :meth:`starting`.
            everyone: every process of a torchrun calls ``work``; else only rank 0, and the others wait.
            tell: is told what happens, one line each.

        Returns:
            Whether it ran.

        Raises:
            ValueError: a stage that it reads is not finished, or see :meth:`check`.
        """
        stage = self.stages[name]
        folder = self.folder / stage.folder
        state = self.world.lead(lambda: self._begin(stage, tell))
        if state == "done":
            return False
        begun = time.monotonic()
        if everyone:
            work(folder)
            self.world.wait()
        else:
            self.world.lead(lambda: work(folder))
        self.world.lead(lambda: self._finish(stage, time.monotonic() - begun, tell))
        return True

    def starting(self) -> None:
        """A work that goes on with a finished stage has checked all that it can, and is about to change its folder.

        Until then the stage counts as finished with the former options, so that a refusal leaves it as it was.
        """
        if self._raising is not None:
            self._raise_end(self._raising)
            self._raising = None

    def _begin(self, stage: Stage, tell: Callable[[str], None]) -> str:
        for before in stage.after:
            if not self.finished(before):
                raise ValueError(
                    f"{stage.name} needs {before}, which is not finished in {self.folder}; `nspec run` does every stage"
                )
        for other in self.stages.values():
            reads = any(pattern.startswith(f"{other.folder}/") for pattern in stage.inputs)
            if other.raisable and reads and other.name != stage.name and self._state(other) == "raised":
                raise ValueError(
                    f"{stage.name} reads the result of {other.name}, which is to go on to {self._ends(other)}; do that "
                    "first (`nspec run` does every stage), or take the former values"
                )
        folder = self.folder / stage.folder
        state, self._raising = self._state(stage), None
        if state == "stale" and (damage := self.damage(stage.name)):
            tell(f"{stage.name}: {'; '.join(damage)}; it is made anew")
        if state == "done":
            (folder / started_name(stage)).unlink(missing_ok=True)
            tell(f"{stage.name}: done, skipped")
            return state
        if state == "partial" and not stage.derived:
            shutil.rmtree(folder)
        elif state == "new" and not stage.derived and folder.is_dir() and not holds_only_parts(folder):
            tell(f"{stage.name}: {folder} is of unknown origin, moved to {move_aside(folder)}")
        for part in list(folder.glob("**/.*.part")):  # what a kill left of a file or folder that was being written
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if state == "raised":
            tell(f"{stage.name}: goes on to {self._ends(stage)}")
            self._raising = stage
            return state
        tell(f"{stage.name}: {'goes on' if state == 'begun' else 'starts'}")
        if state != "begun":
            record = {"stage": stage.name, "options": self._options(stage), "inputs": self._inputs(stage), "seconds": 0}
            write_json(folder / started_name(stage), record)
        return state

    def _ends(self, stage: Stage) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self._options(stage).items() if name in stage.raisable)

    def _raise_end(self, stage: Stage) -> None:
        """Makes a finished training one that has begun, with the present options."""
        folder = self.folder / stage.folder
        place = next(folder / name for name in (stage.record, started_name(stage)) if (folder / name).is_file())
        record = read_record(place)
        kept = {"stage": stage.name, "inputs": record["inputs"], "seconds": record["seconds"]}
        write_json(folder / started_name(stage), kept | {"options": self._options(stage)})
        (folder / stage.record).unlink(missing_ok=True)  # last: with both the finished one counts

    def _outdated(self, stage: Stage) -> list[str]:
        """The stages that were made from what this one has left otherwise now, and all that follow from them."""
        changed = []
        for name in self.following([stage.name]):
            other = self.stages[name]
            for record in (other.record, started_name(other)):
                place = self.folder / other.folder / record
                if other is not stage and place.is_file() and not was_made_of(place, self._inputs(other)):
                    changed.append(name)
                    break
        return self.following(changed)

    def _finish(self, stage: Stage, seconds: float, tell: Callable[[str], None]) -> None:
        folder = self.folder / stage.folder
        self.starting()
        if stage.raisable:  # before it counts as finished, so that a kill in between does not leave others outdated
            for old in self.set_aside(self._outdated(stage)):
                tell(f"  made from the model before: the old results are kept in {old}")
        record = read_record(folder / started_name(stage))
        record["seconds"] = round(record["seconds"] + seconds, 3)
        write_json(folder / stage.record, record | {"outputs": self._outputs(stage), "versions": versions()})
        (folder / started_name(stage)).unlink()
