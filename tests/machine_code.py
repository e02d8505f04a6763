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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
OF_KEYS = ("child_keys", "fold_in")  # the kernels that have no elements
ELEMENT_SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
VECTORS_PER_THREAD = 4
ARCHS = (80, 86, 89, 90, 100, 120)


class Name(NamedTuple):
    """The name of a kernel of csrc/cuda/kernels.cu, read."""

    form: str  # whole, rows or elements
    op: str
    scale: str  # log_var, which stands for none too, or std
    dtype: str
    index_bits: int
    source: str  # of the noise: key or generator, or none

    @staticmethod
    def parse(name: str) -> Name:
        m = re.fullmatch(
            r"(sample_backward|sample|noise|kl_divergence_backward|kl_divergence)"
            r"(?:_(log_var|std))?_(float32|float64|float16|bfloat16)(?:_(key|generator))?"
            r"_(whole|rows|elements)(32|64)?",
            name,
        )
        if m is None:
            raise ValueError(f"not a kernel of elements of csrc/cuda: {name}")
        return Name(m[5], m[1], m[2] or "log_var", m[3], int(m[6] or 64), m[4] or "none")


class Instruction(NamedTuple):
    address: int
    guarded: bool
    opcode: str
    target: str | None  # label of a branch
    registers: tuple[str, ...]  # in the order of the text


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
        # A step is an instruction, and how many stores lie behind it.
        width = stores + 1
        forward: list[list[int]] = [[] for _ in range(len(self.instructions) * width)]
        ends = []
        for i, ins in enumerate(self.instructions):
            following = self._next(i)
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
        return [self.instructions[i] for i in sorted({step // width for step in on_path})]

    def hot_path(self) -> list[Instruction]:
        """That of a full block of a kernel for contiguous tensors."""
        return self.path(VECTORS_PER_THREAD)

    def slots_per_element(self, dtype: str, vectors: int = VECTORS_PER_THREAD) -> float:
        return len(self.path(vectors)) / (vectors * 16 // ELEMENT_SIZE[dtype])

    def loads_under_way(self) -> int:
        """How many 16-byte loads of the hot path have been issued and not yet waited for, at most.

        A thread waits where a register of a load is first named again.
        """
        most = 0
        waited_for: list[set[str]] = []
        for ins in self.hot_path():
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
        f"{'arch':8}{'form':10}{'index':7}{'op':24}{'scale':8}{'key':11}{'dtype':10}"
        "registers  spilled  16 B loads, stores  under way  instructions/element: full  one vector"
    ]
    for arch, group in kernels.items():
        for k in sorted(group, key=lambda k: (k.name.form != "whole", k.name)):
            loads = sum(map(is_vector_load, k.code.instructions))
            stores = sum(map(is_vector_store, k.code.instructions))
            full = one = under_way = ""
            if k.name.form == "whole":
                full = f"{k.code.slots_per_element(k.name.dtype):.2f}"
                under_way = str(k.code.loads_under_way())
            if k.name.form != "elements":
                one = f"{k.code.slots_per_element(k.name.dtype, 1):.2f}"
            rows.append(
                f"sm_{arch:<5}{k.name.form:10}{k.name.index_bits:<7}{k.name.op:24}"
                f"{k.name.scale:8}{k.name.source:11}{k.name.dtype:10}{k.registers:9}"
                f"{k.spilled_bytes:9}{f'{loads}, {stores}':>20}{under_way:>11}{full:>28}{one:>12}"
            )
    return "\n".join(rows)


def main() -> None:
    print(table(all_kernels(tuple(int(a) for a in sys.argv[1:]) or ARCHS)))


if __name__ == "__main__":
    main()
