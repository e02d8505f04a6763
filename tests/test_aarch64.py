"""The kernels for aarch64, where there is none to run them on: cross-compiled, under qemu-user."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = shutil.which("g++") or shutil.which("clang++")
CROSS = "aarch64-linux-gnu-g++"
QEMU = ["qemu-aarch64"]
pytestmark = [
    pytest.mark.skipif(
        platform.machine() == "aarch64", reason="the other tests run these kernels here"
    ),
    pytest.mark.skipif(NATIVE is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        not (shutil.which(CROSS) and shutil.which(QEMU[0])),
        reason="needs g++-aarch64-linux-gnu and qemu-user",
    ),
]

# Instructions for each element of the wide loop, as GCC 12.2 makes it: by lane type, op, form and
# dtype. AVX2 has twice the lanes.
INSTRUCTIONS = {
    ("neon", "sample", "log_var", "float32"): 28.5,
    ("neon", "sample", "log_var", "bfloat16"): 29.8,
    ("neon", "sample_backward", "log_var", "float32"): 27.2,
    ("neon", "sample_backward", "log_var", "bfloat16"): 28.5,
    ("scalar", "sample", "log_var", "float32"): 84.3,
    ("avx2", "sample", "log_var", "float32"): 15.1,
    ("avx2", "sample", "log_var", "bfloat16"): 15.6,
    ("avx2", "sample_backward", "log_var", "float32"): 14.9,
    ("avx2", "sample_backward", "log_var", "bfloat16"): 15.8,
}
# Cycles in which these occupy one of the four SIMD pipes of a Neoverse V2, where it is not one:
# from LLVM's AArch64SchedNeoverseV2.td, which has them from Arm's software optimization guide.
PIPE_CYCLES = {"fsqrt": 9, "scvtf": 2, "ucvtf": 2}
# And of all of them together, for each element of a sample: without copies of registers, which
# a core may do by renaming, and with them.
PIPES = {"float32": (19.2, 23.9), "bfloat16": (20.9, 25.6)}


def flags() -> list[str]:
    """Those of setup.py, which the extension is built with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GCC":
            return list(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no list of flags")


class Program(NamedTuple):
    emulator: list[str]
    path: Path

    def run(self, *arguments: object, isa: str = "", **environment: str) -> str:
        command = [*self.emulator, str(self.path), *map(str, arguments)]
        environment = {**os.environ, "REPARAM_FUSED_ISA": isa, **environment}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def digests(self, isa: str) -> list[str]:
        return self.run("digests", isa=isa).splitlines()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Program]:
    """tests/cpp/kernels.cpp with the kernels, for this machine and for aarch64."""
    folder = tmp_path_factory.mktemp("cpp")
    names = ("scalar", "avx2", "avx512", "neon", "dispatch")
    sources = [str(ROOT / f"csrc/cpu/{name}.cpp") for name in names]
    sources.append(str(ROOT / "tests/cpp/kernels.cpp"))
    # at addresses that a disassembly has
    builds = {
        folder / "native": [str(NATIVE), "-no-pie", "-pthread"],
        folder / "cross": [CROSS, "-static", "-pthread"],
    }
    running = [
        subprocess.Popen([*compiler, *flags(), "-fno-pie", *sources, "-o", str(binary)])
        for binary, compiler in builds.items()
    ]
    assert [build.wait() for build in running] == [0, 0]
    return Program([], folder / "native"), Program(QEMU, folder / "cross")


def test_the_lane_type_is_chosen(programs: tuple[Program, Program]) -> None:
    _, aarch64 = programs
    assert aarch64.run("isa") == "neon\n"
    assert aarch64.run("isa", isa="neon") == "neon\n"
    assert aarch64.run("isa", isa="scalar") == "scalar\n"
    with pytest.raises(AssertionError, match="'avx2', but this CPU and build have: scalar, neon"):
        aarch64.run("isa", isa="avx2")


def test_the_bits_are_the_same(programs: tuple[Program, Program]) -> None:
    """Of every op, form, dtype, of lengths and keys and layouts: group by group, by the portable
    path and by the widest ISA of both architectures."""
    native, aarch64 = programs
    expected = native.digests("scalar")
    for program, isa in ((native, ""), (aarch64, "scalar"), (aarch64, "neon")):
        for line, here in zip(expected, program.digests(isa), strict=True):
            assert here == line, (program, isa)


def test_neither_layout_nor_samples_change_bits(programs: tuple[Program, Program]) -> None:
    """Any call gives what the same elements in row-major order give, K samples what each gives
    alone, and their gradients what the written sums give."""
    for program, dtypes in zip(programs, ([], ["bfloat16"]), strict=True):  # under qemu, a minute
        said = program.run("layouts", *dtypes)
        assert re.fullmatch(r"0 of \d{4,} differ\n", said), said


def test_threads_do_not_change_bits(programs: tuple[Program, Program]) -> None:
    """Nor calls at a time. tests/sanitize.py looks for races in it."""
    assert programs[0].run("threads") == "0 of 32 differ\n"


