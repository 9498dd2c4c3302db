"""How things are timed here: in turn, in one process, on inputs that rotate.

A shared machine drifts by a factor of two within minutes, so a time alone says little. What is compared is run in rounds,
each provider once a round, and a figure is the median over rounds of the ratio *within* a round. The spread is that of
the middle 80 % of the rounds (of all, where they are fewer than ten).

On a GPU there are two times. *As called*: what a user gets, with the time of the host wherever the device waits for it,
over samples long enough that their start does not count. *Device*: what the kernels take, with the calls queued behind a
kernel that only waits, so that the host is ahead; it is checked that it was. On a CPU there is one.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
Call = Callable[[int], object]
"""What is timed: called with the number of the input set to use."""

GPU_SAMPLE_SECONDS = 1e-2
"""On a GPU calls are put together until a sample as called lasts this long: of its start, where the device waits for the
first kernel, a few per cent are left at most."""
MOST_CALLS = 1000
DEVICE_SAMPLE_SECONDS = 2e-3
"""A sample of device time; events tell half a microsecond."""
MOST_QUEUED = 20
"""Calls of a sample of device time: a stream takes about a thousand kernels before it makes the host wait."""
LONGEST_SLEEP = 0.2
"""Seconds. A host that is not ahead after them waits for the device itself."""

FEW = 10
"""Of fewer values than this no tenth can be left out at an end."""


class Spread(NamedTuple):
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


def _by_events(device: torch.device, work: Callable[[], object], sleep: int = 0) -> tuple[float, bool]:
    """Seconds on a GPU from the start of the first kernel of ``work`` to the end of the last.

    And whether the host was ahead of the device: after as many cycles of ``sleep``, all was queued before the first began.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if sleep:
        torch.cuda._sleep(sleep)
    start.record()
    work()
    end.record()
    ahead = not start.query()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3, ahead


def _calling(call: Call, first: int, calls: int) -> Callable[[], None]:
    """So many calls in a row, on input sets ``first``, ``first + 1``, ..."""

    def work() -> None:
        for number in range(calls):
            call(first + number)

    return work


def seconds(call: Call, device: torch.device, first: int = 0, calls: int = 1) -> float:
    """Mean seconds as called of ``calls`` calls in a row, on input sets ``first``, ``first + 1``, ...

    On a GPU by device events: where the host is too slow to keep the device busy, the gaps count, as they do for a user.
    """
    work = _calling(call, first, calls)
    if device.type == "cuda":
        return _by_events(device, work)[0] / calls
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) / calls


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """The clock that ``torch.cuda._sleep`` counts, as fast as it runs now."""
    cycles = 10**7
    taken = [_by_events(device, lambda: torch.cuda._sleep(cycles))[0] for _ in range(2)]  # its code is loaded first
    return cycles / taken[-1]


class Queue(NamedTuple):
    """How a call is queued on a GPU: so many calls behind a kernel that waits so many seconds."""

    calls: int
    sleep: float


def queued_seconds(call: Call, device: torch.device, first: int, queue: Queue) -> float | None:
    """Mean seconds on the GPU of ``queue.calls`` calls in a row; None where the host was not ahead of it.

    The device sleeps first. If it still does when all calls are queued, it computes them without a gap.
    """
    sleep = int(queue.sleep * _cycles_per_second(device))
    taken, ahead = _by_events(device, _calling(call, first, queue.calls), sleep)
    return taken / queue.calls if ahead else None


def queue_for(call: Call, device: torch.device) -> Queue | None:
    """How to queue a call that has run before; None where the host can never be ahead: the call waits for the device."""
    synchronize(device)
    began = time.perf_counter()
    call(0)
    host = time.perf_counter() - began
    synchronize(device)
    calls = max(1, min(MOST_QUEUED, math.ceil(DEVICE_SAMPLE_SECONDS / max(seconds(call, device), 1e-6))))
    sleep = 2 * host * calls + 1e-3
    while sleep <= LONGEST_SLEEP:
        # Longer for a slow host; fewer calls because the queue may have been full, which also stops it.
        if queued_seconds(call, device, 0, Queue(calls, sleep)) is not None:
            return Queue(calls, 1.5 * sleep)  # a host is not equally fast in every round
        calls, sleep = max(1, calls // 2), 2 * sleep
    return None


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
    """Seconds as called of each call in each round.

    Each call is first in turn, and the order of the others is drawn anew in each round: what a call leaves behind (threads
    that spin on, full caches) slows the next one, which in an order that only begins elsewhere is always the same one.

    Args:
        calls: by name; each is given a running number to choose its inputs with, the same for all within a round.
        device: that they compute on.
        rounds: at least so many, unless ``most_seconds`` is reached ...
        least_seconds: ... and at least so many seconds in all.
        most_seconds: no round is begun after so many seconds.
        warmup: calls of each that are not timed: allocations, compilation, caches of code.
        always: so many rounds are done however long they take.
    """
    for number in range(warmup):
        for call in calls.values():
            call(number)
    synchronize(device)
    repeat = dict.fromkeys(calls, 1)
    if device.type == "cuda":
        for name, call in calls.items():
            repeat[name] = max(1, min(MOST_CALLS, math.ceil(GPU_SAMPLE_SECONDS / max(seconds(call, device), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}

    def sample(name: str, number: int) -> None:
        times[name].append(seconds(calls[name], device, first=number, calls=repeat[name]))

    in_rounds(list(calls), sample, rounds, least_seconds, most_seconds, always)
    return times


def interleaved_on_device(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int = 11, most_seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds on the GPU of each call in each round; nothing for a call that waits for the device.

    Args:
        calls: as of :func:`interleaved`; they have run before, and so need no warming up.
        device: a GPU.
        rounds: of each, unless ``most_seconds`` is reached.
        most_seconds: no round is begun after so many seconds; four are always done.
    """
    queues = {name: queue for name, call in calls.items() if (queue := queue_for(call, device)) is not None}
    times: dict[str, list[float]] = {name: [] for name in queues}

    def sample(name: str, number: int) -> None:
        # NaN where the host was late: the round has no figure of this call, and keeps those of the others.
        found = queued_seconds(calls[name], device, number, queues[name])
        times[name].append(math.nan if found is None else found)

    if queues:
        in_rounds(list(queues), sample, rounds, 0.0, most_seconds, 4)
    return times


def in_rounds(
    names: Sequence[T],
    sample: Callable[[T, int], None],
    rounds: int,
    least_seconds: float = 0.0,
    most_seconds: float = math.inf,
    always: int = 1,
) -> None:
    """Samples each name once a round, each first in turn, the others in an order drawn anew; see :func:`interleaved`."""
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of one provider's turn would be charged to it
    try:
        began = time.perf_counter()
        for done in itertools.count():
            elapsed = time.perf_counter() - began
            if done >= always and (elapsed >= most_seconds or (done >= rounds and elapsed >= least_seconds)):
                return
            first = done % len(names)
            rest = [*names[:first], *names[first + 1 :]]
            for name in (names[first], *order.sample(rest, len(rest))):
                sample(name, done)
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
