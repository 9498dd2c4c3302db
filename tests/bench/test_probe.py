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
from bench.reporting import probe_tables
from bench.rows import Row, Writer

CPU = torch.device("cpu")


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in place of the probe's: the first raises in one measurement, the second as a whole, the third is fine."""

    def half(lab: Lab) -> Iterator[Row]:
        """E1: half."""
        yield lab.timed("E1", "broken", lambda: 1 / 0)
        yield lab.timed("E1", "whole", lambda: None)

    def nothing(lab: Lab) -> Iterator[Row]:
        raise AttributeError("the kernels have changed")
        yield {}

    def fine(lab: Lab) -> Iterator[Row]:
        yield lab.timed("E3", "wrong", lambda: None, right=lambda: "by 1")
        yield lab.timed("E3", "whole", lambda: None)

    module = ModuleType("bench.gpu.pretended")
    module.half, module.nothing, module.fine = half, nothing, fine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.gpu.pretended", module)
    names = {"E1": "half", "E2": "nothing", "E3": "fine"}
    monkeypatch.setattr(probe, "EXPERIMENTS", {name: ("pretended", function) for name, function in names.items()})


def test_what_raises_costs_its_own_line(experiments: None) -> None:
    rows, failed = probe.run(["E1", "E2", "E3"], Lab(CPU, True), Writer(None, CPU))
    assert failed == ["E1", "E2", "E3"]
    assert {row["name"]: row.get("reason") for row in rows if row["name"] != "whole"} == {
        "broken": "ZeroDivisionError: division by zero",
        "the experiment": "AttributeError: the kernels have changed",
        "wrong": "WRONG: by 1",
    }
    assert [row["experiment"] for row in rows if row.get("microseconds") is not None] == ["E1", "E3"]


def test_after_an_error_that_ends_the_use_of_the_gpu_nothing_more_is_tried(
    experiments: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labs.trouble, "device_is_lost", lambda _: True)
    rows, failed = probe.run(["E1", "E2", "E3"], Lab(CPU, True), Writer(None, CPU))
    assert (rows, failed) == ([], ["E1", "E2", "E3"])
    assert "run it again" in capsys.readouterr().err


def test_a_prediction_is_compared_on_a_gpu_alone() -> None:
    row = {"kind": "probe", "experiment": "E3", "name": "h", "expected_low": 120.0, "expected_high": 135.0}
    said = lambda **more: probe_tables.predictions([{**row, **more}])[2].split("|")[5].strip()
    gpu = {"device_type": "cuda"}
    assert said(microseconds=121.0, **gpu) == "as expected"
    assert said(microseconds=270.0, **gpu) == "2.00 times as slow"
    assert said(microseconds=60.0, **gpu) == "2.00 times as fast"
    assert said(microseconds=None, reason="OutOfResources: x", **gpu) == "OutOfResources: x"
    assert said(microseconds=121.0, device_type="cpu") == "not compared: measured on a CPU"
