"""Rows of every kind, as the suite writes them, with made-up figures: to test reports with, and to look at one.

PYTHONPATH=. python tests/bench/fabricated.py FOLDER
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cases import TARGETS

CPU = {"device": "Some Processor, 2 threads", "device_type": "cpu", "driver": "", "torch": "2.13.0+cpu", "triton": ""}
GPU = {"device": "Some GPU", "device_type": "cuda", "driver": "CUDA 13.0", "torch": "2.11.0", "triton": "3.6.0"}
STAMP = {"python": "3.12.3", "backend_asked": "auto", "commit": "0123456789ab", "date": "2026-01-02T03:04:05Z"}
DENSITIES = (0.3, 0.5, 0.78, 1.0)


def timing(noise: random.Random, milliseconds: float, baseline: float) -> dict[str, Any]:
    """The fields of a time and its speed-up, with spreads of a few per cent."""
    ratio = baseline / milliseconds
    wide = 0.01 + 0.03 * noise.random()
    ends = {"speedup_low": ratio * (1 - wide), "speedup_high": ratio * (1 + wide)}
    if milliseconds == baseline:
        ends = {"speedup_low": 1.0, "speedup_high": 1.0}
    between = {"milliseconds_low": milliseconds * (1 - wide), "milliseconds_high": milliseconds * (1 + wide)}
    return {"milliseconds": milliseconds, "speedup": ratio, "rounds": 11, **ends, **between}


def device_timing(noise: random.Random, milliseconds: float, baseline: float) -> dict[str, Any]:
    """Of a GPU, the fields of the device alone: a tenth faster than as called."""
    fields = timing(noise, 0.9 * milliseconds, 0.95 * baseline if milliseconds != baseline else 0.9 * baseline)
    return {f"device_{name}": value for name, value in fields.items()}


def operator_rows(noise: random.Random, device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    gpu = device["device_type"] == "cuda"
    rates = {"float32": 4e13, "bfloat16": 6e14} if gpu else {"float32": 2.5e11, "bfloat16": 8e11}
    moves = 3e12 if gpu else 2e10
    shapes = [(16384, 1024, 4096, 1), (16384, 1024, 4096, 8)] if gpu else [(4096, 512, 2048, 1), (2048, 1024, 4096, 1)]
    baselines = {
        "linear_relu_count": "addmm_activation" if gpu else "relu(linear)",
        "row_sparse_wgrad": "dense, bias gradient" if gpu else "dense",
        "compact_ffn": "dense",
        "row_sparse_adamw": "fused AdamW",
        "block": "dense",
    }
    for name, baseline in baselines.items():
        for tokens, d, d_ff, tasks in shapes if name != "row_sparse_adamw" else shapes[:1]:
            for dtype in ["float32"] if name == "row_sparse_adamw" else rates:
                for density in (1.0,) if name == "linear_relu_count" else DENSITIES:
                    whole = (
                        0
                        if name == "row_sparse_adamw"
                        else (12 if name in ("block", "compact_ffn") else 2) * tokens * d * d_ff
                    )
                    moved = (28 if name == "row_sparse_adamw" else 4) * d * d_ff * 12
                    dense = 1e3 * max(whole / rates[dtype], moved / moves) / 0.7
                    providers = {
                        baseline: (1.0, dense, False),
                        "weight x mask": (density, dense * 1.04, False),
                        "index_select": (density, dense * (0.25 + 0.95 * density), False),
                        "ours": (density, dense * (0.06 + 0.96 * density), True),
                        "ours: reference": (density, dense * (0.2 + 0.96 * density), True),
                    }
                    if name == "block":
                        providers |= {
                            "mode forward": providers.pop("ours"),
                            "mode update": (1.0, dense * (0.84 + 0.2 * density), True),
                        }
                    for provider, (work, milliseconds, ours) in providers.items():
                        target = TARGETS.get((device["device_type"], name, dtype), {}).get(density)
                        yield {
                            "kind": "operator",
                            "operator": name,
                            "provider": provider,
                            "baseline": baseline,
                            "ours": ours,
                            "computes": "all" if work == 1 else "active",
                            "backend": ("triton" if gpu else "native") if ours and "mode" not in provider else "",
                            "tokens": tokens,
                            "d_model": d,
                            "d_ff": d_ff,
                            "tasks": tasks,
                            "dtype": dtype,
                            "density": density,
                            "active": round(density * d_ff),
                            **timing(noise, milliseconds, dense),
                            **(device_timing(noise, milliseconds, dense) if gpu else {}),
                            "input_sets": 4,
                            "peak_bytes": None if provider == "weight x mask" else int(4e7 * (0.5 + work)),
                            "flops": round(whole * work),
                            "bytes": round(moved * work),
                            "target": target if provider in ("ours", "mode forward") else None,
                        }
    yield {"kind": "ceiling", "what": "memory", "dtype": "", "per_second": moves, "rounds": 5}
    for dtype, rate in rates.items():
        yield {"kind": "ceiling", "what": "matmul", "dtype": dtype, "per_second": rate, "rounds": 5}
    absent = {
        "operator": "compact_ffn",
        "provider": "grouped_mm",
        "reason": "torch.nn.functional has no grouped_mm here",
    }
    yield {"kind": "absent", **absent, "dtype": "float32", "density": 0.5}


def model_fields(shape: str, gpu: bool) -> dict[str, Any]:
    big = shape == "big"
    sizes = {"d_model": 1024 if big else 512, "d_ff": 4096 if big else 2048, "heads": 16 if big else 8}
    layers = 6 if gpu else 2
    depth = {"encoder_layers": layers, "decoder_layers": layers, "vocabulary": 64000 if gpu else 8000}
    return {"shape": shape, "scaled": not gpu, **sizes, **depth, "tokens": 8192 if gpu else 1024}


def step_rows(noise: random.Random, device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    gpu = device["device_type"] == "cuda"
    for shape in ("base", "big"):
        model = model_fields(shape, gpu) | {"dtype": "bfloat16" if gpu else "float32"}
        block = 120.0 if shape == "base" else 260.0
        for batch in ("pure", "mixed"):
            common = {"kind": "step", **model, "batch": batch, "tasks_in_batch": 1 if batch == "pure" else 8}
            for system in ("dense", "release", "forward", "update"):
                for optimizer in ("adamw", "row_sparse_adamw") if system != "release" else ("adamw",):
                    for density in (1.0,) if system == "dense" else DENSITIES:
                        shrink = {
                            "dense": 1.0,
                            "release": 1.05,
                            "forward": 0.08 + density,
                            "update": 0.9 + 0.13 * density,
                        }
                        forward, backward = 60 + block * shrink[system] / 3, 120 + block * shrink[system] * 2 / 3
                        optimize = 90 * (density if optimizer != "adamw" else 1.0)
                        whole, switch = forward + backward + optimize + 2, 0.0 if system == "dense" else 0.4
                        yield common | {
                            "system": system,
                            "optimizer": optimizer,
                            "density": density,
                            "baseline": "dense, adamw",
                            **timing(noise, whole, 272 + block),
                            "tokens_per_second": model["tokens"] / whole * 1e3,
                            "parts": {
                                "task switch": switch,
                                "forward": forward,
                                "backward": backward,
                                "optimizer": optimize,
                            },
                            "feed_forward_share": block / (272 + block) if shape == "base" else None,
                            "peak_bytes": int(1.4e9),
                            "mask_bytes": 0 if system == "dense" else 393216,
                            "tasks": 16,
                        }
    for system in ("release", "forward"):
        for tasks in (16, 60, 300, 1000):
            computed = system == "release" and tasks > 60
            row = {"kind": "tasks", **model_fields("base", gpu), "system": system, "tasks": tasks, "density": 0.78}
            row |= {"mask_bytes": tasks * (12582912 if system == "release" else 2048), "computed": computed}
            row |= {
                "specialize_seconds": None if computed else 0.01 * tasks,
                "task_switch_microseconds": None if computed else 40.5,
            }
            yield row | (
                {"milliseconds": None, "speedup": None, "rounds": 0} if computed else timing(noise, 390.0, 389.0)
            )


def profiling_rows(noise: random.Random, device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    model = model_fields("base", device["device_type"] == "cuda")
    for way, milliseconds in (("no counting", 80.0), ("release", 400.0), ("ours", 84.0)):
        row = {
            "kind": "profiling",
            "way": way,
            "baseline": "release",
            **model,
            "batches": 4,
            "sentences": 256,
            "dtype": "float32",
        }
        row |= {"padding": "include" if way == "release" else "exclude", "peak_bytes": 3 * 2**20}
        yield row | timing(noise, milliseconds, 400.0) | {"tokens_per_second": 1e6 / milliseconds}


def probe_rows() -> Iterator[dict[str, Any]]:
    common = {"kind": "probe", "experiment": "E3", "of": "device", "note": "", "reason": None}
    expected = {"expected_low": 120.0, "expected_high": 135.0, "expected_source": "arithmetic"}
    yield {**common, "name": "h", "microseconds": 150.5, "roof_share": 0.61, **expected}
    yield {
        **common,
        "name": "gate",
        "microseconds": None,
        "roof_share": None,
        "reason": "OutOfResources: x",
        **expected,
    }
    yield {"kind": "probe", "experiment": "E8", "name": "graph", "microseconds": None, "absent": "no graphs here"}


def fabricated(device: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every kind as a whole suite writes them on a device; the figures are made up."""
    noise = random.Random(0)
    made = [*operator_rows(noise, device), *step_rows(noise, device), *profiling_rows(noise, device), *probe_rows()]
    return [{**row, **device, **STAMP} for row in made]


def written(path: Path, *groups: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for rows in groups for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    import sys

    from bench.report import __main__ as report

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    report.main([str(written(folder / "rows.jsonl", fabricated(CPU), fabricated(GPU))), "--out", str(folder)])
