"""Which backend takes a call, and why.

Each operator declares its backends in order of preference. A backend says of a call either that it takes it or, in words,
why it does not; the first that takes it runs. ``reference`` takes every call and is always the last.

The environment variable ``NSPEC_BACKEND`` forces the choice: one name for every operator (``reference``), or a list
such as ``row_sparse_adamw=native,compact_ffn=reference``. A backend that is asked for by name and cannot take a call is
an error, never a quiet fallback.

``explain=True`` in the call of an operator returns the :class:`Choice` for those arguments instead of computing;
``nspec env`` prints it for ordinary calls on the devices that there are.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .checks import PLAIN

P = ParamSpec("P")
R = TypeVar("R")

OPERATORS = (
    "linear_relu_count",
    "row_sparse_wgrad",
    "compact_ffn",
    "compact_fc1",
    "compact_fc2",
    "gated_activation",
    "neuron_wgrad",
    "write_neurons",
    "row_sparse_adamw",
)


@dataclass(frozen=True)
class Choice:
    """The answer to ``explain=True``: which backend takes a call, and why that one."""

    operator: str
    backend: str
    reason: str


@functools.cache
def _imported(module: str) -> Any:
    return importlib.import_module(module)


def never(*_: Any) -> None:
    """The ``why_not`` of a backend that can be used everywhere."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: ``reference``, ``native``, ``triton``.
        module: where it is, imported when it is first needed: its functions compute, and its ``supports(*args)``, if it
            has one, gives None or the reason why it does not take these arguments.
        why_not: asked first, with the operator's arguments; None, or the reason why the module cannot be used here at
            all (nothing is imported then).
        casts: whether it takes float32 weights beside inputs of 16 bits, casts them itself, and gives their gradients in
            float32.
    """

    name: str
    module: str
    why_not: Callable[..., str | None] = never
    casts: bool = False

    @property
    def implementation(self) -> Any:
        """The module that computes."""
        return _imported(self.module)

    def refuses(self, *args: Any) -> str | None:
        """None if the backend takes the call with these arguments, else the reason in words."""
        reason = self.why_not(*args)
        if reason is not None:
            return reason
        supports = getattr(self.implementation, "supports", None)
        return None if supports is None else supports(*args)


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


def watched() -> bool:
    """Whether something looks at operators: a graph is compiled or traced, or a dispatch mode runs (fake tensors)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def opaque(*tensors: Tensor | None) -> bool:
    """Whether a call has to be one operator of PyTorch's, which costs the host more than the computation's own functions.

    So it is where something looks at operators, a transform of ``torch.func`` runs, or a tensor is of a subclass.
    """
    return (
        watched()
        or torch._C._functorch.maybe_current_level() is not None
        or not all([t is None or type(t) in PLAIN for t in tensors])
    )


class _Answer(Exception):
    """Carries a choice out of an operator that was asked to explain and not to compute."""


_asked: contextvars.ContextVar[bool] = contextvars.ContextVar("nspec_explain", default=False)


def choose(operator: str, backends: Sequence[Backend], *args: Any) -> Any:
    """The module of the backend that computes ``operator(*args)``.

    Raises:
        ValueError: ``NSPEC_BACKEND`` asks for a backend that the operator does not have or that refuses these arguments.
    """
    wanted = requested(operator)
    passed_over: list[str] = []
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        reason = backend.refuses(*args)
        if reason is None:
            if _asked.get():
                raise _Answer(Choice(operator, backend.name, _why(backend, backends, wanted, passed_over)))
            return backend.implementation
        if wanted == backend.name:
            raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} cannot take it here: {reason}")
        passed_over.append(f"{backend.name}: {reason}")
    have = ", ".join(backend.name for backend in backends)
    raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} has: {have}")


def answer(operator: str, name: str, reason: str) -> None:
    """For what an operator computes without a backend: ends the call where it was asked to explain."""
    if _asked.get():
        raise _Answer(Choice(operator, name, reason))


def _why(taken: Backend, backends: Sequence[Backend], wanted: str, passed_over: Sequence[str]) -> str:
    if wanted != "auto":
        return "asked for by NSPEC_BACKEND"
    if passed_over:
        return "; ".join(passed_over)
    return "the only backend of this operator" if len(backends) == 1 else "preferred, and it takes the call"


def explainable(operator: Callable[P, R]) -> Callable[P, R]:
    """Gives a public operator the keyword ``explain``: with True, it returns the :class:`Choice` and does not compute."""

    @functools.wraps(operator)
    def call(*args: Any, explain: bool = False, **kwargs: Any) -> Any:
        if not explain:
            return operator(*args, **kwargs)
        token = _asked.set(True)
        try:
            operator(*args, **kwargs)
        except _Answer as answer:
            return answer.args[0]
        finally:
            _asked.reset(token)
        raise AssertionError(f"{operator.__name__} did not choose a backend")

    return call  # type: ignore[return-value]


def explain(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """For each operator, which backend an ordinary call takes now on that device and in that dtype, and why."""
    rows = []
    for operator in OPERATORS:
        example = importlib.import_module(f"nspec.kernels.{operator}.op").example
        try:
            rows.append(example(torch.device(device), dtype))
        except ValueError as error:
            rows.append(Choice(operator, "none", str(error)))
    return rows
