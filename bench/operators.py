"""The operators and a block of a model against what one would run instead.

    python -m bench.operators                              # the quick set on the GPU, if there is one, else the CPU
    python -m bench.operators --set full --json runs/operators.jsonl
    python -m bench.operators --operators row_sparse_wgrad --dtypes float32 --densities 0.5 0.78

Each round calls every provider of a case, in turn, on inputs that rotate. A figure is the median over rounds of
(time of the baseline / time of the provider) in the same round, with the ends of the middle 80 % of the rounds. What a
provider computes is compared with the definition in float64 before it is timed. The cases are in ``bench/cases.py``.

On a GPU each provider has two figures: as called, with the host's time where the device waits for it, and of the device
alone. Targets are about the device there.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import trouble
from bench.blocks import ACTIVATIONS
from bench.cases import BATCHES, DTYPES, OPERATORS, SETS, Case, cases, target
from bench.ceilings import ceilings
from bench.machine import device_name, pick_device
from bench.providers import Problem, problem
from bench.rows import Row, Writer, figure, timing_fields
from bench.timing import interleaved, interleaved_on_device, paired, paired_on_device, peak_bytes, spread


def rows_of(
    made: Problem,
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    memory: bool = True,
    again: Callable[[], Problem] | None = None,
) -> Iterator[Row]:
    """Checks and times the providers of a case: one row each, and one for each that cannot run.

    Args:
        made: the case with its inputs.
        device: that they are on.
        rounds: of each provider, as many of them as ``most_seconds`` allows.
        most_seconds: for all rounds together; at least four are always done. On a GPU half of it is for device times.
        memory: measure peak memory too.
        again: makes the inputs anew for the second half of the rounds. Where memory lies decides how fast a product
            runs, for as long as it lies there.

    Raises:
        AssertionError: a provider computes something else than the operator.
    """
    case = made.case
    made.check()
    times: dict[str, list[float]] = {provider.name: [] for provider in made.providers}
    on_device: dict[str, list[float]] = {provider.name: [] for provider in made.providers}
    gpu = device.type == "cuda"
    halves = 1 if again is None else 2
    for half in range(halves):
        if half == 1 and again is not None:
            absent = made.absent
            del made  # before the next, so that both need not fit
            made = again()
            made.absent = absent
        calls = {provider.name: provider.call for provider in made.providers}
        share, some = most_seconds / halves / (2 if gpu else 1), -(-rounds // halves)
        part = interleaved(calls, device, rounds=some, least_seconds=share / 2, most_seconds=share, always=4)
        for name, values in part.items():
            times[name] += values
        if gpu:
            queued = interleaved_on_device(calls, device, rounds=some, most_seconds=share)
            done = max(map(len, queued.values()), default=0)
            for name, values in on_device.items():
                values += queued.get(name, [math.nan] * done)
    baseline = times[made.baseline.name]
    common = {
        "operator": case.operator,
        "activation": case.activation,
        "tokens": case.tokens,
        "d_model": case.d_model,
        "d_ff": case.d_ff,
        "tasks": case.tasks,
        "dtype": case.dtype,
        "density": case.density,
        "active": case.active,
        "baseline": made.baseline.name,
    }
    for provider in made.providers:
        values = times[provider.name]
        flops, moved = made.work(provider.computes)
        milliseconds = spread([1e3 * value for value in values])
        timing = timing_fields(milliseconds, paired(baseline, values), len(values))
        if gpu:
            timing |= device_fields(on_device[made.baseline.name], on_device[provider.name])
        yield {
            "kind": "operator",
            **common,
            "provider": provider.name,
            "ours": provider.ours,
            "computes": provider.computes,
            "backend": provider.backend,
            **timing,
            "input_sets": made.input_sets,
            "peak_bytes": peak_bytes(functools.partial(provider.call, 0), device) if memory else None,
            "flops": flops,
            "bytes": moved,
            "target": target(case, device.type) if provider.name in ("ours", "mode forward") else None,
        }
    for name, reason in made.absent.items():
        yield {"kind": "absent", **common, "provider": name, "reason": reason}


def device_fields(baseline: Sequence[float], own: Sequence[float]) -> Row:
    """The device time and its ratio to the baseline's, from seconds by round; nothing where they cannot be told."""
    found = paired_on_device([1e3 * value for value in baseline], [1e3 * value for value in own])
    return {} if found is None else timing_fields(*found, prefix="device_")


