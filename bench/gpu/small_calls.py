"""Every operator, forward and backward, once on small shapes: short enough to run under a tool that slows everything down.

    python -m bench.gpu.small_calls --operators compact_ffn
    compute-sanitizer --tool memcheck python -m bench.gpu.small_calls --device cuda

Inputs are small integers, so that products are exact. Results are compared with the reference's in float64 on the CPU. On
a GPU the Triton kernels are asked for by name; on a CPU each operator takes what it takes. What is wrong or raises is said
at once. gpu_check.sh runs it first, a process for each operator, and later under memcheck.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bench import cli, trouble
from nspec.kernels.common.active import active_index
from nspec.kernels.common.backend import OPERATORS
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.gated_activation import gated_activation
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

SHAPES = ((75, 40, 72), (160, 64, 192))
"""Tokens, d_model, d_ff: nothing a multiple of a tile, and whole tiles."""

DTYPES = (torch.float32, torch.bfloat16)
Results = dict[str, Tensor]


def _integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).double()


def calls(
    shape: tuple[int, int, int],
    mixed: bool,
    dtype: torch.dtype,
    device: torch.device,
    operators: Sequence[str] = OPERATORS,
) -> Iterator[Results]:
    """The results of each operator on the CPU in float64.

    Args:
        shape: tokens, d_model, d_ff.
        mixed: tokens of three tasks, one of which has none, instead of one task.
        dtype: of the inputs; AdamW's are float32, or float64 where these are.
        device: that computes.
        operators: only these.
    """
    tokens, d, d_ff = shape
    offsets = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device) if mixed else None
    sets = torch.rand(3, d_ff, generator=torch.Generator().manual_seed(6)) < 0.6
    active = (sets if mixed else sets[0]).to(device)

    x, w1, b1 = (
        _integers(seed, *size).to(device, dtype) for seed, size in enumerate(((tokens, d), (d_ff, d), (d_ff,)))
    )
    b1 += 0.5
    valid = (torch.arange(tokens) % 4 > 0).to(device)
    if "linear_relu_count" in operators:
        h, counts = linear_relu_count(x, w1, b1, valid=valid, task_offsets=offsets)
        yield _named("linear_relu_count", ("h", "counts"), (h, counts))

    if "row_sparse_wgrad" in operators:
        dh = _integers(3, tokens, d_ff).to(device, dtype)
        dw, db = row_sparse_wgrad(dh, x, active, task_offsets=offsets)
        total = torch.ones(d_ff, d, device=device)
        row_sparse_wgrad(dh, x, active, task_offsets=offsets, add_to=total)
        yield _named("row_sparse_wgrad", ("dw", "db", "added to"), (dw, db, total))

    w2, b2, dy = (
        _integers(seed, *size).to(device, dtype) for seed, size in ((4, (d, d_ff)), (5, (d,)), (7, (tokens, d)))
    )
    if "compact_ffn" in operators:
        leaves = [tensor.requires_grad_() for tensor in (x, w1, b1, w2, b2)]
        y = compact_ffn(x, w1, b1, w2, b2, active, task_offsets=offsets)
        gradients = torch.autograd.grad(y, leaves, dy)
        yield _named("compact_ffn", ("y", "dx", "dw1", "db1", "dw2", "db2"), (y, *gradients))

    index = active_index(active)
    width = index.shape[1]
    dz, hidden, up = (_integers(seed, tokens, width).to(device, dtype) for seed in (12, 13, 14))
    hidden.requires_grad_()
    if "compact_fc1" in operators:
        leaves = [tensor.requires_grad_() for tensor in (x, w1, b1)]
        z = compact_fc1(x, w1, b1, active, task_offsets=offsets, index=index)
        yield _named("compact_fc1", ("z", "dx", "dw", "db"), (z, *torch.autograd.grad(z, leaves, dz)))
    if "compact_fc2" in operators:
        leaves = [tensor.requires_grad_() for tensor in (hidden, b1, w2, b2)]
        y = compact_fc2(hidden, b1, w2, b2, active, task_offsets=offsets, index=index)
        yield _named("compact_fc2", ("y", "dh", "dconstant", "dw", "db"), (y, *torch.autograd.grad(y, leaves, dy)))
    if "gated_activation" in operators:
        leaves = [hidden, up.requires_grad_()]
        h = gated_activation(hidden, up, "silu")
        yield _named("gated_activation", ("h", "dgate", "dup"), (h, *torch.autograd.grad(h, leaves, dz)))

    if "row_sparse_adamw" not in operators:
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = [_integers(seed, d_ff, d).to(device, wide) for seed in (8, 9, 10, 11)]
    state[3].abs_()
    rows = active[0] if mixed else active
    parameter, gradient, first, second = ([tensor] for tensor in state)
    row_sparse_adamw_(parameter, gradient, first, second, [rows], step=2, lr=0.125, weight_decay=0.5)
    yield _named("row_sparse_adamw", ("parameter", "gradient", "first moment", "second moment"), state)


def _named(operator: str, names: Sequence[str], tensors: Sequence[Tensor]) -> Results:
    return {f"{operator}: {name}": tensor.detach().double().cpu() for name, tensor in zip(names, tensors, strict=True)}


def _all(found: Iterable[Results]) -> Results:
    return {name: tensor for results in found for name, tensor in results.items()}


def difference(ours: Tensor, exact: Tensor) -> float:
    """Relative error in the norm; the norm itself where nothing is expected."""
    return float((ours - exact).norm() / (exact.norm() if exact.any() else 1.0))


@functools.lru_cache(maxsize=1)
def _exact(operator: str, shape: tuple[int, int, int], mixed: bool) -> Results:
    """The reference's results in float64 on the CPU."""
    before = os.environ["NSPEC_BACKEND"]
    os.environ["NSPEC_BACKEND"] = "reference"
    try:
        return _all(calls(shape, mixed, torch.float64, torch.device("cpu"), [operator]))
    finally:
        os.environ["NSPEC_BACKEND"] = before


