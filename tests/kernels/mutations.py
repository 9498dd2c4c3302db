"""Breaks the operators, one line at a time, and runs the tests that must notice.

    python tests/kernels/mutations.py            all of them (minutes)
    python tests/kernels/mutations.py --list     their names
    python tests/kernels/mutations.py WORD...    those with all these words in their names, "native valid"

Works on a copy of the checkout in a temporary folder, with a native library of its own where CMake and a C++ compiler
are there. First the tests in question must pass on the unchanged copy. The exit status is 1 if a mutation was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutation_table import MUTATIONS, ROOT, Mutation


def copy_of_checkout(target: Path) -> None:
    """Copies what git knows and does not ignore; ``nspec.kernels`` is made importable from ``target``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    # As an installed nspec has them.
    (target / "nspec/kernels").symlink_to(target / "kernels")
    (target / "nspec/configs").symlink_to(target / "configs")


def build(root: Path) -> None:
    """Builds the native library of the copy, later what has changed since.

    Raises:
        subprocess.CalledProcessError: CMake failed; what it printed is shown.
    """
    folder = str(root / "build/native")
    commands = [
        ["cmake", "-S", str(root), "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", folder],
        ["cmake", "--install", folder, "--prefix", str(root / "kernels/common")],
    ]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout)
            done.check_returncode()


def run_tests(root: Path, mutation: Mutation) -> tuple[int, str]:
    """Builds what has changed and runs the tests: exit status of pytest (1: a test failed) and its last line."""
    if mutation.backend == "native":
        build(root)
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NSPEC_BACKEND", None)
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-r", ""]
    command = [sys.executable, "-m", "pytest", *options, *mutation.selection]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1]


def caught(root: Path, mutation: Mutation) -> str | None:
    """None if the tests notice the mutation, else what happened."""
    path = root / mutation.path
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"{mutation.path} holds {mutation.old!r} {text.count(mutation.old)} times, expected once"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        status, last = run_tests(root, mutation)
    finally:
        path.write_text(text)
    return None if status == 1 else f"pytest {' '.join(mutation.selection)!r} ended with {status}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutations with all these words in their names")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(word in m.name for word in options.words)]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    if not chosen:
        parser.error(f"no mutation has {options.words} in its name")
    with tempfile.TemporaryDirectory(prefix="nspec-mutations-") as folder:
        root = Path(folder)
        copy_of_checkout(root)
        passing: dict[tuple[str, ...], tuple[int, str]] = {}
        missed = 0
        for mutation in chosen:
            if mutation.selection not in passing:
                passing[mutation.selection] = run_tests(root, mutation)
            status, last = passing[mutation.selection]
            reason = f"without the mutation: {last}" if status or "passed" not in last else caught(root, mutation)
            print(
                f"{'caught' if reason is None else 'MISSED':7}{mutation.name}{'' if reason is None else '; ' + reason}",
                flush=True,
            )
            missed += reason is not None
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