def show(row: Row) -> None:
    """Prints one row."""
    if row["kind"] == "absent":
        print(f"  {row['provider']:<32} not here: {row['reason']}", flush=True)
        return
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
    wanted = "" if row["target"] is None else f"  target {row['target']:.2f}x"
    taken = f"  ({row['backend']})" if row["backend"] else ""
    device = ""
    if row.get("device_speedup") is not None:
        device = f" | device {row['device_milliseconds']:9.3f} ms {figure(row, 'device_'):>20}"
    elif row["device_type"] == "cuda":
        device = " | device: not known, the call waits for it"
    called = f"{row['milliseconds']:9.3f} ms {figure(row):>20}"
    print(f"  {row['provider']:<32} {called}{device}{memory}{taken}{wanted}", flush=True)


def measure(
    chosen: Sequence[Case], device: torch.device, write: Writer, rounds: int, most_seconds: float, memory: bool = True
) -> int:
    """Measures and prints cases; one in which something raises or is wrong is reported and left out.

    Returns:
        The number of cases that were left out.
    """
    wrong, began, group = 0, time.perf_counter(), None
    for number, case in enumerate(chosen):
        if group != (group := (case.name, case.tokens, case.d_model, case.dtype)):
            torch._dynamo.reset()  # torch.compile stops compiling a function after eight shapes
        left = (time.perf_counter() - began) / number * (len(chosen) - number) if number else 0.0
        note = f", about {left:.0f} s left" if number else ""
        print(f"[{number + 1}/{len(chosen)}{note}] {case.label}", flush=True)
        try:
            again = functools.partial(problem, case, device, seed=1)
            options: dict[str, Any] = {"rounds": rounds, "most_seconds": most_seconds, "memory": memory, "again": again}
            for row in rows_of(problem(case, device), device, **options):
                show(write(row))
        except AssertionError as error:  # a wrong result: where it was noticed says nothing
            wrong += 1
            print(f"error: not timed: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            wrong += 1
            trouble.report(f"not timed: {case.label}", error)
            if trouble.device_is_lost(device):
                print(f"error: {trouble.LOST}", file=sys.stderr, flush=True)
                return wrong + len(chosen) - number - 1
    return wrong


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = [int(part) for part in text.split("x")]
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError
    return (*sizes, 1)[:4]  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 if a provider was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.operators", description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="quick", help="which of the declared cases")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS)
    parser.add_argument(
        "--activations", nargs="+", choices=ACTIVATIONS, help="blocks with these; relu: the operators too"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--densities", type=float, nargs="+")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="TOKENSxD_MODELxD_FF[xTASKS]")
    parser.add_argument("--batches", choices=BATCHES, default="all", help="of one task, of several, or all")
    parser.add_argument("--no-compile", action="store_true", help="without the torch.compile providers")
    parser.add_argument("--no-grouped", action="store_true", help="without those that call PyTorch's grouped product")
    parser.add_argument("--no-memory", action="store_true", help="without peak memory")
    parser.add_argument("--no-ceilings", action="store_true", help="without the device's best speeds")
    parser.add_argument("--rounds", type=int, default=15, help="as many as fit into --seconds, at most about these")
    parser.add_argument("--seconds", type=float, help="longest time for the rounds of one case")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; as PyTorch chooses where not given")
    parser.add_argument("--json", type=Path, help="file that rows are appended to")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    seconds = args.seconds if args.seconds is not None else {"full": 6.0, "quick": 2.0, "smoke": 0.05}[args.set]
    chosen = cases(
        args.set, device.type, operators=args.operators, dtypes=args.dtypes, densities=args.densities,
        shapes=args.shapes, compiled=not args.no_compile, grouped=not args.no_grouped, batches=args.batches,
        activations=args.activations,
    )  # fmt: skip
    write = Writer(args.json, device)
    print(f"{device_name(device)}, torch {torch.__version__}: {len(chosen)} cases")
    print("speed-up over the first provider of a case: median of paired ratios [middle 80 % of the rounds]")
    if device.type == "cuda":
        print("as called, with the host's time where the device waits for it, and of the device alone; targets: device")
    dtypes = sorted({case.dtype for case in chosen})
    for row in () if args.no_ceilings else ceilings(device, dtypes, small=args.set == "smoke"):
        unit = "GB/s" if row["what"] == "memory" else "Gflop/s"
        print(f"ceiling: {row['what']} {row['dtype']}: {row['per_second'] / 1e9:.0f} {unit}")
        write(row)
    wrong = measure(chosen, device, write, 3 if args.set == "smoke" else args.rounds, seconds, not args.no_memory)
    if wrong:
        print(f"error: {wrong} of {len(chosen)} cases were not timed; see above", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
