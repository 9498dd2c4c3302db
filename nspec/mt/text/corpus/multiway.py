"""A folder with one ``<lang>.tsv[.gz]`` of ``id<TAB>text`` for each language, and ``splits.json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspec.files import sha256
from nspec.mt.languages import plain_code
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import (
    EMPTY_SIDE,
    AlignedCorpus,
    CorpusError,
    Pair,
    check_languages,
    clean,
    names,
    requested_languages,
)
from nspec.mt.text.corpus.lines import read_columns
from nspec.mt.text.corpus.parallel import parse_json, shown, unique_keys

FILE = re.compile(r"(?P<lang>[\w-]+)\.tsv(\.gz)?", re.ASCII)
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
        _check_apart(folder / SPLITS_FILE, {name: self.lists[name] for name in self.names.values()})
        texts: dict[str, dict[str, str]] = {}
        empty: dict[str, int] = {}
        for code, path in self.files.items():
            texts[code], empty[code] = _read_texts(path)
        held_out = {name for part in self.lists.values() for name in part}
        ids = dict.fromkeys(name for part in texts.values() for name in part)
        _check_spelling(folder / SPLITS_FILE, held_out, ids)
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
        if alike := _alike(ids):
            self.note(
                f"{folder}: {len(alike)} ids differ from others only in spaces or Unicode form (NFC, NFD), such as "
                f"{alike[0]!a}; they are taken for different ones"
            )
        for code, number in empty.items():
            self.skip(code, EMPTY_SIDE, number)

    def identity(self) -> Any:
        files = [*self.files.values(), self.folder / SPLITS_FILE]
        return {path.name: [path.stat().st_size, sha256(path)] for path in files}

    def explain_missing(self, pair: Pair, split: str) -> str:
        both = " and ".join(self.files[code].name for code in pair if code in self.files)
        first, second = (self.texts.get(code, {}) for code in pair)
        if split != "train":
            ids = self.lists[self.names[split]]
            found = [sum(name in texts for name in ids) for texts in (first, second)]
            return (
                f"none of the {len(ids)} ids in list {self.names[split]!r} of {SPLITS_FILE} is in both {both} "
                f"({found[0]} are in the first, {found[1]} in the second)"
            )
        held_out = {name for part in self.lists.values() for name in part}
        ours, theirs = ([name for name in texts if name not in held_out] for texts in (first, second))
        if not ours or not theirs:
            return f"every id that is in both {both} is in a list of {SPLITS_FILE}"
        alike = len({clean(name) for name in ours} & {clean(name) for name in theirs})
        return (
            f"none of {len(ours)} and {len(theirs)} ids that are in no list of {SPLITS_FILE} is in both {both}, such as "
            f"{ours[0]!a} and {theirs[0]!a}"
            + (f"; {alike} would be with the same spaces and Unicode form (NFC)" if alike else "")
        )


def _language_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if code := language_of_file(path):
            if code in found:
                raise CorpusError(f"{found[code]} and {path.name} are both there; keep one")
            found[code] = path
        elif (match := FILE.fullmatch(path.name)) and plain_code(match["lang"].partition("-")[0]):
            raise CorpusError(f"{path}: {match['lang']} is no language code; write it as in pt_BR.tsv, or take it away")
    return found


def language_of_file(path: Path) -> str | None:
    """The language of a file such as ``de.tsv.gz``, by its name; None where it is not named so."""
    match = FILE.fullmatch(path.name)
    return plain_code(match["lang"]) if match else None


def _read_splits(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise CorpusError(f"{path} is missing: it lists the ids of the evaluation parts, for example "
                          '{"valid": ["id7"], "test": ["id8", "id9"]}')  # fmt: skip
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error

    value = parse_json(text, f"{path} is", unique_keys(str(path)))
    if not isinstance(value, dict):
        raise CorpusError(f"{path}: expected an object of lists of ids, found a {type(value).__name__}")
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    for name, part in lists.items():
        for item in part:
            if not isinstance(item, str):
                raise CorpusError(f"{path}: list {name!r} holds {shown(item)}; ids are strings")
    return lists


def _check_apart(path: Path, parts: dict[str, list[str]]) -> None:
    """Raises CorpusError where an id stands in two of the lists that are used, or twice in one."""
    seen: dict[str, str] = {}
    both: list[str] = []
    for part, ids in parts.items():
        for name, number in Counter(ids).items():
            if number > 1:
                raise CorpusError(f"{path}: list {part!r} has the id {name!r} {number} times; keep one")
            if name in seen:
                both.append(name)
        seen |= dict.fromkeys(ids, part)
    if both:
        listed = names(map(repr, both), 3)
        raise CorpusError(
            f"{path}: {len(both)} ids are in both lists {' and '.join(map(repr, parts))}: {listed}; keep each in one"
        )


def _check_spelling(path: Path, listed: Iterable[str], ids: Iterable[str]) -> None:
    """Raises CorpusError where an id of a list is spelled otherwise in the files: its text would be training data."""
    ids = set(ids)
    strange = {clean(name): name for name in sorted(set(listed) - ids)}
    alike = [(strange[form], name) for name in sorted(ids) if (form := clean(name)) in strange]
    if alike:
        one, other = alike[0]
        raise CorpusError(
            f"{path}: {len(alike)} listed ids differ from ids of the files only in spaces or Unicode form (NFC, NFD), "
            f"such as {one!a} from {other!a}; write them the same way"
        )


def _alike(ids: Iterable[str]) -> list[str]:
    """Ids that are another one but for spaces and Unicode form."""
    known = set(ids)
    strange = {name: form for name in ids if (form := clean(name)) != name}
    forms = Counter(strange.values())
    return [name for name, form in strange.items() if form in known or forms[form] > 1]


def _read_texts(path: Path) -> tuple[dict[str, str], int]:
    """Texts by id, and how many empty ones were left out."""
    texts: dict[str, str] = {}
    for number, name, text in read_columns(path, "id<TAB>text"):
        if name in texts:
            raise CorpusError(f"{path}, line {number}: the id {name!r} stands there for the second time")
        texts[name] = clean(text)
    filled = {name: text for name, text in texts.items() if text}
    return filled, len(texts) - len(filled)
