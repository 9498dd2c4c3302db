"""What the training-step benchmark measures in each of its sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.reporting.summary import REAL_DENSITY
from bench.stepping.model import SHAPES, Shape, scaled_down, tiny
from nspec.mt.training.precision import resolve_precision

OPTIMIZERS = ("adamw", "row_sparse_adamw")
BATCHES = ("pure", "mixed")
"""Of one task, and of several."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        groups: (shape, dtype), each of which is interleaved as a whole.
        densities: of the masks.
        mixed: densities at which batches of several tasks are measured too.
        release: densities at which the release's way is measured; its cost does not depend on it.
        row_sparse: densities at which our optimiser is measured, beside PyTorch's ...
        mixed_row_sparse: ... and whether with mixed batches too.
        memory: densities at which peak memory is measured.
        systems: beside dense.
        optimizers: of these systems.
        batches: that these systems are measured with.
        rounds: least number of rounds.
        seconds: no round of a group is begun after so many seconds (three are done anyway).
        checked: sentences of the micro-batch on which the systems are checked.
        counts: numbers of tasks of the second part; empty: left out.
        growing: (shape, dtype) of the second part.
        growth_rounds: least number of rounds of the second part.
    """

    groups: tuple[tuple[str, str], ...]
    densities: tuple[float, ...] = (0.3, 0.5, 0.78, 1.0)
    mixed: tuple[float, ...] = (0.3, 0.5, 0.78, 1.0)
    release: tuple[float, ...] = (0.3, 0.5, 0.78, 1.0)
    row_sparse: tuple[float, ...] = (0.3, 0.5, 0.78, 1.0)
    mixed_row_sparse: bool = True
    memory: tuple[float, ...] = (0.3, 0.5, 0.78, 1.0)
    systems: tuple[str, ...] = ("release", "forward", "update")
    optimizers: tuple[str, ...] = OPTIMIZERS
    batches: tuple[str, ...] = BATCHES
    rounds: int = 15
    seconds: float = 600.0
    checked: int = 1_000_000
    counts: tuple[int, ...] = (16, 60, 300, 1000)
    growth_rounds: int = 7
    growing: tuple[tuple[str, str], ...] = ()


def plan(name: str, device_type: str) -> Plan:
    """What ``--set`` names on that kind of device."""
    gpu = device_type == "cuda"
    dtypes = ("bfloat16",) if gpu else ("float32", "bfloat16")
    if name == "smoke":
        return Plan(
            (("base", "float32"), ("big", "bfloat16")),
            densities=(0.5, 1.0),
            mixed=(0.5,),
            release=(0.5,),
            memory=(0.5,),
            rounds=3,
            growth_rounds=3,
            counts=(2, 5, 1000),
            growing=(("base", "float32"),),
        )
    whole = tuple((shape, dtype) for shape in SHAPES for dtype in dtypes)
    if name == "full":
        return Plan(whole, growing=tuple((shape, dtypes[0]) for shape in SHAPES))
    groups = whole
    if not gpu:  # bfloat16 where nspec itself would train in it: without matrix units it takes many times as long
        fast = resolve_precision("auto", torch.device(device_type), SHAPES["base"].d_model) == "bf16"
        groups = tuple((s, d) for s, d in whole if d == "float32" or (s == "base" and fast))
    real = (REAL_DENSITY,)
    return Plan(
        groups,
        mixed=real,
        release=real,
        row_sparse=real,
        mixed_row_sparse=False,
        memory=real,
        rounds=5,
        seconds=18.0,
        growth_rounds=3,
        checked=16,
        growing=(("base", dtypes[0]),),
    )


def shape_for(name: str, which: str, device: torch.device) -> Shape:
    """The real shape on a GPU, a smaller one on a CPU and in a smoke test."""
    shape = SHAPES[name]
    if which == "smoke":
        return tiny(shape)
    return shape if device.type == "cuda" else scaled_down(shape)
