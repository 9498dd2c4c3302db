"""The choice of a backend: in order, explained, and never quietly other than what was asked for."""

from __future__ import annotations

import pytest
import torch

from nspec.kernels.common.backend import OPERATORS, Backend, choose, explain, never
from nspec.kernels.linear_relu_count import linear_relu_count


def test_the_first_backend_that_takes_the_call_is_chosen() -> None:
    picky = Backend("picky", None, lambda size: None if size > 3 else "too small")
    plain = Backend("reference", None, never)
    assert choose("compact_ffn", (picky, plain), 5) is picky
    assert choose("compact_ffn", (picky, plain), 2) is plain


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Backend("picky", None, lambda size: None if size > 3 else "too small")
    backends = (Backend("reference", None, never), picky)
    monkeypatch.setenv("NSPEC_BACKEND", "picky")
    assert choose("compact_ffn", backends, 5) is picky
    with pytest.raises(ValueError, match="compact_ffn cannot take it here: too small"):
        choose("compact_ffn", backends, 2)
    monkeypatch.setenv("NSPEC_BACKEND", "fast")
    with pytest.raises(ValueError, match="asks for 'fast', but linear_relu_count has: reference"):
        linear_relu_count(torch.ones(1, 1), torch.ones(1, 1))


def test_one_operator_can_be_forced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (Backend("reference", None, never),)
    monkeypatch.setenv("NSPEC_BACKEND", "row_sparse_adamw=fast")
    assert choose("compact_ffn", plain).name == "reference"
    with pytest.raises(ValueError, match="row_sparse_adamw has: reference"):
        choose("row_sparse_adamw", plain)
    monkeypatch.setenv("NSPEC_BACKEND", "adamw=fast")
    with pytest.raises(ValueError, match="is not OPERATOR=BACKEND"):
        choose("compact_ffn", plain)


def test_every_operator_explains_itself() -> None:
    rows = explain()
    assert [row[0] for row in rows] == list(OPERATORS)
    assert all(backend != "none" and reason for _, backend, reason in rows)
