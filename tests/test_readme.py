"""What the README shows runs as it stands, and its file tree is the tree."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        script.write_text(block, encoding="utf-8")
        runpy.run_path(str(script))


def test_the_file_tree_names_what_is_there() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    named = [line.split()[0] for line in tree.group(1).splitlines() if line.strip() and not line.startswith("   ")]
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert top <= {Path(name).parts[0] for name in named}


def test_every_local_link_and_picture_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (ROOT / link).exists(), link
