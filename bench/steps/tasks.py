"""How a training step grows with the number of tasks that a model has masks of: time, switch, memory, specialisation."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import nspec
from bench.report.summary import REAL_DENSITY
from bench.rows import Row, Writer, figure, timing_fields
from bench.steps.model import (
    Batch,
    Shape,
    System,
    build,
    draw_masks,
    free,
    held_bytes,
    mask_weights,
    random_batches,
    release_bytes,
    task_name,
)
from bench.timing import interleaved, paired, spread, synchronize

DENSITY = REAL_DENSITY
SWITCHES = 200
ROTATION = 32  # distinct tasks that the steps cycle through; the copies that a GPU makes at first use are made before


def growth(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    counts: Sequence[int],
    systems: Sequence[str],
    write: Writer,
    *,
    rounds: int,
    release_limit: int,
) -> list[Row]:
    """Measures and prints a row for each system and number of tasks; the first number is what others are compared with.

    Args:
        shape: of the model.
        device: that computes.
        dtype: float32, or bfloat16 under autocast.
        counts: numbers of tasks, ascending.
        systems: of ``release``, ``forward``, ``update``.
        write: stamps and stores the rows.
        rounds: at least so many.
        release_limit: bytes of the release's masks that are still allocated; for more only their size is computed.
    """
    model, batches = build(shape, device), random_batches(shape, device)
    rows = []
    for kind in systems:
        fitting = [n for n in counts if kind != "release" or release_bytes(shape, n) <= release_limit]
        members: dict[int, System] = {}
        taken: dict[int, float] = {}
        held: dict[int, int] = {}
        for tasks in fitting:
            members[tasks], taken[tasks] = _specialized(kind, model, shape, tasks, dtype)
            held[tasks] = held_bytes(members[tasks].model)
        chosen = {n: _rotation(n) for n in fitting}
        _touch(members, chosen, batches[0])
        times = interleaved(
            {str(n): _cycling(members[n], batches, chosen[n]) for n in fitting},
            device,
            rounds=rounds,
            least_seconds=0,
            warmup=1,
        )
        for tasks in counts:
            row: Row = {"kind": "tasks", "system": kind, "optimizer": "adamw", "tasks": tasks, "density": DENSITY}
            row |= {"dtype": str(dtype).removeprefix("torch."), **shape.fields(), "computed": tasks not in members}
            if tasks in members:
                own = times[str(tasks)]
                row |= {"mask_bytes": held[tasks], "specialize_seconds": round(taken[tasks], 4)}
                row["task_switch_microseconds"] = round(1e6 * _switch(members[tasks], chosen[tasks]), 1)
                row |= timing_fields(spread([1e3 * t for t in own]), paired(times[str(fitting[0])], own), len(own))
            else:
                row |= {"mask_bytes": release_bytes(shape, tasks), "specialize_seconds": None}
                row["task_switch_microseconds"] = None
                nothing = spread([float("nan")])
                row |= dict.fromkeys(timing_fields(nothing, nothing, 0)) | {"rounds": 0}
            rows.append(write(row))
            print(describe(row, counts[0]), flush=True)
        members.clear()
        free(device)
    return rows


def describe(row: Row, first: int) -> str:
    """One line of the table."""
    begin = f"  {row['system']:8} {row['tasks']:5} tasks  masks {row['mask_bytes'] / 2**20:9.1f} MiB"
    if row["computed"]:
        return f"{begin} (computed, not allocated: too large to be measured here)"
    return (
        f"{begin}  step {row['milliseconds']:8.1f} ms, {figure(row)} of {first} tasks;"
        f"  switch {row['task_switch_microseconds']:7.0f} us;  specialize {row['specialize_seconds']:.3f} s"
    )


def _specialized(
    kind: str, model: torch.nn.Module, shape: Shape, tasks: int, dtype: torch.dtype
) -> tuple[System, float]:
    """A system with so many tasks, and the seconds that putting their masks on its model took."""
    masks = draw_masks(shape, DENSITY, tasks)
    ours = nspec.NeuronMasks(masks) if kind != "release" else None
    system = System("dense", model, {}, dtype=dtype)
    began = time.perf_counter()
    if ours is None:
        mask_weights(system.model, masks)
    else:
        nspec.specialize(system.model, ours, mode=kind)  # type: ignore[arg-type]
    synchronize(system.device)
    seconds = time.perf_counter() - began
    system.kind = kind
    return system, seconds


def _rotation(tasks: int) -> list[str]:
    names = [task_name(DENSITY, number) for number in range(tasks)]
    generator = random.Random(tasks)
    return generator.sample(names, min(tasks, ROTATION))


def _cycling(system: System, batches: list[Batch], tasks: list[str]) -> Callable[[int], None]:
    return lambda number: system.step(batches[number % len(batches)], tasks[number % len(tasks)])


@torch.no_grad()
def _touch(members: dict[int, System], chosen: dict[int, list[str]], batch: Batch) -> None:
    one = {name: tensor[:1] for name, tensor in batch.items()}
    for tasks, system in members.items():
        for task in chosen[tasks]:
            with system.switched(task):
                system.loss(one)


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
