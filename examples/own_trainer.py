"""Neuron specialisation in a Trainer of Transformers: profile, select, specialise, train with a task for each row.

    python examples/own_trainer.py

A tiny M2M100 with new weights and made-up text, half a minute on a CPU. With a model and text of your own the calls are
the same: a column "task" in the data sets, and the mixin before the Trainer.
"""

from __future__ import annotations

import random
import tempfile

from torch.utils.data import DataLoader
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    default_data_collator,
)

import nspec

VOCABULARY, LENGTH, END = 100, 8, 2


class MyTrainer(nspec.TaskTrainerMixin, Seq2SeqTrainer):
    """All that it takes: each batch, which may mix tasks, is trained and evaluated under the tasks of its rows."""


def made_up(task: str, sentences: int, seed: int) -> list[dict]:
    """Sentences of random words, which "copy" translates to themselves and "reverse" from the last to the first."""
    draw, rows = random.Random(seed), []
    for _ in range(sentences):
        words = [draw.randrange(10, VOCABULARY) for _ in range(LENGTH)]
        target = words if task == "copy" else words[::-1]
        rows.append({"input_ids": [*words, END], "labels": [*target, END], "task": task})
    return rows


def main(sentences: int = 64) -> None:
    """Trains on ``sentences`` of each task."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=VOCABULARY, max_position_embeddings=32, activation_dropout=0.0, **sizes, **heads)
    )
    tasks = ["copy", "reverse"]
    train = [row for task in tasks for row in made_up(task, sentences, seed=1)]
    test = {task: made_up(task, 16, seed=2) for task in tasks}

    # Which neurons does each task use? From the rows without their task, in batches as the model takes them.
    batches = {}
    for task in tasks:
        rows = [
            {name: value for name, value in row.items() if name != "task"} for row in made_up(task, sentences, seed=3)
        ]
        batches[task] = DataLoader(rows, batch_size=32, collate_fn=default_data_collator)
    masks = nspec.select(nspec.profile(model, batches, padding="include"), k=0.95)  # all rows have one length
    nspec.specialize(model, masks, mode="forward")

    with tempfile.TemporaryDirectory() as folder:
        settings = Seq2SeqTrainingArguments(
            folder,
            per_device_train_batch_size=16,
            num_train_epochs=3,
            learning_rate=3e-3,
            predict_with_generate=True,
            generation_max_length=LENGTH + 2,
            save_strategy="no",
            logging_steps=8,
            report_to=[],
            use_cpu=True,  # a model as small as this is as fast there
            dataloader_pin_memory=False,
        )
        optimizer = nspec.RowSparseAdamW(model.parameters(), lr=settings.learning_rate, model=model)
        trainer = MyTrainer(model, settings, train_dataset=train, eval_dataset=test, optimizers=(optimizer, None))
        trainer.train()
        scores = trainer.evaluate()  # a data set for each task here; batches may mix them in evaluation too
    for task in tasks:
        print(f"{task}: validation loss {scores[f'eval_{task}_loss']:.3f} (cross-entropy per token, nats)")
    served = nspec.merge(model, "reverse")  # a plain model for one task
    print(f"merged for reverse: {sum(p.numel() for p in served.parameters()):,} parameters")


if __name__ == "__main__":
    main()
