"""The examples in docstrings run, and the public names have some."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nspec

ROOT = Path(__file__).resolve().parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
GIVEN = {"torch": torch, "nn": nn, "np": np, "nspec": nspec}  # beside what the module has


def with_examples() -> list[str]:
    """The modules of the package with an example in a docstring; others are not imported."""
    found = []
    for folder, package in ((ROOT / "nspec", "nspec"), (ROOT / "kernels", "nspec.kernels")):
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(".".join([package, *path.relative_to(folder).with_suffix("").parts]))
    return [name.removesuffix(".__init__") for name in found]


@pytest.mark.parametrize("name", with_examples())
def test_examples_give_what_they_say(name: str, recwarn: pytest.WarningsRecorder) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=GIVEN)
    runner, said = doctest.DocTestRunner(optionflags=FLAGS), []
    for test in found:
        runner.run(test, out=said.append)
    assert runner.tries > 0, f"{name} has examples that doctest does not find: of a nested or lazily made object?"
    assert runner.failures == 0, "".join(said)


def public() -> list[tuple[str, object]]:
    """The names of ``import nspec``, of the operators, and of ``nspec.analysis``."""
    found: list[tuple[str, object]] = [(name, getattr(nspec, name)) for name in nspec.__all__ if name[0] != "_"]
    modules = [f"nspec.kernels.{path.parent.name}" for path in sorted((ROOT / "kernels").glob("*/op.py"))]
    for module in map(importlib.import_module, [*modules, "nspec.analysis"]):
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in found if callable(value)]


def test_every_public_name_has_an_example() -> None:
    names = public()
    assert len(names) > 30
    assert not [name for name, value in names if ">>> " not in (inspect.getdoc(value) or "")]


def test_examples_stand_under_their_heading() -> None:
    # Where there is none, the site shows them as a quotation.
    wrong = []
    for path in [*(ROOT / "nspec").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if ">>> " in text and "Example:\n" not in text.partition(">>> ")[0]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not wrong
