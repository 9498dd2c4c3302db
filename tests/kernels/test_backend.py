"""The choice of a backend: in order, explained, and never quietly other than what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nspec.kernels.common import gpu
from nspec.kernels.common.backend import OPERATORS, Backend, Choice, choose, explain
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

PICKY = Backend("picky", "math", lambda size: None if size > 3 else "too small")
PLAIN = Backend("reference", "cmath")


def test_the_first_backend_that_takes_the_call_is_chosen() -> None:
    assert choose("compact_ffn", (PICKY, PLAIN), 5).__name__ == "math"
    assert choose("compact_ffn", (PICKY, PLAIN), 2).__name__ == "cmath"


def test_a_backend_that_cannot_be_used_here_is_not_even_imported() -> None:
    absent = Backend("absent", "no.such.module", lambda *_: "not here")
    assert choose("compact_ffn", (absent, PLAIN), 5).__name__ == "cmath"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = (PLAIN, PICKY)
    monkeypatch.setenv("NSPEC_BACKEND", "picky")
    assert choose("compact_ffn", backends, 5).__name__ == "math"
    with pytest.raises(ValueError, match="compact_ffn cannot take it here: too small"):
        choose("compact_ffn", backends, 2)
    monkeypatch.setenv("NSPEC_BACKEND", "fast")
    with pytest.raises(ValueError, match="asks for 'fast', but linear_relu_count has: triton, "):
        linear_relu_count(torch.ones(1, 1), torch.ones(1, 1))


def test_one_operator_can_be_forced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPEC_BACKEND", "row_sparse_adamw=fast")
    assert choose("compact_ffn", (PLAIN,)).__name__ == "cmath"
    with pytest.raises(ValueError, match="row_sparse_adamw has: reference"):
        choose("row_sparse_adamw", (PLAIN,))
    monkeypatch.setenv("NSPEC_BACKEND", "adamw=fast")
    with pytest.raises(ValueError, match="is not OPERATOR=BACKEND"):
        choose("compact_ffn", (PLAIN,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_explains_itself(dtype: torch.dtype) -> None:
    rows = explain("cpu", dtype)
    assert [row.operator for row in rows] == list(OPERATORS)
    assert all(row.backend != "none" and row.reason for row in rows)


def test_explain_answers_for_the_arguments_and_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(operator: Any, *args: Any, **options: Any) -> Choice:
        return operator(*args, **options, explain=True)

    monkeypatch.setenv("NSPEC_BACKEND", "reference")
    one, rows = torch.ones(2, 2), torch.ones(2, dtype=torch.bool)
    why = "asked for by NSPEC_BACKEND"
    assert asked(linear_relu_count, one, one) == Choice("linear_relu_count", "reference", why)
    assert asked(row_sparse_wgrad, one, one, rows).operator == "row_sparse_wgrad"
    assert asked(compact_ffn, one, one, None, one, None, rows).operator == "compact_ffn"
    state = [[torch.ones(2, 2)] for _ in range(4)]
    assert asked(row_sparse_adamw_, *state, [rows], step=1, lr=0.5).backend == "reference"
    assert all((t == 1).all() for ts in state for t in ts)
    monkeypatch.delenv("NSPEC_BACKEND")
    monkeypatch.setenv("NSPEC_NATIVE", "0")
    choice = asked(linear_relu_count, one.double(), one.double())
    assert choice.backend == "reference"
    assert "triton: " in choice.reason
    with pytest.raises(ValueError, match="x has shape"):
        asked(linear_relu_count, one, torch.ones(2, 3))
    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        asked(row_sparse_adamw_, *state, [rows], step=1)


def test_the_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu.why_not(x) == "the tensors are on the CPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter is slow" in str(gpu.why_not(x))
    assert "on meta" in str(gpu.why_not([x.to("meta")], None))
    assert gpu.why_not(None) == "there is no tensor"


def test_a_device_is_asked_for_its_capability_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gpu, "_triton", lambda: None)
    gpu._capability.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.empty(1, device="cuda:0")
        for _ in range(2):
            assert gpu.why_not(x) == "an old one has compute capability (7, 5), below (8, 0)"
    finally:
        gpu._capability.cache_clear()
    assert asked == [0]
