"""What a training leaves on disk while it runs: checkpoints that survive a kill at any moment, and its log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from nspec.files import disk_error, read_json, sha256, write_json, write_text

STATE_FILE = "nspec_state.json"
"""Written last: a checkpoint without it is a part of one and is never resumed from."""

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = "model*.safetensors"
_ONLY_WEIGHTS = "weights_only"


LOSS_OF = "text"
"""What the losses of a log count. Where a row does not say it, the target's tag is among them: not to be compared."""


@dataclass
class TrainingState:
    """What a resumed training must know beside weights, optimiser, scheduler and random state."""

    step: int = 0  # updates done
    tokens: int = 0  # real source and target tokens so far
    seconds: float = 0.0  # training time so far, validation and checkpoints excluded
    window_loss: float = 0.0  # since the last line of the log: sum of token losses, target tokens, tokens, start
    window_targets: float = 0.0
    window_tokens: int = 0
    window_start: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    worse: int = 0  # validations in a row without a better value
    skipped: int = 0  # updates that loss scaling skipped (fp16), all and the last ones in a row
    skipped_in_row: int = 0
    stopped: bool = False  # nothing is left to train
    options: dict[str, Any] = field(default_factory=dict)  # that must be the same when training goes on
    log: dict[str, Any] = field(default_factory=dict)  # the lines of log.jsonl up to here: how many, and their SHA-256
    # Values of fields without the last line of the log and the last validation, where only the end of the training made
    # these: a longer training goes on with them.
    without_end: dict[str, Any] = field(default_factory=dict)

    def going_on(self) -> TrainingState:
        """What a longer training goes on with."""
        return replace(self, **self.without_end, without_end={}, stopped=False)

    @classmethod
    def read(cls, checkpoint: Path) -> TrainingState:
        """The progress stored in a whole checkpoint.

        Raises:
            ValueError: the file is broken, or of another checkpoint.
        """
        return cls(**_stored(checkpoint)[0])


