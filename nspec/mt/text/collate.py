"""Sentences and their translations to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nspec.mt.text.prepared import Example

IGNORED = -100
"""The label of padding and of the target's tag, which no loss counts."""


def collate(examples: Sequence[Example], pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Pads the examples of one direction or several to the longest of them.

    Args:
        examples: as :class:`nspec.mt.text.prepared.Examples` gives them.
        pad_to_multiple_of: both lengths are rounded up to it.

    Returns:
        ``input_ids``, ``attention_mask`` int64 [sentences, source tokens]; ``decoder_input_ids``,
        ``decoder_attention_mask`` and ``labels`` int64 [sentences, target tokens]; the decoder's input is the target one
        place to the right behind ``start_id``, the labels are the target with -100 on padding and on what the search is
        given (:class:`~nspec.mt.text.prepared.Example`); ``task``, the direction, or a list with the direction of each
        sentence where there are several.

    A tag is no prediction of the translation: the decoder is given it. From English, the encoder of a dense model does not
    know it, and masks of a direction do, random ones too, which would show as a gain of ``ln(languages) / tokens`` nats.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("a batch needs at least one sentence")
    tasks = [example.task for example in examples]
    first = examples[0]
    sources, targets = [example.source for example in examples], [example.target for example in examples]
    input_ids, attention_mask = _padded(sources, first.pad_id, pad_to_multiple_of)
    labels, decoder_mask = _padded(targets, IGNORED, pad_to_multiple_of)
    decoder_input_ids = torch.full_like(labels, first.pad_id)
    decoder_input_ids[:, 0] = first.start_id
    decoder_input_ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, first.pad_id)
    # A place is real where the target has a token: the end of a sentence is one, and not in the decoder's input.
    decoder_input_ids.masked_fill_(decoder_mask == 0, first.pad_id)
    for row, example in enumerate(examples):
        labels[row, : example.given] = IGNORED
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": decoder_mask,
        "labels": labels,
        "task": tasks[0] if len(set(tasks)) == 1 else tasks,
    }


def _padded(sequences: Sequence[Any], fill: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in rows filled up with ``fill``, and 1 where they are, 0 where the filling is."""
    width = max(map(len, sequences))
    shape = len(sequences), -(-width // multiple) * multiple
    ids = torch.full(shape, fill, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask
