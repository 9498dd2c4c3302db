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
from bench.steps.check import check
from bench.steps.model import (
    DTYPES,
    SHAPES,
    Shape,
    Tasks,
    build,
    draw_masks,
    random_batches,
    scaled_down,
    task_name,
    tiny,
)
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
    mixed: tuple[float, ...] = DENSITIES  # of these: with batches of several tasks too
    release: tuple[float, ...] = DENSITIES  # in the release's way too, whose cost does not depend on it
    row_sparse: tuple[float, ...] = DENSITIES  # with our optimiser too, beside PyTorch's ...
    mixed_row_sparse: bool = True  # ... and with batches of several tasks
    memory: tuple[float, ...] = DENSITIES  # with peak memory
    systems: tuple[str, ...] = ("release", "forward", "update")  # beside dense; theirs are the next two
    optimizers: tuple[str, ...] = OPTIMIZERS
    batches: tuple[str, ...] = BATCHES
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
        half = {"mixed": (0.5,), "release": (0.5,), "memory": (0.5,), "rounds": 3, "growth_rounds": 3}
        small = Plan((("base", "float32"), ("big", "bfloat16")), growing=(("base", "float32"),), counts=(2, 5, 1000))
        return replace(small, densities=(0.5, 1.0), **half)  # type: ignore[arg-type]
    if name == "full":
        return Plan(groups, growing=tuple((shape, dtypes[0]) for shape in SHAPES))
    if not gpu:  # bfloat16 where nspec itself would train in it: without matrix units it takes many times as long
        fast = resolve_precision("auto", torch.device(device_type), SHAPES["base"].d_model) == "bf16"
        groups = tuple((s, d) for s, d in groups if d == "float32" or (s == "base" and fast))
    real = dict.fromkeys(("mixed", "release", "row_sparse", "memory"), (REAL_DENSITY,))
    quick = Plan(groups, mixed_row_sparse=False, rounds=5, seconds=18.0, growth_rounds=3, checked=16)
    return replace(quick, growing=(("base", dtypes[0]),), **real)  # type: ignore[arg-type]


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
        for system in chosen.systems:
            if system == "release":
                found += [Provider(system, "adamw", density, False)] if density in chosen.release else []
                continue
            for optimizer in OPTIMIZERS if density in chosen.row_sparse else OPTIMIZERS[:1]:
                found.append(Provider(system, optimizer, density, False))
                if density in chosen.mixed and (optimizer == "adamw" or chosen.mixed_row_sparse):
                    found.append(Provider(system, optimizer, density, True))
    return [p for p in found if p.optimizer in chosen.optimizers and BATCHES[p.mixed] in chosen.batches]


