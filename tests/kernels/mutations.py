"""Breaks the operators, one line at a time, and runs the tests that must notice.

    python tests/kernels/mutations.py            all of them (minutes)
    python tests/kernels/mutations.py --list     their names
    python tests/kernels/mutations.py WORD...    those with all these words in their names, "native valid"

Works on a copy of the checkout in a temporary folder, with a native library of its own where CMake and a C++ compiler
are there. First the tests in question must pass on the unchanged copy. The exit status is 1 if a mutation was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """One change that must not go unnoticed: ``old``, which stands once in ``file``, becomes ``new``.

    ``tests`` are words in names of tests of the operator, of which one at least must fail on that backend.
    """

    operator: str
    backend: str
    what: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.operator} {self.backend}: {self.what}"

    @property
    def path(self) -> str:
        """The file, from the checkout's root."""
        return f"kernels/{self.file}" if "/" in self.file else f"kernels/{self.operator}/{self.file}"

    @property
    def selection(self) -> tuple[str, ...]:
        """The arguments of pytest."""
        words = " or ".join(self.tests.split())
        own = f"tests/kernels/test_{self.operator}_{self.backend}.py"
        files = [f"tests/kernels/test_{self.operator}.py", *([own] if (ROOT / own).is_file() else [])]
        chosen = f"[{self.backend} and ({words})"
        if self.backend == "triton" and "grouped" in words:
            # The library computes several tasks in float32: there the products are computed either way.
            files, chosen = [*files, "tests/kernels/test_products.py"], f"({chosen}) or {self.operator}_is_exact"
        return (*files, "-k", chosen)


def _of(operator: str, backend: str, file: str, *rows: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(operator, backend, what, file, old, new, tests) for what, old, new, tests in rows]


