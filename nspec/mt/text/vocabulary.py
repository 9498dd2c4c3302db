"""The vocabulary: a SentencePiece BPE model with language tags, as a tokenizer that plain ``transformers`` loads.

The exported folder holds ``tokenizer.json`` and ``tokenizer_config.json`` of a ``transformers.NllbTokenizer``, the one
class there that takes any set of languages, and ``spm.model``, the same model for SentencePiece itself.

- Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, pieces, then one tag a language, last ``<mask>`` (unused; the
  class insists on it). Pieces have the same ids in SentencePiece.
- A tag is written ``__de__``, as M2M100 does. A bare ``de`` could not be told from the piece ``de``, which nearly every
  vocabulary has. So with plain transformers ``tokenizer.src_lang = "__de__"``, ``tokenizer.tgt_lang = "__en__"`` and
  ``generate(forced_bos_token_id=tokenizer.convert_tokens_to_ids("__en__"))``;
  :mod:`nspec.mt.language_tags` finds the spelling.
- Encoder input: ``[source tag] pieces </s>``; labels: ``[target tag] pieces </s>``; the decoder starts with ``</s>``.
- ``</s>``, ``<pad>`` or ``__de__`` standing in a text are spelled in pieces like any other text.
- Normalisation: none but white space. Every white-space character and U+2581, SentencePiece's own sign for a space, is
  a space, and runs of spaces are one. There is no NFKC, which would change what is translated; text is expected in
  NFC. Digits are always pieces of their own. A character that the training text never had is ``<unk>``
  (:func:`unknown_characters` tells which). There is no byte fallback: the class makes its model without one when it is
  loaded, whatever the file says, so that plain transformers would read the folder otherwise than SentencePiece does. The
  class is also why only BPE is offered: its Unigram siblings have fixed lists of languages.
- Ids equal SentencePiece's, with two exceptions that :func:`encode` rules out as it cleans the text: white space at
  the end of a text (one more ``▁`` here), and a combining mark right behind a white-space character other than the
  plain space or behind U+2581 (here the mark goes with it).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec.files import replacing, sha256, write_json
from nspec.mt.language_tags import languages_of, tag
from nspec.mt.model_files import reading
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.corpus.base import clean
from nspec.mt.text.marian import Role, check_files, check_vocabulary, is_marian, pieces_ids
from nspec.mt.text.tokenizer_fit import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MODEL_FILE = "spm.model"

_WANTED = (
    "expected a model that begins source and target with the tag of their language (M2M100, NLLB, mBART-50), or Marian's; "
    "any other one can be specialised in a Trainer of your own (nspec.specialize, nspec.TaskTrainerMixin)"
)
_MASK = "<mask>"
_SPACE_SIGN = "\u2581"
# SentencePiece writes it for what it does not know, and leaves lines that have it out of the training without an error.
_UNKNOWN_SIGN = "\u2585"
# All that str.isspace() knows, so that a text is read the same whether or not clean() has seen it.
_SPACES = [*range(0x09, 0x0E), *range(0x1C, 0x20), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]
_SPACES += [0x2028, 0x2029, 0x202F, 0x205F, 0x3000, ord(_SPACE_SIGN)]


def quotas(counts: Mapping[str, int], temperature: float, most: int) -> dict[str, int]:
    """How many sentences of each language the vocabulary is trained on.

    Args:
        counts: sentences that each language has.
        temperature: languages are sampled with p ~ n^(1/T): 1 is in proportion, infinity the same of each.
        most: all together; at most what there is in all.

    Returns:
        By language; more than it has where a small language is to be repeated.
    """
    total = min(most, sum(counts.values()))
    logs = {language: np.log(count) / temperature for language, count in counts.items() if count}
    top = max(logs.values(), default=0.0)
    weights = {language: float(np.exp(value - top)) for language, value in logs.items()}
    scale = total / sum(weights.values()) if weights else 0.0
    return {language: round(scale * weights.get(language, 0.0)) for language in counts}


def sampled(
    read: Callable[[str], Iterable[str]], counts: Mapping[str, int], temperature: float, most: int, seed: int
) -> Iterator[str]:
    """Yields the sentences that the vocabulary is trained on; deterministic.

    A language whose quota is k times its size plus r gives every sentence k times and r of them once more.

    Args:
        read: gives all sentences of a language, in a fixed order.
        counts: how many that is.
        temperature: see :func:`quotas`.
        most: see :func:`quotas`.
        seed: of the choice.
    """
    for language, quota in quotas(counts, temperature, most).items():
        if not quota:
            continue
        repeats, rest = divmod(quota, counts[language])
        key = np.random.SeedSequence([seed, zlib.crc32(language.encode())])
        draws = np.random.Generator(np.random.Philox(key)).random(counts[language])
        chosen = np.zeros(counts[language], dtype=bool)
        chosen[np.argsort(draws, kind="stable")[:rest]] = True
        for sentence, once_more in zip(read(language), chosen):
            for _ in range(repeats + int(once_more)):
                yield sentence


def train_sentencepiece(sentences: Iterable[str], config: TokenizerConfig) -> bytes:
    """Trains a SentencePiece model; one thread, so that the same sentences give the same bytes.

    Args:
        sentences: one line each, as :func:`nspec.mt.text.corpus.base.clean` leaves them.
        config: number of pieces (the four special ones included), character coverage.

    Returns:
        The serialised model.

    Raises:
        ValueError: more pieces than the text supports, fewer than it has characters, or no text at all.
    """
    import sentencepiece

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "spaces.tsv"
        rules.write_text("".join(f"{code:X}\t20\n" for code in _SPACES), encoding="ascii")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(sentence.replace(_UNKNOWN_SIGN, " ") for sentence in sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=config.vocab_size,
                character_coverage=config.character_coverage,
                normalization_rule_tsv=str(rules),
                split_digits=True,
                bos_id=0,
                pad_id=1,
                eos_id=2,
                unk_id=3,
                max_sentence_length=1 << 20,  # the default leaves lines of more than 4192 bytes out without an error
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), config)) from error
    proto = _parsed(model.getvalue())
    proto.normalizer_spec.normalization_rule_tsv = ""  # the path of a temporary file, another one each time
    return bytes(proto.SerializeToString(deterministic=True))


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return getattr(sentencepiece_model_pb2, "ModelProto").FromString(model)  # noqa: B009 (made at run time)


def _explain(message: str, config: TokenizerConfig) -> str:
    if found := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"tokenizer.vocab_size is {config.vocab_size}, but the training text supports no more than {found[1]} "
            f"pieces; set tokenizer.vocab_size={found[1]} or less, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenizer.vocab_size is {config.vocab_size}, but the different characters of the training text alone "
            f"need {found[1]} pieces; set a larger one, or a smaller tokenizer.character_coverage"
        )
    if "!sentences_.empty()" in message:
        return "there is no text to train the vocabulary on"
    return f"SentencePiece cannot train the vocabulary: {message}"


def export_tokenizer(
    model: bytes, languages: list[str], folder: str | os.PathLike[str], max_length: int = 1024
) -> None:
    """Writes a trained model as a tokenizer folder for ``transformers.AutoTokenizer``; see the module's text.

    Args:
        model: what :func:`train_sentencepiece` returned.
        languages: codes, in the order of their tags' ids; the first is the source language until another one is set.
        folder: made as needed.
        max_length: tokens, ``model_max_length`` of the tokenizer.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    # None of them can be a piece: SentencePiece never joins "_" and letters, which are of different scripts.
    tags = [tag(language) for language in languages]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(vocabulary), unk_token=SPECIAL_TOKENS[3], fuse_unk=True)
    )
    charsmap = _parsed(model).normalizer_spec.precompiled_charsmap
    # NllbTokenizer takes vocabulary, merges and this map from the file; the other parts are as it makes them anew.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(charsmap), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE_SIGN, prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE_SIGN, prepend_scheme="always", split=True)
    special = [*SPECIAL_TOKENS, *tags, _MASK]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    with replacing(Path(folder) / MODEL_FILE) as part:
        part.write_bytes(model)
    with replacing(Path(folder) / "tokenizer.json") as part:
        tokenizer.save(str(part))
    names = {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3}
    settings: dict[str, Any] = {f"{name}_token": SPECIAL_TOKENS[index] for name, index in names.items()}
    settings |= {
        "tokenizer_class": "NllbTokenizer",
        "mask_token": _MASK,
        "extra_special_tokens": tags,
        "split_special_tokens": True,
        "legacy_behaviour": False,
        "src_lang": tags[0],
        "tgt_lang": tags[-1],
        "model_max_length": max_length,
    }
    write_json(Path(folder) / "tokenizer_config.json", settings)


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE model of which SentencePiece keeps only the results, best first.

    SentencePiece joins the two neighbours that make the best piece, the leftmost first. A piece that can be made in two
    ways needs two merges here; the one with the longer left part goes first, as it is what comes of joining from the
    left.
    """
    pieces = {piece: index for piece, index in vocabulary.items() if index >= len(SPECIAL_TOKENS)}
    merges = []
    for piece in sorted(pieces, key=pieces.__getitem__):
        cuts = range(len(piece) - 1, 0, -1)
        merges += [(piece[:cut], piece[cut:]) for cut in cuts if piece[:cut] in pieces and piece[cut:] in pieces]
    return merges


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer folder: ours, or that of a pretrained model (or its hub name).

    Raises:
        ValueError: there is no tokenizer, one that is broken or not the one that was saved there
            (:func:`nspec.mt.text.tokenizer_fit.check_tokenizer_files`), or one that is neither made for
            ``[tag] tokens </s>`` around source and target nor Marian's.
    """
    from transformers import AutoTokenizer

    hint = (
        "; it needs tokenizer.json (or what its class has: vocab.json, sentencepiece.bpe.model) and tokenizer_config.json, "
        "whole and of one another"
    )
    check_files(Path(folder))
    with reading("tokenizer", folder, hint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # which Marian's does not use
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_tokenizer_files(Path(folder), tokenizer)
    if is_marian(tokenizer):
        check_vocabulary(tokenizer, folder)
        return tokenizer
    tags = languages_of(tokenizer)
    if not tags:
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no language tags such as __de__; {_WANTED}"
        )
    layout = tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)
    if layout[0] not in tags.values() or layout[-1] != tokenizer.eos_token:
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) writes {' '.join(layout)}; "
            f"expected the language tag first and the end of sentence last: {_WANTED}"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], role: Role = "source") -> list[list[int]]:
    """Token ids of texts without tag and ``</s>``.

    The text is cleaned first, as all training text is (NFC, single spaces, none at the ends; U+2581 is a space). Special
    tokens that stand in it are text. What is longer than the model takes is not cut. Whether they are source or target
    matters to Marian's alone.
    """
    if not texts:
        return []
    texts = [clean(text.replace(_SPACE_SIGN, " ")) for text in texts]
    if is_marian(tokenizer):
        return pieces_ids(tokenizer, texts, role)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,  # about texts longer than the model takes: training leaves them out, evaluation counts them
    )
    return list(encoded["input_ids"])


def unknown_characters(
    tokenizer: PreTrainedTokenizerBase, characters: Iterable[str], role: Role = "source"
) -> set[str]:
    """Those of ``characters`` that a text loses: they are ``<unk>`` to the vocabulary."""
    listed = list(characters)
    return {c for c, ids in zip(listed, encode(tokenizer, listed, role)) if tokenizer.unk_token_id in ids}


def folder_sha256(folder: str | os.PathLike[str]) -> str:
    """A SHA-256 over the names and contents of all files in a tokenizer folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
