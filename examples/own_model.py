"""Neuron specialisation of a model of your own, in a loop of your own.

    python examples/own_model.py

A small residual network that learns three functions, two of which are alike; a few seconds on a CPU. Needs PyTorch alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import nspec

WIDTH = 16
TASKS = ("de", "nl", "ru")


class Model(nn.Module):
    """Blocks are found by their structure: linear, elementwise function, linear. A tag says which task is wanted."""

    def __init__(self) -> None:
        super().__init__()
        block = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.blocks = nn.ModuleList(nn.Sequential(*copy.deepcopy(block)) for _ in range(2))
        self.tags, self.out = nn.Embedding(len(TASKS), WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, tag: Tensor) -> Tensor:
        x = x + self.tags(tag)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def made_up(task: str, seed: int, rows: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments, and what it should give [rows, 4]; "de" and "nl" want nearly the same."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    wanted = {"de": torch.sin(x[:, :4]), "nl": torch.sin(x[:, :4] + 0.3), "ru": torch.cos(2 * x[:, 4:8])}[task]
    return {"x": x, "tag": torch.full((rows,), TASKS.index(task))}, wanted


def error(model: nn.Module, task: str, seed: int) -> Tensor:
    """Mean squared error on a new batch of the task."""
    arguments, wanted = made_up(task, seed)
    return nn.functional.mse_loss(model(**arguments), wanted)


def main(steps: int = 150) -> None:
    """Trains for ``steps`` rounds of all tasks dense, and for half as many with the neurons of each."""
    torch.manual_seed(1)
    model = Model()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        sum(error(model, task, seed=step) for task in TASKS).backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = {task: [made_up(task, seed=-1, rows=512)[0]] for task in TASKS}
    masks = nspec.select(nspec.profile(model, batches, padding="include"), k=0.9)  # there is no padding here
    for a, b in (("de", "nl"), ("de", "ru")):
        shared = [int((masks[a][layer] & masks[b][layer]).sum()) for layer in masks.layers]
        print(f"{a} and {b} share {shared} of 64 neurons of {masks.layers}")

    nspec.specialize(model, masks, mode="forward")
    optimizer = nspec.RowSparseAdamW(model.parameters(), lr=1e-3)  # leaves alone the rows that no task of a step used
    for step in range(steps, steps + steps // 2):
        for task in TASKS:
            with nspec.task(model, task):
                error(model, task, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for task in TASKS:  # a merged model is plain: no task, no masks, no nspec
        print(f"{task}: mean squared error of the merged model {error(nspec.merge(model, task), task, -2).item():.4f}")
    nspec.despecialize(model)


if __name__ == "__main__":
    main()
