"""Two commits on one machine: which of our operators and training steps became faster or slower, beyond the noise.

    python -m bench.compare main            # the working tree against a commit
    python -m bench.compare v0.1 v0.2       # two commits
    python -m bench.compare HEAD --cases adamw --blocks 10 --fail-on-slower

Both sides are measured with the harness of this checkout; only nspec differs, each side with its own native library. A
block is a fresh process, since where memory lies differs from process to process and is much of the noise; blocks go base,
head, head, base, base, head ... In a block each case is timed in rounds, in turn with a yardstick that both sides share (a
product in plain PyTorch): the figure is the median of (ours / yardstick), so that drift of the machine cancels.

A case is called faster or slower if a paired t-test over the blocks says so at 5 % for all cases together (Holm), and the
change is larger than two blocks of the same commit usually differ, and than 2 %. Else it is within noise: more --blocks or
--seconds show smaller changes. The exit status is 0 whatever moved (1 with --fail-on-slower), and 2 where nothing could
be compared.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import cases as declared
from bench import cli
from bench.cases import Case
from bench.machine import ROOT, commit, pick_device
from bench.timing import Call, interleaved

Block = Mapping[str, Mapping[str, Any]]
"""What a process found, by label of the case (:func:`measure_block`)."""

LEVEL = 0.05
"""Probability that a comparison of equal sides shows a moved case, and one less the coverage of each interval."""
LEAST = 0.02
"""The smallest relative change that counts, as a difference of logarithms: less is the layout of code and memory, which no
number of blocks averages away."""
STEP = "training step, mode "
"""Begins the name of an operator that is a whole training step of a feed-forward block: ``STEP + mode``."""
LIBRARY = Path("kernels/common/libnspec_cpu.so")
SOURCES = ("CMakeLists.txt", "kernels/csrc")
"""Of the native library."""


class NotPossible(Exception):
    """A comparison cannot be made; the message is one line with the reason and what to do."""


# The two sides, as source trees.


class Tree(NamedTuple):
    """One side: ``folder`` holds ``nspec/``, ``kernels/`` and ``bench/``; ``name`` is a commit's, perhaps ``-dirty``."""

    name: str
    folder: Path


def ran(command: Sequence[str], folder: Path, what: str, **environment: str) -> bytes:
    """What a command prints.

    Raises:
        NotPossible: it failed; the message is ``what`` and the last line that it wrote.
    """
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
        raise NotPossible(f"{what}: {said[-1] if said else f'exit status {done.returncode}'}")
    return done.stdout


