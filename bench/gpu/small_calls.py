"""Every operator, forward and backward, once on small shapes: short enough to run under a tool that slows everything down.

    python -m bench.gpu.small_calls --operators compact_ffn
    compute-sanitizer --tool memcheck python -m bench.gpu.small_calls --device cuda

Inputs are small integers, so that products are exact. Results are compared with the reference's in float64 on the CPU. On
a GPU the Triton kernels are asked for by name; on a CPU each operator takes what it takes. What is wrong or raises is said
at once. gpu_check.sh runs it first, a process for each operator, and later under memcheck.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import cli, trouble
from bench.providers import shared
from nspec.kernels.common.active import active_index
from nspec.kernels.common.backend import OPERATORS
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.gated_activation import gated_activation, gated_gradients
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.neuron_wgrad import neuron_wgrad
from nspec.kernels.row_sparse_adamw import row_sparse_adamw_
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad
from nspec.kernels.write_neurons import write_neurons_

SHAPES = ((75, 40, 72), (160, 64, 192))
"""Tokens, d_model, d_ff: nothing a multiple of a tile, and whole tiles."""

DTYPES = (torch.float32, torch.bfloat16)
Results = dict[str, Tensor]


def results(
    operator: str, shape: tuple[int, int, int], mixed: bool, dtype: torch.dtype, device: torch.device
) -> Results:
    """The results of an operator, on the CPU in float64.

    Args:
        operator: one of ``OPERATORS``.
        shape: tokens, d_model, d_ff.
        mixed: tokens of three tasks, one of which has none, instead of one task.
        dtype: of the inputs; AdamW's are float32, or float64 where these are.
        device: that computes.
    """
    tokens, d, d_ff = shape
    seed = torch.Generator().manual_seed(6)
    draw = lambda *size, to=dtype: torch.randint(-1, 2, size, generator=seed).double().to(device, to)
    offsets = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device) if mixed else None
    sets = torch.rand(3, d_ff, generator=seed) < 0.6
    active = (sets if mixed else sets[0]).to(device)
    index = active_index(active)
    x, w1, b1, w2, b2 = draw(tokens, d), draw(d_ff, d), draw(d_ff) + 0.5, draw(d, d_ff), draw(d)
    neurons = torch.arange(1, index.shape[1], 3, device=device)
    dy, dh, wide = draw(tokens, d), draw(tokens, d_ff), [draw(tokens, index.shape[1]) for _ in range(3)]

    def passes(forward: Callable[..., Tensor], gradient: Tensor, **inputs: Tensor) -> Results:
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        y = forward(*leaves)
        return {"y": y, **{f"d{name}": g for name, g in zip(inputs, torch.autograd.grad(y, leaves, gradient))}}

    if operator == "linear_relu_count":
        valid = (torch.arange(tokens) % 4 > 0).to(device)
        found = dict(zip(("h", "counts"), linear_relu_count(x, w1, b1, valid=valid, task_offsets=offsets)))
    elif operator == "row_sparse_wgrad":
        total = torch.ones(d_ff, d, device=device)
        found = dict(zip(("dw", "db"), row_sparse_wgrad(dh, x, active, task_offsets=offsets)))
        row_sparse_wgrad(dh, x, active, task_offsets=offsets, add_to=total)
        found["added to"] = total
    elif operator == "compact_ffn":
        block = lambda x, w1, b1, w2, b2: compact_ffn(x, w1, b1, w2, b2, active, task_offsets=offsets)
        found = passes(block, dy, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    elif operator == "compact_fc1":
        fc1 = lambda x, w, b: compact_fc1(x, w, b, active, task_offsets=offsets, index=index)
        found = passes(fc1, wide[0], x=x, w=w1, b=b1)
    elif operator == "compact_fc2":
        fc2 = lambda h, constant, w, b: compact_fc2(h, constant, w, b, active, task_offsets=offsets, index=index)
        found = passes(fc2, dy, h=wide[0], constant=b1, w=w2, b=b2)
    elif operator == "gated_activation":
        gated = lambda gate, up: gated_activation(gate, up, "silu")
        found = passes(gated, wide[2], gate=wide[0], up=wide[1])
        with torch.no_grad():
            columns = gated_gradients(wide[2].clone(), wide[0], wide[1], "silu", neurons)
        found |= dict(zip(("dgate alone", "dup alone", "columns of dgate", "columns of dup"), columns))
    elif operator == "neuron_wgrad":
        found = {"rows": neuron_wgrad(wide[0], x, neurons, dtype=torch.promote_types(dtype, torch.float32))}
    elif operator == "write_neurons":
        own = [draw(len(neurons), d, to=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        written = [w1.clone(), w2.clone()]
        write_neurons_(written, own, [neurons, neurons], [False, True])
        found = dict(zip(("rows", "columns"), written))
    else:
        state = [draw(d_ff, d, to=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(4)]
        state[3].abs_()
        rows = [active[0] if mixed else active]
        parameter, gradient, first, second = ([tensor] for tensor in state)
        row_sparse_adamw_(parameter, gradient, first, second, rows, step=2, lr=0.125, weight_decay=0.5)
        found = dict(zip(("parameter", "gradient", "first moment", "second moment"), state))
    return {f"{operator}: {name}": tensor.detach().double().cpu() for name, tensor in found.items()}


def difference(ours: Tensor, exact: Tensor) -> float:
    """Relative error in the norm; the norm itself where nothing is expected."""
    return float((ours - exact).norm() / (exact.norm() if exact.any() else 1.0))


@functools.lru_cache(maxsize=1)
def _exact(operator: str, shape: tuple[int, int, int], mixed: bool) -> Results:
    """The reference's results in float64 on the CPU."""
    with shared.backend("reference"):
        return results(operator, shape, mixed, torch.float64, torch.device("cpu"))


def compared(operator: str, dtype: torch.dtype, shape: tuple[int, int, int], mixed: bool, device: torch.device) -> int:
    """Compares the results of one call; how many there were.

    Raises:
        AssertionError: some are wrong; by how much.
    """
    exact = _exact(operator, shape, mixed)
    found, wrong = results(operator, shape, mixed, dtype, device), []
    for name, tensor in found.items():
        bound = 0 if name.endswith("counts") else 1e-5 if dtype == torch.float32 else 2e-2
        off = difference(tensor, exact[name])
        if not off <= bound:  # not `off > bound`, which is False for NaN
            wrong.append(f"{name}: relative error {off:.2g}")
    if wrong:
        raise AssertionError("; ".join(wrong))
    return len(found)


def apart(operators: Sequence[str], device: str) -> int:
    """A process for each operator; what each says stays together."""
    command = [sys.executable, "-m", "bench.gpu.small_calls", "--device", device, "--operators"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, operator], **options) for operator in operators]
    for process in processes:
        try:
            said, _ = process.communicate()
        except KeyboardInterrupt:  # they are interrupted too, and say where
            said, _ = process.communicate()
        print(said, end="", flush=True)
    return int(any(process.returncode for process in processes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if every result is right, else 1."""
    parser = cli.parser("bench.gpu.small_calls", __doc__, "", "set", "json")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="default: all")
    parser.add_argument("--apart", action="store_true", help="in a process for each operator, side by side")
    args = parser.parse_args(arguments)
    if args.apart:
        return apart(args.operators, args.device)
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
            trouble.report(what, error)
    which = ", ".join(args.operators)
    print(f"{checked} right results of {which} on {device.type} with backend {asked}; {failed} calls failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
