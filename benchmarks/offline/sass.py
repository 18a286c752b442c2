"""Loops of a compiled kernel and what their instructions are.

Control flow is rebuilt from the disassembly: blocks, dominators, and natural loops (a back edge is
a jump to a block that dominates it), so blocks that the assembler moved out of line, prologues and
peeled iterations are told apart from loops.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"\b(0x[0-9a-f]+)\s*$")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WIDE = re.compile(r"\.128\b|88\.4\b")
_DOUBLE = re.compile(r"\.64\b|88\.2\b")
_GUARD = re.compile(r"^@!?U?P\w+ ")

# Kind of instruction -> its opcodes. The first that fits counts; the rest are "other".
KINDS = {
    "HGMMA": ("HGMMA",),
    "HMMA": ("HMMA",),
    "UTCMMA": ("UTCHMMA", "UTCQMMA"),
    "EX2": ("MUFU.EX2",),
    "FP64": ("DFMA", "DADD", "DMUL"),
    "CONVERT64": ("F2F.F64", "F2F.F32.F64"),
    "FFMA": ("FFMA",),
    "FADD": ("FADD",),
    "FMUL": ("FMUL",),
    "MINMAX": ("FMNMX", "FMNMX3"),
    "SELECT": ("ISETP", "FSETP", "FSEL", "SEL", "UISETP", "USEL"),
    "LOCAL": ("LDL", "STL"),
    "LOAD": ("LDGSTS", "LDG", "LDSM", "LDS", "LDTM", "UTMALDG"),
    "STORE": ("STG", "STSM", "STS", "STTM"),
    "BARRIER": ("BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS", "UTCBAR"),
}

MATRIX = ("HGMMA", "HMMA", "UTCMMA")


@dataclass(frozen=True)
class Mix:
    """Instructions that one warp issues, by kind, and the products of its matrix instructions.

    `macs` are a warp's share of the multiply-adds; `half_rate` are those of them that run at half
    the rate of 16-bit operands (TF32). `lsu` are clocks of the load/store unit, at least: 32 lanes
    x 4 bytes each; `operands` are clocks in which matrix instructions read shared memory: a warp's
    share of what their descriptors name, 128 bytes a clock. `plain` are LDG, which go through L1.
    """

    counts: Counter[str] = field(default_factory=Counter)
    macs: int = 0
    half_rate: int = 0
    lsu: int = 0
    operands: float = 0.0
    plain: int = 0

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def matrix(self) -> int:
        """Matrix instructions of any kind."""
        return sum(self.counts[name] for name in MATRIX)


@dataclass(frozen=True)
class Loop:
    """A natural loop: all of its blocks, and the loop around it."""

    header: int
    blocks: frozenset[int]
    mix: Mix
    own: Mix  # without the loops inside
    innermost: bool
    parent: int | None  # header of the smallest loop around it


@dataclass(frozen=True)
class Code:
    """A disassembled kernel."""

    loops: tuple[Loop, ...]
    straight: Mix  # what no loop holds
    mix: Mix

    def parent(self, loop: Loop) -> Loop | None:
        return next((each for each in self.loops if each.header == loop.parent), None)


def kind(instruction: str) -> str:
    """Kind of an instruction, see `KINDS`."""
    return _kind(_GUARD.sub("", instruction).split()[0])


@functools.cache
def _kind(opcode: str) -> str:
    for name, opcodes in KINDS.items():
        for each in opcodes:
            if opcode == each or opcode.startswith((each + ".", each + "2")):
                return name
    return "other"


def read(disassembly: str) -> Code:
    """Loops of the first function of a `cuobjdump --dump-sass` listing."""
    lines = [(int(address, 16), text) for address, text in _LINE.findall(disassembly)]
    starts = _leaders(lines)
    blocks: dict[int, list[tuple[int, str]]] = {}
    for address, text in lines:
        if address in starts:
            current = blocks.setdefault(address, [])
        current.append((address, text))
    order = sorted(blocks)
    follower = dict(pairwise(order))
    successors = {
        start: [each for each in _successors(body[-1][1], follower.get(start)) if each in blocks]
        for start, body in blocks.items()
    }
    members = _natural_loops(successors, order[0])
    mixes = {start: _mix(text for _, text in body) for start, body in blocks.items()}

    def total(chosen: set[int] | frozenset[int]) -> Mix:
        return _add([mixes[each] for each in sorted(chosen)])

    loops = []
    for header, body in members.items():
        inside = [other for h, other in members.items() if h != header and other < body]
        around = [h for h, other in members.items() if h != header and body < other]
        loops.append(
            Loop(
                header,
                body,
                total(body),
                total(body.difference(*inside)),
                not inside,
                min(around, key=lambda h: len(members[h]), default=None),
            )
        )
    outside = set(blocks).difference(*members.values())
    return Code(tuple(loops), total(outside), total(set(blocks)))


def _jumps(text: str) -> bool:
    return _GUARD.sub("", text).startswith(("BRA", "CALL", "EXIT", "RET", "JMP"))


def _leaders(lines: list[tuple[int, str]]) -> set[int]:
    """Addresses at which blocks begin."""
    starts = {lines[0][0]}
    for i, (_, text) in enumerate(lines):
        if _jumps(text):
            target = _TARGET.search(text)
            if target:
                starts.add(int(target.group(1), 16))
            if i + 1 < len(lines):
                starts.add(lines[i + 1][0])
    return starts


def _successors(text: str, after: int | None) -> list[int]:
    """Where a block that ends so may go on. A guarded CALL without return is a jump as well."""
    plain = _GUARD.sub("", text)
    ends = plain.startswith(("EXIT", "RET", "BRA", "JMP")) and plain == text
    ends = (
        ends and not re.match(r"BRA\.(U|DIV)\b", plain) and not re.match(r"BRA\S* !?U?P\d", plain)
    )
    result = [] if ends or after is None else [after]
    target = _TARGET.search(plain) if plain.startswith(("BRA", "CALL", "JMP")) else None
    return [*result, int(target.group(1), 16)] if target else result


def _natural_loops(successors: dict[int, list[int]], entry: int) -> dict[int, frozenset[int]]:
    """Header -> blocks; back edges to one header make one loop."""
    predecessors: dict[int, list[int]] = {each: [] for each in successors}
    for start, targets in successors.items():
        for target in targets:
            predecessors[target].append(start)
    reached = _reach(entry, successors)
    dominators = {each: set(reached) for each in reached}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for each in sorted(reached - {entry}):
            sets = [dominators[p] for p in predecessors[each] if p in reached]
            new = set.intersection(*sets) | {each}
            if new != dominators[each]:
                dominators[each], changed = new, True
    loops: dict[int, set[int]] = {}
    for start in sorted(reached):
        for header in successors[start]:
            if header in dominators[start]:
                body = loops.setdefault(header, {header})
                todo = [start]
                while todo:
                    each = todo.pop()
                    if each not in body:
                        body.add(each)
                        todo += [p for p in predecessors[each] if p in reached]
    # The endless jump to itself behind the code is never reached, hence no loop.
    return {header: frozenset(body) for header, body in loops.items()}


def _reach(entry: int, successors: dict[int, list[int]]) -> set[int]:
    seen, todo = {entry}, [entry]
    while todo:
        for each in successors[todo.pop()]:
            if each not in seen:
                seen.add(each)
                todo.append(each)
    return seen


def _mix(texts) -> Mix:
    counts: Counter[str] = Counter()
    macs = half_rate = lsu = plain = 0
    operands = 0.0
    for text in texts:
        name = kind(text)
        counts[name] += 1
        if name in ("LOAD", "STORE", "LOCAL"):
            opcode = _GUARD.sub("", text).split()[0]
            lsu += 4 if _WIDE.search(opcode) else 2 if _DOUBLE.search(opcode) else 1
            plain += opcode.startswith("LDG.")
        if name in MATRIX:
            shape = _SHAPE.search(text)
            if shape:
                m, n, k = map(int, shape.groups())
                product = m * n * k // 4  # the instruction of four warps together
                of_registers = re.search(r"F32\S* R\d+, R\d+, gdesc", text)
                rows = n if of_registers else m + n
                operands += rows * k * (4 if "TF32" in text else 2) / 128 / 4
            elif "HMMA.16816" in text:
                product = 16 * 8 * 16
            elif "HMMA.1688" in text or "HMMA.1684" in text:
                product = 16 * 8 * (8 if "1688" in text else 4)
            else:
                product = 0  # tcgen05 names its shape in a descriptor, not in the instruction
            macs += product
            half_rate += product if "TF32" in text else 0
    return Mix(counts, macs, half_rate, lsu, operands, plain)


def _add(mixes: list[Mix]) -> Mix:
    counts: Counter[str] = Counter()
    for each in mixes:
        counts += each.counts
    return Mix(
        counts,
        sum(each.macs for each in mixes),
        sum(each.half_rate for each in mixes),
        sum(each.lsu for each in mixes),
        sum(each.operands for each in mixes),
        sum(each.plain for each in mixes),
    )
