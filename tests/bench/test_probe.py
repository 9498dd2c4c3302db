"""The probe of a GPU: what an experiment that raises costs, and what is said of predictions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from bench.gpu import lab as labs
from bench.gpu import probe
from bench.gpu.lab import Lab
from bench.gpu.predictions import Prediction
from bench.report import tables
from bench.rows import Row, Writer

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, predicted: tuple[str, ...] = (), **experiments: object) -> None:
    """Experiments in place of the probe's, and predictions of E3."""
    module = ModuleType("bench.gpu.pretended")
    vars(module).update(experiments)
    monkeypatch.setitem(sys.modules, "bench.gpu.pretended", module)
    monkeypatch.setattr(probe, "EXPERIMENTS", {name: ("pretended", name) for name in experiments})
    monkeypatch.setattr(labs, "PREDICTIONS", {("E3", name): Prediction(1, 2) for name in predicted})


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three: the first raises in one measurement, the second as a whole, of the third one is wrong."""

    def half(lab: Lab) -> Iterator[Row]:
        yield lab.timed("E1", "broken", lambda: 1 / 0)
        yield lab.timed("E1", "whole", lambda: None)

    def nothing(lab: Lab) -> Iterator[Row]:
        raise AttributeError("the kernels have changed")
        yield {}

    def fine(lab: Lab) -> Iterator[Row]:
        yield lab.timed("E3", "wrong", lambda: None, right=lambda: "by 1")
        yield lab.timed("E3", "whole", lambda: None)

    pretend(monkeypatch, E1=half, E2=nothing, E3=fine)


def test_what_raises_costs_its_own_line(experiments: None) -> None:
    rows, failed = probe.run(["E1", "E2", "E3"], Lab(CPU, True), Writer(None, CPU))
    assert failed == ["E1", "E2", "E3"]
    assert {row["name"]: row.get("reason") for row in rows if row["name"] != "whole"} == {
        "broken": "ZeroDivisionError: division by zero",
        "the experiment": "AttributeError: the kernels have changed",
        "wrong": "WRONG: by 1",
    }
    assert [row["experiment"] for row in rows if row.get("microseconds") is not None] == ["E1", "E3"]


def test_a_prediction_is_compared_on_the_device_and_at_the_size_that_it_is_for() -> None:
    row = {"kind": "probe", "experiment": "E3", "name": "h", "expected_low": 120.0, "expected_high": 135.0}
    said = lambda **more: tables.predictions([{**row, **more}])[-1].split("|")[5].strip()
    gpu = {"device": "NVIDIA H100 80GB HBM3", "small": False}
    assert "arithmetic for an H100" in tables.predictions([row])[0]
    assert said(microseconds=121.0, **gpu) == "as expected"
    assert said(microseconds=270.0, **gpu) == "2.00 times as slow"
    assert said(microseconds=60.0, **gpu) == "2.00 times as fast"
    assert said(microseconds=None, reason="OutOfResources: x", **gpu) == "failed: OutOfResources: x"
    assert said(microseconds=121.0, device="NVIDIA A100") == "not compared: measured on NVIDIA A100"
    tiny = "not compared: measured at tiny sizes on NVIDIA H100 80GB HBM3"
    assert said(microseconds=121.0, **{**gpu, "small": True}) == tiny


def test_what_was_predicted_of_an_experiment_that_raises_has_failed_and_what_was_measured_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(lab: Lab) -> Iterator[Row]:
        yield lab.timed("E3", "h", lambda: None)
        raise AttributeError("the kernels have changed")

    pretend(monkeypatch, ("h", "gate"), E3=half)
    rows, failed = probe.run(["E3"], Lab(CPU, True), Writer(None, CPU))
    assert failed == ["E3"]
    *_, first, second = tables.predictions(rows)
    assert "| h " in first
    assert "not compared: measured at tiny sizes on " in first
    assert "| gate " in second
    assert "failed: " in second
    assert "AttributeError: the kernels have changed" in second


def test_a_line_of_a_cpu_says_so_and_compares_nothing() -> None:
    row = Writer(None, CPU)(Lab(CPU, True).row("E3", "h, 3 stages, flattened", lambda: 12.0, flops=1, moved=1))
    said = probe.line(row)
    assert said.endswith("12.0 us on the CPU, tiny sizes")
    assert "in Triton's interpreter, tiny sizes" in probe.line({**row, "interpreted": True})
    full = {**row, "device_type": "cuda", "device": "NVIDIA H100", "small": False, "roof_share": 0.5}
    assert probe.line(full).endswith("us device  50% of the roof  expected 112 us")
    assert "expected" not in probe.line({**full, "device": "NVIDIA A100"})