def _stored(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the progress, and what is known of the checkpoint's other files."""
    file = checkpoint / STATE_FILE
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise ValueError(f"{file} holds {stored!r:.60}; expected an object")
    if "sha256" in stored and stored["sha256"] != _digest(stored):  # older versions wrote none
        raise ValueError(f"{file} has other contents than were written")
    found = {f.name: stored[f.name] for f in fields(TrainingState) if f.name in stored}
    for f in fields(TrainingState):
        default = getattr(_FRESH, f.name)
        allowed = {float: (int, float), type(None): (int, float, type(None))}.get(type(default), type(default))
        if not isinstance(found.get(f.name, default), allowed):
            raise ValueError(f"{file} says {f.name} is {found[f.name]!r:.60}; expected a {type(default).__name__}")
    step, files = found.get("step"), stored.get("files", {})
    if checkpoint.name != f"checkpoint-{step}":
        raise ValueError(f"{file} is of update {step!r:.60}; expected that of {checkpoint.name}")
    if not isinstance(files, dict) or not all(isinstance(known, dict) and len(known) == 2 for known in files.values()):
        raise ValueError(f"{file} has a broken list of the checkpoint's files")
    return found, files


_FRESH = TrainingState()


def _digest(state: dict[str, Any]) -> str:
    content = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    write_json(checkpoint / STATE_FILE, state | {"sha256": _digest(state)})


def finish(checkpoint: Path, progress: TrainingState) -> None:
    """Makes a checkpoint whose other files are there a whole one; notes their sizes and SHA-256."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name != STATE_FILE and not path.name.startswith(".")
    }
    _write_state(checkpoint, asdict(progress) | {"files": files})


def keep_weights(checkpoint: Path) -> None:
    """Takes from a whole checkpoint all but its weights: a later training may need them, and does not go on from it."""
    progress, files = _stored(checkpoint)
    kept = {name: known for name, known in files.items() if Path(name).match(_WEIGHTS)}
    _write_state(checkpoint, progress | {"files": kept, _ONLY_WEIGHTS: True})
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in {*kept, STATE_FILE}:
            path.unlink()


def adopt_weights(checkpoint: Path, model: Path, progress: TrainingState) -> None:
    """Makes a checkpoint of weights alone from those in the folder of a model."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.glob(_WEIGHTS)):
        shutil.copyfile(file, checkpoint / file.name)
    finish(checkpoint, progress)
    keep_weights(checkpoint)


def weights_digest(model: Path) -> str:
    """The SHA-256 of the weights in the folder of a model; of several files that of their SHA-256, in order."""
    digests = [sha256(file) for file in sorted(model.glob(_WEIGHTS))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def damage(checkpoint: Path, *, weights: bool = False) -> str | None:
    """What is wrong with a checkpoint (``weights``: with these), in words that begin with the file; None: nothing."""
    try:
        _, files = _stored(checkpoint)
    except FileNotFoundError:
        return f"{checkpoint / STATE_FILE} is gone"
    except ValueError as error:
        return str(error)
    for name, known in files.items():
        path = checkpoint / name
        if weights and not Path(name).match(_WEIGHTS):
            continue
        if not path.is_file():
            return f"{path} is gone"
        if (size := path.stat().st_size) != known.get("bytes"):
            return f"{path} has {size} bytes; {known.get('bytes')} were written"
        if sha256(path) != known.get("sha256"):
            return f"{path} has other contents than were written"
    return None


def whole(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to the end, oldest first; not those of weights alone."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_stored(path) and not _has_only_weights(path)]


def is_stored(checkpoint: Path) -> bool:
    """Whether a checkpoint, or its weights alone, was written to the end."""
    return (checkpoint / STATE_FILE).is_file()


def _has_only_weights(checkpoint: Path) -> bool:
    with contextlib.suppress(ValueError):  # a broken one is named where it is gone on from
        state = read_json(checkpoint / STATE_FILE)
        return isinstance(state, dict) and state.get(_ONLY_WEIGHTS) is True
    return False


def check_places(folder: Path) -> None:
    """Raises ValueError where a file is in the place of a folder that a training writes in ``folder`` (of a system)."""
    place = folder / "checkpoints"
    for path in [place, *place.glob("checkpoint-*"), folder / "tensorboard", folder / "model"]:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, and a training has a folder there; move it away")


def with_best(checkpoints: Iterable[Path]) -> list[Path]:
    """Checkpoints of a folder, and those of the best weights that each of them knows, also without its end."""
    found: dict[Path, None] = dict.fromkeys(checkpoints)
    for path in list(found):
        with contextlib.suppress(ValueError):  # damaged since it was written: it will not be gone on from
            state = TrainingState.read(path)
            for step in (state.best_step, state.going_on().best_step):
                found[path.with_name(f"checkpoint-{step}")] = None
    return list(found)


def keep_end(folder: Path) -> None:
    """Keeps what a finished training can go on with: the last checkpoint (three times the model), its best weights."""
    last = whole(folder)[-1:]
    kept = with_best(last)
    keep_only(folder, kept)
    for path in kept:
        if path not in last and is_stored(path):
            keep_weights(path)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint so that a kill in between leaves one that is known to be partial."""
    (checkpoint / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def keep_only(folder: Path, kept: Iterable[Path]) -> None:
    """Deletes the other checkpoints of a folder, whole or partial."""
    names = {path.name for path in kept}
    for path in folder.glob("checkpoint-*"):
        if path.name not in names:
            remove(path)


class TrainingLog:
    """``log.jsonl`` and, where ``tensorboard`` is installed, the same numbers in ``tensorboard/``.

    Lines are appended and flushed one at a time, so that a kill leaves at most the beginning of a last line. Opening
    the log cuts off that and every line after ``step``: what follows the checkpoint from which training goes on.

    Args:
        folder: of the system.
        step: of that checkpoint.
        but: lines of ``step`` itself that have one of these keys are cut off too.

    Raises:
        ValueError: see :func:`read_log`.
    """

    def __init__(self, folder: Path, step: int, but: Collection[str] = ()) -> None:
        self.path = folder / "log.jsonl"
        rows = _rows_until(self.path, step, but)
        self._all, self._kept = _lines(rows), _lines(rows)
        write_text(self.path, "".join(self._all))
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if step == 0:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            kept = any(row["step"] == step for row in rows)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + kept)

    def write(self, row: dict[str, Any], *, extra: bool = False) -> None:
        """Adds "step" and numbers, or for each task in "tasks" a dict of them; ``extra``: only the end has brought it."""
        lines = _lines([row])
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._all += lines
        self._kept += [] if extra else lines
        if self._board is None:
            return
        numbers = {f"valid_{m}/{task}": value for task, by in row.get("tasks", {}).items() for m, value in by.items()}
        for name in row.keys() - {"step", "updates", "tasks", "loss_of"}:
            group = "valid" if name.startswith("valid_") else "train"
            numbers[f"{group}/{name.removeprefix('valid_')}"] = row[name]
        for name, number in numbers.items():
            if number is not None:
                self._board.add_scalar(name, number, row["step"])
        if "tasks" in row:
            self._board.flush()

    def noted(self, progress: TrainingState) -> None:
        """Writes the lines out to the disk, and notes in the progress which there are, so that none is lost unseen."""
        self._file.flush()
        os.fsync(self._file.fileno())
        progress.log = _known(self._all)
        if len(self._kept) < len(self._all):
            progress.without_end = progress.without_end | {"log": _known(self._kept)}

    def close(self) -> None:
        """Writes everything out."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) + "\n" for row in rows]


def _known(lines: list[str]) -> dict[str, Any]:
    """How many lines there are, and their SHA-256."""
    return {"rows": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def log_damage(folder: Path, progress: TrainingState, but: Collection[str] = ()) -> str | None:
    """What the log of a system lacks that was there at a checkpoint, in words; None where nothing is known to.

    Args:
        folder: of the system.
        progress: of the checkpoint that training goes on from.
        but: as for :class:`TrainingLog`.

    Raises:
        ValueError: see :func:`read_log`.
    """
    path = folder / "log.jsonl"
    lines, known = _lines(_rows_until(path, progress.step, but)), progress.log
    if not known or known == _known(lines):  # older versions noted nothing
        return None
    there, then = len(lines), known.get("rows", 0)
    if there < then:
        return f"{path} lacks {then - there} of the {then} rows that it had at update {progress.step}"
    return f"{path} has other rows up to update {progress.step} than were written"


def _rows_until(path: Path, step: int, but: Collection[str]) -> list[dict[str, Any]]:
    rows = [row for row in read_log(path) if row["step"] <= step]
    return [row for row in rows if row["step"] < step or not row.keys() & set(but)]


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``, oldest first; the beginning of a line that a kill left at the end is left out.

    Raises:
        ValueError: another line is not UTF-8, not JSON or no row, with the file and line number.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last piece has no newline: empty or cut off
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise ValueError(f"{path} line {number} is not {kind}: {error}; put the file back as it was") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(
                f"{path} line {number} is {line.decode()[:60]!r}, expected an object with a step; put the file back as it "
                "was"
            )
        rows.append(row)
    return rows
