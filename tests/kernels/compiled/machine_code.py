"""Figures of compiled kernels, read from NVIDIA's SASS and AMD's assembly.

The *main loop* of a kernel with a matrix product is told from what surrounds it by the control flow: it is the smallest
loop with matrix instructions, without its parts that store. Where Triton has flattened the loop over tiles into the loop
over steps, that loop also holds what is done once per tile, bias, counts and stores, but behind a branch that most
iterations take. So a part is the blocks that can only be reached through one block which not every iteration runs, and it
is left out if it has a store or an atomic addition. Parts without, such as loads that the last iteration skips, stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_LINE = {
    # "        /*01f0*/               @!P1 BRA `(.L_x_1) ;"
    "cuda": re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);"),
    "hip": re.compile(r"^\s+([a-z]\w+)(.*)$"),
}
_LABEL = {"cuda": re.compile(r"^(\.L_\w+):"), "hip": re.compile(r"^(\.LBB\w+):")}
_TARGET = {"cuda": re.compile(r"`\((\.L_\w+)\)"), "hip": re.compile(r"(\.LBB\w+)")}
_MATRIX = {"cuda": re.compile(r"HGMMA|HMMA|UTC\w*MMA"), "hip": re.compile(r"v_mfma")}
_WRITES = re.compile(r"STG|UTMASTG|UTMAREDG|RED\.|ATOMG\.E\.ADD|(global|buffer|flat)_(store|atomic)")
_WIDTHS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b128": 128}


@dataclass
class _Block:
    opcodes: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # labels that its last instruction may go to
    falls: bool = True  # whether it may run on into the next block


def _blocks(kind: str, text: str) -> tuple[list[_Block], dict[str, int]]:
    blocks, labels, reconverge = [_Block()], {}, {}
    for line in text.splitlines():
        if label := _LABEL[kind].match(line):
            blocks.append(_Block())
            labels[label.group(1)] = len(blocks) - 1
            continue
        if not (found := _LINE[kind].match(line)):
            continue
        opcode, operands = found.groups()
        blocks[-1].opcodes.append(opcode)
        target = _TARGET[kind].search(operands)
        always = "@" not in line.split(opcode)[0]
        name = opcode.split(".")[0]
        if name == "BSSY" and target:  # threads that wait at BSYNC with this register go on at the target
            reconverge[operands.split(",")[0].strip()] = target.group(1)
        elif name == "BSYNC":
            blocks[-1].targets = [reconverge[operands.strip()]]
            blocks.append(_Block())
        elif name in ("BRA", "EXIT", "s_branch", "s_endpgm") or name.startswith("s_cbranch"):
            blocks[-1].targets = [target.group(1)] if target else []
            # "BRA.U UP0, `(.L)" and "BRA P0, `(.L)" have their condition among the operands.
            conditional = name.startswith("s_cbranch") or not always or (name == "BRA" and "," in operands)
            blocks[-1].falls = conditional
            blocks.append(_Block())
    return blocks, labels


def _reachable(start: int, edges: list[list[int]], without: int = -1) -> set[int]:
    seen, todo = {start} - {without}, [start] if start != without else []
    while todo:
        for after in edges[todo.pop()]:
            if after != without and after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


def _main_loop(kind: str, text: str) -> list[str] | None:
    """The instructions of the main loop; None where no loop has a matrix instruction."""
    blocks, labels = _blocks(kind, text)
    after: list[list[int]] = [[] for _ in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        ends = [labels[target] for target in block.targets if target in labels]
        for end in {*ends, *([i + 1] if block.falls and i + 1 < len(blocks) else [])}:
            after[i].append(end)
            before[end].append(i)
    live = _reachable(0, after)
    # dominated[b]: the blocks that can only be reached through b.
    dominated = {b: live - _reachable(0, after, without=b) for b in live}
    loops: dict[int, set[int]] = {}  # by header, the sources of its back edges
    for i in live:
        for head in after[i]:
            if i in dominated[head]:
                loops.setdefault(head, set()).add(i)
    best: list[str] | None = None
    smallest = 0
    for head, sources in loops.items():
        body = {head}
        for source in sources:
            body |= _reachable(source, before, without=head)
        body &= live
        opcodes = [opcode for b in body for opcode in blocks[b].opcodes]
        if any(_MATRIX[kind].match(opcode) for opcode in opcodes) and (best is None or len(opcodes) < smallest):
            smallest = len(opcodes)
            once = set()
            for b in body:
                part = body & dominated[b]
                if not part >= sources and any(_WRITES.match(o) for inner in part for o in blocks[inner].opcodes):
                    once |= part
            best = [opcode for b in body - once for opcode in blocks[b].opcodes]
    return best


def _memory_width(opcode: str) -> int:
    """Bits that one thread moves with a load or store of global memory."""
    if found := re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", opcode):
        return int(found.group(1))
    for name, bits in (("byte", 8), ("short", 16)):
        if name in opcode:
            return bits
    return _WIDTHS.get(opcode.rsplit("_", 1)[-1], 32)


_KINDS = {
    "load": re.compile(r"LDG\b|(global|buffer|flat)_load"),
    "store": re.compile(r"STG\b|(global|buffer|flat)_store"),
    "copy": re.compile(r"LDGSTS\b|(global|buffer)_load_lds"),
}
_COUNTED = {
    "tensor_core": re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma"),
    "tma_load": re.compile(r"UTMALDG"),
    "tma_store": re.compile(r"UTMASTG"),
    "shuffle": re.compile(r"SHFL|ds_bpermute|ds_swizzle"),
    "atomic": re.compile(r"ATOMG\.E\.ADD|RED\.|global_atomic"),
    "spill": re.compile(r"LDL|STL|scratch_"),
}


def _count(opcodes: Iterable[str]) -> dict[str, int]:
    figures: Counter[str] = Counter()
    for opcode in opcodes:
        for name, pattern in _COUNTED.items():
            if pattern.match(opcode):
                figures[name] += 1
        for name in ("copy", "load", "store"):
            if _KINDS[name].match(opcode):
                figures[f"{name}{_memory_width(opcode)}"] += 1
                break
    return dict(sorted(figures.items()))


def figures(kind: str, text: str) -> dict[str, object]:
    """Counts over the kernel, over its main loop (``loop``, None where there is none) and its matrix instructions.

    ``load32`` counts loads of global memory of 32 bits per thread; ``copy`` those that go to shared memory by
    themselves, ``store`` stores; ``spill`` accesses to thread-local memory.
    """
    opcodes = [found.group(1) for line in text.splitlines() if (found := _LINE[kind].match(line))]
    loop = _main_loop(kind, text)
    matrix = sorted({opcode for opcode in opcodes if _MATRIX[kind].match(opcode)})
    return {**_count(opcodes), "matrix": matrix, "loop": None if loop is None else _count(loop)}
