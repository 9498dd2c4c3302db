"""bench/gpu_check.sh: that it goes on after a part that fails or hangs, and what it leaves; and the parts it runs alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import rows
from bench.gpu import small_calls, synthetic_text
from bench.gpu.predictions import PREDICTIONS
from nspec.kernels.common.backend import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
KERNELS = ["compact_ffn", "block", "row_sparse_wgrad", "linear_relu_count", "row_sparse_adamw"]
CALLS = {
    "1": ["environment", "small_calls", "probe", *KERNELS, "steps", "gpu_tests", "report"],
    "2": ["environment", "tuning", *KERNELS, "compiled", "base", "grouped", "report"],
    "3": ["environment", "all_steps", "profiling", "finetune", "training", "memcheck", "counters", "report"],
}
LIMIT = 16 * 10**6

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

# What stands for Python: it does what the words of its command line ask for, at once.
PRETEND = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *bench.operators*compact_ffn*) {operators} ;;
  *bench.steps*) echo '{{"kind": "step"}}' >> "$(sed 's/.*--json \\([^ ]*\\).*/\\1/' <<< "$*")" ;;
  *nspec.cli*)
    for word; do case $word in run.folder=*) run=${{word#*=}} ;; esac; done
    mkdir -p "$run/report"; echo page > "$run/report/index.html" ;;
  *bench.report*)
    out=${{!#}}; head -c 17000000 /dev/zero > "$out/a.svg"
    for name in report.md b.svg c.svg; do echo text > "$out/$name"; done ;;
esac
"""


def interpreter(folder: Path, text: str) -> Path:
    """A program that gpu_check.sh takes for Python."""
    path = folder / "python"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def surroundings(folder: Path, python: Path | str, **environment: str) -> dict[str, str]:
    """The environment of the script, with its temporary files where a test can look."""
    for name in ("work", "cache"):
        (folder / name).mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}  # PyTorch sets one
    kept |= {"PYTHON": str(python), "TMPDIR": str(folder / "work"), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**kept, "CALLS": str(folder / "calls"), **environment}


def check(
    folder: Path, python: Path | str, *options: str, script: Path = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script from another folder than the checkout's."""
    env = surroundings(folder.parent, python, **environment)
    command = ["bash", str(script), folder.name, "--device", "cpu", "--set", "smoke", *options]
    return subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=580)


def statuses(folder: Path, parts: list[str] = CALLS["1"]) -> dict[str, str]:
    """The status of each part, after a look at what every run has to leave."""
    files = list(folder.iterdir())
    assert len(files) <= 8
    assert all(file.is_file() and file.stat().st_size <= LIMIT for file in files)
    assert list((folder.parent / "work").iterdir()) == [], "temporary files are left"
    found = json.loads((folder / "summary.json").read_text())["parts"]
    assert [part["part"] for part in found] == parts
    assert all(part["seconds"] >= 0 for part in found)
    return {part["part"]: part["status"] for part in found}


def test_it_goes_on_after_a_failing_part_and_says_last_how_to_run_it_again(tmp_path: Path) -> None:
    done = check(tmp_path / "out", interpreter(tmp_path, PRETEND.format(operators="echo wrong >&2; exit 3")))
    assert done.returncode == 1, done.stdout + done.stderr
    found = statuses(tmp_path / "out")
    assert found.pop("compact_ffn") == "failed (exit 3)"
    assert set(found.values()) == {"ok"}
    *table, again = done.stdout.splitlines()[-len(CALLS["1"]) - 3 :]
    assert again.endswith("bench/gpu_check.sh NEW_FOLDER --device cpu --set smoke --only compact_ffn")
    last = [line.split() for line in table]
    assert last[0] == ["part", "status", "seconds"]
    assert [line[0] for line in last[1:]] == [*CALLS["1"], "all"]
    assert last[-1][1] == "failed"
    log = (tmp_path / "out/log.txt").read_text()
    assert log == done.stdout
    assert "wrong\n" in log, "what a part writes to standard error is in the log"


@pytest.mark.parametrize("call", ["2", "3"])
def test_a_later_call_has_its_own_parts(call: str, tmp_path: Path) -> None:
    done = check(tmp_path / "out", interpreter(tmp_path, PRETEND.format(operators="true")), "--call", call)
    found = statuses(tmp_path / "out", CALLS[call])
    absent = {"2": {"report"}, "3": {"memcheck", "counters"}}[call]  # the pretended operators leave no rows
    assert {part for part, status in found.items() if status != "ok"} == absent, done.stdout
    assert "run again" not in done.stdout


