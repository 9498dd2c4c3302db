"""Runs the lines of an exported folder's README where nspec, PyTorch and Transformers cannot be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def readme(folder: Path, lines: list[str]) -> str:
    """The lines of Python of a README, for a folder and lines of text."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert 'folder = "."\n' in code
    code = code.replace('folder = "."\n', f"folder = {str(folder)!r}\n")
    assert 'lines = ["A sentence.", "Another one."]\n' in code
    return code.replace('lines = ["A sentence.", "Another one."]\n', f"lines = {lines!r}\n")


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nspec", "torch", "transformers", "kernels"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocked())
"""


def without_nspec(code: str) -> list[str]:
    """What a process prints that can import neither nspec, torch nor transformers."""
    program = f"{BLOCKED}{code}\nassert not {{'nspec', 'torch', 'transformers'}} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]
