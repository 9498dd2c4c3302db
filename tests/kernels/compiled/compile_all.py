"""Compiles every Triton kernel that the operators launch (``record.py``), for every target, on a machine without a GPU.

    python tests/kernels/compiled/compile_all.py            prints the figures, one kernel per line, as JSON
    python tests/kernels/compiled/compile_all.py --update   writes them to snapshots/triton-VERSION.json
    python tests/kernels/compiled/compile_all.py --only 'cuda:90/linear'   those whose name contains this
    python tests/kernels/compiled/compile_all.py --covered  with those that only the targets in EVERY compile

``test_compiled.py`` holds the figures to rules and to the snapshot of the Triton version at hand. After a change of a
kernel that is meant, run ``--update`` and look at the difference. The work is done in processes of their own: a failed
assertion in the compiler ends the process, and is noted as the error of the kernel that it was at.

Every kernel is compiled for every target, every product with all its block sizes. Kernels that another one covers (no
bias, one task where several go the same way, float16 beside bfloat16) are compiled for EVERY alone; with
``NSPEC_COMPILE_COVERED=1`` the rules of ``test_compiled.py`` are checked for them on the other targets too.

Figures are kept by what they depend on (the code of a kernel and of what it calls, its arguments, the target, Triton's
version, and this tool), its ``code``: in ``build/compiled.json``, and in the snapshot. What has a code that the snapshot
knows is taken from there, but for one kernel of each function and target, which are compiled wherever they have not been;
``--update`` and ``--covered`` take nothing from it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
KNOWN = FOLDER.parents[2] / "build" / "compiled.json"
TARGETS = ("cuda:80", "cuda:86", "cuda:90", "cuda:100", "hip:gfx942")
#: One of NVIDIA's and AMD's, for which the kernels that others cover are compiled as well.
EVERY = ("cuda:90", "hip:gfx942")
#: 8.6 has the instructions of 8.0: what has no product and the same block sizes compiles to the same there.
LIKE = {"cuda:86": "cuda:80"}


SETTINGS = ("TRITON_", "AMDGCN_", "PTXAS_", "DISABLE_PTXAS_", "NVPTX_", "LLVM_", "USE_IR_LOC")


def chosen(target: str, covered: bool) -> list[Any]:
    """The kernels of a target that are compiled; ``covered``: all of them."""
    from record import recorded

    kernels = recorded(target)
    if covered:
        return kernels
    if target not in EVERY:
        kernels = [one for one in kernels if not any(other.covers(one) for other in kernels)]
    like = {one.name: one for one in recorded(LIKE[target])} if target in LIKE else {}
    return [one for one in kernels if one.expect or one != like.get(one.name)]


def _source(kernel: Any) -> Any:
    from triton.compiler import ASTSource

    names = kernel.kernel.arg_names
    signature = {name: "constexpr" if name in kernel.constants else kernel.signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.divisible}
    return ASTSource(fn=kernel.kernel, signature=signature, constexprs=kernel.constants, attrs=aligned)


def _code(kernel: Any, target: str) -> str:
    """A digest of everything that the figures of a kernel depend on."""
    import triton

    tool = [inspect.getsource(_source), inspect.getsource(_compile), (FOLDER / "machine_code.py").read_text("utf-8")]
    parts = [triton.__version__, target, _source(kernel).hash(), kernel.name, kernel.options, kernel.expect, *tool]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(kernel: Any, target: str) -> dict[str, Any]:
    """The figures of one kernel.

    Raises:
        RuntimeError: it does not compile.
    """
    import machine_code
    import triton
    from triton.backends.compiler import GPUTarget

    kind, arch = target.split(":")
    source = _source(kernel)
    gpu = GPUTarget("hip", arch, 64) if kind == "hip" else GPUTarget("cuda", int(arch), 32)
    compiled = triton.compile(source, target=gpu, options=kernel.options)
    found: dict[str, Any] = {"shared": compiled.metadata.shared, "expect": sorted(kernel.expect)}
    if kind == "hip":
        text = compiled.asm["amdgcn"]
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
            found[key] = int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        return {**found, **machine_code.figures(kind, text)}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    found.update(zip(("registers", "stack", "local"), map(int, numbers.groups())))  # type: ignore[union-attr]
    found["fused"] = len(re.findall(r"\bfma\.", compiled.asm["ptx"]))
    return {**found, **machine_code.figures(kind, text)}


def _known(kept: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures by code: what was compiled here, and with ``kept`` what the snapshot has (these without their codes)."""
    import triton

    here = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    path = snapshot(triton.__version__)
    if not kept or not path.exists():
        return here, {}
    figures = [found for kernels in json.loads(path.read_text()).values() for found in kernels.values()]
    return here, {found.pop("code"): found for found in figures if "code" in found}


