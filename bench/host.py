"""What the GPU path costs the host: launches, library products, other kernels, microseconds of Python. Needs no GPU.

    python -m bench.host                           # the table; -v names what is counted
    python -m bench.host --only compact_ffn        # the rows whose name contains this
    python -m bench.host --profile compact_ffn     # where the time of one row goes, by function
    python -m bench.host --counts                  # the counts as tests/bench/test_host.py holds them

The host runs alone, on one thread, with a GPU that computes nothing (bench/fake_gpu.py): microseconds of this core, without
the driver's calls. Read the counts, which are exact, and the ratio to PyTorch's dense block, which runs in turn with each
row. float16 stands for both 16-bit dtypes, which go the same way.
"""

from __future__ import annotations

import cProfile
import functools
import io
import itertools
import pstats
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bench import cli
from bench.fake_gpu import PRODUCTS, FakeGpu, install
from bench.machine import device_name, stamp
from bench.providers.block import dense_block
from bench.rows import Row, Writer, figure
from bench.timing import in_rounds, paired, spread

if TYPE_CHECKING:
    from nspec.nn.masked_linear import Mode

CPU = torch.device("cpu")
SENTENCES = (0, 1, 2, 0)
"""The task of each sentence of a batch of several tasks: not sorted, as in a training."""
TASKS = len(set(SENTENCES))
LENGTH, D_MODEL, D_FF, ACTIVE = 4, 16, 128, 50
"""Tokens of a sentence, and the block; active neurons of a task: 64 columns when packed."""
MATRICES = 12  # in a step of AdamW
CALLS = 3
"""In a row, of which the last is timed: right after another call, the dense block takes a third longer."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
DENSE, DENSE_AUTOCAST = "dense block", "dense block, autocast"
KINDS = {"relu": "", "gelu": "GELU ", "swiglu": "SwiGLU "}
"""Of blocks, with what stands before their names; those that are not ReLU's are measured for one task, without autocast."""
_SEVERAL = f", {TASKS} tasks"
_TRIES = 20
"""Of a sample; on a core that is never left alone the last is taken."""

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_NO_KERNEL = _ALLOCATIONS | {"_unsafe_view"}

