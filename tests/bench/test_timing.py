"""Timing in rounds, memory, and the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import timing

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


def test_every_call_runs_once_a_round_on_the_round_s_inputs_and_none_is_always_first() -> None:
    seen: list[tuple[str, int]] = []
    note = lambda name: lambda number: seen.append((name, number))
    times = timing.interleaved({n: note(n) for n in "abc"}, CPU, rounds=6, least_seconds=0.0, warmup=1)
    assert [len(times[n]) for n in "abc"] == [6, 6, 6]
    by_round = [seen[3 * i : 3 * i + 3] for i in range(7)]
    assert all({name for name, _ in one} == set("abc") and len({number for _, number in one}) == 1 for one in by_round)
    assert [number for ((_, number), *_) in by_round[1:]] == list(range(6))
    assert {one[0][0] for one in by_round[1:]} == set("abc")


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
