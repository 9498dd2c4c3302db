"""Makes ``toy_translation`` importable in the tests of this folder, and prepares its text once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from scored_files import texts, write
from toy_translation import Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def copier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    """A system that has learned to translate between two alphabets, and its text."""
    toy = Toy(tmp_path_factory.mktemp("copier"), languages=("de",))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return toy, toy.train("copier", updates=600, lr=0.01, warmup=100, batch_tokens=512, valid_every=300)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folders ``refs``, ``theirs`` and ``ours``."""
    references, theirs, ours = texts()
    write(tmp_path / "refs", {f"{task}.ref.txt": lines for task, lines in references.items()})
    write(tmp_path / "theirs", {f"{task}.{task[3:]}": lines for task, lines in theirs.items()})
    write(tmp_path / "ours", {f"{task}.hyp.txt": lines for task, lines in ours.items()})
    (tmp_path / "ours" / "scores.json").write_text("{}")  # a run's folder has more than translations
    (tmp_path / "ours" / "en-de.decode.json").write_text("{}")
    return tmp_path