@contextmanager
def trees(revisions: Sequence[str | None], checkout: Path = ROOT) -> Iterator[list[Tree]]:
    """A tree of each revision (None: the working tree), removed when the block is left, by an error too.

    Each is a plain copy with the ``bench/`` of this checkout, so that both sides are measured the same way.

    Raises:
        NotPossible: a revision is unknown, or the folder is no git checkout.
    """
    with tempfile.TemporaryDirectory(prefix="nspec-compare-") as top:
        made = []
        for number, revision in enumerate(revisions):
            folder = Path(top) / f"side{number}"  # paths of one length: that of the environment shifts the stack
            name, no_bench = commit(checkout), shutil.ignore_patterns("__pycache__", "results")
            if revision is None:
                for part in ("nspec", "kernels", *SOURCES, "setup.py", "pyproject.toml", "README.md"):
                    if (source := checkout / part).is_dir():
                        shutil.copytree(source, folder / part, ignore=no_bench, dirs_exist_ok=True)
                    elif source.is_file():
                        shutil.copy2(source, folder / part)
            else:
                asked = ["git", "rev-parse", "--short=12", "--verify", "--end-of-options", f"{revision}^{{commit}}"]
                name = ran(asked, checkout, f"no commit {revision!r} in {checkout}").decode().strip()
                files = ran(["git", "archive", "--format=tar", name], checkout, "git archive")  # leaves nothing in .git
                with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                    archive.extractall(folder, filter="data")
            if not (folder / "nspec" / "__init__.py").is_file():
                raise NotPossible(f"{revision or 'the working tree'} holds no nspec/__init__.py: nothing to measure")
            shutil.rmtree(folder / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", folder / "bench", ignore=no_bench)
            made.append(Tree(name, folder))
        yield made


def sources(folder: Path) -> dict[Path, bytes]:
    """Everything that the native library is made from, but PyTorch and the compiler, by path in the folder."""
    found = (path for part in SOURCES for path in (folder / part, *(folder / part).rglob("*")))
    return {path.relative_to(folder): path.read_bytes() for path in found if path.is_file()}


def usable(library: Path, folder: Path) -> bool:
    """Whether a library was built after the last change of the sources in that folder. It serves every PyTorch."""
    newest = max(((folder / path).stat().st_mtime for path in sources(folder)), default=0.0)
    return library.is_file() and library.stat().st_mtime >= newest


def add_library(tree: Tree, others: Sequence[Path] = (ROOT,)) -> str:
    """Puts the native library into a tree, that of one of ``others`` with the same sources or a new build; in words.

    Raises:
        NotPossible: it has to be built and cannot be.
    """
    if not (own := sources(tree.folder)):
        return "has no native library"
    for other in others:
        if sources(other) == own and usable(other / LIBRARY, other):
            shutil.copy2(other / LIBRARY, tree.folder / LIBRARY)
            return "native library taken over: the same sources"
    (tree.folder / LIBRARY).unlink(missing_ok=True)
    what = f"{tree.name}: the native library was not built (NSPEC_NATIVE=0 does without it)"
    ran([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree.folder, what, NSPEC_BUILD_NATIVE="1")
    if not (tree.folder / LIBRARY).is_file():
        raise NotPossible(what)
    return "native library built"


# What is measured, in a process of its own that runs in the tree of a commit.


def choose(name: str, device_type: str, part: str) -> list[Case]:
    """The cases to compare.

    Raises:
        NotPossible: no label contains ``part``.
    """
    every = declared.cases("smoke" if name == "short" else name, device_type, compiled=False)
    if name == "smoke":
        every.append(Case(STEP + "update", 96, 32, 128, "float32", 0.5))
    elif name == "short":  # a few of each operator, measured in a second each; on a GPU larger, and in its dtype
        cpu = device_type == "cpu"
        shape = (2048, 512, 2048) if cpu else (16384, 1024, 4096)
        chosen = [
            ("linear_relu_count", "float32", 1.0, 1),
            ("linear_relu_count", "bfloat16", 1.0, 1),
            ("row_sparse_wgrad", "float32", 0.5, 1),
            ("row_sparse_wgrad", "bfloat16", 0.78, 1),
            ("compact_ffn", "float32", 0.5, 1),
            ("compact_ffn", "bfloat16", 0.78, 1),
            ("compact_ffn", "float32" if cpu else "bfloat16", 0.5, 8),
            ("row_sparse_adamw", "float32", 0.5, 1),
        ]
        every = [Case(o, *shape, dtype, density, n, compiled=False) for o, dtype, density, n in chosen]
        every += [Case(STEP + mode, 2048, 512, 2048, "float32", 0.5) for mode in ("forward", "update")]
    if not (found := [case for case in every if part in case.label]):
        raise NotPossible(f"--cases {part!r} is in no label; the first is {every[0].label!r}")
    return found


def yardstick(case: Case, device: torch.device) -> Call:
    """What both sides do alike, to divide by: two products of the case's shape and dtype, into memory that is there.

    Not the dense baseline of the case: that allocates its results, which costs more in one process than in the next.
    Relative to it our compact_ffn differed by 17 to 30 % between processes of one commit, relative to these products by
    2 to 3 % (float32 and bfloat16, 2048 x 512 x 2048, two cores of a Xeon).
    """
    dtype = getattr(torch, case.dtype)
    a = torch.randn(case.tokens, case.d_model, device=device).to(dtype)
    b = torch.randn(case.d_model, case.d_ff, device=device).to(dtype)
    out = torch.empty(case.tokens, case.d_ff, dtype=dtype, device=device)
    return lambda _: [torch.mm(a, b, out=out) for _ in range(2)]


def training_step(case: Case, device: torch.device) -> Call:
    """Forward, backward and optimiser of a feed-forward block that is specialised, with row-sparse AdamW."""
    import nspec

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(case.d_model, case.d_ff), nn.ReLU(), nn.Linear(case.d_ff, case.d_model)).to(device)
    active = torch.randperm(case.d_ff) < case.active
    mode: Any = case.operator.removeprefix(STEP)
    ours = nspec.specialize(block, nspec.NeuronMasks({"task": {"0": active}}), mode=mode)
    nspec.set_task(ours, "task")
    inputs = [torch.randn(case.tokens, case.d_model, device=device) for _ in range(8)]
    gradient = torch.randn(case.tokens, case.d_model, device=device)
    optimizer = nspec.RowSparseAdamW(ours.parameters(), lr=1e-6, weight_decay=0.01)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        ours(inputs[number % len(inputs)]).backward(gradient)
        optimizer.step()

    return step


def calls(case: Case, device: torch.device, check: bool) -> dict[str, Call]:
    """Ours and the yardstick of a case, ready to be timed.

    Raises:
        AssertionError: ``check``, and a result is wrong.
    """
    if case.operator.startswith(STEP):
        return {"yardstick": yardstick(case, device), "ours": training_step(case, device)}
    from bench import providers

    problem = providers.problem(case, device)
    ours = next(provider for provider in problem.providers if provider.ours)
    if check:
        replace(problem, providers=[ours]).check()
    # Of AdamW, which multiplies nothing, PyTorch's: it moves the same memory, and allocates none.
    divide = problem.providers[0].call if case.operator == "row_sparse_adamw" else yardstick(case, device)
    return {"yardstick": divide, "ours": ours.call}


def measure_block(chosen: Iterable[Case], device: torch.device, seconds: float | None) -> dict[str, dict[str, Any]]:
    """By label of the case: ``milliseconds`` of ours and ``ratio``, the median over rounds of log(ours / yardstick).

    A case that this commit cannot compute has ``error`` instead. Without ``seconds`` results are checked and nothing is
    timed: checking leaves the allocator in a state that the times of a process depend on.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in chosen:
        found[case.label] = {}
        try:
            timed = calls(case, device, check=seconds is None)
        except Exception as error:  # an older commit may fail in any way: that costs the case, not the comparison
            reason = (str(error).strip() or "no message").splitlines()[0][:300]
            found[case.label]["error"] = f"{type(error).__name__}: {reason}"
            continue
        if seconds is not None:
            times = interleaved(timed, device, rounds=5, least_seconds=seconds)
            ratios = [math.log(a / b) for a, b in zip(times["ours"], times["yardstick"], strict=True)]
            milliseconds = 1e3 * statistics.median(times["ours"])
            found[case.label] |= {"milliseconds": milliseconds, "ratio": statistics.median(ratios)}
    return found


def block_process(request: str) -> None:
    """Measures what is asked for, as JSON, with the nspec of the tree that it is started in and no other."""
    asked = json.loads(request)
    import nspec
    from nspec.kernels.common import native

    tree = Path(asked["tree"]).resolve()
    for file in (nspec.__file__, native.__file__):
        if tree not in Path(file).resolve().parents:
            sys.exit(f"error: {file} was imported, expected one in {tree}")
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    chosen = [Case(**fields) for fields in asked["cases"]]
    found = measure_block(chosen, pick_device(asked["device"]), asked["seconds"])
    Path(asked["out"]).write_text(json.dumps(found), encoding="utf-8")


def run_block(tree: Tree, chosen: Sequence[Case], device: str, threads: int, seconds: float | None = None) -> Block:
    """One process in a tree; without ``seconds`` it checks the results and times nothing.

    Raises:
        NotPossible: it failed; the message is the last line that it wrote.
    """
    out = tree.folder / "block.json"
    asked = {"tree": str(tree.folder), "out": str(out), "device": device, "threads": threads, "seconds": seconds}
    request = json.dumps(asked | {"cases": [asdict(case) for case in chosen]})
    # From the folder and by PYTHONPATH: both come before an installed nspec, of whichever kind.
    paths = [str(tree.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", "import sys; from bench.compare import block_process; block_process(sys.argv[1])"]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "NSPEC_COMMIT": tree.name}
    ran([*command, request], tree.folder, f"{tree.name}: measuring failed", **environment)
    found: Block = json.loads(out.read_text(encoding="utf-8"))
    return found


# What moved.


@dataclass(frozen=True)
class Change:
    """The change of one case, in differences of natural logarithms of times: positive is slower.

    ``mean`` of the paired differences, with the 95 % interval ``low`` to ``high`` of this case alone; ``noise``, the usual
    difference between two blocks of the same side (root mean square); ``p`` of the t-test, corrected for the number of
    cases; the verdict: ``slower``, ``faster`` or ``within noise``.
    """

    mean: float
    low: float
    high: float
    noise: float
    p: float
    verdict: str = "within noise"


def changes(base: Mapping[str, Sequence[float]], head: Mapping[str, Sequence[float]]) -> dict[str, Change]:
    """The verdict on every case.

    Args:
        base: by case, the logarithm of its time in each block, in the order of measuring.
        head: the same for the other side; block ``i`` is the neighbour of block ``i`` of ``base``.
    """
    from scipy import stats

    from nspec.analysis.mantel import holm  # here, since an older commit, which blocks run in, may not have it

    found: dict[str, Change] = {}
    for name, before in base.items():
        differences = [b - a for a, b in zip(before, head[name], strict=True)]
        mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(before))
        noise = math.sqrt(statistics.variance(before) + statistics.variance(head[name]))
        t = abs(mean) / error if error else math.inf * abs(mean) if mean else 0.0
        half = float(stats.t.ppf(1 - LEVEL / 2, len(before) - 1)) * error
        found[name] = Change(mean, mean - half, mean + half, noise, 2 * float(stats.t.sf(t, len(before) - 1)))
    for (name, change), p in zip(found.items(), holm([c.p for c in found.values()]).tolist(), strict=True):
        moved = p <= LEVEL and abs(change.mean) > max(change.noise, LEAST)
        found[name] = replace(change, p=p)
        if moved:
            found[name] = replace(found[name], verdict="slower" if change.mean > 0 else "faster")
    return found


def percent(logarithm: float) -> float:
    """A difference of logarithms of times as a change in per cent: 10.0 is a time 1.1 times as long."""
    return 100 * math.expm1(logarithm)


def order(pairs: int) -> list[int]:
    """Which side (0: base, 1: head) each block measures: each pair begins with the side that ended the one before."""
    return [side for pair in range(pairs) for side in ((0, 1) if pair % 2 == 0 else (1, 0))]


def judge(base: Sequence[Block], head: Sequence[Block]) -> tuple[dict[str, Change], dict[str, str]]:
    """The change of each case that both sides could compute, and why the others could not be compared."""
    failed: dict[str, str] = {}
    for side, blocks in (("base", base), ("head", head)):
        for label, found in ((label, found) for block in blocks for label, found in block.items() if "error" in found):
            failed.setdefault(label, f"{side}: {found['error']}")
    labels = [label for label, found in (base[0] if base else {}).items() if label not in failed and found]
    ratios = [{label: [block[label]["ratio"] for block in blocks] for label in labels} for blocks in (base, head)]
    return changes(*ratios) if labels else {}, failed


def milliseconds(blocks: Sequence[Block], label: str) -> float:
    """Median over the blocks of a side."""
    return statistics.median(block[label]["milliseconds"] for block in blocks)


def table(found: Mapping[str, Change], base: Sequence[Block], head: Sequence[Block]) -> str:
    """A line for each case.

    The change is that of the ratio to the yardstick, so it may differ from that of the milliseconds beside it, which drift.
    """
    width = max(map(len, found))
    head_line = f"{'base ms':>9} {'head ms':>9} {'time':>8}  {'95 % interval':<19} {'noise':>7}  verdict"
    lines = [f"{'case':<{width}} {head_line}"]
    for label, change in found.items():
        times = f"{milliseconds(base, label):9.3f} {milliseconds(head, label):9.3f}"
        interval = f"[{percent(change.low):+.1f} %, {percent(change.high):+.1f} %]"
        moved = f"{percent(change.mean):+6.1f} %  {interval:<19} {percent(change.noise):5.1f} %"
        lines.append(f"{label:<{width}} {times} {moved}  {change.verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    made = cli.parser("bench.compare", __doc__, "", "set")
    made.add_argument("base", help="the commit to compare with: a branch, a tag, HEAD~3, ...")
    made.add_argument("head", nargs="?", help="the other one (default: the working tree as it is)")
    made.add_argument("--set", choices=("short", *declared.SETS), default="short", help="default: short, ten cases")
    made.add_argument("--cases", default="", metavar="TEXT", help="only cases with this in their label")
    made.add_argument("--blocks", type=int, default=6, help="processes of each side (default: 6, at least 3)")
    made.add_argument("--seconds", type=float, default=0.6, help="at least so long a case and block (default: 0.6)")
    made.add_argument("--fail-on-slower", action="store_true", help="exit status 1 if a case became slower")
    args = made.parse_args(arguments)
    if args.blocks < 3:
        made.error(f"--blocks {args.blocks}: at least 3, or no noise can be told")
    device, write = cli.started(made, args)
    threads: int = args.threads
    blocks: tuple[list[Block], list[Block]] = ([], [])
    try:
        chosen = choose(args.set, device.type, args.cases)
        with trees([args.base, args.head]) as sides:
            print(f"base {sides[0].name}, head {sides[1].name}", flush=True)
            if device.type == "cpu" and os.environ.get("NSPEC_NATIVE") != "0":
                for number, side in enumerate(sides):
                    done = add_library(side, [ROOT, *(other.folder for other in sides[:number])])
                    print(f"{'head' if number else 'base'}: {done}", file=sys.stderr, flush=True)
            # Each case once on both sides, in processes that time nothing.
            _, wrong = judge(*([run_block(side, chosen, str(device), threads)] for side in sides))
            chosen = [case for case in chosen if case.label not in wrong]
            began, turns = time.perf_counter(), order(args.blocks) if chosen else []
            for number, turn in enumerate(turns, start=1):
                blocks[turn].append(run_block(sides[turn], chosen, str(device), threads, args.seconds))
                left = (time.perf_counter() - began) / number * (len(turns) - number)
                print(f"block {number} of {len(turns)}, about {left:.0f} s left", file=sys.stderr, flush=True)
        found, failed = judge(*blocks)
        for label, reason in (wrong | failed).items():
            print(f"not compared: {label}: {reason}")
        if not found:
            raise NotPossible("no case could be computed by both sides")
    except NotPossible as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found, *blocks))
    moved = [label for label, change in found.items() if change.verdict != "within noise"]
    print(f"{len(moved)} of {len(found)} cases moved, {args.blocks} processes of each side")
    fields = {case.label: asdict(case) for case in chosen}
    for label, change in found.items():
        row = {"kind": "change", "case": label, **fields[label], "base": sides[0].name, "head": sides[1].name}
        row |= {"blocks": args.blocks, "verdict": change.verdict, "p": change.p}
        row |= {f"{side}_milliseconds": milliseconds(own, label) for side, own in zip(("base", "head"), blocks)}
        changed = {name: percent(getattr(change, name)) for name in ("mean", "low", "high", "noise")}
        write(row | {f"{name}_percent": round(value, 2) for name, value in changed.items()})
    slower = any(change.verdict == "slower" for change in found.values())
    return 1 if slower and args.fail_on_slower else 0


if __name__ == "__main__":
    sys.exit(main())
