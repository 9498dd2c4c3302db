"""Runs that differ in one option at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import TASKS, make_run
from test_losses import with_losses

from nspec import cli
from nspec.files import write_text
from nspec.report.sweep import compare_runs, draw, markdown, write

SYSTEMS = ["dense", "continued", "forward"]


def a_run(run: Path, gain: float, option: str = "", value: object = None, systems: list[str] = SYSTEMS) -> Path:
    """A trained run, unscored, whose specialised system gains ``gain`` nats in every direction."""
    make_run(run, systems=systems, scored=[])
    if option:
        text = (run / "config.yaml").read_text(encoding="utf-8")
        found = next(line for line in text.splitlines() if line.startswith(f"  {option}: "))
        write_text(run / "config.yaml", text.replace(found, f"  {option}: {value}", 1))
    with_losses(run, "continued", 0.0)
    if "forward" in systems:
        with_losses(run, "forward", -gain)
    return run


def test_points_of_an_option_are_an_axis_and_seeds_are_one_point(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / "first", 0.1),
        a_run(tmp_path / "small", 0.3, "d_model", 64),
        a_run(tmp_path / "again", 0.2, "seed", 7),
        a_run(tmp_path / "rule", 0.05, "rule", "specific"),
        a_run(tmp_path / "half", 0.0, "rule", "top", systems=["dense", "continued"]),
    ]
    found = compare_runs(runs)
    assert (found.baseline, found.systems, found.groups) == ("continued", ("forward",), ("all", "from_en", "to_en"))
    first, small, rule, half = found.points
    assert first.folders == (runs[0], runs[2])
    assert found.axes == {"model.d_model": (first, small), "select.rule": (first, rule, half)}
    assert [found.delta(p, "forward", "all") for p in (first, small, rule)] == pytest.approx([-0.15, -0.3, -0.05])
    assert found.delta(half, "forward", "from_en") is None
    assert compare_runs(runs, ["forward"]).systems == ("forward",)
    with pytest.raises(ValueError, match="no run has trained random beside continued; there are forward"):
        compare_runs(runs, ["random"])
    left, right = draw(found, "all").axes
    assert list(left.get_lines()[1].get_xdata()) == [64, found.options["model.d_model"]]
    assert list(left.get_lines()[1].get_ydata()) == pytest.approx([-0.3, -0.15])
    assert [label.get_text() for label in right.get_xticklabels()] == ["share", "specific", "top"]
    lines = markdown(found).splitlines()
    assert f"| model.d_model=64 | {len(TASKS)} | 1 | 3.500 | −0.300 |" in lines
    assert any(line.startswith("| select.rule=top |") and line.endswith("| – |") for line in lines)
    write(found, tmp_path / "out")
    names = {"sweep.md", "sweep.tsv", "sweep_all.svg", "sweep_from_en.svg", "sweep_to_en.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_what_cannot_be_compared_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = a_run(tmp_path / "first", 0.1), a_run(tmp_path / "again", 0.1, "seed", 7)
    for folders, message in (
        ([first, again], "found 1 configuration in 2 runs, expected runs that differ in an option"),
        (
            [first, make_run(tmp_path / "bare", systems=SYSTEMS, scored=[])],
            "no validation losses of continued, or",
        ),
        ([first, a_run(tmp_path / "other", 0.1, "baseline", "dense")], "the baseline is continued in .* and dense in"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_runs(folders)
    assert cli.main(["sweep", str(first), str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
