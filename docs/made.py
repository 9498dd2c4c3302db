"""The pages of the site that are made from something else: options, commands, the reference, and texts of other folders.

Hooks of MkDocs, named in ``mkdocs.yml``. None of these pages is kept in the repository, so none can be out of date.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "docs-tree"
"""A copy of the package as it is when installed, ``kernels/`` at ``nspec/kernels``, which mkdocstrings reads."""

OTHERS = {
    "kernels.md": "kernels/README.md",
    "measuring.md": "bench/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files of other folders, which are read there too."""

FIGURES = {"speed.md", "results.md"}
"""Pages of tables of figures."""

CHAIN = {"mt", "run", "report"}
"""Packages of the translation chain, whose interface is the command line and the configuration."""

CHOSEN = {
    "nspec.nn": {"activations": ["Activations"], "batch": ["TaskBatch"], "switched": ["TaskSwitched"]},
    "nspec.serving": {"card": ["densities", "model_card", "widths"]},
    "nspec.specialization": {
        "feed_forward": ["FeedForward"],
        "layers": ["find_blocks"],
        "patterns": ["matching"],
        "tasks": ["task_by_layer"],
        "tensors": ["TaskTensors"],
    },
}
"""What others use of packages that are made of many small parts; of the others every public name is shown."""

INTRODUCTIONS = {
    "nspec": "What `import nspec` gives. A **task** is the unit that has neurons of its own: a translation direction such "
    "as `en-de`, a language, a class of images. `layer` keys are qualified names of modules.",
    "nspec.nn": "For whoever writes a layer that computes something else for each task, or reads activations in mode "
    "`forward`. `MaskedLinear` and `RowSparseAdamW` are among [the names of the package](nspec.md).",
    "nspec.specialization": "What lies behind [the names of the package](nspec.md): finding blocks and naming layers.",
    "nspec.kernels": "Operators on plain tensors. Every one has the same meaning on every backend; the mathematics and "
    "the layouts are in [The operators](../kernels.md).",
    "nspec.serving": "What a model for serving one task is; [`nspec.merge`][nspec.merge] makes it.",
    "nspec.tuning": "Fine-tuning a few neurons of a frozen model; the names that are used are those of "
    "[the package](nspec.md).",
    "nspec.baselines": "The methods that neuron specialisation is compared with, for any `nn.Module`.",
    "nspec.analysis": "What masks say about languages: density, overlap, and tests against distances of languages.",
    "nspec.integrations": "In the training loops of other libraries; the names that are used are those of "
    "[the package](nspec.md).",
}


# What is public


def packages() -> list[str]:
    """The packages whose Python interface is documented, the whole first."""
    folders = sorted(path.parent.name for path in (ROOT / "nspec").glob("*/__init__.py"))
    return ["nspec", *(f"nspec.{name}" for name in [*folders, "kernels"] if name not in CHAIN)]


def folder_of(package: str) -> Path:
    """Where the modules of a package lie."""
    inner = package.split(".")[1:]
    return ROOT / "kernels" if inner == ["kernels"] else ROOT.joinpath("nspec", *inner)


def top_names() -> list[str]:
    """The names of ``import nspec``, in the order in which they are listed there."""
    return [name for name in importlib.import_module("nspec").__all__ if not name.startswith("_")]


def homes() -> set[tuple[str, str]]:
    """(module, name) of everything that the package gives by a shorter name."""
    import nspec

    return {(getattr(nspec, name).__module__, name) for name in top_names()}


def modules(package: str) -> Iterator[tuple[str, list[str]]]:
    """Modules of a package, each with its public classes and functions; names that ``nspec`` gives are left out."""
    if package in CHOSEN:
        yield from ((f"{package}.{module}", names) for module, names in CHOSEN[package].items())
        return
    known = homes()
    folder = folder_of(package)
    for path in sorted(folder.rglob("*.py")):
        module = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        names = [name for name in defined(path) if (module, name) not in known]
        if names:
            yield module, names


