"""Rows of ``bench.host`` as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.tables import NONE, Lines, table
from bench.rows import Row

SAID = (
    "Launches of Triton kernels, products of the library and other kernels of PyTorch that a call puts on a GPU, and the "
    "processor time of its Python and PyTorch on one thread of a CPU, without the driver's calls; of dense: of the dense "
    "block's forward and backward pass, the median of paired ratios and the middle 80 % of the rounds. No GPU computed."
)


def host(rows: Sequence[Row]) -> Lines:
    """What each call costs the host."""
    body = []
    for row in rows:
        taken = NONE if row.get("microseconds") is None else f"{row['microseconds']:.0f} us"
        ratio = NONE if row.get("ratio") is None else f"{row['ratio']:.2f}×"
        if row.get("ratio") is not None and row.get("ratio_low") is not None and row.get("ratio_high") is not None:
            ratio += f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        counts = [str(row[name]) for name in ("launches", "products", "kernels")]
        body.append([str(row["name"]), str(row.get("dtype") or NONE), *counts, taken, ratio])
    return table(["call", "<dtype", "launches", "products", "kernels", "processor time", "of dense"], body)
