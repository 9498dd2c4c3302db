"""Folders of tiny Marian models, as OPUS-MT publishes them, with random weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import MarianConfig, MarianMTModel

from nspec.files import write_json


def spm(lines: list[str], size: int = 40, **options: Any) -> bytes:
    """A SentencePiece model with the settings that OPUS-MT trains with: Unigram, NFKC, ids that are not the model's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(folder: Path, source: list[str], target: list[str], tokens: list[str], **settings: Any) -> int:
    """Writes the vocabulary of a folder: the pieces of both sides in an order of its own; the number of its entries.

    Args:
        folder: made as needed.
        source: text of the sources.
        target: text of the targets.
        tokens: such as ``>>fra<<``, of several target languages.
        settings: of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = set()
    for name, lines, size in (
        ("source", source, 60),
        ("target", target, 40),
    ):  # so that the same text is spelled otherwise
        model = spm(lines, size)
        (folder / f"{name}.spm").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces |= {processor.id_to_piece(number) for number in range(3, len(processor))}
    words = ["</s>", "<unk>", *tokens, *sorted(pieces, reverse=True), "<pad>"]
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer", "model_max_length": 512} | settings
    )
    return len(words)


def write_model(folder: Path, rows: int, seed: int = 1) -> MarianMTModel:
    """Writes a random model for a vocabulary of ``rows`` entries, ``</s>`` the first and ``<pad>`` the last of them."""
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=rows, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        activation_function="swish", scale_embedding=True, pad_token_id=rows - 1, decoder_start_token_id=rows - 1,
        eos_token_id=0, bos_token_id=0, forced_eos_token_id=0, init_std=0.4,
    )  # fmt: skip
    model = MarianMTModel(config)
    with torch.no_grad():
        model.final_logits_bias.normal_(std=0.5)
    model.generation_config.update(bad_words_ids=[[rows - 1]], num_beams=4, max_length=64, renormalize_logits=True)
    model.save_pretrained(folder)
    return model
