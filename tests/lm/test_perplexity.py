"""Sequences, and what a model makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import lines_of, model_and_tokenizer

from nspec.lm.perplexity import perplexity
from nspec.lm.sequences import batches, sequences


def test_sequences_hold_every_token_once_and_none_is_padded() -> None:
    _, tokenizer = model_and_tokenizer()
    lines = lines_of("aa")
    pieces = sequences(tokenizer, lines, 16)
    assert {len(piece) for piece in pieces[:-1]} == {16}
    text = tokenizer.decode(torch.cat(pieces))
    assert text.split(tokenizer.eos_token)[: len(lines) - 1] == lines[:-1]  # a single token at the end is left out
    assert sorted(map(tuple, (row.tolist() for batch in batches(pieces, 7) for row in batch))) == sorted(
        tuple(piece.tolist()) for piece in pieces
    )


def test_a_sequence_begins_as_the_tokenizer_begins_a_text() -> None:
    _, tokenizer = model_and_tokenizer()

    class Begins:
        bos_token_id, eos_token_id = 299, tokenizer.eos_token_id

        def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list]:
            if isinstance(text, str):
                return {"input_ids": [299] if add_special_tokens else []}
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    pieces = sequences(Begins(), lines_of("aa"), 16)
    assert all(int(piece[0]) == 299 and len(piece) <= 16 for piece in pieces)
    plain = torch.cat(sequences(tokenizer, lines_of("aa"), 10**6))
    assert torch.cat([piece[1:] for piece in pieces]).tolist() == plain.tolist()


def test_text_without_two_tokens_is_refused() -> None:
    _, tokenizer = model_and_tokenizer()
    with pytest.raises(ValueError, match="0 lines have 0 tokens"):
        sequences(tokenizer, [], 16)


def test_perplexity_is_exp_of_the_mean_loss_of_the_predicted_tokens() -> None:
    model, tokenizer = model_and_tokenizer()
    pieces = sequences(tokenizer, lines_of("bb"), 16)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for piece in pieces:  # Transformers' own loss, a mean, of one sequence at a time
            loss = model.eval()(input_ids=piece[None], labels=piece[None]).loss
            total, tokens = total + float(loss) * (len(piece) - 1), tokens + len(piece) - 1
    model.train()
    found = perplexity(model, pieces, 4)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.value == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert perplexity(model, pieces, 1).loss == pytest.approx(found.loss, rel=1e-6)
    assert model.training


def test_a_model_that_has_diverged_is_an_error() -> None:
    model, tokenizer = model_and_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged; take a smaller learning rate"):
        perplexity(model, sequences(tokenizer, lines_of("bb"), 16), 4)
