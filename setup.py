"""Packages, requirements, and the native library where it can be built.

``pip install .`` gives a pure-Python package: an isolated build has no torch. With ``--no-build-isolation``, in an
environment with torch >= 2.10, CMake and a C++ compiler, the operators of ``kernels/csrc`` are built as well.
``NSPEC_BUILD_NATIVE=0`` never builds them; ``NSPEC_BUILD_NATIVE=1`` makes it an error when they cannot be built.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
LIBRARY = "nspec.kernels.common.libnspec_cpu"  # where nspec.kernels.common.native looks for it

CORE = [
    "torch>=2.11",
    'triton>=3.6; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")',
    "safetensors>=0.4.3",
    "numpy>=1.26",
]
# It has no source distribution; where it has no wheel, transformers searches for translations.
CTRANSLATE2 = (
    'ctranslate2>=4.8; (platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")) or '
    'platform_system == "Darwin" or (platform_system == "Windows" and platform_machine == "AMD64")'
)
EXTRAS = {
    "mt": [
        "transformers>=5.17",
        "accelerate>=1.15",
        "datasets>=3.0",
        "sentencepiece>=0.2",
        CTRANSLATE2,
        "sacrebleu>=2.4",
        "Babel>=2.14",
        "qwanqwa>=1.2",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "typer>=0.12",
        "rich>=13.8",
        "PyYAML>=6.0",
        "jinja2>=3.1",
    ],
    "tuning": ["peft>=0.18"],  # LoRA beside neurons in `nspec finetune`; the rest is in mt
    "typology": ["lang2vec>=1.1.2"],
    "test": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "trl>=1.0",  # its SFTTrainer is one of those that the mixin is for
    ],
    "bench": ["pytest-benchmark>=4.0", "peft>=0.18"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0"],
}


class NotBuilt(Exception):
    """The native library cannot be built here; the message is the reason."""


def torch_for_build() -> tuple[str, str]:
    """Folder and version of the torch to build against. It is not imported: that takes seconds and may touch a GPU."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise NotBuilt("torch is not in the build environment (pip's --no-build-isolation uses the one installed)")
    version = importlib.metadata.version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 10):
        raise NotBuilt(f"torch {version} is older than 2.10, which brought the stable ABI")
    return spec.submodule_search_locations[0], version


def run(*command: str) -> None:
    """Runs a build command and shows its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        at = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
        # CMake says where on one line, and what on the next.
        raise NotBuilt(f"`{' '.join(command[:2])} ...` failed: {' '.join(lines[at : at + 2])}")


class BuildNative(build_ext):
    """Runs CMakeLists.txt. A library that cannot be built is a warning, and the package is pure Python then."""

    def run(self) -> None:
        wanted = os.environ.get("NSPEC_BUILD_NATIVE", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"NSPEC_BUILD_NATIVE must be 0, 1 or unset, found {wanted!r}")
        try:
            if wanted == "0":
                raise NotBuilt("NSPEC_BUILD_NATIVE=0")
            super().run()
        except NotBuilt as reason:
            if wanted == "1":
                raise SystemExit(f"error: the native library was not built: {reason}") from None
            print(f"warning: nspec is installed without its native library: {reason}", file=sys.stderr, flush=True)
            self.extensions = []
            self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        if sys.platform not in ("linux", "darwin"):
            raise NotBuilt(f"it is built on Linux and macOS, this is {sys.platform}")
        folder, version = torch_for_build()
        # pip may be called by its path in a virtual environment that is not on PATH.
        cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
        if cmake is None:
            raise NotBuilt("there is no cmake")
        build = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(build, ignore_errors=True)  # CMake refuses the cache of a tree that was moved or copied
        settings = [f"-DNSPEC_TORCH_DIR={folder}", f"-DNSPEC_TORCH_VERSION={version}", "-DCMAKE_BUILD_TYPE=Release"]
        run(cmake, "-S", str(HERE), "-B", str(build), *settings)
        run(cmake, "--build", str(build))
        run(cmake, "--install", str(build), "--prefix", str(Path(self.get_ext_fullpath(ext.name)).resolve().parent))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in the name: it does not link Python


class Wheel(bdist_wheel):
    """``py3-none-any``, or ``py3-none-<platform>`` with the native library, which every Python can load."""

    # Asked during the build, when it is known whether the library is there; what the base class would set is too early.
    root_is_pure = property(lambda self: not self.distribution.has_ext_modules(), lambda self, value: None)

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    name="nspec",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "nspec/__init__.py").read_text(), re.MULTILINE)[1],
    description="Neuron specialisation for PyTorch: task-specific sparse updates of Transformers, with their kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # kernels/ has no __init__.py of its own: the import name `kernels` belongs to another distribution.
    package_dir={"nspec": "nspec", "nspec.kernels": "kernels", "nspec.configs": "configs"},
    packages=[
        *find_packages(include=["nspec", "nspec.*"]),
        "nspec.kernels",
        *("nspec.kernels." + name for name in find_packages("kernels")),
        "nspec.configs",
    ],
    package_data={"nspec": ["py.typed"], "nspec.report": ["templates/*"], "nspec.configs": ["*.yaml"]},
    include_package_data=False,
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nspec = nspec.cli:main"]},
)