# A table: lines may be long.
# fmt: off
# ruff: noqa: E501
MUTATIONS = [
    *_of("linear_relu_count", "reference", "reference.py",
        ("NaN counts", "fired = h[start:stop] > 0", "fired = ~(h[start:stop] <= 0)", "nan"),
        ("valid flags of other tokens", "fired[valid[start:stop]]", "fired[valid[: stop - start]]", "by_task"),
        ("all valid", "if valid is not None:", "if False:", "integers"),
        ("task offsets", "fired = h[start:stop] > 0", "fired = h[: stop - start] > 0", "by_task"),
        ("mask of the gradient", "torch.ops.aten.threshold_backward(dh, h, 0)", "dh", "gradients"),
    ),
    *_of("linear_relu_count", "native", "csrc/linear_relu_count.cpp",
        ("NaN counts", "counts[j] += value > 0.0f ? counted : 0u;", "counts[j] += value <= 0.0f ? 0u : counted;", "nan"),
        ("NaN counts in 16 bits", "value != 0 && value <= infinity;", "value != 0 && value < 0x8000;", "nan"),
        ("NaN is lost in 16 bits", "positive || size > infinity ? value", "positive ? value", "nan"),
        ("all valid", "counted == nullptr || counted[t];", "true;", "integers"),
        ("task offsets", "parts.push_back({task, at,", "parts.push_back({0, at,", "by_task"),
        ("rows of a task's last part", "at += kMostRows) {", "at += kMostRows + 1) {", "integers"),
        ("tail of a row", "h[j] = value <= 0.0f ? 0.0f : value;",
         "h[j] = value <= 0.0f && j < n / 8 * 8 ? 0.0f : value;", "integers"),
    ),
    *_of("linear_relu_count", "triton", "linear_relu_count/kernels.py",
        ("NaN counts", "((out.to(tl.float32) > 0) & counted", "((out.to(tl.float32) != 0) & counted", "nan"),
        ("tail of tokens", "counted = token < tokens\n", "counted = token < tokens + BN\n", "integers by_task"),
        ("all valid", "if HAS_VALID:\n            counted &=", "if HAS_VALID:\n            counted |=", "integers"),
        ("tiles of several tasks", "stop >= tl.minimum(begin + BN, tokens)", "stop >= tl.minimum(begin, tokens)", "by_task"),
        ("task offsets", "counts + tl.maximum(task, 0).to(tl.int64) * d_ff", "counts", "by_task"),
        ("tail of a task", "tail = tl.where(end < tokens,", "tail = tl.where(end < 0,", "by_task"),
        ("bias", "mask=neuron < d_ff, other=0.0).to(tl.float32)[:, None]",
         "mask=neuron < d_ff - 1, other=0.0).to(tl.float32)[:, None]", "integers"),
    ),
    *_of("row_sparse_wgrad", "reference", "reference.py",
        ("scatter rows", "dw.index_add_(0, rows,", "dw.index_add_(0, rows.flip(0),", "integers"),
        ("task offsets", ".t() @ x[start:stop]\n        dw", ".t() @ x[: stop - start]\n        dw", "grouped"),
        ("bias gradient of inactive neurons", "return dw.to(dtype or dh.dtype), dh.sum(0)", "return dw.to(dtype or dh.dtype), dh.sum(0) * (dw != 0).any(1)", "integers"),
        ("sums over tasks rounded", "torch.promote_types(dh.dtype, torch.float32)", "dh.dtype", "many_tasks"),
        ("added sums rounded", "product = dh[start:stop].index_select(1, rows).float().t() @ x[start:stop].float()",
         "product = (dh[start:stop].index_select(1, rows).t() @ x[start:stop]).float()", "add_to"),
        ("add_to touches other rows", "total.index_add_(0, rows, product)",
         "total.add_(torch.zeros_like(total).index_add_(0, rows, product))", "add_to"),
    ),
    *_of("row_sparse_wgrad", "native", "row_sparse_wgrad/native.py",
        ("task offsets", "one_task(dh[start:stop], x[start:stop], rows)", "one_task(dh[start:stop], x[: stop - start], rows)", "grouped"),
        ("sums over tasks rounded", "            db += sums\n    return dw",
         "            db += sums\n            dw, db = dw.to(dh.dtype).float(), db.to(dh.dtype).float()\n    return dw", "many_tasks"),
        ("offsets of one product", "torch.where(own, dh[start:stop], zero, out=masked[start:stop])",
         "torch.where(own, dh[start:stop], dh[start:stop] if start else zero, out=masked[start:stop])", "both_ways"),
        ("columns of one product are read", "torch.where(own, dh[start:stop], zero, out=masked[start:stop])",
         "torch.mul(own, dh[start:stop], out=masked[start:stop])", "not_read"),
        ("added sums rounded", "part.index_select(0, rows))\n        db", "part.index_select(0, rows).to(dh.dtype).float())\n        db", "add_to"),
    ),
    *_of("row_sparse_wgrad", "native", "csrc/row_sparse_wgrad.cpp",
        ("scatter rows", "product + j * d_in, row_bytes);", "product + (n - 1 - j) * d_in, row_bytes);", "integers"),
        ("inactive rows", "std::memset(rows + i * row_bytes, 0, row_bytes);", ";", "integers"),
        ("bias gradient of inactive neurons", "bias[j] = static_cast<T>(sums[j]);",
         "bias[j] = static_cast<T>(std::count(block.columns.at.begin(), block.columns.at.end(), j) ? sums[j] : 0.0f);", "integers"),
        ("a step of tokens is dropped", "at == 0 ? multiply(out, a, step) : multiply_add(out, a, step);", "multiply(out, a, step);", "integers"),
        ("tail of transposed tokens", "transpose(tile.data(), n, t1 - t0, n,", "transpose(tile.data(), n, (t1 - t0) / 8 * 8, n,", "integers"),
    ),
    *_of("row_sparse_wgrad", "triton", "common/kernels.py",
        ("tokens of the next task", "left_ptr, shape=[stop, width]", "left_ptr, shape=[tokens, width]", "grouped"),
        ("a part is dropped", "for _ in range(tl.cdiv(stop - start, chunk)):", "for _ in range(tl.cdiv(stop - start - 1, chunk)):", "integers grouped"),
        ("parts of another task", "part += 1", "part += 0", "integers grouped"),
        ("add_to touches other rows", "write = there[:, None] & (owned > 0)[:, None] & real", "write = there[:, None] & real", "add_to"),
        ("rows of the last task alone", "owned = tl.where(place >= 0, 1, owned)", "owned = tl.where(place >= 0, 1, 0)", "grouped"),
        ("mask", "mask=has & real, other=0.0)", "mask=real, other=0.0)", "integers grouped layouts"),
        ("rows of whole parts", "row = neuron if WHOLE else place", "row = place", "integers"),
    ),
    *_of("row_sparse_wgrad", "triton", "row_sparse_wgrad/triton.py",
        ("rows of parts", "add=add, whole=not pack)", "add=add, whole=True)", "grouped"),
    ),
    *_of("row_sparse_wgrad", "triton", "common/active.py",
        ("inverse index", "places.scatter(1, torch.where(index < 0, d_ff, index), place)", "places.scatter(1, torch.where(index < 0, d_ff, index), place // 2)", "grouped"),
    ),
    *_of("row_sparse_wgrad", "triton", "common/kernels.py",
        ("tail of tokens", "there = (token < stop)[:, None]", "there = (token < tokens)[:, None]", "grouped"),
        ("first token of a task", "return task, start + tile * size, stop", "return task, start // size * size + tile * size, stop", "grouped"),
    ),
    *_of("compact_ffn", "reference", "reference.py",
        ("rank-one correction", "constant = w2 @ _constant(b1, index[:active])", "constant = w2 @ torch.zeros_like(b1)", "integers"),
        ("constant of active neurons too", ".index_fill(0, rows, 0)", "", "integers"),
        ("rank-one gradient", "torch.outer(s, _constant(b1, rows))", "torch.zeros_like(w2)", "integers"),
        ("bias gradient of inactive neurons", "((s @ w2) * (b1 > 0)).index_copy_", "((s @ w2) * 0).index_copy_", "integers"),
        ("gate of the bias gradient", "((s @ w2) * (b1 > 0)).index_copy_", "((s @ w2) * (b1 >= 0)).index_copy_", "integers"),
        ("padding", "w1c[active:], w2c[:, active:] = 0, 0", "pass", "integers"),
        ("mask in place", "w1 = w1.masked_fill(inactive[:, None], 0)", "w1 = w1.masked_fill(inactive[:, None], 1)", "integers layouts_of"),
        ("mask of the gradient in place", "dw1.masked_fill_((index < 0)[:, None], 0)", "pass", "integers layouts_of"),
        ("mask of ReLU", "threshold_backward.grad_input(dh, h, 0, grad_input=dh)", "threshold_backward.grad_input(dh, h, -1, grad_input=dh)", "integers"),
        ("scatter rows", ".index_copy_(0, rows, (dh.t() @ x)[:n])", ".index_copy_(0, rows.flip(0), (dh.t() @ x)[:n])", "integers"),
        ("set of another task", "pack(w1, b1, w2, b2, row))", "pack(w1, b1, w2, b2, index[0]))", "grouped"),
        ("sums over tasks rounded", "wide = torch.promote_types(x.dtype, torch.float32)", "wide = x.dtype", "many_tasks"),
    ),
    *_of("compact_ffn", "native", "compact_ffn/native.py",
        ("rank-one correction", "torch.relu(b1).index_fill_(0, rows, 0)", "torch.zeros_like(b1)", "integers"),
        ("bias gradient of inactive neurons", "((s @ w2) * (b1 > 0)).index_copy_", "((s @ w2) * 0).index_copy_", "integers"),
        ("mask of the gradient in place", "dw1.masked_fill_((index < 0)[:, None], 0)", "pass", "integers layouts_of"),
        ("set of another task", "pack(w1, b1, w2, b2, row, scratch=True)", "pack(w1, b1, w2, b2, index[0], scratch=True)", "grouped"),
        ("sums over tasks rounded", "torch.zeros(shape, dtype=torch.float32) for", "torch.zeros(shape, dtype=x.dtype) for", "many_tasks"),
    ),
    *_of("compact_ffn", "native", "csrc/compact.cpp",
        ("rank-one gradient", "fill[j] = static_cast<T>(factor * static_cast<float>(constant[j]));", "fill[j] = T(0.0f);", "integers"),
        ("scatter rows", "const int64_t source = rows - set.size() + j;", "const int64_t source = rows - 1 - j;", "integers"),
        ("rows behind the last active one", "for (; row < rows; ++row) std::memset(base + row * bytes + from, 0, length);", "", "integers"),
        ("mask of ReLU", "gradient[j] = h[j] <= 0.0f ? 0.0f", "gradient[j] = h[j] < 0.0f ? 0.0f", "integers"),
        ("mask of ReLU in 16 bits", "(h[j] != 0 && h[j] <= infinity) || size > infinity;", "h[j] <= infinity || size > infinity;", "integers"),
        ("sums of threads, not of chunks", "wanted ? partial.data() + c * width : nullptr", "wanted ? partial.data() + lo * width : nullptr", "repeats"),
    ),
    *_of("compact_ffn", "native", "csrc/columns.cpp",
        ("tail of a transposed matrix", "for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {",
         "for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows - 1; ++i) {", "integers"),
    ),
    *_of("compact_ffn", "native", "csrc/sums.cpp",
        ("the first chunk is dropped", "for (size_t start = 0; start < chunks.size()", "for (size_t start = n; start < chunks.size()", "integers"),
    ),
    *_of("compact_ffn", "triton", "compact_ffn/kernels.py",
        ("rank-one correction", "tl.where((place < 0)[:, None], product, 0.0)", "tl.where((place < 1)[:, None], product, 0.0)", "integers"),
        ("bias gradient of inactive neurons", "tl.where((place < 0) & positive, tl.sum(through", "tl.where((place < 0) & False, tl.sum(through", "integers"),
        ("gate of the bias gradient", "tl.where((place < 0) & positive, tl.sum(through", "tl.where(place < 0, tl.sum(through", "integers"),
        ("sums of another task", "tl.load(sums_ptr + task64 * d_out + output", "tl.load(sums_ptr + output", "grouped"),
        ("tiles of dh", "(tile < last)[:, None] & (place >= 0)[None, :]", "(tile < first + 1)[:, None] & (place >= 0)[None, :]", "layouts_of many_tasks grouped integers"),
        ("bias of fc2", "total += tl.load(b2_ptr + column, mask=column < d_out, other=0.0).to(tl.float32)", "pass", "integers"),
        ("blocks of the constant", "mask=(block < blocks)[:, None]", "mask=(block < 1)[:, None]", "integers"),
        ("number of its own tile", "done += programs", "done += 0", "integers"),
        ("mask of ReLU", "shut = (h <= 0) |", "shut = (h < 0) |", "integers grouped"),
        ("tail of tokens", "| (first + tl.arange(0, N) >= stop)[None, :]", "| (first + tl.arange(0, N) >= tokens)[None, :]", "grouped"),
        ("padding", "tl.store(fc2_ptr + row[:, None] * fc2_stride + column[None, :], nothing, mask=empty)", "pass", "integers"),
        ("weights of another task", "weight.load([task * width + block * M, k * K])", "weight.load([block * M, k * K])", "grouped"),
        ("rows of the next task", "if first + N > stop:", "if first + N > tokens:", "grouped"),
    ),
    *_of("compact_ffn", "triton", "common/kernels.py",
        ("constant of another task", "constant_ptr + task.to(tl.int64) * columns + column", "constant_ptr + column", "grouped"),
    ),
    *_of("compact_ffn", "triton", "compact_ffn/triton.py",
        ("what is kept", "return y, (whole(h, width), packed.fc1, packed.fc2, places)", "return y, (whole(h, width), 2 * packed.fc1, packed.fc2, places)", "integers"),
    ),
    *_of("compact_ffn", "triton", "common/kernels.py",
        ("rank-one gradient", "total += tl.where(has, 0.0, output * s[None, :])", "total += tl.where(has, 0.0, 0.0)", "integers"),
    ),
    *_of("compact_ffn", "triton", "common/kernels.py",
        ("a tile is dropped", "last = first + tl.cdiv(stop - start, size)", "last = first + (stop - start) // size", "grouped"),
        ("tiles of the tasks before", "for earlier in range(task):", "for earlier in range(task - 1):", "grouped"),
    ),
    *_of("compact_fc1", "reference", "reference.py",
        ("padding", "others = active.detach()[:, :1].expand(-1, len(index))", "others = x.new_zeros((x.shape[0], len(index)))", "padding"),
        ("bias in place", "others = b.detach()[None].expand(x.shape[0], -1)", "others = x.new_zeros((x.shape[0], len(index)))", "padding"),
        ("set of another task", "_forward_one(x[start:stop], w, b, row)", "_forward_one(x[start:stop], w, b, index[0])", "grouped"),
        ("gradient of the padding", "own, part = dz[start:stop].index_select(1, places)", "own, part = dz[start:stop, : len(places)]", "integers"),
        ("sums over tasks rounded", "torch.promote_types(x.dtype, torch.float32)", "x.dtype", "many_tasks"),
    ),
    *_of("compact_fc1", "native", "native.py",
        ("padding", "if fill and n > 0:", "if False:", "padding"),
        ("gradient of the padding", "torch.mm(dz, _rows(w, index, fill=False), out=dx)", "torch.mm(dz, _rows(w, index, fill=True), out=dx)", "integers"),
        ("inactive rows in place", "return packed.index_fill_(0, (index < 0).nonzero().squeeze(1), 0)", "return packed", "integers"),
        ("mask of the gradient in place", "dw.index_fill_(0, others, 0)", "pass", "integers"),
        ("mask of the bias gradient in place", "db = db.index_fill_(0, others, 0) if has_b else db", "pass", "integers"),
        ("mask of a task in place", "torch.where(own, part, zero, out=to)", "to.copy_(part)", "grouped"),
        ("constant of a task in place", "torch.where(own, part, constant, out=part)", "pass", "padding"),
        ("set of another task", "packed = _rows(w, row, fill=True)", "packed = _rows(w, index[0], fill=True)", "grouped"),
        ("sums over tasks rounded", "torch.zeros(shape, dtype=torch.float32) for", "torch.zeros(shape, dtype=x.dtype) for", "many_tasks"),
        ("bias sums", "torch.sum(matrix, 0, out=sums)", "sums.zero_()", "integers"),
    ),
    *_of("compact_fc1", "triton", "common/kernels.py",
        ("padding", "neuron = tl.where(neuron < 0, first, neuron)", "neuron = neuron", "padding"),
        ("bias in place", "if IN_PLACE:", "if False:", "padding"),
        ("features of the next neuron", "mask=has[:, None] & (feature < features)[None, :]", "mask=has[:, None]", "layouts"),
        ("weights of another task", "out = out_ptr + task * width * out_features", "out = out_ptr", "grouped"),
        ("neurons of another task", "tl.load(index_ptr + task * index_width + place,", "tl.load(index_ptr + place,", "grouped"),
    ),
    *_of("compact_fc1", "triton", "compact_fc1/triton.py",
        ("padding asked for", "has_b, in_place, fill=True)", "has_b, in_place, fill=False)", "padding"),
        ("bias gradient of inactive neurons", "places[0] % (width + 1)", "places[0].clamp(min=0)", "integers"),
        ("bias gradient of inactive neurons of a task", "sums.masked_fill_(places < 0, 0)", "sums", "grouped"),
    ),
    *_of("compact_fc2", "reference", "reference.py",
        ("rank-one correction", "added = w.index_select(1, others) @ c.index_select(0, others)", "added = w.new_zeros(w.shape[0])", "integers"),
        ("constant of another task", "c = constant[task if", "c = constant[0 if", "grouped"),
        ("rank-one gradient", "dw.index_add_(1, others, torch.outer(", "dw.index_add_(1, others, 0 * torch.outer(", "integers"),
        ("gradient of the constant", "dc[of].index_add_(0, others,", "dc[of].index_add_(0, others, 0 *", "integers"),
        ("sums over tasks rounded", "torch.promote_types(h.dtype, torch.float32)", "h.dtype", "many_tasks"),
    ),
    *_of("compact_fc2", "native", "native.py",
        ("columns in place", "return torch.where(index >= 0, w, w.new_zeros(()), out=packed)", "return w", "integers"),
        ("rank-one correction", "others = constant.index_fill(0, rows, 0)", "others = torch.zeros_like(constant)", "integers"),
        ("constant of active neurons too", "others = constant.index_fill(0, rows, 0)", "others = constant", "integers"),
        ("gradient of the constant of active neurons", "dc = (s @ w).index_fill_(0, rows, 0)", "dc = s @ w", "integers"),
        ("rank-one gradient in place", "dw.index_copy_(1, others, torch.outer(s, constant.index_select(0, others)))", "pass", "integers"),
        ("columns without a constant in place", "dw.index_fill_(1, others, 0)", "pass", "integers"),
        ("constants of all tasks", "return None if constant is None else constant[task if len(constant) > 1 else 0]", "return None if constant is None else constant[0]", "grouped"),
        ("gradient of a task in place", "torch.where(set_, dh[start:stop], zero, out=dh[start:stop])", "pass", "grouped"),
        ("sums over tasks rounded", "torch.zeros(shape, dtype=torch.float32) for", "torch.zeros(shape, dtype=h.dtype) for", "many_tasks"),
    ),
    *_of("compact_fc2", "triton", "triton.py",
        ("rank-one correction", "own = mm_float32(_others(constant, places >= 0), w.t())", "own = 0 * mm_float32(_others(constant, places >= 0), w.t())", "integers"),
        ("constant of active neurons too", "return constant.masked_fill(active, 0)", "return constant.expand(active.shape)", "integers"),
        ("rank-one gradient", "dw.addmm_((s if several else rounded).t(), _others(constant, active).to(dw.dtype))", "pass", "integers"),
        ("gradient of the constant of active neurons", ".masked_fill_(active, 0)", "", "integers"),
        ("sums over tasks rounded", "several = constant is not None and not one", "several = False", "rounded_once"),
    ),
    *_of("gated_activation", "reference", "reference.py",
        ("activation not rounded", "return activate(gate, kind) * up", "return activate(gate.double(), kind).to(gate.dtype) * up if kind == 'relu' else (activate(gate.float(), kind) * up.float()).to(gate.dtype)", "rounded"),
        ("gradient of the gate", "outer = gate.to(dtype), dh.to(dtype) * up.to(dtype)", "outer = gate.to(dtype), dh.to(dtype)", "error"),
        ("gradient of up", "dh * activate(gate, kind)", "dh * gate", "error"),
        ("columns of the other gradient", "dgate.index_select(1, index), dup.index_select(1, index)", "dup.index_select(1, index), dgate.index_select(1, index)", "gradients_and"),
    ),
    *_of("gated_activation", "native", "csrc/gated_activation.cpp",
        ("activation not rounded", "multiply_into(a.read(out, n), b.read(data<T>(up) + at, n), f, n);", "multiply_into(f, b.read(data<T>(up) + at, n), f, n);", "rounded"),
        ("second part of ln 2", "+ whole * 2.12194440e-4f", "", "roundings"),
        ("slope of silu", "s * (1.0f + x * (1.0f - s))", "s * (1.0f + x)", "roundings"),
        ("slope of gelu", "cdf + x * (density * 0.398942280401432678f)", "cdf", "roundings"),
        ("slope of gelu_tanh", "(1.0f + 3.0f * kCubic * square)", "(1.0f + kCubic * square)", "roundings"),
        ("a polynomial's end", "r = r * t + 0.119683549f;", "r = r * t + 0.119682549f;", "roundings"),
        ("infinity at a shut gate", "slope[j] == 0.0f ? 0.0f : dh[j] * up[j] * slope[j]", "dh[j] * up[j] * slope[j]", "nan"),
        ("the last block", "body(at, std::min(kBlock, elements - at));", "if (elements - at >= kBlock) body(at, kBlock);", "sizes"),
        ("a gradient read after it is written", "std::memcpy(to_gate + j, out, m * sizeof(float));", "multiply_into(outer, f, to_gate + j, m);", "gradients_and"),
        ("columns before a row is whole", "take(columns, to_up, data<T>(columns_up) + row * n);", "take(columns, data<T>(dup), data<T>(columns_up) + row * n);", "gradients_and"),
        ("the last columns of a row", "const int64_t at = row * width + j, m = std::min(kBlock, width - j);", "const int64_t at = row * width + j, m = std::min(kBlock - 1, width - j);", "gradients_and"),
    ),
    *_of("gated_activation", "triton", "gated_activation/kernels.py",
        ("activation not rounded", "(value.to(dtype).to(tl.float32) * up)", "(value * up)", "rounded"),
        ("slope of silu", "slope = s * (1.0 + x * (1.0 - s))", "slope = s * (1.0 + x)", "roundings"),
        ("slope of gelu", "slope = cdf + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)", "slope = cdf", "roundings"),
        ("slope of gelu_tanh", "(1.0 + 3.0 * 0.044715 * square)", "(1.0 + 0.044715 * square)", "roundings"),
        ("infinity at a shut gate", "tl.store(dgate_ptr + at, tl.where(slope == 0, 0.0, dh * up * slope)", "tl.store(dgate_ptr + at, (dh * up * slope)", "nan"),
        ("columns of another row", "tl.store(columns_up_ptr + row * columns + place", "tl.store(columns_up_ptr + place", "gradients_and"),
        ("columns without a place", "other=-1)\n    dtype", "other=0)\n    dtype", "gradients_and"),
    ),
    *_of("neuron_wgrad", "reference", "reference.py",
        ("other columns", "columns = dz if index is None else dz.index_select(1, index)", "columns = dz if index is None else dz[:, : len(index)]", "integers"),
        ("sums in 16 bits", "if dz.dtype in (torch.float32, torch.float64):", "if True:", "float32"),
        ("what is there", "total.copy_(forward(dz, x, index, wide).add_(total))", "total.copy_(forward(dz, x, index, wide))", "added"),
        ("rounded before it is added", "total.copy_(forward(dz, x, index, wide).add_(total))", "total.add_(forward(dz, x, index, total.dtype))", "added rounded_once"),
    ),
    *_of("neuron_wgrad", "native", "native.py",
        ("other columns", "return dz if index is None else take_columns(dz, index)", "return dz if index is None else dz[:, : len(index)]", "integers"),
        ("a step left out", "for start in range(0, len(x), _STEP):", "for start in range(0, len(x) - _STEP, _STEP):", "integers float32"),
        ("what is there", "if x.dtype == torch.float32:\n        return total.addmm_(columns.t(), x)", "if x.dtype == torch.float32:\n        return total.copy_(columns.t() @ x)", "added"),
        ("a total in 16 bits", "total.copy_(_add(total.float(), columns, x))", "_add(total.float(), columns, x)", "added"),
    ),
    *_of("neuron_wgrad", "triton", "neuron_wgrad/kernels.py",
        ("other columns", "neuron[None, :] * column_stride", "column[None, :] * column_stride", "integers"),
        ("stride between columns", "neuron[None, :] * column_stride", "neuron[None, :]", "layouts"),
        ("parts behind the first", "source += part_stride", "source += 0", "integers"),
        ("what is there", "total += tl.load(out, mask=there, other=0.0).to(tl.float32)", "total += 0.0", "added"),
        ("columns behind the result's", "tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there)", "tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns + 1)[None, :])", "view"),
    ),
    *_of("neuron_wgrad", "triton", "triton.py",
        ("rows of any stride taken for whole ones", "stride >= width and stride % unit(columns.dtype) == 0 and there", "stride >= width and there", "integers padded"),
        ("wider than memory", "there = last * columns.itemsize <= columns.untyped_storage().nbytes()", "there = True", "padded"),
        ("chunks that are no whole parts", "padded(k, dz.dtype)))\n            grid", "k))\n            grid", "integers"),
    ),
    *_of("write_neurons", "reference", "reference.py",
        ("rows for columns", "weight.index_copy_(int(transposed), at, cast.t() if transposed else cast)", "weight.index_copy_(0, at, cast) if not transposed else None", "places"),
    ),
    *_of("write_neurons", "native", "csrc/write_neurons.cpp",
        ("the last numbers of columns", "i < std::min(d, (block + 1) * kLine)", "i < std::min(d, (block + 1) * kLine - 1)", "places"),
        ("stride of a view", "T* out = to + at[j] * stride;", "T* out = to + at[j] * d;", "views"),
    ),
    *_of("write_neurons", "triton", "write_neurons/kernels.py",
        ("rows for columns", "target = weight_ptr + number.to(tl.int64)[None, :] * stride + place[:, None]", "target = weight_ptr + place[:, None] * stride + number[None, :]", "places"),
        ("the third matrix", "_put(weight2_ptr, rows2_ptr, index2_ptr,", "_put(weight2_ptr, rows1_ptr, index2_ptr,", "places several"),
    ),
    *_of("write_neurons", "triton", "triton.py",
        ("more than three", "for start in range(0, len(some), _MOST):", "for start in range(0, _MOST, _MOST):", "several"),
    ),
    *_of("row_sparse_adamw", "reference", "reference.py",
        ("decay on inactive rows", "p.mul_(1 - lr * weight_decay)", "param.mul_(1 - lr * weight_decay)", "bits"),
        ("gradient of inactive rows", "p, g, m, v = (t.index_select(0, index) for t in (p, g, m, v))",
         "p, m, v = (t.index_select(0, index) for t in (p, m, v)); g = g[: len(index)]", "bits"),
        ("place of eps", "denominator = (v.sqrt() / ", "denominator = ((v + eps).sqrt() / ", "bits"),
        ("scatter rows", "whole.index_copy_(0, index, part)", "whole.index_copy_(0, index, part.flip(0))", "bits"),
    ),
    *_of("row_sparse_adamw", "native", "csrc/row_sparse_adamw.cpp",
        ("mask", "while (row < a.rows && a.active[row] && passed < hi) {", "while (row < a.rows && passed < hi) {", "bits"),
        ("decay", "p[i] = p[i] * k.decay - ", "p[i] = p[i] - ", "bits"),
        ("threads overlap", "const int64_t from = std::max(lo, start);", "const int64_t from = start;", "threads"),
        ("tail", "for (int64_t i = 0; i < n; ++i) {\n    const float gi", "for (int64_t i = 0; i < n - 1; ++i) {\n    const float gi", "bits"),
        ("numbers of a row in a weight", "out[i * a.step] = static_cast<T>(in[i]);", "out[i] = static_cast<T>(in[i]);", "lie_in"),
        ("rows of a weight that threads share", "from = lo - row * a.width,", "from = 0,", "lie_in"),
        ("bias correction", "static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)))", "static_cast<float>(1.0 / (1.0 - std::pow(beta2, t)))", "bits"),
    ),
    *_of("row_sparse_adamw", "triton", "row_sparse_adamw/kernels.py",
        ("mask", "mask=keep, other=0) != 0\n", "mask=keep, other=0) >= 0\n", "bits"),
        ("row of an element", "later = 1 + (group - first)", "later = (group - first)", "bits"),
        ("tail", "keep = begin + group < elements", "keep = begin + group < elements - WIDE", "bits"),
        ("decay", "value = value * decay - step_size", "value = value - step_size", "bits"),
        ("row in a weight", "1 + (at - ahead) // span", "(at - ahead) // span", "lie_in"),
        ("number in a row of a weight", "tl.where(here, before + at, (at - ahead) % span)", "tl.where(here, at, (at - ahead) % span)", "lie_in"),
        ("rounding of the parameter", "value.to(P).to(W)", "value.to(W)", "lie_in"),
    ),
    *_of("row_sparse_adamw", "triton", "triton.py",
        ("kept tables of other weights", "*(_place(row[5]) for row in tensors),", "", "lie_in"),
        ("strides of columns", "strides = weight.stride()[::-1] if columns else weight.stride()", "strides = weight.stride()", "lie_in"),
        ("kept tables of other shapes", "*(row[0].shape for row in tensors),", "", "address"),
    ),
]
# fmt: on


