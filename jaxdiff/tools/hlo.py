"""What a compiled program does, read from XLA's text of it: loops count as often as they run."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import jax

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
# What moves no bytes itself.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call", "conditional",
        "after-all", "partition-id", "replica-id", "opt-barrier", "iota")  # fmt: skip

_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')


def shape_bytes(text: str, main_memory: bool = False) -> int:
    """Bytes of all arrays that a type such as `(f32[2,3]{1,0}, s32[])` names, or of those in main memory.

    A TPU's compiler writes S(1) and so on at what it keeps on the chip.
    """
    total = 0.0
    for kind, sides, layout in _SHAPE.findall(text):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        width = WIDTHS.get(kind) or int(re.sub(r"\D", "", kind[:3]) or 8) / 8
        total += width * math.prod(int(side) for side in sides.split(",") if side)
    return int(total)


@dataclass(frozen=True)
class Instruction:
    """One line: its name, the type of its result, what it does, the names it reads, and the rest of the line."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str


@dataclass
class Program:
    """The computations of a module, and how often each runs in one call of it."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    fused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.types = {i.name: i.type for body in self.computations.values() for i in body}

    def collectives(self) -> dict[str, int]:
        """Bytes that each chip sends for each kind of collective, by the ring algorithms (Thakur et al. 2005)."""
        sent: Counter[str] = Counter()
        seen = set()
        for name, body in self.computations.items():
            for i in body:
                kind, channel = i.op.removesuffix("-start"), re.search(r"channel_id=(\d+)", i.rest)
                if kind in COLLECTIVES and not (channel and channel[1] in seen):
                    if channel:  # a TPU's asynchronous collective is written down in each of its fusions
                        seen.add(channel[1])
                    size = sum(shape_bytes(self.types.get(operand, "")) for operand in i.operands)
                    n = group_size(i.rest)
                    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
                    sent[kind] += round(self.runs[name] * size * share.get(kind, (n - 1) / n))
        return dict(sent)

    def bytes_moved(self) -> int:
        """Bytes read from and written to main memory."""
        return sum(
            runs * sum(map(self._moved, self.computations[name]))
            for name, runs in self.runs.items()
            if name not in self.fused
        )

    def _size(self, name: str) -> int:
        return shape_bytes(self.types.get(name, ""), main_memory=True)

    def _moved(self, i: Instruction) -> int:
        """What an instruction reads and writes; of what is only sliced, the slices."""
        if i.op in FREE or i.op.endswith(("-done", "-update")):
            return 0
        if i.op in ("copy-start", "slice-start"):  # (to, from, ...) and ((from), to, ...)
            copies = [shape_bytes(found[0], True) for found in re.finditer(_SHAPE, i.type)]
            part = min(shape_bytes(found[0]) for found in list(re.finditer(_SHAPE, i.type))[:2])
            return part * sum(size > 0 for size in copies[:2])
        written = shape_bytes(i.type, main_memory=True)
        if i.op == "dynamic-slice":
            return written + min(written or shape_bytes(i.type), self._size(i.operands[0]))
        if i.op == "dynamic-update-slice":
            return 2 * shape_bytes(self.types.get(i.operands[1], ""), main_memory=True)
        read = list(map(self._size, i.operands))
        if i.op == "fusion" and (called := _CALLED.search(i.rest)):
            body = self.computations[called[1]]
            for inner in (inner for inner in body if inner.op == "parameter"):
                users = [user for user in body if inner.name in user.operands]
                at, updates = int(inner.rest), [u for u in users if u.op == "dynamic-update-slice"]
                if updates and updates[0].operands[0] == inner.name:  # in place
                    part = sum(shape_bytes(self.types[u.operands[1]]) for u in updates)
                    written = min(written, part) if written == read[at] else max(0, written - read[at]) + part
                    read[at] = 0
                elif users and all(u.op == "dynamic-slice" and u.operands[0] == inner.name for u in users):
                    read[at] = min(read[at], sum(shape_bytes(u.type) for u in users))
        return sum(read) + written


def group_size(rest: str) -> int:
    """Devices that take part in one group of a collective.

    From `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`.
    """
    if found := re.search(r"replica_groups=\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        axes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", found[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"[\w.]+", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return 2


def parse(text: str, turns: int = 1) -> Program:
    """Reads what `compiled.as_text()` gives; a loop that does not say its number of turns takes `turns`."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            body = computations[found[1]] = []
            entry = found[1] if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith("  "):
            body.append(_instruction(line))

    # How often each computation runs: callers first.
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    fused: set[str] = set()
    for name, instructions in computations.items():
        for i in instructions:
            trips = _trips(i, computations, turns) if i.op == "while" else 1
            found = _CALLED.findall(i.rest)
            for group in _BRANCHES.findall(i.rest):
                found += [branch.strip().lstrip("%") for branch in group.split(",")]
            calls[name] += [(called, trips) for called in found if called in computations]
            if i.op in ("fusion", "reduce", "reduce-window", "scatter", "sort", "map", "all-reduce", "reduce-scatter"):
                fused.update(found)
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called, trips in calls[name]:
            visit(called, times * trips)

    if entry:
        visit(entry, 1)
    return Program(computations, runs, fused)


def _trips(loop: Instruction, computations: dict[str, list[Instruction]], unknown: int) -> int:
    """Turns of a while loop: as noted, or the number that its condition compares the counter with."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = _CONDITION.search(loop.rest)
    body = computations.get(condition[1], []) if condition else []
    limits = [int(i.operands[0]) for i in body if i.op == "constant" and i.type.startswith("s32[]")]
    return max(limits, default=unknown)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    op, _, tail = rest.partition("(")
    end = _closing("(" + tail, 0) - 1
    inner = tail[:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or tuple(
        word.split()[-1] for word in re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", inner).split(",") if word.strip()
    )
    return Instruction(name.lstrip("%"), kind, op, operands, inner if op == "parameter" else tail[end:])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    return len(text)


def flops(jaxpr: Any, turns: int = 1) -> int:
    """Multiplications and additions of the matrix products and convolutions of a program, before it is split.

    What the backward pass computes again counts. A `while` whose number of turns is not known takes `turns`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            )
        elif name == "conv_general_dilated":
            spec, kernel = eqn.params["dimension_numbers"].rhs_spec, eqn.invars[1].aval.shape
            pixels = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[d] for d in spec[1:])
            # Zeros between pixels, as in the gradient of a stride, are not multiplied.
            total += 2 * pixels // math.prod(eqn.params["lhs_dilation"])
        elif name == "pallas_call":
            total += eqn.params["cost_estimate"].flops
        else:
            values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
            inner = [flops(value, turns) for value in values if _is_jaxpr(value)]
            if name == "shard_map":
                times = eqn.params["mesh"].size
            else:
                times = turns if name == "while" else eqn.params.get("length", 1)
            total += (max(inner, default=0) if name == "cond" else sum(inner)) * times
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
