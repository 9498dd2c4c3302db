"""The precision that a training computes in."""

from __future__ import annotations

from typing import Any

import torch

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Within the block passes compute in ``precision``: ``fp32``, ``bf16`` or ``fp16``."""
    return torch.autocast(device.type, _HALF.get(precision), enabled=precision in _HALF)


def resolve_precision(precision: str, device: torch.device, d_model: int) -> str:
    """``fp32``, ``bf16`` or ``fp16``; ``auto`` is bf16 on a GPU that has it, and for wide models on a CPU with AMX.

    On two cores with AMX a feed-forward block with d_model 512 was 3.5 times as fast in bf16 as in fp32, but training a
    model with d_model 192 was no faster: small products do not pay for the casts.

    Raises:
        ValueError: fp16 on a CPU, for which it is not made.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision is fp16 and the device is the CPU; expected a GPU; take bf16, fp32 or auto on the CPU"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if _has_bfloat16() else "fp32"
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that is supported
    return "bf16" if device.type == "cpu" and d_model >= 512 and known.get("amx_bf16", False) else "fp32"


def precision_note(precision: str, device: torch.device) -> str | None:
    """What a user should know of a choice of precision on a GPU that only emulates bfloat16; None elsewhere."""
    if device.type != "cuda" or precision not in ("auto", "bf16") or _has_bfloat16():
        return None
    lacking = f"{torch.cuda.get_device_name(device)} has no bfloat16 but in emulation"
    if precision == "bf16":
        return f"{lacking}, which is slow: precision fp16 or fp32 is faster"
    return f"{lacking}: precision auto is fp32 there, fp16 is faster"


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
