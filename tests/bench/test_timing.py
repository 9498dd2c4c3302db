"""Timing in rounds, memory, and times of a GPU, on one that is pretended: its clock, its queue, and a slow host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import operators, timing
from bench.cases import Case
from bench.providers import problem
from bench.report import cells, summary, tables
from bench.rows import timing_fields

CPU = torch.device("cpu")


def test_the_spread_is_the_middle_eighty_percent() -> None:
    found = timing.spread([float(n) for n in range(11)])
    assert (found.median, found.low, found.high) == (5.0, 1.0, 9.0)
    assert timing.spread([3.0]) == timing.Spread(3.0, 3.0, 3.0)
    assert timing.spread([2.0, 9.0, 1.0]) == timing.Spread(2.0, 1.0, 9.0)


def test_drift_of_the_machine_cancels_in_paired_ratios() -> None:
    drift = [1.0, 2.0, 0.5, 4.0, 1.5]
    found = timing.paired([2.0 * d for d in drift], [1.0 * d for d in drift])
    assert found == timing.Spread(2.0, 2.0, 2.0)


def test_every_call_runs_once_a_round_on_the_round_s_inputs_and_after_each_of_the_others() -> None:
    seen: list[tuple[str, int]] = []
    note = lambda name: lambda number: seen.append((name, number))
    times = timing.interleaved({n: note(n) for n in "abc"}, CPU, rounds=12, least_seconds=0.0, warmup=1)
    assert [len(times[n]) for n in "abc"] == [12, 12, 12]
    by_round = [seen[3 * i : 3 * i + 3] for i in range(13)]
    assert all({name for name, _ in one} == set("abc") and len({number for _, number in one}) == 1 for one in by_round)
    assert [number for ((_, number), *_) in by_round[1:]] == list(range(12))
    assert {one[0][0] for one in by_round[1:]} == set("abc")
    timed = [name for name, _ in seen[3:]]
    assert {before for before, after in zip(timed, timed[1:]) if after == "b"} >= {"a", "c"}


def test_rounds_end_when_the_time_is_up_but_three_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    calls: dict[str, Callable[[int], object]] = {"a": lambda _: None}
    assert len(timing.interleaved(calls, CPU, rounds=100, most_seconds=1.0)["a"]) == 3
    assert 3 < len(timing.interleaved(calls, CPU, rounds=100, most_seconds=20.0)["a"]) < 20
    assert len(timing.interleaved(calls, CPU, rounds=5, least_seconds=100.0)["a"]) > 20


def test_peak_memory_counts_what_is_alive_at_a_time() -> None:
    x = torch.ones(1000, 250)
    one = x.numel() * 4
    about = lambda number: pytest.approx(number, rel=1e-3)  # scalars are tensors too
    assert timing.peak_bytes(lambda: x + 1, CPU) == about(one)
    assert timing.peak_bytes(lambda: (x + 1) + 1, CPU) == about(2 * one)  # the first is freed after the second is there
    assert timing.peak_bytes(lambda: ((x + 1).sum(), (x + 2).sum()), CPU) == about(one)


DEVICE = torch.device("cuda")
HERTZ = 2e9


class Pretended:
    """A host and a device that computes what is queued, in seconds since the start."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.slept: list[float] = []

    def work(self, host: float, device: float) -> None:
        """A call: the host's time to queue it, then the device's."""
        self.now += host
        self.free = max(self.free, self.now) + device

    def wait(self, *_: Any) -> None:
        self.now = max(self.now, self.free)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / HERTZ)
        self.work(1e-5, cycles / HERTZ)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """In place of torch.cuda and of the host's clock."""
    made = Pretended()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = math.inf

        def record(self) -> None:
            self.at = max(made.now, made.free)

        def query(self) -> bool:
            return made.now >= self.at

        def synchronize(self) -> None:
            made.now = max(made.now, self.at)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    timing._cycles_per_second.cache_clear()
    yield made
    timing._cycles_per_second.cache_clear()


