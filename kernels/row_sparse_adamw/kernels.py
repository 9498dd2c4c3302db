"""The Triton kernel of ``row_sparse_adamw``; ``triton.py`` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw_kernel(
    table,
    owner,
    decay,
    step_size,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    root_correction2,
    eps,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
):
    """One block of GROUPS x WIDE elements. WIDE neighbours are in one row, and with WIDE > 1 they are read together.

    W: the dtype of weights to which the elements are written as well; None: there are none. There every row is active.
    """
    this = tl.load(owner + tl.program_id(0))
    entry = table + this * FIELDS
    p = tl.load(entry + 0).to(tl.pointer_type(P))
    g = tl.load(entry + 1).to(tl.pointer_type(G))
    m = tl.load(entry + 2).to(tl.pointer_type(M))
    v = tl.load(entry + 3).to(tl.pointer_type(V))
    active = tl.load(entry + 4).to(tl.pointer_type(tl.uint8))
    elements = tl.load(entry + 5)
    width = tl.load(entry + 6)
    if WIDE > 1:
        p = tl.multiple_of(p, 16)
        g = tl.multiple_of(g, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
    begin = (tl.program_id(0) - tl.load(entry + 7)) * (GROUPS * WIDE)
    group = tl.arange(0, GROUPS) * WIDE
    keep = begin + group < elements
    if active.to(tl.int64) != 0:
        # 64-bit divisions are slow: one for the block, then from the second row in it on in 32 bits.
        row = begin // width
        first = tl.minimum((row + 1) * width - begin, GROUPS * WIDE).to(tl.int32)
        later = 1 + (group - first) // tl.minimum(width, GROUPS * WIDE).to(tl.int32)
        keep &= tl.load(active + row + tl.where(group < first, 0, later), mask=keep, other=0) != 0
    at = group[:, None] + tl.arange(0, WIDE)[None, :]
    keep = tl.broadcast_to(keep[:, None], (GROUPS, WIDE))
    grad = tl.load(g + begin + at, mask=keep, other=0.0).to(tl.float32)
    mean = tl.load(m + begin + at, mask=keep, other=0.0).to(tl.float32)
    square = tl.load(v + begin + at, mask=keep, other=0.0).to(tl.float32)
    value = tl.load(p + begin + at, mask=keep, other=0.0).to(tl.float32)
    mean = mean + one_minus_beta1 * (grad - mean)
    square = beta2 * square + one_minus_beta2 * grad * grad
    root = tl.div_rn(tl.sqrt_rn(square), root_correction2) + eps
    value = value * decay - step_size * tl.div_rn(mean, root)
    tl.store(m + begin + at, mean.to(M), mask=keep)
    tl.store(v + begin + at, square.to(V), mask=keep)
    tl.store(p + begin + at, value.to(P), mask=keep)
    if W is not None:
        weight = tl.load(entry + 8).to(tl.pointer_type(W))
        index = tl.load(entry + 9).to(tl.pointer_type(tl.int64))
        place = begin // width
        before = begin - place * width
        ahead = tl.minimum(width - before, GROUPS * WIDE).to(tl.int32)
        span = tl.minimum(width, GROUPS * WIDE).to(tl.int32)
        here = at < ahead
        neuron = tl.load(index + place + tl.where(here, 0, 1 + (at - ahead) // span), mask=keep, other=0)
        number = tl.where(here, before + at, (at - ahead) % span)
        target = weight + neuron * tl.load(entry + 10) + number * tl.load(entry + 11)
        tl.store(target, value.to(P).to(W), mask=keep)
