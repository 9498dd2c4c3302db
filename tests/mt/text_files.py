"""Folders of parallel text in files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from nspec.mt.text.config import CorpusConfig

DE, EN = "Hallo Welt\nGuten  Tag\n", "Hello world\nGood day\n"


PAIRS = [("Hallo Welt", "Hello world"), ("Guten Tag", "Good day")]


def write(folder: Path, **files: str | bytes) -> CorpusConfig:
    """Writes files; ``__`` in a name stands for ``-`` and ``_`` for ``.``."""
    for name, content in files.items():
        write_file(folder / name.replace("__", "-").replace("_", "."), content)
    return CorpusConfig(type="files", path=str(folder))


def write_file(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def moses(folder: Path, *splits: str, pair: str = "en-de", end: str = "") -> CorpusConfig:
    for split in splits:
        write_file(folder / f"{split}.{pair}.de{end}", DE)
        write_file(folder / f"{split}.{pair}.en{end}", EN)
    return CorpusConfig(type="files", path=str(folder))


def tsv(
    folder: Path, *splits: str, content: str | bytes = "Hallo Welt\tHello world\nGuten Tag\tGood day\n"
) -> CorpusConfig:
    for split in splits:
        write_file(folder / f"{split}.de-en.tsv", content)
    return CorpusConfig(type="files", path=str(folder))


def jsonl(folder: Path, name: str, *rows: object) -> CorpusConfig:
    write_file(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(type="files", path=str(folder))
