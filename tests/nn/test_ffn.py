"""The specialised pair and CUDA graphs, as far as a CPU can tell; the rest is in ``specialization/test_on_gpu.py``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nspec
from nspec import NeuronMasks
from nspec.nn import ffn, packed


@pytest.mark.parametrize("grad", [True, False])
def test_a_capture_needs_a_run_before_it(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 70), nn.ReLU(), nn.Linear(70, 4))
    nspec.specialize(model, NeuronMasks({"a": {"0": torch.arange(70) % 2 == 0}}))
    x, capturing = torch.ones(2, 4), False
    for module in (ffn, packed):
        monkeypatch.setattr(module, "capturing", lambda device: capturing)
    with nspec.task(model, "a"), torch.set_grad_enabled(grad):
        for _ in ("as specialised", "with other weights"):
            capturing = True
            if not grad:  # with gradients nothing is kept of the weights
                with pytest.raises(RuntimeError, match="run it once before the capture"):
                    model(x)
            capturing = False
            want = model(x)
            capturing = True
            assert torch.equal(model(x), want)
            with torch.no_grad():
                model[2].weight.add_(1)


def test_a_pair_on_two_devices_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(4, 70), nn.ReLU(), nn.Linear(70, 4))
    nspec.specialize(model, NeuronMasks({"a": {"0": torch.arange(70) % 2 == 0}}))
    model[2].to("meta")
    with (
        nspec.task(model, "a"),
        pytest.raises(RuntimeError, match=r"^0 is on cpu and its fc2 on meta.*put them on one device"),
    ):
        model(torch.ones(2, 4))
