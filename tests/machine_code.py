"""What ptxas made of the CUDA kernels: a table, and the figures that the tests hold it to.

    python tests/machine_code.py           the table for every architecture
    python tests/machine_code.py 90 100    for these

Needs nvcc, and nvdisasm, which comes with the triton wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
OF_KEYS = ("child_keys", "fold_in")  # the kernels that have no elements
ELEMENT_SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
VECTORS_PER_THREAD = 4
FORMS = ("log_var", "std", "log_std", "rho")
_DTYPE_AND_SOURCE = r"(float32|float64|float16|bfloat16)(?:_(key|generator))?"
ARCHS = (80, 90, 100, 120)  # those of setup.py


class Name(NamedTuple):
    """The name of a kernel of csrc/cuda/kernels.cu, read."""

    form: str  # whole, rows, elements, samples, head, kl_head (a head of one form) or sum
    op: str
    scale: str  # the form of it, any, or none
    bounded: bool  # "any" is so as well where it is asked for
    dtype: str
    source: str  # of the noise: key or generator, or none

    @staticmethod
    def parse(name: str) -> Name:
        m = re.fullmatch(
            r"(sample_backward|sample|kl_divergence_backward|kl_divergence)_(bounded_)?"
            rf"({'|'.join(FORMS)})_{_DTYPE_AND_SOURCE}_(whole|rows)",
            name,
        )
        if m is not None:
            return Name(m[6], m[1], m[3], m[2] is not None, m[4], m[5] or "none")
        m = re.fullmatch(rf"noise_{_DTYPE_AND_SOURCE}_(whole|rows|elements)", name)
        if m is not None:
            return Name(m[3], "noise", "none", False, m[1], m[2])
        m = re.fullmatch(rf"(head_backward|head)(_kl_log_var)?_{_DTYPE_AND_SOURCE}", name)
        if m is not None:
            of_one = m[2] is not None
            form, scale = ("kl_head", "log_var") if of_one else ("head", "any")
            return Name(form, m[1], scale, False, m[3], "key")
        m = re.fullmatch(rf"sum_{_DTYPE_AND_SOURCE}", name)
        if m is not None:
            return Name("sum", "sum", "none", False, m[1], "none")
        m = re.fullmatch(
            r"(?:(samples_backward|samples)|"
            r"(sample_backward|sample|kl_divergence_backward|kl_divergence))"
            rf"_{_DTYPE_AND_SOURCE}(_elements)?",
            name,
        )
        if m is None or (m[1] is None) == (m[5] is None):
            raise ValueError(f"not a kernel of elements of csrc/cuda: {name}")
        form = "samples" if m[1] else "elements"
        return Name(form, m[1] or m[2], "any", False, m[3], m[4] or "none")


class Instruction(NamedTuple):
    address: int
    guarded: bool
    opcode: str
    target: str | None  # label of a branch
    registers: tuple[str, ...]  # in the order of the text


# Found once for all tests: with the instructions, so that no others come to lie where they do.
_paths: dict[tuple[int, int], tuple[list[Instruction], list[Instruction]]] = {}


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # to a position among them

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    def path(self, stores: int) -> list[Instruction]:
        """What a thread runs that makes so many 16-byte stores, from the entry to the end.

        Counted statically, so that both sides of a short branch count: never too few. There is
        always such a path where it is asked for: an empty one would be below every ceiling.
        """
        known = _paths.get((id(self.instructions), stores))
        if known is None:
            known = self.instructions, self._find_path(stores)
            _paths[id(self.instructions), stores] = known
        return known[1]

    def once(self, stores: int) -> list[int]:
        """The same of a thread that goes once through every loop; as positions."""
        return self._find_positions(stores, loops=False)

    def _find_path(self, stores: int) -> list[Instruction]:
        return [self.instructions[i] for i in self._find_positions(stores)]

    def _find_positions(self, stores: int, *, loops: bool = True) -> list[int]:
        # A step is an instruction, and how many stores lie behind it.
        width = stores + 1
        forward: list[list[int]] = [[] for _ in range(len(self.instructions) * width)]
        ends = []
        for i, ins in enumerate(self.instructions):
            following = [j for j in self._next(i) if loops or j > i]
            for done in range(width):
                after = done + is_vector_store(ins)
                if after <= stores:
                    forward[i * width + done] = [j * width + after for j in following]
                    if after == stores and (not following or ins.opcode.startswith("EXIT")):
                        ends.append(i * width + done)
        backward: list[list[int]] = [[] for _ in forward]
        for step, following in enumerate(forward):
            for other in following:
                backward[other].append(step)
        on_path = _reachable([0], forward) & _reachable(ends, backward)
        if not on_path:
            raise ValueError(f"no path from the entry with {stores} 16-byte stores")
        return sorted({step // width for step in on_path})

    def loop(self, opcode: str, width: str) -> list[Instruction]:
        """The shortest way once around a loop, with such an access in it.

        There is one loop with it, and always a way where it is asked for.
        """

        def reaches(start: int, end: int) -> list[int]:
            def after(i: int, done: bool) -> tuple[int, bool]:
                ins = self.instructions[i]
                return i, done or (ins.opcode.startswith(opcode) and f".{width}" in ins.opcode)

            first = after(start, False)
            before: dict[tuple[int, bool], tuple[int, bool] | None] = {first: None}
            steps = deque([first])
            while steps:
                step: tuple[int, bool] | None = steps.popleft()
                assert step is not None
                if step == (end, True):
                    way = []
                    while step is not None:
                        way.append(step[0])
                        step = before[step]
                    return way[::-1]
                for i in self._next(step[0]) if step[0] != end else []:
                    following = after(i, step[1])
                    if following not in before:
                        before[following] = step
                        steps.append(following)
            return []

        jumps = [(i, ins.target) for i, ins in enumerate(self.instructions) if ins.target]
        backward = [(self.labels[t], i) for i, t in jumps if self.labels.get(t, i + 1) <= i]
        ways = [way for start, end in backward if (way := reaches(start, end))]
        if not ways:
            raise ValueError(f"no loop with {opcode} of {width}")
        return [self.instructions[i] for i in min(ways, key=len)]

    def hot_path(self) -> list[Instruction]:
        """That of a full block of a kernel for contiguous tensors."""
        return self.path(VECTORS_PER_THREAD)

    def slots_per_element(self, dtype: str, vectors: int = VECTORS_PER_THREAD) -> float:
        return len(self.path(vectors)) / (vectors * 16 // ELEMENT_SIZE[dtype])

    def slots_per_sample(self, name: Name) -> float:
        """Of each element, where the elements of a counter lie in a row and begin with it."""
        access = "STG" if name.op == "samples" else "LDG"
        size = ELEMENT_SIZE[name.dtype]
        way = self.loop(access, "64" if size == 2 else "128")
        return len(way) / (2 if size == 8 else 4)

    def full_chunk(self, name: Name) -> tuple[list[Instruction], float]:
        """What a thread of a head runs of a full chunk, once around, and slots for an element.

        Of half types a loop has two of its four vectors, of float32 there is none.
        """
        results = 2 if name.op == "head_backward" else 1
        per_vector = 16 // ELEMENT_SIZE[name.dtype]
        vectors = 16 // per_vector
        way = self.once(vectors * results)
        steps = len(way)
        for i in way:
            target = self.instructions[i].target
            if target is not None and (start := self.labels[target]) <= i:
                inside = [j for j in way if start <= j <= i]
                stores = sum(is_vector_store(self.instructions[j]) for j in inside)
                steps += (VECTORS_PER_THREAD * results // stores - 1) * len(inside)
        path = [self.instructions[i] for i in way]
        return path, steps / (VECTORS_PER_THREAD * per_vector)

    def loads_under_way(self, path: list[Instruction] | None = None) -> int:
        """How many 16-byte loads of the hot path have been issued and not yet waited for, at most.

        A thread waits where a register of a load is first named again.
        """
        most = 0
        waited_for: list[set[str]] = []
        for ins in path or self.hot_path():
            waited_for = [r for r in waited_for if r.isdisjoint(ins.registers)]
            if is_vector_load(ins):
                first = int(ins.registers[0][1:])
                waited_for.append({f"R{n}" for n in range(first, first + 4)})
            most = max(most, len(waited_for))
        return most

    def _next(self, i: int) -> list[int]:
        ins = self.instructions[i]
        following = [i + 1] if i + 1 < len(self.instructions) else []
        if ins.opcode.startswith("EXIT") or ins.opcode.startswith("RET"):
            return following if ins.guarded else []
        if ins.opcode.startswith("BRA") and ins.target is not None:
            taken = [self.labels[ins.target]]
            return taken + following if ins.guarded else taken
        return following


class Kernel(NamedTuple):
    name: Name
    registers: int
    stack_bytes: int
    spilled_bytes: int
    code: Code


def is_vector_load(ins: Instruction) -> bool:
    return ins.opcode.startswith("LDG") and ".128" in ins.opcode


def is_vector_store(ins: Instruction) -> bool:
    return ins.opcode.startswith("STG") and ".128" in ins.opcode


def _reachable(start: list[int], edges: list[list[int]]) -> set[int]:
    seen: set[int] = set()
    stack = list(start)
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack.extend(edges[i])
    return seen


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def nvcc(*arguments: str | Path) -> str:
    """Compile, as the build does; what ptxas reports."""
    # which needs no stand-in GPU (gpu/run.py)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = ["nvcc", "-std=c++17", "-O3", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stderr


def nvdisasm() -> str | None:
    """The disassembler of the triton wheel, or of a toolkit."""
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.is_file() else shutil.which("nvdisasm")


def disassemble(cubin: Path) -> str:
    tool = nvdisasm()
    assert tool is not None
    return subprocess.run(
        [tool, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def compile_kernels(arch: int) -> list[Kernel]:
    """All kernels for one architecture, as the build compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        report = nvcc("-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", SOURCE, "-o", cubin)
        listing = disassemble(cubin)
    return _parse(listing, report)


