"""The declared cases, their providers, and that nothing wrong is timed. No time is asserted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cases, operators
from bench.cases import Case
from bench.providers import problem
from bench.providers.shared import Problem, same
from bench.report import __main__ as report
from bench.report import summary
from bench.rows import Row, Writer, read

CPU = torch.device("cpu")
SMOKE = cases.cases("smoke", "cpu", compiled=False)
FIELDS = {
    "kind", "operator", "activation", "provider", "baseline", "ours", "computes", "backend", "tokens", "d_model", "d_ff",
    "tasks", "dtype", "density", "active", "milliseconds", "milliseconds_low", "milliseconds_high", "speedup",
    "speedup_low", "speedup_high", "rounds", "input_sets", "peak_bytes", "flops", "bytes", "target",
}  # fmt: skip


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", cases.SETS)
def test_every_set_covers_every_operator_once(name: str, device_type: str) -> None:
    found = cases.cases(name, device_type)
    assert {case.operator for case in found} == set(cases.OPERATORS)
    assert len({case.label for case in found}) == len(found)
    assert any(case.tasks > 1 for case in found)
    assert all(case.dtype == "float32" for case in found if case.operator == "row_sparse_adamw")


def test_what_is_measured_can_be_narrowed() -> None:
    only = {"operators": ["compact_ffn"], "dtypes": ["bfloat16"], "densities": [0.4], "shapes": [(64, 8, 32, 1)]}
    assert [case.label for case in cases.cases("full", "cpu", **only)] == ["compact_ffn 64x8x32 bfloat16 0.40"]
    found = cases.cases("quick", "cpu", activations=["gelu", "swiglu"])
    assert {(case.operator, case.activation, case.d_ff) for case in found} == {
        ("block", "gelu", 2048),
        ("block", "swiglu", 1376),
    }
    assert {case.density for case in found} == {0.5, 0.78, 1.0}
    assert "block swiglu 4096x512x1376 float32 0.50" in [case.label for case in found]
    assert all(case.activation == "relu" for case in cases.cases("quick", "cpu", activations=["relu"]))


def test_targets_hold_at_full_size_and_for_one_task() -> None:
    big = Case("compact_ffn", 4096, 512, 2048, "float32", 0.5)
    assert cases.target(big, "cpu") == 1.8
    assert cases.target(Case("compact_ffn", 96, 32, 128, "float32", 0.5), "cpu") is None
    assert cases.target(Case("compact_ffn", 4096, 512, 2048, "float32", 0.5, tasks=8), "cpu") is None
    gated = Case("block", 4096, 512, 1376, "float32", 0.5, activation="swiglu")  # three matrices: as much as ReLU's two
    assert cases.target(gated, "cpu") == 1.7
    assert cases.target(replace(gated, activation="relu"), "cpu") is None
    for device_type, name, dtype in cases.TARGETS:
        assert device_type in cases.GRIDS
        assert name in cases.OPERATORS or name in ("block gelu", "block swiglu")
        assert dtype in cases.DTYPES


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.label)
def test_every_provider_is_right_and_gives_a_row(case: Case) -> None:
    found = list(operators.rows_of(problem(case, CPU), CPU, rounds=3, most_seconds=0.01))
    assert all(row.keys() == FIELDS for row in found if row["kind"] == "operator")
    assert found[0]["speedup"] == 1.0
    assert sum(row["ours"] for row in found) >= 2
    assert len(found) >= 4
    assert not [row for row in found if row["kind"] == "absent"]


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.label)
def test_a_provider_that_computes_for_other_neurons_is_not_timed(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = problem(case, CPU)
    wrong = next(provider for provider in made.providers if provider.ours)
    right = wrong.call

    def call(number: int) -> object:
        answer = right(number)
        if isinstance(answer[0], list):  # of AdamW: the parameters, which it has changed in place
            answer[0][0][0].add_(0.05)
            return answer
        return tuple(t if t is None else torch.where(t == t.max(), t * 1.5 + 1, t) for t in answer)

    wrong.call = call
    with pytest.raises(AssertionError, match=wrong.name):
        made.check()
    monkeypatch.setattr(operators, "problem", lambda *_, **__: made)
    assert operators.measure([case], CPU, Writer(None, CPU), 3, 0.01) == 1
    assert "not timed" in capsys.readouterr().err


def _measured(made: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Row], str]:
    """The rows by provider that a case leaves on disk, and what the report says of those that could not run."""
    monkeypatch.setattr(operators, "problem", lambda *_, **__: made)
    path = folder / "rows.jsonl"
    assert operators.measure([made.case], CPU, Writer(path, CPU), 3, 0.01) == 1
    found = {row["provider"]: row for row in read([path])}
    text = report.Report([path]).markdown(None)
    return found, text.split("## What could not run")[1].split("##")[0]


def test_a_provider_that_raises_costs_itself_and_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = problem(SMOKE[0], CPU)
    bad = made.providers[1]

    def call(number: int) -> object:
        raise RuntimeError("planted | here")

    bad.call = call
    found, said = _measured(made, tmp_path, monkeypatch)
    assert (found[bad.name]["kind"], found[bad.name]["reason"]) == ("absent", "RuntimeError: planted | here")
    others = [row for name, row in found.items() if name != bad.name]
    assert len(others) == len(made.providers) - 1
    assert all(row["kind"] == "operator" and row["speedup"] > 0 for row in others)
    assert bad.name in said
    assert "RuntimeError: planted / here" in said


def test_without_a_baseline_nothing_is_timed_and_every_provider_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = problem(SMOKE[0], CPU)
    made.providers[0].results = lambda answer: {}
    found, said = _measured(made, tmp_path, monkeypatch)
    assert {row["kind"] for row in found.values()} == {"absent"}
    assert found[made.providers[0].name]["reason"].startswith("WRONG: ")
    assert found["ours"]["reason"] == f"the baseline, {made.providers[0].name}, gives nothing to compare with"
    assert "gives no result to check" in said


def test_a_provider_that_runs_in_a_later_run_is_no_longer_absent(tmp_path: Path) -> None:
    row = next(iter(operators.rows_of(problem(SMOKE[0], CPU), CPU, rounds=3, most_seconds=0.01)))
    gone = {**{name: row[name] for name in summary.NEEDED["operator"]}, "kind": "absent", "reason": "no compiler"}
    gone |= {name: row[name] for name in ("tokens", "d_model", "d_ff", "tasks")}
    old, new = {**gone, "date": "2026-01-01"}, {**row, "date": "2026-01-02"}
    assert [one["kind"] for one in summary.newest([old, new])] == ["operator"]


def test_nan_and_other_shapes_are_never_the_same() -> None:
    case = SMOKE[0]
    x = torch.ones(3)
    same("x", x, x.double(), case)
    with pytest.raises(AssertionError, match="relative error nan"):
        same("x", torch.tensor([1.0, float("nan"), 1.0]), x.double(), case)
    with pytest.raises(AssertionError, match="shape"):
        same("x", x[:2], x.double(), case)
    with pytest.raises(AssertionError, match="1 of 3 integers"):
        same("x", torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), case)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*_: object, **__: object):
        def call(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    made = problem(Case("compact_ffn", 32, 16, 64, "float32", 0.5), CPU)
    found = list(operators.rows_of(made, CPU, rounds=3, most_seconds=0.01))
    absent = {row["provider"]: row["reason"] for row in found if row["kind"] == "absent"}
    assert absent["dense, compiled"] == "torch.compile: no C++ compiler"


def test_a_gated_block_that_leaves_inactive_rows_of_up_a_gradient_is_wrong() -> None:
    made = problem(Case("block", 32, 16, 64, "float32", 0.5, compiled=False, activation="swiglu"), CPU)
    update = next(provider for provider in made.providers if provider.name == "mode update")
    dense = made.providers[0].call
    made.providers = [replace(update, call=dense)]
    with pytest.raises(AssertionError, match=r"32 inactive rows of gate_proj\.weight have a gradient"):
        made.check()
    right, up = update.call, 3  # behind y, dx and the gradient of gate

    def call(number: int) -> tuple[torch.Tensor, ...]:
        answer = right(number)
        return *answer[:up], dense(number)[up], *answer[up + 1 :]

    made.providers = [replace(update, call=call)]
    with pytest.raises(AssertionError, match=r"32 inactive rows of up_proj\.weight have a gradient"):
        made.check()


def test_a_case_that_raises_costs_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = SMOKE[0], SMOKE[-1]
    real = operators.problem

    def raising(case: Case, *args: object, **options: object) -> object:
        if case == first:
            raise RuntimeError("\nout of resource: shared memory\nmore")
        return real(case, *args, **options)

    monkeypatch.setattr(operators, "problem", raising)
    path = tmp_path / "rows.jsonl"
    assert operators.measure([first, second], CPU, Writer(path, CPU), 3, 0.01) == 1
    said = capsys.readouterr()
    (absent,) = (row for row in read([path]) if row["kind"] == "absent")
    assert absent["reason"] == "RuntimeError: out of resource: shared memory"
    text = report.Report([path]).markdown(None).split("## What could not run")[1]
    assert "| every provider | " in text
    assert "RuntimeError: out of resource: shared memory" in text
    assert f"error: not timed: {first.label}: RuntimeError: out of resource: shared memory\n" in said.err
    assert second.label in said.out
