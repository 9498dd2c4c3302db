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

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench import cli, trouble
from bench.cases import ACTIVATIONS, BATCHES, DTYPES, OPERATORS, Case, cases, target
from bench.ceilings import ceilings
from bench.providers import problem
from bench.providers.shared import Problem
from bench.report.cells import per_second
from bench.rows import Row, Writer, line, timing_fields
from bench.timing import interleaved, interleaved_on_device, peak_bytes

WHOLE_CASE = "every provider"
"""In the place of a provider, in the row of a case that could not be measured."""


def rows_of(
    made: Problem,
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    memory: bool = True,
    again: Callable[[], Problem] | None = None,
) -> Iterator[Row]:
    """Checks and times the providers of a case: one row each, and one for each that cannot run, raises or is wrong.

    Without a baseline, which all ratios are over, nothing is timed. What raises when it is timed ends the case.

    Args:
        made: the case with its inputs.
        device: that they are on.
        rounds: of each provider, as many of them as ``most_seconds`` allows.
        most_seconds: for all rounds together; at least four are always done. On a GPU half of it is for device times.
        memory: measure peak memory too.
        again: makes the inputs anew for the second half of the rounds. Where memory lies decides how fast a product
            runs, for as long as it lies there.
    """
    case, base, absent = made.case, made.providers[0].name, made.absent
    failed: dict[str, str] = {}

    for name, error in made.wrong().items():
        wrong = isinstance(error, AssertionError)  # a wrong result: where it was noticed says nothing
        if wrong:
            print(f"error: not timed: {error}", file=sys.stderr, flush=True)
        failed[name] = f"WRONG: {error}" if wrong else trouble.report(f"not timed: {case.label}, {name}", error)
    times: dict[str, list[float]] = {}
    on_device: dict[str, list[float]] = {}
    gpu = device.type == "cuda"
    halves = 1 if again is None else 2
    share, some = most_seconds / halves / (2 if gpu else 1), -(-rounds // halves)
    for half in range(halves if base not in failed else 0):
        if half == 1 and again is not None:
            del made  # before the next, so that both need not fit
            made = again()
        calls = {one.name: one.call for one in made.providers if one.name not in failed}
        part = interleaved(calls, device, rounds=some, least_seconds=share / 2, most_seconds=share, always=4)
        queued = interleaved_on_device(calls, device, rounds=some, most_seconds=share) if gpu else {}
        done = max(map(len, queued.values()), default=0)
        for name, values in part.items():
            times.setdefault(name, []).extend(values)
            on_device.setdefault(name, []).extend(queued.get(name, [math.nan] * done))
    common = {**fields_of(case), "baseline": base}
    if base in failed:
        others = (one.name for one in made.providers if one.name not in failed)
        failed |= dict.fromkeys(others, f"the baseline, {base}, gives nothing to compare with")
    for name, reason in failed.items():
        yield {"kind": "absent", **common, "provider": name, "reason": reason, "failed": True}
    for provider in made.providers:
        if (name := provider.name) in failed:
            continue
        flops, moved = made.work(provider.computes)
        timing = timing_fields(times[base], times[name])
        yield {
            "kind": "operator",
            **common,
            "provider": name,
            "ours": provider.ours,
            "computes": provider.computes,
            "backend": provider.backend,
            **(timing | timing_fields(on_device[base], on_device[name], "device_") if gpu else timing),
            "input_sets": made.input_sets,
            "peak_bytes": peak_bytes(functools.partial(provider.call, 0), device) if memory else None,
            "flops": flops,
            "bytes": moved,
            "target": target(case, device.type) if name in ("ours", "mode forward") else None,
        }
    for name, reason in absent.items():
        yield {"kind": "absent", **common, "provider": name, "reason": reason}


def fields_of(case: Case) -> Row:
    """What a row says of its case."""
    named = ("operator", "activation", "tokens", "d_model", "d_ff", "tasks", "dtype", "density", "active")
    return {name: getattr(case, name) for name in named}


def show(row: Row) -> None:
    """Prints one row."""
    if row["kind"] == "absent":
        said = "not timed" if row.get("failed") else "not here"
        print(f"  {row['provider']:<40}  {said}: {row['reason']}", flush=True)
        return
    unknown = row["device_type"] == "cuda" and row.get("device_speedup") is None
    more = ["device: not known, the call waits for it" if unknown else "", row["backend"] and f"({row['backend']})"]
    print(line(row["provider"], row, *more, f"target {row['target']:.2f}x" if row["target"] else ""), flush=True)


def measure(
    chosen: Sequence[Case], device: torch.device, write: Writer, rounds: int, most_seconds: float, memory: bool = True
) -> int:
    """Measures and prints cases. What raises or is wrong is reported, has a row with the reason, and costs itself.

    Returns:
        The number of cases that were not measured, or not with every provider.
    """
    wrong, began, group = 0, time.perf_counter(), None
    for number, case in enumerate(chosen):
        if group != (group := (case.name, case.tokens, case.d_model, case.dtype)):
            torch._dynamo.reset()  # torch.compile stops compiling a function after eight shapes
        left = (time.perf_counter() - began) / number * (len(chosen) - number) if number else 0.0
        note = f", about {left:.0f} s left" if number else ""
        print(f"[{number + 1}/{len(chosen)}{note}] {case.label}", flush=True)
        done: list[Row] = []
        try:
            options: dict[str, Any] = {"rounds": rounds, "most_seconds": most_seconds, "memory": memory}
            again = functools.partial(problem, case, device, seed=1)
            for row in rows_of(problem(case, device), device, again=again, **options):
                done.append(write(row))
                show(done[-1])
            wrong += any(row.get("failed") for row in done)
        except Exception as error:
            wrong += 1
            provider = f"all but {', '.join(row['provider'] for row in done)}" if done else WHOLE_CASE
            lost = {"kind": "absent", **fields_of(case), "provider": provider, "failed": True}
            show(write(lost | {"reason": trouble.report(f"not timed: {case.label}", error)}))
    return wrong


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = [int(part) for part in text.split("x")]
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError
    return (*sizes, 1)[:4]  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 if a provider was wrong."""
    parser = cli.parser("bench.operators", __doc__)
    add = parser.add_argument
    add("--operators", nargs="+", choices=OPERATORS)
    add("--activations", nargs="+", choices=ACTIVATIONS, help="blocks with these; relu: the operators too")
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--densities", type=cli.share, nargs="+")
    add("--shapes", type=_shape, nargs="+", metavar="TOKENSxD_MODELxD_FF[xTASKS]")
    add("--batches", choices=BATCHES, default="all", help="of one task, of several, or all")
    add("--no-compile", action="store_true", help="without the torch.compile providers")
    add("--no-grouped", action="store_true", help="without those that call PyTorch's grouped product")
    add("--no-memory", action="store_true", help="without peak memory")
    add("--no-ceilings", action="store_true", help="without the device's best speeds")
    add("--rounds", type=cli.count, default=15, help="as many as fit into --seconds, at most about these")
    add("--seconds", type=float, help="longest time for the rounds of one case")
    args = parser.parse_args(arguments)
    device, write = cli.started(parser, args)
    seconds = args.seconds if args.seconds is not None else {"full": 6.0, "quick": 2.0, "smoke": 0.05}[args.set]
    chosen = cases(
        args.set, device.type, operators=args.operators, dtypes=args.dtypes, densities=args.densities,
        shapes=args.shapes, compiled=not args.no_compile, grouped=not args.no_grouped, batches=args.batches,
        activations=args.activations,
    )  # fmt: skip
    print(
        f"{len(chosen)} cases; speed-up over the first provider of each: median of paired ratios [middle 80 % of rounds]"
    )
    if device.type == "cuda":
        print("as called, with the host's time where the device waits for it, and of the device alone; targets: device")
    dtypes = sorted({case.dtype for case in chosen})
    for row in () if args.no_ceilings else ceilings(device, dtypes, small=args.set == "smoke"):
        print(f"ceiling: {row['what']} {row['dtype']}: {per_second(write(row))}")
    wrong = measure(chosen, device, write, 3 if args.set == "smoke" else args.rounds, seconds, not args.no_memory)
    if wrong:
        print(f"error: {wrong} of {len(chosen)} cases were not timed, or not whole; see above", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
