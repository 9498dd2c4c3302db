"""Text of two languages in files, and a language model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspec.lm.config import LanguageModelConfig
from nspec.lm.model import new_model, train_tokenizer

WORDS = {"aa": ["sun", "moon", "star", "sky", "rain"], "bb": ["eins", "zwei", "drei", "vier", "acht"]}


def lines_of(code: str, count: int = 60) -> list[str]:
    """Different lines of a few words."""
    words = WORDS[code]
    return [" ".join(words[(n // 5**place) % 5] for place in range(4)) for n in range(7, 7 + count)]


def write(folder: Path, count: int = 60) -> Path:
    """A file for each language."""
    folder.mkdir(parents=True, exist_ok=True)
    for code in WORDS:
        (folder / f"{code}.txt").write_text("".join(f"{line}\n" for line in lines_of(code, count)), encoding="utf-8")
    return folder


def model_and_tokenizer(length: int = 16) -> tuple[Any, Any]:
    """New ones."""
    tokenizer = train_tokenizer([line for code in WORDS for line in lines_of(code)], 300, length)
    shape = LanguageModelConfig(d_model=16, d_ff=40, layers=2, heads=2)
    return new_model(shape, tokenizer, length, seed=1), tokenizer
