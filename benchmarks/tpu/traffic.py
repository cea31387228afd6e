"""What a compiled program moves: bytes to and from the main memory of a TPU (HBM), and collectives.

Both are read off the text of a program as `jax.stages.Compiled.as_text` gives it: the program of one device,
with its loops, its fusions and the place of every array settled. An array whose layout names a memory space,
as `S(1)` for the vector memory, is not in HBM: to read or write it is no HBM traffic, but to copy it there or
back is. XLA's own count, `bytes accessed`, makes no such difference.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
# They name arrays that are there already, or run a computation, which is counted itself.
MOVE_NOTHING = {
    "after-all",
    "bitcast",
    "call",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
# What runs a computation, and what that is to it. A fusion is an instruction to HBM, and many to collectives.
CALLS = {"while": "body", "call": "to_apply"}


class Array(NamedTuple):
    """An array: the bytes that it takes, and whether they are in HBM."""

    size: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a program. Where the result is a tuple, `results` are the arrays in it."""

    opcode: str
    results: list[Array]
    operands: list[str]
    line: str

    def called(self, role: str) -> str:
        """The name of the computation that is, for instance, the `body` of this loop."""
        return re.search(rf"\b{role}=%?([\w.-]+)", self.line)[1]


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Computations by their names, and the name of the one that calls the others."""

    computations: dict[str, Computation]
    entry: str


class Traffic(NamedTuple):
    """Bytes that a program reads from HBM and writes to it."""

    read: int
    written: int


def parse(text: str) -> Program:
    """Reads the text of a program.

    An asynchronous operation becomes one instruction, where it is done: the operands are those that it was
    started with.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for line in map(str.strip, text.splitlines()):
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := re.match(r"(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*?)\)(?:,|$)", line):
            name, type_, opcode, inputs = found.groups()
            operands = re.findall(r"%([\w.-]+)", inputs)
            if opcode.endswith("-done"):
                operands = computation[operands[0]].operands
            opcode = opcode.removesuffix("-done")
            computation[name] = Instruction(opcode, arrays(type_), operands, line)
        elif " = " in line:
            raise ValueError(f"an instruction that cannot be read: {line}")
    return Program(computations, entry)


def arrays(type_: str) -> list[Array]:
    """The arrays in a type such as `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    return [
        Array(math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8, "S(" not in layout)
        for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", type_)
    ]


def bits(dtype: str) -> int:
    """What one number takes: 16 for `bf16`."""
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else {"pred": 8, "token": 0}[dtype]


def runs(
    program: Program, name: str, enter: dict[str, str] = CALLS, times: int = 1
) -> Iterator[tuple[int, Computation]]:
    """A computation and all that it calls by what is in `enter`, each with how often it is run."""
    computation = program.computations[name]
    yield times, computation
    for instruction in computation.values():
        if instruction.opcode == "conditional":
            raise ValueError(f"which branch is run is not known: {instruction.line}")
        if role := enter.get(instruction.opcode):
            inside = times * trips(instruction) if instruction.opcode == "while" else times
            yield from runs(program, instruction.called(role), enter, inside)


def trips(loop: Instruction) -> int:
    """How often the body of a loop is run."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
    if not known:
        raise ValueError(f"how often the body is run is not known: {loop.line}")
    return int(known[1])


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """For each kind of collective how often it is run, and the bytes of the results."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for times, computation in runs(program, program.entry, CALLS | {"fusion": "calls"}):
        for instruction in computation.values():
            if instruction.opcode in COLLECTIVES:
                count[instruction.opcode] += times
                size[instruction.opcode] += times * sum(array.size for array in instruction.results)
    return {kind: (count[kind], size[kind]) for kind in count}


def hbm_traffic(program: Program) -> Traffic:
    """The bytes that the program moves from and to HBM."""
    read = written = 0
    for times, computation in runs(program, program.entry):
        for name, instruction in computation.items():
            if instruction.opcode not in MOVE_NOTHING and not instruction.opcode.endswith("-start"):
                read += times * bytes_read(program, computation, name)
                written += times * bytes_written(program, computation, name)
    return Traffic(read, written)


def bytes_read(program: Program, computation: Computation, name: str) -> int:
    """What an instruction reads from HBM."""
    return sum(
        min(array.size, used(program, computation, name, position))
        for position, operand in enumerate(computation[name].operands)
        for array in computation[operand].results
        if array.in_hbm
    )


def bytes_written(program: Program, computation: Computation, name: str) -> int:
    """What an instruction writes to HBM."""
    results = computation[name].results
    sizes = made(program, computation, name)
    return sum(size for size, array in zip(sizes, results, strict=True) if array.in_hbm)


def used(program: Program, computation: Computation, name: str, position: int) -> float:
    """The bytes that an instruction uses of one of its operands, or infinity for all of them."""
    instruction = computation[name]
    match instruction.opcode:
        case "slice" | "dynamic-slice":
            return instruction.results[0].size
        case "dynamic-update-slice" if position == 0:
            return 0
        case "bitcast":
            return used_by_all(program, computation, name)
        case "fusion":
            fused = program.computations[instruction.called("calls")]
            return used_by_all(program, fused, parameter(fused, position))
    return math.inf


def used_by_all(program: Program, computation: Computation, name: str) -> float:
    """The bytes of a value that the instructions of a fusion use, together."""
    return sum(
        used(program, computation, user, position)
        for user, instruction in computation.items()
        for position, operand in enumerate(instruction.operands)
        if operand == name
    )


def made(program: Program, computation: Computation, name: str) -> list[int]:
    """The bytes that an instruction makes of each of its results: of an update in place only the update."""
    instruction = computation[name]
    match instruction.opcode:
        case "dynamic-update-slice":
            return [computation[instruction.operands[1]].results[0].size]
        case "bitcast":
            return made(program, computation, instruction.operands[0])
        case "tuple":
            return [size for part in instruction.operands for size in made(program, computation, part)]
        case "fusion":
            fused = program.computations[instruction.called("calls")]
            return made(program, fused, root(fused))
    return [array.size for array in instruction.results]


def parameter(computation: Computation, position: int) -> str:
    """The name of a parameter."""
    return next(name for name, found in computation.items() if f" parameter({position})" in found.line)


def root(computation: Computation) -> str:
    """The name of the result."""
    return next(name for name, found in computation.items() if found.line.startswith("ROOT"))