def _parse(listing: str, ptxas_report: str) -> list[Kernel]:
    resources = {}
    for m in re.finditer(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+.*?Used (\d+) registers",
        ptxas_report,
    ):
        resources[m[1]] = (int(m[5]), int(m[2]), int(m[3]) + int(m[4]))
    kernels = []
    for name, section in functions(listing):
        if name in OF_KEYS:
            continue
        code = parse_code(section)
        kernels.append(Kernel(Name.parse(name), *resources[name], code))
    return kernels


def functions(listing: str) -> Iterator[tuple[str, str]]:
    """The name and the text of each function of a disassembly."""
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", listing, flags=re.M)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        yield name, re.split(r"^\s*\.section\s", text, flags=re.M)[0]


def parse_code(text: str) -> Code:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^\s*([.$\w]+):\s*$", line):
            labels[label[1]] = len(code)
            continue
        ins = re.match(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)(.*?);", line)
        if ins is None or ins[3].startswith("NOP"):
            continue
        target = re.search(r"`\(([.$\w]+)\)", ins[4])
        guarded = ins[2] is not None
        if ins[3].startswith("BRA"):  # whose guard may be an operand: BRA.U UP0, `(.L_x_1)
            guarded |= re.match(r"\s*!?U?P\d", ins[4]) is not None
        code.append(
            Instruction(
                int(ins[1], 16),
                guarded,
                ins[3],
                target[1] if target else None,
                tuple(re.findall(r"\bR\d+\b", ins[4])),
            )
        )
    return Code(code, labels)


