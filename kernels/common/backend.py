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

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import gpu, native
from .checks import PLAIN
from .derivatives import transformed

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


PREFERRED = "preferred, and it takes the call"
TORCH_FUNC = "torch.func knows the derivatives of PyTorch's operations only"


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


def standard(package: str, casts: bool = False) -> tuple[Backend, ...]:
    """The backends of most operators, by the package of the operator; ``casts``: of Triton's."""
    return (
        Backend("triton", f"{package}.triton", gpu.why_not, casts=casts),
        Backend("native", f"{package}.native", native.why_not),
        Backend("reference", f"{package}.reference"),
    )


def torch_operator(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``nspec::name`` of PyTorch: what it computes, and the shapes of that for a compiler."""
    operator = torch.library.custom_op(f"nspec::{name}", compute, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


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


def choose(operator: str, backends: Sequence[Backend], *args: Any) -> Any:
    """The module of the backend that computes ``operator(*args)``.

    Raises:
        ValueError: ``NSPEC_BACKEND`` asks for a backend that the operator does not have or that refuses these arguments.
    """
    return _taken(operator, backends, requested(operator), args)[0].implementation


def explained(operator: str, backends: Sequence[Backend], *args: Any) -> Choice:
    """What :func:`choose` takes for these arguments, and why; raises as it does."""
    wanted = requested(operator)
    taken, passed_over = _taken(operator, backends, wanted, args)
    alone = "the only backend of this operator" if len(backends) == 1 else PREFERRED
    why = "asked for by NSPEC_BACKEND" if wanted != "auto" else "; ".join(passed_over) or alone
    return Choice(operator, taken.name, why)


def _taken(operator: str, backends: Sequence[Backend], wanted: str, args: Sequence[Any]) -> tuple[Backend, list[str]]:
    """The backend that takes a call, and why those before it do not."""
    passed_over: list[str] = []
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        reason = backend.refuses(*args)
        if reason is None:
            return backend, passed_over
        if wanted == backend.name:
            raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} cannot take it here: {reason}")
        passed_over.append(f"{backend.name}: {reason}")
    have = ", ".join(backend.name for backend in backends)
    raise ValueError(f"NSPEC_BACKEND asks for {wanted!r}, but {operator} has: {have}")


def by_torch(operator: str) -> bool:
    """Whether a call is computed from PyTorch's operations, since ``torch.func`` knows the derivatives of these alone."""
    return requested(operator) == "auto" and not torch.compiler.is_compiling() and transformed()


def explainable(
    operator: str, backends: Sequence[Backend], prepare: Callable[..., Any], composed: str | None = "reference"
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives a public operator the keyword ``explain``: with True, it returns the :class:`Choice` and does not compute.

    Args:
        operator: its name.
        backends: as for :func:`choose`.
        prepare: checks the operator's arguments and gives those of its backends, or the choice itself.
        composed: what computes where :func:`by_torch` says so; None: no such thing.
    """

    def decorate(compute: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(compute)

        @functools.wraps(compute)
        def call(*args: Any, explain: bool = False, **kwargs: Any) -> Any:
            if not explain:
                return compute(*args, **kwargs)
            signature.bind(*args, **kwargs)  # a call that could not compute is not explained
            prepared = prepare(*args, **kwargs)
            if isinstance(prepared, Choice):
                return prepared
            if composed is not None and by_torch(operator):
                return Choice(operator, composed, TORCH_FUNC)
            return explained(operator, backends, *prepared)

        return call  # type: ignore[return-value]

    return decorate


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
