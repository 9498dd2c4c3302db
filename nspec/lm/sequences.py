"""Lines as sequences of tokens: joined by the end-of-text token and cut into pieces of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def sequences(tokenizer: Any, lines: Sequence[str], length: int) -> list[Tensor]:
    """Token ids of lines, one behind the other, each ended by the end-of-text token where the tokenizer has one.

    Each sequence begins with the token that the tokenizer puts before a text, where it does.

    Args:
        tokenizer: of Transformers.
        lines: documents.
        length: of each sequence but the last, which may be shorter; no sequence has a single token.

    Returns:
        int64 ``[length]`` each.

    Raises:
        ValueError: fewer than two tokens, of which none could be predicted.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = [id for id in tokenizer("")["input_ids"][:1] if id == tokenizer.bos_token_id and [id] != end]
    found = tokenizer(list(lines), add_special_tokens=False)["input_ids"] if lines else []
    ids = torch.tensor(list(chain.from_iterable([*line, *end] for line in found)), dtype=torch.int64)
    first = torch.tensor(start, dtype=torch.int64)
    pieces = [torch.cat([first, piece]) for piece in ids.split(length - len(start)) if len(start) + len(piece) > 1]
    if not pieces:
        raise ValueError(f"{len(lines)} lines have {len(ids)} tokens together; expected two or more")
    return pieces


def batches(pieces: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Sequences put together, ``[at most size, length]``; those of another length apart, so that nothing is padded."""
    by_length: dict[int, list[Tensor]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    for same in by_length.values():
        for start in range(0, len(same), size):
            yield torch.stack(same[start : start + size])
