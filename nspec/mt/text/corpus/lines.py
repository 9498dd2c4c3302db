"""Lines of text files, plain or gzipped, with errors that name file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from nspec.mt.text.corpus.base import CorpusError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its line end); a byte-order mark is dropped.

    Raises:
        CorpusError: a line is not UTF-8, or the file is not readable or not whole gzip data.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise CorpusError(
                        f"{path}, line {number}: not valid UTF-8 (byte 0x{byte:02x} at position {error.start + 1}); "
                        "convert the file, for example with iconv -t UTF-8"
                    ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is not whole gzip data: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def read_columns(path: Path, meaning: str) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, first, second column) of a file with two tab-separated columns.

    Raises:
        CorpusError: a line has another number of columns; ``meaning`` ("id<TAB>text") is in the message.
    """
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) != 2:
            found = "1 column" if len(columns) == 1 else f"{len(columns)} columns"
            raise CorpusError(f"{path}, line {number}: found {found}, expected 2 ({meaning})")
        yield number, columns[0], columns[1]
