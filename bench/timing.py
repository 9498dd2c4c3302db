"""How things are timed here: in turn, in one process, on inputs that rotate.

A shared machine drifts by a factor of two within minutes, so a time alone says little. What is compared is run in rounds,
each provider once a round, and a figure is the median over rounds of the ratio *within* a round. The spread is that of
the middle 80 % of the rounds (of all, where they are fewer than ten).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]
"""What is timed: called with the number of the input set to use."""

GPU_SAMPLE_SECONDS = 1e-3
"""On a GPU calls are put together until a sample lasts this long: then the host runs ahead, as in a training."""


FEW = 10
"""Of fewer values than this no tenth can be left out at an end."""


@dataclass(frozen=True)
class Spread:
    """Median, and the ends of the middle 80 %; of all, where there are fewer than ten."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and 10 % and 90 % quantiles (interpolated) of ten values or more, least and largest of fewer."""
    if len(values) < FEW:
        return Spread(statistics.median(values), min(values), max(values))
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


def paired(base: Sequence[float], other: Sequence[float]) -> Spread:
    """Speed-up of ``other`` over ``base``: of the ratios within each round."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


def synchronize(device: torch.device) -> None:
    """Waits for what was started on a GPU; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device, first: int = 0, calls: int = 1) -> float:
    """Mean seconds of ``calls`` calls in a row, on input sets ``first``, ``first + 1``, ...

    On a GPU by device events, from the start of the first kernel to the end of the last: where the host is too slow to
    keep the device busy, the gaps count, as they do for a user.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for number in range(calls):
            call(first + number)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for number in range(calls):
        call(first + number)
    return (time.perf_counter() - began) / calls


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 11,
    least_seconds: float = 1.0,
    most_seconds: float = math.inf,
    warmup: int = 2,
    always: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Each round begins with another call than the one before, so that no provider always follows the same one.

    Args:
        calls: by name; each is given a running number to choose its inputs with, the same for all within a round.
        device: that they compute on.
        rounds: at least so many, unless ``most_seconds`` is reached ...
        least_seconds: ... and at least so many seconds in all.
        most_seconds: no round is begun after so many seconds.
        warmup: calls of each that are not timed: allocations, compilation, caches of code.
        always: so many rounds are done however long they take.
    """
    names = list(calls)
    for number in range(warmup):
        for name in names:
            calls[name](number)
    synchronize(device)
    repeat = dict.fromkeys(names, 1)
    if device.type == "cuda":
        for name in names:
            once = seconds(calls[name], device)
            repeat[name] = max(1, min(100, math.ceil(GPU_SAMPLE_SECONDS / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of one provider's turn would be charged to it
    try:
        began = time.perf_counter()
        done = 0
        while True:
            elapsed = time.perf_counter() - began
            if done >= always and (elapsed >= most_seconds or (done >= rounds and elapsed >= least_seconds)):
                return times
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(seconds(calls[name], device, first=done, calls=repeat[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that one call had allocated at a time, beyond what was there before it, results included.

    On a GPU from the caching allocator's statistics; on a CPU by adding up what PyTorch's profiler saw allocated and
    freed. Scratch memory that an earlier call left cached inside a library is not seen: call once before.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    found = profiler.profiler
    assert found is not None
    events = sorted((e for e in found.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top
