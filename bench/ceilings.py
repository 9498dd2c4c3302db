"""What the device can do at most: the rate of a large matrix product, and of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.rows import Row
from bench.timing import Call, interleaved


def ceilings(device: torch.device, dtypes: Sequence[str], seconds: float = 2.0, small: bool = False) -> Iterator[Row]:
    """A row ``matmul`` (flop/s) for each dtype and a row ``memory`` (bytes/s, read and written), the best of all rounds.

    Args:
        device: to measure.
        dtypes: of the products.
        seconds: for all together.
        small: tiny sizes, to see that it runs; the figures mean nothing.
    """
    n = 256 if small else 8192 if device.type == "cuda" else 2048
    numbers = 2**18 if small else 2**28 if device.type == "cuda" else 2**25
    a, b, c = (torch.rand(numbers, device=device) for _ in range(3))
    moved = {
        "copy": (2 * 4 * numbers, lambda _: c.copy_(a)),
        "read": (4 * numbers, lambda _: a.sum()),
        "add": (3 * 4 * numbers, lambda _: torch.add(a, b, out=c)),
    }
    operands = {name: torch.randn(2, n, n, device=device).to(getattr(torch, name)) for name in dtypes}
    calls: dict[str, Call] = {"memory " + name: call for name, (_, call) in moved.items()}
    product: Callable[[Tensor], Call] = lambda pair: lambda _: pair[0] @ pair[1]
    calls |= {f"matmul {name}": product(pair) for name, pair in operands.items()}
    times = interleaved(calls, device, rounds=5, least_seconds=seconds, most_seconds=3 * seconds)
    rounds = len(next(iter(times.values())))
    best = max(size / min(times["memory " + name]) for name, (size, _) in moved.items())
    yield {"kind": "ceiling", "what": "memory", "dtype": "", "per_second": best, "rounds": rounds}
    for name in dtypes:
        rate = 2 * n**3 / min(times["matmul " + name])
        yield {"kind": "ceiling", "what": "matmul", "dtype": name, "per_second": rate, "rounds": rounds}
