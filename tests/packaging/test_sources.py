"""Rules that the text of the product keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 450

# Of the machine and the work behind the product, not of the product.
FOREIGN = re.compile(r"\.\./shared|/work/|\bopt/(pypi|wheels)\b|\bissue #?\d{1,2}\b|\bTODO\b|\bFIXME\b")


def product() -> Iterator[Path]:
    """Every text file of the product: all but the tests, what .ci runs, and what is built or written by a run."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CMakeLists.txt", "Makefile", "MANIFEST.in", "setup.py"]
    yield from (path for name in [*names, "pyproject.toml", "constraints.txt"] if (path := ROOT / name).is_file())
    for folder in ("nspec", "kernels", "configs", "bench", "examples", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyc", ".png", ".svg"):
                yield path


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    folders = ("nspec", "kernels", "tests", "bench", "examples")
    files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 20
    assert not {str(path): n for path, n in lengths.items() if n > LONGEST}, f"split what has over {LONGEST} lines"


def test_the_product_speaks_of_itself_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in product()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not found, "\n".join(found)


def test_constraints_pin_exact_public_versions() -> None:
    pin = re.compile(r'^[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*(; python_version (<|>=) "3\.\d+")?$')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    assert not [line for line in pins if not pin.match(line)]
