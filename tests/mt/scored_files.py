"""Translations and references in files."""

import random
from pathlib import Path

import pytest

pytest.importorskip("sacrebleu")

from nspec.mt.scoring.files import score_files

WORDS = ["the", "a", "cat", "dog", "house", "sees", "ran", "3", "12.5", ",", "blue", "Berlin", "tree", "grün"]


TASKS = ["de-en", "en-de"]


SAMPLES = 50


Texts = dict[str, list[str]]


def write(folder: Path, files: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def texts() -> tuple[Texts, Texts, Texts]:
    """References and two systems, of which the second is better."""
    rng = random.Random(3)
    references = {task: [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(20)] for task in TASKS}

    def spoil(kept: float) -> Texts:
        return {
            task: [" ".join(w if rng.random() < kept else rng.choice(WORDS) for w in line.split()) for line in lines]
            for task, lines in references.items()
        }

    return references, spoil(0.5), spoil(0.9)


def score(place: Path, *names: str, **options: object) -> dict:
    systems = [f"{name}={place / name}" for name in names or ("theirs", "ours")]
    return score_files(systems, str(place / "refs"), **{"bootstrap": SAMPLES, **options})  # type: ignore[arg-type]
