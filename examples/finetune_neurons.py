"""Neuron fine-tuning with the Trainer of Transformers: profile, select, train a few neurons, save, merge.

    python examples/finetune_neurons.py

A tiny Llama with new weights and made-up text, seconds on a CPU. With a model and text of your own the calls are the same.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nspec


def made_up(start: int, sequences: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Text of a language: tokens of its own, each followed by the next."""
    first = torch.randint(0, 40, (sequences, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in start + (first + torch.arange(16)) % 40]


def main(sequences: int = 64) -> None:
    """Fine-tunes Welsh on so many sequences."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))
    text = {"cy": made_up(0, sequences, 1), "mt": made_up(50, sequences, 2)}

    batches = {code: [{"input_ids": torch.stack([row["input_ids"] for row in rows])}] for code, rows in text.items()}
    counts = nspec.profile(model, batches, padding="include")  # how often does each neuron fire? nothing is padded here
    masks = nspec.select(counts, rule="specific", share=0.1)  # of each layer, the tenth that is most a language's own
    nspec.finetune(model, nspec.NeuronMasks({"cy": masks["cy"]}))  # all else is frozen

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=30, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model, settings, train_dataset=text["cy"])
        trainer.train()
        for code, rows in text.items():
            with nspec.task(model, None):  # the base
                before = loss_of(model, rows)
            print(f"{code}: loss {before:.3f} of the base, {loss_of(model, rows):.3f} now (nats a token)")
        nspec.save_neurons(model, f"{folder}/welsh")  # rows only
        nspec.despecialize(model)  # the base, to the bit
        nspec.load_neurons(model, f"{folder}/welsh")
        nspec.merge(model, "cy").save_pretrained(f"{folder}/welsh-model")  # plain weights, for any server
        served = LlamaForCausalLM.from_pretrained(f"{folder}/welsh-model")
    print(f"merged: loss {loss_of(served, text['cy']):.3f} of cy")


def loss_of(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of a token, in nats."""
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    main()
