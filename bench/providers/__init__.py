"""Who can compute an operator: ours on each backend, and what one would use instead. One module for each operator.

A provider is checked against the definition, ``reference.py`` in float64, before it is timed.
"""

from __future__ import annotations

import importlib

import torch

from bench.cases import Case
from bench.providers.shared import Problem


def problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """The inputs, providers and expected results of a case, made on the device."""
    torch.manual_seed(seed)
    made: Problem = importlib.import_module(f"bench.providers.{case.operator}").problem(case, device)
    return made
