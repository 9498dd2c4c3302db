"""What a training leaves on disk while it runs: checkpoints that survive a kill at any moment, and its log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from nspec.files import read_json, sha256, write_json, write_text

STATE_FILE = "nspec_state.json"
"""Written last: a checkpoint without it is a part of one and is never resumed from."""

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
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
    # Values of fields without the last line of the log and the last validation, where only the end of the training made
    # these: a longer training goes on with them.
    without_end: dict[str, Any] = field(default_factory=dict)

    def going_on(self) -> Progress:
        """What a longer training goes on with."""
        return replace(self, **self.without_end, without_end={}, stopped=False)

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
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
    found = {f.name: stored[f.name] for f in fields(Progress) if f.name in stored}
    for f in fields(Progress):
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


_FRESH = Progress()


def finish(checkpoint: Path, progress: Progress) -> None:
    """Makes a checkpoint whose other files are there a whole one; notes their sizes and SHA-256."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name != STATE_FILE and not path.name.startswith(".")
    }
    write_json(checkpoint / STATE_FILE, asdict(progress) | {"files": files})


def damage(checkpoint: Path, *names: str) -> str | None:
    """What is wrong with a checkpoint, in words that begin with the file; None for one that is as it was written.

    Args:
        checkpoint: its folder.
        names: of the files to look at; none: all of them.
    """
    try:
        _, files = _stored(checkpoint)
    except FileNotFoundError:
        return f"{checkpoint / STATE_FILE} is gone"
    except ValueError as error:
        return str(error)
    for name, known in files.items():
        path = checkpoint / name
        if names and name not in names:
            continue
        if not path.is_file():
            return f"{path} is gone"
        if (size := path.stat().st_size) != known.get("bytes"):
            return f"{path} has {size} bytes; {known.get('bytes')} were written"
        if sha256(path) != known.get("sha256"):
            return f"{path} has other contents than were written"
    return None


def step_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def whole(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to the end, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def needed(folder: Path) -> list[Path]:
    """What a training that is under way keeps: the last two checkpoints, and the best one that each of them knows."""
    last = whole(folder)[-2:]
    best = []
    for path in last:
        with contextlib.suppress(ValueError):  # damaged since it was written: it will not be gone on from
            best.append(folder / f"checkpoint-{Progress.read(path).best_step}")
    return list(dict.fromkeys([*last, *best]))


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
    """

    def __init__(self, folder: Path, step: int, but: Collection[str] = ()) -> None:
        self.path = folder / "log.jsonl"
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        rows = [row for row in rows if row["step"] < step or not row.keys() & set(but)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
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

    def write(self, row: dict[str, Any]) -> None:
        """Adds a line; ``row`` has "step" and numbers, or for each task in "tasks" a dict of numbers."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in row.items():
            if name == "tasks":
                for task, measured in value.items():
                    for metric, number in measured.items():
                        if number is not None:
                            self._board.add_scalar(f"valid_{metric}/{task}", number, row["step"])
            elif name not in ("step", "updates") and value is not None:
                group = "valid" if name.startswith("valid_") else "train"
                self._board.add_scalar(f"{group}/{name.removeprefix('valid_')}", value, row["step"])
        if "tasks" in row:
            self._board.flush()

    def close(self) -> None:
        """Writes everything out."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``, oldest first; the beginning of a line that a kill left at the end is left out.

    Raises:
        ValueError: another line is not JSON, with the file and line number.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last piece has no newline: empty or cut off
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return rows
