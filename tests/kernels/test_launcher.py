"""Launches that go around Triton's dispatch are those that it would dispatch to the same compiled kernel.

And all of them are compiled by the compile check.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Nothing is compiled: Triton is asked what it would compile for, at every launch, and a launcher has one answer.
SCRIPT = """
import itertools
import random
import record
shipped = record.recorded("cuda:90")
from bench import fake_gpu
fake_gpu.install()
import torch
from nspec.kernels.common import triton_launch
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.kernels.neuron_wgrad import neuron_wgrad
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

seen, wrong, missing = {}, set(), set()

def sizes(one):
    blocks = {name: value for name, value in one.constants.items() if name.isupper() and type(value) is not bool}
    return one.function, one.options, blocks

def ask(self, grid, *args):
    binder = self.kernel.device_caches[0][4]
    _, kind, options = binder(*args, **self.keywords)
    key = str((kind, options))
    if self not in seen:
        launch = record.described(self, args)
        alike = [one for one in shipped if sizes(one) == sizes(launch)]
        if not any(set(launch.flags) <= set(one.flags) for one in alike):
            missing.add(launch.name)
    known = seen.setdefault(self, key)
    if known != key:
        wrong.add(f"{self.kernel.__name__}: {known} and {key}")

triton_launch.Launcher.__call__ = ask
draw = random.Random(0)

def tensor(*shape, dtype=torch.float16, layout="plain"):
    if layout == "off":  # not at a multiple of 16 bytes
        size = 1
        for n in shape:
            size *= n
        return torch.zeros(size + 1, dtype=dtype)[1:].view(shape)
    if layout == "wide" and len(shape) == 2:
        return torch.zeros(shape[0], shape[1] + 8, dtype=dtype)[:, : shape[1]]
    if layout == "turned" and len(shape) == 2:
        return torch.zeros(shape[1], shape[0], dtype=dtype).t()
    return torch.zeros(shape, dtype=dtype)

for _ in range(300):
    d_in, d_out = draw.choice([(16, 16), (1, 1), (24, 16), (17, 16), (16, 17), (64, 16)])
    d_ff, tokens, tasks = draw.choice([64, 128, 200, 1]), draw.choice([1, 16, 40, 33]), draw.choice([1, 1, 3])
    layouts = itertools.starmap(draw.choice, itertools.repeat((["plain"] * 4 + ["off", "wide", "turned"],)))
    share, given = draw.choice([0.0, 0.3, 1.0]), draw.choice([torch.float16, torch.float32])
    active = torch.rand(tasks, d_ff) < share
    offsets = None if tasks == 1 else torch.tensor([0, tokens // 3, tokens // 3, tokens])
    active = active[0] if tasks == 1 else active
    x = tensor(tokens, d_in, layout=next(layouts)).requires_grad_()
    biases = draw.random() < 0.7, draw.random() < 0.7
    shapes = (d_ff, d_in), (d_ff,), (d_out, d_ff), (d_out,)
    weights = [tensor(*s, dtype=given, layout=next(layouts)).requires_grad_() for s in shapes]
    weights = [w if i % 2 == 0 or biases[i // 2] else None for i, w in enumerate(weights)]
    cast = given == torch.float32 and draw.random() < 0.7
    inputs = x if cast or given == torch.float16 else x.detach().float().requires_grad_()
    ambient = torch.autocast("cpu", torch.float16, enabled=draw.random() < 0.3)  # of the backward pass
    with torch.autocast("cpu", torch.float16, enabled=cast):
        y = compact_ffn(inputs, *weights, active, task_offsets=offsets)
        z = compact_fc1(inputs, *weights[:2], active, task_offsets=offsets)
        o = compact_fc2(z, weights[1], *weights[2:], active, task_offsets=offsets)
        valid = draw.choice([None, torch.ones(tokens, dtype=torch.bool)])
        linear_relu_count(inputs, weights[0], weights[1], valid=valid, task_offsets=offsets)
    with ambient:
        y.backward(tensor(tokens, d_out, dtype=y.dtype, layout=next(layouts)))
        o.backward(tensor(tokens, d_out, dtype=o.dtype, layout=next(layouts)))
    dh, total = tensor(tokens, d_ff, layout=next(layouts)), draw.choice([None, torch.zeros(d_ff, d_in)])
    with ambient:
        row_sparse_wgrad(dh, x.detach(), active, task_offsets=offsets, add_to=total)
        row_sparse_wgrad(dh.float(), x.detach().float(), active, task_offsets=offsets, add_to=total)
        for k, given in itertools.product((0, 1, 5, 16, 70), (torch.float16, torch.float32)):
            k, own = min(k, d_ff), draw.choice([torch.float16, torch.float32])
            columns, z = torch.arange(k), dh.to(given)
            neuron_wgrad(z, x.detach().to(given), columns, dtype=own)
            neuron_wgrad(z[:, :k], x.detach().to(given), None, add_to=tensor(k, d_in, dtype=own, layout=next(layouts)))
assert len(seen) > 300, len(seen)
assert not wrong, "\\n".join(sorted(wrong)[:20])
assert not missing, "not among what tests/kernels/compiled/record.py launches: " + "\\n".join(sorted(missing)[:20])
print(len(seen), "launchers")
"""


def test_a_launcher_is_kept_for_launches_that_triton_compiles_alike() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    paths = [str(ROOT), str(ROOT / "tests/kernels/compiled"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NSPEC_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**env, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "launchers" in done.stdout
