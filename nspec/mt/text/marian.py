"""What Marian's vocabularies (OPUS-MT) have of their own.

A folder has two SentencePiece models, ``source.spm`` and ``target.spm``: the same text may be spelled otherwise as a source
than as a target. The ids of both are in ``vocab.json``. Nothing says the languages, but in folders of several target
languages, whose sources begin with a token such as ``>>fra<<``. The decoder starts from ``<pad>``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nspec.files import read_json
from nspec.mt.language_tags import languages_of, same_language
from nspec.mt.languages import is_known, languages_of_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["source", "target"]
ROLES: tuple[Role, Role] = ("source", "target")
_FILES = ("source.spm", "target.spm", "vocab.json")


def is_marian(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is a ``MarianTokenizer``."""
    return hasattr(tokenizer, "supported_language_codes")


def pieces_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], role: Role) -> list[list[int]]:
    """Token ids of texts as sources or as targets, without ``</s>``; ``>>fra<<`` and its like in them are text.

    Args:
        tokenizer: a ``MarianTokenizer``.
        texts: one sentence each.
        role: by which of the two SentencePiece models.
    """
    marian: Any = tokenizer
    ids, unknown = marian.encoder, marian.unk_token_id
    lines = _model(tokenizer, role).encode(texts, out_type=str)
    return [[ids.get(piece, unknown) for piece in line] for line in lines]


def _model(tokenizer: Any, role: Role) -> Any:
    return tokenizer.spm_source if role == "source" else tokenizer.spm_target


def spelling(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The two SentencePiece models of a ``MarianTokenizer``, serialised; nothing of others."""
    if not is_marian(tokenizer):
        return []
    return [_model(tokenizer, role).serialized_model_proto() for role in ROLES]


def check_files(folder: Path) -> None:
    """Checks what a ``MarianTokenizer`` is made of, where a folder has that; a hub name passes.

    Raises:
        ValueError: a part is missing, there are two vocabularies, or the ids in ``vocab.json`` are not 0, 1, 2 and so on.
    """
    if not any((folder / f"{role}.spm").is_file() for role in ROLES):
        return
    settings = folder / "tokenizer_config.json"
    found = read_json(settings) if settings.is_file() else {}
    if isinstance(found, dict) and found.get("separate_vocabs"):
        raise _separate(folder)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no tokenizer: {' and '.join(missing)} of a Marian's {', '.join(_FILES)} "
            f"{'is' if len(missing) == 1 else 'are'} not there; copy the whole model folder again"
        )
    _check_ids(folder / "vocab.json")


def _check_ids(file: Path) -> None:
    again = "copy the whole model folder again"
    ids = read_json(file)
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise ValueError(f"{file}: expected an object with the id of each piece, a whole number; {again}")
    pieces: dict[int, str] = {}
    for piece, number in ids.items():
        if number in pieces:
            raise ValueError(f"{file}: {pieces[number]!r} and {piece!r} both have the id {number}; {again}")
        pieces[number] = piece
    if missing := sorted(set(range(len(ids))) - set(pieces)):
        raise ValueError(
            f"{file}: no piece has the id {missing[0]}, and the ids go to {max(pieces)}: expected every one from 0 on; "
            f"{again}"
        )


def _separate(folder: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"the tokenizer in {folder} has a vocabulary for the source and another for the target (separate_vocabs in "
        "tokenizer_config.json); expected one vocab.json for both: take such a model"
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Raises ValueError where a ``MarianTokenizer`` has two vocabularies, or a ``.spm`` file of another vocabulary."""
    marian: Any = tokenizer
    if marian.separate_vocabs:
        raise _separate(folder)
    for role in ROLES:
        model = _model(tokenizer, role)
        pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
        known = sum(piece in marian.encoder for piece in pieces)
        if 2 * known < len(pieces):
            raise ValueError(
                f"{folder}: of the {len(pieces)} pieces of {role}.spm only {known} are in vocab.json; one of the two is of "
                "another model: copy the whole model folder again"
            )


def name_target(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[str]) -> None:
    """Notes the one language that a model without tokens such as ``>>fra<<`` translates into, where its folder does not."""
    (target, *others) = {languages_of_task(task)[1] for task in tasks}
    if not others and not languages_of(tokenizer) and not getattr(tokenizer, "target_lang", None):
        marian: Any = tokenizer
        marian.target_lang = marian.init_kwargs["target_lang"] = target  # saved from both


def check_directions(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[str]) -> None:
    """Checks that a folder without tokens such as ``>>fra<<`` can translate directions.

    Args:
        tokenizer: a ``MarianTokenizer``.
        tasks: the directions, such as ``en-de``.

    Raises:
        ValueError: there are several target languages, or languages that are not those of the folder, where its
            tokenizer_config.json names them.
    """
    tasks = list(tasks)
    targets = sorted({languages_of_task(task)[1] for task in tasks})
    if not languages_of(tokenizer) and len(targets) > 1:
        raise ValueError(
            "the vocabulary has no tokens such as >>fra<<, which say the target language, so its model translates into "
            f"one, and {', '.join(tasks)} are into {len(targets)} ({', '.join(targets)}); set corpus.directions to those "
            "into one of them, or take a folder of several target languages"
        )
    for place, role in enumerate(ROLES):
        own = getattr(tokenizer, f"{role}_lang", None)
        if not own or not is_known(own):  # a group, such as ROMANCE or mul
            continue
        for task in tasks:
            if not same_language(languages_of_task(task)[place], own):
                raise ValueError(
                    f"the model does not translate {task}: its tokenizer_config.json says {role}_lang {own}; leave the "
                    f"direction out of corpus.directions, or, where the model is to learn it, take {role}_lang out of there"
                )