def test_as_called_is_the_host_s_time_and_of_the_device_the_kernels(gpu: Pretended) -> None:
    calls = {"many kernels": lambda _: gpu.work(5e-4, 1e-4), "one kernel": lambda _: gpu.work(1e-5, 4e-4)}
    called = timing.interleaved(calls, DEVICE, rounds=4, least_seconds=0.0)
    alone = timing.interleaved_on_device(calls, DEVICE, rounds=4)
    assert called["many kernels"] == pytest.approx([5e-4] * 4, rel=0.05)
    assert called["one kernel"] == pytest.approx([4e-4] * 4, rel=0.05)
    assert alone["many kernels"] == pytest.approx([1e-4] * 4, rel=1e-6)
    assert alone["one kernel"] == pytest.approx([4e-4] * 4, rel=1e-6)


def test_the_sleep_is_longer_than_the_host_takes_for_the_calls_that_are_queued(gpu: Pretended) -> None:
    first = iter([1e-5])  # the call by which the host's time is taken was fast, later ones are not
    queue = timing.queue_for(lambda _: gpu.work(next(first, 4e-3), 1e-4), DEVICE)
    assert queue is not None
    assert queue.sleep > 4e-3 * queue.calls
    assert timing.queued_seconds(lambda _: gpu.work(4e-3, 1e-4), DEVICE, 0, queue) == pytest.approx(1e-4)
    late = timing.queued_seconds(lambda _: gpu.work(1.0, 1e-4), DEVICE, 0, queue)
    assert late is None, "a host that was late is noticed"


def test_a_call_that_waits_for_the_device_has_no_device_time(gpu: Pretended) -> None:
    def waiting(_: int) -> None:
        gpu.work(1e-5, 1e-4)
        gpu.wait()

    found = timing.interleaved_on_device({"a": waiting, "b": lambda _: gpu.work(1e-5, 1e-4)}, DEVICE, rounds=4)
    assert list(found) == ["b"]
    assert max(gpu.slept) <= 1.5 * timing.LONGEST_SLEEP
    assert timing_fields([1e-4] * 4, [math.nan] * 4, "device_") == {}


def test_a_round_without_a_figure_is_left_out_of_the_pairs() -> None:
    fields = timing_fields([2e-3, 2e-3, 2e-3, 9.0], [1e-3, 1e-3, 1e-3, math.nan], "device_")
    assert (fields["device_milliseconds"], fields["device_speedup"], fields["device_rounds"]) == (1.0, 2.0, 3)


def test_targets_and_the_roof_are_of_the_device_where_it_was_timed() -> None:
    row = {"kind": "operator", "operator": "compact_ffn", "provider": "ours", "ours": True, "baseline": "dense"}
    row |= {"dtype": "bfloat16", "density": 0.5, "target": 1.9, "speedup": 1.0, "milliseconds": 2.0}
    row |= {"flops": 1e9, "bytes": 0}
    both = row | {"device_speedup": 2.0, "device_milliseconds": 1.0}
    assert [cells.both_speedups(one) for one in (row, both)] == ["1.00×", "1.00× / 2.00×"]
    found = [[cell.strip() for cell in line.split("|")] for line in tables.targets([row, both])[2:]]
    assert [(line[7], line[9]) for line in found] == [("as called", "missed by 47 %"), ("device", "met")]
    limits = {("matmul", "bfloat16"): 1e12, ("memory", ""): 1e12}
    shares = [summary.roof(one, limits) for one in (row, both)]
    assert [share and share[0] for share in shares] == [0.5, 1.0]


def test_rows_of_a_gpu_have_both_times_of_every_provider(gpu: Pretended) -> None:
    made = problem(Case("row_sparse_wgrad", 32, 16, 64, "float32", 0.5, compiled=False), torch.device("cpu"))

    def counted(call: Callable[[int], Any]) -> Callable[[int], Any]:
        def on_gpu(number: int) -> Any:
            gpu.work(5e-4, 1e-4)
            return call(number)

        return on_gpu

    for provider in made.providers:
        provider.call = counted(provider.call)
    found = list(operators.rows_of(made, DEVICE, rounds=4, most_seconds=0.02, memory=False))
    assert len(found) == len(made.providers)
    for row in found:
        assert row["milliseconds"] == pytest.approx(0.5, rel=0.05)
        assert row["device_milliseconds"] == pytest.approx(0.1)
        assert row["device_speedup"] == pytest.approx(1.0)
