"""Text of one language at a time: composed from CLDR, from files, or from the hub of ``datasets``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from nspec.lm.config import LinesConfig
from nspec.mt.text.config import CorpusConfig

_CLDR = {"train": 2000, "test": 100}
_TRIES = 20  # contents for each sentence that is asked for; where more cannot be said, the locale holds too little


class Lines(NamedTuple):
    """The text of a language.

    Attributes:
        train: documents, each on one line.
        test: held out; none of them is in ``train``.
    """

    train: list[str]
    test: list[str]


def read_lines_of(config: LinesConfig, seed: int) -> Iterator[tuple[str, Lines]]:
    """The text of each language, in the order of ``config.languages``.

    Args:
        config: where it comes from.
        seed: of composed text.

    Yields:
        Language and text.

    Raises:
        ValueError: no such folder or file, one that is not UTF-8 (with its line), or a language without text.
        ImportError: the library that the type needs (Babel, datasets) is not installed.
    """
    kinds = {"cldr": _composed, "files": _of_files, "hub": _of_hub}
    for code, found in kinds[config.type](config, seed):
        held = set(found.test)
        train = [line for line in found.train if line not in held]
        if found.train and not train:
            raise ValueError(
                f"all {len(found.train):,} training lines of {code} in {_place(config, code)} are in its held-out "
                "text too, and no line is both: expected other text in one of them"
            )
        for part, lines, option in (("training", train, "train_lines"), ("held-out", found.test, "test_lines")):
            if not lines:
                raise ValueError(
                    f"there is no {part} text of {code} in {_place(config, code)}: expected at least one line that is not "
                    f"empty{_hint(config, found, part)}"
                )
            most = getattr(config, option)
            del lines[most or len(lines) :]
        yield code, Lines(train, found.test)


def _place(config: LinesConfig, code: str) -> str:
    return {"cldr": "CLDR", "files": str(Path(config.path) / f"{code}.txt"), "hub": config.name}[config.type]


def _hint(config: LinesConfig, found: Lines, part: str) -> str:
    if config.type == "cldr":
        return ""
    if part == "held-out" and found.train:
        return f" (text.held_out is {config.held_out}; give a larger share, or a test file or split)"
    if part == "training" and found.test:
        return (
            f" besides {len(found.test)} held out (text.held_out is {config.held_out}; give more text, or a test file)"
        )
    return ""


def _composed(config: LinesConfig, seed: int) -> Iterator[tuple[str, Lines]]:
    from nspec.mt.text.corpus.cldr import CldrCorpus

    corpus = CldrCorpus(CorpusConfig(languages=list(config.languages), pivot="", seed=seed), seed)
    sizes = {"train": config.train_lines or _CLDR["train"], "test": config.test_lines or _CLDR["test"]}
    for code in config.languages:
        parts = {}
        for split, size in sizes.items():
            parts[split] = list(islice(corpus.texts(code, split, 1000 + _TRIES * size), size))
            if len(parts[split]) < size:
                raise ValueError(
                    f"CLDR has too little data to compose {size} sentences of {code}: only {len(parts[split])} of the "
                    "contents can be said in it; take another language"
                )
        yield code, Lines(**parts)


def _of_files(config: LinesConfig, _: int) -> Iterator[tuple[str, Lines]]:
    folder = Path(config.path)
    if not folder.is_dir():
        raise ValueError(f"text.path: {folder} is no folder; expected one with CODE.txt for each language")
    for code in config.languages:
        train = _file(folder, code)
        if train is None:
            there = sorted({path.name for path in folder.glob("*.txt*")}) or ["no text files"]
            raise ValueError(
                f"text.path: {folder} has no {code}.txt (or {code}.txt.gz), found {', '.join(there[:20])}; give the file, "
                f"or take {code} out of text.languages"
            )
        test = _file(folder, f"{code}.test")
        yield code, _split(train, config.held_out) if test is None else Lines(train, test)


def _file(folder: Path, name: str) -> list[str] | None:
    """The lines of a file that are not empty; None where there is none."""
    from nspec.mt.text.corpus.lines import read_lines

    # Codes have underscores, and files often hyphens.
    for stem in dict.fromkeys((name, name.replace("_", "-"))):
        for path in (folder / f"{stem}.txt", folder / f"{stem}.txt.gz"):
            if path.is_file():
                return _clean(line for _, line in read_lines(path))
    return None


def _of_hub(config: LinesConfig, _: int) -> Iterator[tuple[str, Lines]]:
    from nspec.mt.text.corpus.hub import load_data

    for code in config.languages:
        subset = config.subset.replace("{language}", code)
        data = load_data(config.name, subset)
        if config.split not in data:
            raise ValueError(f"text.split: {config.name} ({subset}) has no {config.split}, found {', '.join(data)}")
        parts = {}
        for split in (config.split, "test"):
            if split in data:
                if config.column not in data[split].column_names:
                    raise ValueError(
                        f"text.column: {config.name} ({subset}) has no column {config.column}, found "
                        f"{', '.join(data[split].column_names)}"
                    )
                parts[split] = _clean(str(text or "") for text in data[split][config.column])
        train = parts[config.split]
        own = "test" in parts and config.split != "test"
        yield code, Lines(train, parts["test"]) if own else _split(train, config.held_out)


def _clean(lines: Iterable[str]) -> list[str]:
    """White space of any kind as one space; a line may hold line breaks of a document."""
    return [text for line in lines if (text := " ".join(line.split()))]


def _split(lines: list[str], held_out: float) -> Lines:
    parts = Lines([], [])
    for line in lines:
        number = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")
        (parts.test if number < held_out * 2**64 else parts.train).append(line)
    return parts
