"""Rows of the probe of a GPU (``bench/gpu/probe.py``) as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.predictions import DEVICE
from bench.report.summary import of_kind
from bench.report.tables import NONE, Lines, table
from bench.rows import Row

EXPECTED = (
    f"What is expected comes from arithmetic for an {DEVICE}, for 16384 tokens in bfloat16; none of it was measured. It is "
    "compared with what was measured on that device at full size, and with nothing else."
)


def expected_range(row: Row) -> str:
    """``120 to 135 us``: what arithmetic says that a kernel takes."""
    low, high = row["expected_low"], row["expected_high"]
    before = ", before a change" if row.get("expected_before") else ""
    return (f"{low:g} us" if low == high else f"{low:g} to {high:g} us") + before


def compared(row: Row) -> bool:
    """Whether what was expected is of the device that was measured, and of that size. Older rows are of full size."""
    wanted = str(row.get("expected_device") or DEVICE)
    known = row.get("expected_low") is not None and row.get("expected_high") is not None
    return known and not row.get("small") and wanted in str(row.get("device"))


def probe(rows: Sequence[Row]) -> Lines:
    """Every measurement of the probe of a GPU."""
    body = []
    for row in of_kind(rows, "probe"):
        failed = row.get("reason") or row.get("absent")
        measured = NONE if row.get("microseconds") is None else f"{row['microseconds']:.1f} us"
        share = NONE if row.get("roof_share") is None else f"{100 * row['roof_share']:.0f} %"
        note = str(failed or row.get("note") or NONE).replace("|", "/")
        body.append([row["experiment"], row["name"], measured, str(row.get("of") or NONE), share, note])
    return table(["experiment", "<what", "measured", "<of", "share of the roof", "<note"], body) if body else []


def predictions(rows: Sequence[Row]) -> Lines:
    """What was expected of the probe's measurements, from arithmetic for an H100, against what was found."""
    body = []
    for row in of_kind(rows, "probe"):
        low, high, found = row.get("expected_low"), row.get("expected_high"), row.get("microseconds")
        if low is None or high is None:
            continue
        if found is None:
            said = f"failed: {row['reason']}" if row.get("reason") else "not measured"
        elif not compared(row):
            size = "at tiny sizes " if row.get("small") else ""
            said = f"not compared: measured {size}on {row.get('device') or 'an unnamed device'}"
        elif 0.95 * low <= found <= 1.05 * high:
            said = "as expected"
        else:
            said = f"{low / found:.2f} times as fast" if found < low else f"{found / high:.2f} times as slow"
        measured = NONE if found is None else f"{found:.1f} us"
        body.append([row["experiment"], row["name"], expected_range(row), measured, said.replace("|", "/")])
    written = table(["experiment", "<what", "expected", "measured", "<verdict"], body)
    return [EXPECTED, "", *written] if body else []
