"""How the token ids of prepared text lie on disk: two arrays for each language of a pair, in a folder for each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nspec.files import replacing


def stem_of(pair: str, language: str, spelled: str) -> str:
    """The name of the arrays of a pair's language; where source and target are spelled each in its way, of one of them."""
    return ".".join(filter(None, (pair, language, spelled)))


class TokenArrays:
    """Sentences one after another, and where each begins."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._chunks: list[Any] = []
        self._ids: list[int] = []
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, ids: list[int]) -> None:
        self._ids += ids
        self._ends.append(self._ends[-1] + len(ids))
        if len(self._ids) > 1 << 20:  # lists take many times the room of arrays
            self._flush()

    def _flush(self) -> None:
        self._chunks.append(np.array(self._ids, dtype=self.dtype))
        self._ids = []

    def save(self, stem: Path) -> None:
        """Writes ``<stem>.ids.npy`` and ``<stem>.offsets.npy``."""
        self._flush()
        arrays = {"ids": np.concatenate(self._chunks), "offsets": np.array(self._ends, dtype=np.int64)}
        for kind, array in arrays.items():
            with replacing(Path(f"{stem}.{kind}.npy")) as part, open(part, "wb") as file:
                np.save(file, array)
