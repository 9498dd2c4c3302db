"""The backends that the operators are tested on (all that this machine has), and what their tests share.

A test that computes takes the fixture ``place`` and so runs once per backend. Inputs come from ``draw`` (seeded, on the
backend's device), unusual memory layouts from ``layout``, and ``poison`` fills memory that nobody has written with NaN.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from nspec.kernels.common import gpu, native

sys.path.insert(0, str(Path(__file__).parent))  # active_sets.py, for the tests of the layers


@dataclass(frozen=True)
class Place:
    """Where a test computes: a backend, forced by ``NSPEC_BACKEND``, its device, and what it can take there."""

    operator: str
    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    interpreted: bool

    @property
    def module(self) -> ModuleType:
        """The module that computes."""
        return importlib.import_module(f"nspec.kernels.{self.operator}.{self.backend}")

    @property
    def low(self) -> torch.dtype:
        """A dtype below float32 that it computes in."""
        return torch.bfloat16 if torch.bfloat16 in self.dtypes else torch.float16

    @property
    def offset_devices(self) -> list[str]:
        """Where ``task_offsets`` may lie."""
        return sorted({"cpu", self.device})

    def skip_unless(self, dtype: torch.dtype) -> None:
        """Skips the test where the backend does not compute in ``dtype``."""
        if dtype not in self.dtypes:
            pytest.skip(f"{self.backend} does not take {dtype} here")

    def skip_interpreter(self) -> None:
        """Skips the test where Triton interprets its kernels."""
        if self.interpreted:
            pytest.skip("not in Triton's interpreter, which is slow and has one thread")

    @contextlib.contextmanager
    def may_refuse(self) -> Iterator[None]:
        """Skips the test with the reason where the backend says that it does not take a call (any other error counts)."""
        try:
            yield
        except ValueError as error:
            if f"{self.operator} cannot take it here: " not in str(error):
                raise
            pytest.skip(str(error))


def _place(operator: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    backends = {b.name: b for b in importlib.import_module(f"nspec.kernels.{operator}.op").BACKENDS}
    if name not in backends:
        pytest.skip(f"{operator} has no backend {name}")
    monkeypatch.setenv("NSPEC_BACKEND", f"{operator}={name}")
    if name == "native":
        if (reason := native.why_not()) is not None:
            pytest.skip(reason)
        return Place(operator, name, "cpu", (torch.float32, torch.bfloat16, torch.float16), False)
    if name == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if (reason := gpu.why_not(torch.empty(0, device=device))) is not None:
            pytest.skip(reason)
        # The interpreter multiplies the bit patterns of bfloat16, so there it is tested on a GPU alone.
        low = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)
        return Place(operator, name, device, (torch.float32, *low), device == "cpu")
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return Place(operator, name, "cpu", dtypes, False)


# On a machine with a GPU these are tests of the GPU too, so that `-m gpu` runs them.
_ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=_ON_GPU)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each backend of ``OPERATOR`` of the test's module, else of its fixture ``operator``; skipped where it cannot run."""
    operator = getattr(request.module, "OPERATOR", None) or request.getfixturevalue("operator")
    return _place(operator, request.param, monkeypatch)


@pytest.fixture
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Triton's kernels on a GPU; for tests marked ``gpu``."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return _place(request.module.OPERATOR, "triton", monkeypatch)


@pytest.fixture
def needs_memory() -> Callable[[float], None]:
    """Skips a test on a GPU that has less free memory than so many GiB."""

    def needs(gib: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.1f} are free")

    return needs


@pytest.fixture
def no_waiting() -> Callable[[Callable[[], object]], None]:
    """Calls a function twice, the second time with an error where the host waits for the device."""

    def check(call: Callable[[], object]) -> None:
        call()  # compiles, and uploads what is kept
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return check


