"""The suite as a whole: the command that runs every part, and pytest-benchmark over the same cases. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench.__main__ as whole
from bench.cases import OPERATORS, cases
from bench.machine import ROOT

STAMP = {"device", "device_type", "driver", "torch", "triton", "python", "backend_asked", "commit", "date"}


def run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with a module, one thread."""
    # pytest-benchmark measures nothing in a process of pytest-xdist; this one is none, though it is started by one.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    env |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_the_smoke_set_of_several_parts_runs_and_leaves_their_rows_and_a_report(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    parts = ["operators", "profiling"]  # test_steps.py runs the steps
    done = run("bench", "--set", "smoke", "--device", "cpu", "--out", str(tmp_path), "--only", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["kind"] for row in rows} >= {"operator", "ceiling", "profiling"}
    assert all(row.keys() >= STAMP and row["device_type"] == "cpu" for row in rows)
    operators = [row for row in rows if row["kind"] == "operator"]
    assert {row["operator"] for row in operators} == set(OPERATORS)
    measured = {
        (r["operator"], r["tokens"], r["d_model"], r["d_ff"], r["tasks"], r["dtype"], r["density"]) for r in operators
    }
    declared = cases("smoke", "cpu")
    assert measured == {(c.operator, c.tokens, c.d_model, c.d_ff, c.tasks, c.dtype, c.density) for c in declared}
    for row in operators:
        assert row["milliseconds"] > 0
        assert row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
    assert {row["way"] for row in rows if row["kind"] == "profiling"} == {"no counting", "release", "ours"}
    assert (tmp_path / "report.md").is_file()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log == done.stdout
    assert log.rstrip().endswith(f"every part ran; everything is in {tmp_path.resolve()}")


def test_a_part_that_fails_fails_the_command_after_the_others_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    parts = {
        "operators": ["-c", "print('first')"],
        "steps": ["-c", "import sys; sys.exit('error: broken')"],
        "report": ["-c", "print('last')"],
    }
    monkeypatch.setattr(whole, "commands", lambda args, out: parts)
    assert whole.main(["--set", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    shown = (tmp_path / "log.txt").read_text()
    lines = [line for line in shown.splitlines() if line and not line.startswith("==")]
    assert lines[:4] == ["first", "error: broken", "error: steps failed with exit status 1; the rest is run", "last"]
    assert "failed: steps; see above" in lines[4]
    assert capfdbinary.readouterr().out.decode() == shown


@pytest.mark.slow
def test_pytest_benchmark_runs_the_declared_cases_checked_and_described(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "benchmark.json"
    command = ["pytest", "bench/", "-q", "--benchmark-only", "--bench-set", "smoke", "--bench-device", "cpu"]
    command += [
        "-k",
        "adamw or wgrad",
        "--benchmark-max-time",
        "0.01",
        f"--benchmark-json={out}",
        "-p",
        "no:cacheprovider",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    wanted = {case.label for case in cases("smoke", "cpu") if "adamw" in case.operator or "wgrad" in case.operator}
    assert {one["group"] for one in found} == wanted
    for one in found:
        assert STAMP | {"operator", "dtype", "density", "provider", "computes"} <= one["extra_info"].keys()
    for label in wanted:
        providers = [one["extra_info"]["provider"] for one in found if one["group"] == label]
        assert "ours" in providers
        assert len(providers) == len(set(providers)) >= 3
