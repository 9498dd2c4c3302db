"""What the GPU path costs the host: launches, library products, other kernels, and microseconds of Python. Needs no GPU.

    python -m bench.host                           # the table; -v names the kernels
    python -m bench.host --only compact_ffn        # rows whose name contains this
    python -m bench.host --profile compact_ffn     # where the time of one row goes, by function
    python -m bench.host --counts                  # the counts as tests/bench/test_host.py holds them

A kernel that is launched late leaves the GPU idle: small shapes run as fast as the host calls. Here that part runs alone,
on one CPU thread, with a GPU that computes nothing (:mod:`bench.fake_gpu`), for ours and for PyTorch's dense block alike. The microseconds
are of this core, without the driver's calls (a few more per launch, product and kernel), so read the ratio to the dense
block, which is measured in turn with each row, and the counts, which are exact.

Shapes are the smallest that go the way of large ones: a compact layout, whole blocks, several tiles of nothing. float16
stands for both 16-bit dtypes. What depends on the size alone is not seen (choosing the chunks of the tokens of several
tasks, 8 candidates instead of one).
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import functools
import io
import pstats
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.fake_gpu import PRODUCTS, FakeGpu, install
from bench.machine import device_name
from bench.rows import Row, Writer
from bench.timing import interleaved, paired, spread

CPU = torch.device("cpu")
BATCH, LENGTH, D_MODEL, D_FF, ACTIVE = 3, 8, 16, 128, 50
"""Sentences, tokens of each, and the block; active neurons of a task: 64 columns when packed."""
MATRICES = 12
"""In a step of AdamW."""

DTYPES = {"float16": torch.float16, "float32": torch.float32}
DENSE, DENSE_AUTOCAST = "dense block", "dense block, autocast"

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view")

Call = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One row: what is called, and the dense block that it is compared with."""

    call: Call
    baseline: str = DENSE


@dataclass(frozen=True)
class Counts:
    """What a call puts on the GPU."""

    launches: list[str]
    products: list[str]
    kernels: Counter[str]

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Triton launches, library products, other kernels of PyTorch."""
        return len(self.launches), len(self.products), self.kernels.total()


class _Kernels(TorchDispatchMode):
    """Counts the operations of PyTorch that launch a kernel: all but views, allocations and products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":  # an operator of ours: what is inside it is counted
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[f"{func.namespace}::{func._opname}"]._init_fn(*args, **(kwargs or {}))
        with self:  # inside an operator of ours those that are made of others arrive whole
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.removeprefix("aten::")
        overload = name if func._overloadname == "default" else f"{name}.{func._overloadname}"
        if not func.is_view and name not in _ALLOCATIONS and overload not in PRODUCTS:
            self.found[overload] += 1
        return func(*args, **(kwargs or {}))


def counts(call: Call, fake: FakeGpu) -> Counts:
    """What one call puts on the GPU; compiles what it needs.

    Raises:
        RuntimeError: the call takes another path while it is watched.
    """
    call()
    fake.take()
    call()
    plain = fake.take()
    with _Kernels() as kernels:
        call()
    if (watched := fake.take()) != plain:
        raise RuntimeError(f"launches and products are {watched} while kernels are counted and {plain} else")
    return Counts(*plain, kernels.found)


def rows(dtype: torch.dtype) -> dict[str, Measured]:
    """Everything that is measured, by name; a bare name is forward and backward pass of one task."""
    return {**_dense(dtype), **_operators(dtype), **_blocks(dtype)}


def _made(dtype: torch.dtype) -> Callable[..., Tensor]:
    return functools.partial(torch.rand, dtype=dtype, generator=torch.Generator().manual_seed(0))


def _active() -> Tensor:
    """bool ``[3, d_ff]``, the sets of three tasks."""
    noise = torch.rand(BATCH, D_FF, generator=torch.Generator().manual_seed(0))
    return noise.argsort(1) < ACTIVE


def _passes(name: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor], gradient: Tensor) -> dict[str, Measured]:
    """Both passes, and each alone; the backward pass always of the same graph."""
    held: list[Tensor] = []

    def backward() -> object:
        if not held:
            held.append(forward())
        return torch.autograd.grad(held[0], leaves, gradient, retain_graph=True)

    return {
        name: Measured(lambda: torch.autograd.grad(forward(), leaves, gradient)),
        f"{name}, forward": Measured(forward),
        f"{name}, backward": Measured(backward),
    }


def _operators(dtype: torch.dtype) -> dict[str, Measured]:
    from nspec.kernels.common.active import active_index
    from nspec.kernels.compact_ffn import compact_ffn
    from nspec.kernels.linear_relu_count import linear_relu_count
    from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
    from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

    make, tokens = _made(dtype), BATCH * LENGTH
    x, dy, dh = make(tokens, D_MODEL), make(tokens, D_MODEL), make(tokens, D_FF)
    weights = make(D_FF, D_MODEL), make(D_FF), make(D_MODEL, D_FF), make(D_MODEL)
    total = torch.zeros(D_FF, D_MODEL)
    leaves = [tensor.requires_grad_() for tensor in (x.clone(), *weights)]
    sets, found = _active(), {}
    for label, active, offsets in (("", sets[0], None), (", 3 tasks", sets, torch.arange(BATCH + 1) * LENGTH)):
        options: dict[str, Any] = {"index": active_index(active), "task_offsets": offsets}
        count = functools.partial(linear_relu_count, *leaves[:3], task_offsets=offsets)
        block = functools.partial(compact_ffn, *leaves, active, **options)
        found |= _passes(f"linear_relu_count{label}", lambda count=count: count()[0], leaves[:3], dh)
        wgrad = functools.partial(row_sparse_wgrad, dh, x, active, **options)
        found[f"row_sparse_wgrad{label}"] = Measured(wgrad)
        found[f"row_sparse_wgrad{label}, added"] = Measured(functools.partial(wgrad, add_to=total))
        found |= _passes(f"compact_ffn{label}", block, leaves, dy)
    lists = [[torch.rand(D_FF, D_MODEL) for _ in range(MATRICES)] for _ in range(4)]
    step = functools.partial(row_sparse_adamw_, *lists, [sets[0]] * MATRICES, step=1, lr=1e-3)
    found[f"row_sparse_adamw_, {MATRICES} matrices"] = Measured(step)
    return found


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(), nn.Linear(D_FF, D_MODEL))