def compared(operator: str, dtype: torch.dtype, shape: tuple[int, int, int], mixed: bool, device: torch.device) -> int:
    """Compares the results of one call; how many there were.

    Raises:
        AssertionError: some are wrong; by how much.
    """
    exact = _exact(operator, shape, mixed)
    found, wrong = _all(calls(shape, mixed, dtype, device, [operator])), []
    for name, tensor in found.items():
        bound = 0 if name.endswith("counts") else 1e-5 if dtype == torch.float32 else 2e-2
        off = difference(tensor, exact[name])
        if not off <= bound:  # not `off > bound`, which is False for NaN
            wrong.append(f"{name}: relative error {off:.2g}")
    if wrong:
        raise AssertionError("; ".join(wrong))
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if every result is right, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.small_calls", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="default: all")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    args = parser.parse_args(arguments)
    device = cli.device_of(parser, args)
    asked = os.environ.setdefault("NSPEC_BACKEND", "triton" if device.type == "cuda" else "auto")
    checked = failed = 0
    for operator, shape, mixed, dtype in itertools.product(args.operators, SHAPES, (False, True), DTYPES):
        what = f"{operator}, {shape}, {'3 tasks' if mixed else '1 task'}, {dtype}"
        try:
            checked += compared(operator, dtype, shape, mixed, device)
        except AssertionError as error:
            failed += 1
            print(f"wrong: {what}: {error}", flush=True)
        except Exception as error:
            failed += 1
            try:
                trouble.report(what, error, device)
            except trouble.DeviceLost:
                print(f"error: {trouble.LOST}", flush=True)
                return 1
    which = ", ".join(args.operators)
    print(f"{checked} right results of {which} on {device.type} with backend {asked}; {failed} calls failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
