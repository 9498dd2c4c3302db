"""Makes the fabricated rows of this folder importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result file with fabricated rows of a CPU and of a GPU."""
    from fabricated import CPU, GPU, fabricated, written

    return written(tmp_path_factory.mktemp("rows") / "rows.jsonl", fabricated(CPU), fabricated(GPU))
