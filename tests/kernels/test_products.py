"""Every product of the compact operators gives the same whether the library computes it or a kernel of our own."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common import checks, products
from nspec.kernels.common.active import active_index
from nspec.kernels.common.products import HOST, LIBRARY, NEVER, ONE_TASK, by_library

SIZES = (0, 33, 7, 30)  # tokens of each task
ACTIVE = {"one task": (70,), "several tasks": (70, 40, 0, 100), "in place": (70, 40, 0, 149)}  # of 150 neurons


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes every product."""
    for rule in (products.LIBRARY, products.LIBRARY_FLOAT32):
        for product in rule:
            monkeypatch.setitem(rule, product, request.param)
    return request.param


def module(operator: str) -> ModuleType:
    """The Triton backend of an operator; the products that they share."""
    pytest.importorskip("triton")
    gpu = importlib.import_module("nspec.kernels.common.gpu")
    if not torch.cuda.is_available() and not gpu.interpreted():
        pytest.skip("there is neither a GPU nor Triton's interpreter")
    file = "triton_products" if operator == "common" else "triton"
    return importlib.import_module(f"nspec.kernels.{operator}.{file}")


# On a machine with a GPU they are tests of the GPU, which `-m gpu` runs.
_ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(params=[pytest.param(name, marks=_ON_GPU) for name in ACTIVE])
def call(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Operands of integers, exact in float16, with their sets and offsets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = ACTIVE[request.param]
    several = len(counts) > 1
    active = torch.stack([torch.rand(150, generator=torch.Generator().manual_seed(n)).argsort() < n for n in counts])
    index = active_index(active.to(device))

    def integers(*shape: int, seed: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.float16)

    return {
        "index": index,
        "task_offsets": torch.tensor([0, *SIZES]).cumsum(0) if several else None,
        "x": integers(70, 24, seed=0),
        "dy": integers(70, 16, seed=1),
        "dh": integers(70, 150, seed=2),
        "w1": integers(150, 24, seed=3),
        "b1": integers(150, seed=4),
        "w2": integers(16, 150, seed=5) * (integers(16, 150, seed=6) > 0),
        "b2": integers(16, seed=7),
    }


def ffn(backend: ModuleType, call: dict[str, Any], dtype: torch.dtype, keep: int | None = None) -> list[Tensor]:
    """Output, activations and gradients; the backward pass gets the first ``keep`` of what the forward pass kept."""
    x, w1, b1, w2, b2, dy = (call[name].to(dtype) for name in ("x", "w1", "b1", "w2", "b2", "dy"))
    where = (call["index"], call["task_offsets"])
    y, kept = backend.forward(x, w1, b1, w2, b2, *where)
    return [y, kept[0], *backend.backward(dy, x, w1, b1, w2, *where, *kept[:keep])]


@pytest.mark.parametrize("way", [NEVER, ONE_TASK, HOST], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compact_ffn_is_exact_on_integers_either_way(
    way: str, call: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, shared = module("compact_ffn"), module("common")
    several = call["task_offsets"] is not None
    library, ours = [], []
    multiply, launch = shared._multiply, backend.Launcher.__call__
    monkeypatch.setattr(shared, "_multiply", lambda *a: (library.append(1), multiply(*a)))
    monkeypatch.setattr(backend.Launcher, "__call__", lambda self, *a: (ours.append(self.kernel), launch(self, *a)))
    got = ffn(backend, call, dtype)
    want = ffn(importlib.import_module("nspec.kernels.compact_ffn.reference"), call, torch.float64)
    for name, a, b in zip(("y", "h", "dx", "dw1", "db1", "dw2", "db2"), got, want):
        assert b.abs().max() <= 2048, name  # so that float16 holds every sum
        assert torch.equal(a.double(), b), name
    for a, b in zip(got, ffn(backend, call, dtype, keep=1)):  # as a compiled graph does, which keeps the activations
        assert torch.equal(a, b)
    own = sum(kernel in (backend.to_neurons_kernel, shared.from_neurons_kernel) for kernel in ours)
    by_them = way == HOST or (way == ONE_TASK and not several)
    # h, y, dh and dx, twice: one launch each, or one call of the library for each task.
    assert (own, len(library)) == ((0, 8 * (len(SIZES) if several else 1)) if by_them else (8, 0))


@pytest.mark.parametrize("way", [NEVER, ONE_TASK, HOST], indirect=True)
@pytest.mark.parametrize("tma", [True, False])
def test_row_sparse_wgrad_is_exact_on_integers_either_way(
    way: str, call: dict[str, Any], tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = module("row_sparse_wgrad")
    if not torch.cuda.is_available():
        monkeypatch.setattr(module("common"), "has_tma", lambda target: tma)
    where = (call["index"], call["task_offsets"])
    reference = importlib.import_module("nspec.kernels.row_sparse_wgrad.reference")
    want = reference.forward(call["dh"].double(), call["x"].double(), *where)
    for got, exact in zip(backend.forward(call["dh"], call["x"], *where), want):
        assert torch.equal(got.double(), exact)
    total, exact_total = torch.ones(150, 24, device=call["x"].device), torch.ones(150, 24, device=call["x"].device)
    backend.accumulate(total, call["dh"], call["x"], *where)
    reference.accumulate(exact_total, call["dh"], call["x"], *where)
    assert torch.equal(total, exact_total)


@pytest.mark.parametrize("way", [NEVER], indirect=True)
@pytest.mark.parametrize("call", ["several tasks", "in place"], indirect=True)
@pytest.mark.parametrize("tma", [True, False])
def test_row_sparse_wgrad_is_exact_where_the_next_task_has_nan(
    way: str, call: dict[str, Any], tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = module("row_sparse_wgrad")
    if not torch.cuda.is_available():
        monkeypatch.setattr(module("common"), "has_tma", lambda target: tma)
    where, last = (call["index"], call["task_offsets"]), 70 - SIZES[-1]
    reference = importlib.import_module("nspec.kernels.row_sparse_wgrad.reference")
    clean, dh = call["dh"].double(), call["dh"].clone()
    clean[last:], dh[last:] = 0, float("nan")
    sets = [set(row[row >= 0].tolist()) for row in call["index"].cpu()]
    rows = sorted((sets[0] | sets[1]) - sets[-1])
    got, want = backend.forward(dh, call["x"], *where)[0], reference.forward(clean, call["x"].double(), *where)[0]
    assert rows
    assert torch.equal(got[rows].double(), want[rows])


WRONG = {  # offsets of 70 tokens, and what the kernels make of their lower 32 bits
    "outside the tokens": ([5, 40, 2**31 - 1, -3, 71], [0, 40, 70, 70, 70]),
    "falling": ([0, 70, 0, 70, 3], [0, 70, 70, 70, 70]),
    "negative": ([-9, 2**40 - 1, 33, 2**40, 10**6], [0, 0, 33, 33, 70]),
}


@pytest.mark.parametrize("way", [NEVER], indirect=True)
@pytest.mark.parametrize("call", [pytest.param("several tasks", marks=_ON_GPU)], indirect=True)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_offsets_on_a_device_lead_nowhere_outside_the_tensors(
    way: str, call: dict[str, Any], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, taken = (torch.tensor(offsets) for offsets in WRONG[wrong])
    right, call = call | {"task_offsets": taken}, call | {"task_offsets": given.to(call["x"].device)}
    block = ffn(importlib.import_module("nspec.kernels.compact_ffn.reference"), right, torch.float64)
    operands = call["dh"], call["x"], call["index"]
    wgrad = importlib.import_module("nspec.kernels.row_sparse_wgrad.reference")
    exact = wgrad.forward(operands[0].double(), operands[1].double(), operands[2], taken)
    monkeypatch.setattr(checks, "segments", lambda *_: None)  # on a device, nobody looks
    for got, want in zip(ffn(module("compact_ffn"), call, torch.float32), block, strict=True):
        assert torch.equal(got.double(), want)
    for got, want in zip(module("row_sparse_wgrad").forward(*operands, call["task_offsets"]), exact, strict=True):
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:90", "cuda:100", "hip:gfx942", "interpreter"])
def test_a_step_over_the_neurons_stays_within_a_task(target: str) -> None:
    shared = module("common")
    for dtype, precise in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        assert shared.WIDTH_MULTIPLE % shared.features_tile(target, dtype, precise).k == 0


def test_several_tasks_go_to_the_library_only_where_their_offsets_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    on_cpu, on_device = torch.tensor([0, 3, 4]), torch.tensor([0, 3, 4], device="meta")
    for rule, one, several in ((NEVER, False, False), (ONE_TASK, True, False), (HOST, True, True)):
        monkeypatch.setitem(LIBRARY, "dw", rule)
        assert by_library("dw", torch.float16, None) is one
        assert by_library("dw", torch.float16, torch.tensor([0, 4])) is one
        assert by_library("dw", torch.float16, on_cpu) is several
        assert by_library("dw", torch.float16, on_device) is False
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert by_library("dw", torch.float16, None) is False
    assert by_library("y", torch.float16, None) is True


@pytest.mark.parametrize(("tiles", "chunk"), [(40, 5504), (64, 8192), (132, 16384), (1000, 16384)])
def test_tokens_are_cut_into_chunks_that_fill_the_device(tiles: int, chunk: int) -> None:
    backend = module("common")
    # 132 processors and tiles of 128 x 256: what they need is in whole steps of 64 tokens.
    assert backend.chunk_of(backend.Tasks(16384, 1, None), tiles, 132, 64) == chunk


def test_many_small_tasks_are_not_cut() -> None:
    backend = module("common")
    assert backend.chunk_of(backend.Tasks(100, 40, None), 1, 132, 64) == 64
