"""Classes of images as tasks: which neurons of a vision Transformer they share, and training on with those alone.

    python examples/vision_classes.py [FIGURE]

A tiny ViT with new weights and coloured shapes drawn here, half a minute on a CPU; needs transformers and matplotlib.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import nspec
from nspec.analysis import layer_iou

SIZE = 16  # pixels
COLOURS = {"red": (0.9, 0.2, 0.1), "blue": (0.1, 0.3, 0.9)}
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in ("disc", "square", "cross", "bar")]


def drawn(labels: Tensor, seed: int) -> Tensor:
    """Noisy images [images, 3, SIZE, SIZE] of the classes with these numbers, each shape in a place of its own."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.1 * torch.randn(len(labels), 3, SIZE, SIZE, generator=draw)
    for image, label in zip(images, labels.tolist()):
        colour, shape = CLASSES[label].split()
        row, column = 6 + 4 * torch.rand(2, 1, generator=draw)
        y, x = torch.meshgrid((torch.arange(SIZE) - row).abs(), (torch.arange(SIZE) - column).abs(), indexing="ij")
        square, thin = torch.maximum(x, y) <= 4, torch.minimum(x, y) < 1
        shapes = {"disc": x**2 + y**2 <= 16, "square": square, "cross": square & thin, "bar": (x <= 4) & (y < 1)}
        image[:, shapes[shape]] = torch.tensor(COLOURS[colour])[:, None]
    return images


def train(model: ViTForImageClassification, steps: int, seed: int, specialised: bool = False) -> None:
    """Trains on batches of all classes; a specialised model with each image under its class."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for number in range(seed, seed + steps):
        labels = torch.randint(len(CLASSES), (64,), generator=torch.Generator().manual_seed(number))
        tasks = [CLASSES[label] for label in labels.tolist()]
        with nspec.task(model, tasks) if specialised else nullcontext():
            model(drawn(labels, number), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: ViTForImageClassification) -> float:
    """The share of new images whose class is found."""
    labels = torch.arange(256) % len(CLASSES)
    return float((model(drawn(labels, seed=1)).logits.argmax(-1) == labels).float().mean())


def overlap_figure(masks: nspec.NeuronMasks) -> Figure:
    """For each layer, the IoU of the neurons of every two classes."""
    iou = layer_iou(masks, masks.layers)
    figure = Figure(figsize=(2.6 * len(iou) + 1.4, 3.4), layout="constrained")
    for number, (panel, values) in enumerate(zip(panels := figure.subplots(1, len(iou), sharey=True), iou)):
        shown = panel.imshow(values, cmap="viridis", vmin=0, vmax=1)
        panel.set_title(f"layer {number}")
        panel.set_xticks(range(len(CLASSES)), CLASSES, rotation=90)
        panel.set_yticks(range(len(CLASSES)), CLASSES)
    figure.colorbar(shown, ax=panels, label="IoU of two classes' neurons", pad=0.01)
    return figure


def main(figure: str = "vision_classes.svg", steps: int = 160) -> None:
    """Trains for ``steps`` dense, and for half as many specialised; writes ``figure``."""
    torch.manual_seed(1)
    sizes = {"image_size": SIZE, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 192, "initializer_range": 0.1, "num_labels": len(CLASSES)}
    model = ViTForImageClassification(ViTConfig(**sizes))
    train(model, steps, seed=1000)
    print(f"dense, {steps} updates: {accuracy(model):.1%} of new images right")
    batches = {name: [drawn(torch.full((64,), number), seed=2)] for number, name in enumerate(CLASSES)}
    masks = nspec.select(nspec.profile(model, batches, padding="include"), k=0.9)  # images have no padding
    overlap_figure(masks).savefig(figure, bbox_inches="tight")
    print(f"{masks}; which of them the classes share: {figure}")
    # The class of a new image is not known: mode "update" needs it in training alone. "forward" would need it here too.
    nspec.specialize(model, masks, mode="update")
    train(model, steps // 2, seed=2000, specialised=True)
    print(f"specialised, {steps // 2} more: {accuracy(nspec.despecialize(model)):.1%} of new images right")


if __name__ == "__main__":
    main(*sys.argv[1:])
