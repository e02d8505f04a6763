"""A sample of the mutants of the compiled PTX: killed, or harmless for a written reason."""

from __future__ import annotations

import random
import re

import machine_code
import mutate_ptx
import pytest
from gpu.stand_in import StandIn
from gpu_run import ptx
from helpers import needs_kernels
from machine_code import Name
from mutate_ptx import Mutator, Work, Workbench, kernel_of
from ptx import Kernel, Module, PTXError
from ptx.model import Instruction

from reparam_fused import _extensions

pytestmark = [
    needs_kernels,
    pytest.mark.slow,
    pytest.mark.skipif(not _extensions.has_cuda, reason="there are no CUDA kernels"),
    pytest.mark.skipif(not machine_code.has_nvcc(), reason="no nvcc to compile the kernels with"),
]

ARCH = 90
SEED = 20
# Each kernel costs a second or two for its cases, whatever the number of its mutants.
SAMPLED = [
    Name("rows", "sample", "std", True, "float32", "key"),
    Name("elements", "sample_backward", "any", False, "bfloat16", "key"),
    Name("whole", "sample", "log_var", False, "bfloat16", "generator"),
]
PER_KERNEL = 40


@pytest.fixture(autouse=True)
def on_stand_in(stand_in: StandIn) -> None:
    """All of them: its interpreter reads the text, and its run selects them."""


def test_mutants_die() -> None:
    names = mutate_ptx.kernel_names(ARCH, mutate_ptx.DTYPES)
    chosen = random.Random(SEED)
    verdicts = []
    for name in SAMPLED:
        mutants = list(Mutator(kernel_of(ARCH, names[name])))
        work = Work(ARCH, names[name], chosen.sample(mutants, PER_KERNEL), largest=2**16)
        verdicts += work.done()[0]
    assert len(verdicts) == PER_KERNEL * len(SAMPLED)
    assert mutate_ptx.passes(verdicts), mutate_ptx.report(verdicts, {})


def _operands(kernel: Kernel, instruction: Instruction) -> list[str | list[int] | None]:
    """Registers by name, constants by value, in the order of reading and writing."""
    base = [instruction.base] if instruction.base else []
    sources = [
        s.constant.tolist() if s.constant is not None else kernel.register_names[s.slot]
        for s in (*base, *instruction.sources)
    ]
    return [*sources, *(d and kernel.register_names[d.slot] for d in instruction.destinations)]


def test_a_mutant_is_what_reading_its_text_gives() -> None:
    """Only the changed instruction is read: the kernel is that of the whole text, changed."""
    names = mutate_ptx.kernel_names(ARCH, ["float16"])
    name = Name("rows", "sample", "log_var", False, "float16", "key")
    bench = Workbench(ptx(ARCH)[names[name]])
    mutants = list(Mutator(bench.kernel))
    for mutant in random.Random(SEED).sample(mutants, 20):
        line = bench.lines[mutant.line - 1]
        statement = next(p for p in line.split(";") if " ".join(p.split()).endswith(mutant.old))
        lines = list(bench.lines)
        lines[mutant.line - 1] = line.replace(statement, mutant.new)
        try:
            (whole,) = Module.parse("\n".join(lines)).kernels.values()
        except PTXError:  # a shift amount of 64 bits, say: killed in either way
            with pytest.raises(PTXError):
                bench.mutated(mutant)
            continue
        kernel = bench.mutated(mutant)
        for one, other in zip(kernel.instructions, whole.instructions, strict=True):
            assert (one.line, one.operation, one.offset) == (
                other.line,
                other.operation,
                other.offset,
            )
            assert _operands(kernel, one) == _operands(whole, other)
            assert one.target == other.target


def test_every_operator_has_mutants() -> None:
    names = mutate_ptx.kernel_names(ARCH, ["bfloat16"])
    mutants = [m for n in names.values() for m in Mutator(kernel_of(ARCH, n))]
    documented = set(re.findall(r"^    ([a-z]+)  +\S", mutate_ptx.__doc__ or "", re.M))
    assert {m.operator for m in mutants} == documented
    assert len({str(m) for m in mutants}) == len(mutants)
