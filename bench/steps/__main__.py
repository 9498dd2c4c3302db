"""A training step of a Transformer whose tasks have masks: dense, the release's way, and ours, in one process.

    python -m bench.steps --set quick                      # both shapes, scaled down on a CPU; about 3 minutes on 2 cores
    python -m bench.steps --shapes big --densities 0.78 --systems forward --json runs/steps.jsonl

A step is a task switch, forward and backward pass, clipping and AdamW, as nspec trains. Every round runs each system
once, on the same batch; a speed-up is the median over rounds of (time of dense with PyTorch's fused AdamW / time of the
system). The systems are checked against plain PyTorch first, and what is wrong is not timed. On a GPU the models have
their real sizes and compute in bfloat16 autocast; on a CPU they are scaled down.

Peak memory is what a step allocates beyond parameters, optimiser state and masks, gradients included.

Steps are timed as called, on a GPU too: a step has more kernels than can be queued. A system that raises is reported and
left out, and so is a shape whose other systems cannot be measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import trouble
from bench.machine import device_name, pick_device
from bench.rows import Row, Writer, timing_fields
from bench.steps import summary as step_summary
from bench.steps.check import check
from bench.steps.model import (
    PARTS,
    SHAPES,
    Batch,
    Clock,
    Shape,
    System,
    Tasks,
    build,
    draw_masks,
    free,
    mask_bytes,
    random_batches,
    task_name,
)
from bench.steps.plan import BATCHES, OPTIMIZERS, Plan, plan, shape_for
from bench.steps.tasks import growth
from bench.timing import Call, interleaved, paired, peak_bytes, spread, synchronize

BASELINE, AGAIN = "dense, adamw", "dense again"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = 16  # of the model, at each density: IWSLT-8's
MIXED = 8  # tasks in a mixed batch
PART_STEPS = 5  # on a GPU, with a synchronisation after each part


@dataclass(frozen=True)
class Provider:
    """One line of the table: a system with its batches."""

    system: str
    optimizer: str
    density: float
    mixed: bool

    @property
    def name(self) -> str:
        """``kind, optimizer``: the model that runs it, one for all densities and batches."""
        return f"{self.system}, {self.optimizer}"

    @property
    def key(self) -> str:
        """Unique among the providers."""
        return f"{self.name}, {self.density:g}, {'mixed' if self.mixed else 'pure'}"

    def tasks(self, number: int, sentences: int) -> Tasks:
        """Of batch ``number``: the tasks in turn; of a mixed batch :data:`MIXED` of them, sentences grouped by task."""
        if not self.mixed:
            return task_name(self.density, number % TASKS)
        several = min(MIXED, sentences)
        return [task_name(self.density, (number + place * several // sentences) % TASKS) for place in range(sentences)]


def providers(chosen: Plan) -> list[Provider]:
    """What is measured in a group, beside the dense model."""
    found = []
    for density in chosen.densities:
        for system in chosen.systems:
            if system == "release":
                if density in chosen.release:
                    found.append(Provider(system, "adamw", density, False))
                continue
            for optimizer in OPTIMIZERS if density in chosen.row_sparse else OPTIMIZERS[:1]:
                found.append(Provider(system, optimizer, density, False))
                if density in chosen.mixed and (optimizer == "adamw" or chosen.mixed_row_sparse):
                    found.append(Provider(system, optimizer, density, True))
    asked = lambda p: p.optimizer in chosen.optimizers and ("mixed" if p.mixed else "pure") in chosen.batches
    return [provider for provider in found if asked(provider)]


class Group:
    """The systems of one shape and dtype, as they are interleaved."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, chosen: Plan) -> None:
        self.shape, self.dtype, self.device, self.plan = shape, dtype, device, chosen
        self.model, self.batches = build(shape, device), random_batches(shape, device)
        self.masks = {density: draw_masks(shape, density, TASKS) for density in chosen.densities}
        every = {task: rows for masks in self.masks.values() for task, rows in masks.items()}
        self.providers = providers(chosen)
        self.dense = System("dense", self.model, {}, dtype=dtype)
        self.skipped = System("no feed-forward", self.model, {}, dtype=dtype)
        kinds = dict.fromkeys((provider.system, provider.optimizer) for provider in self.providers)
        held = {d: self.masks[d] for d in chosen.release if d in self.masks}
        theirs = {task: rows for masks in held.values() for task, rows in masks.items()}
        self.systems = {
            f"{kind}, {optimizer}": System(kind, self.model, theirs if kind == "release" else every, optimizer, dtype)
            for kind, optimizer in kinds
        }
        self._records: dict[str, list[dict[str, float]]] = {}
        self.raised: dict[str, str] = {}

    def refuse_wrong(self) -> dict[str, str]:
        """Leaves out the systems whose results are wrong; which those are, and why.

        Of bfloat16 rounding takes most digits: where float32 is not measured, it is checked nevertheless.
        """
        density = min(self.plan.release or self.plan.densities, key=lambda d: abs(d - 0.5))
        batch = {name: tensor[: self.plan.checked] for name, tensor in self.batches[0].items()}
        one = Provider("", "", density, False).tasks(0, len(batch["labels"]))
        several = Provider("", "", density, True).tasks(0, len(batch["labels"]))
        assert isinstance(one, str)
        wrong: dict[str, str] = {}
        coarse = self.dtype == torch.bfloat16 and (self.shape.shape, "float32") not in self.plan.groups
        for dtype in (torch.float32, self.dtype) if coarse else (self.dtype,):
            right = {name: system for name, system in self.systems.items() if name not in wrong}
            for system in (self.dense, *right.values()):
                system.dtype = dtype
            wrong |= check(self.dense, right, batch, one, several, self.masks[density])
        for name in wrong:
            del self.systems[name]
        self.providers = [provider for provider in self.providers if provider.name in self.systems]
        return wrong

    def measure(self) -> dict[str, list[float]]:
        """Seconds of a step of every provider in each round; parts of a step are recorded as well."""
        calls: dict[str, Call] = {BASELINE: self._call(BASELINE, self.dense, None)}
        calls[self.skipped.kind] = self._call(self.skipped.kind, self.skipped, None)
        half = len(self.providers) // 2
        for p in self.providers[:half]:
            calls[p.key] = self._call(p.key, self.systems[p.name], p)
        calls[AGAIN] = self._call(AGAIN, self.dense, None)  # half a round later: shows how the machine drifts
        for p in self.providers[half:]:
            calls[p.key] = self._call(p.key, self.systems[p.name], p)
        seen = [0]

        def shown(number: int) -> object:
            if number >= seen[0]:
                print(".", end="", flush=True)
                seen[0] = number + 1
            return first(number)

        first, calls[BASELINE] = calls[BASELINE], shown
        gpu = self.device.type == "cuda"
        for key in (BASELINE, self.skipped.kind):  # optimiser states, and code that is loaded at first use
            calls[key](0)
        for raising in self._raising(calls):
            del calls[raising.key]
        seen[0] = 0
        times = interleaved(
            calls,
            self.device,
            rounds=self.plan.rounds,
            least_seconds=0,
            most_seconds=self.plan.seconds,
            warmup=2 if gpu else 0,
        )
        for name, own in times.items():
            self._records[name] = self._records.get(name, [])[-len(own) :]
        if gpu:  # on a CPU the steps that were timed have recorded theirs
            for number in range(PART_STEPS):
                for key, system, provider in self._members():
                    self._record(key, system, provider, number, Clock(self.device, synchronized=True))
        print(flush=True)
        return times

    def _raising(self, calls: Mapping[str, Call]) -> list[Provider]:
        """Runs every provider once, and leaves out and gives back those that raise."""
        raised = []
        for provider in self.providers:
            try:
                calls[provider.key](0)
                synchronize(self.device)
            except Exception as error:
                trouble.report(f"not timed: {provider.key}", error)
                if trouble.device_is_lost(self.device):
                    raise
                raised.append(provider)
                self.raised[provider.key] = trouble.in_a_line(error)
        self.providers = [provider for provider in self.providers if provider not in raised]
        return raised

    def parts(self, key: str) -> dict[str, float]:
        """Median milliseconds of each part."""
        records = self._records[key]
        return {part: round(1e3 * statistics.median(one[part] for one in records), 3) for part in PARTS}

    def peak(self, provider: Provider | None) -> int | None:
        """Bytes that a step allocates at most; None where the plan does not ask for it."""
        if (provider is None and not self.plan.memory) or (provider and provider.density not in self.plan.memory):
            return None
        system = self.dense if provider is None else self.systems[provider.name]
        tasks = provider.tasks(0, self.shape.sentences) if provider is not None else ""
        return peak_bytes(lambda: system.step(self.batches[0], tasks), self.device)

    def _members(self) -> list[tuple[str, System, Provider | None]]:
        ours = [(p.key, self.systems[p.name], p) for p in self.providers]
        return [(BASELINE, self.dense, None), (self.skipped.kind, self.skipped, None), *ours]

    def _call(self, key: str, system: System, provider: Provider | None) -> Call:
        # On a CPU reading a clock costs nothing; on a GPU the parts are timed in steps of their own.
        def call(number: int) -> None:
            clock = Clock(self.device) if self.device.type == "cpu" else None
            self._record(key, system, provider, number, clock)

        return call

    def _record(self, key: str, system: System, provider: Provider | None, number: int, clock: Clock | None) -> None:
        tasks = provider.tasks(number, self.shape.sentences) if provider is not None else ""
        batch: Batch = self.batches[number % len(self.batches)]
        system.step(batch, tasks, clock)
        if clock is not None:
            self._records.setdefault(key, []).append(clock.parts)


