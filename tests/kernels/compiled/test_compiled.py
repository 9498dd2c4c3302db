"""What the compiler makes of every Triton kernel, for every target, without a GPU: rules, and figures that were looked at.

The rules hold for every version of Triton. The figures are compared with ``snapshots/`` where there are some of the
version at hand; ``compile_all.py --update`` writes them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

FOLDER = Path(__file__).resolve().parent
# Bytes that one program may have on the smallest device of the target.
SHARED = {"cuda:80": 166912, "cuda:86": 101376, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}
# Sums along the accumulator's rows: on 8.0 its rows lie across four threads and across warps, from 9.0 on within a warp.
SHUFFLES = {"cuda:80": 40, "cuda:86": 40, "cuda:90": 16, "cuda:100": 16, "hip:gfx942": 16}
INSTRUCTION = {"cuda:80": "HMMA", "cuda:86": "HMMA", "cuda:90": "HGMMA", "cuda:100": "UTC", "hip:gfx942": "v_mfma"}
# Whether kernels that others cover are compiled for every target, not for two alone (see compile_all.py).
COVERED = os.environ.get("NSPEC_COMPILE_COVERED") == "1"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Figures by target and kernel."""
    covered = ["--covered"] if COVERED else []
    run = subprocess.run([sys.executable, FOLDER / "compile_all.py", *covered], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture(params=SHARED)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(compiled: dict[str, dict[str, Any]], target: str) -> dict[str, Any]:
    """The kernels of the target that compile."""
    return {name: found for name, found in compiled[target].items() if "error" not in found}


def expecting(kernels: dict[str, Any], *expect: str) -> dict[str, Any]:
    """Those of which one of these is expected; there has to be one."""
    found = {name: kernel for name, kernel in kernels.items() if set(expect) & set(kernel["expect"])}
    assert found, f"no kernel says {expect}"
    return found


def bits(counts: dict[str, int], what: str) -> set[int]:
    """Widths in bits of the ``load``, ``copy`` or ``store`` in the counts."""
    return {int(name[len(what) :]) for name in counts if name.startswith(what) and name[len(what) :].isdigit()}


def test_every_kernel_compiles(compiled: dict[str, dict[str, Any]], target: str) -> None:
    assert {name: found["error"] for name, found in compiled[target].items() if "error" in found} == {}


def test_every_kernel_is_launched_on_every_target(target: str) -> None:
    # In a process of its own: Triton must not interpret.
    script = "import record, sys; print(*record.defined() - {one.function for one in record.recorded(sys.argv[1])})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, target]
    run = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == []


def test_nothing_spills(kernels: dict[str, Any]) -> None:
    # Scalar registers of AMD spill into lanes of vector registers, not into memory: counted in the snapshot alone.
    where = ("spill", "stack", "local", "vgpr_spill_count")
    spilt = {name: {key: found[key] for key in where if found.get(key)} for name, found in kernels.items()}
    assert {name: counts for name, counts in spilt.items() if counts} == {}


def test_shared_memory_suffices(kernels: dict[str, Any], target: str) -> None:
    assert {name: kernel["shared"] for name, kernel in kernels.items() if kernel["shared"] > SHARED[target]} == {}


def test_16_bit_products_use_tensor_cores(kernels: dict[str, Any], target: str) -> None:
    for name, kernel in expecting(kernels, "product16").items():
        assert kernel.get("tensor_core", 0) > 0, name
        assert kernel["loop"] is not None, f"{name}: no loop has matrix instructions"
        # The instructions of an older device also run on a newer one, slowly.
        assert all(matrix.startswith(INSTRUCTION[target]) for matrix in kernel["matrix"]), f"{name}: {kernel['matrix']}"


def test_main_loops_move_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    products = expecting(kernels, "product16")
    assert {name: k["loop"] for name, k in products.items() if bits(k["loop"], "load") & {8, 16}} == {}
    assert {name: k for name, k in products.items() if not bits(k, "copy") <= {128}} == {}
    wide = ("tma_load", "copy128", "load128")
    assert {name: k["loop"] for name, k in products.items() if not any(k["loop"].get(key) for key in wide)} == {}


def test_32_bit_products_do_not_move_single_elements(kernels: dict[str, Any]) -> None:
    # Their small tiles have as little as 8 bytes for each thread.
    products = expecting(kernels, "product32")
    assert {name: k for name, k in products.items() if not bits(k, "copy") <= {64, 128}} == {}
    wide = ("tma_load", "copy64", "copy128", "load64", "load128")
    assert {name: k for name, k in products.items() if not any(k.get(key) for key in wide)} == {}


def test_counts_are_summed_within_threads(kernels: dict[str, Any], target: str) -> None:
    for name, kernel in expecting(kernels, "count").items():
        assert kernel.get("shuffle", 0) <= SHUFFLES[target], f"{name}: {kernel}"


def test_streaming_kernels_move_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    # Bytes are the active set, 32 and 64 bits the tables: a few a thread, whatever the number of elements.
    for name, kernel in expecting(kernels, "stream").items():
        assert bits(kernel, "store") == {128}, f"{name}: {kernel}"
        assert 128 in bits(kernel, "load"), f"{name}: {kernel}"
        assert 16 not in bits(kernel, "load"), f"{name}: {kernel}"
        assert kernel.get("load32", 0) <= 2, f"{name}: {kernel}"


def test_adamw_rounds_every_operation(kernels: dict[str, Any], target: str) -> None:
    if target.startswith("hip"):
        pytest.skip("AMD's machine code divides with fused operations, so they cannot be told apart")
    for name, kernel in expecting(kernels, "unfused").items():
        assert kernel["fused"] == 0, f"{name}: {kernel['fused']} fused multiply-adds in PTX"


def test_figures_are_those_that_were_looked_at(compiled: dict[str, dict[str, Any]]) -> None:
    version = importlib.import_module("triton").__version__.split("+")[0]
    path = FOLDER / "snapshots" / f"triton-{version}.json"
    if not path.exists():
        pytest.skip(f"no figures of Triton {version} are kept: only the rules were checked")
    kept = json.loads(path.read_text())
    for found in (one for figures in (kept, compiled) for kernels in figures.values() for one in kernels.values()):
        found.pop("code", None)  # what the figures are of, and no figure
    if COVERED:  # the snapshot has not all of them
        compiled = {t: {n: f for n, f in kernels.items() if n in kept[t]} for t, kernels in compiled.items()}
    changed = {
        f"{target}/{name}": (kept.get(target, {}).get(name), compiled.get(target, {}).get(name))
        for target in {*kept, *compiled}
        for name in {*kept.get(target, {}), *compiled.get(target, {})}
        if kept.get(target, {}).get(name) != compiled.get(target, {}).get(name)
    }
    assert changed == {}, "if it is meant: python tests/kernels/compiled/compile_all.py --update"
