"""The declared cases under pytest-benchmark, for its tables, JSON files and comparison of runs.

    pytest bench/ --benchmark-only                                      # the quick set, about five minutes
    pytest bench/ --benchmark-only --bench-set full --benchmark-autosave
    pytest bench/ --benchmark-only --benchmark-compare -k "compact_ffn and 0.50"

Each provider is timed by itself, one after the other, so a machine that drifts moves them against each other: for ratios to
the baseline, with providers in turn, there is ``python -m bench.operators``. torch.compile's providers are left out of all
sets but ``full``. On a GPU a call is timed from the host until the device is done.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import pytest
import torch

from bench.cases import Case, cases
from bench.machine import pick_device, stamp
from bench.providers import problem
from bench.providers.shared import Problem
from bench.timing import synchronize

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra `bench`)")


@functools.cache
def _names(case: Case, device: torch.device) -> list[str]:
    """The providers of such a case, seen on a tiny one: making a large one for its names alone would take seconds."""
    tiny = replace(case, tokens=32, d_model=32, d_ff=64, tasks=min(case.tasks, 2))
    with mock.patch("torch.compile", lambda function, **_: function):
        return [one.name for one in problem(tiny, device).providers if not one.name.startswith("ours: ")]


@functools.lru_cache(maxsize=1)
def _problem(case: Case, device: torch.device) -> Problem:
    """One at a time is held: the tests of a case follow one another."""
    torch._dynamo.reset()  # torch.compile stops compiling a function after eight shapes
    made = problem(case, device)
    made.expected = functools.cache(made.expected)
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider."""
    if "provider" in metafunc.fixturenames:
        options = metafunc.config.option
        device = pick_device(options.bench_device)
        chosen = cases(options.bench_set, device.type, compiled=options.bench_set == "full")
        named = ((case, name) for case in chosen for name in _names(replace(case, density=1.0), device))
        parameters = [pytest.param(case, name, device, id=f"{case.label}, {name}") for case, name in named]
        metafunc.parametrize(("case", "provider", "device"), parameters)


@pytest.mark.benchmark(min_rounds=3, max_time=0.25, disable_gc=True)
def test_operator(benchmark: Any, case: Case, provider: str, device: torch.device) -> None:
    """Checks a provider's results, then times it on inputs that rotate."""
    made = _problem(case, device)
    one = next((one for one in made.providers if one.name == provider), None)
    if one is None:
        pytest.skip(made.absent.get(provider, "it does not take the case"))
    replace(made, providers=[one]).check()
    numbers = itertools.count()

    def once() -> None:
        one.call(next(numbers))
        synchronize(device)

    benchmark.group = case.label
    flops, moved = made.work(one.computes)
    benchmark.extra_info.update(asdict(case), active=case.active, provider=one.name, ours=one.ours, backend=one.backend)
    benchmark.extra_info.update(computes=one.computes, input_sets=made.input_sets, flops=flops, bytes=moved)
    benchmark.extra_info.update(stamp(device))
    benchmark(once)
