"""The table of mutations keeps up with the code; ``python tests/kernels/mutations.py`` runs them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from nspec.kernels.common.backend import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS: list[Any] = runpy.run_path(str(Path(__file__).with_name("mutation_table.py")))["MUTATIONS"]


def test_every_mutation_still_has_its_place() -> None:
    for mutation in MUTATIONS:
        found = (ROOT / mutation.path).read_text().count(mutation.old)
        assert found == 1, f"{mutation.name}: {mutation.path} holds {mutation.old!r} {found} times, expected once"
        assert mutation.new != mutation.old


def test_every_mutation_has_tests_and_a_name_of_its_own() -> None:
    assert len({m.name + m.file for m in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        files = [ROOT / name for name in mutation.selection if name.endswith(".py")]
        text = "".join(file.read_text() for file in files)
        names = [line for line in text.splitlines() if line.startswith("def test_")]
        for word in mutation.tests.split():
            assert any(word in name for name in names), f"{mutation.name}: no test has {word!r} in its name"


def test_every_backend_of_every_operator_is_broken_somewhere() -> None:
    broken = {(m.operator, m.backend) for m in MUTATIONS}
    for operator in OPERATORS:
        for backend in ("reference", "native", "triton"):
            if (ROOT / "kernels" / operator / f"{backend}.py").exists():
                assert (operator, backend) in broken
