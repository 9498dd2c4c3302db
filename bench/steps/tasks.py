"""How a training step grows with the number of tasks that a model has masks of: time, switch, memory, specialisation."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.report.summary import REAL_DENSITY
from bench.rows import TIMES, Row, timing_fields
from bench.steps.model import Batch, Shape, build, draw_masks, random_batches, task_name
from bench.steps.systems import System, free, held_bytes, release_bytes
from bench.timing import interleaved

SWITCHES = 200
ROTATION = 32  # distinct tasks that the steps cycle through; the copies that a GPU makes at first use are made before


def growth(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    counts: Sequence[int],
    systems: Sequence[str],
    *,
    rounds: int,
    release_limit: int,
) -> Iterator[Row]:
    """A row for each system and number of tasks; the first number is what others are compared with.

    Args:
        shape: of the model.
        device: that computes.
        dtype: float32, or bfloat16 under autocast.
        counts: numbers of tasks, ascending.
        systems: of ``release``, ``forward``, ``update``.
        rounds: at least so many.
        release_limit: bytes of the release's masks that are still allocated; for more only their size is computed.
    """
    model, batches = build(shape, device), random_batches(shape, device)
    for kind in systems:
        fitting = [n for n in counts if kind != "release" or release_bytes(shape, n) <= release_limit]
        members = {n: System(kind, model, draw_masks(shape, REAL_DENSITY, n), dtype=dtype) for n in fitting}
        held = {n: held_bytes(system.model) for n, system in members.items()}
        chosen = {n: _rotation(n) for n in fitting}
        for n, system in members.items():
            _touch(system, chosen[n], batches[0])
        cycling = {str(n): _cycling(members[n], batches, chosen[n]) for n in fitting}
        times = interleaved(cycling, device, rounds=rounds, least_seconds=0, warmup=1)
        for n in counts:
            row: Row = {"kind": "tasks", "system": kind, "optimizer": "adamw", "tasks": n, "density": REAL_DENSITY}
            row |= {"dtype": str(dtype).removeprefix("torch."), **shape.fields(), "computed": n not in members}
            if n in members:
                row |= {"mask_bytes": held[n], "specialize_seconds": round(members[n].seconds, 4)}
                row["task_switch_microseconds"] = round(1e6 * _switch(members[n], chosen[n]), 1)
                row |= timing_fields(times[str(fitting[0])], times[str(n)])
            else:
                row |= {"mask_bytes": release_bytes(shape, n), "rounds": 0}
                row |= dict.fromkeys(("specialize_seconds", "task_switch_microseconds", *TIMES))
            yield row
        members.clear()
        free(device)


def _rotation(tasks: int) -> list[str]:
    names = [task_name(REAL_DENSITY, number) for number in range(tasks)]
    return random.Random(tasks).sample(names, min(tasks, ROTATION))


def _cycling(system: System, batches: list[Batch], tasks: list[str]) -> Callable[[int], None]:
    return lambda number: system.step(batches[number % len(batches)], tasks[number % len(tasks)])


@torch.no_grad()
def _touch(system: System, tasks: list[str], batch: Batch) -> None:
    for task in tasks:
        with system.switched(task):
            system.loss({name: tensor[:1] for name, tensor in batch.items()})


def _switch(system: System, tasks: list[str]) -> float:
    """Median seconds of switching to a task and back: what a step does."""
    samples = []
    for number in range(SWITCHES):
        context = system.switched(tasks[number % len(tasks)])
        began = time.perf_counter()
        with context:
            pass
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)
