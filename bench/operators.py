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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import trouble
from bench.cases import BATCHES, DTYPES, OPERATORS, SETS, Case, cases, target
from bench.ceilings import ceilings
from bench.machine import device_name, pick_device
from bench.providers import Problem, problem
from bench.providers.blocks import ACTIVATIONS
from bench.rows import Row, Writer, figure, timing_fields
from bench.timing import (
    Call,
    interleaved,
    interleaved_on_device,
    paired,
    paired_on_device,
    peak_bytes,
    spread,
    synchronize,
)

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

    Without a baseline, which all ratios are over, nothing is timed.

    Args:
        made: the case with its inputs.
        device: that they are on.
        rounds: of each provider, as many of them as ``most_seconds`` allows.
        most_seconds: for all rounds together; at least four are always done. On a GPU half of it is for device times.
        memory: measure peak memory too.
        again: makes the inputs anew for the second half of the rounds. Where memory lies decides how fast a product
            runs, for as long as it lies there.

    Raises:
        trouble.DeviceLost: after this error nothing more can be measured.
    """
    case, base = made.case, made.baseline.name
    common = {**fields_of(case), "baseline": base}
    failed: dict[str, str] = {}

    def fails(name: str, error: Exception) -> None:
        failed[name] = trouble.in_a_line(error)
        if isinstance(error, AssertionError):  # a wrong result: where it was noticed says nothing
            failed[name] = f"WRONG: {error}"
            print(f"error: not timed: {error}", file=sys.stderr, flush=True)
        else:
            trouble.report(f"not timed: {case.label}, {name}", error)
        if trouble.device_is_lost(device):
            raise trouble.DeviceLost(f"{case.label}, {name}: {failed[name]}") from error

    for provider, error in made.checked():
        if error is not None:
            fails(provider.name, error)
    times: dict[str, list[float]] = {}
    on_device: dict[str, list[float]] = {}
    gpu = device.type == "cuda"
    halves = 1 if again is None else 2
    for half in range(halves):
        if half == 1 and again is not None:
            absent = made.absent
            del made  # before the next, so that both need not fit
            made = again()
            made.absent = absent
        share, some = most_seconds / halves / (2 if gpu else 1), -(-rounds // halves)
        while base not in failed:
            calls = {one.name: one.call for one in made.providers if one.name not in failed}
            try:
                part = interleaved(calls, device, rounds=some, least_seconds=share / 2, most_seconds=share, always=4)
                queued = interleaved_on_device(calls, device, rounds=some, most_seconds=share) if gpu else {}
            except Exception:
                if not (found := raising(calls, device)):
                    raise
                for name, error in found.items():
                    fails(name, error)
                continue  # the others once more, so that all rounds have the same providers
            done = max(map(len, queued.values()), default=0)
            for name, values in part.items():
                times.setdefault(name, []).extend(values)
                on_device.setdefault(name, []).extend(queued.get(name, [math.nan] * done))
            break
    for name, reason in failed.items():
        yield {"kind": "absent", **common, "provider": name, "reason": reason, "failed": True}
    if base in failed:
        reason = f"the baseline, {base}, gives nothing to compare with"
        for name in (one.name for one in made.providers if one.name not in failed):
            yield {"kind": "absent", **common, "provider": name, "reason": reason, "failed": True}
    baseline = times.get(base, [])
    for provider in made.providers if base not in failed else ():
        if provider.name in failed:
            continue
        values = times[provider.name]
        flops, moved = made.work(provider.computes)
        milliseconds = spread([1e3 * value for value in values])
        timing = timing_fields(milliseconds, paired(baseline, values), len(values))
        if gpu:
            timing |= device_fields(on_device[base], on_device[provider.name])
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


def fields_of(case: Case) -> Row:
    """What a row says of its case."""
    named = ("operator", "activation", "tokens", "d_model", "d_ff", "tasks", "dtype", "density", "active")
    return {name: getattr(case, name) for name in named}


def raising(calls: Mapping[str, Call], device: torch.device) -> dict[str, Exception]:
    """Those of some calls that raise, each made once, and what they raise."""
    found: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            call(0)
            synchronize(device)
        except Exception as error:
            found[name] = error
    return found


def device_fields(baseline: Sequence[float], own: Sequence[float]) -> Row:
    """The device time and its ratio to the baseline's, from seconds by round; nothing where they cannot be told."""
    found = paired_on_device([1e3 * value for value in baseline], [1e3 * value for value in own])
    return {} if found is None else timing_fields(*found, prefix="device_")


def show(row: Row) -> None:
    """Prints one row."""
    if row["kind"] == "absent":
        said = "not timed" if row.get("failed") else "not here"
        print(f"  {row['provider']:<32} {said}: {row['reason']}", flush=True)
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
        failed, lost = False, False
        done: list[str] = []
        try:
            again = functools.partial(problem, case, device, seed=1)
            options: dict[str, Any] = {"rounds": rounds, "most_seconds": most_seconds, "memory": memory, "again": again}
            for row in rows_of(problem(case, device), device, **options):
                show(write(row))
                failed |= bool(row.get("failed"))
                done.append(row["provider"])
        except Exception as error:
            failed = True
            lost = isinstance(error, trouble.DeviceLost) or trouble.device_is_lost(device)
            if not isinstance(error, trouble.DeviceLost):  # which has been reported
                trouble.report(f"not timed: {case.label}", error)
            reason = str(error) if isinstance(error, trouble.DeviceLost) else trouble.in_a_line(error)
            show(write(_lost(case, reason, f"all but {', '.join(done)}" if done else WHOLE_CASE)))
        wrong += failed
        if lost:
            print(f"error: {trouble.LOST}", file=sys.stderr, flush=True)
            for other in chosen[number + 1 :]:
                write(_lost(other, "an error before it ended the use of the GPU"))
            return wrong + len(chosen) - number - 1
    return wrong


def _lost(case: Case, reason: str, provider: str = WHOLE_CASE) -> Row:
    return {"kind": "absent", **fields_of(case), "provider": provider, "reason": reason, "failed": True}


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
        print(f"error: {wrong} of {len(chosen)} cases were not timed, or not whole; see above", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
