"""Change one operator of the compiled PTX at a time, and see that the bits change.

On the stand-in GPU, each of these after `python tests/gpu/run.py`:

    tests/mutate_ptx.py                          every seventh mutant, in the text's order
    tests/mutate_ptx.py --every 1                all of them, an hour on 2 cores
    tests/mutate_ptx.py --sample 500 --seed 1    so many, picked at random
    tests/mutate_ptx.py rows bfloat16            of the kernels whose name has these words

Each mutant takes the kernel's place in the launches of mutant_cases.py, small ones first: results
compared as bits, every byte written once. It is killed by the first case that goes wrong, be it an
error of the interpreter or too many steps. HARMLESS says why those that survive every case may;
the exit status is 1 for any other survivor, and below 90 % killed.

Operators, by the word that names them in the table:

    operation    add, sub; and, or, xor; mul.lo, mul.hi; div, rem; min, max; shl, shr; fma without
                 its addend, or for a mul; another approximation; NaN and sign rules of min dropped
    swap         operands of sub, div, shifts, pairs; of fma and mad a factor and the addend
    same         both operands the first one: d = a op a
    compare      the neighbouring relations, eq and ne
    sign         of integer types, where it matters; of float constants, neg dropped
    constant     integers and shift amounts by 1, floats by one ULP, either way
    rounding     to zero instead of to nearest
    width        half as many bytes loaded, stored or converted
    address      one access width further, or nearer where there is an offset
    drop         no store, no branch, no return; else a mov of the first source, or 0
    branch       guard inverted, or taken always

Not generated, as they are the same: commutative operands swapped, the low part of a product or a
sum of either sign, loads through another cache, addresses of global memory left generic, another
rounding of what is exact (products with a power of two; differences, see below), either sign of
bits that are dropped, and anything else done to a product with 0.

The differences of floats are m - 1 with m in [sqrt(1/2), sqrt(2)], exact by Sterbenz' lemma;
magic - shifted, both of them multiples of 2 of one binade; and scale - 1/8 of a divergence, which
rounds only where the other addends hide it.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from gpu.stand_in import attach
from gpu_run import Gpu, ptx
from machine_code import OF_KEYS, Name
from mutant_cases import DTYPES, Array, Case, make_cases
from ptx import Kernel, Module, PTXError
from ptx.model import Instruction

FLOOR = 0.9


@dataclass(frozen=True)
class Mutant:
    kernel: Name
    line: int  # of the kernel's own text
    pc: int
    operator: str
    old: str
    new: str
    # old -> new with constants for the registers that hold one, and without numbers
    shape: str

    def __str__(self) -> str:
        return f"{describe(self.kernel)}:{self.line}: {shorten(self.old)} -> {shorten(self.new)}"


def describe(name: Name) -> str:
    scale = f"bounded {name.scale}" if name.bounded else name.scale
    return f"{name.form} {name.op} {scale} {name.dtype} {name.source}"


def shorten(text: str) -> str:
    """Parameters are named after their kernel."""
    return re.sub(r"\b_Z\w+_(param_\d+)", r"\1", text)


_INTEGER = re.compile(r"-?\d+")
_FLOAT = re.compile(r"0f[0-9A-F]{8}")
_REGISTER = re.compile(r"%[a-z]+\d+")
_DROPPED = "membar.cta"  # which does nothing
_COMPARISONS = {
    "lt": ("le", "gt"),
    "le": ("lt", "ge"),
    "gt": ("ge", "lt"),
    "ge": ("gt", "le"),
    "eq": ("ne",),
    "ne": ("eq",),
}
_OTHER_OPERATION = {
    "add": ("sub",),
    "sub": ("add",),
    "and": ("or", "xor"),
    "or": ("and", "xor"),
    "xor": ("and", "or"),
    "min": ("max",),
    "max": ("min",),
    "shl": ("shr",),
    "shr": ("shl",),
    "div": ("rem",),
    "rem": ("div",),
}
_HALF_WIDTH = {"64": "32", "32": "16", "16": "8"}


def float_neighbours(literal: str) -> list[str]:
    bits = int(literal[2:], 16)
    return [f"0f{bits + step:08X}" for step in (1, -1) if 0 <= bits + step < 2**32]


def is_power_of_two(literal: str) -> bool:
    return bool(_FLOAT.fullmatch(literal)) and int(literal[2:], 16) & 0x7FFFFF == 0


class Mutator:
    """The mutants of a kernel's instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, Name.parse(kernel.name)
        self.constants: dict[str, str] = {}
        written = Counter(
            kernel.register_names[d.slot] for i in kernel.instructions for d in i.destinations if d
        )
        for instruction in kernel.instructions:
            m = re.fullmatch(r"mov\.\w+ (%\w+), (0f\w+|-?\d+)", instruction.text)
            if m is not None and written[m[1]] == 1:
                self.constants[m[1]] = m[2]

    def __iter__(self) -> Iterator[Mutant]:
        for pc, instruction in enumerate(self.kernel.instructions):
            seen = {instruction.text}
            for operator, new in self._changes(instruction.text):
                if new not in seen:
                    seen.add(new)
                    shape = f"{self._shape(instruction.text)} -> {self._shape(new)}"
                    yield Mutant(
                        self.name, instruction.line, pc, operator, instruction.text, new, shape
                    )

    def _shape(self, text: str) -> str:
        def value(m: re.Match[str]) -> str:
            return self.constants.get(m[0], m[0].rstrip("0123456789"))

        destination, comma, rest = shorten(text).partition(",")
        destination = re.sub(r"(%[a-z]+)\d+", r"\1", destination)
        return re.sub(r"\$L\w+", "$L", destination + comma + _REGISTER.sub(value, rest))

    def _changes(self, text: str) -> Iterator[tuple[str, str]]:
        guard, instruction = re.fullmatch(r"(@!?%\w+ )?(.*)", text).groups("")  # type: ignore[union-attr]
        opcode, _, rest = instruction.partition(" ")
        if guard:
            yield (
                "branch",
                (guard[:1] + guard[2:] if "!" in guard else "@!" + guard[1:]) + instruction,
            )
            yield "branch", instruction
        if opcode.split(".")[0] in ("bra", "ret", "st"):
            yield "drop", _DROPPED
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        for operator, new_opcode, new_parts in self._instruction_changes(opcode, parts):
            yield operator, f"{guard}{new_opcode} {', '.join(new_parts)}"

    def _instruction_changes(
        self, opcode: str, parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        base, *modifiers = opcode.split(".")
        kind = modifiers[-1] if modifiers else ""
        if base in ("ld", "st"):
            yield from self._access_changes(opcode, parts)
            return
        if base in ("bra", "ret"):
            return
        destination, *sources = parts
        values = [self.constants.get(source, source) for source in sources]
        if base == "cvta" or (base == "mul" and "0" in values):
            return
        yield from self._opcode_changes(base, modifiers, parts)
        ordered = base in ("sub", "div", "rem", "shl", "shr") or (
            base == "cvt" and len(sources) == 2
        )
        if ordered and (_REGISTER.match(sources[1]) or base in ("sub", "div")):
            yield "swap", opcode, [destination, sources[1], sources[0]]
        if base in ("fma", "mad"):
            yield "swap", opcode, [destination, sources[0], sources[2], sources[1]]
        if len(sources) == 2 and base not in ("min", "max", "cvt"):
            yield "same", opcode, [destination, sources[0], sources[0]]
        for k, source in enumerate(sources):
            for operator, value in self._constant_changes(source):
                yield operator, opcode, [destination, *sources[:k], value, *sources[k + 1 :]]
        yield from self._dropped(base, kind, destination, sources)

    def _constant_changes(self, source: str) -> Iterator[tuple[str, str]]:
        if _INTEGER.fullmatch(source):
            yield "constant", str(int(source) + 1)
            yield "constant", str(int(source) - 1)
        elif _FLOAT.fullmatch(source):
            for value in float_neighbours(source):
                yield "constant", value
            yield "sign", f"0f{int(source[2:], 16) ^ 1 << 31:08X}"

    def _opcode_changes(
        self, base: str, modifiers: list[str], parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        def joined(base: str, modifiers: list[str]) -> str:
            return ".".join([base, *modifiers])

        kind = modifiers[-1] if modifiers else ""
        for other in _OTHER_OPERATION.get(base, ()):
            if (base, other) == ("shl", "shr"):
                yield "operation", joined(other, ["u" + kind[1:]]), parts
            elif (base, other) == ("shr", "shl"):
                yield "operation", joined(other, ["b" + kind[1:]]), parts
            else:
                yield "operation", joined(other, modifiers), parts
        flipped = {"u": "s", "s": "u"}.get(kind[:1], "") + kind[1:]
        if base == "mul" and modifiers[0] in ("lo", "hi"):
            part = {"lo": "hi", "hi": "lo"}[modifiers[0]]
            yield "operation", joined(base, [part, kind]), parts
        if base in ("fma", "mad"):
            without = [*modifiers] if base == "fma" else [modifiers[0], kind]
            yield "operation", joined("mul", without), parts[:3]
            yield "operation", joined("add", modifiers if base == "fma" else [kind]), [
                parts[0], parts[1], parts[3],
            ]  # fmt: skip
        if base == "min" and "xorsign" in modifiers:
            yield "operation", "min.NaN.f32", parts
            yield "operation", "min.xorsign.abs.f32", parts
        if base in ("min", "max") and modifiers == ["NaN", "f32"]:
            yield "operation", f"{base}.f32", parts
        if base == "rsqrt":
            yield "operation", "rcp.approx.ftz.f32", parts
            yield "operation", "sqrt.approx.ftz.f32", parts
        if base == "setp":
            for comparison in _COMPARISONS[modifiers[0]]:
                yield "compare", joined(base, [comparison, *modifiers[1:]]), parts
        signed_matters = (
            base in ("min", "max", "div", "rem", "shr")
            or (base == "mul" and modifiers[0] in ("hi", "wide"))
            or (base == "setp" and modifiers[0] not in ("eq", "ne"))
        )
        if base == "shr" and parts[-1] == "32":
            signed_matters = False  # the upper half, which is all that is used
        if signed_matters and kind[:1] in "us" and kind[1:].isdigit():
            yield "sign", joined(base, [*modifiers[:-1], flipped]), parts
        if base == "cvt":
            yield from self._conversion_changes(modifiers, parts)
        elif "rn" in modifiers and base != "sub":
            exact = base == "mul" and any(
                is_power_of_two(self.constants.get(p, p)) for p in parts[1:]
            )
            if not exact:
                yield "rounding", joined(base, ["rz" if m == "rn" else m for m in modifiers]), parts

    def _conversion_changes(
        self, modifiers: list[str], parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        *rounding, to, source = modifiers
        if rounding:
            yield "rounding", ".".join(["cvt", "rz", to, source]), parts
        if source in ("u32", "s32") and (to[0] == "f" or int(to[1:]) > int(source[1:])):
            other = {"u": "s", "s": "u"}[source[0]] + source[1:]
            yield "sign", ".".join(["cvt", *rounding, to, other]), parts
        if source in ("u64", "s64", "u32", "s32") and to[0] != "f":
            narrow = source[0] + _HALF_WIDTH[source[1:]]
            if to != narrow:
                yield "width", ".".join(["cvt", to, narrow]), parts
            else:
                yield "width", ".".join(["cvt", to, source[0] + _HALF_WIDTH[narrow[1:]]]), parts

    def _access_changes(
        self, opcode: str, parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        base, *modifiers = opcode.split(".")
        kind = modifiers[-1]
        count = int(modifiers[-2][1:]) if modifiers[-2] in ("v2", "v4") else 1
        at = 0 if base == "st" else 1
        inside = parts[at][1:-1]
        where, _, offset = inside.partition("+")
        width = count * int(kind[1:]) // 8
        for step in (width, -width) if offset else (width,):
            moved = list(parts)
            moved[at] = f"[{where}+{int(offset or 0) + step}]"
            if moved[at].endswith("+0]"):
                moved[at] = f"[{where}]"
            yield "address", opcode, moved
        if count > 1:
            halved = [m if m != f"v{count}" else f"v{count // 2}" for m in modifiers]
            lanes = parts[1 - at][1:-1].split(",")
            narrow = list(parts)
            narrow[1 - at] = "{" + ",".join(lanes[: count // 2]) + "}"
            halved = [m for m in halved if m != "v1"]
            yield "width", ".".join([base, *halved]), narrow
            swapped = list(parts)
            swapped[1 - at] = "{" + ",".join([lanes[1], lanes[0], *lanes[2:]]) + "}"
            yield "swap", opcode, swapped
        elif kind[0] != "f":
            half = kind[0] + _HALF_WIDTH[kind[1:]]
            yield "width", ".".join([base, *modifiers[:-1], half]), parts
        if base == "ld" and count == 1:
            mov = "mov.f32" if kind == "f32" else f"mov.b{kind[1:]}"
            yield "drop", mov, [parts[0], "0f00000000" if kind == "f32" else "0"]

    def _dropped(
        self, base: str, kind: str, destination: str, sources: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        """The destination gets a source that fits it, or 0."""
        register = destination.rstrip("0123456789")
        type_name = {"%f": "f32", "%r": "b32", "%rd": "b64", "%rs": "b16"}.get(register)
        if type_name is None:
            return  # a predicate, whose branch is changed; or the halves of a word
        fitting = [s for s in sources if s.rstrip("0123456789") == register]
        if base == "mov":
            fitting = []
        zero = "0f00000000" if type_name == "f32" else "0"
        if sources != [zero]:
            yield "drop", f"mov.{type_name}", [destination, fitting[0] if fitting else zero]


class Workbench:
    """Makes a kernel with one instruction changed, without reading all of it again."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.split("\n")
        (self.kernel,) = Module.parse(source).kernels.values()
        self.head = source[: source.index("{\n", source.index(".visible")) + 2]
        declared = re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", source)
        self.types = {prefix: kind for kind, prefix in declared}
        names = self.kernel.register_names
        self.slots = {name: slot for slot, name in enumerate(names)}
        # of an asm statement in braces: the same name may be declared again
        self.scoped = {name for name in names if name.isidentifier()}
        self.targets = {
            i.text.split()[-1]: i.target for i in self.kernel.instructions if i.target >= 0
        }

    def mutated(self, mutant: Mutant) -> Kernel:
        """Raises PTXError if the new text is none."""
        original = self.kernel.instructions[mutant.pc]
        if self.scoped & set(re.findall(r"(?<![%.\w])\w+", mutant.new)):
            return self._parsed_again(mutant)
        used = sorted(set(_REGISTER.findall(mutant.new)))
        declared = "".join(f".reg .{self.types[r.rstrip('0123456789')]} {r};\n" for r in used)
        label = re.search(r"\$L\w+", mutant.new)
        text = f"{self.head}{declared}{label[0] + ':' if label else ''} {mutant.new};\n}}\n"
        (small,) = Module.parse.__wrapped__(text).kernels.values()
        (new,) = small.instructions
        names = {slot: self.slots[name] for slot, name in enumerate(small.register_names)}
        new = replace(
            new,
            line=original.line,
            guard=names.get(new.guard, -1),
            destinations=tuple(d and replace(d, slot=names[d.slot]) for d in new.destinations),
            sources=tuple(replace(s, slot=names.get(s.slot, -1)) for s in new.sources),
            base=new.base and replace(new.base, slot=names.get(new.base.slot, -1)),
            target=self.targets[label[0]] if label else -1,
        )
        instructions = list(self.kernel.instructions)
        instructions[mutant.pc] = new
        return replace(self.kernel, instructions=instructions)

    def _parsed_again(self, mutant: Mutant) -> Kernel:
        line = self.lines[mutant.line - 1]
        (statement,) = [part for part in line.split(";") if " ".join(part.split()) == mutant.old]
        changed = line.replace(statement, mutant.new)
        lines = [*self.lines[: mutant.line - 1], changed, *self.lines[mutant.line :]]
        (kernel,) = Module.parse.__wrapped__("\n".join(lines)).kernels.values()
        return kernel


@dataclass
class Verdict:
    mutant: Mutant
    killer: str  # the case, or '' for a survivor
    # of a survivor: "masked" if a case changed a register, or may have; "unreached" if none came by
    how: str


def judge(mutants: list[Mutant], bench: Workbench, cases: list[Case]) -> list[Verdict]:
    """Verdicts on mutants of one kernel."""
    verdicts: list[Verdict] = []
    alive: dict[Mutant, Kernel] = {}
    masked: Counter[Mutant] = Counter()
    for mutant in mutants:
        try:
            alive[mutant] = bench.mutated(mutant)
        except PTXError:
            verdicts.append(Verdict(mutant, "parsing", "error"))
    for case in cases:
        for mutant in infecting(bench.kernel, alive, case) if alive else ():
            if how := case.execute(alive[mutant]):
                verdicts.append(Verdict(mutant, case.name, how))
                del alive[mutant]
            else:
                masked[mutant] += 1
    for mutant in alive:
        reached = any(case.executed[mutant.pc] for case in cases)
        how = "masked" if masked[mutant] else "" if reached else "unreached"
        verdicts.append(Verdict(mutant, "", how))
    return verdicts


def infecting(kernel: Kernel, mutants: dict[Mutant, Kernel], case: Case) -> list[Mutant]:
    """The mutants that may make a difference to a case: only these need a run of their own.

    One run of the unchanged kernel tells: each instruction computes its mutants' results too.
    """
    infected: set[Mutant] = set()
    instructions = list(kernel.instructions)
    comparable: dict[int, list[Mutant]] = {}
    for mutant, changed in mutants.items():
        old, new = instructions[mutant.pc], changed.instructions[mutant.pc]
        if not case.executed[mutant.pc] and old.guard < 0:
            continue
        arithmetic = "f32 " in mutant.old and mutant.old[:3] not in ("ld.", "st.")
        if case.about == ("places" if arithmetic else "values"):
            continue
        if (
            old.operation.kind == new.operation.kind == "alu"
            and old.destinations == new.destinations
            and len(old.destinations) == 1
            and old.guard < 0
        ):
            comparable.setdefault(mutant.pc, []).append(mutant)
        else:
            infected.add(mutant)
    for pc, here in comparable.items():
        others = {mutant: mutants[mutant].instructions[pc] for mutant in here}
        instructions[pc] = _beside(instructions[pc], others, infected)
    if comparable:
        case.execute(replace(kernel, instructions=instructions))
    return [mutant for mutant in mutants if mutant in infected]


def _beside(
    instruction: Instruction, others: dict[Mutant, Instruction], infected: set[Mutant]
) -> Instruction:
    """The instruction, noting in `infected` which of the others give another result."""
    own, count = instruction.operation.function, len(instruction.sources)
    (destination,) = instruction.destinations
    assert own is not None
    assert destination is not None
    dtype = destination.dtype
    sources = list(instruction.sources)
    parts: dict[Mutant, tuple[Callable[..., Array], slice]] = {}
    for mutant, other in others.items():
        assert other.operation.function is not None
        parts[mutant] = (
            other.operation.function,
            slice(len(sources), len(sources) + len(other.sources)),
        )
        sources += other.sources

    def bits(value: Array) -> Array:
        """What Threads.write puts into the register."""
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        signed = value.dtype.kind == "i"
        wide = value.astype(f"i{dtype.itemsize}") if signed else value.view(f"u{value.itemsize}")
        return wide.view(dtype) if signed else wide.astype(dtype)

    def compute(*values: Array) -> Array:
        result: Array = own(*values[:count])
        for mutant, (function, part) in parts.items():
            if mutant not in infected and (bits(function(*values[part])) != bits(result)).any():
                infected.add(mutant)
        return result

    operation = replace(instruction.operation, function=compute)
    return replace(instruction, operation=operation, sources=tuple(sources))


@dataclass(frozen=True)
class Work:
    """The mutants of one kernel."""

    arch: int
    kernel_name: str
    mutants: list[Mutant]
    largest: int = 2**20  # elements of a case

    def done(self) -> tuple[list[Verdict], int]:
        """The verdicts, and how many instructions no case reaches."""
        stand_in = attach()
        stand_in.reset()
        name = Name.parse(self.kernel_name)
        cases = make_cases(Gpu(stand_in, self.arch), name, self.largest)
        verdicts = judge(self.mutants, Workbench(ptx(self.arch)[self.kernel_name]), cases)
        executed = np.array([case.executed for case in cases]).sum(axis=0)
        return verdicts, int((executed == 0).sum())


def kernel_names(arch: int, dtypes: Iterable[str]) -> dict[Name, str]:
    """The names of kernels, by what they mean. Those of samples have no cases yet."""
    wanted = set(dtypes)
    names = {Name.parse(text): text for text in ptx(arch).keys() - set(OF_KEYS)}
    return {n: text for n, text in names.items() if n.dtype in wanted and n.form != "samples"}


def kernel_of(arch: int, kernel_name: str) -> Kernel:
    return Module.parse(ptx(arch)[kernel_name]).kernels[kernel_name]


def judge_all(work: list[Work], processes: int) -> tuple[list[Verdict], Counter[str]]:
    """In processes of their own: what the cases of a kernel take of the device ends with one."""
    verdicts: list[Verdict] = []
    unreached: Counter[str] = Counter()
    with get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        results = pool.imap(Work.done, work, chunksize=1)
        for n, (item, (found, missing)) in enumerate(zip(work, results, strict=True), 1):
            verdicts += found
            unreached[describe(item.mutants[0].kernel)] += missing
            print(f"{n} of {len(work)} kernels", file=sys.stderr, flush=True)
    return verdicts, +unreached


class Harmless(NamedTuple):
    """Why mutants may survive: `operator kernel: shape` matches the pattern.

    If `same`, a survivor is excused only where it gave the result of the original every time that
    any case ran it, before anything that follows could hide a difference.
    """

    pattern: str
    reason: str
    same: bool = False
    unreached: bool = False  # excused only where no case comes by


HARMLESS = [
    # Arithmetic that is exact
    Harmless(
        r"^rounding .*: cvt\.rn\.f32\.s32",
        "the exponent in its place: 8 significant bits at most",
        same=True,
    ),
    Harmless(r"^rounding .*: mul\.rn\.f32 %f, %f, %f ", "a product with 2^h", same=True),
    # Integers that never have the bit in question
    Harmless(
        r"^sign (rows|elements) .*: "
        r"(setp\.ge\.u32|mul\.wide\.u32 %rd, %r, [24] |cvt\.u64\.u32|min\.u32)",
        "every count and index is below 2^31 (launch.cpp)",
        same=True,
    ),
    Harmless(
        r"^sign rows .*: shr\.u32 %r, %r, %r ",
        "vectors are below 2^29, and what is shifted is below twice that",
        same=True,
    ),
    Harmless(
        r"^sign whole .*: (mul\.wide\.u32 %rd, %r, \d+|cvt\.u64\.u32 %rd, %r|setp\.lt\.u32)",
        "block and thread numbers are below 2^31",
        same=True,
    ),
    Harmless(
        r"^sign .*: (min\.[su]64|setp\.(lt|ge)\.[su]64)",
        "64-bit indices and counts are below 2^63",
        same=True,
    ),
    Harmless(
        r"^sign .*: (setp\.(lt|ge)\.s32|mul\.wide\.s32 %rd, %r, 8) ",
        "ndim, a dimension, or what is left of 4: never negative",
        same=True,
    ),
    Harmless(
        r"^width .*: (ld\.param\.u32 .* -> ld\.param\.u16|cvt\.u64\.u32 .* -> cvt\.u64\.u16)",
        "ndim, a divisor's shift, a thread's number: below 2^16",
    ),
    Harmless(
        r": shr\.[us]64 %rd, %rd, 6[23] -> shr\.[us]64 %rd, %rd, 6\d$",
        "the bias of a signed division by 4: indices are never negative",
        same=True,
    ),
    Harmless(
        r"^\w+ (rows|elements) .*: mul\.lo\.s32 %r, %r, %r -> ",
        "the upper half of an innermost stride, which is 0 where runs are of vectors, and of the "
        "output",
        same=True,
    ),
    # The ways through the code
    Harmless(
        r" whole \w+ \w+ float32 ",
        "the fourth of a vector that is not whole, which in float32 has three at most",
        unreached=True,
    ),
    Harmless(
        r": (setp\.lt\.s32 %p, (%r, 2|1, %r|%r, %r) |mov\.u32 %r, 1 -> )",
        "a further turn of the loop over dimensions: the quotient by the outermost size is 0, the "
        "remainder the index, so that the last step adds the same",
    ),
    Harmless(
        r"^drop (rows|elements) .*: @%p bra ",
        "the loop over dimensions for only one: as a further turn of it",
    ),
    Harmless(
        r"^drop .*: mov\.u64 %rd, %rd -> mov\.b64 %rd, 0", "a sum that starts at 0", same=True
    ),
    Harmless(
        r"^(compare whole.*: setp\.(lt|ge)\.s64|constant whole.*: add\.s64 %rd, %rd, 512 )",
        "a turn with no elements left writes none of them",
    ),
    Harmless(
        r": setp\.lt\.s32 %p, %r, 1 -> |drop .*: @%p bra ",
        "a counter has an element at least: the first of them is always there",
        same=True,
    ),
    Harmless(
        r"^(operation|drop) whole.*: sub\.s64 %rd, %rd, %rd -> (add|mov)",
        "what is left before the first element of a counter, which is always there",
    ),
    Harmless(
        r"^constant .*: min\.[su](64|32) %rd?, %rd?, [34] ",
        "what is left is only compared with 1 to 4: any bound that the comparison does not reach",
    ),
    Harmless(
        r" (generator|none): (mul\.lo|mul\.hi|mad\.lo|div|rem|ld\.param\.u32 %r, \[param_[567])",
        "there is one slice: its number is 0, the quotient and what it is multiplied with unused",
    ),
    Harmless(
        r"^drop whole.*: min\.s64 %rd, %rd, [34] ",
        "less than a vector is left",
    ),
    Harmless(r" Generator: shr\.u32 %r, %r, %r ", "there is one slice: its number is not used"),
    Harmless(
        r"^width .* key: ld\.param\.u64 %rd, \[%rd\+648\] -> ld\.param\.u32",
        "the stride of keys, which is beyond 2^32 only where they take 32 GiB",
    ),
    Harmless(
        r"^drop .* Generator: ld\.param\.u64 %rd, \[%rd\+\d+\] ",
        "there is one key: its strides are not used",
    ),
    Harmless(
        r" bfloat16 .*: fma\.rn\.f32 %f, %f, 0f2F800000, 0f2F000000 -> mul",
        "the half step of u: shown by one word of 256, but not in 8 bits of a normal",
    ),
    # A divergence
    Harmless(
        r" kl_divergence log_var .*: min\.NaN\.xorsign\.abs\.f32 %f, %f, 0f42B40000 -> min\.xor",
        "log_var stands beside its exponential: its NaN comes through there",
    ),
    Harmless(
        r" kl_divergence\w* \w+ bfloat16 .*: (and\.b32 %r, %r, (2147483647|-65536) -> and"
        r"|mov\.f32 %f, 0fB102E308 )",
        "the last bit before the rounding to 8 bits, a bit below those of the input, and what ln 2 "
        "has beyond 24 bits",
    ),
    Harmless(
        r"^operation .*: or\.b64 %rd, %rd, -?\d+ -> xor\.b64",
        "added where its bits are clear",
    ),
    # Philox and Box-Muller
    Harmless(
        r"^constant .*: mov\.u32 %r, 0 -> mov\.u32 %r, 1$",
        "the upper half of 1 times a 32-bit number is 0, as that of 0",
    ),
    Harmless(
        r"^drop .*: mov\.u32 %r, -845247145 ",
        "the multiplier of a word that is 0 in the first round",
    ),
    Harmless(
        r": xor\.b32 %r, %r, %r -> or\.b32",
        "the sign bit of a radius, and the first round's product with 0, are clear",
        same=True,
    ),
    Harmless(
        r"^constant .*: add\.s32 %r, %r, -1060439283",
        "moves one float of 2^24 to the other side of sqrt(1/2), where the polynomial still holds",
    ),
    Harmless(
        r": (mov\.f32 %f, 0f21800000 |fma\.rn\.f32 %f, %f, 0fB4317218, 0f21800000 )",
        "2^-60 is there for u = 1, 128 words of 2^32, and lost on any other sum but a tie",
    ),
    Harmless(
        r"^constant .*: mov\.f32 %f, 0f3F000000 ",
        "one ULP of a Newton step's correction is 2^-47 of the root",
    ),
    Harmless(
        r"^constant .*: mov\.f32 %f, 0f43800000 ",
        "clamp: past 256 sigma is inf or 0 already, and stays so up to the next float",
    ),
    Harmless(
        r"^(constant .*: mov\.f32 %f, 0f|rounding .*: (fma|mul)\.rn\.f32 )",
        "one ULP in a term of a polynomial: other bits in a register, but none in the output of "
        "2^20 elements, whose x are aimed at the last bits (of some 100 in the last vector of "
        "contiguous tensors, where that is not whole)",
    ),
]


def reason_for(verdict: Verdict) -> str:
    """Why a survivor is harmless, or ''."""
    mutant = verdict.mutant
    text = f"{mutant.operator} {describe(mutant.kernel)}: {mutant.shape}"
    for harmless in HARMLESS:
        if harmless.same and verdict.how == "masked":
            continue
        if harmless.unreached and verdict.how != "unreached":
            continue
        if re.search(harmless.pattern, text):
            return harmless.reason
    return ""


def report(verdicts: list[Verdict], unreached: Mapping[str, int]) -> str:
    def table(title: str, label: Callable[[Verdict], str]) -> list[str]:
        total = Counter(label(v) for v in verdicts)
        killed = Counter(label(v) for v in verdicts if v.killer)
        width = max(map(len, total)) + 2
        rows = [f"{title:{width}} mutants  killed"]
        for key, n in sorted(total.items()):
            rows.append(f"{key:{width}} {n:7}  {killed[key]:6}  {killed[key] / n:6.1%}")
        return [*rows, ""]

    survivors = [v for v in verdicts if not v.killer]
    lines = table("kernel", lambda v: describe(v.mutant.kernel))
    lines += table("operator", lambda v: v.mutant.operator)
    hows = Counter(v.how for v in verdicts if v.killer)
    lines += ["killed by " + ", ".join(f"{how} {n}" for how, n in hows.most_common()), ""]
    killers = Counter(v.killer for v in verdicts if v.killer)
    lines += ["by case", *(f"{n:7}  {case}" for case, n in killers.most_common()), ""]
    reasons: dict[str, list[Verdict]] = {}
    for v in survivors:
        reasons.setdefault(reason_for(v), []).append(v)
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(group)} survivors: {reason or 'NO REASON'}")
        shapes = Counter((v.mutant.operator, v.mutant.shape, v.how or "same") for v in group)
        for (operator, shape, how), n in shapes.most_common():
            lines.append(f"    {n:4} {operator} ({how}): {shape}")
        if not reason:
            lines += [f"    {v.mutant.operator}: {v.mutant}" for v in group]
        lines.append("")
    for where, n in unreached.items():
        lines.append(f"no case reaches {n} instructions of {where}")
    lines.append(
        f"{len(verdicts)} mutants, {len(verdicts) - len(survivors)} killed "
        f"({1 - len(survivors) / len(verdicts):.2%}), {len(survivors)} survivors, "
        f"{len(reasons.get('', []))} of them without a reason"
    )
    return "\n".join(lines)


def passes(verdicts: list[Verdict]) -> bool:
    survivors = [v for v in verdicts if not v.killer]
    return all(map(reason_for, survivors)) and len(survivors) <= (1 - FLOOR) * len(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="kernels whose name has all of these")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--every", type=int, default=7, help="run one of so many mutants")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants; all of them if 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    names = kernel_names(options.arch, options.dtypes)
    names = {n: m for n, m in names.items() if set(options.words) <= set(describe(n).split())}
    mutants = [
        m for kernel_name in names.values() for m in Mutator(kernel_of(options.arch, kernel_name))
    ]
    if options.sample:
        chosen = random.Random(options.seed).sample(range(len(mutants)), options.sample)
        mutants = [mutants[i] for i in sorted(chosen)]
    else:
        mutants = mutants[options.seed % options.every :: options.every]
    of: dict[Name, list[Mutant]] = {}
    for mutant in mutants:
        of.setdefault(mutant.kernel, []).append(mutant)
    work = [Work(options.arch, names[name], group) for name, group in of.items()]
    print(f"{len(mutants)} mutants, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    verdicts, unreached = judge_all(work, options.processes)
    print(report(verdicts, unreached))
    print(f"{time.monotonic() - began:.0f} s with {options.processes} processes")
    return 0 if passes(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
