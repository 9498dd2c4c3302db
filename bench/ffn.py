"""The feed-forward block of a specialised layer against the dense one: forward + backward, interleaved, in one process.

    python bench/ffn.py                       # float32, 4096 tokens, d 512, d_ff 2048, on this machine's CPU
    python bench/ffn.py --dtype autocast      # bfloat16 products under autocast, as mixed precision trains
    python bench/ffn.py --json runs/ffn.jsonl # also one JSON object per row

Each round times the dense block and then the specialised one, so that drift of the machine cancels; the figures are
medians of the paired ratios (dense time / specialised time), with the quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

import nspec


def cpu_name() -> str:
    """The model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def specialised(dense: nn.Module, density: float, mode: str) -> nn.Module:
    """A copy of the block with a random active set of that density, switched to it."""
    d_ff = dense[0].out_features  # type: ignore[index]
    active = torch.zeros(d_ff, dtype=torch.bool)
    active[torch.randperm(d_ff)[: round(density * d_ff)]] = True
    model = nspec.specialize(copy.deepcopy(dense), nspec.NeuronMasks({"task": {"0": active}}), mode=mode)
    nspec.set_task(model, "task")
    return model


def seconds(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Time of one forward and backward pass; gradients start from None, as after ``zero_grad``."""
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dy.dtype == torch.bfloat16 != x.dtype):
        y = model(x)
    y.backward(dy)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ff", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "autocast"), default="float32")
    parser.add_argument("--mode", choices=("forward", "update"), default="forward")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.78, 0.9, 0.95, 1.0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    dense = nn.Sequential(nn.Linear(args.d_model, args.d_ff), nn.ReLU(), nn.Linear(args.d_ff, args.d_model)).to(dtype)
    x = torch.randn(args.tokens, args.d_model, dtype=dtype, requires_grad=True)
    # autocast is how mixed precision trains: float32 weights and input, products and output in bfloat16
    dy = torch.randn(args.tokens, args.d_model, dtype=torch.bfloat16 if args.dtype == "autocast" else dtype)
    models = {density: specialised(dense, density, args.mode) for density in args.densities}
    for model in (dense, *models.values()):
        seconds(model, x, dy)
    dense_times: list[float] = []
    ratios: dict[float, list[float]] = {density: [] for density in models}
    for _ in range(args.rounds):
        for density, model in models.items():
            dense_times.append(seconds(dense, x, dy))
            ratios[density].append(dense_times[-1] / seconds(model, x, dy))
    device = f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}"
    print(f"{args.dtype}, {args.tokens} tokens, d={args.d_model}, d_ff={args.d_ff}, mode {args.mode}; {device}")
    print(f"dense forward + backward: median {statistics.median(dense_times) * 1e3:.1f} ms")
    print("density  speed-up over dense (median of paired ratios) [quartiles]  ideal")
    rows = []
    for density, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{density:7.2f}  {median:5.2f}x [{low:.2f}, {high:.2f}]  {1 / density:.2f}x")
        shape = {"tokens": args.tokens, "d_model": args.d_model, "d_ff": args.d_ff, "dtype": args.dtype}
        run = {"device": device, "date": date.today().isoformat(), "rounds": args.rounds}
        rows.append(
            {"case": f"ffn {args.mode}", **shape, "density": density, "speedup": median, "p25": low, "p75": high, **run}
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
