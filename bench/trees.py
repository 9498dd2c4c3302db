"""Source trees of two commits to measure side by side, each with its native library and this checkout's harness.

A tree is a plain copy of a commit's files in a temporary folder. Its ``bench/`` is replaced by that of this checkout, so
that both sides are measured the same way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.machine import ROOT, commit

LIBRARY = Path("kernels/common/libnspec_cpu.so")


class NotPossible(Exception):
    """A comparison cannot be made; the message is one line with the reason and what to do."""


class Tree(NamedTuple):
    """One side: ``folder`` holds ``nspec/``, ``kernels/`` and ``bench/``; ``name`` is a commit's, perhaps ``-dirty``."""

    name: str
    folder: Path


def git(checkout: Path, *arguments: str) -> bytes:
    """The output of a git command.

    Raises:
        NotPossible: it failed, or there is no git.
    """
    try:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, check=True).stdout
    except OSError as error:
        raise NotPossible(f"git cannot be run ({error.strerror}); two commits are compared in a git checkout") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        raise NotPossible(f"`git {' '.join(arguments)}` in {checkout}: {lines[0]}") from None


def resolve(checkout: Path, revision: str) -> str:
    """The full name of the commit that a revision means (a branch, tag, ``HEAD~2``, short or full name).

    Raises:
        NotPossible: there is no such commit, or the folder is no git checkout.
    """
    git(checkout, "rev-parse", "--git-dir")
    try:
        found = git(checkout, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except NotPossible:
        raise NotPossible(f"no commit {revision!r} in {checkout}; `git log --oneline` lists them") from None
    return found.decode().split()[-1]


def _fill(checkout: Path, name: str | None, folder: Path) -> None:
    """Puts the files of a commit there; without a name those of the working tree, but what git ignores."""
    if name is not None:  # nothing is left in .git, however a comparison ends
        with tempfile.TemporaryFile() as file:
            file.write(git(checkout, "archive", "--format=tar", name))
            file.seek(0)
            with tarfile.open(fileobj=file) as archive:
                archive.extractall(folder, filter="data")
        return
    names = git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
    for path in filter(None, names):
        source, target = checkout / path, folder / path
        if source.is_file():  # else it is deleted, but not yet for git
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


@contextmanager
def trees(revisions: Sequence[str | None], checkout: Path = ROOT) -> Iterator[list[Tree]]:
    """A tree of each revision (None: the working tree), removed when the block is left, by an error too.

    Raises:
        NotPossible: a revision is unknown, or the folder is no git checkout.
    """
    names = [None if revision is None else resolve(checkout, revision) for revision in revisions]
    with tempfile.TemporaryDirectory(prefix="nspec-compare-") as top:
        made = []
        for number, name in enumerate(names):
            folder = Path(top) / f"side{number}"  # paths of one length: that of the environment shifts the stack
            folder.mkdir()
            _fill(checkout, name, folder)
            if not (folder / "nspec" / "__init__.py").is_file():
                what = revisions[number] or "the working tree"
                raise NotPossible(f"{what} holds no nspec/__init__.py: nothing to measure")
            shutil.rmtree(folder / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
            made.append(Tree(commit(checkout) if name is None else name[:12], folder))
        yield made


def _sources(folder: Path) -> list[Path]:
    found = [folder / "CMakeLists.txt", *sorted((folder / "kernels" / "csrc").rglob("*"))]
    return [path for path in found if path.is_file()]


def sources_digest(folder: Path) -> str:
    """Of everything that the native library is made from, but PyTorch and the compiler; empty where there is nothing."""
    made = hashlib.sha256()
    for path in (files := _sources(folder)):
        made.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return made.hexdigest() if files else ""


def usable(library: Path, folder: Path) -> bool:
    """Whether a library was built after the last change of the sources in that folder. It serves every PyTorch."""
    return library.is_file() and library.stat().st_mtime >= max(path.stat().st_mtime for path in _sources(folder))


def add_library(tree: Tree, others: Sequence[Path] = (ROOT,)) -> str:
    """Puts the native library into a tree, that of one of ``others`` with the same sources or a new build; in words.

    Raises:
        NotPossible: it has to be built and cannot be.
    """
    if not (digest := sources_digest(tree.folder)):
        return "has no native library"
    for other in others:
        if sources_digest(other) == digest and usable(other / LIBRARY, other):
            shutil.copy2(other / LIBRARY, tree.folder / LIBRARY)
            return "native library taken over: the same sources"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = os.environ | {"NSPEC_BUILD_NATIVE": "1"}
    done = subprocess.run(command, cwd=tree.folder, env=env, capture_output=True, text=True)
    if done.returncode or not (tree.folder / LIBRARY).is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
        without = "NSPEC_NATIVE=0 does without it"
        raise NotPossible(f"{tree.name}: the native library was not built ({without}): {lines[-1]}")
    return "native library built"
