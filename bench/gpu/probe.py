"""What each kernel and product takes on this GPU, against the roof and against what was expected: experiments E1 to E9.

    python -m bench.gpu.probe --json runs/probe.jsonl
    python -m bench.gpu.probe --only E3,E5
    python -m bench.gpu.probe --device cpu --set smoke        # tiny sizes in Triton's interpreter, to see that it runs

A time of the device is taken with the calls queued behind a kernel that waits (``bench/timing.py``). The same inputs are
used in each call. Block sizes that are not the shipped ones are checked before they are timed. What raises costs its own
line; rows are on disk line by line.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from bench import cli, trouble
from bench.ceilings import ceilings
from bench.gpu.lab import Lab, not_made
from bench.report import cells, tables
from bench.report.summary import ceilings as limits_of
from bench.rows import Row, Writer

Experiment = Callable[[Lab], Iterator[Row]]
EXPERIMENTS = {
    "E1": ("experiments", "products"),
    "E2": ("experiments", "fused_relu"),
    "E3": ("experiments", "tiles"),
    "E4": ("experiments", "small_kernels"),
    "E5": ("experiments", "packing"),
    "E6": ("calls", "host"),
    "E7": ("calls", "optimizer"),
    "E8": ("calls", "graphs"),
    "E9": ("calls", "mixed"),
}
"""Module and function. They are imported one by one: one that does not import costs itself."""


def chosen(text: str) -> list[str]:
    """``E1,E3`` -> names, in their order.

    Raises:
        ArgumentTypeError: there is no such experiment.
    """
    asked = text.split(",")
    if unknown := sorted(set(asked) - set(EXPERIMENTS)):
        raise argparse.ArgumentTypeError(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    return [name for name in EXPERIMENTS if name in asked]


def line(row: Row) -> str:
    """One measurement as it comes."""
    name = f"  {row['name']:<58}"
    if failed := row.get("absent") or row.get("reason"):
        return f"{name} {'not here' if row.get('absent') else 'FAILED'}: {failed}"
    said = [f"{name} {row['microseconds']:10.1f} us {row['of'] if row['device_type'] == 'cuda' else 'on the CPU'}"]
    said += [", in Triton's interpreter"] if row.get("interpreted") else []
    said += [", tiny sizes"] if row["small"] else []
    said += [f"  {row['roof_share']:.0%} of the roof"] if row["roof_share"] is not None else []
    said += [f"  expected {tables.expected_range(row)}"] if tables.is_compared(row) else []
    return "".join([*said, f"  ({row['note']})" if row["note"] else ""])


def made(name: str, lab: Lab) -> Iterator[Row]:
    """The rows of an experiment; where it raises as a whole, rows that say so: of it, and of what was predicted."""
    module, function = EXPERIMENTS[name]
    done = []
    try:
        experiment: Experiment = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
        print(f"\n{(experiment.__doc__ or name).splitlines()[0]}", flush=True)
        for row in experiment(lab):
            done.append(row["name"])
            yield row
    except Exception as error:
        reason = trouble.report(name, error)
        yield {"kind": "probe", "experiment": name, "name": "the experiment", "reason": reason}
        yield from not_made(name, done, reason, lab.small)


def run(names: Sequence[str], lab: Lab, write: Writer) -> tuple[list[Row], list[str]]:
    """Makes the experiments; their rows, and the names of those in which something failed or that were not made."""
    rows: list[Row] = []
    for name in names:
        began = time.perf_counter()
        for row in made(name, lab):
            rows.append(write(row))
            print(line(rows[-1]), flush=True)
        print(f"  {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return rows, list(dict.fromkeys(row["experiment"] for row in rows if row.get("reason")))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where something failed."""
    parser = cli.parser("bench.gpu.probe", __doc__, default="full")
    parser.add_argument("--only", type=chosen, default=list(EXPERIMENTS), metavar="E1,E3", help="default: all")
    args = parser.parse_args(arguments)
    device, write = cli.started(parser, args)
    small = args.set == "smoke"
    if device.type == "cpu":
        if not small:
            parser.error("on a CPU the kernels run in Triton's interpreter, for tiny sizes alone: add --set smoke")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
    os.environ["NSPEC_BACKEND"] = "triton"
    lab = Lab(device, small)
    print(", ".join(args.only))
    found = [write(row) for row in ceilings(device, [str(lab.dtype).removeprefix("torch.")], seconds=1.0, small=small)]
    lab.limits = limits_of(found)
    for row in found:
        print(f"ceiling: {row['what']} {row['dtype']}: {cells.per_second(row)}")
    rows, failed = run(args.only, lab, write)
    if said := tables.predictions(rows):
        print("\nPredicted against measured\n")
        print("\n".join(said))
    if failed:
        print(f"error: something failed in {', '.join(failed)}; see above", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
