"""One layer alone: a trained model learns something new with the neurons that it can spare.

    python examples/masked_linear.py

``nspec.MaskedLinear`` in place of ``nn.Linear``, without tasks: only the rows of the mask get a gradient, and the
row-sparse optimiser leaves the others bitwise as they are, momentum and weight decay included. A few seconds on a CPU, with
PyTorch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nspec


def spirals(points: int, turn: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points [points, 2] on two arms, rotated by ``turn`` radians, and which arm each is on."""
    draw = torch.Generator().manual_seed(seed)
    radius = torch.rand(points, generator=draw)
    arm = torch.randint(2, (points,), generator=draw)
    angle = 4 * radius + torch.pi * arm + turn
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return x + 0.02 * torch.randn(points, 2, generator=draw), arm


def train(model: nn.Module, optimizer: torch.optim.Optimizer, turn: float, steps: int) -> None:
    """Trains on spirals that are rotated by ``turn``."""
    for step in range(steps):
        x, arm = spirals(256, turn, seed=step)
        nn.functional.cross_entropy(model(x), arm).backward()
        optimizer.step()
        model.zero_grad()


@torch.no_grad()
def right(model: nn.Module, turn: float) -> str:
    """The share of new points whose arm is found."""
    x, arm = spirals(4096, turn, seed=-2)
    return f"{float((model(x).argmax(1) == arm).float().mean()):.1%}"


def main(steps: int = 200) -> None:
    """Trains for ``steps`` on one set of spirals, and for as many on a rotated one with half of the neurons."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 2))
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), turn=0.0, steps=steps)
    print(f"points whose arm is found: old spirals {right(model, 0.0)}, new ones {right(model, 0.6)}")

    with torch.no_grad():
        importance = model[1](model[0](spirals(4096, 0.0, seed=-1)[0])).mean(0) * model[2].weight.abs().sum(0)
    spare = importance < importance.median()  # the half that sends on least
    layer = model[0] = nspec.MaskedLinear.from_linear(
        model[0], mode="update"
    )  # the same parameters, a dense forward pass
    layer.set_mask(spare)
    before = layer.weight.detach().clone()

    # The bias of a masked layer stays dense, and other layers are not masked: what may change is what the optimiser has.
    train(model, nspec.RowSparseAdamW([layer.weight], lr=0.01, weight_decay=0.1), turn=0.6, steps=steps)
    moved = (layer.weight != before).any(1)
    changed, others = int((moved & spare).sum()), int((moved & ~spare).sum())
    print(f"neurons: {int(spare.sum())} of {len(spare)} may change, {changed} have, others {others}")
    print(f"points whose arm is found: old spirals {right(model, 0.0)}, new ones {right(model, 0.6)}")


if __name__ == "__main__":
    main()
