"""Comparing two commits: when a case counts as moved, the source trees, and the whole command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench import compare
from bench.compare import LEAST, STEP, Change, calls, changes, choose, percent
from bench.machine import ROOT

Sides = tuple[dict[str, list[float]], dict[str, list[float]]]


def planted(seed: int, cases: int, blocks: int, noise: float, **shifts: float) -> Sides:
    """Logarithms of times of two sides with normal noise; the second is shifted in the cases that are named."""
    draw = random.Random(seed)
    base, head = ({f"case{n}": [draw.gauss(0, noise) for _ in range(blocks)] for n in range(cases)} for _ in range(2))
    for name, shift in shifts.items():
        head[name] = [value + shift for value in head[name]]
    return base, head


def moved(found: dict[str, Change]) -> dict[str, str]:
    return {name: change.verdict for name, change in found.items() if change.verdict != "within noise"}


def test_a_change_of_ten_percent_is_found_and_has_its_sign() -> None:
    found = 0
    for seed in range(100):
        result = changes(*planted(seed, 10, 6, 0.015, case3=0.0953, case7=-0.0953))
        found += moved(result).get("case3") == "slower"
        found += moved(result).get("case7") == "faster"
        assert result["case3"].low < result["case3"].mean < result["case3"].high
    assert percent(0.0953102) == pytest.approx(10.0, abs=1e-4)
    assert found >= 190, "of 200 planted changes"


def test_noise_shows_a_moved_case_in_at_most_one_comparison_of_twenty() -> None:
    comparisons = 300
    alarms = sum(bool(moved(changes(*planted(seed, 40, 6, 0.05)))) for seed in range(comparisons))
    # 5 % of 300 is 15, and three standard deviations of that are 11; one test at 5 % for each case gives over 200.
    assert alarms <= 26


def test_what_is_no_change_however_sure() -> None:
    # The pairs agree that head is 3 % slower, but either side alone varies by 20 %.
    base = [0.0, 0.2, -0.2, 0.1, -0.1, 0.15]
    change = changes({"a": base}, {"a": [value + 0.03 + 0.0001 * i for i, value in enumerate(base)]})["a"]
    assert change.p < 0.001
    assert change.noise > 0.2
    assert change.verdict == "within noise"
    for shift, verdict in ((LEAST * 0.9, "within noise"), (LEAST * 1.2, "slower")):
        assert changes(*planted(0, 1, 8, 1e-5, case0=shift))["case0"].verdict == verdict
    for head, verdict in ((0.5, "within noise"), (0.75, "slower")):  # no noise at all
        assert changes({"a": [0.5] * 3}, {"a": [head] * 3})["a"].verdict == verdict


def test_sides_alternate_so_that_a_linear_drift_cancels() -> None:
    assert compare.order(4) == [0, 1, 1, 0, 0, 1, 1, 0]
    places = {side: [i for i, found in enumerate(compare.order(6)) if found == side] for side in (0, 1)}
    assert sum(places[0]) == sum(places[1])


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two commits and changes on top; temporary folders are made in ``tmp_path/temporary``."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    package = folder / "nspec"
    package.mkdir(parents=True)
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    try:
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True, capture_output=True)
    except OSError:
        pytest.skip("git is not installed")
    for number in (1, 2):
        (package / "__init__.py").write_text(f"number = {number}\n")
        subprocess.run([*git, "add", "."], cwd=folder, check=True)
        subprocess.run([*git, "commit", "-q", "-m", str(number)], cwd=folder, check=True)
    (package / "__init__.py").write_text("number = 3\n")
    (package / "new.py").write_text("")
    return folder


def left(repository: Path) -> list[Path]:
    return list((repository.parent / "temporary").iterdir())


def number(tree: compare.Tree) -> str:
    return (tree.folder / "nspec" / "__init__.py").read_text().split()[-1]


def test_trees_hold_their_commit_and_this_harness_and_are_removed(repository: Path) -> None:
    with compare.trees(["HEAD~1", "HEAD", None], repository) as made:
        assert [number(tree) for tree in made] == ["1", "2", "3"]
        working = made[2].folder / "nspec"
        assert (working / "new.py").is_file()
        assert made[2].name.endswith("-dirty")
        for tree in made:
            assert (tree.folder / "bench" / "compare.py").read_bytes() == (ROOT / "bench" / "compare.py").read_bytes()
            assert compare.add_library(tree) == "has no native library"
    assert not left(repository)
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def test_trees_are_removed_after_an_error(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), compare.trees(["HEAD"], repository):
        assert left(repository)
        raise KeyboardInterrupt
    assert not left(repository)


@pytest.mark.parametrize(
    ("spoil", "revision", "said"),
    [
        ([], "v9", "^no commit 'v9' in .*: fatal: Needed a single revision$"),
        (["git", "rm", "-rfq", "nspec"], None, "^the working tree holds no nspec"),
        (["rm", "-r", ".git"], "HEAD", "not a git repository"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, spoil: list[str], revision: str | None, said: str
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    if spoil:
        subprocess.run(spoil, cwd=repository, check=True)
    with pytest.raises(compare.NotPossible, match=said) as caught, compare.trees([revision], repository):
        pass
    assert "\n" not in str(caught.value)
    assert not left(repository)


def sources(folder: Path, content: str) -> Path:
    """A tree with native sources and a library built after them."""
    (folder / "kernels" / "csrc").mkdir(parents=True)
    (folder / "kernels" / "common").mkdir()
    (folder / "CMakeLists.txt").write_text("project(x)\n")
    (folder / "kernels" / "csrc" / "a.cpp").write_text(content)
    (folder / compare.LIBRARY).write_bytes(b"library of " + content.encode())
    return folder


def test_a_library_is_taken_over_from_equal_sources_only(tmp_path: Path) -> None:
    other = sources(tmp_path / "other", "int a;")
    equal, changed = sources(tmp_path / "equal", "int a;"), sources(tmp_path / "changed", "int b;")
    assert compare.sources(equal) == compare.sources(other) != compare.sources(changed)
    (equal / compare.LIBRARY).unlink()
    assert "taken over" in compare.add_library(compare.Tree("equal", equal), [tmp_path / "none", changed, other])
    assert (equal / compare.LIBRARY).read_bytes() == b"library of int a;"


@pytest.mark.parametrize("reason", ["other sources", "older than its sources"])
def test_a_library_that_does_not_belong_is_built_anew(tmp_path: Path, reason: str) -> None:
    other = sources(tmp_path / "other", "int a;")
    tree = sources(tmp_path / "tree", "int b;" if reason == "other sources" else "int a;")
    (tree / compare.LIBRARY).unlink()
    if reason == "older than its sources":
        os.utime(other / compare.LIBRARY, (1, 1))
    (tree / "setup.py").write_text(f"open({str(compare.LIBRARY)!r}, 'w').write('built')")
    assert compare.add_library(compare.Tree("tree", tree), [other]) == "native library built"
    assert (tree / compare.LIBRARY).read_text() == "built"
    (tree / compare.LIBRARY).unlink()
    (tree / "setup.py").write_text("raise SystemExit('error: no compiler')")
    with pytest.raises(compare.NotPossible, match=r"not built \(NSPEC_NATIVE=0 does without it\): error: no compiler"):
        compare.add_library(compare.Tree("tree", tree), [other])


def block(**logarithms: float | str) -> dict[str, dict[str, object]]:
    return {
        name: {"error": value} if isinstance(value, str) else {"ratio": value, "milliseconds": 2.0}
        for name, value in logarithms.items()
    }


def test_a_case_that_one_side_cannot_compute_is_named_and_the_others_are_compared() -> None:
    base = [block(a=0.0 + 0.001 * i, b="ImportError: no b") for i in range(3)]
    head = [block(a=0.5 - 0.001 * i, b=0.1) for i in range(3)]
    found, failed = compare.judge(base, head)
    assert moved(found) == {"a": "slower"}
    assert failed == {"b": "base: ImportError: no b"}
    text = compare.table(found, base, head)
    assert "+64.5 %" in text or "+64.7 %" in text
    assert text.endswith("slower")


@pytest.mark.parametrize("operator", ["row_sparse_adamw", STEP + "update"])
def test_what_is_timed_runs(operator: str) -> None:
    import torch

    case = next(case for case in choose("smoke", "cpu", "") if case.operator == operator)
    made = calls(case, torch.device("cpu"), check=True)
    assert list(made) == ["yardstick", "ours"]
    for call in made.values():
        call(0)
        call(1)


def test_an_unknown_case_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["HEAD", "--device", "cpu", "--cases", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: --cases 'nothing' is in no label; the first is")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository: a commit is compared with itself")
def test_the_command_compares_a_commit_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "changes.jsonl"
    command = [sys.executable, "-m", "bench.compare", "HEAD", "HEAD", "--set", "smoke", "--blocks", "3"]
    command += ["--seconds", "0.01", "--device", "cpu", "--threads", "1", "--json"] + [
        str(out),
        "--cases",
        "x32x128 float32",
    ]
    env = os.environ | ({} if compare.usable(ROOT / compare.LIBRARY, ROOT) else {"NSPEC_NATIVE": "0"})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # The training step is nspec's own, so that it runs whatever else a commit lacks.
    assert "training step, mode update 96x32x128 float32 0.50" in {row["case"] for row in rows}
    assert all(row["kind"] == "change" and row["base"] == row["head"] and row["blocks"] == 3 for row in rows)
    assert f"of {len(rows)} cases moved, 3 processes of each side" in done.stdout
    assert "block 6 of 6" in done.stderr
