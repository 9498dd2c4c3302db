"""What importing the package costs, and which part may import which."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From the bottom: a module imports from its own layer and from those above it in this list, never from those below.
LAYERS = [
    ["nspec.kernels"],
    ["nspec.files", "nspec.options", "nspec.processes", "nspec.terminal", "nspec.yaml_text"],
    ["nspec.nn"],
    ["nspec.specialization", "nspec"],  # `import nspec` gives the names of these layers
    ["nspec.tuning"],
    ["nspec.serving"],
    ["nspec.integrations"],
    ["nspec.baselines"],  # on any nn.Module, like specialisation; training and translating them is in nspec.mt
    ["nspec.mt"],  # translation itself; knows no run
    ["nspec.lm"],  # language models and text of single languages; knows no run
    ["nspec.serving.export"],  # writes tokenizers and READMEs of translation
    ["nspec.analysis", "nspec.report", "nspec.run"],  # a run, and its page
    ["nspec.cli", "nspec.cli_tools", "nspec.env"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def level_of(module: str) -> int | None:
    """The layer of a module: that of its longest listed parent. ``nspec`` stands for itself alone."""
    name = module
    while name not in LEVEL or (name == "nspec" and module != "nspec"):
        name = name.rpartition(".")[0]
        if not name:
            return None
    return LEVEL[name]


def sources() -> Iterator[tuple[str, Path]]:
    """Module names, as installed, and files of the package."""
    for folder, package in ((ROOT / "nspec", "nspec"), (ROOT / "kernels", "nspec.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]), path


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            yield node.lineno, base
            if base == "nspec" or level_of(base) is not None:
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(module: str, path: Path) -> list[str]:
    """Imports of a file that point up, or to a part without a layer."""
    own = module.removesuffix(".__init__")
    level = level_of(own)
    if level is None:
        return [f"{own} has no layer: give it one in LAYERS"]
    found = []
    for line, name in imports(path, module):
        if name == "nspec" or name.startswith("nspec."):
            target = level_of(name)
            # `from nspec import task` names an attribute of the package, not a module of its own.
            target = LEVEL["nspec"] if target is None else target
            if target > level:
                found.append(f"{own}:{line} imports {name}, which is above it")
    return found


def test_imports_only_point_down() -> None:
    # The package's own __init__ gives names of the upper layers to type checkers.
    found = [v for module, path in sources() if module != "nspec.__init__" for v in violations(module, path)]
    assert not found, "\n".join(found)


def test_the_layer_check_sees_an_upward_import(tmp_path: Path) -> None:
    path = tmp_path / "active.py"
    path.write_text("def f():\n    from ..specialization import masks\n")
    assert violations("nspec.nn.active", path)
    path.write_text("from nspec.specialization.masks import NeuronMasks\n")
    assert violations("nspec.nn.active", path)
    path.write_text("import nspec\n")
    assert violations("nspec.nn.active", path)
    path.write_text("from ..kernels.compact_ffn import compact_ffn\nfrom . import ffn\nimport torch\n")
    assert not violations("nspec.nn.active", path)


def circle(files: Iterable[tuple[str, Path]]) -> list[str]:
    """The modules of an import circle, those of type checkers and of functions counted; empty where there is none."""
    known = {module.removesuffix(".__init__"): path for module, path in files}
    own = {path: module for module, path in files}
    graph = {
        module: {name for _, name in imports(path, own[path]) if name in known and name not in (module, "nspec")}
        for module, path in known.items()
        if module != "nspec"  # gives names of the upper layers to type checkers
    }
    for names in graph.values():  # `from package import module` names the module, not what the package gives
        names -= {name.rpartition(".")[0] for name in names}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle(list(sources()))


def test_the_circle_check_sees_one_of_type_checkers(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("if TYPE_CHECKING:\n    from nspec.second import name\n")
    second.write_text("def f():\n    from nspec import first\n")
    files = [("nspec.first", first), ("nspec.second", second)]
    assert set(circle(files)) == {"nspec.first", "nspec.second"}
    second.write_text("import torch\n")
    assert not circle(files)


def test_kernels_is_never_imported_by_its_bare_name() -> None:
    # Under two names an operator would register twice, and `kernels` is another distribution's import name.
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("nspec", "kernels", "tests", "bench", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "kernels" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kernels")
    ]
    assert not found, f"import nspec.kernels instead: {found}"


def test_the_kernels_folder_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str) -> str:
    """What a fresh interpreter in the checkout prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_nspec_loads_torch_and_nothing_heavier() -> None:
    code = """
import sys, torch
before = {name.split(".")[0] for name in sys.modules}
import nspec
nspec.MaskedLinear, nspec.RowSparseAdamW, nspec.NeuronMasks, nspec.profile, nspec.specialize
after = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(after - before))
print(torch.cuda.is_initialized())
"""
    new, cuda = run(code).split("\n")
    assert set(new.split()) <= {"nspec", "safetensors"}, new
    assert cuda == "False"


def test_the_public_names_need_the_core_requirements_only() -> None:
    # None in sys.modules: importing it raises ImportError, as where it is not installed.
    code = """
import sys
others = "triton transformers accelerate datasets sentencepiece sacrebleu babel qq matplotlib scipy tensorboard"
sys.modules.update(dict.fromkeys([*others.split(), "typer", "rich", "yaml"]))
import nspec, nspec.kernels.compact_ffn, nspec.kernels.linear_relu_count
for name in nspec.__all__:
    getattr(nspec, name)
"""
    run(code)


def test_a_class_name_stands_for_one_thing() -> None:
    files: dict[str, list[str]] = {}
    for module, path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(module)
            elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
                files.setdefault(ast.unparse(node.targets[0]), []).append(module)
    assert {"Side", "Role", "Method"} <= set(files)
    assert {name: where for name, where in files.items() if len(where) > 1} == {}
