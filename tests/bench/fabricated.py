"""Rows of every kind to test reports with: the committed results as if of other devices, and the kinds they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.rows import read

CPU = {"device": "Some Processor, 2 threads", "device_type": "cpu", "driver": "", "torch": "2.13.0+cpu", "triton": ""}
GPU = {"device": "Some GPU", "device_type": "cuda", "driver": "CUDA 13.0", "torch": "2.11.0", "triton": "3.6.0"}
STAMP = {"python": "3.12.3", "backend_asked": "auto", "commit": "0123456789ab", "date": "2026-01-02T03:04:05Z"}
_PROBE = {"kind": "probe", "experiment": "E3", "of": "device", "note": "", "reason": None, "roof_share": None}
_PROBE |= {"expected_low": 120.0, "expected_high": 135.0, "expected_source": "arithmetic"}
MORE: list[dict[str, Any]] = [
    {"kind": "absent", "operator": "compact_ffn", "provider": "grouped_mm", "dtype": "float32", "density": 0.5}
    | {"reason": "torch.nn.functional has no grouped_mm here"},
    _PROBE | {"name": "h", "microseconds": 150.5, "roof_share": 0.61},
    _PROBE | {"name": "gate", "microseconds": None, "reason": "OutOfResources: x"},
    {"kind": "probe", "experiment": "E8", "name": "graph", "microseconds": None, "absent": "no graphs here"},
]


def fabricated(device: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every kind as if measured on a device; on a GPU operators have times of the device alone."""
    made = []
    for row in [*read(sorted(ROOT.glob("bench/results/*.jsonl"))[:1]), *MORE]:
        if device is GPU and row["kind"] == "operator":
            row |= {
                f"device_{name}": row[name] for name in row if name.startswith(("milliseconds", "speedup", "rounds"))
            }
        made.append({**row, **STAMP, **device})
    return made


def written(path: Path, *groups: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for rows in groups for row in rows), encoding="utf-8")
    return path
