"""Batches that mix tasks: one pass for sentences of several directions, each with its own neurons.

    python examples/mixed_batches.py

Small directions and data-parallel training need them: no process waits for another's direction. A second on a CPU, with
PyTorch alone.
"""

from __future__ import annotations

import torch
from torch import nn

import nspec

TASKS = ["en-de", "en-fr", "en-cs"]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients by name; they are dropped from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def main(sentences: int = 12) -> None:
    """Compares one mixed batch of ``sentences`` with a batch for each task."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, num_layers=2)
    text = {task: torch.randn(32, 10, 32, dtype=torch.float64) for task in TASKS}
    masks = nspec.select(
        nspec.profile(model, {t: [x] for t, x in text.items()}, padding="include"),
        k=0.8,
    )
    nspec.specialize(model, masks)

    # Names in any order; a number is a place in masks.tasks, and None is the dense model.
    tasks = [TASKS[row % len(TASKS)] for row in range(sentences)]
    tasks[-1] = None
    batch = torch.stack([text[task or TASKS[0]][row] for row, task in enumerate(tasks)])
    with nspec.task(model, tasks):
        mixed = model(batch)
        mixed.square().sum().backward()
    together = gradients(model)

    for task in dict.fromkeys(tasks):
        rows = [row for row, of_row in enumerate(tasks) if of_row == task]
        with nspec.task(model, task):
            alone = model(batch[rows])
            alone.square().sum().backward()
        print(f"{task}: {len(rows)} sentences, largest difference of outputs {(alone - mixed[rows]).abs().max():.1e}")
    apart = gradients(model)
    largest = max(float((apart[name] - grad).abs().max()) for name, grad in together.items())
    print(f"largest difference of {len(together)} gradients: {largest:.1e}")


if __name__ == "__main__":
    main()
