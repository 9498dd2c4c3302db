"""The validation loss of a model of which some neurons are masked, without any training."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

import nspec
from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples, PreparedData
from nspec.mt.training.loss import token_losses


class MaskedLoss:
    """Measures a dense model on the validation text of single directions, in evaluation mode.

    Args:
        model: dense; it is again after each call.
        data: the prepared text.
        batch_tokens: most tokens of a batch, padding counted.
        sentences: most sentences of a direction; 0: all.
    """

    def __init__(self, model: PreTrainedModel, data: PreparedData, batch_tokens: int, sentences: int = 0) -> None:
        self.model, self.data = model.eval(), data
        self.examples = Examples(data, "valid")
        self.batches = {t: evaluation_batches(data, "valid", t, batch_tokens, sentences) for t in data.tasks}

    def __call__(self, task: str, masks: nspec.NeuronMasks | None = None) -> float:
        """The loss of a direction in nats per target token, with its masks in mode ``forward``; None: dense.

        Raises:
            ValueError: the direction has no validation text, or the masks do not fit the model.
        """
        if not self.batches[task]:
            raise ValueError(f"{task} has no validation text to measure the loss of its neurons on")
        number = self.data.tasks.index(task)
        if masks is not None:
            nspec.specialize(self.model, masks)
        try:
            sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)
            with torch.no_grad(), nspec.task(self.model, task) if masks is not None else nullcontext():
                for batch in self.batches[task]:
                    inputs = collate([self.examples[number, example] for example in batch])
                    inputs.pop("task")
                    moved = {name: value.to(self.model.device) for name, value in inputs.items()}
                    labels = moved.pop("labels")
                    sums += torch.stack(token_losses(self.model(**moved, use_cache=False).logits, labels))
        finally:
            if masks is not None:
                nspec.despecialize(self.model)
        loss, tokens = sums.tolist()
        return float(loss / tokens)
