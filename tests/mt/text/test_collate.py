"""Batches: padding, the decoder's input, masks, directions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration
from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right

from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Example

TAGS = {"aa": 20, "bb": 21}


def example(source: list[int], target: list[int], task: str = "aa-bb") -> Example:
    first, second = task.split("-")
    framed = [np.array([TAGS[tag], *ids, 2]) for tag, ids in ((first, source), (second, target))]
    return Example(task, *framed, pad_id=1, start_id=2, given=1)


BATCH = [example([5, 6, 7], [8]), example([9], [10, 11, 12, 13])]


def test_sides_are_padded_to_their_own_longest_and_the_decoder_reads_the_target_one_place_later():
    batch = collate(BATCH)
    assert batch.pop("task") == "aa-bb"
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[20, 5, 6, 7, 2], [20, 9, 2, 1, 1]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "decoder_input_ids": [[2, 21, 8, 1, 1, 1], [2, 21, 10, 11, 12, 13]],
        "decoder_attention_mask": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
        "labels": [[-100, 8, 2, -100, -100, -100], [-100, 10, 11, 12, 13, 2]],  # the tag is given, not asked for
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_decoders_input_is_what_transformers_makes_of_the_labels_wherever_a_label_counts():
    batch = collate([dataclasses.replace(one, given=0) for one in BATCH])  # as a Marian model, whose target has no tag
    shifted = shift_tokens_right(batch["labels"].clone(), 1, 2)
    real = batch["labels"] != -100
    assert torch.equal(batch["decoder_input_ids"][real], shifted[real])
    assert torch.equal(real, batch["decoder_attention_mask"].bool())
    tagged = collate(BATCH)
    assert all(torch.equal(batch[name], tagged[name]) for name in batch if name not in ("task", "labels"))


def test_padding_does_not_change_the_loss_of_a_model():
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=24,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = M2M100ForConditionalGeneration(config).eval().double()

    def loss(examples: list[Example], multiple: int = 1) -> float:
        batch = collate(examples, pad_to_multiple_of=multiple)
        batch.pop("task")
        return model(**batch).loss.item()

    counted = [len(one.target) - one.given for one in BATCH]
    alone = [loss([one]) * number for one, number in zip(BATCH, counted)]
    assert loss(BATCH) == pytest.approx(sum(alone) / sum(counted), rel=1e-12)
    assert loss(BATCH, multiple=8) == pytest.approx(loss(BATCH), rel=1e-12)


def test_lengths_are_rounded_up_to_a_multiple():
    batch = collate(BATCH, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["labels"][0].tolist() == [-100, 8, 2, *[-100] * 5]
    assert batch["decoder_input_ids"][1].tolist() == [2, 21, 10, 11, 12, 13, 1, 1]


def test_pairs_of_several_directions_come_with_the_direction_of_each():
    other = example([5], [6], "bb-aa")
    batch = collate([BATCH[0], other, BATCH[1]])
    assert batch["task"] == ["aa-bb", "bb-aa", "aa-bb"]
    assert batch["input_ids"].tolist() == [[20, 5, 6, 7, 2], [21, 5, 2, 1, 1], [20, 9, 2, 1, 1]]
    assert batch["labels"][1].tolist() == [-100, 6, 2, -100, -100, -100]


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        collate([])
