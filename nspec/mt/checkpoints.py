"""What a training leaves on disk while it runs: checkpoints that survive a kill at any moment, and its log."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from nspec.files import read_json, write_json, write_text

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
    stopped: bool = False  # nothing is left to train
    options: dict[str, Any] = field(default_factory=dict)  # that must be the same when training goes on

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """The progress stored in a whole checkpoint."""
        stored = read_json(checkpoint / STATE_FILE)
        return cls(**{f.name: stored[f.name] for f in fields(cls)})


def finish(checkpoint: Path, progress: Progress) -> None:
    """Makes a checkpoint whose other files are there a whole one."""
    write_json(checkpoint / STATE_FILE, asdict(progress))


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


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
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.jsonl"
        lines = [json.dumps(row) + "\n" for row in read_log(self.path) if row["step"] <= step]
        write_text(self.path, "".join(lines))
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if step == 0:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

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
