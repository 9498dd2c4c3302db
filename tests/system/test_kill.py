"""A run that is killed with -9 in each stage, and started again each time, ends as one that was never disturbed.

One process imports everything and forks the command line for each attempt, so that eighteen attempts take little time.
A forked attempt is killed by the kernel with SIGKILL: either by itself, at the moment when it would put a certain file in
its place (its contents are written beside it, all before it is done), or from outside, in the middle of training. One
attempt runs into a full disk there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

Tiny = Any  # tests/system/conftest.py

SERVER = """
import json, os, resource, signal, sys
import torch, transformers, nspec.mt.training.train, nspec.mt.text.prepare, nspec.mt.text.corpus.cldr
import nspec.report, sacrebleu
from nspec import cli

def die_at(pattern):
    for name in ("replace", "rename"):
        def deadly(source, target, *rest, original=getattr(os, name), **named):
            if pattern in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(source, target, *rest, **named)
        setattr(os, name, deadly)

print("ready", flush=True)
for line in sys.stdin:
    arguments, pattern, limit = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if pattern:
                die_at(pattern)
            if limit:  # files cannot grow further: writing fails as on a full disk
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = cli.main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

# Each attempt is killed at the first rename or replacement of a path with this in it that it comes to.
MOMENTS = [
    "prepared/meta.json",
    "prepared/stage.json",
    "systems/dense/checkpoints/checkpoint-4/nspec_state.json",
    "systems/dense/checkpoints/checkpoint-12/nspec_state.json",
    "systems/dense/model",
    "systems/dense/stage.json",
    "profile/counts",
    "masks/masks",
    "random_masks/stage.json",
    "systems/forward/checkpoints/checkpoint-4/nspec_state.json",
    "systems/update/summary.json",
    "scores/continued/de-en.hyp.txt",
    "scores/random/en-de.decode.json",
    "scores/update/scores.json",
    "report/index.html",
]


class Server:
    """Forks attempts."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, run: Tiny, moment: str = "", limit: int = 0) -> int:
        """Starts an attempt and returns its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([["run", str(run.config)], moment, limit]) + "\n")
        self.process.stdin.flush()
        return int(self._line_of_numbers())

    def end(self) -> int:
        """Waits for the attempt and returns its exit code."""
        return int(self._line_of_numbers())

    def _line_of_numbers(self) -> str:
        # The attempt writes its table to the same standard output.
        while not (line := self._line()).lstrip("-").isdigit():
            assert self.process.poll() is None
        return line


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def in_training(run: Tiny, system: str, lines: int) -> None:
    """Returns as soon as the log of a system has so many lines."""
    log = run.folder / f"systems/{system}/log.jsonl"
    deadline = time.monotonic() + 60
    while not log.is_file() or log.read_text().count("\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_in_each_stage_a_run_ends_as_if_undisturbed(
    tiny: Tiny, fresh: Tiny, server: Server, result: Callable[[Path], dict[str, Any]]
) -> None:
    for moment in MOMENTS:
        server.start(fresh, moment)
        assert server.end() == -signal.SIGKILL, f"it did not come to {moment}"
        if moment == "systems/dense/checkpoints/checkpoint-4/nspec_state.json":
            os.kill(begun := server.start(fresh), 0)
            in_training(fresh, "dense", 7)
            os.kill(begun, signal.SIGKILL)
            assert server.end() == -signal.SIGKILL
            server.start(fresh, limit=50_000)  # bytes, which is less than a checkpoint
            assert server.end() == 2, "a full disk is an error that the user can mend"
    server.start(fresh)
    assert server.end() == 0
    expected, found = result(tiny.folder), result(fresh.folder)
    for name, value in expected.items():
        assert found[name] == value, name
    assert not list(fresh.folder.glob("**/*.part")) + list(fresh.folder.glob("**/started*"))
