"""What the experiments of the probe share: sizes, inputs, timing, and launches that are made again."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import timing, trouble
from bench.gpu.predictions import DEVICE, PREDICTIONS, SOURCE
from bench.providers.shared import equal_offsets, random_sets
from bench.report.summary import roof
from bench.rows import Row
from nspec.kernels.common.active import active_index

SAMPLES = 7
NEEDS_GPU = "needs a GPU"
Call = Callable[[], object]


@dataclass(frozen=True)
class Operands:
    """A feed-forward block at one shape and density, for ``tasks`` tasks of equally many tokens.

    ``x, dy [tokens, d]``, ``w1 [d_ff, d]``, ``b1 [d_ff]``, ``w2 [d, d_ff]``, ``b2 [d]``, ``active`` bool ``[d_ff]`` or
    ``[tasks, d_ff]``, ``index [tasks, width]``, ``offsets`` None for one task.
    """

    x: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    dy: Tensor
    active: Tensor
    index: Tensor
    offsets: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated, with ``requires_grad``."""
        return tuple(t.detach().requires_grad_() for t in (self.x, self.w1, self.b1, self.w2, self.b2))


@dataclass
class Lab:
    """Where experiments are made. With ``small`` the sizes are tiny: everything runs, and the times mean nothing."""

    device: torch.device
    small: bool
    limits: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; on a CPU float16, since Triton's interpreter cannot multiply the other."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    @property
    def tokens(self) -> int:
        """Of a batch, those of all tasks together."""
        return 16 if self.small else 16384

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """d_model and d_ff."""
        return {"base": (16, 64), "big": (32, 128)} if self.small else {"base": (512, 2048), "big": (1024, 4096)}

    @property
    def widths(self) -> tuple[int, ...]:
        """Of compact operands; in Transformer-big those of densities 0.3, 0.5, 0.78 and 1."""
        return (64,) if self.small else (1280, 2048, 3200, 4096)

    @property
    def densities(self) -> tuple[float, ...]:
        """Of the sets of active neurons in a block."""
        return (0.5,) if self.small else (0.3, 0.5, 0.78)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Standard normal numbers times ``scale``."""
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def operands(self, shape: str, density: float, tasks: int = 1) -> Operands:
        """Fresh operands of a block."""
        d, d_ff = self.shapes[shape]
        t = self.tokens
        sets = random_sets(tasks, d_ff, round(density * d_ff), self.device)
        offsets = equal_offsets(t, tasks, torch.device("cpu")) if tasks > 1 else None
        weights = (self.normal(d_ff, d, scale=d**-0.5), self.normal(d_ff), self.normal(d, d_ff, scale=d_ff**-0.5))
        return Operands(
            self.normal(t, d), *weights, self.normal(d), self.normal(t, d), sets if tasks > 1 else sets[0],
            active_index(sets), offsets,
        )  # fmt: skip

    def device_microseconds(self, call: Call) -> float:
        """The median of some samples, queued behind a kernel that waits; on a CPU one call, to see that it runs.

        Raises:
            RuntimeError: the call waits for the device.
        """
        numbered = lambda _: call()
        if self.device.type == "cpu":
            return 1e6 * timing.seconds(numbered, self.device)
        call()
        call()
        found = []
        if queue := timing.queue_for(numbered, self.device):
            found = [timing.queued_seconds(numbered, self.device, 0, queue) for _ in range(SAMPLES)]
        if len(known := [value for value in found if value is not None]) < 3:
            raise RuntimeError("the call waits for the device, so its kernels cannot be queued")
        return 1e6 * statistics.median(known)

    def called_microseconds(self, call: Call) -> float:
        """The median as called, over samples of at least 10 ms."""
        numbered = lambda _: call()
        if self.small:
            return 1e6 * timing.seconds(numbered, self.device)
        times = timing.interleaved({"": numbered}, self.device, rounds=SAMPLES, least_seconds=0)
        return 1e6 * statistics.median(times[""])

    def host_microseconds(self, call: Call) -> float:
        """The median of warm calls until they return, on a GPU while it sleeps, so that nothing waits for it."""
        call()
        timing.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda._sleep(2 * 10**8)  # a tenth of a second
        samples = []
        for _ in range(1 if self.small else 8):
            began = time.perf_counter()
            call()
            samples.append(time.perf_counter() - began)
        timing.synchronize(self.device)
        return 1e6 * statistics.median(samples)

    def row(
        self,
        experiment: str,
        name: str,
        microseconds: Callable[[], float],
        *,
        of: str = "device",
        flops: int | None = None,
        moved: int | None = None,
        right: Callable[[], str | None] | None = None,
        note: str = "",
    ) -> Row:
        """One measurement: its time, the share of the roof, what was expected; or why there is none.

        Args:
            experiment: ``E1``, ...
            name: unique in the experiment.
            microseconds: measures.
            of: ``device``, ``host`` or ``as called``.
            flops: of the least work, for the roof.
            moved: bytes that have to be moved at least.
            right: says what is wrong with the result, if anything; called first.
            note: beside it.
        """
        row: Row = {"kind": "probe", "experiment": experiment, "name": name, "of": of, "flops": flops, "bytes": moved}
        row |= {"microseconds": None, "roof_share": None, "note": note, "reason": None, "small": self.small}
        row |= expected(experiment, name)
        try:
            if right is not None and (wrong := right()) is not None:
                return row | {"reason": f"WRONG: {wrong}"}
            times: list[float] = []
            measure = lambda: times.append(microseconds())
            if self.device.type == "cpu":  # whether kernels of Triton were in it, which its interpreter runs
                row["interpreted"] = bool(launches(self.device, measure))
            else:
                measure()
        except Exception as error:
            return row | {"reason": trouble.report(f"{experiment}, {name}", error)}
        row["microseconds"] = round(times[0], 2)
        if of == "device" and not self.small:  # tiny sizes are all start and end
            asked = {"milliseconds": times[0] / 1e3, "dtype": str(self.dtype).removeprefix("torch.")}
            share = roof({**asked, "flops": flops, "bytes": moved}, dict(self.limits))
            row["roof_share"] = None if share is None else round(share[0], 4)
        return row

    def timed(self, experiment: str, name: str, call: Call, **options: Any) -> Row:
        """As :meth:`row`, of a call's time on the device."""
        return self.row(experiment, name, functools.partial(self.device_microseconds, call), **options)

    def absent(self, experiment: str, name: str, reason: str = NEEDS_GPU) -> Row:
        """What cannot be measured here, and is no error."""
        return {"kind": "probe", "experiment": experiment, "name": name, "microseconds": None, "absent": reason}


