"""Fragments of pages: written between markers, and the committed ones are what the committed results give."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from bench.machine import ROOT
from bench.report import __main__ as report
from bench.report import figures

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