@pytest.fixture
def beside_others() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Calls a function again and again on another stream of a busy GPU: its results have the same bits each time."""

    def check(call: Callable[[], Sequence[Tensor]]) -> None:
        once = call()
        side, busy = torch.cuda.Stream(), torch.cuda.Stream()
        noise = torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        for _ in range(50):
            with torch.cuda.stream(busy):
                noise = (noise @ noise).tanh()
            with torch.cuda.stream(side):
                again = call()
                side.synchronize()
            assert all(Compare.same_bits(a, b) for a, b in zip(again, once, strict=True))

    return check


@dataclass(frozen=True)
class Draw:
    """Seeded inputs on one device."""

    device: str

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def integers(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 2) -> Tensor:
        """Integers from -size to size: products and sums are exact in every dtype as long as they stay small."""
        whole = torch.randint(-size, size + 1, shape, generator=self._generator(seed))
        return whole.to(self.device, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Standard normal numbers, rounded to ``dtype``."""
        return torch.randn(shape, generator=self._generator(seed), dtype=torch.float64).to(self.device, dtype)

    def mask(self, *shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
        """Bool, each True with the probability ``share``."""
        return (torch.rand(shape, generator=self._generator(seed)) < share).to(self.device)

    def active(self, d_ff: int, n: int, kind: str = "random", seed: int = 0) -> Tensor:
        """A set of n of d_ff neurons, bool ``[d_ff]``.

        ``kind``: ``random``; ``block``, side by side; ``second``, every second one as far as they go; ``ends``, the first
        and the last ones.
        """
        order = {
            "random": lambda: torch.randperm(d_ff, generator=self._generator(seed)),
            "block": lambda: torch.arange(d_ff).roll(-((d_ff - n) // 2)),
            "second": lambda: torch.cat([torch.arange(1, d_ff, 2), torch.arange(0, d_ff, 2)]),
            "ends": lambda: torch.arange(d_ff).roll(n // 2),
        }[kind]()
        return torch.zeros(d_ff, dtype=torch.bool).index_fill_(0, order[:n], True).to(self.device)

    def sets(self, d_ff: int, share: float, count: int, kind: str = "random", seed: int = 0) -> Tensor:
        """So many sets, the larger the later, up to a share of d_ff: bool ``[count, d_ff]``; see :meth:`active`."""
        most = round(share * d_ff)
        return torch.stack([self.active(d_ff, most * (i + 1) // count, kind, seed + i) for i in range(count)])

    def offsets(self, sizes: Sequence[int], dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
        """``task_offsets`` of tasks with so many tokens."""
        return torch.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)], dtype=dtype, device=device)


@pytest.fixture
def draw(place: Place) -> Draw:
    return Draw(place.device)


def _holding(t: Tensor, buffer: Tensor) -> Tensor:
    return buffer.copy_(t)


def _around(t: Tensor, *shape: int) -> Tensor:
    """New memory in which everything that is not used is NaN (True for bool, -7 for integers).

    In bfloat16 on a CPU it is 96: oneDNN on AMX multiplies what lies after a row by zero, which NaN survives
    (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    fill = float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else -7
    if t.dtype == torch.bfloat16 and t.device.type == "cpu":
        fill = 96.0
    return torch.full(shape, fill, dtype=t.dtype, device=t.device)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second element": lambda t: _holding(t, _around(t, *t.shape[:-1], 2 * t.shape[-1])[..., ::2]),
    "offset by one element": lambda t: _holding(t, _around(t, t.numel() + 2)[1:-1].view(t.shape)),
    "columns of a wider matrix": lambda t: _holding(t, _around(t, *t.shape[:-1], t.shape[-1] + 3)[..., 1:-2]),
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """In turn, each way to lay out the same values in memory; what lies between and around them is NaN."""
    return LAYOUTS[request.param]


@pytest.fixture
def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """All of them, and the plain one, for tests that draw one."""
    return {"plain": lambda t: t, **LAYOUTS}


@contextlib.contextmanager
def _poisoned(*shapes: Sequence[int], device: str = "cpu") -> Iterator[None]:
    # Memory that a kernel gets without PyTorch's help is at least dirty: blocks of these sizes, filled and freed.
    for dtype in (torch.float32, torch.float16):
        blocks = [torch.full(tuple(s), float("nan"), dtype=dtype, device=device) for s in shapes for _ in range(3)]
        del blocks
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # In this mode PyTorch fills every tensor that it makes without values (torch.empty and its relatives, called from
    # Python or C++) with NaN, integers with their largest value.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def poison(place: Place) -> Callable[..., AbstractContextManager[None]]:
    """``with poison(*shapes):`` memory that an operator takes inside holds NaN; the shapes are those of its outputs."""
    return lambda *shapes: _poisoned(*shapes, device=place.device)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of PyTorch's CPU threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def at_once(place: Place) -> Callable[..., None]:
    """Runs functions in a thread each, all at the same time, several times; what one raises, it raises."""
    place.skip_interpreter()

    def run(*calls: Callable[[], None]) -> None:
        together = threading.Barrier(len(calls))

        def repeated(call: Callable[[], None]) -> None:
            together.wait(60)
            for _ in range(10):
                call()

        with ThreadPoolExecutor(len(calls)) as pool:
            for done in [pool.submit(repeated, call) for call in calls]:
                done.result()

    return run


@pytest.fixture
def examples(place: Place) -> Callable[[int], settings]:
    """Settings of hypothesis with so many examples; a tenth of them in the interpreter. The same ones in every run."""

    def limited(n: int) -> settings:
        few = max(2, n // 10) if place.interpreted else n
        slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
        return settings(max_examples=few, deadline=None, derandomize=True, database=None, suppress_health_check=slow)

    return limited


@pytest.fixture
def ran(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of the place's backend, as they are called."""
    names: list[str] = []

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            names.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("forward", "backward", "accumulate", "row_sparse_adamw_"):
        if hasattr(place.module, name):
            monkeypatch.setattr(place.module, name, recorded(name, getattr(place.module, name)))
    return names


class Compare:
    """Comparisons that ``torch.testing`` does not have."""

    @staticmethod
    def same_bits(a: Tensor, b: Tensor) -> bool:
        """Whether both hold the same bytes; NaN equals NaN of the same bits, 0 does not equal -0."""
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        return same_kind and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

    @staticmethod
    def no_worse_than_twice(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        """The error against float64 is at most twice that of PyTorch in the same dtype (in the Frobenius norm).

        An error below a quarter of the dtype's epsilon also passes: the mere rounding of a result costs as much, and
        PyTorch's can be zero by luck.
        """
        exact = exact.double().cpu()
        error, other = ((t.double().cpu() - exact).norm().item() for t in (ours, theirs))
        allowed = max(2 * other, torch.finfo(ours.dtype).eps / 4 * exact.norm().item())
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {other:.3g}, norm {exact.norm().item():.3g}"

    @staticmethod
    def within(name: str, ours: Tensor, exact: Tensor, bound: Tensor) -> None:
        """Each element is within ``bound`` of the exact one."""
        excess = (ours.double().cpu() - exact.double().cpu()).abs() - bound.double().cpu()
        assert not (excess > 0).any(), f"{name}: beyond the bound by {excess.max().item():.3g}"
        assert torch.isfinite(ours).all(), f"{name} is not finite"


@pytest.fixture
def compare() -> type[Compare]:
    return Compare