def expected(experiment: str, name: str) -> Row:
    """The fields of what was predicted of a measurement; none where nothing was."""
    if (said := PREDICTIONS.get((experiment, name))) is None:
        return {}
    fields = {f"expected_{field}": value for field, value in said._asdict().items()}
    return {**fields, "expected_source": SOURCE, "expected_device": DEVICE}


def not_made(experiment: str, done: Collection[str], reason: str, small: bool) -> list[Row]:
    """A row for each measurement of an experiment that was predicted and is not among those done."""
    common: Row = {"kind": "probe", "experiment": experiment, "microseconds": None, "reason": reason, "small": small}
    names = [name for one, name in PREDICTIONS if one == experiment and name not in done]
    return [{**common, "name": name, **expected(experiment, name)} for name in names]


def forget(*modules: ModuleType) -> None:
    """Clears what functions of these modules have kept, so that the next call chooses its kernels anew."""
    for module in modules:
        for function in vars(module).values():
            if callable(getattr(function, "cache_clear", None)):
                function.cache_clear()


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, as it was launched on a device."""

    device: torch.device
    launcher: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        """That of the kernel."""
        kernel = self.launcher.kernel
        return str(getattr(kernel, "fn", kernel).__name__)

    @property
    def moved(self) -> int:
        """Bytes of all tensors that it is given."""
        tensors = {t.data_ptr(): t for t in self.args if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def argument(self, name: str) -> Any:
        """One of its arguments.

        Raises:
            ValueError: the kernel has none of that name.
        """
        return self.args[self.launcher.kernel.arg_names.index(name)]

    def again(self, grid: tuple[int, int, int] | None = None, **keywords: Any) -> Call:
        """A call that makes the launch again, with another grid or other constants and options of the compiler.

        Raises:
            ValueError: the kernel has no such keyword.
        """
        launch = backend("triton_launch")
        if unknown := set(keywords) - set(self.launcher.keywords):
            raise ValueError(f"{self.name} is launched without {', '.join(sorted(unknown))}")
        launcher = launch.Launcher(self.launcher.kernel, {**self.launcher.keywords, **keywords})
        return functools.partial(launch.launching, self.device, launcher, grid or self.grid, *self.args)


def launches(device: torch.device, call: Call) -> list[Launch]:
    """The launches that a call makes, in order."""
    found: list[Launch] = []
    of_all = backend("triton_launch").Launcher
    real = of_all.__call__

    def recorded(launcher: Any, grid: tuple[int, int, int], *args: Any) -> None:
        found.append(Launch(device, launcher, grid, args))
        real(launcher, grid, *args)

    with mock.patch.object(of_all, "__call__", recorded):
        call()
    return found


def backend(operator: str) -> ModuleType:
    """The Triton backend of an operator, or the module of ``common`` of that name."""
    within = f"common.{operator}" if operator.startswith("triton_") else f"{operator}.triton"
    return importlib.import_module(f"nspec.kernels.{within}")


def off_by(found: Tensor, exact: Tensor, bound: float = 1e-2) -> str | None:
    """What is wrong where the relative error (norm of the difference over norm) is above ``bound``."""
    error = float((found.float() - exact.float()).norm() / exact.float().norm())
    return None if error <= bound else f"relative error {error:.2g}, expected at most {bound:g}"
