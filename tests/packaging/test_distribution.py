"""The sdist and the wheels: what is in them, and that they work away from the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist", "runs", "*.egg-info")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="building needs setuptools, which is not installed"
)


def build(kind: str, source: Path, out: Path, **environment: str) -> tuple[Path | None, str]:
    """Runs the build backend's hook as pip does without isolation: what was built (None: it failed) and the output."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    command = [sys.executable, "-c", code]
    env = os.environ | environment
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=300)
    built = None if done.returncode else next(out.glob("nspec-*"))
    return built, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "nspec", ignore=NOT_COPIED))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, output = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    assert path is not None, output
    return path


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pure wheel, built from the sdist: what the sdist lacks, it lacks too."""
    path, output = build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), NSPEC_BUILD_NATIVE="0")
    assert path is not None, output
    assert "without its native library: NSPEC_BUILD_NATIVE=0" in output
    return path


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_sdist_holds_what_a_build_and_a_test_need(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "Makefile"}
    for folder in ("nspec", "kernels", "configs", "tests", "bench"):
        needed |= {p.relative_to(tree).as_posix() for p in (tree / folder).rglob("*") if p.is_file()}
    assert needed <= found, f"MANIFEST.in leaves out {sorted(needed - found)}"
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, tree: Path) -> None:
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert not [name for name in found if not name.startswith("nspec/")]  # bench and tests are of the checkout only
    expected = {p.relative_to(tree).as_posix() for p in (tree / "nspec").rglob("*") if p.is_file()}
    expected |= {"nspec/" + p.relative_to(tree).as_posix() for p in (tree / "kernels").rglob("*.py")}
    expected |= {"nspec/configs/" + p.name for p in (tree / "configs").glob("*.yaml")}
    assert found == expected


def test_the_wheel_without_native_library_is_for_every_platform(wheel: Path) -> None:
    assert wheel.name == "nspec-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert b"Root-Is-Purelib: true" in archive.read("nspec-0.1.0.dist-info/WHEEL")


def test_the_version_is_the_package_s_own(wheel: Path) -> None:
    import nspec

    assert wheel.name.split("-")[1] == nspec.__version__


def install(wheel: Path, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def run_installed(folder: Path, code: str) -> str:
    """What an interpreter far from the checkout prints, with the installed package alone."""
    env = os.environ | {"PYTHONPATH": str(folder), "NSPEC_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the pure wheel is installed in."""
    folder = tmp_path_factory.mktemp("site")
    install(wheel, folder)
    return folder


def test_the_installed_wheel_works_without_the_checkout(site: Path) -> None:
    assert (site / "bin" / "nspec").is_file()
    code = """
import nspec, torch
import nspec.kernels.compact_ffn.op as op
from nspec.kernels.common import native
print(nspec.__file__, op.__file__, sep="\\n")
print(nspec.MaskedLinear(3, 4)(torch.ones(2, 3)).shape)
print(native.why_not())
"""
    package, operator, shape, reason = run_installed(site, code).split("\n")
    assert Path(package) == site / "nspec" / "__init__.py"
    assert Path(operator) == site / "nspec" / "kernels" / "compact_ffn" / "op.py"
    assert shape == "torch.Size([2, 4])"
    assert "the native library is not there" in reason


def test_an_installed_package_finds_its_configurations_by_name(site: Path) -> None:
    pytest.importorskip("yaml")
    code = "from nspec.run.yaml import find_config; print(find_config('cldr8'))"
    assert Path(run_installed(site, code)) == site / "nspec" / "configs" / "cldr8.yaml"


native_build = pytest.mark.skipif(
    shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs CMake and a C++ compiler",
)


@native_build
def test_the_native_wheel_is_for_every_python_and_its_operator_runs(unpacked: Path, tmp_path: Path) -> None:
    path, output = build("wheel", unpacked, tmp_path / "wheel", NSPEC_BUILD_NATIVE="1")
    assert path is not None, output
    assert path.name.startswith("nspec-0.1.0-py3-none-")
    assert not path.name.endswith("-any.whl")
    assert "nspec/kernels/common/libnspec_cpu.so" in names(path)
    install(path, tmp_path / "site")
    code = """
import torch
from nspec.kernels.common import native
from nspec.kernels.row_sparse_adamw.native import row_sparse_adamw_
tensors = [[torch.ones(2, 3)] for _ in range(4)]
row_sparse_adamw_(*tensors, [torch.tensor([True, False])], step=1, lr=0.5, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
print((tensors[0][0] < 1).tolist(), native.why_not(), native.LIBRARY)
"""
    library = tmp_path / "site/nspec/kernels/common/libnspec_cpu.so"
    assert run_installed(tmp_path / "site", code) == f"[[True, True, True], [False, False, False]] None {library}"
    assert str(unpacked).encode() not in library.read_bytes()  # no path of the machine that built it


@native_build
@pytest.mark.parametrize("wanted", ["", "1"])
def test_a_native_build_that_fails_is_a_warning_unless_it_was_asked_for(
    unpacked: Path, tmp_path: Path, wanted: str
) -> None:
    source = Path(shutil.copytree(unpacked, tmp_path / "source"))
    with open(source / "kernels/csrc/library.cpp", "a") as file:
        file.write("#error not today\n")
    path, output = build("wheel", source, tmp_path / "wheel", NSPEC_BUILD_NATIVE=wanted)
    assert "not today" in output
    if wanted:
        assert path is None
        assert "error: the native library was not built" in output
    else:
        assert path is not None, output
        assert path.name == "nspec-0.1.0-py3-none-any.whl"
        assert "warning: nspec is installed without its native library" in output
