"""What is measured, as data: operator x shape x dtype x density, in three sizes of suite, and the speed that is wanted.

``python -m bench.operators`` and ``pytest bench/ --benchmark-only`` run these cases; the providers of each operator are in
``bench/providers``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

OPERATORS = ("linear_relu_count", "row_sparse_wgrad", "compact_ffn", "row_sparse_adamw", "block")
"""The four operators, and a block of a model with its modules (:mod:`bench.providers.block`)."""

DTYPES = ("float32", "bfloat16", "float16")
SETS = ("full", "quick", "smoke")
BATCHES = ("one", "several", "all")
"""Of one task, of several, or both."""
ACTIVATIONS = ("relu", "gelu", "swiglu")
"""Of a block; SwiGLU is gated."""

Shape = tuple[int, int, int, int]
"""Tokens, d_model, d_ff, tasks."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    ``tasks`` is 1 for a batch of one task; for more, tokens are sorted by task, equally many of each. ``compiled`` and
    ``grouped``: with the providers that torch.compile makes, and with PyTorch's grouped product. ``activation``: of a
    block, one of ``ACTIVATIONS``; the operators that have one have ReLU.
    """

    operator: str
    tokens: int
    d_model: int
    d_ff: int
    dtype: str
    density: float
    tasks: int = 1
    compiled: bool = True
    grouped: bool = True
    activation: str = "relu"

    @property
    def name(self) -> str:
        """``block`` with ReLU, ``block gelu`` with another activation."""
        return self.operator if self.activation == "relu" else f"{self.operator} {self.activation}"

    @property
    def matrices(self) -> int:
        """Weights of a block: three of a gated one."""
        return 3 if self.activation == "swiglu" else 2

    @property
    def active(self) -> int:
        """How many neurons of a task are active."""
        return round(self.density * self.d_ff)

    @property
    def label(self) -> str:
        """``compact_ffn 4096x512x2048 float32 0.50``: for tables, logs and test names."""
        tasks = f" {self.tasks} tasks" if self.tasks > 1 else ""
        return f"{self.name} {self.tokens}x{self.d_model}x{self.d_ff}{tasks} {self.dtype} {self.density:.2f}"


@dataclass(frozen=True)
class Grid:
    """The product of what it lists. A shape is tokens, d_model, d_ff, tasks."""

    operators: Sequence[str]
    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    densities: Sequence[float]
    compiled: bool = True
    grouped: bool = True
    activations: Sequence[str] = ("relu",)

    def cases(self) -> Iterator[Case]:
        """Density varies fastest: what torch.compile made for a shape then serves the next case."""
        chosen = itertools.product(self.operators, self.activations, self.shapes, self.dtypes)
        for operator, activation, shape, dtype in chosen:
            if operator == "row_sparse_adamw" and dtype != "float32":
                continue  # parameters and moments are kept in float32 whatever the products are in
            for density in (1.0,) if operator == "linear_relu_count" else self.densities:
                yield Case(operator, *shape[:3], dtype, density, shape[3], self.compiled, self.grouped, activation)


_A, _B = (4096, 512, 2048, 1), (2048, 1024, 4096, 1)  # the blocks of Transformer-base and -big
_GATED, _GPU_GATED = (4096, 512, 1376, 1), (16384, 1024, 2752, 1)  # three matrices as large as two of the others
_MIXED = (4096, 512, 2048, 8)
_GPU_BASE, _GPU_BIG, _GPU_MIXED = (16384, 512, 2048, 1), (16384, 1024, 4096, 1), (16384, 1024, 4096, 8)
_GROUPED = ("row_sparse_wgrad", "compact_ffn")
_DENSITIES = (0.3, 0.5, 0.78, 1.0)  # 0.78 is that of the published masks
_SMOKE = (
    Grid(("linear_relu_count",), ((96, 32, 128, 1),), ("float32",), (1.0,)),
    Grid(OPERATORS[1:], ((96, 32, 128, 1),), ("float32", "bfloat16"), (0.5,), compiled=False),
    Grid(_GROUPED, ((96, 32, 128, 3),), ("float32",), (0.5,), compiled=False),
    Grid(("block",), ((96, 32, 128, 1),), ("float32",), (0.5,), activations=("gelu", "swiglu"), compiled=False),
)


_others = functools.partial(Grid, ("block",), compiled=False)  # blocks with other activations than ReLU

GRIDS: dict[str, dict[str, tuple[Grid, ...]]] = {
    "cpu": {
        "full": (
            Grid(OPERATORS, (_A, _B), ("float32", "bfloat16"), (0.3, 0.5, 0.78, 0.9, 1.0)),
            Grid(_GROUPED, (_MIXED,), ("float32", "bfloat16"), _DENSITIES),
            _others((_A,), ("float32", "bfloat16"), (0.3, 0.5, 0.78, 0.9, 1.0), activations=("gelu",)),
            _others((_GATED,), ("float32", "bfloat16"), (0.3, 0.5, 0.78, 0.9, 1.0), activations=("swiglu",)),
        ),
        "quick": (
            Grid(OPERATORS, (_A,), ("float32",), _DENSITIES),
            Grid(OPERATORS, (_B,), ("float32",), (0.5, 0.78), compiled=False),
            Grid(OPERATORS, (_A,), ("bfloat16",), (0.5, 0.78, 1.0), compiled=False),
            Grid(_GROUPED, (_MIXED,), ("float32",), (0.78,), compiled=False),
            _others((_A,), ("float32",), (0.5, 0.78, 1.0), activations=("gelu",)),
            _others((_GATED,), ("float32",), (0.5, 0.78, 1.0), activations=("swiglu",)),
        ),
        "smoke": _SMOKE,
    },
    "cuda": {
        "full": (
            Grid(OPERATORS, (_GPU_BASE, _GPU_BIG), ("bfloat16", "float16", "float32"), (0.3, 0.5, 0.78, 0.9, 1.0)),
            Grid(_GROUPED, (_GPU_MIXED,), ("bfloat16",), _DENSITIES),
            _others((_GPU_BIG,), ("bfloat16",), (0.3, 0.5, 0.78, 0.9, 1.0), activations=("gelu",)),
            _others((_GPU_GATED,), ("bfloat16",), (0.3, 0.5, 0.78, 0.9, 1.0), activations=("swiglu",)),
        ),
        "quick": (
            Grid(OPERATORS, (_GPU_BIG,), ("bfloat16",), _DENSITIES),
            Grid(("row_sparse_adamw",), (_GPU_BIG,), ("float32",), _DENSITIES),
            Grid(
                ("row_sparse_wgrad", "compact_ffn", "block"), (_GPU_BASE,), ("bfloat16",), (0.5, 0.78), compiled=False
            ),
            Grid(_GROUPED, (_GPU_MIXED,), ("bfloat16",), (0.5, 0.78), compiled=False),
        ),
        "smoke": _SMOKE,
    },
}


def cases(
    name: str,
    device_type: str,
    *,
    operators: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    shapes: Sequence[Shape] | None = None,
    compiled: bool = True,
    grouped: bool = True,
    batches: str = "all",
    activations: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a set on a kind of device, each once.

    Args:
        name: one of ``SETS``.
        device_type: ``cpu`` or ``cuda``.
        operators: only these.
        dtypes: only these; AdamW, whose state is float32 always, stays.
        densities: in place of the set's.
        shapes: in place of the set's: tokens, d_model, d_ff, tasks.
        compiled: False leaves torch.compile out everywhere.
        grouped: False leaves PyTorch's grouped product out.
        batches: one of ``BATCHES``.
        activations: only blocks with these, and the operators where ReLU is among them.
    """
    found: dict[Case, None] = {}
    for grid in GRIDS[device_type][name]:
        wanted = [o for o in grid.operators if operators is None or o in operators]
        narrowed = replace(
            grid, operators=wanted, shapes=shapes or grid.shapes, densities=densities or grid.densities,
            compiled=grid.compiled and compiled, grouped=grouped,
            activations=[a for a in grid.activations if activations is None or a in activations],
        )  # fmt: skip
        for case in narrowed.cases():
            asked = batches == "all" or (case.tasks > 1) == (batches == "several")
            if asked and (dtypes is None or case.dtype in dtypes or case.operator == "row_sparse_adamw"):
                found[case] = None
    return sorted(found, key=lambda case: OPERATORS.index(case.operator))