def test_the_digests_tell_problems_apart(programs: tuple[Program, Program]) -> None:
    """Else they could be of nothing: every element is written, and no group is like another."""
    groups = [line.rsplit(" ", 3) for line in programs[0].digests("")]
    assert len(groups) > 1500
    for name, elements, numbers, _ in groups:
        share = 0.95 if "extreme" in name else 1.0
        if "head" in name and "extreme" in name:
            share = 0.9  # a fifth of each operand is extreme
        if "kl_divergence_backward/rho" in name:
            share = 0.7  # where sigma is 0 its logarithm has no slope
        assert int(elements) * share <= int(numbers) <= int(elements) > 0, name
        if name.endswith("extreme scale") and "backward/std" not in name:
            assert numbers < elements, f"{name}: no NaN came through"
    assert len({digest for *_, digest in groups}) == len(groups)


@pytest.mark.parametrize(("lanes", "suffix"), [("Neon", "4s"), ("Scalar", "s")])
def test_a_sum_is_not_contracted(lanes: str, suffix: str, tmp_path: Path) -> None:
    """With the product it is of. GCC does so for aarch64 unless told otherwise, and its
    intrinsics are no hindrance to it; no kernel of today would show it in its bits."""
    header = {"Neon": "cpu/neon.h", "Scalar": "common/scalar.h"}[lanes]
    source = tmp_path / "sum.cpp"
    source.write_text(
        f'#include "{ROOT}/csrc/{header}"\n'
        f"using V = reparam_fused::{lanes};\n"
        "V::F f(V::F x, V::F y, V::F z) { return V::sub(V::mul(x, y), z); }\n"
    )

    def opcodes(*more: str) -> set[str]:
        command = [CROSS, *flags(), *more, "-S", str(source), "-o", "-"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"^\s+(f\w+)", code, re.M))

    assert {"fmul", "fsub"} == opcodes()
    assert not {"fmul", "fsub"} <= opcodes("-ffp-contract=fast")


def instructions(
    program: Program, objdump: str, isa: str, *call: str, log: Path
) -> dict[str, float]:
    """How often an element of the wide loop takes each instruction: what 512 elements more add
    to a call, one instruction to a line of the emulator's log."""
    command = [objdump, "-dC", "--no-show-raw-insn", str(program.path)]
    text, within = {}, ""
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        if name := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            within = name[1]
        elif "run_kernel<" in within and (found := re.match(r" *([0-9a-f]+):\t(.+)", line)):
            text[int(found[1], 16)] = found[2]
    taken: Counter[str] = Counter()
    for sign, numel in ((-1, 256), (1, 768)):
        # the one was renamed the other in qemu 8.1
        one = dict.fromkeys(("QEMU_SINGLESTEP", "QEMU_ONE_INSN_PER_TB"), "1")
        one.update(QEMU_LOG="exec,nochain", QEMU_LOG_FILENAME=str(log))
        one["QEMU_DFILTER"] = f"{min(text):#x}..{max(text):#x}"
        program.run("run", *call, numel, isa=isa, **one)
        for line in log.read_text().splitlines():
            address = int(line.split("/")[1], 16) if line.startswith("Trace") else 0
            if address in text:
                taken[text[address]] += sign
    return {instruction: count / 512 for instruction, count in taken.items() if count}


def pipes(taken: dict[str, float], copies: bool) -> float:
    """Cycles of SIMD pipes."""
    cycles = 0.0
    for instruction, count in taken.items():
        opcode, _, operands = instruction.partition("\t")
        simd = re.match(r"v\d+\.|[sdq]\d+,", operands) and not re.match(r"ld|st|prfm", opcode)
        from_general = re.search(r", [wx]\d+$", operands)
        copy = opcode == "mov" and re.fullmatch(r"v\d+\.16b, v\d+\.16b", operands)
        if simd and not from_general and (copies or not copy):
            cycles += count * PIPE_CYCLES.get(opcode, 1)
    return cycles


@pytest.mark.parametrize("case", INSTRUCTIONS, ids="-".join)
def test_instructions_per_element(
    programs: tuple[Program, Program], case: tuple[str, str, str, str], tmp_path: Path
) -> None:
    """Exact, unlike a time under emulation. qemu-x86_64 has AVX2 since 7.2, and no AVX-512."""
    isa, *call = case
    native, program = programs
    objdump = "aarch64-linux-gnu-objdump"
    if isa == "avx2":
        if not shutil.which("qemu-x86_64"):
            pytest.skip("needs qemu-user for this machine too")
        program, objdump = Program(["qemu-x86_64", "-cpu", "max"], native.path), "objdump"
        if "avx2" not in program.run("isa"):
            pytest.skip("this qemu-user has no AVX2")
    taken = instructions(program, objdump, isa, *call, log=tmp_path / "log")
    total = sum(taken.values())
    print(f"{'-'.join(case)}: {total:.1f} instructions an element")
    assert total == pytest.approx(INSTRUCTIONS[case], rel=0.05)  # another GCC is not far off
    if isa == "neon" and call[0] == "sample":
        busy = [pipes(taken, copies) for copies in (False, True)]
        print(f"SIMD pipes: {busy[0]:.2f} cycles, with copies {busy[1]:.2f}")
        assert busy == pytest.approx(PIPES[call[2]], rel=0.05)
