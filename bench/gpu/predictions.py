"""What arithmetic says the kernels take on an H100, to hold the first measurements against. None of it was measured."""

from __future__ import annotations

from typing import NamedTuple

DEVICE = "H100"
"""What they are for, as its name has it: nothing else is compared with them, and nothing of another size."""
SOURCE = f"expected, from arithmetic for an {DEVICE}; not measured"


class Prediction(NamedTuple):
    """A range in microseconds for what an experiment of the probe calls by that name.

    ``before``: of a kernel that has since been changed so that it should take less.
    """

    low: float
    high: float
    before: bool = False


PREDICTIONS: dict[tuple[str, str], Prediction] = {
    ("E2", "fc1 by _addmm_activation, big"): Prediction(195, 210),
    ("E3", "fc1 with counts, flattened, GROUP 8"): Prediction(215, 240),
    ("E3", "h, 3 stages, not flattened"): Prediction(120, 135),
    ("E3", "h, 3 stages, flattened"): Prediction(112, 112),
    ("E3", "gate, 2 stages, not flattened"): Prediction(145, 165),
    ("E3", "gate, 3 stages, not flattened"): Prediction(120, 135),
    ("E4", "expand_kernel 1, 1 task"): Prediction(6, 8),
    ("E4", "expand_bias_kernel 1, 1 task"): Prediction(12, 16, before=True),
    ("E4", "expand_bias_kernel 1, 8 tasks"): Prediction(100, 100, before=True),
    ("E5", "pack_columns, density 0.5, 64 tokens, 8 warps"): Prediction(95, 115),
    ("E5", "pack_columns, density 0.5, 32 tokens, 4 warps"): Prediction(70, 85),
    ("E6", "compact_ffn, big, density 0.5, device"): Prediction(705, 705),
    ("E6", "compact_ffn, big, density 0.5, as called"): Prediction(800, 950, before=True),
    ("E6", "dense, big, as called"): Prediction(1420, 1500),
    ("E6", "compact_ffn, base, density 0.5, device"): Prediction(210, 210),
    ("E6", "compact_ffn, base, density 0.5, as called"): Prediction(500, 900, before=True),
    ("E6", "dense, base, as called"): Prediction(420, 460),
    ("E7", "row_sparse_adamw, density 0.5, 2048 elements"): Prediction(260, 310),
}
"""By experiment and name: 16384 tokens in bfloat16."""
