"""The operators and a block of a model against what one would run instead, in one process: medians of paired ratios.

    python bench/operators.py                              # float32 and bfloat16, both shapes, this machine's CPU
    python bench/operators.py --operators row_sparse_wgrad --dtypes float32 --densities 0.5 0.78
    python bench/operators.py --json runs/operators.jsonl  # also one JSON object per row

Each round times every provider of a case once, in turn, so that drift of the machine cancels. A figure is the median over
rounds of (time of the baseline / time of the provider) in the same round, with the quartiles. The first provider of each
operator is the baseline: what users run today, with the fastest that PyTorch has for it. The operators' results are checked
against plain PyTorch before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nspec
from nspec.kernels.common.active import active_index
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad
from nspec.nn.masked_linear import Mode

Call = Callable[[], object]
Providers = dict[str, Call]
SHAPES = ((4096, 512, 2048), (2048, 1024, 4096))
DENSITIES = (0.3, 0.5, 0.78, 0.9, 1.0)


def cpu_name() -> str:
    """The model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str:
    """The commit of the checkout, with ``-dirty`` after it where files differ from it; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def random_set(d_ff: int, density: float) -> Tensor:
    """Bool ``[d_ff]`` with that share of active neurons, at random places."""
    return torch.zeros(d_ff, dtype=torch.bool).index_fill_(0, torch.randperm(d_ff)[: round(density * d_ff)], True)


def same(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises AssertionError if two results differ by more than rounding: 1 % of their size in 16 bits, else 1e-5."""
    bound = 1e-2 if theirs.dtype.itemsize == 2 else 1e-5
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
    assert error <= bound, f"{name}: relative error {error:.2g}, expected at most {bound:.0e}"


def linear_relu_count_case(tokens: int, d: int, d_ff: int, dtype: torch.dtype, density: float) -> Providers:
    """The baseline does not count at all."""
    x, w, b = torch.randn(tokens, d), torch.randn(d_ff, d) / d**0.5, torch.randn(d_ff)
    x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    valid = torch.rand(tokens) < 0.9

    def counted() -> tuple[Tensor, Tensor]:
        h = torch.relu_(F.linear(x, w, b))
        return h, (h > 0).sum(0)

    h, counts = linear_relu_count(x, w, b)
    same("h", h, torch.relu(F.linear(x, w, b)))
    same("counts", counts, (h > 0).sum(0))
    return {
        "relu(linear), no count": lambda: torch.relu_(F.linear(x, w, b)),
        "relu(linear), (h > 0).sum(0)": counted,
        "ours": lambda: linear_relu_count(x, w, b),
        "ours, 10 % padding": lambda: linear_relu_count(x, w, b, valid=valid),
    }


def row_sparse_wgrad_case(tokens: int, d: int, d_ff: int, dtype: torch.dtype, density: float) -> Providers:
    """Ours gives the gradient of the bias too; the baseline is the matrix product alone."""
    dh, x, active = torch.randn(tokens, d_ff).to(dtype), torch.randn(tokens, d).to(dtype), random_set(d_ff, density)
    index, rows = active_index(active), active.nonzero().squeeze(1)
    dw, db = row_sparse_wgrad(dh, x, active, index=index)
    same("dw", dw, (dh.t() @ x) * active[:, None])
    same("db", db, dh.sum(0))
    return {
        "dense product": lambda: dh.t() @ x,
        "dense product and bias": lambda: (dh.t() @ x, dh.sum(0)),
        "index_select, product": lambda: dh.index_select(1, rows).t() @ x,
        "ours": lambda: row_sparse_wgrad(dh, x, active, index=index),
    }


def compact_ffn_case(tokens: int, d: int, d_ff: int, dtype: torch.dtype, density: float) -> Providers:
    """Forward and backward, gradients of the input and of all weights and biases."""
    make = lambda *shape: torch.randn(shape).div_(shape[-1] ** 0.5).to(dtype).requires_grad_()
    x, w1, b1, w2, b2 = tensors = make(tokens, d), make(d_ff, d), make(d_ff), make(d, d_ff), make(d)
    dy, active = torch.randn(tokens, d).to(dtype), random_set(d_ff, density)
    index, mask = active_index(active), active[:, None].to(dtype)
    step = lambda y: torch.autograd.grad(y, tensors, dy)
    dense = lambda weight: F.linear(F.relu(F.linear(x, weight, b1)), w2, b2)
    for name, ours, theirs in zip(
        ("x", "w1", "b1", "w2", "b2"), step(compact_ffn(*tensors, active)), step(dense(w1 * mask))
    ):
        same(f"gradient of {name}", ours, theirs)
    return {
        "dense": lambda: step(dense(w1)),
        "weight x mask": lambda: step(dense(w1 * mask)),
        "ours": lambda: step(compact_ffn(*tensors, active, index=index)),
    }