def defined(path: Path) -> list[str]:
    """Public classes and functions of a file that have a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in body if isinstance(node, kinds) and ast.get_docstring(node)]
    return [node.name for node in found if not node.name.startswith("_")]


def operators() -> list[str]:
    """The modules with an operator in each."""
    return [f"nspec.kernels.{path.parent.name}" for path in sorted((ROOT / "kernels").glob("*/op.py"))]


def documented(package: str) -> list[tuple[str, list[str]]]:
    """The sections of a package's page: a module and its names; for the package's own, the package."""
    if package == "nspec":
        return [(package, top_names())]
    if package == "nspec.kernels":
        return [(name, callables(name)) for name in operators()]
    return list(modules(package))


def callables(module: str) -> list[str]:
    """Functions and classes among a module's ``__all__``."""
    given = importlib.import_module(module)
    return [name for name in given.__all__ if callable(getattr(given, name))]


# The pages


def reference(package: str) -> str:
    """The page of a package: a block of mkdocstrings for each public name."""
    short = package if package == "nspec" else package.removeprefix("nspec.")
    doc = ast.get_docstring(ast.parse(_init(package))) or ""
    lines = [f"# {package}", "", INTRODUCTIONS.get(package, doc), ""]
    for module, names in documented(package):
        if package in ("nspec", "nspec.kernels"):
            home = module if package == "nspec" else f"{module}.op"
            for name in names:
                lines += [f"::: {home}.{name}", "    options:", "      heading_level: 2", ""]
            continue
        lines += [f"## {module.removeprefix(package + '.')}", "", f"`{module}`", ""]
        for name in names:
            lines += [f"::: {module}.{name}", "    options:", "      heading_level: 3", ""]
    assert short
    return "\n".join(lines)


def _init(package: str) -> str:
    path = folder_of(package) / "__init__.py"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def printed(*arguments: str) -> str:
    """What the command line prints."""
    from nspec.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(list(arguments))
    if status:
        raise RuntimeError(f"nspec {' '.join(arguments)} gave {status}")
    return out.getvalue()


