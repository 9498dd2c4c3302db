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


def has_example(value: object) -> bool:
    return ">>> " in (inspect.getdoc(value) or "")


def test_every_public_name_has_an_example() -> None:
    analysis = importlib.import_module("nspec.analysis")
    public = [(name, getattr(nspec, name)) for name in nspec.__all__ if not name.startswith("_")]
    public += [(name, getattr(analysis, name)) for name in analysis.__all__]
    assert len(public) > 20
    missing = [name for name, value in public if callable(value) and not has_example(value)]
    for path in sorted((ROOT / "kernels").glob("*/op.py")):
        operator = importlib.import_module(f"nspec.kernels.{path.parent.name}")
        missing += [] if any(has_example(getattr(operator, name)) for name in operator.__all__) else [operator.__name__]
    assert not missing, "write an `Example:` into the docstrings of these"


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
