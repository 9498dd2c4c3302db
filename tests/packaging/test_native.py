"""The native library: how it is found, and what it refuses. What it computes is tested in tests/kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common import native as library
from nspec.kernels.row_sparse_adamw import native

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 0.05, "weight_decay": 0.1}

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


@built
def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    good = [torch.ones(4, 6) for _ in range(4)]
    rows = torch.ones(4, dtype=torch.bool)

    def reason(place: int, tensor: Tensor) -> str:
        tensors = [*good[:place], tensor, *good[place + 1 :]]
        return str(native.supports(*([t] for t in tensors), [rows]))

    assert native.supports(*([t] for t in good), [rows]) is None
    assert native.supports([], [], [], [], []) == "there is no tensor"
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
