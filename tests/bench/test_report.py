"""Reports say what the rows say; the committed pages are what the committed results give."""

from __future__ import annotations

import argparse
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from fabricated import CPU, fabricated, written

from bench.machine import ROOT
from bench.report import __main__ as report
from bench.report import cells, figures, summary, tables
from bench.rows import Writer, read


def operator(**changed: Any) -> dict[str, Any]:
    """A row of ours, 1.5 times as fast as dense, with a target of 1.5."""
    row = next(r for r in fabricated(CPU) if r.get("provider") == "ours" and r["density"] == 0.5)
    return {**row, "speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "target": 1.5, **changed}


def test_the_newest_run_of_a_case_is_shown_whatever_the_order_of_files() -> None:
    old, new = operator(date="2026-01-01T00:00:00Z", speedup=1.1), operator(date="2026-01-02T00:00:00Z", speedup=1.2)
    for rows in ([old, new], [new, old]):
        assert [row["speedup"] for row in summary.newest(rows)] == [1.2]
    other = operator(date="2025-01-01T00:00:00Z", density=0.3)
    assert len(summary.newest([new, other])) == 2


def test_rows_from_before_there_were_activations_are_those_of_relu() -> None:
    old, new = operator(date="2026-01-01T00:00:00Z"), operator(date="2026-01-02T00:00:00Z", activation="relu")
    gelu = operator(date="2026-01-03T00:00:00Z", activation="gelu")
    assert summary.newest([old, new, gelu]) == [new, gelu]
    assert len(summary.groups([old, new, gelu], summary.operator_case)) == 2
    assert cells.shape_of(gelu) == f"{cells.shape_of(old)}, gelu"


def test_a_forced_backend_is_neither_ours_nor_in_its_place() -> None:
    forced = operator(backend_asked="reference", date="2027-01-01T00:00:00Z")
    assert len(summary.newest([operator(), forced])) == 2
    assert not summary.is_ours(forced)
    assert not summary.is_ours(operator(provider="ours: reference"))
    assert summary.is_ours(operator())


@pytest.mark.parametrize(
    ("speedup", "high", "said"),
    [(1.5, 1.6, "met"), (1.41, 1.45, "missed by 6 %"), (1.47, 1.6, "missed by 2 %, within the spread")],
)
def test_a_target_is_met_or_missed_and_says_by_how_much(speedup: float, high: float, said: str) -> None:
    lines = tables.targets([operator(speedup=speedup, speedup_high=high)])
    assert lines[-1].split("|")[-2].strip() == said


def test_whatever_is_faster_than_ours_is_listed_with_its_name() -> None:
    other = operator(provider="index_select", ours=False, speedup=1.7, speedup_low=1.65, target=None)
    slower = operator(provider="dense", ours=False, speedup=1.0, target=None)
    cells_of = lambda rows: [cell.strip() for cell in tables.losses(rows)[-1].split("|")[1:-1]]
    assert cells_of([operator(), other, slower])[-2:] == ["index_select", "12 %"]  # 1 - 1.5 / 1.7
    assert cells_of([operator(speedup_high=1.66), other])[-1] == "12 %, within the spread"
    assert tables.losses([operator(), slower]) == []
    # a reference of ours that is slower is no loss: users do not get it
    assert len(tables.losses([operator(), operator(provider="ours: reference", speedup=0.5), other])) == 2 + 1


def test_break_even_is_where_the_line_between_measurements_falls_below_one() -> None:
    assert summary.break_even([(1.0, 0.9), (0.5, 1.5), (0.8, 1.1)]) == pytest.approx(0.9)
    assert summary.break_even([(0.3, 1.2), (1.0, 1.01)]) == 1.0
    assert summary.break_even([(0.3, 0.99), (1.0, 1.2)]) is None
    assert summary.break_even([]) is None


def test_the_bound_of_a_step_is_amdahls() -> None:
    assert summary.amdahl(0.5, 0.5) == pytest.approx(4 / 3)
    assert summary.amdahl(0.0, 0.3) == 1
    step = next(row for row in fabricated(CPU) if row["kind"] == "step" and row["density"] == 0.5)
    text = "\n".join(tables.steps([{**step, "feed_forward_share": 0.5}]))
    assert "in mode `forward` 1.33× at 0.5 and in mode `update` 1.04× at 0.5" in text


def test_the_roof_is_the_longer_of_computing_and_moving() -> None:
    limits = {("matmul", "float32"): 1e9, ("memory", ""): 1e8}
    row = operator(milliseconds=2000.0, flops=1e9, bytes=1e7)
    assert summary.roof(row, limits) == (0.5, "matmul")
    assert summary.roof({**row, "bytes": 2e8}, limits) == (1.0, "memory")
    assert summary.roof(row, {("memory", ""): 1e8}) is None
    assert summary.roof({**row, "flops": 0}, {("memory", ""): 1e8}) == (0.05, "memory")
    assert summary.roof({**row, "milliseconds": None}, limits) is None


def test_two_runs_at_one_commit_are_compared() -> None:
    first, second = operator(date="2026-01-01T00:00:00Z"), operator(date="2026-01-02T00:00:00Z", speedup=1.8)
    said = tables.agreement([first, second])
    assert said.startswith("1 figures were measured twice")
    assert "overlap in 1 of them; the newer speed-up is 1.20 to 1.20 times the older" in said
    assert "overlap in 0 of them" in tables.agreement([first, {**second, "speedup_low": 1.7, "speedup_high": 1.9}])
    assert tables.agreement([first, {**second, "commit": "another"}]) == "No case was measured twice at one commit."


def test_the_report_has_every_part_for_both_devices(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main([str(both), "--out", str(tmp_path)]) == 0
    assert "verdict" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"\bNone\b|\bnan\b|not measured\.", text.replace("dense step was not measured.", ""))
    assert report.GPU_MISSING not in text
    for name in ("Some GPU", "Some Processor", "index_select", "break-even", "(computed)", "grouped_mm", "peak memory"):
        assert name in text, name
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") > 3, line
    for name in figures.FIGURES:
        assert f"](bench-{name}.svg)" in text
        assert (tmp_path / f"bench-{name}.svg").is_file()


def test_rows_of_the_host_are_a_table_of_their_own_beside_other_rows_and_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = {"kind": "host", "name": "compact_ffn", "dtype": "float16", "launches": 8, "products": 4, "kernels": 2}
    row |= {"microseconds": 310.4, "ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3, **CPU}
    row |= {"device": "Some Processor, 1 threads", "date": "2026-01-02T00:00:00Z"}
    older = {**row, "ratio": 9.0, "date": "2026-01-01T00:00:00Z"}
    path = written(tmp_path / "host.jsonl", [older, row])
    both = report.Report([path, written(tmp_path / "rows.jsonl", fabricated(CPU))])
    for made in (both, report.Report([path])):
        text = made.markdown(None)
        [line] = [line for line in text.splitlines() if line.startswith("| compact_ffn ")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == (
            ["float16", "8", "4", "2", "310 us", "1.20× [1.10, 1.30]"]
        )
        assert "1 threads" in text
        assert "not shown" not in text
    assert "Some Processor, 1 threads" not in both.devices
    assert "not measured" not in text
    assert report.main([str(path), "--update", str(tmp_path / "page.md")]) == 1
    assert "all rows are of bench.host" in capsys.readouterr().err


def test_a_last_line_that_was_cut_short_is_left_out_and_the_next_row_is_not_lost_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"kind": "a"}, {"kind": "b"}])
    path.write_text(path.read_text()[:-5])
    assert [row["kind"] for row in read([path])] == ["a"]
    assert f"warning: {path}, line 2 is cut short" in capsys.readouterr().err
    Writer(path, torch.device("cpu"))({"kind": "c"})
    assert [row["kind"] for row in read([path])] == ["a", "c"]
    path.write_text('{"kind": "a"\n{"kind": "b"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read([path])
    path.write_text('{"kind": "a"}')  # whole, as an editor leaves it
    Writer(path, torch.device("cpu"))({"kind": "c"})
    assert [row["kind"] for row in read([path])] == ["a", "c"]


@pytest.mark.parametrize("kind", [kind for kind in summary.KINDS if kind != "host"])
def test_a_kind_that_is_missing_or_alone_is_said_to_be(kind: str, tmp_path: Path) -> None:
    rows = fabricated(CPU)
    for chosen in ([r for r in rows if r["kind"] != kind], [r for r in rows if r["kind"] == kind]):
        made = report.Report([written(tmp_path / "rows.jsonl", chosen)])
        kinds = {row["kind"] for row in chosen}
        expected = {"operator": 4, "step": 2, "tasks": 1, "profiling": 1, "ceiling": 1}
        text = made.markdown(None)
        assert text.count("not measured.") >= sum(n for name, n in expected.items() if name not in kinds)
        drawn = {name for name in figures.FIGURES if figures.draw(name, made.devices)}
        speeds = {"speedup"} if kinds & {"operator", "step"} else set()
        roofs = {"roofline"} if {"operator", "ceiling"} <= kinds else set()
        assert drawn == speeds | roofs | ({"parts"} if "step" in kinds else set())


def test_a_figure_that_is_null_or_absent_is_a_dash_and_what_names_a_case_is_needed(tmp_path: Path) -> None:
    few = lambda row: row.get("dtype") != "bfloat16" and row.get("d_model", 512) == 512 and row.get("density") != 0.3
    rows = list(filter(few, fabricated(CPU)))
    needed = {name for names in summary.NEEDED.values() for name in names}
    drawn = {"speedup", "speedup_low", "milliseconds", "parts", "flops", "bytes", "tokens", "device", "date"}
    for name in sorted({key for row in rows for key in row} - {"kind"}):
        null, missing = (
            [{**row, name: None} for row in rows],
            [{k: v for k, v in row.items() if k != name} for row in rows],
        )
        for changed in (null, missing):
            path = written(tmp_path / "rows.jsonl", changed)
            if name in needed:
                with pytest.raises(ValueError, match=rf"row \d+, of kind \w+, has no {name}"):
                    report.Report([path])
                continue
            made = report.Report([path])
            assert not re.search(r"\bNone\b|\bnan\b", made.markdown(None)), name
        for figure in figures.FIGURES if name in drawn else ():
            assert "None" not in (figures.draw(figure, made.devices) or ""), name


def test_figures_are_the_same_for_the_same_rows_and_name_devices_and_units(both: Path) -> None:
    devices = report.Report([both]).devices
    words = {
        "speedup": ["speed-up over dense", "1 / density"],
        "roofline": ["100 %", "TFLOP/s"],
        "parts": ["ms", "backward"],
    }
    for name in figures.FIGURES:
        drawing = figures.draw(name, devices)
        assert drawing is not None
        assert drawing == figures.draw(name, devices)
        shown = "".join(ElementTree.fromstring(drawing).itertext())
        for word in ["Some GPU", "Some Processor, 2 threads", *words[name]]:
            assert word in shown, (name, word)
        assert "<dc:date>" not in drawing


def test_files_without_rows_and_rows_of_another_suite_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content, said in (
        ("", "no rows in"),
        ('{"a": 1}', "rows.jsonl, line 1: a row without `kind`"),
        ('{"kind": "step"}\nx', "rows.jsonl, line 2: not JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
        assert report.main([str(tmp_path / "rows.jsonl")]) == 1
        assert said in capsys.readouterr().err
    assert report.main([str(tmp_path / "nothing.jsonl")]) == 1
    assert "nothing.jsonl" in capsys.readouterr().err
    unknown = [{"kind": "training", "device": "x"}]
    assert report.main([str(written(tmp_path / "rows.jsonl", fabricated(CPU), unknown))]) == 0
    assert "not shown: training" in capsys.readouterr().out


PAGES = [ROOT / name for name in ("README.md", "docs/speed.md", "kernels/README.md", "bench/README.md")]


def pinned_matplotlib() -> bool:
    """Whether figures are drawn by the version that drew the committed ones; others differ in details."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return f"matplotlib=={matplotlib.__version__};" in pins


def commands(page: Path) -> list[argparse.Namespace]:
    """The commands that a page says it was written by."""
    found = re.findall(r"Written by `python -m bench\.report ([^`]+)`", page.read_text(encoding="utf-8"))
    return [report.parser().parse_args(shlex.split(options)) for options in dict.fromkeys(found)]


def stale(page: Path) -> list[str]:
    """The names of what is not as the command printed in ``page`` gives it: the page, or its figures."""
    text = page.read_text(encoding="utf-8")
    names = report.fragments_of(page, text)
    if not names:
        return []
    printed = commands(page)
    assert len(printed) == 1, f"{page} is written by {len(printed)} different commands"
    files, pages = ([ROOT / name for name in found] for found in (printed[0].files, printed[0].update))
    made = report.Report(files, pages, ROOT / printed[0].docs)
    wrong = [] if made.updated(page, text) == text else [page.name]
    pictures = (
        [report.FIGURE_PARTS[name] for name in names if name in report.FIGURE_PARTS] if pinned_matplotlib() else []
    )
    for name in pictures:
        drawing, path = figures.draw(name, made.devices), made.docs / f"bench-{name}.svg"
        if drawing is not None and (not path.is_file() or path.read_text(encoding="utf-8") != drawing):
            wrong.append(path.name)
    return wrong


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.is_file()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_pages_are_what_the_committed_results_give(page: Path) -> None:
    # A page without markers has nothing to compare. After new results: run the command that the page prints.
    assert stale(page) == []
    results = {path.resolve() for path in (ROOT / "bench" / "results").glob("*.jsonl")}
    for printed in commands(page):
        assert {(ROOT / name).resolve() for name in printed.files} == results, (
            "the command leaves out committed results"
        )


def test_a_page_gets_fragments_between_its_markers_alone(both: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = [
        line for name in report.FRAGMENTS for line in (f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->")
    ]
    page.write_text("before\n" + "\nbetween\n".join(marks) + "\nafter\n", encoding="utf-8")
    options = [str(both), "--update", str(page), "--docs", str(tmp_path / "docs")]
    assert report.main(options) == 0
    once = page.read_text(encoding="utf-8")
    assert once.startswith("before\n<!-- bench:machine:begin -->\n* Some GPU, CUDA 13.0, torch 2.11.0, triton 3.6.0")
    assert once.endswith("<!-- bench:figure-parts:end -->\nafter\n")
    assert once.count("\nbetween\n") == len(report.FRAGMENTS) - 1  # those between fragments; those inside are replaced
    assert once.count("Written by `python -m bench.report ") == len(report.FRAGMENTS)
    for name in figures.FIGURES:
        assert f"](docs/bench-{name}.svg)" in once
        assert (tmp_path / "docs" / f"bench-{name}.svg").is_file()


def test_a_changed_figure_of_a_page_is_noticed_and_put_right(both: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "bench-roofline.svg"
    marks = [f"<!-- bench:{name}:{side} -->" for name in ("block", "figure-roofline") for side in ("begin", "end")]
    page.write_text("\n".join(marks), encoding="utf-8")
    options = [str(both), "--update", str(page), "--docs", str(tmp_path)]
    assert report.main(options) == 0
    once, drawn = page.read_text(encoding="utf-8"), picture.read_text(encoding="utf-8")
    assert stale(page) == []
    page.write_text(re.sub(r"\d\.\d\d×", "9.99×", once, count=1), encoding="utf-8")
    picture.write_text("<svg/>", encoding="utf-8")
    assert stale(page) == ["page.md", *(["bench-roofline.svg"] if pinned_matplotlib() else [])]
    assert report.main(options) == 0
    assert page.read_text(encoding="utf-8") == once
    assert picture.read_text(encoding="utf-8") == drawn


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no markers", "no markers; put"),
        ("<!-- bench:nothing:begin -->\n<!-- bench:nothing:end -->", "no fragment 'nothing'; there are machine"),
        ("<!-- bench:steps:begin -->", "markers are steps:begin; expected"),
        ("<!-- bench:steps:end -->\n<!-- bench:steps:begin -->", "markers are steps:end, steps:begin; expected"),
        ("<!-- bench:steps:begin -->\n<!-- bench:steps:end -->\n" * 2, "each NAME once"),
    ],
)
def test_a_page_with_wrong_markers_stays_as_it_is(
    text: str, said: str, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert report.main([str(both), "--update", str(page), "--docs", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert page.read_text(encoding="utf-8") == text
    assert not list(tmp_path.glob("*.svg"))
