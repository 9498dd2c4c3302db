"""What the README shows runs as it stands, its figures are measured ones, and its file tree is the tree."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GIT = shutil.which("git") and (ROOT / ".git").exists()
MADE = {
    "build",
    "dist",
    "runs",
    "__pycache__",
    "PKG-INFO",
    "setup.cfg",
}  # by commands, in a checkout or source distribution


def test_every_python_block_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        script.write_text(block, encoding="utf-8")
        runpy.run_path(str(script))


def tree() -> dict[str, list[str]]:
    """The names of the tree by the folder that they stand under, "" for the top."""
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    names: dict[str, list[str]] = {"": []}
    for line in shown[1].splitlines():
        here = [name.strip("/") for name in re.split(r"  +", line.strip())[0].split(", ")]
        if line.startswith(" "):
            names[names[""][-1]] += here
        else:
            names[""] += here
            names |= {name: [] for name in here}
    return names


def there(folder: Path) -> set[str]:
    """The files and folders that are kept in the repository; without git, those that are there but for what is made."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True) if GIT else None
    if listed is not None and listed.returncode == 0:
        found = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
        return {name for name in found if not name.startswith(".") and (folder / name).exists()}
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in MADE}
    return {name for name in found if not name.endswith((".egg-info", ".so", ".pyc"))}


@pytest.mark.parametrize(
    ("folder", "left_out"), [("", ()), ("nspec", ("__init__.py", "py.typed")), ("kernels", ("README.md",))]
)
def test_the_file_tree_is_the_tree(folder: str, left_out: tuple[str, ...]) -> None:
    named, found = tree()[folder], there(ROOT / folder) - set(left_out)
    assert len(set(named)) == len(named)
    assert not found - set(named), "these are not in the README's tree"
    assert not set(named) - found, "the README's tree names what is not there"


def test_every_speed_up_in_the_text_is_in_the_table() -> None:
    text, table = README, ""
    for mark in ("bench", "serving"):
        written = text.partition(f"<!-- {mark}:headline:begin -->")[2].partition(f"<!-- {mark}:headline:end -->")[0]
        text, table = text.replace(written, ""), table + written
    said = re.findall(r"\b\d\.\d\d(?:×| as fast)", text)
    assert said
    for figure in said:
        assert f"{figure[:4]}×" in table, figure


def test_every_local_link_and_picture_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (ROOT / link).exists(), link


def test_the_page_is_one_that_is_read_whole() -> None:
    assert len(README.splitlines()) < 160
