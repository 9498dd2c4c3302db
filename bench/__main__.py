"""The whole suite: operators, training steps, profiling, and the report of them.

    python -m bench                                   # the quick set: ten minutes on two cores
    python -m bench --set full --out runs/bench/full  # every density and dtype: much longer
    python -m bench --set smoke                       # tiny shapes, to see that everything runs; its times mean nothing

What the GPU path costs the host is measured apart, in half a minute and without a GPU: python -m bench.host.

Each part is a process of its own. One that fails does not keep the others from running, but the command fails then. The
folder gets ``rows.jsonl``, ``log.txt`` and the report with its figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from bench import cli
from bench.machine import ROOT

PARTS = ("operators", "steps", "profiling")
QUICK_SECONDS = {"operators": 340, "steps": 190, "profiling": 25, "report": 5}
"""About how long each takes in the quick set on two cores."""


def commands(args: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """The arguments of Python for each part, in order."""
    rows = str(out / "rows.jsonl")
    options = ["--set", args.set, "--device", args.device, "--threads", str(args.threads), "--json", rows]
    found = {part: ["-m", f"bench.{part}", *options] for part in PARTS if args.only is None or part in args.only}
    return found | {"report": ["-m", "bench.report", rows, "--out", str(out)]}


def run(command: Sequence[str], log: BinaryIO) -> int:
    """Runs Python with these arguments; what it writes is shown and kept. The exit status."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    full = [sys.executable, *command]
    with subprocess.Popen(full, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 2**16):  # not by lines: a part shows its progress within one
            say(chunk, log)
    return process.returncode


def say(text: bytes, log: BinaryIO) -> None:
    """To the terminal and to the log, at once."""
    for stream in (sys.stdout.buffer, log):
        stream.write(text)
        stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every part; the exit status is 1 if one failed."""
    made = cli.parser("bench", __doc__, "quick", "json")
    made.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone; the report is always made")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/bench/<UTC date and time>")
    args = made.parse_args(arguments)
    device = cli.device_of(made, args)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    out = (args.out or ROOT / "runs" / "bench" / now).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = commands(args, out)
    failed = []
    began = time.perf_counter()
    with open(out / "log.txt", "ab") as log:
        for number, (part, command) in enumerate(todo.items(), start=1):
            note = f"{time.perf_counter() - began:.0f} s so far"
            if args.set == "quick" and device.type == "cpu":
                note += f", about {sum(QUICK_SECONDS[name] for name in list(todo)[number - 1 :])} s left on two cores"
            say(f"\n== {part} ({number} of {len(todo)}; {note})\n".encode(), log)
            if status := run(command, log):
                failed.append(part)
                say(f"error: {part} failed with exit status {status}; the rest is run\n".encode(), log)
        end = f"failed: {', '.join(failed)}; see above" if failed else "every part ran"
        say(f"\n{time.perf_counter() - began:.0f} s; {end}; everything is in {out}\n".encode(), log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
