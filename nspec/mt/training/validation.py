"""Validation while training: token loss and greedy BLEU of every direction, shared out over the processes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from sacrebleu.metrics import BLEU
from transformers import PreTrainedModel

import nspec
from nspec import processes
from nspec.mt.plain import decodes_by_task
from nspec.mt.scoring.bleu_tokenizer import bleu_tokenizer
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples, PreparedData, languages_of_task
from nspec.mt.training.checkpoints import LOSS_OF
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loss import token_losses
from nspec.mt.training.precision import autocast


class Validator:
    """Measures a model on the validation text; batches are made once.

    Args:
        model: unwrapped. Where its forward pass depends on the task, each direction is measured under its own.
        data: the prepared text.
        settings: token budget of the loss batches, sentences for BLEU.
        decode: limits of the translations; the search is greedy whatever its beam is.
        precision: ``fp32``, ``bf16`` or ``fp16``, as the training computes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: PreparedData,
        settings: TrainConfig,
        decode: DecodeConfig,
        *,
        precision: str,
    ) -> None:
        self.model, self.data, self.sentences = model, data, settings.valid_bleu_sentences
        self.by_task, self.precision = decodes_by_task(model), precision
        self.examples = Examples(data, "valid")
        self.batches = {task: evaluation_batches(data, "valid", task, settings.batch_tokens) for task in data.tasks}
        self.translator = Translator(model, data.tokenizer, replace(decode, beam=1))

    def measure(self) -> dict[str, Any]:
        """The loss and BLEU now; the model is left in the mode (training or evaluation) in which it was.

        Returns:
            ``valid_loss`` (nats per target token over all directions, without smoothing), ``loss_of`` (``text``: the tag
            is not counted, as versions did that do not say so), ``valid_bleu`` (macro average in points; None without BLEU
            sentences) and ``tasks`` with ``loss`` and ``bleu`` of each direction; the same on every process.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.model.device, self.precision):
                sums = self._losses()
                bleu = self._bleu() if self.sentences else {}
        finally:
            self.model.train(training)
        tasks = {
            task: {"loss": loss / tokens, "bleu": bleu.get(task)} for task, (loss, tokens) in zip(self.data.tasks, sums)
        }
        return {
            "valid_loss": sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums),
            "loss_of": LOSS_OF,
            "valid_bleu": sum(bleu.values()) / len(bleu) if bleu else None,
            "tasks": tasks,
        }

    def _losses(self) -> list[tuple[float, float]]:
        """(sum of token losses, target tokens) of each task."""
        flat: list[float] = []
        for number, task in enumerate(self.data.tasks):
            sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)
            with nspec.task(self.model, task) if self.by_task else nullcontext():
                for batch in self.batches[task][processes.rank() :: processes.world()]:
                    inputs = collate([self.examples[number, example] for example in batch])
                    inputs.pop("task")
                    labels = inputs.pop("labels").to(self.model.device)
                    inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
                    sums += torch.stack(token_losses(self.model(**inputs, use_cache=False).logits, labels))
            flat += sums.tolist()
        flat = processes.all_sum(flat)
        return list(zip(flat[::2], flat[1::2]))

    def _bleu(self) -> dict[str, float]:
        """BLEU of each task in points, translated on one of the processes."""
        mine = {}
        for task in self.data.tasks[processes.rank() :: processes.world()]:
            sources, references = (lines[: self.sentences] for lines in self.data.text("valid", task))
            hypotheses = list(self.translator.translate(sources, task))
            # force: what sacreBLEU warns of shows when the test set is scored
            metric = BLEU(tokenize=bleu_tokenizer(languages_of_task(task)[1])[0], force=True)
            mine[task] = metric.corpus_score(hypotheses, [references]).score
        everyone = {task: score for part in processes.gather(mine) for task, score in part.items()}
        return {task: everyone[task] for task in self.data.tasks}