Call = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One row: what is called, and the dense block that it is compared with."""

    call: Call
    baseline: str = DENSE


Counts = dict[str, Counter[str]]
"""What a call puts on the GPU, by name: ``launches`` of Triton, library ``products``, other ``kernels`` of PyTorch."""


def kernels_of(call: Call) -> Counter[str]:
    """The operations of PyTorch in a call that launch a kernel: all but views, allocations and products.

    By the profiler, since a dispatch mode would be seen by the operators. An operation that is defined by others is
    counted by those; what else the CPU calls inside an operation is its own affair.
    """
    found: Counter[str] = Counter()

    def add(event: Any) -> None:
        if event.name.startswith("aten::"):
            name = event.name.removeprefix("aten::")
            full = f"{name}.{event.overload_name}" if event.overload_name else name
            operation = getattr(getattr(torch.ops.aten, name), event.overload_name or "default")
            if not torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
                if not operation.is_view and name not in _NO_KERNEL and full not in PRODUCTS:
                    found[full] += 1
                return
        for part in event.cpu_children:
            add(part)

    named = torch._C._profiler._ExperimentalConfig(capture_overload_names=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=named) as seen:
        call()
    for event in seen.events() or ():
        if event.cpu_parent is None:
            add(event)
    return found


def counts(call: Call, fake: FakeGpu) -> Counts:
    """What one call puts on the GPU; compiles what it needs.

    Raises:
        RuntimeError: the call takes another path while it is watched.
    """
    call()
    fake.take()
    call()
    plain = fake.take()
    kernels = kernels_of(call)
    if (watched := fake.take()) != plain:
        raise RuntimeError(f"launches and products are {watched} while kernels are counted and {plain} else")
    return {"launches": Counter(plain[0]), "products": Counter(plain[1]), "kernels": kernels}


def totals(counted: Counts) -> tuple[int, ...]:
    """How many launches, products and kernels."""
    return tuple(found.total() for found in counted.values())


def rows(dtype: torch.dtype) -> dict[str, Measured]:
    """Everything that is measured, by name; a bare name is forward and backward pass of one task."""
    return {**_dense(dtype), **_operators(dtype), **_blocks(dtype)}


def _active() -> Tensor:
    """The sets of all tasks, bool ``[tasks, d_ff]``."""
    return torch.rand(TASKS, D_FF, generator=torch.Generator().manual_seed(0)).argsort(1) < ACTIVE


def _passes(name: str, forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> dict[str, Measured]:
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
    from nspec.kernels.common.active import active_index, places_of
    from nspec.kernels.compact_ffn import compact_ffn
    from nspec.kernels.linear_relu_count import linear_relu_count
    from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
    from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

    make, tokens = functools.partial(torch.rand, dtype=dtype), len(SENTENCES) * LENGTH
    x, dy, dh = make(tokens, D_MODEL), make(tokens, D_MODEL), make(tokens, D_FF)
    weights = make(D_FF, D_MODEL), make(D_FF), make(D_MODEL, D_FF), make(D_MODEL)
    total = torch.zeros(D_FF, D_MODEL)
    leaves = [tensor.requires_grad_() for tensor in (x.clone(), *weights)]
    sets = _active()
    found: dict[str, Measured] = {}
    starts = torch.tensor([0, *itertools.accumulate(SENTENCES.count(task) * LENGTH for task in range(TASKS))])
    for label, active, offsets in (("", sets[0], None), (_SEVERAL, sets, starts)):
        index = active_index(active)
        options: dict[str, Any] = {"index": index, "task_offsets": offsets}

        def count(offsets: Tensor | None = offsets) -> Tensor:
            return linear_relu_count(*leaves[:3], task_offsets=offsets)[0]

        kept = {**options, "places": places_of(index, D_FF)}  # as a layer keeps them

        def block(active: Tensor = active, kept: dict[str, Any] = kept) -> Tensor:
            return compact_ffn(*leaves, active, **kept)  # type: ignore[call-arg]

        found |= _passes(f"linear_relu_count{label}", count, leaves[:3], dh)
        wgrad = functools.partial(row_sparse_wgrad, dh, x, active, **kept)
        found[f"row_sparse_wgrad{label}"] = Measured(wgrad)
        found[f"row_sparse_wgrad{label}, added"] = Measured(functools.partial(wgrad, add_to=total))
        found |= _passes(f"compact_ffn{label}", block, leaves, dy)
    params, grads, means, squares = ([torch.rand(D_FF, D_MODEL) for _ in range(MATRICES)] for _ in range(4))
    rows = [sets[0]] * MATRICES
    found[f"row_sparse_adamw_, {MATRICES} matrices"] = Measured(
        lambda: row_sparse_adamw_(params, grads, means, squares, rows, step=1, lr=1e-3)
    )
    return found


def _step(model: nn.Module, dtype: torch.dtype, autocast: bool) -> Call:
    """Forward and backward pass, gradients fresh, of the input too: it is the layer before that makes it."""
    shape = len(SENTENCES), LENGTH, D_MODEL
    x = torch.rand(shape, dtype=torch.float32 if autocast else dtype, requires_grad=True)
    dy = torch.rand(shape, dtype=dtype)
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
    found = {}
    for activation, name in KINDS.items():
        dense = name + DENSE
        found[dense] = Measured(_step(dense_block(activation, D_MODEL, D_FF)[0], dtype, False), dense)
    if dtype != torch.float32:
        found[DENSE_AUTOCAST] = Measured(_step(dense_block("relu", D_MODEL, D_FF)[0], dtype, True), DENSE_AUTOCAST)
    return found


def _blocks(dtype: torch.dtype) -> dict[str, Measured]:
    import nspec
    from nspec.nn.masked_linear import MODES

    names = [f"task-{number}" for number in range(TASKS)]
    found = {}
    one, several = names[0], [names[task] for task in SENTENCES]
    kinds: list[tuple[str, str | list[str], bool]] = [("", one, False), (", autocast", one, True)]
    kinds.append((_SEVERAL, several, False))
    for (activation, name), mode, (label, task, autocast) in itertools.product(KINDS.items(), MODES, kinds):
        if (autocast and dtype == torch.float32) or (label and activation != "relu"):
            continue
        dense, firsts = dense_block(activation, D_MODEL, D_FF)
        masks = nspec.NeuronMasks({name: {firsts[0]: active} for name, active in zip(names, _active())})
        model = nspec.specialize(dense, masks, mode=cast("Mode", mode))
        nspec.set_task(model, task, batch_dim=0)
        baseline = DENSE_AUTOCAST if autocast else name + DENSE
        found[f"{name}block in mode {mode}{label}"] = Measured(_step(model, dtype, autocast), baseline)
    return found


def processor_seconds(calls: Sequence[Call], rounds: int, warmup: int = 20) -> list[list[float]]:
    """Seconds of each call in each round, of processor time: what other programs get of the core is not counted.

    A sample is the last of ``CALLS`` in a row; one in which another program had the core, and left other caches, is taken
    again. Rounds are ordered as in :func:`bench.timing.interleaved`.
    """
    for _, call in itertools.product(range(warmup), calls):
        call()
    times: list[list[float]] = [[] for _ in calls]

    def sample(which: int, _: int) -> None:
        for _ in range(_TRIES):
            switched = _switches()
            for _ in range(CALLS - 1):
                calls[which]()
            began = time.thread_time()
            calls[which]()
            seconds = time.thread_time() - began
            if _switches() == switched:
                break
        times[which].append(seconds)

    in_rounds(range(len(calls)), sample, rounds=rounds)
    return times


def _switches() -> int:
    """How often the thread has lost its core."""
    used = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return used.ru_nivcsw + used.ru_nvcsw


def measure(name: str, row: Measured, baseline: Measured, fake: FakeGpu, rounds: int) -> Row:
    """Counts and times one row, in turn with its baseline."""
    counted = counts(row.call, fake)
    seconds, dense = processor_seconds([row.call, baseline.call], rounds)
    made: Row = {"kind": "host", "name": name, "baseline": row.baseline, "rounds": rounds, "names": counted}
    made |= dict(zip(counted, totals(counted)))
    microseconds = spread([1e6 * value for value in seconds])
    for field, found, digits in (("microseconds", microseconds, 1), ("ratio", paired(seconds, dense), 3)):
        for end, value in zip(("", "_low", "_high"), found):
            made[f"{field}{end}"] = round(value, digits)
    return made


def show(row: Row, names: bool) -> None:
    """Prints one row."""
    numbers = f"{row['launches']:8} {row['products']:8} {row['kernels']:8}"
    numbers += f" {row['microseconds']:8.0f} {row['microseconds_low']:8.0f}"
    print(f"{row['name']:<36} {numbers}  {figure(row, 'ratio')}", flush=True)
    for kind, found in row["names"].items() if names else ():
        if found:
            print(f"    {kind}: " + ", ".join(f"{n} {name}" for name, n in sorted(found.items())))


def profile(call: Call, calls: int) -> str:
    """Where the processor time of a row goes, by function, its own time first: what other programs get is not in it."""
    for _ in range(20):
        call()
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(30)
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 2 where the GPU path cannot run."""
    parser = cli.parser("bench.host", __doc__, "", "set", "device", "threads")
    add = parser.add_argument
    add("--rounds", type=cli.count, default=200, help="of each row and the dense block (default: 200)")
    add("--dtype", choices=DTYPES, default="float16", help="(default: float16)")
    add("--only", metavar="TEXT", default="", help="rows whose name contains this")
    add("-v", "--names", action="store_true", help="name what is counted")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--counts", action="store_true", help="print the counts alone, as the test holds them")
    instead.add_argument("--profile", metavar="NAME", help="profile the row of this name")
    args = parser.parse_args(arguments)
    if args.json is not None and (args.counts or args.profile is not None):
        parser.error("--json takes rows with their times; --counts and --profile measure none: leave it out")
    try:
        fake = install()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every = rows(DTYPES[args.dtype])
    chosen = {name: row for name, row in every.items() if args.only in name}
    if not chosen or args.profile not in (None, *every):
        parser.error(f"--only and --profile: expected (a part of) one of {', '.join(map(repr, every))}")
    if args.profile is not None:
        print(profile(every[args.profile].call, args.rounds))
        return 0
    if args.counts:
        for name, row in chosen.items():
            print(f'    "{name}": {totals(counts(row.call, fake))},', flush=True)
        return 0
    write = Writer(args.json, CPU)
    print(f"{device_name(CPU)}, torch {torch.__version__}, Triton {stamp(CPU)['triton']}, {args.dtype}, a fake GPU")
    print("us: Python and PyTorch on this core, without kernels and the driver's calls: median, and fastest tenth")
    print("of dense: of the dense block's forward + backward; median of paired ratios [middle 80 % of the rounds]")
    print("launches: of Triton; products: of the library; kernels: PyTorch's others")
    print(f"{'':<36} launches products  kernels       us  fastest  of dense")
    for name, row in chosen.items():
        show(write({**measure(name, row, every[row.baseline], fake, args.rounds), "dtype": args.dtype}), args.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
