"""Whether a tokenizer is that of a model: a wrong one gives other words without an error.

A system that is saved here has a record of its tokenizer, ``tokenizer.sha256``, in the format of ``sha256sum`` (which
checks it with ``-c``). Of other folders what can be known is checked: that the ids fit the embeddings, and that tokenizer
and model agree on what the special ids are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import read_json, sha256
from nspec.mt.language_tags import is_ours, tag_ids
from nspec.mt.text.marian import is_marian, spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "tokenizer.sha256"

ROUND_VOCABULARY = 8
"""A new model's vocabulary is rounded up to a multiple of this, for tensor cores; the extra rows are not used."""

_SPARE_ROWS = 128  # pretrained models round their vocabulary too (M2M100 to 8, others to 64 or 128)
_LEAST_POSITIONS = 4  # a tag, a token, the end of the sentence, and what starts the decoder
_AGAIN = "copy the whole model folder again"


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids that a tokenizer gives, rising: of pieces, of special tokens, and of language tags.

    ``len(tokenizer)`` need not count the tags: those of a plain ``M2M100Tokenizer`` lie beyond it.
    """
    return sorted({*tokenizer.get_vocab().values(), *tokenizer.all_special_ids, *tag_ids(tokenizer)})


def rows_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows of embeddings that a new model for a tokenizer has."""
    return -(-(token_ids(tokenizer)[-1] + 1) // ROUND_VOCABULARY) * ROUND_VOCABULARY


def write_record(folder: Path, files: Iterable[str]) -> None:
    """Writes what the files of a tokenizer in ``folder`` are; those of ``files`` that are not there are passed by."""
    names = sorted({Path(file).name for file in files if (folder / Path(file).name).is_file()})
    (folder / RECORD).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def check_tokenizer_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer is what the files of its folder say; a hub name passes.

    Raises:
        ValueError: files that are missing, for which ``transformers`` takes an empty vocabulary; other ones than
            :data:`RECORD` says; a BPE without merges, which spells all words letter by letter.
    """
    if not folder.is_dir():
        return
    names = dict(type(tokenizer).vocab_files_names)
    names.pop("tokenizer_config_file", None)
    if is_marian(tokenizer):
        names.pop("target_vocab_file", None)  # there is one for source and target
    whole = names.pop("tokenizer_file", "tokenizer.json")
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if not (folder / whole).is_file() and (missing or not names):
        found = f"neither {whole} nor {' and '.join(missing)} is there" if missing else f"{whole} is not there"
        raise ValueError(f"{folder} has no tokenizer: {found}; {_AGAIN}")
    if (folder / RECORD).is_file():
        _check_record(folder)
    if (folder / whole).is_file():
        _check_merges(folder / whole)


def _check_record(folder: Path) -> None:
    for line in (folder / RECORD).read_text(encoding="utf-8", errors="replace").splitlines() or [""]:
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if not found:
            raise ValueError(f"{folder / RECORD} has a line {line[:80]!r}, expected a SHA-256 and a file; {_AGAIN}")
        file = folder / found[2]
        if not file.is_file():
            raise ValueError(f"{file} is not there, but was saved with the model; {_AGAIN}")
        if sha256(file) != found[1]:
            raise ValueError(
                f"{file} is not the one that was saved with the model ({RECORD} has its SHA-256); {_AGAIN}, or remove "
                f"{RECORD} if you have changed the file yourself"
            )


def _check_merges(file: Path) -> None:
    described: Any = read_json(file)
    model = described.get("model") or {}
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("merges"):
        return
    added = {token.get("content") for token in described.get("added_tokens") or [] if isinstance(token, dict)}
    pieces = [piece for piece in model.get("vocab") or {} if piece not in added and len(piece) > 1]
    joined = [piece for piece in pieces if not re.fullmatch("<.*>", piece)]
    if joined:
        raise ValueError(
            f"{file} has no merges, by which its pieces such as {joined[0]!r} are made; the file is broken: {_AGAIN}"
        )


def check_fit(tokenizer: PreTrainedTokenizerBase, config: Any, source: str | Path) -> None:
    """Checks what the configuration of a model says against its tokenizer, before the weights are read.

    Args:
        tokenizer: that stands beside the model.
        config: the model's ``PreTrainedConfig``.
        source: where both come from.

    Raises:
        ValueError: a vocabulary of another size, special ids that differ, a model that is no encoder and decoder, or one
            with hardly a position; names the key of config.json.
    """
    if not getattr(config, "is_encoder_decoder", True):
        raise ValueError(
            f"{source}: config.json says is_encoder_decoder false; expected a model of encoder and decoder"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and (type(positions) is not int or positions < _LEAST_POSITIONS):
        raise ValueError(
            f"{source}: config.json says max_position_embeddings {positions}; expected {_LEAST_POSITIONS} or more, the "
            "longest sequence in tokens"
        )
    check_special(tokenizer, config, source, "config.json")
    count, rows = token_ids(tokenizer)[-1] + 1, getattr(config, "vocab_size", None)
    if rows is None:
        return
    if (own := getattr(config, "decoder_vocab_size", None) or rows) != rows:
        raise ValueError(
            f"{source}: config.json says vocab_size {rows} and decoder_vocab_size {own}; expected one vocabulary for "
            "source and target: take such a model"
        )
    folder = Path(source)
    exact = is_ours(tokenizer) and folder.is_dir() and not (folder / RECORD).is_file()  # as older versions wrote it
    fits = rows in (count, rows_of(tokenizer)) if exact else count <= rows < count + _SPARE_ROWS
    if not fits:
        raise ValueError(
            f"the model in {source} has a vocabulary of {rows} and the tokenizer beside it one of {count}; it is the "
            f"tokenizer of another model: {_AGAIN}"
        )


def check_special(tokenizer: PreTrainedTokenizerBase, config: Any, source: str | Path, file: str) -> None:
    """Checks that model and tokenizer mean the same by their special ids.

    Args:
        tokenizer: that stands beside the model.
        config: has ``pad_token_id`` and its like, as a model's configuration and its generation settings do.
        source: where both come from.
        file: where ``config`` stands.

    Raises:
        ValueError: the tokenizer has no such token, or an id is another one; names it.
    """
    for name in ("pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f"the tokenizer in {source} has no {name}_token (null in tokenizer_config.json); {_AGAIN}")
    for name in ("pad", "eos", "bos", "decoder_start"):
        starting = "pad" if is_marian(tokenizer) else "eos"
        key, token = f"{name}_token_id", starting if name == "decoder_start" else name
        found, expected = getattr(config, key, None), getattr(tokenizer, f"{token}_token_id")
        if found is None and not (file == "config.json" and name in ("pad", "eos")):
            continue  # left open, and not asked for
        if expected is None or found == expected or (isinstance(found, list) and expected in found):
            continue
        shown = "null" if found is None else found
        starts = ", which starts the decoder," if name == "decoder_start" else ""
        raise ValueError(
            f"{source}: {file} says {key} {shown}, but the {token}_token of the tokenizer{starts} is "
            f"{getattr(tokenizer, f'{token}_token')} with id {expected}; {_AGAIN}"
        )


def check_same(used: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, source: str) -> None:
    """Raises ValueError where text was encoded with another vocabulary than that of the model in ``source``."""
    special = [(t.pad_token_id, t.eos_token_id, t.bos_token_id, t.unk_token_id) for t in (used, own)]
    if special[0] == special[1] and used.get_vocab() == own.get_vocab() and spelling(used) == spelling(own):
        return
    sizes = [len(token_ids(tokenizer)) for tokenizer in (used, own)]
    raise ValueError(
        f"the text was prepared with a vocabulary of {sizes[0]} tokens that is not the one of model.pretrained {source}, "
        f"which has {sizes[1]}; the model's folder has changed since: put it back, or take another run.folder"
    )
