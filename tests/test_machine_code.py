"""What ptxas makes of the CUDA kernels, below written ceilings. machine_code.py has a table."""

from __future__ import annotations

import re
from pathlib import Path

import machine_code
import pytest
from machine_code import ARCHS, Kernel

pytestmark = [
    pytest.mark.skipif(
        not machine_code.has_nvcc(), reason="no nvcc to compile the CUDA kernels with"
    ),
    pytest.mark.skipif(
        machine_code.nvdisasm() is None, reason="no nvdisasm: it comes with the triton wheel"
    ),
]

# Ceilings are the figures measured with nvcc 13.0, rounded up to a tenth.
# Instructions for each element of a full block, in float32 and the half types: an H100
# issues 53 while its memory moves the 6 bytes of a half-type element.
CEILING = {80: 52.7, 86: 52.2, 89: 52.2, 90: 52.3, 100: 52.1, 120: 51.7}
STD_CEILING = {80: 36.4, 86: 37.0, 89: 37.0, 90: 37.5, 100: 36.9, 120: 36.2}
# eps itself
NOISE_CEILING = {80: 33.2, 86: 33.2, 89: 33.2, 90: 33.4, 100: 33.5, 120: 33.3}
# Without noise: nothing is left of the normals that the kernels share.
KL_CEILING = {80: 28.5, 86: 27.5, 89: 27.5, 90: 27.7, 100: 27.6, 120: 27.5}
# float64 has half the normals for each counter, and longer polynomials.
FLOAT64_CEILING = {80: 113.0, 86: 113.0, 89: 113.0, 90: 163.5, 100: 163.0, 120: 133.3}
STD_FLOAT64_CEILING = {80: 83.9, 86: 83.9, 89: 83.9, 90: 121.5, 100: 121.0, 120: 98.4}
NOISE_FLOAT64_CEILING = {80: 78.5, 86: 79.3, 89: 79.3, 90: 116.3, 100: 117.3, 120: 94.7}
KL_FLOAT64_CEILING = {80: 42.8, 86: 43.7, 89: 43.7, 90: 49.8, 100: 48.8, 120: 44.2}
# For each element of a thread with one vector, on any architecture: by form, bits of an index
# and bytes of an element. There is nobody to share the key schedule with, and in rows the
# place of the vector is computed.
ONE_VECTOR = {
    ("whole", 64): {2: 60.5, 4: 68.8, 8: 195.0},
    ("rows", 32): {2: 69.2, 4: 81.5, 8: 222.5},
    ("rows", 64): {2: 74.4, 4: 93.8, 8: 240.5},
}
# 40 leave room for 48 warps on a multiprocessor, 48 for 40, 56 for 36 and 64 for 32. The
# gradient of the half types takes 55 in a full block, for the loads under way; the last is
# for float64, and for the 64-bit divisions of strided tensors beyond 2^31 elements.
REGISTERS = {"whole": 56, "rows": 40, "elements": 40}
MORE_REGISTERS = {"whole": 64, "rows": 48, "elements": 48}
# 16-byte loads that a thread of a full block waits for at a time, at least. With __ldg for
# them it was 2, and 1 in a forward in float32.
UNDER_WAY = {
    "sample": 4,
    "sample_backward": 3,
    "noise": 0,  # it loads none
    "kl_divergence": 3,
    "kl_divergence_backward": 3,
}
STD_BACKWARD_UNDER_WAY = 2  # of 4 in all: it reads one operand


@pytest.fixture(scope="module")
def kernels() -> dict[int, list[Kernel]]:
    return machine_code.all_kernels()