def all_kernels(archs: tuple[int, ...] = ARCHS) -> dict[int, list[Kernel]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, pool.map(compile_kernels, archs), strict=True))


def table(kernels: dict[int, list[Kernel]]) -> str:
    rows = [
        f"{'arch':8}{'form':10}{'op':24}{'scale':16}{'key':11}{'dtype':10}"
        "registers  spilled  16 B loads, stores  under way  instructions/element: full  one vector"
        "  sample"
    ]
    for arch, group in kernels.items():
        for k in sorted(group, key=lambda k: (k.name.form != "whole", k.name)):
            loads = sum(map(is_vector_load, k.code.instructions))
            stores = sum(map(is_vector_store, k.code.instructions))
            full = one = under_way = sample = ""
            if k.name.form == "whole":
                full = f"{k.code.slots_per_element(k.name.dtype):.2f}"
                under_way = str(k.code.loads_under_way())
            if k.name.form in ("whole", "rows"):
                one = f"{k.code.slots_per_element(k.name.dtype, 1):.2f}"
            if k.name.form == "kl_head":
                path, slots = k.code.full_chunk(k.name)
                full, under_way = f"{slots:.2f}", str(k.code.loads_under_way(path))
                results = 2 if k.name.op == "head_backward" else 1
                one_vector = len(k.code.once(results)) * ELEMENT_SIZE[k.name.dtype] / 16
                one = f"{one_vector:.2f}"
            if k.name.form == "samples":
                sample = f"{k.code.slots_per_sample(k.name):.2f}"
            scale = f"{'bounded ' if k.name.bounded else ''}{k.name.scale}"
            rows.append(
                f"sm_{arch:<5}{k.name.form:10}{k.name.op:24}"
                f"{scale:16}{k.name.source:11}{k.name.dtype:10}{k.registers:9}"
                f"{k.spilled_bytes:9}{f'{loads}, {stores}':>20}{under_way:>11}{full:>28}{one:>12}"
                f"{sample:>8}"
            )
    return "\n".join(rows)


def main() -> None:
    print(table(all_kernels(tuple(int(a) for a in sys.argv[1:]) or ARCHS)))


if __name__ == "__main__":
    main()
