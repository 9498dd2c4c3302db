"""bench.host: what each operator and block puts on a GPU, counted without one, and that the counting is right.

Where a change of kernels or modules is meant to change ``COUNTS``, ``python -m bench.host --counts`` prints it anew.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import fake_gpu, host
from bench.fake_gpu import FakeGpu
from nspec.kernels.linear_relu_count import op

ROOT = Path(__file__).resolve().parents[2]

# Triton launches, library products, other kernels of PyTorch: of the forward and backward pass where the name says nothing.
COUNTS = {
    "dense block": (0, 6, 4),
    "GELU dense block": (0, 6, 4),
    "SwiGLU dense block": (0, 9, 5),
    "dense block, autocast": (0, 6, 14),
    "linear_relu_count": (1, 2, 3),
    "linear_relu_count, forward": (1, 0, 1),
    "linear_relu_count, backward": (0, 2, 2),
    "row_sparse_wgrad": (1, 1, 2),
    "row_sparse_wgrad, added": (1, 1, 2),
    "compact_ffn": (8, 4, 2),
    "compact_ffn, forward": (4, 1, 0),
    "compact_ffn, backward": (4, 3, 2),
    "linear_relu_count, 3 tasks": (3, 2, 3),
    "linear_relu_count, 3 tasks, forward": (3, 0, 1),
    "linear_relu_count, 3 tasks, backward": (0, 2, 2),
    "row_sparse_wgrad, 3 tasks": (3, 0, 2),
    "row_sparse_wgrad, 3 tasks, added": (3, 0, 2),
    "compact_ffn, 3 tasks": (14, 0, 4),
    "compact_ffn, 3 tasks, forward": (5, 0, 0),
    "compact_ffn, 3 tasks, backward": (9, 0, 4),
    "row_sparse_adamw_, 12 matrices": (1, 0, 0),
    "block in mode forward": (8, 4, 3),
    "block in mode forward, autocast": (8, 4, 4),
    "block in mode forward, 3 tasks": (14, 0, 9),
    "block in mode update": (1, 6, 6),
    "block in mode update, autocast": (1, 6, 13),
    "block in mode update, 3 tasks": (3, 5, 8),
    "GELU block in mode forward": (6, 8, 23),
    "GELU block in mode update": (1, 6, 6),
    "SwiGLU block in mode forward": (11, 9, 3),
    "SwiGLU block in mode update": (2, 9, 11),
}

SCRIPT = """
import sys
from bench.host import main
from nspec.kernels.compact_ffn import triton  # imported before: what is replaced is replaced in it too
status = main(["--counts"])
print("--", flush=True)
status |= main(["--only", "block in mode update", "--rounds", "3", "-v", "--json", sys.argv[1]])
print("--", flush=True)
status |= main(["--profile", "row_sparse_wgrad", "--rounds", "3"])
sys.exit(status)
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The counts, the table and the profile as printed, and the file with the rows of the table."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    rows = tmp_path_factory.mktemp("host") / "rows.jsonl"
    # Interpreted kernels, as in this process, are not what a GPU runs.
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "NSPEC_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows)], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("--\n"), rows


def test_what_a_call_puts_on_a_gpu_is_as_it_was(printed: tuple[list[str], Path]) -> None:
    found = ast.literal_eval("{" + printed[0][0] + "}")
    assert found == COUNTS, "if that is meant: python -m bench.host --counts prints the table anew"


def test_rows_carry_counts_and_the_ratio_to_the_dense_block(printed: tuple[list[str], Path]) -> None:
    (_, table, _), path = printed
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in rows] == [name for name in COUNTS if "block in mode update" in name]
    for row in rows:
        assert (row["kind"], row["dtype"], row["rounds"]) == ("host", "float16", 3)
        assert (row["launches"], row["products"], row["kernels"]) == COUNTS[row["name"]]
        assert {kind: sum(names.values()) for kind, names in row["names"].items()} == {
            kind: row[kind] for kind in ("launches", "products", "kernels")
        }
        kind, _, rest = row["name"].partition("block in mode update")
        assert row["baseline"] == f"{kind}dense block" + (rest if rest == ", autocast" else "")
        assert row["ratio"] > 0.2, "ours does all that the dense block does"
        assert row["name"] in table
    assert "expand_kernel" in table
    assert "driver" in table, "it is said what is not in the microseconds"


def test_a_profile_names_the_functions_of_the_row(printed: tuple[list[str], Path]) -> None:
    profile = printed[0][2]
    assert "row_sparse_wgrad/triton.py" in profile
    assert "compact_ffn/triton.py" not in profile


def test_kernels_are_counted_once_each_and_views_and_memory_not_at_all() -> None:
    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(4, 4)

    def call() -> None:
        y = F.linear(x, weight).view(4, 3).t().contiguous()  # the last copies
        z = torch.empty_like(y).fill_(1.0) + y.detach().to(torch.float64)
        torch.autograd.grad(y.sum(), x)
        assert z.shape == (3, 4)

    forward = Counter({"clone": 1, "fill_.Scalar": 1, "_to_copy": 1, "add.Tensor": 1, "sum": 1})
    assert host.kernels_of(call) == forward + Counter({"ones_like": 1})  # what follows is a view and a product


def test_a_call_that_takes_another_path_while_it_is_watched_is_an_error() -> None:
    fake, calls = FakeGpu(), iter(range(9))

    def call() -> None:
        fake.launches.extend(["kernel"] * (2 if next(calls) == 2 else 1))

    with pytest.raises(RuntimeError, match="while kernels are counted"):
        host.counts(call, fake)


def test_a_sample_in_which_another_program_had_the_core_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([0, 1, 1, 3, 3, 3])
    monkeypatch.setattr(host, "_switches", lambda: next(switches))
    seen: list[int] = []
    assert len(host.processor_seconds([lambda: seen.append(0)], rounds=1, warmup=0)[0]) == 1
    assert len(seen) == 3 * host.CALLS


def test_an_operator_that_would_not_reach_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "BACKENDS", op.BACKENDS[1:])
    with pytest.raises(RuntimeError, match="linear_relu_count has 0 backends 'triton', expected one"):
        fake_gpu._admit_cpu_tensors()


def test_interpreted_kernels_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert host.main(["--counts"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
