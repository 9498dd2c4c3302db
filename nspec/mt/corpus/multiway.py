"""A folder with one ``<lang>.tsv[.gz]`` of ``id<TAB>text`` for each language, and ``splits.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nspec.files import read_json, sha256
from nspec.mt.config import CorpusConfig
from nspec.mt.corpus.base import (
    EMPTY_SIDE,
    FILE_CODE,
    AlignedCorpus,
    CorpusError,
    Pair,
    check_languages,
    clean,
    names,
    requested_languages,
)
from nspec.mt.corpus.lines import read_columns

FILE = re.compile(rf"(?P<lang>{FILE_CODE})\.tsv(\.gz)?")
SPLITS_FILE = "splits.json"


class MultiwayCorpus(AlignedCorpus):
    """Text of a multiway folder.

    ``splits.json`` is an object. Each of its lists holds ids of one evaluation part; the parts named by
    ``valid_split`` and ``test_split`` are used. Ids in none of the lists are training data, so the other lists keep
    their ids out of training. Values that are not lists are notes.
    """

    def __init__(self, config: CorpusConfig, seed: int, folder: Path) -> None:
        self.folder = folder
        found = _language_files(folder)
        wanted = requested_languages(config) or sorted(found)
        check_languages(wanted, found, str(folder))
        self.files = {code: found[code] for code in wanted}
        self.lists = _read_splits(folder / SPLITS_FILE)
        self.names = {"valid": config.valid_split, "test": config.test_split}
        for option, name in self.names.items():
            if name not in self.lists:
                raise CorpusError(
                    f"{folder / SPLITS_FILE} has no list {name!r} (corpus.{option}_split); it has {names(self.lists)}"
                )
        texts: dict[str, dict[str, str]] = {}
        empty: dict[str, int] = {}
        for code, path in self.files.items():
            texts[code], empty[code] = _read_texts(path)
        held_out = {name for part in self.lists.values() for name in part}
        ids = dict.fromkeys(name for part in texts.values() for name in part)
        super().__init__(
            config,
            seed,
            texts,
            {
                "train": [name for name in ids if name not in held_out],
                "valid": self.lists[config.valid_split],
                "test": self.lists[config.test_split],
            },
        )
        for code, number in empty.items():
            self.skip(code, EMPTY_SIDE, number)

    def identity(self) -> Any:
        files = [*self.files.values(), self.folder / SPLITS_FILE]
        return {path.name: [path.stat().st_size, sha256(path)] for path in files}

    def explain_missing(self, pair: Pair, split: str) -> str:
        both = " and ".join(self.files[code].name for code in pair if code in self.files)
        if split == "train":
            return f"every id that is in both {both} is in a list of {SPLITS_FILE}"
        ids = self.lists[self.names[split]]
        return f"none of the {len(ids)} ids in list {self.names[split]!r} of {SPLITS_FILE} is in both {both}"


def _language_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := FILE.fullmatch(path.name):
            if match["lang"] in found:
                raise CorpusError(f"{found[match['lang']]} and {path.name} are both there; keep one")
            found[match["lang"]] = path
    return found


def _read_splits(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise CorpusError(f"{path} is missing: it lists the ids of the evaluation parts, for example "
                          '{"valid": ["id7"], "test": ["id8", "id9"]}')  # fmt: skip
    try:
        value = read_json(path)
    except ValueError as error:
        raise CorpusError(str(error)) from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path}: expected an object of lists of ids, found a {type(value).__name__}")
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    for name, part in lists.items():
        for item in part:
            if not isinstance(item, str):
                raise CorpusError(f"{path}: list {name!r} holds {item!r}; ids are strings")
    return lists


def _read_texts(path: Path) -> tuple[dict[str, str], int]:
    """Texts by id, and how many empty ones were left out."""
    texts: dict[str, str] = {}
    for number, name, text in read_columns(path, "id<TAB>text"):
        if name in texts:
            raise CorpusError(f"{path}, line {number}: the id {name!r} stands there for the second time")
        texts[name] = clean(text)
    filled = {name: text for name, text in texts.items() if text}
    return filled, len(texts) - len(filled)
