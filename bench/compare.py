"""Two commits on one machine: which of our operators and training steps became faster or slower, beyond the noise.

    python -m bench.compare main            # the working tree against a commit
    python -m bench.compare v0.1 v0.2       # two commits
    python -m bench.compare HEAD --cases adamw --blocks 10 --fail-on-slower

Both sides are measured with the harness of this checkout; only nspec differs, each side with its own native library. A
block is a fresh process, since where memory lies differs from process to process and is much of the noise; blocks go base,
head, head, base, base, head ... In a block each case is timed in rounds, in turn with a yardstick that both sides share (a
product in plain PyTorch): the figure is the median of (ours / yardstick), so that drift of the machine cancels.

A case is called faster or slower if a paired t-test over the blocks says so at 5 % for all cases together (Holm), and the
change is larger than two blocks of the same commit usually differ, and than 2 %. Else it is within noise: more --blocks or
--seconds show smaller changes. The exit status is 0 whatever moved (1 with --fail-on-slower), and 2 where nothing could
be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import cases as declared
from bench.cases import Case
from bench.comparing.block import default_cases, request, smoke_cases
from bench.comparing.moved import Change, changes, percent
from bench.comparing.trees import NotPossible, Tree, add_library, trees
from bench.machine import ROOT, device_name, pick_device
from bench.rows import Writer

Block = Mapping[str, Mapping[str, Any]]
"""What a process found, by label of the case (:func:`bench.comparing.block.measure`)."""


def order(pairs: int) -> list[int]:
    """Which side (0: base, 1: head) each block measures: each pair begins with the side that ended the one before."""
    return [side for pair in range(pairs) for side in ((0, 1) if pair % 2 == 0 else (1, 0))]


def run_block(tree: Tree, out: Path, argument: str) -> Block:
    """One process in a tree.

    Raises:
        NotPossible: it failed; the message is the last line that it wrote.
    """
    # From the folder and by PYTHONPATH: both come before an installed nspec, of whichever kind.
    paths = [str(tree.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NSPEC_COMMIT": tree.name}
    command = [sys.executable, "-m", "bench.comparing.block", argument]
    done = subprocess.run(command, cwd=tree.folder, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotPossible(f"{tree.name}: measuring failed: {lines[-1]}")
    found: Block = json.loads(out.read_text(encoding="utf-8"))
    return found


def check(sides: Sequence[Tree], chosen: Sequence[Case], device: str, threads: int) -> dict[str, str]:
    """Runs each case once on both sides, in processes that time nothing: why cases cannot be compared, by label."""
    failed: dict[str, str] = {}
    for name, tree in zip(("base", "head"), sides, strict=True):
        out = tree.folder / "block.json"
        block = run_block(tree, out, request(tree.folder, out, chosen, device, threads, seconds=0, check=True))
        for label, found in block.items():
            if "error" in found:
                failed.setdefault(label, f"{name}: {found['error']}")
    return failed


def measure(
    sides: Sequence[Tree], chosen: Sequence[Case], device: str, threads: int, pairs: int, seconds: float
) -> tuple[list[Block], list[Block]]:
    """The blocks of both sides, in the order of measuring."""
    blocks: tuple[list[Block], list[Block]] = ([], [])
    began = time.perf_counter()
    turns = order(pairs)
    for done, side in enumerate(turns):
        tree, out = sides[side], sides[side].folder / "block.json"
        argument = request(tree.folder, out, chosen, device, threads, seconds, check=False)
        blocks[side].append(run_block(tree, out, argument))
        left = (time.perf_counter() - began) / (done + 1) * (len(turns) - done - 1)
        print(f"block {done + 1} of {len(turns)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return blocks


def judge(base: Sequence[Block], head: Sequence[Block]) -> tuple[dict[str, Change], dict[str, str]]:
    """The change of each case that both sides could compute, and why the others could not be compared."""
    failed = {
        label: f"{side}: {block[label]['error']}"
        for side, blocks in (("head", head), ("base", base))
        for block in blocks
        for label in block
        if "error" in block[label]
    }
    labels = [label for label in (base[0] if base else {}) if label not in failed]
    ratios = [{label: [block[label]["ratio"] for block in blocks] for label in labels} for blocks in (base, head)]
    return changes(*ratios), failed


def milliseconds(blocks: Sequence[Block], label: str) -> float:
    """Median over the blocks of a side."""
    return statistics.median(block[label]["milliseconds"] for block in blocks)


def table(found: Mapping[str, Change], base: Sequence[Block], head: Sequence[Block]) -> str:
    """A line for each case.

    The change is that of the ratio to the yardstick, so it may differ from that of the milliseconds beside it, which drift.
    """
    width = max(map(len, found))
    lines = [
        f"{'case':<{width}} {'base ms':>9} {'head ms':>9} {'time':>8}  {'95 % interval':<19} {'noise':>7}  verdict"
    ]
    for label, change in found.items():
        times = f"{milliseconds(base, label):9.3f} {milliseconds(head, label):9.3f}"
        interval = f"[{percent(change.low):+.1f} %, {percent(change.high):+.1f} %]"
        noise = f"{percent(change.noise):.1f} %"
        lines.append(
            f"{label:<{width}} {times} {percent(change.mean):+6.1f} %  {interval:<19} {noise:>7}  {change.verdict}"
        )
    return "\n".join(lines)


def choose(name: str, device_type: str, part: str) -> list[Case]:
    """The cases to compare.

    Raises:
        NotPossible: no label contains ``part``.
    """
    if name == "short":
        every = default_cases(device_type)
    elif name == "smoke":
        every = smoke_cases()
    else:
        every = declared.cases(name, device_type, compiled=False)
    chosen = [case for case in every if part in case.label]
    if not chosen:
        raise NotPossible(f"--cases {part!r} is in no label; the first is {every[0].label!r}")
    return chosen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("base", help="the commit to compare with: a branch, a tag, HEAD~3, ...")
    made.add_argument("head", nargs="?", help="the other one (default: the working tree as it is)")
    made.add_argument("--set", choices=("short", *declared.SETS), default="short", help="default: short, ten cases")
    made.add_argument("--cases", default="", metavar="TEXT", help="only cases with this in their label")
    made.add_argument("--blocks", type=int, default=6, help="processes of each side (default: 6, at least 3)")
    made.add_argument("--seconds", type=float, default=0.6, help="at least so long a case and block (default: 0.6)")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    made.add_argument("--fail-on-slower", action="store_true", help="exit status 1 if a case became slower")
    made.add_argument("--json", type=Path, metavar="FILE", help="append a row for each case")
    return made


def compare(args: argparse.Namespace) -> int:
    """Measures, prints, writes; the exit status.

    Raises:
        NotPossible: there is nothing that can be compared.
    """
    if args.blocks < 3:
        raise NotPossible(f"--blocks {args.blocks}: at least 3, or no noise can be told")
    if args.threads:
        torch.set_num_threads(args.threads)  # here it only names the device
    device = pick_device(args.device)
    chosen = choose(args.set, device.type, args.cases)
    with trees([args.base, args.head]) as sides:
        print(f"base {sides[0].name}, head {sides[1].name}, on {device_name(device)}", flush=True)
        if device.type == "cpu" and os.environ.get("NSPEC_NATIVE") != "0":
            for number, side in enumerate(sides):
                done = add_library(side, [ROOT, *(other.folder for other in sides[:number])])
                print(f"{'head' if number else 'base'}: {done}", file=sys.stderr, flush=True)
        wrong = check(sides, chosen, str(device), args.threads)
        chosen = [case for case in chosen if case.label not in wrong]
        base, head = (
            measure(sides, chosen, str(device), args.threads, args.blocks, args.seconds) if chosen else ([], [])
        )
    found, failed = judge(base, head)
    failed = wrong | failed
    if found:
        print(table(found, base, head))
    for label, reason in failed.items():
        print(f"not compared: {label}: {reason}")
    if not found:
        raise NotPossible("no case could be computed by both sides")
    moved = [label for label, change in found.items() if change.verdict != "within noise"]
    print(f"{len(moved)} of {len(found)} cases moved, {args.blocks} processes of each side")
    write = Writer(args.json, device)
    fields = {case.label: asdict(case) for case in chosen}
    for label, change in found.items():
        row = {"kind": "change", "case": label, **fields[label], "base": sides[0].name, "head": sides[1].name}
        row |= {"blocks": args.blocks, "verdict": change.verdict, "p": change.p}
        row |= {"base_milliseconds": milliseconds(base, label), "head_milliseconds": milliseconds(head, label)}
        row |= {
            f"{name}_percent": round(percent(getattr(change, name)), 2) for name in ("mean", "low", "high", "noise")
        }
        write(row)
    slower = any(change.verdict == "slower" for change in found.values())
    return 1 if slower and args.fail_on_slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    args = parser().parse_args(arguments)
    try:
        return compare(args)
    except (NotPossible, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