def _step(model: nn.Module, dtype: torch.dtype, autocast: bool) -> Call:
    """Forward and backward pass, gradients fresh, of the input too: it is the layer before that makes it."""
    make = _made(torch.float32 if autocast else dtype)
    x, dy = make(BATCH, LENGTH, D_MODEL).requires_grad_(), _made(dtype)(BATCH, LENGTH, D_MODEL)
    model.to(x.dtype)
    tensors = [x, *model.parameters()]

    def call() -> None:
        for tensor in tensors:
            tensor.grad = None
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = model(x)
        y.backward(dy)

    return call


def _dense(dtype: torch.dtype) -> dict[str, Measured]:
    found = {DENSE: Measured(_step(_model(), dtype, False))}
    if dtype != torch.float32:
        found[DENSE_AUTOCAST] = Measured(_step(_model(), dtype, True), DENSE_AUTOCAST)
    return found


def _blocks(dtype: torch.dtype) -> dict[str, Measured]:
    import nspec
    from nspec.nn.masked_linear import MODES

    masks = nspec.NeuronMasks({"task": {"0": _active()[0]}})
    found = {}
    for mode in MODES:
        for autocast in (False, True) if dtype != torch.float32 else (False,):
            model = nspec.specialize(copy.deepcopy(_model()), masks, mode=mode)
            nspec.set_task(model, "task")
            name = f"block in mode {mode}{', autocast' if autocast else ''}"
            found[name] = Measured(_step(model, dtype, autocast), DENSE_AUTOCAST if autocast else DENSE)
    return found


def measure(name: str, row: Measured, baseline: Measured, fake: FakeGpu, rounds: int) -> Row:
    """Counts and times one row, in turn with its baseline."""
    counted = counts(row.call, fake)
    calls = {"row": lambda _: row.call(), "baseline": lambda _: baseline.call()}
    times = interleaved(calls, CPU, rounds=rounds, least_seconds=0.0, warmup=20)
    microseconds = spread([1e6 * value for value in times["row"]])
    ratio = paired(times["row"], times["baseline"])
    launches, products, kernels = counted.numbers
    return {
        "kind": "host",
        "name": name,
        "launches": launches,
        "products": products,
        "kernels": kernels,
        "names": {
            "launches": dict(Counter(counted.launches)),
            "products": dict(Counter(counted.products)),
            "kernels": dict(counted.kernels),
        },
        "rounds": rounds,
        "microseconds": round(microseconds.median, 1),
        "microseconds_low": round(microseconds.low, 1),
        "microseconds_high": round(microseconds.high, 1),
        "baseline": row.baseline,
        "ratio": round(ratio.median, 3),
        "ratio_low": round(ratio.low, 3),
        "ratio_high": round(ratio.high, 3),
    }


def show(row: Row, names: bool) -> None:
    """Prints one row."""
    ratio = f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    numbers = f"{row['launches']:8} {row['products']:9} {row['kernels']:8} {row['microseconds']:8.0f}"
    print(f"{row['name']:<32} {numbers}  {ratio}", flush=True)
    if names:
        for kind, found in row["names"].items():
            if found:
                print(f"    {kind}: " + ", ".join(f"{n} {name}" for name, n in sorted(found.items())))


def profile(call: Call, calls: int) -> str:
    """Where the time of a row goes, by function, its own time first."""
    for _ in range(20):
        call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(30)
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 2 where the GPU path cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300, help="of each row and the dense block (default: 300)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="(default: float16)")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name contains this")
    parser.add_argument("-v", "--names", action="store_true", help="name what is counted")
    parser.add_argument("--counts", action="store_true", help="print the counts alone, as the test holds them")
    parser.add_argument("--profile", metavar="NAME", help="profile the row of this name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that rows are appended to")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        fake = install()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    every = rows(DTYPES[args.dtype])
    if args.profile is not None:
        if args.profile not in every:
            parser.error(f"--profile {args.profile!r}: expected one of {', '.join(map(repr, every))}")
        print(profile(every[args.profile].call, args.rounds))
        return 0
    chosen = {name: row for name, row in every.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} is in no name; there are {', '.join(map(repr, every))}")
    if args.counts:
        for name, row in chosen.items():
            print(f'    "{name}": {counts(row.call, fake).numbers},', flush=True)
        return 0
    write = Writer(args.json, CPU)
    print(f"{device_name(CPU)}, torch {torch.__version__}, Triton {write({'kind': 'host'})['triton']}, {args.dtype}")
    print("a fake GPU: microseconds are of this core's Python and PyTorch, without kernels and without the driver's calls")
    print("ratio: to the dense block's forward and backward pass, median of paired ratios [middle 80 % of the rounds]")
    print(f"{'':<32} {'launches':>8} {'products':>9} {'kernels':>8} {'us':>8}  of dense")
    for name, row in chosen.items():
        show(write({**measure(name, row, every[row.baseline], fake, args.rounds), "dtype": args.dtype}), args.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
