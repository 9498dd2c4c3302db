"""Neurons that are trained on a GPU, in bfloat16 as they are there, against the full gradient in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import inputs, make, output
from test_finetune import LLAMA, loss_of, masks_of, own, rows_of, state

import nspec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu_are_rows_of_the_full_ones(dtype: torch.dtype) -> None:
    base = make(LLAMA)
    masks = masks_of(base)
    model = nspec.finetune(copy.deepcopy(base).to("cuda", dtype), masks, quiet=True)
    given = {name: tensor.cuda() for name, tensor in inputs(LLAMA).items()}
    loss_of(LLAMA, model, given).backward()
    loss_of(LLAMA, base, inputs(LLAMA)).backward()
    wanted, limit = rows_of(base, "cy", masks), 1e-4 if dtype == torch.float32 else 0.1
    for name, p in own(model).items():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert float((p.grad.double().cpu() - wanted[name]).norm()) <= limit * float(wanted[name].norm()), name


def test_a_merged_model_on_a_gpu_gives_the_same_bits_and_undoing_the_base() -> None:
    base = make(LLAMA).to("cuda", torch.bfloat16)
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    given = {name: tensor.cuda() for name, tensor in inputs(LLAMA).items()}
    optimizer = torch.optim.AdamW(own(model).values(), lr=0.01, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(LLAMA, model, given).backward()
        optimizer.step()
    assert torch.equal(output(LLAMA, model, given), output(LLAMA, nspec.merge(model, "cy"), given))
    restored = state(nspec.despecialize(model))
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.state_dict().items())