TARGETS: dict[tuple[str, str, str], dict[float, float]] = {
    ("cpu", "linear_relu_count", "float32"): {1.0: 0.95},
    ("cpu", "row_sparse_wgrad", "float32"): {0.5: 1.75, 0.78: 1.15, 0.9: 0.97, 1.0: 0.97},
    ("cpu", "compact_ffn", "float32"): {0.5: 1.8, 0.78: 1.2},
    ("cpu", "row_sparse_adamw", "float32"): {0.5: 1.5},
    ("cpu", "block gelu", "float32"): {0.5: 1.7, 0.78: 1.15, 1.0: 0.97},
    ("cpu", "block swiglu", "float32"): {0.5: 1.7, 0.78: 1.15, 1.0: 0.97},
    ("cuda", "linear_relu_count", "bfloat16"): {1.0: 0.9},
    ("cuda", "row_sparse_wgrad", "bfloat16"): {0.5: 1.1, 0.78: 1.0, 1.0: 0.95},
    ("cuda", "compact_ffn", "bfloat16"): {0.5: 1.9, 0.78: 1.22},
    ("cuda", "row_sparse_adamw", "float32"): {0.5: 1.8},
}
"""The speed-up over the baseline that is wanted, by (kind of device, ``Case.name``, dtype) and density, at full size.

On a GPU it is that of the device alone. The baseline of ``row_sparse_wgrad`` there is the dense product with its bias
gradient, on a CPU the product alone; that of ``linear_relu_count`` there is cuBLASLt's product with bias and ReLU in one
kernel, on a CPU product and ReLU. Neither counts.
"""

FULL_SIZE = 2**32
"""Multiplications (tokens x d_model x d_ff, of a gated block half as many again) from which a target holds.

Smaller cases have launch costs of their own.
"""


def target(case: Case, device_type: str) -> float | None:
    """The target of a case, or None where there is none."""
    if case.tasks > 1 or case.tokens * case.d_model * case.d_ff * case.matrices // 2 < FULL_SIZE:
        return None
    return TARGETS.get((device_type, case.name, case.dtype), {}).get(case.density)
