"""Which backend takes a call, and why.

Each operator declares its backends in order of preference. A backend says of a call either that it takes it or, in words,
why it does not; the first that takes it runs. ``reference`` takes every call and is always the last.

The environment variable ``NSPEC_BACKEND`` forces the choice: one name for every operator (``reference``), or a list
such as ``row_sparse_adamw=native,compact_ffn=reference``. A backend that is asked for by name and cannot take a call is
an error, never a quiet fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OPERATORS = ("linear_relu_count", "row_sparse_wgrad", "compact_ffn", "row_sparse_adamw")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: ``reference``, ``native``, ``triton``.
        implementation: the module or function that computes.
        refuses: called with the operator's arguments; None if the backend takes the call, else the reason in words.
    """

    name: str
    implementation: Any
    refuses: Callable[..., str | None]


def never(*_: Any) -> None:
    """The ``refuses`` of a backend that takes every call."""


def requested(operator: str) -> str:
    """The backend that ``NSPEC_BACKEND`` asks for, or ``auto``.

    Raises:
        ValueError: the variable names an operator that does not exist.
    """
    setting = os.environ.get("NSPEC_BACKEND", "auto").strip() or "auto"
    if "=" not in setting:
        return setting
    choices = {}
    for item in setting.split(","):
        name, _, backend = item.partition("=")
        if name.strip() not in OPERATORS or not backend.strip():
            raise ValueError(
                f"NSPEC_BACKEND={setting!r}: {item!r} is not OPERATOR=BACKEND with OPERATOR in {OPERATORS}"
            )
        choices[name.strip()] = backend.strip()
    return choices.get(operator, "auto")


def choose(operator: str, backends: Sequence[Backend], *args: Any) -> Backend:
    """The backend that computes ``operator(*args)``.

    Raises:
        ValueError: ``NSPEC_BACKEND`` asks for a backend that the operator does not have or that refuses these arguments.
    """
    wanted = requested(operator)
    for backend in backends:
        if wanted in ("auto", backend.name):
            reason = backend.refuses(*args)
            if reason is None:
                return backend
            if wanted == backend.name:
                raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} cannot take it here: {reason}")
    have = ", ".join(backend.name for backend in backends)
    raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} has: {have}")


def explain() -> list[tuple[str, str, str]]:
    """For each operator: its name, the backend that an ordinary float32 call on the CPU takes now, and why."""
    import importlib

    rows = []
    for operator in OPERATORS:
        op = importlib.import_module(f"nspec.kernels.{operator}.op")
        try:
            rows.append((operator, *_explain_one(operator, op.BACKENDS, op.example())))
        except ValueError as error:
            rows.append((operator, "none", str(error)))
    return rows


def _explain_one(operator: str, backends: Sequence[Backend], args: tuple[Any, ...]) -> tuple[str, str]:
    taken = choose(operator, backends, *args)
    passed_over = []
    for backend in backends:
        if backend is taken:
            break
        passed_over.append(f"{backend.name}: {backend.refuses(*args) or 'not asked for'}")
    if requested(operator) != "auto":
        return taken.name, "asked for by NSPEC_BACKEND"
    if passed_over:
        return taken.name, "; ".join(passed_over)
    if len(backends) == 1:
        return taken.name, "the only backend of this operator"
    return taken.name, "preferred, and it takes float32 on the CPU"
