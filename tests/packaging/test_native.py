"""The native library: how it is found and refused, and its row-sparse AdamW against PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common import native as library
from nspec.kernels.row_sparse_adamw import native

# eps is large enough to see where it stands in the formula.
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 0.05, "weight_decay": 0.1}
SHAPES = [(7, 33), (64, 512), (40, 1), (13,), (5, 2, 3), (1, 1), (0, 4), (3, 20000)]

built = pytest.mark.skipif(not library.available(), reason=f"native library: {library.why_not()}")


def test_a_missing_library_is_a_reason_that_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSPEC_NATIVE", raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libnspec_cpu.so")
    assert not library.available()
    assert "NSPEC_BUILD_NATIVE=1 pip install" in str(library.why_not())


def test_a_library_that_does_not_load_is_named_with_the_torch_it_was_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSPEC_NATIVE", raising=False)
    path = tmp_path / "libnspec_cpu.so"
    path.write_bytes(b"\x7fELF broken nspec-native-build: torch 2.99.1;\0")
    monkeypatch.setattr(library, "LIBRARY", path)
    reason = str(library.why_not())
    assert f"was built with torch 2.99.1, this is torch {torch.__version__}" in reason
    assert "\n" not in reason


def test_require_raises_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPEC_NATIVE", "require")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libnspec_cpu.so")
    with pytest.raises(RuntimeError, match="NSPEC_NATIVE=require: the native library is not there"):
        library.available()


def test_zero_turns_it_off_and_other_words_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPEC_NATIVE", "0")
    assert library.why_not() == "NSPEC_NATIVE=0"
    with pytest.raises(RuntimeError, match="NSPEC_NATIVE=0"):
        native.row_sparse_adamw_([], [], [], [], [], step=1, **OPTIONS)
    monkeypatch.setenv("NSPEC_NATIVE", "yes")
    with pytest.raises(ValueError, match="must be 0, 1 or require, found 'yes'"):
        library.why_not()


def make(seed: int, density: float | None) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """Params, grads and both moments of all shapes, and active sets (None: every row)."""
    g = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(shape, generator=g) for shape in SHAPES] for _ in range(3)]
    lists.append([torch.rand(shape, generator=g) for shape in SHAPES])
    active = [None if density is None else torch.rand(shape[0], generator=g) < density for shape in SHAPES]
    return lists, active


def copies(lists: list[list[Tensor]], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[t.to(dtype, copy=True) for t in tensors] for tensors in lists]


@built
@pytest.mark.parametrize("density", [None, 0.0, 0.1, 0.5, 0.9, 1.0])
def test_active_rows_follow_torch_adamw_and_the_others_keep_their_bits(density: float | None) -> None:
    before, active = make(1, density)
    params, grads, exp_avgs, exp_avg_sqs = after = copies(before)
    for grad, rows in zip(grads, active):
        if rows is not None:
            grad[~rows] = float("nan")  # what is there must not be read
    assert native.supports(params, grads, exp_avgs, exp_avg_sqs, active) is None
    native.row_sparse_adamw_(params, grads, exp_avgs, exp_avg_sqs, active, step=7, **OPTIONS)

    # PyTorch's own optimiser in float64, all rows, put into the same state.
    expected = copies(before, torch.float64)
    weights = [torch.nn.Parameter(p) for p in expected[0]]
    optimizer = torch.optim.AdamW(weights, foreach=False, **OPTIONS)
    for weight, grad, exp_avg, exp_avg_sq in zip(weights, *expected[1:]):
        weight.grad = grad
        optimizer.state[weight] = {"step": torch.tensor(6.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.step()

    for kind, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for shape, old, new, want, rows in zip(SHAPES, before[kind], after[kind], expected[kind], active):
            rows = torch.ones(shape[0], dtype=torch.bool) if rows is None else rows
            assert torch.equal(new[~rows], old[~rows]), (name, shape)
            torch.testing.assert_close(new[rows].double(), want[rows], rtol=2e-6, atol=1e-6)
            if rows.any():
                assert not torch.equal(new[rows], old[rows]), (name, shape)


@built
@pytest.mark.parametrize("pattern", ["random", "first half", "every second"])
def test_the_number_of_threads_does_not_change_a_bit(pattern: str) -> None:
    rows = torch.zeros(512, dtype=torch.bool)
    if pattern == "random":
        rows = torch.rand(512, generator=torch.Generator().manual_seed(0)) < 0.7
    elif pattern == "first half":
        rows[:256] = True
    else:
        rows[::2] = True
    g = torch.Generator().manual_seed(1)
    before = [[torch.rand(512, 301, generator=g), torch.rand(512, 77, generator=g)] for _ in range(4)]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(copies(before))
            native.row_sparse_adamw_(*results[-1], [rows, None], step=2, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for first, second in zip(results[0], other) for a, b in zip(first, second))


@built
def test_nan_and_infinity_in_active_rows_pass_through() -> None:
    tensors = [[torch.ones(3, 40)] for _ in range(4)]
    tensors[1][0][0] = float("nan")
    tensors[1][0][1] = float("inf")
    native.row_sparse_adamw_(*tensors, [None], step=1, **OPTIONS)
    assert tensors[0][0][0].isnan().all()
    assert tensors[2][0][1].isposinf().all()
    assert tensors[0][0][2].isfinite().all()


@built
def test_autograd_notices_that_a_saved_parameter_was_changed() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    loss = (weight * weight).sum()
    state = [torch.ones(2, 3) for _ in range(3)]
    native.row_sparse_adamw_([weight], *([t] for t in state), [None], step=1, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@built
def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    good = [torch.ones(4, 6) for _ in range(4)]
    rows = torch.ones(4, dtype=torch.bool)

    def reason(place: int, tensor: Tensor) -> str:
        tensors = [*good[:place], tensor, *good[place + 1 :]]
        return str(native.supports(*([t] for t in tensors), [rows]))

    assert native.supports(*([t] for t in good), [rows]) is None
    assert "a param is a Tensor, torch.float64" in reason(0, good[0].double())
    assert "a grad is a Tensor, torch.bfloat16" in reason(1, good[1].bfloat16())
    assert "a grad is a Tensor, torch.float32, torch.sparse_coo" in reason(1, good[1].to_sparse())
    assert "strides (1, 4) for shape [4, 6]" in reason(2, torch.ones(6, 4).t())
    assert "on meta" in reason(3, good[3].to("meta"))
    assert "an active set is torch.uint8" in str(native.supports(*([t] for t in good), [rows.byte()]))


@built
def test_the_operator_itself_checks_what_it_is_given() -> None:
    def call(params: list[Tensor], rows: Tensor | None = None, step: int = 1) -> None:
        others = [[torch.ones(4, 6)] for _ in range(3)]
        native.row_sparse_adamw_(params, *others, [rows], step=step, **OPTIONS)

    with pytest.raises(RuntimeError, match=r"params\[0\] must be a contiguous float32 CPU tensor"):
        call([torch.ones(4, 6, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be a contiguous float32 CPU tensor of .* \(20 elements\)"):
        call([torch.ones(4, 5)])
    with pytest.raises(RuntimeError, match=r"active\[0\] must be a contiguous bool CPU tensor \[4\]"):
        call([torch.ones(4, 6)], torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="five lists must have the same length"):
        call([])
    with pytest.raises(RuntimeError, match="step counts from 1, found 0"):
        call([torch.ones(4, 6)], step=0)
