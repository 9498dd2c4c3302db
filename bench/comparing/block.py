"""One block of a comparison: a fresh process that times our operators, each relative to a yardstick in the same rounds.

:mod:`bench.compare` starts it in the source tree of a commit. Its argument is a JSON object, its result a JSON file.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import cases as declared
from bench.cases import Case
from bench.machine import pick_device
from bench.timing import Call, interleaved

STEP = "training step, mode "
"""Begins the name of an operator that is a whole training step of a feed-forward block: ``STEP + mode``."""

_SHAPE = (2048, 512, 2048)
_STEPS = [Case(STEP + "forward", *_SHAPE, "float32", 0.5), Case(STEP + "update", *_SHAPE, "float32", 0.5)]


def default_cases(device_type: str) -> list[Case]:
    """A few of each operator, of a size that is measured in a second; on a GPU larger, and in its dtype."""
    tokens, d, d_ff = _SHAPE if device_type == "cpu" else (16384, 1024, 4096)
    low = "bfloat16"
    chosen = [
        ("linear_relu_count", "float32", 1.0, 1),
        ("linear_relu_count", low, 1.0, 1),
        ("row_sparse_wgrad", "float32", 0.5, 1),
        ("row_sparse_wgrad", low, 0.78, 1),
        ("compact_ffn", "float32", 0.5, 1),
        ("compact_ffn", low, 0.78, 1),
        ("compact_ffn", "float32" if device_type == "cpu" else low, 0.5, 8),
        ("row_sparse_adamw", "float32", 0.5, 1),
    ]
    return [Case(o, tokens, d, d_ff, dtype, density, n, compiled=False) for o, dtype, density, n in chosen] + _STEPS


def smoke_cases() -> list[Case]:
    """The suite's tiny ones, and a tiny training step."""
    return [*declared.cases("smoke", "cpu", compiled=False), Case(STEP + "update", 96, 32, 128, "float32", 0.5)]


def yardstick(case: Case, device: torch.device) -> Call:
    """What both sides do alike, to divide by: two products of the case's shape and dtype, into memory that is there.

    Not the dense baseline of the case: that allocates its results, which costs more in one process than in the next.
    Relative to it our compact_ffn differed by 17 to 30 % between processes of one commit, relative to these products by
    2 to 3 % (float32 and bfloat16, 2048 x 512 x 2048, two cores of a Xeon).
    """
    dtype = getattr(torch, case.dtype)
    a, b = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((case.tokens, case.d_model), (case.d_model, case.d_ff))
    )
    out = torch.empty(case.tokens, case.d_ff, dtype=dtype, device=device)

    def call(_: int) -> None:
        for _ in range(2):
            torch.mm(a, b, out=out)

    return call


def training_step(case: Case, device: torch.device) -> Call:
    """Forward, backward and optimiser of a feed-forward block that is specialised, with row-sparse AdamW."""
    import nspec

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(case.d_model, case.d_ff), nn.ReLU(), nn.Linear(case.d_ff, case.d_model)).to(device)
    active = torch.zeros(case.d_ff, dtype=torch.bool)
    active[torch.randperm(case.d_ff)[: case.active]] = True
    masks = nspec.NeuronMasks({"task": {"0": active}})
    mode: Any = case.operator.removeprefix(STEP)
    ours = nspec.specialize(block, masks, mode=mode)
    nspec.set_task(ours, "task")
    inputs = [torch.randn(case.tokens, case.d_model, device=device) for _ in range(8)]
    gradient = torch.randn(case.tokens, case.d_model, device=device)
    optimizer = nspec.RowSparseAdamW(ours.parameters(), lr=1e-6, weight_decay=0.01)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        ours(inputs[number % len(inputs)]).backward(gradient)
        optimizer.step()

    return step


def calls(case: Case, device: torch.device, check: bool) -> dict[str, Call]:
    """Ours and the yardstick of a case, ready to be timed.

    Raises:
        AssertionError: ``check``, and a result is wrong.
    """
    if case.operator.startswith(STEP):
        return {"yardstick": yardstick(case, device), "ours": training_step(case, device)}
    from bench import providers

    problem = providers.problem(case, device)
    ours = next(provider for provider in problem.providers if provider.ours)
    if check:
        replace(problem, providers=[ours]).check()
    # Of AdamW, which multiplies nothing, PyTorch's: it moves the same memory, and allocates none.
    divide = problem.baseline.call if case.operator == "row_sparse_adamw" else yardstick(case, device)
    return {"yardstick": divide, "ours": ours.call}


def measure(chosen: Iterable[Case], device: torch.device, seconds: float, check: bool) -> dict[str, dict[str, Any]]:
    """By label of the case: ``milliseconds`` of ours and ``ratio``, the median over rounds of log(ours / yardstick).

    A case that this commit cannot compute has ``error`` instead. With ``check`` results are checked and nothing is timed:
    checking leaves the allocator in a state that the times of a process depend on.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in chosen:
        try:
            timed = calls(case, device, check)
        except (
            Exception
        ) as error:  # an older commit may fail in any way: that belongs to the case, not to the comparison
            reason = (str(error).strip() or "no message").splitlines()[0][:300]
            found[case.label] = {"error": f"{type(error).__name__}: {reason}"}
            continue
        if check:
            found[case.label] = {}
            continue
        times = interleaved(timed, device, rounds=5, least_seconds=seconds)
        ratios = [math.log(a / b) for a, b in zip(times["ours"], times["yardstick"], strict=True)]
        milliseconds = 1e3 * statistics.median(times["ours"])
        found[case.label] = {"milliseconds": milliseconds, "ratio": statistics.median(ratios), "rounds": len(ratios)}
    return found


def request(
    tree: Path, out: Path, chosen: Sequence[Case], device: str, threads: int, seconds: float, check: bool
) -> str:
    """The argument of a process that measures."""
    asked = {"tree": str(tree), "out": str(out), "device": device, "threads": threads, "seconds": seconds}
    return json.dumps(asked | {"check": check, "cases": [asdict(case) for case in chosen]})


def main() -> None:
    """Measures what is asked for, with the nspec of the tree that it is started in and no other."""
    asked = json.loads(sys.argv[1])
    import nspec
    from nspec.kernels.common import native

    tree = Path(asked["tree"]).resolve()
    for file in (nspec.__file__, native.__file__):
        if tree not in Path(file).resolve().parents:
            sys.exit(f"error: {file} was imported, expected one in {tree}")
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    chosen = [Case(**fields) for fields in asked["cases"]]
    found = measure(chosen, pick_device(asked["device"]), asked["seconds"], asked["check"])
    Path(asked["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
