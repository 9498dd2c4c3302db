"""What the training-step benchmark prints: a line for each row, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.summary import amdahl, break_even
from bench.rows import Row, figure
from bench.steps.model import Shape
from bench.timing import Spread

PRODUCTS_SAVED = {"release": 0.0, "forward": 1.0, "update": 1 / 6}
"""Of the six matrix products of a feed-forward pair (two forward, four backward), the share that shrinks with density."""


def title(shape: Shape, dtype: str) -> str:
    """The model and its micro-batch, and whether it is smaller than the real one."""
    what = f"{shape.shape}: d {shape.d_model}, d_ff {shape.d_ff}, {shape.heads} heads"
    size = f"{shape.encoder_layers}+{shape.decoder_layers} layers, vocabulary {shape.vocabulary}"
    scaled = "; scaled down: layers, vocabulary and micro-batch" if shape.scaled else ""
    return f"{what}, {size}, {shape.tokens} tokens, {dtype}{scaled}"


def line(row: Row) -> str:
    """One line of the table."""
    parts = "  ".join(f"{name} {value:.1f}" for name, value in row["parts"].items())
    density = "" if row["system"] == "dense" else f"{row['density']:.2f}"
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**20:.0f} MiB"
    return (
        f"  {row['system']:8}{row['optimizer']:17}{row['batch']:6}{density:5}{row['milliseconds']:8.1f} ms  "
        f"{figure(row)}  {row['tokens_per_second']:8.0f} tokens/s  ({parts}){memory}"
    )


def conclusion(rows: Sequence[Row], share: Spread, noise: Spread) -> str:
    """Noise, the feed-forward share with the bound that it sets, and the break-even density of each system."""
    said = [
        f"  noise: dense against itself {noise.median:.2f}x [{noise.low:.2f}, {noise.high:.2f}]",
        f"  feed-forward share of the dense step: {share.median:.1%} [{share.low:.1%}, {share.high:.1%}] (pairs skipped)",
    ]
    densities = sorted({row["density"] for row in rows if row["system"] != "dense"})
    for system in ("forward", "update") if densities else ():
        bounds = (f"{amdahl(share.median * PRODUCTS_SAVED[system], d):.2f}x at {d:g}" for d in densities)
        said.append(f"  with nothing lost a step of {system} could gain {', '.join(bounds)}")
    for system, optimizer, batch in dict.fromkeys((r["system"], r["optimizer"], r["batch"]) for r in rows):
        own = [r for r in rows if (r["system"], r["optimizer"], r["batch"]) == (system, optimizer, batch)]
        if system not in ("dense", "release") and len(own) > 1:
            said.append(f"  break-even density of {system}, {optimizer}, {batch}: {break_even_words(own)}")
    if any(row["system"] == "release" for row in rows):
        said.append("  release-style masking has no mixed batches: a weight times a mask is of one task")
    return "\n".join(said)


def break_even_words(rows: Sequence[Row]) -> str:
    """The density at which a system is as fast as dense, by the line between its measured speed-ups."""
    points = [(row["density"], row["speedup"]) for row in rows]
    lowest, highest = min(points)[0], max(points)[0]
    found = break_even(points)
    if found is None:
        return f"none, it is slower at every density from {lowest:g}"
    if all(speedup >= 1 for _, speedup in points):
        return f"faster everywhere up to {highest:g}"
    return f"{found:.2f}"