def run_group(group: Group, write: Writer) -> tuple[list[Row], dict[str, str]]:
    """Checks, measures and prints one shape and dtype; its rows, and what was wrong or raised and is not among them."""
    shape = group.shape
    wrong = group.refuse_wrong()
    for name, why in wrong.items():
        print(f"  {name} is WRONG and is not timed: {why}", flush=True)
    times = group.measure()
    dense = times[BASELINE]
    share = spread([1 - s / d for s, d in zip(times[group.skipped.kind], dense)])
    rows = []
    for provider in [None, *group.providers]:
        key = BASELINE if provider is None else provider.key
        kind, density = ("dense", 1.0) if provider is None else (provider.system, provider.density)
        mixed = provider is not None and provider.mixed
        several = provider.tasks(0, shape.sentences) if provider is not None and mixed else ""
        own = times[key]
        timing = timing_fields(spread([1e3 * t for t in own]), paired(dense, own), len(own))
        row: Row = {
            "kind": "step",
            **shape.fields(),
            "batch": "mixed" if mixed else "pure",
            "tasks_in_batch": len(set(several)) if mixed else 1,
            "system": kind,
            "optimizer": "adamw" if provider is None else provider.optimizer,
            "dtype": str(group.dtype).removeprefix("torch."),
            "density": density,
            "baseline": BASELINE,
            **timing,
            "tokens_per_second": round(1e3 * shape.tokens / timing["milliseconds"], 1),
            "parts": group.parts(key),
            "feed_forward_share": round(share.median, 4),
            "peak_bytes": group.peak(provider),
            "mask_bytes": 0 if provider is None else mask_bytes(kind, shape, group.model, group.masks[density]),
            "tasks": TASKS,
        }
        rows.append(write(row))
        print(step_summary.line(row), flush=True)
    print(step_summary.conclusion(rows, share, paired(dense, times[AGAIN])), flush=True)
    return rows, wrong | group.raised


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a system computed something wrong or something raised."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    chosen = _chosen(options, plan(options.set, device.type))
    write, began = Writer(options.json, device), time.perf_counter()
    wrong: dict[str, str] = {}
    print(f"training steps on {device_name(device)}, torch {torch.__version__}")
    for name, dtype in chosen.groups:
        shape = shape_for(name, options.set, device)
        print(f"\n{step_summary.title(shape, dtype)}\n  checking, then rounds ", end="", flush=True)
        started = time.perf_counter()
        try:
            group = Group(shape, DTYPES[dtype], device, chosen)
            wrong |= run_group(group, write)[1]
            del group
        except Exception as error:
            wrong[name] = trouble.in_a_line(error)
            trouble.report(f"not measured: {name}, {dtype}", error)
            if trouble.device_is_lost(device):
                print(f"error: {trouble.LOST}", file=sys.stderr, flush=True)
                return 1
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        free(device)
    limit = 2**30 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
    limit = 2**20 if options.set == "smoke" else limit
    for name, dtype in chosen.growing if chosen.counts else ():
        shape = shape_for(name, options.set, device)
        print(f"\nNumber of tasks: {step_summary.title(shape, dtype)}", flush=True)
        try:
            growth(
                shape,
                device,
                DTYPES[dtype],
                chosen.counts,
                chosen.systems,
                write,
                rounds=options.rounds or chosen.growth_rounds,
                release_limit=limit,
            )
        except Exception as error:
            wrong[f"number of tasks, {name}"] = trouble.in_a_line(error)
            trouble.report(f"not measured: number of tasks, {name}, {dtype}", error)
            if trouble.device_is_lost(device):
                print(f"error: {trouble.LOST}", file=sys.stderr, flush=True)
                return 1
    print(f"\n{time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


def _chosen(options: argparse.Namespace, given: Plan) -> Plan:
    """The plan of the set with what the command line asks for in its place."""
    if options.shapes or options.dtypes:
        shapes = options.shapes or list(dict.fromkeys(shape for shape, _ in given.groups))
        dtypes = options.dtypes or list(dict.fromkeys(dtype for _, dtype in given.groups))
        groups = tuple((shape, dtype) for shape in shapes for dtype in dtypes)
        given = replace(given, groups=groups, growing=tuple((shape, dtypes[0]) for shape in shapes))
    if options.densities:
        asked = tuple(sorted(set(options.densities)))
        given = replace(
            given, densities=asked, mixed_row_sparse=True, mixed=asked, release=asked, row_sparse=asked, memory=asked
        )
    if options.systems:
        given = replace(given, systems=tuple(name for name in options.systems if name != "dense"))
    if options.optimizers:
        given = replace(given, optimizers=tuple(options.optimizers))
    if options.batches:
        given = replace(given, batches=tuple(options.batches))
    if options.rounds:
        given = replace(given, rounds=options.rounds, seconds=float("inf"))
    if options.seconds is not None:
        given = replace(given, seconds=options.seconds)
    if options.no_memory:
        given = replace(given, memory=())
    return given if options.tasks is None else replace(given, counts=tuple(sorted(set(options.tasks) - {0})))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--set", choices=("full", "quick", "smoke"), default="full")
    add("--shapes", nargs="+", choices=list(SHAPES))
    add("--dtypes", nargs="+", choices=list(DTYPES), help="bfloat16 is autocast")
    add("--densities", nargs="+", type=_density, help="shares of active neurons, in (0, 1]")
    add("--systems", nargs="+", choices=("dense", "release", "forward", "update"), help="beside dense, always there")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, help="of the systems beside dense")
    add("--batches", nargs="+", choices=BATCHES, help="pure: of one task, mixed: of several")
    add("--tasks", nargs="+", type=int, metavar="N", help="numbers of tasks of the second part; 0: leave it out")
    add("--rounds", type=int, help="at least so many, however long they take")
    add("--seconds", type=float, help="no round of a shape is begun after so many; three are done anyway")
    add("--no-memory", action="store_true", help="without peak memory")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    add("--json", type=Path, help="append the rows to this file")
    return parser.parse_args(arguments)


def _density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


if __name__ == "__main__":
    sys.exit(main())
