"""The pages of the site: their code runs as it stands, and what is public is in the reference."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The module of the pages that are made."""
    spec = importlib.util.spec_from_file_location("docs_made", ROOT / "docs" / "made.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> list[str]:
    """The Python of a page but for what it takes from examples (``{.python}``), which have tests of their own."""
    return [match["code"] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["skip"]]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "page"}
    for number, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), scope)


def test_pages_with_python_are_found() -> None:
    assert {"index", "own-model", "own-trainer"} <= {page.stem for page in PAGES if blocks(page)}


def test_every_public_name_is_in_the_reference(made: ModuleType) -> None:
    pages = "\n".join(text for name, text in made.pages().items() if name.startswith("reference/"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    import nspec

    missing = {f"nspec.{name}" for name in nspec.__all__ if not name.startswith("_")} - shown
    for path in sorted((ROOT / "kernels").glob("*/op.py")):
        module = importlib.import_module(f"nspec.kernels.{path.parent.name}")
        names = [name for name in module.__all__ if callable(getattr(module, name))]
        missing |= {f"{module.__name__}.op.{name}" for name in names} - shown
    for package in made.packages():
        given = importlib.import_module(package) if package != "nspec.kernels" else None
        for name in getattr(given, "__all__", ()):
            value = getattr(given, name)
            if package != "nspec" and (value.__module__, name) not in made.homes():
                missing |= {f"{value.__module__}.{name}"} - shown
    assert not missing


def test_names_of_the_package_are_known_to_who_reads_sources() -> None:
    # mkdocstrings and type checkers see the imports under TYPE_CHECKING, not the table of lazy ones.
    import nspec

    source = ast.parse((ROOT / "nspec" / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name for name in nspec.__all__ if not name.startswith("_")} <= imported


def test_every_option_and_every_command_has_its_place(made: ModuleType) -> None:
    from nspec.cli import app

    options, commands = made.configuration(), made.command_line()
    printed = made.printed("config")
    sections = re.split(r"^(\w+):$", printed, flags=re.MULTILINE)[1:]
    names = [
        f"{section}.{option}"
        for section, text in zip(sections[::2], sections[1::2])
        for option in re.findall(r"^  (\w+):", text, re.MULTILINE)
    ]
    assert len(names) > 50
    assert not [name for name in names if f"\n`{name}`" not in options]
    known = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert "run" in known
    assert not [name for name in known if f"\n## nspec {name}\n" not in commands]
    assert "| `--seeds 1,2,3` |" in commands


def test_the_glossary_has_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [word for line in re.findall(r"^([^:#\n].*)\n:   ", text, re.MULTILINE) for word in line.split(", ")]
    assert len(words) > 30
    assert sorted(set(words)) == sorted(words)
    expected = (
        "task direction source pair sentence group side neuron block mask density IoU stage system method variant"
    )
    assert set(expected.split()) <= set(words)


def test_links_to_other_folders_lead_to_pages_or_are_names(made: ModuleType) -> None:
    page = ROOT / "docs" / "speed.md"
    assert made.linked("see [how](../bench/README.md#noise)", page) == "see [how](measuring.md#noise)"
    assert made.linked("see [cases](../bench/cases.py)", page) == "see `cases`"
    assert made.linked("![x](bench-parts.svg)", page) == "![x](bench-parts.svg)"
    assert made.linked("see [gone](../bench/gone.md)", page) == "see [gone](../bench/gone.md)"  # MkDocs complains
    assert made.linked("[speed](../docs/speed.md)", ROOT / "kernels" / "README.md") == "[speed](speed.md)"


def test_the_version_has_an_entry_and_is_the_one_that_is_cited() -> None:
    import nspec

    assert f"\n## {nspec.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {nspec.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    loaded = re.compile(r'<(?:script|img|link)\b[^>]*(?:src|href)="(https?:)?//[^"]*"')
    for page in pages:
        found = loaded.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.relative_to(tmp_path)}: {found}"
    for name in ("configuration.html", "reference/nspec.html", "reference/kernels.html"):
        assert (tmp_path / name).is_file()
    assert 'id="nspec.specialize"' in (tmp_path / "reference" / "nspec.html").read_text(encoding="utf-8")