def _work(share: int, workers: int, only: str, covered: bool, kept: bool, done: set[str]) -> None:
    """In a process of its own: one line of JSON before and one after each kernel of its share."""
    kernels = [(target, f"{target}/{one.name}", one) for target in TARGETS for one in chosen(target, covered)]
    wanted = [entry for entry in kernels if only in entry[1]]
    here, there = _known(kept)
    probes = {(target, one.function): name for target, name, one in reversed(kernels)}
    # Those that take long are shared out evenly.
    order = sorted(wanted, key=lambda entry: entry[1] not in probes.values())
    for target, name, kernel in order[share::workers]:
        if name in done:
            continue
        code = _code(kernel, target)
        known = here.get(code) or (there.get(code) if name not in probes.values() else None)
        if known is None:
            print(json.dumps([name, None]), flush=True)
        try:
            result = known or {**_compile(kernel, target), "code": code}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps([name, result]), flush=True)


def _share(share: int, workers: int, only: str, covered: bool, kept: bool, cache: str) -> dict[str, Any]:
    """Figures of every ``workers``-th kernel by target and name, from as many processes as it takes."""
    # Settings of Triton that change what is compiled: its interpreter, other tools, an old cache, options of assemblers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    environment["TRITON_CACHE_DIR"] = cache
    found: dict[str, Any] = {}
    while True:
        command = [sys.executable, __file__, "--worker", str(share), str(workers), "--only", only]
        command += ["--done", json.dumps(list(found))]
        command += [flag for flag, given in (("--covered", covered), ("--kept", kept)) if given]
        worker = subprocess.run(command, env=environment, capture_output=True, text=True)
        started = None
        for line in worker.stdout.splitlines():
            if line.startswith('["'):
                name, result = json.loads(line)
                started = None if result else name
                if result:
                    found[name] = result
        if worker.returncode == 0:
            return found
        tail = worker.stderr.strip().splitlines()[-1:]
        if started is None:
            raise RuntimeError(f"worker {share} ended with {worker.returncode}: {worker.stderr[-2000:]}")
        found[started] = {"error": f"the compiler ended the process ({worker.returncode}): {tail}"}


def compile_all(only: str = "", covered: bool = False, kept: bool = True) -> dict[str, dict[str, Any]]:
    """Figures of every kernel, by target and name; ``{"error": ...}`` for one that does not compile."""
    workers = min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        shares = list(pool.map(lambda share: _share(share, workers, only, covered, kept, cache), range(workers)))
    figures: dict[str, dict[str, Any]] = {target: {} for target in TARGETS}
    for name, found in sorted(entry for share in shares for entry in share.items()):
        target, kernel = name.split("/", 1)
        figures[target][kernel] = found
    others = json.loads(KNOWN.read_text()) if only and KNOWN.exists() else {}
    here = {one["code"]: one for kernels in figures.values() for one in kernels.values() if "code" in one}
    KNOWN.parent.mkdir(exist_ok=True)
    part = KNOWN.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(others | here))
    part.replace(KNOWN)
    return figures


def _dump(figures: dict[str, dict[str, Any]]) -> str:
    """JSON with one kernel per line, so that a difference shows which one changed."""
    targets = []
    for target, kernels in figures.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(found)}" for name, found in kernels.items()]
        targets.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(targets) + "\n}\n"


def snapshot(version: str) -> Path:
    """Where the figures of a Triton version are kept."""
    return FOLDER / "snapshots" / f"triton-{version.split('+')[0]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the snapshot of this Triton version")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose target/operator/name contains this")
    parser.add_argument("--covered", action="store_true", help="also kernels that others cover, for every target")
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)  # its number, and of how many
    parser.add_argument("--done", default="[]", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(*options.worker, options.only, options.covered, options.kept, set(json.loads(options.done)))
        return
    if options.update:  # whatever is there was perhaps compiled by other tools
        KNOWN.unlink(missing_ok=True)
    figures = compile_all(options.only, options.covered, kept=not options.update and not options.covered)
    if not options.update:
        print(_dump(figures), end="")
        return
    errors = [f"{t}/{n}: {f['error']}" for t, kernels in figures.items() for n, f in kernels.items() if "error" in f]
    if errors or options.only or options.covered:
        sys.exit("\n".join(errors) or "--update writes what the test compiles: leave out --only and --covered")
    os.environ.pop("TRITON_INTERPRET", None)
    version = importlib.import_module("triton").__version__
    snapshot(version).parent.mkdir(exist_ok=True)
    snapshot(version).write_text(_dump(figures))


if __name__ == "__main__":
    main()
