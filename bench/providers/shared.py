"""What every operator's module gives: inputs that rotate, providers, expected results, least work."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from bench.cases import Case

Computes = Literal["active", "all"]
Results = dict[str, Tensor]
Work = tuple[int, int]
"""Floating-point operations, bytes moved."""

ROTATED_BYTES = 2**28
"""Input sets together are at least this large: more than a GPU's cache, and than a core's share of a CPU's."""
CHECK = -1
"""The number of the input set that results are checked on."""
BACKENDS = ("triton", "native", "reference")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error (norm of the difference over norm) of a result that was computed in this dtype."""


@dataclass
class Provider:
    """One way to compute the operator.

    Attributes:
        name: as in the tables.
        call: computes on the input set of that number (modulo how many there are), or on ``CHECK``.
        results: the named results of ``call``'s answer, as far as it has them.
        computes: ``active``, the operator's own result, or ``all``, that for all neurons active, as dense code does.
        ours: whether nspec computes.
        backend: of ours, which one takes the call.
    """

    name: str
    call: Callable[[int], Any]
    results: Callable[[Any], Results]
    computes: Computes = "active"
    ours: bool = False
    backend: str = ""


@dataclass
class Problem:
    """A case with its inputs.

    Attributes:
        case: what was asked for.
        inputs: the arguments of every provider's function, by number of the input set, or for ``CHECK``.
        results: the named results of a function's answer, as far as it has them.
        expected: the results on ``CHECK`` for ``active`` or ``all``, float64.
        work: least work for ``active`` or ``all`` (see each module).
        input_sets: how many sets of inputs rotate.
        providers: the baseline first: what users run today, with the fastest that PyTorch has for it.
        absent: providers that cannot run here, and why.
    """

    case: Case
    inputs: Callable[[int], tuple[Any, ...]]
    results: Callable[[Any], Results]
    expected: Callable[[Computes], Results]
    work: Callable[[Computes], Work]
    input_sets: int
    providers: list[Provider] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def provider(self, name: str, function: Callable[..., Any], computes: Computes = "active", **more: Any) -> Provider:
        """One that calls ``function`` with the inputs."""
        return Provider(name, lambda number: function(*self.inputs(number)), self.results, computes, **more)

    def add(self, name: str, function: Callable[..., Any], computes: Computes = "active") -> None:
        """Adds a provider that calls ``function`` with the inputs."""
        self.providers.append(self.provider(name, function, computes))

    def attempt(self, name: str, function: Callable[..., Any], computes: Computes = "active", said: str = "") -> None:
        """As :meth:`add`, of what an older PyTorch may not have; or the reason why it does not run."""
        one = self.provider(name, function, computes)
        try:
            one.call(0)
        except Exception as error:  # a kind of failure of its own in each version
            self.absent[name] = f"{said}{str(error).strip().splitlines()[0][:200]}"
        else:
            self.providers.append(one)

    def compiled(
        self,
        name: str,
        function: Callable[..., Any],
        computes: Computes = "active",
        of: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda made: made,
    ) -> None:
        """Adds ``of`` what torch.compile makes of ``function``, where the case asks for it."""
        if self.case.compiled:
            made = of(torch.compile(function, dynamic=False))
            self.attempt(f"{name}, compiled", made, computes, "torch.compile: ")

    def ours(self, operator: Callable[..., Any], function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Adds ours: as nspec chooses, then each other backend that takes the call.

        Args:
            operator: says for ``arguments`` and ``options`` with ``explain=True`` what would take the call.
            function: of the inputs, calls it.
            arguments: of the operator.
            options: likewise.
        """
        chosen = operator(*arguments, **options, explain=True).backend
        one = self.provider("ours", function, ours=True, backend=chosen)
        self.providers.append(one)
        for name in BACKENDS:
            if name == chosen or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
                continue  # an interpreter is for tests, and no contender
            try:
                with backend(name):
                    operator(*arguments, **options, explain=True)
            except ValueError:
                continue  # refuses these arguments; `nspec env` says why
            forced = backend(name)(one.call)  # the setting is read at each call of an operator
            self.providers.append(Provider(f"ours: {name}", forced, self.results, ours=True, backend=name))

    def wrong(self) -> dict[str, Exception]:
        """By provider what is wrong with its results, an AssertionError, or what it raised."""
        found: dict[str, Exception] = {}
        expected = functools.cache(self.expected)
        for provider in self.providers:
            right = expected(provider.computes)  # what this raises is no provider's fault
            try:
                results = provider.results(provider.call(CHECK))
                if not results:
                    raise AssertionError(f"{self.case.label}: {provider.name} gives no result to check")
                for name, value in results.items():
                    same(f"{self.case.label}: {name} of {provider.name}", value, right[name], self.case)
            except Exception as error:
                found[provider.name] = error
        return found

    def check(self) -> None:
        """Raises what is wrong with the first provider that is: by how much, and what was expected."""
        for error in self.wrong().values():
            raise error


def same(name: str, found: Tensor, expected: Tensor, case: Case) -> None:
    """Raises AssertionError unless two results agree: integers exactly, floats to the bound of the case's dtype."""
    if found.shape != expected.shape:
        raise AssertionError(f"{name} has shape {list(found.shape)}, expected {list(expected.shape)}")
    if not found.is_floating_point():
        if not torch.equal(found, expected):
            raise AssertionError(f"{name} differs in {int((found != expected).sum())} of {found.numel()} integers")
        return
    bound = BOUNDS[getattr(torch, case.dtype)]
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))
    if not error <= bound:
        raise AssertionError(f"{name} has relative error {error:.2g}, expected at most {bound:.0e}")


@functools.cache
def _drawn() -> Tensor:
    return torch.randn(2**22)


def noise(*shape: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float32; on a CPU four million that are drawn once, from a random place on and repeated.

    The 256 MiB of a case took 0.38 s to draw on two cores, and 0.06 s this way.
    """
    if device.type != "cpu":
        return torch.randn(shape, device=device)
    drawn, place = _drawn(), int(torch.randint(2**22, ()))
    first = drawn[place : place + math.prod(shape)]
    whole, rest = divmod(math.prod(shape) - len(first), 2**22)
    return torch.cat([first, *[drawn] * whole, drawn[:rest]]).view(shape)


def small_integers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random integers from -2 to 2, on which products and sums are exact in every dtype that has 24 bits.

    For checks where a ReLU follows: with biases between two integers no sum comes near 0, where rounding would decide
    whether a neuron fires. Not for timing: a GPU draws less power on such numbers, and is faster.
    """
    return torch.randint(-2, 3, shape, device=device).to(dtype)


def input_sets(bytes_of_one: int) -> int:
    """How many input sets rotate: three at least, sixteen at most."""
    return min(16, max(3, math.ceil(ROTATED_BYTES / max(bytes_of_one, 1))))


def random_sets(tasks: int, d_ff: int, active: int, device: torch.device) -> Tensor:
    """Bool ``[tasks, d_ff]`` with that many active neurons in each row, at random places."""
    order = torch.rand(tasks, d_ff).argsort(dim=1)
    return torch.zeros(tasks, d_ff, dtype=torch.bool).scatter_(1, order[:, :active], True).to(device)


def equal_offsets(tokens: int, tasks: int, device: torch.device) -> Tensor:
    """``task_offsets`` of equally many tokens a task, the last takes what is left over; int64 ``[tasks + 1]``."""
    return torch.tensor([tokens // tasks * t for t in range(tasks)] + [tokens], device=device)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``NSPEC_BACKEND`` as long as the block lasts."""
    with mock.patch.dict(os.environ, NSPEC_BACKEND=name):
        yield