def test_it_keeps_three_figures_and_no_file_that_is_too_large(tmp_path: Path) -> None:
    filler = "head -c 17000000 /dev/zero | tr '\\0' x"
    python = interpreter(tmp_path, PRETEND.format(operators=filler))
    done = check(tmp_path / "out", python, "--only", "operators,steps,training")
    assert done.returncode == 1
    assert set(statuses(tmp_path / "out", [*KERNELS, "steps", "training", "report"]).values()) == {"ok"}
    wanted = {"log.txt", "rows.jsonl", "summary.json", "report.md", "b.svg", "c.svg", "training.html"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == wanted
    log = (tmp_path / "out/log.txt").read_text()
    assert "a.svg was larger than 16 MB" in log
    assert log.splitlines()[-1].split()[:2] == ["all", "failed"], "the end of a long log is kept"


def test_a_part_that_hangs_is_interrupted_so_that_it_can_tell_and_the_others_have_their_time(tmp_path: Path) -> None:
    told = "trap 'echo what it was doing; exit 1' INT; sleep 100 & sleep 100"
    done = check(tmp_path / "out", interpreter(tmp_path, PRETEND.format(operators=told)), "--seconds", "8")
    assert done.returncode == 1
    found = statuses(tmp_path / "out")
    assert found["compact_ffn"] == "out of time"
    assert found["report"] == "ok"
    assert "what it was doing" in done.stdout
    assert json.loads((tmp_path / "out/summary.json").read_text())["seconds"] <= 9


def test_a_part_that_cannot_be_interrupted_is_killed_within_its_limit_and_the_report_has_its_share(
    tmp_path: Path,
) -> None:
    deaf = interpreter(tmp_path, PRETEND.format(operators="trap '' INT; sleep 100"))
    done = check(tmp_path / "out", deaf, "--seconds", "6", "--only", "steps,operators,training")
    found = statuses(tmp_path / "out", ["steps", *KERNELS, "training", "report"])
    assert (found["compact_ffn"], found["report"]) == ("out of time", "ok"), done.stdout
    assert json.loads((tmp_path / "out/summary.json").read_text())["seconds"] <= 7


def test_ctrl_c_leaves_the_statuses_the_report_and_the_command_for_the_rest(tmp_path: Path) -> None:
    hanging = 'touch "$CALLS.hangs"; trap "echo what it was doing; exit 1" INT; sleep 100 & sleep 100'
    env = surroundings(tmp_path, interpreter(tmp_path, PRETEND.format(operators=hanging)))
    # A test run in the background ignores the signal, and what it starts would.
    command = ["env", "--default-signal=INT", "bash", str(SCRIPT), "out", "--device", "cpu", "--set", "smoke"]
    command += ["--only", "steps,compact_ffn,training"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "calls.hangs").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group, tee too
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = statuses(tmp_path / "out", ["steps", "compact_ffn", "training", "report"])
    assert found == {"steps": "ok", "compact_ffn": "interrupted", "training": "interrupted", "report": "ok"}
    assert "what it was doing" in said
    assert (tmp_path / "out/report.md").is_file()
    assert said.splitlines()[-1].endswith("--only compact_ffn,training")


def test_benchmarks_are_asked_for_the_device_and_write_into_one_file(tmp_path: Path) -> None:
    check(tmp_path / "out", interpreter(tmp_path, PRETEND.format(operators="true")))
    calls = (tmp_path / "calls").read_text().splitlines()
    common = f"--set smoke --device cpu --json {tmp_path}/out/rows.jsonl"
    for kernel in KERNELS:
        (own,) = (call for call in calls if f"--operators {kernel}" in call and "-m bench.operators" in call)
        assert common in own
        assert {"--no-compile", "--no-memory", "--no-grouped"} <= set(own.split())
    assert any(f"-m bench.steps {common} --shapes big" in call for call in calls)
    (tests,) = (call.split() for call in calls if "-m pytest" in call)
    for file in ROOT.joinpath("tests").rglob("test_*.py"):
        marked = "mark" + ".gpu" in file.read_text()
        assert (str(file.relative_to(ROOT)) in tests) == marked, file
    assert "tests/kernels/test_products.py" in tests


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out", "--device", "tpu"], "--device tpu: expected cuda or cpu"),
        (["out", "--seconds", "soon"], "expected a whole number of seconds"),
        (["out", "--set"], "--set needs a value"),
        (["out", "--call", "4"], "--call 4: expected 1, 2 or 3"),
        (["out", "--only", "probe,kernels"], "--only kernels: there is no such part; there are operators"),
        (["out", "--only", "probe", "--call", "2"], "--only probe and --call 2: each says which parts to run"),
        (["full"], "is not empty"),
        ([], "usage:"),
    ],
)
def test_what_it_cannot_do_is_an_error_at_once(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/rows.jsonl").write_text("{}\n")
    done = subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("python", "options", "said"),
    [
        ("nonexist", [], "gpu_check.sh: error: no interpreter nonexist; set PYTHON to one\n"),
        (1, ["--device", "cuda"], "sees no GPU"),
    ],
)
def test_a_python_or_gpu_that_is_not_there_is_one_line_before_anything_runs(
    python: str | int, options: list[str], said: str, tmp_path: Path
) -> None:
    found = interpreter(tmp_path, f"#!/bin/bash\nexit {python}\n") if isinstance(python, int) else python
    done = check(tmp_path / "out", found, *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "out").exists(), "a call that is refused leaves nothing"


