"""The most memory of a process that serves one model: run as a program by ``bench.serving``, once for each model.

    python -m bench.serving.memory FOLDER '{"one": ..., "shape": ..., "threads": 2, "searches": [[1, 1], [32, 5]]}'

Prints a JSON list: for each setting of the search the most bytes of physical memory (``VmHWM`` of Linux), beyond those that
the process had when all was imported and nothing loaded; null where the system does not tell.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT
from bench.serving.models import Decoder, Search, Served, Shape, sources


def peak() -> int | None:
    """The most physical memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else 1024 * int(line.split()[1])


def measure(one: Served, folder: Path, shape: Shape, threads: int, searches: Sequence[Search]) -> list[int | None]:
    """Peaks of a process of its own, for searches that need more and more."""
    told = {
        "one": vars(one),
        "shape": vars(shape),
        "threads": threads,
        "searches": [[s.batch, s.beam] for s in searches],
    }
    command = [sys.executable, "-m", "bench.serving.memory", str(folder), json.dumps(told)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the process that measures the memory of {one.key} failed: {done.stderr[-2000:]}")
    found: list[int | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(folder: str, told: str) -> None:
    """Loads, decodes and prints."""
    import torch
    import transformers.models.m2m_100.modeling_m2m_100  # noqa: F401 (before the model, as it is no part of it)

    given = json.loads(told)
    torch.set_num_threads(given["threads"])
    gc.collect()
    before, shape, found = peak(), Shape(**given["shape"]), []
    decoder = Decoder(Served(**given["one"]), Path(folder), shape, given["threads"])
    for batch, beam in given["searches"]:
        decoder(sources(shape, batch), beam)
        now = peak()
        found.append(None if now is None or before is None else now - before)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
