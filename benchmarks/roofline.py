"""The least time that a call can take on a GPU, by its memory, its issue slots and its pipes.

    python benchmarks/roofline.py              # the table of docs/explanation/roofline.md
    python benchmarks/roofline.py --count 90   # COUNTS of an architecture, read from ptxas's code

A model, not a measurement: peak figures of NVIDIA's documents, and the instructions of the kernels
for whole contiguous tensors with a log_var and a key. --count needs nvcc and nvdisasm.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ELEMENTS = 2**26
BYTES = {"float32": 4, "bfloat16": 2}
TENSORS = 3  # two are read, one is written
#: Of one multiprocessor: schedulers that issue a warp's instruction a clock, and threads of a warp
SCHEDULERS, WARP = 4, 32


class GPU(NamedTuple):
    name: str
    code: int  # the architecture whose machine code it runs
    pipes: int  # its own architecture
    multiprocessors: int
    ghz: float
    terabytes_per_second: float


GPUS = (
    GPU("A100", 80, 80, 108, 1.41, 2.039),  # A100 80GB SXM: NVIDIA's data sheet, 2021
    GPU("RTX 4090", 80, 89, 128, 2.52, 1.008),  # NVIDIA Ada GPU Architecture, 2023
    GPU("H100", 90, 90, 132, 1.755, 3.35),  # H100 SXM: data sheet, 2023; clock assumed
    GPU("H200", 90, 90, 132, 1.755, 4.8),  # H200 SXM: data sheet, 2023; clock assumed
    GPU("B200", 100, 100, 148, 1.85, 8.0),  # HGX B200: data sheet, 2024; clock assumed
    GPU("RTX 5090", 120, 120, 170, 2.407, 1.792),  # NVIDIA RTX Blackwell architecture, 2025
)


class Count(NamedTuple):
    """Instructions of a thread, by the pipe that executes them."""

    elements: int
    fp32: int  # FFMA, FMUL, FADD
    imad: int
    wide: int  # a product of 64 bits
    alu: int  # logic, shifts, integer sums, comparisons
    conversion: int  # integer to float by I2F, where that is no instruction of the ALU
    mufu: int  # roots
    other: int  # loads, stores, the uniform pipe, branches

    @property
    def slots(self) -> int:
        return sum(self[1:])


COUNTS = {
    (80, "float32", "sample"): Count(16, 468, 8, 77, 194, 24, 8, 39),
    (80, "float32", "sample_backward"): Count(16, 484, 8, 77, 194, 24, 8, 39),
    (80, "bfloat16", "sample"): Count(32, 932, 16, 153, 450, 48, 16, 39),
    (80, "bfloat16", "sample_backward"): Count(32, 964, 16, 153, 450, 48, 16, 39),
    (90, "float32", "sample"): Count(16, 468, 8, 77, 199, 0, 8, 57),
    (90, "float32", "sample_backward"): Count(16, 484, 8, 77, 199, 0, 8, 57),
    (90, "bfloat16", "sample"): Count(32, 933, 16, 153, 464, 0, 16, 51),
    (90, "bfloat16", "sample_backward"): Count(32, 965, 16, 153, 464, 0, 16, 51),
    (100, "float32", "sample"): Count(16, 468, 8, 77, 199, 0, 8, 54),
    (100, "float32", "sample_backward"): Count(16, 485, 8, 77, 199, 0, 8, 53),
    (100, "bfloat16", "sample"): Count(32, 933, 16, 153, 464, 0, 16, 50),
    (100, "bfloat16", "sample_backward"): Count(32, 965, 16, 153, 464, 0, 16, 50),
    (120, "float32", "sample"): Count(16, 468, 8, 77, 183, 0, 8, 63),
    (120, "float32", "sample_backward"): Count(16, 485, 8, 77, 183, 0, 8, 61),
    (120, "bfloat16", "sample"): Count(32, 933, 16, 153, 442, 0, 16, 61),
    (120, "bfloat16", "sample_backward"): Count(32, 965, 16, 153, 442, 0, 16, 61),
}


def pipe_cycles(architecture: int, count: Count) -> dict[str, float]:
    """Cycles that each pipe of a scheduler is busy with one instruction of each kind.

    A pipe takes a warp in 2 cycles, a 64-bit product in 4, a root in 8. Before compute capability
    8.6 one pipe has all products and float32 sums; since then a second one shares the float32
    part. Sources: NVIDIA's throughput tables (CUDA C++ Programming Guide, "Arithmetic
    Instructions") and measurements that others have published; half rate of the 64-bit product is
    measured on the RTX 4090 and 5090, and assumed on the H100, H200 and B200.
    """
    integer = 2 * count.imad + 4 * count.wide
    total = 2 * count.fp32 + integer
    return {
        "FMA": total if architecture < 86 else max(integer, total / 2),
        "ALU": 2 * count.alu,
        "XU": 8 * (count.mufu + count.conversion),
    }


class Floor(NamedTuple):
    """Microseconds for ELEMENTS."""

    memory: float
    slots: float
    pipe: float
    pipe_name: str

    @property
    def binds(self) -> str:
        times = {"memory": self.memory, "issue slots": self.slots, self.pipe_name: self.pipe}
        return max(times, key=lambda name: times[name])

    @property
    def over_memory(self) -> float:
        return max(self[:3]) / self.memory


def floor(gpu: GPU, dtype: str, op: str) -> Floor:
    count = COUNTS[gpu.code, dtype, op]
    threads_at_once = gpu.multiprocessors * SCHEDULERS * WARP
    microseconds_a_cycle = ELEMENTS / count.elements / threads_at_once / (gpu.ghz * 1e3)
    pipe, cycles = max(pipe_cycles(gpu.pipes, count).items(), key=lambda item: item[1])
    memory = TENSORS * BYTES[dtype] * ELEMENTS / (gpu.terabytes_per_second * 1e6)
    slots = count.slots * microseconds_a_cycle
    return Floor(memory, slots, cycles * microseconds_a_cycle, f"{pipe} pipe")


def table() -> str:
    """In Markdown; every figure is modelled."""
    rows = [
        "| modelled, 2^26 elements | dtype | memory, us | issue slots, us | busiest pipe, us "
        "| what binds | time / memory, forward; backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for dtype in BYTES:
            forward, backward = (floor(gpu, dtype, op) for op in ("sample", "sample_backward"))
            rows.append(
                f"| {gpu.name} | {dtype} | {forward.memory:.0f} | {forward.slots:.0f} "
                f"| {forward.pipe:.0f} ({forward.pipe_name.removesuffix(' pipe')}) "
                f"| {forward.binds} | {forward.over_memory:.2f}; {backward.over_memory:.2f} |"
            )
    return "\n".join(rows)


PIPES = {
    "fp32": ("FFMA", "FADD", "FMUL", "HFMA2"),
    "wide": ("IMAD.WIDE", "IMAD.HI"),
    "imad": ("IMAD",),
    "alu": (
        "LOP3", "SHF", "IADD3", "ISETP", "FSETP", "FMNMX", "I2FP", "F2FP", "LEA", "MOV", "SEL",
        "PRMT",
    ),
    "conversion": ("I2F",),
    "mufu": ("MUFU",),
}  # fmt: skip


def pipe_of(opcode: str) -> str:
    for pipe, names in PIPES.items():
        if any(opcode == name or opcode.startswith(f"{name}.") for name in names):
            return pipe
    return "other"


def counted(architecture: int) -> dict[tuple[int, str, str], Count]:
    """The rows of COUNTS of an architecture, from what ptxas makes of the kernels today."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import machine_code  # type: ignore[import-not-found, unused-ignore]

    found = {}
    for kernel in machine_code.compile_kernels(architecture):
        name = kernel.name
        if name[:4] in {("whole", op, "log_var", False) for op in ("sample", "sample_backward")}:
            if name.source != "key" or name.dtype not in BYTES:
                continue
            pipes = Counter(pipe_of(i.opcode) for i in kernel.code.hot_path())
            elements = machine_code.VECTORS_PER_THREAD * 16 // BYTES[name.dtype]
            fields = (pipes[field] for field in Count._fields[1:])
            found[architecture, name.dtype, name.op] = Count(elements, *fields)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The modelled floors of a call on six GPUs.")
    parser.add_argument("--count", type=int, metavar="ARCH", help="count instructions again")
    arguments = parser.parse_args()
    if arguments.count is None:
        print(table())
        return
    for row, count in sorted(counted(arguments.count).items()):
        same = "as in COUNTS" if COUNTS.get(row) == count else f"COUNTS has {COUNTS.get(row)}"
        print(*row, count, same)


if __name__ == "__main__":
    main()