def configuration() -> str:
    """Every option, as ``nspec config`` explains it: a section of the page for each section of the file."""
    lines = [
        "# Configuration",
        "",
        "A run is described by a YAML file of sections and options; what a file does not give has its default. "
        "`nspec config` prints them all, `nspec config NAME` those of a configuration that comes with nspec, and "
        "`--set section.option=value` changes one. `--set` takes the value of a text option letter for letter, that of "
        "others as YAML. `~` at the start of a path is the home folder.",
        "",
    ]
    section, meaning = "", []
    for line in printed("config").splitlines():
        if comment := re.match(r"( *)# (.*)", line):
            meaning.append(comment[2])
        elif found := re.match(r"(\w+):$", line):
            section = found[1]
            lines += [f"## {section}", "", f"{' '.join(meaning).capitalize()}.", ""]
            meaning = []
        elif found := re.match(r"  (\w+):(.*)", line):
            text, _, default = " ".join(meaning).rpartition("; default: ")
            lines += [f"`{section}.{found[1]}`{{ #{section}.{found[1]} }} = `{default.strip() or 'none'}`", ""]
            lines += [f":   {_escaped(text)}", ""]
            meaning = []
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*_<>{}|`~])", r"\\\1", text)


def command_line() -> str:
    """Every command with its arguments and options, as their functions declare them."""
    from nspec.cli import app

    lines = [
        "# Command line",
        "",
        f"{inspect.getdoc(app.registered_callback.callback)} `nspec COMMAND --help` shows the same on the terminal. Every "
        "command takes `--debug`, which shows the traceback of an error. The exit status is 2 after an error that the user "
        "can mend, which is one line on standard error, 130 after Ctrl-C and 143 after SIGTERM.",
        "",
    ]
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    for command in (command for group in groups for command in group.registered_commands):
        name, shown = command.name or command.callback.__name__, list(parameters(command.callback))
        summary, _, rest = (command.help or inspect.getdoc(command.callback) or "").partition("\n\n")
        usage = [written for written, argument, _ in shown if argument]
        lines += [f"## nspec {name}", "", summary, "", *([" ".join(rest.split()), ""] if rest else [])]
        lines += ["```text", " ".join(["nspec", name, *usage, "[OPTIONS]"]), "```", ""]
        lines += ["| argument or option | meaning |", "|---|---|"] if shown else []
        lines += [f"| `{written}` | {_escaped(' '.join(told.split()))} |" for written, _, told in shown]
        lines.append("")
    return "\n".join(lines)


def parameters(function: Any) -> Iterator[tuple[str, bool, str]]:
    """How each parameter of a command is written, whether it is an argument, and its help; without ``--debug``."""
    from typer.models import ArgumentInfo

    hints = get_type_hints(function, include_extras=True)
    for name in inspect.signature(function).parameters:
        kind, info = get_args(hints[name])
        if name == "debug":
            continue
        if isinstance(info, ArgumentInfo):
            yield str(info.metavar or name.upper()), True, info.help or ""
            continue
        option = next(iter(info.param_decls or ()), f"--{name.strip('_').replace('_', '-')}")
        kinds = [each for each in (get_args(kind) or (kind,)) if each is not type(None)]
        value = info.metavar or {bool: "", int: "N", float: "X"}.get(kinds[0], "TEXT")
        yield f"{option} {value}".strip(), False, info.help or ""


def from_elsewhere(source: str) -> str:
    """A Markdown file of another folder as a page."""
    return linked((ROOT / source).read_text(encoding="utf-8"), ROOT / source)


def linked(text: str, path: Path) -> str:
    """The text of the file ``path``, whose links to other folders lead to the pages made of them, or are names of files."""
    pages = {(ROOT / other).resolve(): ROOT / "docs" / page for page, other in OTHERS.items()}
    pages[(ROOT / "README.md").resolve()] = ROOT / "docs" / "index.md"

    def link(found: re.Match[str]) -> str:
        mark, shown, target = found.groups()
        name, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")) or not name:
            return found[0]
        there = (path.parent / name).resolve()
        there = pages.get(there, there)
        if not there.is_relative_to(ROOT / "docs"):
            return f"`{shown.strip('`')}`" if there.exists() else found[0]
        at = path.parent if path.is_relative_to(ROOT / "docs") else ROOT / "docs"
        return f"{mark}[{shown}]({Path(os.path.relpath(there, at)).as_posix()}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def pages() -> Mapping[str, str]:
    """Every page that is made: its path within the site's sources, and its text."""
    made = {page: from_elsewhere(source) for page, source in OTHERS.items()}
    made |= {"configuration.md": configuration(), "command-line.md": command_line()}
    return made | {f"reference/{package.rpartition('.')[2]}.md": reference(package) for package in packages()}


def for_mkdocstrings(source: str) -> str:
    """Docstrings as mkdocstrings takes them: examples under its own heading, and names without the roles of Sphinx."""
    source = re.sub(r"^( +)Example:$", r"\1Examples:", source, flags=re.MULTILINE)
    return re.sub(r":(?:func|class|mod|meth|data|attr|ref|exc):`~?([^`]+)`", r"`\1`", source)


# Hooks of MkDocs


def on_startup(**_: Any) -> None:
    """Writes the sources that mkdocstrings reads, before it looks for them."""
    shutil.rmtree(TREE, ignore_errors=True)
    for folder, package in ((ROOT / "nspec", TREE / "nspec"), (ROOT / "kernels", TREE / "nspec" / "kernels")):
        for path in folder.rglob("*.py"):
            to = package / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(for_mkdocstrings(path.read_text(encoding="utf-8")), encoding="utf-8")
    (TREE / "nspec" / "kernels" / "__init__.py").touch()  # it has none, but who reads sources looks for packages


def on_config(config: Any) -> Any:
    """Puts the packages into the navigation."""
    for part in config.nav:
        if "Reference" in part:
            part["Reference"] = [{name: f"reference/{name.rpartition('.')[2]}.md"} for name in packages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from pages to files of other folders, which work where the repository is read, lead to pages here."""
    source = page.file.src_uri
    text = markdown if source in OTHERS else linked(markdown, ROOT / "docs" / source)
    return re.sub(
        r"^((?:Measured on .*)?Written by `python -m bench\..*)$", r"\1\n{ .provenance }", text, flags=re.MULTILINE
    )


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tables of figures keep each cell on a line, and scroll."""
    return f'<div class="figures">{html}</div>' if page.file.src_uri in FIGURES else html