def copy_of_checkout(target: Path) -> None:
    """Copies what git knows and does not ignore; ``nspec.kernels`` is made importable from ``target``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    # As an installed nspec has them.
    (target / "nspec/kernels").symlink_to(target / "kernels")
    (target / "nspec/configs").symlink_to(target / "configs")


def build(root: Path) -> None:
    """Builds the native library of the copy, later what has changed since.

    Raises:
        subprocess.CalledProcessError: CMake failed; what it printed is shown.
    """
    folder = str(root / "build/native")
    commands = [
        ["cmake", "-S", str(root), "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", folder],
        ["cmake", "--install", folder, "--prefix", str(root / "kernels/common")],
    ]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout)
            done.check_returncode()


def run_tests(root: Path, mutation: Mutation) -> tuple[int, str]:
    """Builds what has changed and runs the tests: exit status of pytest (1: a test failed) and its last line."""
    if mutation.backend == "native":
        build(root)
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NSPEC_BACKEND", None)
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-r", ""]
    command = [sys.executable, "-m", "pytest", *options, *mutation.selection]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1]


def caught(root: Path, mutation: Mutation) -> str | None:
    """None if the tests notice the mutation, else what happened."""
    path = root / mutation.path
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"{mutation.path} holds {mutation.old!r} {text.count(mutation.old)} times, expected once"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        status, last = run_tests(root, mutation)
    finally:
        path.write_text(text)
    return None if status == 1 else f"pytest {' '.join(mutation.selection)!r} ended with {status}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutations with all these words in their names")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(word in m.name for word in options.words)]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    if not chosen:
        parser.error(f"no mutation has {options.words} in its name")
    with tempfile.TemporaryDirectory(prefix="nspec-mutations-") as folder:
        root = Path(folder)
        copy_of_checkout(root)
        passing: dict[tuple[str, ...], tuple[int, str]] = {}
        missed = 0
        for mutation in chosen:
            if mutation.selection not in passing:
                passing[mutation.selection] = run_tests(root, mutation)
            status, last = passing[mutation.selection]
            reason = f"without the mutation: {last}" if status or "passed" not in last else caught(root, mutation)
            print(
                f"{'caught' if reason is None else 'MISSED':7}{mutation.name}{'' if reason is None else '; ' + reason}",
                flush=True,
            )
            missed += reason is not None
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