PLANTED = """
_whole = linear_relu_count

def linear_relu_count(*args, **options):
    if options.get("explain"):
        return _whole(*args, **options)
    raise RuntimeError("planted")
"""
BLOCKED = """
import importlib.machinery, importlib.metadata as metadata, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in {"babel", "datasets", "qwanqwa", "qq", "ruff", "mypy"}
        return None if absent else super().find_spec(name, path, target)

rest = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder and "editable" not in str(f).lower()]
sys.meta_path[:] = [*rest, Finder]
sys.path[:] = [path for path in sys.path if path != CHECKOUT]
found = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.lower() in {"nspec", "babel", "datasets", "qwanqwa"}:
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""
"""A sitecustomize: what the image of a GPU machine lacks cannot be imported, and the package is not installed."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_copy_without_git_and_with_a_broken_kernel_delivers_every_other_part(tmp_path: Path) -> None:
    for name in ("transformers", "matplotlib", "triton"):
        pytest.importorskip(name, reason=f"the benchmarks need {name}")
    copy = tmp_path / "copy"
    for name in ("bench", "kernels", "nspec", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    operator = copy / "kernels/linear_relu_count/op.py"
    operator.write_text(operator.read_text() + PLANTED)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(f"CHECKOUT = {str(ROOT)!r}\n{BLOCKED}")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "NSPEC_COMMIT": "abc123"}
    script = copy / "bench/gpu_check.sh"
    done = check(tmp_path / "out", sys.executable, "--seconds", "4000", script=script, **environment)  # no part is cut
    found = statuses(tmp_path / "out")
    broken = {part: found.pop(part) for part in ("small_calls", "probe", "linear_relu_count")}
    assert broken == dict.fromkeys(broken, "failed (exit 1)"), done.stdout
    assert found == dict.fromkeys(found, "ok"), done.stdout
    log = done.stdout
    assert log.splitlines()[-1].endswith("--only small_calls,probe,linear_relu_count")
    assert "error: not timed: linear_relu_count 96x32x128 float32 1.00: RuntimeError: planted" in log
    for other in ("row_sparse_wgrad", "compact_ffn", "row_sparse_adamw"):
        assert re.search(rf"\d+ right results of {other} on cpu .*; 0 calls failed", log), other
    measured = rows.read([tmp_path / "out/rows.jsonl"])
    assert {row["kind"] for row in measured} == {"ceiling", "operator", "absent", "probe", "step"}
    assert {row["commit"] for row in measured} == {"abc123"}
    assert {row["operator"] for row in measured if row["kind"] == "operator"} == set(KERNELS) - {"linear_relu_count"}
    assert {row["operator"] for row in measured if row["kind"] == "absent"} == {"linear_relu_count"}
    probed = [row for row in measured if row["kind"] == "probe"]
    assert [row["name"] for row in probed if row.get("reason")] == ["host: linear_relu_count, public"]
    named = {(row["experiment"], row["name"]) for row in probed}
    assert named >= set(PREDICTIONS), "what is predicted is measured under that name"


def test_small_calls_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", "reference")
    assert small_calls.main(["--device", "cpu"]) == 0
    right = len(small_calls.SHAPES) * 4 * (2 + 3 + 6 + 4 + 5 + 7 + 3 + 2 + 5)
    said = f"{right} right results of {', '.join(OPERATORS)} on cpu"
    assert said in capsys.readouterr().out
    real = small_calls.row_sparse_wgrad

    def wrong(dh: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dw, db = real(dh, *args, **kwargs)
        return (dw, db) if dh.dtype == torch.float64 else (dw, db * float("nan"))

    monkeypatch.setattr(small_calls, "row_sparse_wgrad", wrong)
    assert small_calls.main(["--device", "cpu"]) == 1
    assert "torch.float32: row_sparse_wgrad: db: relative error nan" in capsys.readouterr().out


def test_synthetic_text_is_the_same_again_and_its_splits_share_no_sentence(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic_text.write(tmp_path / name, train=300, valid=40, test=30, seed=seed)
    first, second, other = ({p.name: p.read_text() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert first == second
    assert all(text != other[name] for name, text in first.items())
    assert len(first) == 3 * 3 * 2
    for code in ("qab", "qac", "qad"):
        said = [first[f"{split}.qaa-{code}.{code}"].splitlines() for split in ("train", "valid", "test")]
        assert [len(lines) for lines in said] == [300, 40, 30]
        assert len({line for lines in said for line in lines}) == 370