# What nvdisasm prints, cut to a branch around a store: sm_100 has the guard of a uniform branch
# among the operands.
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   BRA.U UP0, `(.L_x_1) ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize("guard", ["UP0, ", "!UP3, ", "P1, ", "!P1, "])
def test_a_branch_may_have_its_guard_as_an_operand(guard: str) -> None:
    code = machine_code.parse_code(LISTING.replace("UP0, ", guard))
    assert [i.address for i in code.path(1)] == [0, 0x10, 0x20, 0x30, 0x40]
    assert [i.address for i in code.path(0)] == [0, 0x10, 0x20, 0x50, 0x60]


def test_a_path_that_is_not_there_is_refused() -> None:
    """Nothing would be below every ceiling."""
    for listing in (LISTING.replace("UP0, ", ""), LISTING.replace(".128", "")):
        with pytest.raises(ValueError, match="no path from the entry with 1 16-byte stores"):
            machine_code.parse_code(listing).path(1)
    with pytest.raises(ValueError, match="no path from the entry with 4 16-byte stores"):
        machine_code.parse_code(LISTING).hot_path()


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_spilled(kernels: dict[int, list[Kernel]], arch: int) -> None:
    # 2 ops, one of them with two sources of keys, of 2 scales; noise itself, and 2 without;
    # each in 4 dtypes and 5 forms
    assert len({k.name for k in kernels[arch]}) == (3 * 2 + 1 + 2) * 4 * 5
    for k in kernels[arch]:
        assert (k.stack_bytes, k.spilled_bytes) == (0, 0), k.name
        local = [o for o in k.code.opcodes if re.match(r"(LDL|STL)\b", o)]
        assert not local, (k.name, local)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_body_moves_16_bytes_at_a_time(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        if k.name.form == "elements":
            assert not any(map(machine_code.is_vector_store, k.code.instructions)), k.name
            continue
        # a full block, and what it leaves: one vector a thread
        for vectors in (machine_code.VECTORS_PER_THREAD, 1) if k.name.form == "whole" else (1,):
            body = k.code.path(vectors)
            loads = [i.opcode for i in body if i.opcode.startswith("LDG")]
            # besides the inputs there is at most the key: two words of 8 bytes
            inputs = 1 if k.name.op == "sample_backward" and k.name.scale == "std" else 2
            inputs = 0 if k.name.op == "noise" else inputs
            assert sum(".128" in o for o in loads) == inputs * vectors, k.name
            assert all(".128" in o or ".64" in o for o in loads), k.name
            keys = 0 if k.name.source == "none" else 2
            assert sum(".64" in o for o in loads) <= keys, k.name
            assert sum(map(machine_code.is_vector_store, body)) == vectors, k.name


@pytest.mark.parametrize("arch", ARCHS)
def test_registers(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        many = k.name.dtype == "float64" or (k.name.index_bits == 64 and k.name.form != "whole")
        ceiling = (MORE_REGISTERS if many else REGISTERS)[k.name.form]
        assert k.registers <= ceiling, (k.name, k.registers)


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_per_element(kernels: dict[int, list[Kernel]], arch: int) -> None:
    print(machine_code.table({arch: kernels[arch]}))
    for k in kernels[arch]:
        if k.name.form == "whole":
            single, double = CEILING, FLOAT64_CEILING
            if k.name.scale == "std":
                single, double = STD_CEILING, STD_FLOAT64_CEILING
            elif k.name.op == "noise":
                single, double = NOISE_CEILING, NOISE_FLOAT64_CEILING
            elif k.name.source == "none":
                single, double = KL_CEILING, KL_FLOAT64_CEILING
            ceiling = double if k.name.dtype == "float64" else single
            slots = k.code.slots_per_element(k.name.dtype)
            assert slots <= ceiling[arch], (k.name, slots)
        if k.name.form != "elements":
            alone = k.code.slots_per_element(k.name.dtype, 1)
            one_vector = ONE_VECTOR[k.name.form, k.name.index_bits]
            assert alone <= one_vector[machine_code.ELEMENT_SIZE[k.name.dtype]], (k.name, alone)


@pytest.mark.parametrize("arch", ARCHS)
def test_loads_under_way(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        if k.name.form == "whole":
            backward_of_std = (k.name.op, k.name.scale) == ("sample_backward", "std")
            floor = STD_BACKWARD_UNDER_WAY if backward_of_std else UNDER_WAY[k.name.op]
            assert k.code.loads_under_way() >= floor, (k.name, k.code.loads_under_way())


def test_loads_under_way_are_counted() -> None:
    """From the load to the next instruction that names one of its registers."""
    listing = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64+0x800] ;
        /*0020*/                   FADD R12, R7, R12 ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64+0x1000] ;
"""
    store = "        /*0040*/                   STG.E.128 desc[UR4][R2.64], R12 ;\n"
    end = "        /*0080*/                   EXIT ;\n"
    assert machine_code.parse_code(listing + 4 * store + end).loads_under_way() == 2
    second_use = store.replace("R12", "R8")
    assert machine_code.parse_code(second_use + listing + 3 * store + end).loads_under_way() == 2
    unused = listing.replace("FADD R12, R7, R12", "FADD R12, R13, R12").replace("R4,", "R16,", 1)
    assert machine_code.parse_code(unused + 4 * store + end).loads_under_way() == 3


@pytest.mark.parametrize("arch", ARCHS)
def test_ptxas_takes_the_same_root(arch: int, tmp_path: Path) -> None:
    """For sqrt.rn, which IEEE 754 binds: the estimate is then one that root.h gets right."""
    source = tmp_path / "root.cu"
    source.write_text("__global__ void k(float* x) { *x = __fsqrt_rn(*x); }")
    machine_code.nvcc("-cubin", f"-arch=sm_{arch}", source, "-o", tmp_path / "root.cubin")
    code = machine_code.disassemble(tmp_path / "root.cubin")
    r = r"(R\d+)(?:\.reuse)?"
    step = re.search(
        rf"MUFU\.RSQ {r}, {r} ;.*FMUL\.FTZ {r}, \2, \1 ;.*FMUL\.FTZ {r}, \1, 0\.5 ;"
        rf".*FFMA {r}, -\3, \3, \2 ;.*FFMA {r}, \5, \4, \3 ;",
        code,
        re.S,
    )
    assert step is not None, code


@pytest.mark.parametrize(("type", "ptx"), [("float", "f32"), ("double", "f64")])
def test_a_sum_is_not_contracted(type: str, ptx: str, tmp_path: Path) -> None:
    """With whatever product it is of: nvcc makes an fma of a plain a * b + c."""
    source = tmp_path / "sum.cu"
    source.write_text(
        f'#include "{machine_code.ROOT}/csrc/cuda/thread.h"\n'
        f"__global__ void k({type}* x) {{\n"
        "  x[0] = reparam_fused::Thread::add(x[0] * x[1], x[2]);\n"
        "  x[1] = reparam_fused::Thread::sub(x[3] * x[4], x[5]);\n"
        "}\n"
    )
    machine_code.nvcc("-ptx", "-arch=compute_80", source, "-o", tmp_path / "sum.ptx")
    code = (tmp_path / "sum.ptx").read_text()
    assert code.count(f"add.rn.{ptx}") == code.count(f"sub.rn.{ptx}") == 1
    assert "fma" not in code


@pytest.mark.parametrize("arch", ARCHS)
def test_no_arithmetic_that_rounds_otherwise(kernels: dict[int, list[Kernel]], arch: int) -> None:
    """No flush to zero, no approximation but the first guess of a root."""
    for k in kernels[arch]:
        if k.name.dtype == "float64":
            continue  # the roots of float64 start from a guess of their own
        for opcode in k.code.opcodes:
            assert not re.match(r"F(FMA|MUL|ADD)\b.*\.(FTZ|SAT|RZ|RM|RP)", opcode), (k.name, opcode)
            if opcode.startswith("MUFU"):
                # RCP divides 64-bit indices
                assert opcode == "MUFU.RSQ" or k.name.index_bits == 64, (k.name, opcode)