def row_sparse_adamw_case(tokens: int, d: int, d_ff: int, dtype: torch.dtype, density: float) -> Providers:
    """Twelve layers' fc1; the optimiser's state is float32 whatever the products are in."""
    layers = 12
    params = [torch.randn(d_ff, d) for _ in range(layers)]
    grads, moments = [torch.randn_like(p) for p in params], [[torch.rand_like(p) for p in params] for _ in range(2)]
    active = [random_set(d_ff, density) for _ in range(layers)]
    theirs = [p.clone().requires_grad_() for p in params]
    for p, g in zip(theirs, grads):
        p.grad = g
    fused = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
    before = params[0].clone()
    row_sparse_adamw_(params[:1], grads[:1], moments[0][:1], moments[1][:1], active[:1], step=2, lr=1e-4)
    same("inactive rows", params[0][~active[0]], before[~active[0]])
    return {
        "torch fused AdamW": fused.step,
        "ours": lambda: row_sparse_adamw_(params, grads, *moments, active, step=2, lr=1e-4),
    }


def block_case(tokens: int, d: int, d_ff: int, dtype: torch.dtype, density: float) -> Providers:
    """A feed-forward block as a model has it, forward and backward; bfloat16 by autocast, as mixed precision trains."""
    dense = nn.Sequential(nn.Linear(d, d_ff), nn.ReLU(), nn.Linear(d_ff, d))
    masks = nspec.NeuronMasks({"task": {"0": random_set(d_ff, density)}})
    x, dy = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d).to(dtype)

    def step(model: nn.Module) -> None:
        for tensor in (x, *model.parameters()):
            tensor.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(x)
        y.backward(dy)

    def specialized(mode: Mode) -> nn.Module:
        model = nspec.specialize(copy.deepcopy(dense), masks, mode=mode)
        nspec.set_task(model, "task")
        return model

    forward, update = specialized("forward"), specialized("update")
    return {"dense": lambda: step(dense), "mode forward": lambda: step(forward), "mode update": lambda: step(update)}


CASES = {
    "linear_relu_count": linear_relu_count_case,
    "row_sparse_wgrad": row_sparse_wgrad_case,
    "compact_ffn": compact_ffn_case,
    "row_sparse_adamw": row_sparse_adamw_case,
    "block": block_case,
}


def seconds(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(providers: Providers, rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds of each provider in each round; at least ``rounds`` rounds and ``least`` seconds in all."""
    for call in providers.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + least
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, call in providers.items():
            times[name].append(seconds(call))
    return times


def rows_of(operator: str, shape: tuple[int, int, int], dtype: str, density: float, rounds: int) -> Iterator[dict]:
    """One row per provider of a case."""
    torch.manual_seed(0)
    providers = CASES[operator](*shape, getattr(torch, dtype), density)
    times = measure(providers, rounds, least=1.0)
    baseline = next(iter(times))
    for name, values in times.items():
        low, median, high = statistics.quantiles([b / v for b, v in zip(times[baseline], values)], n=4)
        yield {
            "operator": operator,
            "provider": name,
            "baseline": baseline,
            "tokens": shape[0],
            "d_model": shape[1],
            "d_ff": shape[2],
            "dtype": dtype,
            "density": density,
            "milliseconds": round(1e3 * statistics.median(values), 4),
            "speedup": round(median, 4),
            "p25": round(low, 4),
            "p75": round(high, 4),
            "rounds": len(values),
        }


def main() -> None:
    """Prints a line per row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", metavar="TOKENSxDxD_FF", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}"
    stamp = {
        "device": device,
        "date": date.today().isoformat(),
        "commit": commit(),
        "backend": os.environ.get("NSPEC_BACKEND", "auto"),
    }
    print(device)
    print("speed-up over the baseline: median of paired ratios [quartiles]")
    for operator in args.operators:
        for dtype in args.dtypes if operator != "row_sparse_adamw" else ["float32"]:
            for shape in args.shapes:
                sizes = tuple(int(n) for n in shape.split("x"))
                for density in [1.0] if operator == "linear_relu_count" else args.densities:
                    print(f"{operator}, {dtype}, tokens x d x d_ff = {shape}, density {density:.2f}")
                    for row in rows_of(operator, sizes, dtype, density, args.rounds):
                        figure = f"{row['speedup']:6.2f}x [{row['p25']:.2f}, {row['p75']:.2f}]"
                        print(f"  {row['provider']:<30} {row['milliseconds']:9.2f} ms {figure}", flush=True)
                        if args.json:
                            args.json.parent.mkdir(parents=True, exist_ok=True)
                            with open(args.json, "a", encoding="utf-8") as file:
                                file.write(json.dumps(row | stamp) + "\n")


if __name__ == "__main__":
    main()
