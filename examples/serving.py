"""Serving one direction without nspec: merge, save_pretrained, from_pretrained, generate; and as nspec.export writes it.

    python examples/serving.py [FOLDER]

A tiny M2M100 with new weights, a few seconds on a CPU; needs transformers. What is written is a plain model, which anything
that reads M2M100 models takes.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration

import nspec

VOCABULARY, START, END = 100, 1, 2


def specialised() -> tuple[M2M100ForConditionalGeneration, torch.Tensor]:
    """A model with the neurons of two directions, and token ids [sentences, tokens] for it."""
    torch.manual_seed(1)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "decoder_start_token_id": START}
    model = M2M100ForConditionalGeneration(M2M100Config(**tokens, **sizes, **heads, activation_dropout=0.0))
    model.eval()
    text = {task: torch.randint(10, VOCABULARY, (16, 8)) for task in ("en-de", "en-fr")}
    batches = {task: [{"input_ids": ids, "labels": ids}] for task, ids in text.items()}
    masks = nspec.select(nspec.profile(model, batches, padding="include"), k=0.7)
    return nspec.specialize(model, masks), text["en-de"]


def main(folder: str = "") -> None:
    """Writes the merged model to ``folder``, reads it again, and translates with both."""
    folder = folder or tempfile.mkdtemp()
    model, ids = specialised()
    options = {"max_new_tokens": 8, "num_beams": 2, "eos_token_id": END}
    with nspec.task(model, "en-de"):
        with_masks = model.generate(ids, **options)

    nspec.merge(model, "en-de").save_pretrained(folder)
    served = M2M100ForConditionalGeneration.from_pretrained(folder).eval()
    same = torch.equal(served.generate(ids, **options), with_masks)
    print(f"{len(ids)} sentences by the model in {folder}: {'the same' if same else 'other'} tokens as with masks")

    small = nspec.export(
        model, "en-de", f"{folder}/export"
    )  # without the masked neurons; "ctranslate2" takes a tokenizer
    compact = M2M100ForConditionalGeneration.from_pretrained(small).eval()
    same = torch.equal(compact.generate(ids, **options), with_masks)
    neurons = f"{compact.config.encoder_ffn_dim} of {model.config.encoder_ffn_dim} neurons in a layer of the encoder"
    print(f"as exported, with {neurons}: {'the same' if same else 'other'} tokens")

    both = ["en-de", "en-fr"] * (len(ids) // 2)  # all directions from one model, in one batch
    with nspec.task(model, both):
        print(f"tokens of a batch of {len(set(both))} directions: {list(model.generate(ids, **options).shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
