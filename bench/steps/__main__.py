"""A training step of a Transformer whose tasks have masks: dense, the release's way, and ours, in one process.

    python -m bench.steps --set quick                      # both shapes, scaled down on a CPU; about 3 minutes on 2 cores
    python -m bench.steps --shapes big --densities 0.78 --systems forward --json runs/steps.jsonl

A step is a task switch, forward and backward pass, clipping and AdamW, as nspec trains. Every round runs each system
once, on the same batch; a speed-up is the median over rounds of (time of dense with PyTorch's fused AdamW / time of the
system). The systems are checked against plain PyTorch first, and what is wrong is not timed. On a GPU the models have
their real sizes and compute in bfloat16 autocast; on a CPU they are scaled down. The release's way has no batches of
several tasks: a weight times a mask is of one.

Peak memory is what a step allocates beyond parameters, optimiser state and masks, gradients included.

Steps are timed as called, on a GPU too: a step has more kernels than can be queued. A system that raises is reported and
left out, and so is a shape whose other systems cannot be measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bench import cli, trouble
from bench.report import tables
from bench.report.cells import model_name
from bench.report.summary import OPTIMIZERS, REAL_DENSITY, STEP_PARTS
from bench.rows import Row, Writer, line, timing_fields
from bench.steps import model as models
from bench.steps.check import check
from bench.steps.model import DTYPES, SHAPES, Shape, Tasks, task_name
from bench.steps.systems import Clock, System, free, mask_bytes
from bench.steps.tasks import growth
from bench.timing import Call, interleaved, paired, peak_bytes, spread, synchronize
from nspec.mt.training.precision import resolve_precision

BASELINE, SKIPPED, AGAIN = "dense, adamw", "no feed-forward", "dense again"
BATCHES = ("pure", "mixed")
"""Of one task, and of several."""
TASKS = 16  # of the model, at each density: IWSLT-8's
MIXED = 8  # tasks in a mixed batch
PART_STEPS = 5  # on a GPU, with a synchronisation after each part
DENSITIES = (0.3, 0.5, 0.78, 1.0)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    groups: tuple[tuple[str, str], ...]  # (shape, dtype), each of which is interleaved as a whole
    densities: tuple[float, ...] = DENSITIES
    whole: tuple[float, ...] = (
        DENSITIES  # of these: also batches of several tasks, the release, row-sparse AdamW, memory
    )
    systems: tuple[str, ...] = ("release", "forward", "update")  # beside dense; theirs are the next two
    optimizers: tuple[str, ...] = OPTIMIZERS
    batches: tuple[str, ...] = BATCHES
    memory: bool = True
    rounds: int = 15  # at least
    seconds: float = 600.0  # after so many no round of a group is begun; three are done anyway
    checked: int = 1_000_000  # sentences of the micro-batch on which the systems are checked
    counts: tuple[int, ...] = (16, 60, 300, 1000)  # tasks of the second part, growth; empty: left out
    growth_rounds: int = 7
    growing: tuple[tuple[str, str], ...] = ()  # (shape, dtype) of the second part


def plan(name: str, device_type: str) -> Plan:
    """What ``--set`` names on that kind of device."""
    gpu = device_type == "cuda"
    dtypes = ("bfloat16",) if gpu else ("float32", "bfloat16")
    groups = tuple((shape, dtype) for shape in SHAPES for dtype in dtypes)
    if name == "smoke":
        small = Plan((("base", "float32"), ("big", "bfloat16")), growing=(("base", "float32"),), counts=(2, 5, 1000))
        return replace(small, densities=(0.5, 1.0), whole=(0.5,), rounds=3, growth_rounds=3)
    if name == "full":
        return Plan(groups, growing=tuple((shape, dtypes[0]) for shape in SHAPES))
    if not gpu:  # bfloat16 where nspec itself would train in it: without matrix units it takes many times as long
        fast = resolve_precision("auto", torch.device(device_type), SHAPES["base"].d_model) == "bf16"
        groups = tuple((s, d) for s, d in groups if d == "float32" or (s == "base" and fast))
    growing = (("base", dtypes[0]),)
    return Plan(groups, whole=(REAL_DENSITY,), rounds=5, seconds=18.0, growth_rounds=3, checked=16, growing=growing)


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
        return BASELINE if self.system == "dense" else f"{self.name}, {self.density:g}, {BATCHES[self.mixed]}"

    def tasks(self, number: int, sentences: int) -> Tasks:
        """Of batch ``number``: the tasks in turn; of a mixed batch :data:`MIXED` of them, sentences grouped by task."""
        if not self.mixed:
            return task_name(self.density, number % TASKS)
        several = min(MIXED, sentences)
        return [task_name(self.density, (number + place * several // sentences) % TASKS) for place in range(sentences)]


DENSE = Provider("dense", "adamw", 1.0, False)


def providers(chosen: Plan) -> list[Provider]:
    """What is measured in a group, beside the dense model."""
    found = []
    for density in chosen.densities:
        whole = density in chosen.whole
        for system in chosen.systems:
            if system == "release":  # its cost does not depend on the density
                found += [Provider(system, "adamw", density, False)] if whole else []
                continue
            for optimizer in OPTIMIZERS if whole else OPTIMIZERS[:1]:
                found += [
                    Provider(system, optimizer, density, mixed) for mixed in ((False, True) if whole else (False,))
                ]
    return [p for p in found if p.optimizer in chosen.optimizers and BATCHES[p.mixed] in chosen.batches]


class Group:
    """The systems of one shape and dtype, as they are interleaved."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, chosen: Plan) -> None:
        self.shape, self.dtype, self.device, self.plan = shape, dtype, device, chosen
        self.model, self.batches = models.build(shape, device), models.random_batches(shape, device)
        self.masks = {density: models.draw_masks(shape, density, TASKS) for density in chosen.densities}
        self.providers = providers(chosen)
        self.systems = {BASELINE: System("dense", self.model, {}, dtype=dtype)}
        for p in self.providers:
            if p.name not in self.systems:
                held = [d for d in self.masks if p.system != "release" or d in chosen.whole]
                masks = {task: rows for d in held for task, rows in self.masks[d].items()}
                self.systems[p.name] = System(p.system, self.model, masks, p.optimizer, dtype)
        self._records: dict[str, list[dict[str, float]]] = {}
        self.failed: dict[str, str] = {}
        """What was wrong or raised, and why; it is not measured."""

    def refuse_wrong(self) -> None:
        """Leaves out the systems whose results are wrong.

        Of bfloat16 rounding takes most digits: where float32 is not measured, it is checked nevertheless.
        """
        density = min(self.plan.whole, key=lambda d: abs(d - 0.5))
        batch = {name: tensor[: self.plan.checked] for name, tensor in self.batches[0].items()}
        one, several = (Provider("", "", density, mixed).tasks(0, len(batch["labels"])) for mixed in (False, True))
        assert isinstance(one, str)
        coarse = self.dtype == torch.bfloat16 and (self.shape.shape, "float32") not in self.plan.groups
        for dtype in (torch.float32, self.dtype) if coarse else (self.dtype,):
            for system in self.systems.values():
                system.dtype = dtype
            ours = {name: system for name, system in self.systems.items() if name != BASELINE}
            wrong = check(self.systems[BASELINE], ours, batch, one, several, self.masks[density])
            for name, why in wrong.items():
                print(f"  {name} is WRONG and is not timed: {why}", flush=True)
                del self.systems[name]
            self.failed |= wrong
        self.providers = [provider for provider in self.providers if provider.name in self.systems]

    def measure(self) -> dict[str, list[float]]:
        """Seconds of a step of every provider in each round; parts of a step are recorded as well."""
        # On a CPU reading a clock costs nothing; on a GPU the parts are timed in steps of their own.
        gpu = self.device.type == "cuda"
        step = lambda p: lambda number: self._step(p, number, None if gpu else Clock(self.device))
        skipped = System(SKIPPED, self.model, {}, dtype=self.dtype)

        def dense(number: int) -> None:
            print(".", end="", flush=True)  # a point for each round
            step(DENSE)(number)

        step(DENSE)(0)  # optimiser states, and code that is loaded at first use
        for provider in self.providers:
            try:
                step(provider)(0)
                synchronize(self.device)
            except Exception as error:
                self.failed[provider.key] = trouble.report(f"not timed: {provider.key}", error)
        self.providers = [provider for provider in self.providers if provider.key not in self.failed]
        half = len(self.providers) // 2
        calls: dict[str, Call] = {BASELINE: dense}
        calls[SKIPPED] = lambda number: skipped.step(self.batches[number % len(self.batches)], "")
        calls |= {p.key: step(p) for p in self.providers[:half]}
        calls[AGAIN] = lambda number: self._step(DENSE, number, None)  # half a round later: how the machine drifts
        calls |= {p.key: step(p) for p in self.providers[half:]}
        limits = {"rounds": self.plan.rounds, "least_seconds": 0, "most_seconds": self.plan.seconds}
        self._records.clear()
        times = interleaved(calls, self.device, warmup=2 if gpu else 0, **limits)  # type: ignore[arg-type]
        for provider in (DENSE, *self.providers) if gpu else ():
            for number in range(PART_STEPS):
                self._step(provider, number, Clock(self.device, synchronized=True))
        print(flush=True)
        return times

    def _step(self, provider: Provider, number: int, clock: Clock | None) -> None:
        batch = self.batches[number % len(self.batches)]
        self.systems[provider.name].step(batch, provider.tasks(number, self.shape.sentences), clock)
        if clock is not None:
            self._records.setdefault(provider.key, []).append(clock.parts)

    def row(self, provider: Provider, times: Mapping[str, list[float]]) -> Row:
        """What is known of a provider."""
        shape, dense = self.shape, times[BASELINE]
        tasks, records = provider.tasks(0, shape.sentences), self._records[provider.key]
        system, baseline = self.systems[provider.name], provider is DENSE
        timing = timing_fields(dense, times[provider.key])
        parts = {part: round(1e3 * statistics.median(one[part] for one in records), 3) for part in STEP_PARTS}
        share = statistics.median(1 - s / d for s, d in zip(times[SKIPPED], dense))
        remembered = self.plan.memory and (baseline or provider.density in self.plan.whole)
        masks = {} if baseline else self.masks[provider.density]
        return {
            "kind": "step",
            **shape.fields(),
            "batch": BATCHES[provider.mixed],
            "tasks_in_batch": len(set(tasks)) if provider.mixed else 1,
            "system": provider.system,
            "optimizer": provider.optimizer,
            "dtype": str(self.dtype).removeprefix("torch."),
            "density": provider.density,
            "baseline": BASELINE,
            **timing,
            "tokens_per_second": round(1e3 * shape.tokens / timing["milliseconds"], 1),
            "parts": parts,
            "feed_forward_share": round(share, 4),
            "peak_bytes": peak_bytes(lambda: system.step(self.batches[0], tasks), self.device) if remembered else None,
            "mask_bytes": mask_bytes(provider.system, shape, self.model, masks),
            "tasks": TASKS,
        }

    def run(self, write: Writer) -> None:
        """Checks, measures and prints all of it."""
        self.refuse_wrong()
        times = self.measure()
        rows = []
        for provider in (DENSE, *self.providers):
            rows.append(write(self.row(provider, times)))
            parts = ", ".join(f"{name} {value:.1f}" for name, value in rows[-1]["parts"].items())
            print(line(provider.key, rows[-1], f"({parts})"), flush=True)
        noise = paired(times[BASELINE], times[AGAIN])
        share = spread([1 - s / d for s, d in zip(times[SKIPPED], times[BASELINE])])
        print(f"  noise: dense against itself {noise.median:.2f}x [{noise.low:.2f}, {noise.high:.2f}]")
        said = f"{share.median:.1%} [{share.low:.1%}, {share.high:.1%}] (pairs skipped)"
        print(f"  feed-forward share of the dense step: {said}", "", *tables.steps(rows), sep="\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a system computed something wrong or something raised."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device, write = cli.started(parser, options)
    chosen, began = _chosen(options, plan(options.set, device.type)), time.perf_counter()
    failed: dict[str, str] = {}

    def steps(shape: Shape, dtype: torch.dtype) -> None:
        group = Group(shape, dtype, device, chosen)
        try:
            group.run(write)
        finally:
            failed.update(group.failed)

    def growing(shape: Shape, dtype: torch.dtype) -> None:
        free_bytes = 2**30 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
        limits = {"rounds": chosen.growth_rounds, "release_limit": 2**20 if options.set == "smoke" else free_bytes}
        rows = []
        for row in growth(shape, device, dtype, chosen.counts, chosen.systems, **limits):
            rows.append(write(row))
            print(line(f"{row['system']}, {row['tasks']} tasks", row), flush=True)
        print("", *tables.tasks(rows), sep="\n", flush=True)

    measured: dict[str, tuple[Callable[[Shape, torch.dtype], None], tuple[tuple[str, str], ...]]] = {
        "training step": (steps, chosen.groups),
        "number of tasks": (growing, chosen.growing if chosen.counts else ()),
    }
    todo = [(what, measure, *one) for what, (measure, several) in measured.items() for one in several]
    for what, measure, name, dtype in todo:
        shape, started = models.shape_for(name, options.set, device), time.perf_counter()
        print(f"\n{what}: {model_name(shape.fields())}, {dtype}, {shape.tokens} tokens", flush=True)
        try:
            measure(shape, DTYPES[dtype])
        except Exception as error:
            failed[f"{what}, {name}"] = trouble.report(f"not measured: {what}, {name}, {dtype}", error)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        free(device)
    print(f"\n{time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


def _chosen(options: argparse.Namespace, given: Plan) -> Plan:
    """The plan of the set with what the command line asks for in its place."""
    asked: dict[str, object] = {"memory": not options.no_memory}
    if options.shapes or options.dtypes:
        shapes = options.shapes or list(dict.fromkeys(shape for shape, _ in given.groups))
        dtypes = options.dtypes or list(dict.fromkeys(dtype for _, dtype in given.groups))
        asked["groups"] = tuple((shape, dtype) for shape in shapes for dtype in dtypes)
        asked["growing"] = tuple((shape, dtypes[0]) for shape in shapes)
    if options.densities:
        asked |= dict.fromkeys(("densities", "whole"), tuple(sorted(set(options.densities))))
    if options.systems:
        asked["systems"] = tuple(name for name in options.systems if name != "dense")
    asked |= {name: tuple(found) for name in ("optimizers", "batches") if (found := getattr(options, name))}
    if options.rounds:
        asked |= {"rounds": options.rounds, "growth_rounds": options.rounds, "seconds": float("inf")}
    if options.seconds is not None:
        asked["seconds"] = options.seconds
    if options.tasks is not None:
        asked["counts"] = tuple(sorted(set(options.tasks) - {0}))
    return replace(given, **asked)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench.steps", __doc__, default="full")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES))
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="bfloat16 is autocast")
    add("--densities", nargs="+", type=cli.share, help="shares of active neurons, in (0, 1]")
    add("--systems", nargs="+", choices=("dense", "release", "forward", "update"), help="beside dense, always there")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, help="of the systems beside dense")
    add("--batches", nargs="+", choices=BATCHES, help="pure: of one task, mixed: of several")
    add("--tasks", nargs="+", type=int, metavar="N", help="numbers of tasks of the second part; 0: leave it out")
    add("--rounds", type=cli.count, help="at least so many, however long they take")
    add("--seconds", type=float, help="no round of a shape is begun after so many; three are done anyway")
    add("--no-memory", action="store_true", help="without peak memory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