class Group:
    """The systems of one shape and dtype, as they are interleaved."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, chosen: Plan) -> None:
        self.shape, self.dtype, self.device, self.plan = shape, dtype, device, chosen
        self.model, self.batches = build(shape, device), random_batches(shape, device)
        self.masks = {density: draw_masks(shape, density, TASKS) for density in chosen.densities}
        self.providers = providers(chosen)
        self.systems = {BASELINE: System("dense", self.model, {}, dtype=dtype)}
        for p in self.providers:
            if p.name not in self.systems:
                held = [d for d in self.masks if p.system != "release" or d in chosen.release]
                masks = {task: rows for d in held for task, rows in self.masks[d].items()}
                self.systems[p.name] = System(p.system, self.model, masks, p.optimizer, dtype)
        self._records: dict[str, list[dict[str, float]]] = {}
        self.failed: dict[str, str] = {}
        """What was wrong or raised, and why; it is not measured."""

    def refuse_wrong(self) -> None:
        """Leaves out the systems whose results are wrong.

        Of bfloat16 rounding takes most digits: where float32 is not measured, it is checked nevertheless.
        """
        density = min(self.plan.release or self.plan.densities, key=lambda d: abs(d - 0.5))
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
        first: dict[str, Call] = {
            BASELINE: step(DENSE),
            SKIPPED: lambda n: skipped.step(self.batches[n % len(self.batches)], ""),
        }
        for call in first.values():  # optimiser states, and code that is loaded at first use
            call(0)
        self._try({p.key: step(p) for p in self.providers})
        half = len(self.providers) // 2
        calls = first | {p.key: step(p) for p in self.providers[:half]}
        calls[AGAIN] = lambda number: self._step(
            DENSE, number, None
        )  # half a round later: shows how the machine drifts
        calls |= {p.key: step(p) for p in self.providers[half:]}
        calls[BASELINE] = _shown(calls[BASELINE])
        plan, warmup = self.plan, 2 if gpu else 0
        options = {"rounds": plan.rounds, "least_seconds": 0, "most_seconds": plan.seconds, "warmup": warmup}
        self._records.clear()
        times = interleaved(calls, self.device, **options)  # type: ignore[arg-type]
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

    def _try(self, calls: Mapping[str, Call]) -> None:
        """Runs every provider once, and leaves out those that raise."""
        for key, call in calls.items():
            try:
                call(0)
                synchronize(self.device)
            except Exception as error:
                self.failed[key] = trouble.report(f"not timed: {key}", error, self.device)
        self.providers = [provider for provider in self.providers if provider.key not in self.failed]

    def row(self, provider: Provider, times: Mapping[str, list[float]]) -> Row:
        """What is known of a provider."""
        shape, dense = self.shape, times[BASELINE]
        tasks, records = provider.tasks(0, shape.sentences), self._records[provider.key]
        system, baseline = self.systems[provider.name], provider is DENSE
        timing = timing_fields(dense, times[provider.key])
        parts = {part: round(1e3 * statistics.median(one[part] for one in records), 3) for part in STEP_PARTS}
        share = statistics.median(1 - s / d for s, d in zip(times[SKIPPED], dense))
        remembered = bool(self.plan.memory) and (baseline or provider.density in self.plan.memory)
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


def _shown(call: Call) -> Call:
    """A call that prints a point for each round."""

    def shown(number: int) -> object:
        print(".", end="", flush=True)
        return call(number)

    return shown


def run_group(group: Group, write: Writer) -> list[Row]:
    """Checks, measures and prints one shape and dtype; its rows."""
    group.refuse_wrong()
    times = group.measure()
    rows = []
    for provider in (DENSE, *group.providers):
        rows.append(write(group.row(provider, times)))
        parts = ", ".join(f"{name} {value:.1f}" for name, value in rows[-1]["parts"].items())
        print(line(provider.key, rows[-1], f"({parts})"), flush=True)
    noise = paired(times[BASELINE], times[AGAIN])
    share = spread([1 - s / d for s, d in zip(times[SKIPPED], times[BASELINE])])
    print(f"  noise: dense against itself {noise.median:.2f}x [{noise.low:.2f}, {noise.high:.2f}]")
    print(
        f"  feed-forward share of the dense step: {share.median:.1%} [{share.low:.1%}, {share.high:.1%}] (pairs skipped)"
    )
    print("\n".join(["", *tables.steps(rows)]), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a system computed something wrong or something raised."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device, write = cli.started(parser, options)
    chosen, began = _chosen(options, plan(options.set, device.type)), time.perf_counter()
    failed: dict[str, str] = {}

    def groups(shape: Shape, dtype: torch.dtype) -> None:
        group = Group(shape, dtype, device, chosen)
        try:
            run_group(group, write)
        finally:
            failed.update(group.failed)

    def growing(shape: Shape, dtype: torch.dtype) -> None:
        free_bytes = 2**30 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
        limit = 2**20 if options.set == "smoke" else free_bytes
        rounds = options.rounds or chosen.growth_rounds
        rows = []
        for row in growth(shape, device, dtype, chosen.counts, chosen.systems, rounds=rounds, release_limit=limit):
            rows.append(write(row))
            print(line(f"{row['system']}, {row['tasks']} tasks", row), flush=True)
        print("\n".join(["", *tables.tasks(rows)]), flush=True)

    todo: list[tuple[str, Callable[[Shape, torch.dtype], None], tuple[tuple[str, str], ...]]] = [
        ("training step", groups, chosen.groups),
        ("number of tasks", growing, chosen.growing if chosen.counts else ()),
    ]
    try:
        for what, measure, name, dtype in ((what, measure, *one) for what, measure, several in todo for one in several):
            shape, started = shape_for(name, options.set, device), time.perf_counter()
            print(f"\n{what}: {model_name(shape.fields())}, {dtype}, {shape.tokens} tokens", flush=True)
            try:
                measure(shape, DTYPES[dtype])
            except Exception as error:
                failed[f"{what}, {name}"] = trouble.report(f"not measured: {what}, {name}, {dtype}", error, device)
            print(f"  {time.perf_counter() - started:.0f} s", flush=True)
            free(device)
    except trouble.DeviceLost:
        print(f"error: {trouble.LOST}", file=sys.stderr, flush=True)
        return 1
    print(f"\n{time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


def shape_for(name: str, which: str, device: torch.device) -> Shape:
    """The real shape on a GPU, a smaller one on a CPU and in a smoke test."""
    shape = SHAPES[name]
    if which == "smoke":
        return tiny(shape)
    return shape if device.type == "cuda" else scaled_down(shape)


def _chosen(options: argparse.Namespace, given: Plan) -> Plan:
    """The plan of the set with what the command line asks for in its place."""
    asked: dict[str, object] = {}
    if options.shapes or options.dtypes:
        shapes = options.shapes or list(dict.fromkeys(shape for shape, _ in given.groups))
        dtypes = options.dtypes or list(dict.fromkeys(dtype for _, dtype in given.groups))
        asked["groups"] = tuple((shape, dtype) for shape in shapes for dtype in dtypes)
        asked["growing"] = tuple((shape, dtypes[0]) for shape in shapes)
    if options.densities:
        densities = tuple(sorted(set(options.densities)))
        asked |= dict.fromkeys(("densities", "mixed", "release", "row_sparse", "memory"), densities)
        asked["mixed_row_sparse"] = True
    if options.systems:
        asked["systems"] = tuple(name for name in options.systems if name != "dense")
    asked |= {name: tuple(found) for name in ("optimizers", "batches") if (found := getattr(options, name))}
    if options.rounds:
        asked |= {"rounds": options.rounds, "seconds": float("inf")}
    if options.seconds is not None:
        asked["seconds"] = options.seconds
    if options.no_memory:
        asked["memory"] = ()
    if options.tasks is not None:
        asked["counts"] = tuple(sorted(set(options.tasks) - {0}))
    return replace(given, **asked)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench.steps", __doc__, default="full")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES))
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="bfloat16 is autocast")
    add("--densities", nargs="+", type=_density, help="shares of active neurons, in (0, 1]")
    add("--systems", nargs="+", choices=("dense", "release", "forward", "update"), help="beside dense, always there")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, help="of the systems beside dense")
    add("--batches", nargs="+", choices=BATCHES, help="pure: of one task, mixed: of several")
    add("--tasks", nargs="+", type=int, metavar="N", help="numbers of tasks of the second part; 0: leave it out")
    add("--rounds", type=int, help="at least so many, however long they take")
    add("--seconds", type=float, help="no round of a shape is begun after so many; three are done anyway")
    add("--no-memory", action="store_true", help="without peak memory")
    return parser


def _density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


if __name__ == "__main__":
    sys.exit(main())
