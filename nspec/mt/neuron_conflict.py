"""Which neurons directions train against one another: by how much faster a loss would fall with parameters of their own.

With g_t the gradient of direction t's mean loss in the parameters of a neuron (its row and bias of fc1, its column of fc2)
and m the mean of g_t over the directions, a small step against m, which all take together, lowers the loss of t by g_t . m
times its size, and one of t alone, against g_t, by g_t . g_t. The conflict of t at the neuron is the difference,
g_t . (g_t - m): large where the direction pulls hard and the others elsewhere, negative where they pull it along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples, PreparedData
from nspec.mt.training.loss import token_losses
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.layers import find_blocks


def neuron_conflict(
    model: PreTrainedModel,
    data: PreparedData,
    batch_tokens: int,
    split: str = "valid",
    sentences: int = 0,
    share: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The conflict of each direction at each neuron, in evaluation mode.

    The text is gone through twice, for the mean and then for each direction, so that no more than two gradients of the
    feed-forward layers are held however many directions there are.

    Args:
        model: dense; it stays as it is.
        data: the prepared text, of two directions or more.
        batch_tokens: most tokens of a batch, padding counted.
        split: the text, ``valid`` or ``train``.
        sentences: most sentences of a direction; 0: all.
        share: of a direction's sentences, evenly spread, in (0, 1].
        progress: called as ``progress(task, directions done, directions in all)``.

    Returns:
        task -> {name of fc1: float64 ``[d_ff]``}, in nats per target token and unit of squared step.

    Raises:
        ValueError: there is one direction, or one without such text; the model has no feed-forward blocks, or some that are
            frozen; a gradient is not finite.
    """
    if len(data.tasks) < 2:
        raise ValueError(f"the conflict of directions is between two or more, and the text has {data.tasks[0]} alone")
    blocks, examples, training = find_blocks(model), Examples(data, split), model.training
    if frozen := [block.name for block in blocks if not all(p.requires_grad for p in _parameters(block))]:
        raise ValueError(f"{frozen[0]}: its parameters are frozen, and have no gradients: let them require some first")
    batches = {task: evaluation_batches(data, split, task, batch_tokens, sentences, share) for task in data.tasks}
    if without := [task for task in data.tasks if not batches[task]]:
        raise ValueError(f"{without[0]} has no {split} text to measure the gradients of its neurons on")

    def gradients(number: int, task: str) -> list[Tensor]:
        total, tokens = [torch.zeros(()) for _ in blocks], torch.zeros((), dtype=torch.float64)
        for batch in batches[task]:
            inputs = collate([examples[number, example] for example in batch])
            moved = {name: value.to(model.device) for name, value in inputs.items() if name != "task"}
            labels = moved.pop("labels")
            loss, count = token_losses(model(**moved, use_cache=False).logits, labels)
            tokens += count.cpu()
            total = [one.to(new.device) + new for one, new in zip(total, _of_neurons(loss, blocks))]
        return [one / float(tokens) for one in total]

    steps, done = 2 * len(data.tasks), 0
    mean, found = [torch.zeros(()) for _ in blocks], dict[str, dict[str, Tensor]]()
    model.eval()
    try:
        for last in (False, True):
            for number, task in enumerate(data.tasks):
                own = gradients(number, task)
                if last:
                    parts = {block.name: (g * (g - m)).sum(1) for block, g, m in zip(blocks, own, mean)}
                    found[task] = {name: part.cpu() for name, part in parts.items()}
                else:
                    mean = [m.to(g.device) + g / len(data.tasks) for m, g in zip(mean, own)]
                if any(not bool(torch.isfinite(g).all()) for g in own):
                    raise ValueError(
                        f"{task}: a gradient is not finite; look at the weights and the dtype of the model"
                    )
                done += 1
                if progress is not None:
                    progress(task, done, steps)
    finally:
        model.train(training)
    return found


def _of_neurons(loss: Tensor, blocks: list[FeedForward]) -> list[Tensor]:
    """The gradient of a loss in the parameters of each block's neurons, ``[d_ff, numbers]`` float64."""
    parameters = [_parameters(block) for block in blocks]
    flat = torch.autograd.grad(loss, [one for of in parameters for one in of])
    taken, found = iter(flat), []
    for of in parameters:
        *first, last = [next(taken).double() for _ in of]
        found.append(torch.cat([*(one.reshape(one.shape[0], -1) for one in first), last.t()], 1))
    return found


def _parameters(block: FeedForward) -> list[nn.Parameter]:
    """What the neurons of a block are made of: weights and biases by rows, and at last the weight with their columns."""
    first = [layer for layer in (block.fc1, block.up) if layer is not None]
    found = [parameter for layer in first for parameter in layer.parameters(recurse=False)]
    return [*found, block.fc2.get_parameter("weight")]
