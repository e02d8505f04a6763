"""What ptxas makes of the CUDA kernels, below written ceilings. machine_code.py has a table."""

from __future__ import annotations

import re
from pathlib import Path

import machine_code
import pytest
from machine_code import ARCHS, Kernel, Name

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
CEILING = {
    "log_var": {80: 52.7, 86: 52.2, 89: 52.2, 90: 52.3, 100: 52.1, 120: 51.7},
    "std": {80: 36.4, 86: 37.0, 89: 37.0, 90: 37.5, 100: 36.9, 120: 36.2},
    "rho": {80: 66.8, 86: 66.0, 89: 66.0, 90: 66.5, 100: 66.2, 120: 65.9},
    "bounded log_var": {80: 57.6, 86: 56.8, 89: 56.8, 90: 57.1, 100: 57.0, 120: 56.0},
    "bounded std": {80: 41.0, 86: 41.2, 89: 41.2, 90: 41.4, 100: 41.4, 120: 39.9},
    "bounded rho": {80: 73.3, 86: 72.5, 89: 72.5, 90: 72.8, 100: 72.7, 120: 72.4},
    # eps itself
    "noise": {80: 33.2, 86: 33.2, 89: 33.2, 90: 33.4, 100: 33.5, 120: 33.3},
    # Without noise: nothing is left of the normals that the kernels share. A log_std is doubled.
    "kl log_var": {80: 28.5, 86: 27.5, 89: 27.5, 90: 27.7, 100: 27.6, 120: 27.5},
    "kl log_std": {80: 29.5, 86: 28.5, 89: 28.5, 90: 28.7, 100: 28.6, 120: 28.5},
}
# float64 has half the normals for each counter, and longer polynomials.
FLOAT64_CEILING = {
    "log_var": {80: 113.0, 86: 113.0, 89: 113.0, 90: 163.5, 100: 163.0, 120: 133.3},
    "std": {80: 83.9, 86: 83.9, 89: 83.9, 90: 121.5, 100: 121.0, 120: 98.4},
    "rho": {80: 142.2, 86: 142.2, 89: 142.2, 90: 212.2, 100: 209.2, 120: 169.5},
    "bounded log_var": {80: 120.2, 86: 120.2, 89: 120.2, 90: 173.4, 100: 172.9, 120: 143.3},
    "bounded std": {80: 91.4, 86: 91.4, 89: 91.4, 90: 130.4, 100: 129.9, 120: 107.7},
    "bounded rho": {80: 148.8, 86: 148.8, 89: 148.8, 90: 220.8, 100: 218.4, 120: 178.0},
    "noise": {80: 78.5, 86: 79.3, 89: 79.3, 90: 116.3, 100: 117.3, 120: 94.7},
    "kl log_var": {80: 42.8, 86: 43.7, 89: 43.7, 90: 49.8, 100: 48.8, 120: 44.2},
    "kl log_std": {80: 43.3, 86: 43.7, 89: 43.7, 90: 50.8, 100: 49.5, 120: 44.8},
}
# For each element of each of K samples, and of their sums in the backward, on the way of a counter
# whose elements lie in a row: by bytes of an element. Mean and scale are read once, the key is
# prepared once.
SAMPLE = {
    2: {80: 40.0, 86: 40.3, 89: 40.3, 90: 40.0, 100: 40.8, 120: 39.3},
    4: {80: 39.0, 86: 39.0, 89: 39.0, 90: 39.5, 100: 40.0, 120: 38.5},
    8: {80: 86.0, 86: 86.0, 89: 86.0, 90: 123.0, 100: 124.5, 120: 98.0},
}
# Of a head of one form in a full chunk, by bytes of an element: z and the divergence from N(0, 1),
# summed, and the gradient of both. The sums take 1 of these in the half types and 2 in float32.
KL_HEAD = {
    "head": {
        2: {80: 80.7, 90: 79.9, 100: 79.6, 120: 79.1},
        4: {80: 80.4, 90: 80.0, 100: 79.6, 120: 78.7},
    },
    "head_backward": {
        2: {80: 81.0, 90: 79.3, 100: 79.6, 120: 78.9},
        4: {80: 78.4, 90: 78.0, 100: 77.9, 120: 77.3},
    },
}
KL_HEAD_UNDER_WAY = {"head": {2: 1, 4: 3}, "head_backward": {2: 3, 4: 6}}
# For each element of a thread with one vector, on any architecture: by bytes of an element. There
# is nobody to share the key schedule with, and in rows the place of the vector is computed. The
# divergence within bounds has the code of two: what is added to sigma may be 0.
ONE_VECTOR = {
    "whole": {
        "log_var": {2: 60.5, 4: 68.8, 8: 195.0},
        "std": {2: 44.4, 4: 52.5, 8: 155.0},
        "rho": {2: 73.0, 4: 81.0, 8: 243.5},
        "bounded log_var": {2: 64.0, 4: 72.8, 8: 208.0},
        "bounded std": {2: 48.2, 4: 57.0, 8: 163.5},
        "bounded rho": {2: 77.5, 4: 85.0, 8: 255.0},
        "noise": {2: 37.9, 4: 44.5, 8: 135.5},
        "kl log_var": {2: 31.8, 4: 33.5, 8: 74.0},
        "kl log_std": {2: 32.8, 4: 34.5, 8: 74.0},
    },
    "rows": {
        "log_var": {2: 68.2, 4: 80.0, 8: 217.0},
        "std": {2: 52.9, 4: 64.5, 8: 174.0},
        "rho": {2: 82.2, 4: 94.3, 8: 279.0},
        "bounded log_var": {2: 72.5, 4: 85.3, 8: 230.0},
        "bounded std": {2: 56.8, 4: 69.0, 8: 187.0},
        "bounded rho": {2: 87.4, 4: 99.5, 8: 290.5},
        "noise": {2: 43.3, 4: 54.8, 8: 153.5},
        "kl log_var": {2: 37.3, 4: 45.0, 8: 95.0},
        "kl std": {2: 44.2, 4: 51.8, 8: 123.0},
        "kl log_std": {2: 38.3, 4: 46.0, 8: 97.0},
        "kl rho": {2: 95.2, 4: 100.8, 8: 223.5},
        "bounded kl log_var": {2: 101.5, 4: 106.3, 8: 251.5},
        "bounded kl std": {2: 48.2, 4: 56.3, 8: 134.0},
        "bounded kl log_std": {2: 102.8, 4: 107.5, 8: 252.5},
        "bounded kl rho": {2: 102.3, 4: 109.0, 8: 238.0},
    },
}
# 40 leave room for 48 warps on a multiprocessor, 48 for 40, 56 for 36 and 64 for 32. The
# gradient of the half types takes 55 in a full block, for the loads under way, and of rho within
# bounds 77; 64 and more are for float64, and for the schedule of a key that K samples share, which
# saves an element 5 instructions. Their sums have the places of operand and results besides.
REGISTERS = {
    "whole": 56,
    "rows": 40,
    "elements": 40,
    "bounded whole": 77,
    "bounded rows": 48,
    "samples": 69,
    "sums": 96,
    "head": 64,
    "head backward": 88,
    "kl_head": 66,
    "kl_head backward": 70,
    "sum": 30,
}
MORE_REGISTERS = {
    "whole": 64,
    "rows": 48,
    "elements": 48,
    "bounded whole": 72,
    "bounded rows": 48,
    "samples": 66,
    "sums": 78,
    "head": 72,
    "head backward": 87,
    "sum": 24,
}
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


def kind(name: Name) -> str:
    """What a ceiling is for. A logarithm is one of any unit."""
    if name.op == "noise":
        return "noise"
    what = f"kl {name.scale}" if name.source == "none" else name.scale.replace("log_std", "log_var")
    return f"bounded {what}" if name.bounded else what


def reads_one_operand(name: Name) -> bool:
    return (name.op, name.scale, name.bounded) == ("sample_backward", "std", False)


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
    # In each of 4 dtypes: a draw with either source of keys and its gradient, of 4 forms within
    # bounds or not, whole and in rows; the divergence and its gradient of these in rows, and whole
    # of 1; noise in 3 ways; of any form at run time each of the 5 in elements, 3 of samples, and a
    # head and its gradient. These of one form in 3 dtypes, and sums in 2.
    assert len({k.name for k in kernels[arch]}) == (
        4 * (3 * 8 * 2 + 2 * 8 + 2 + 3 + 5 + 3 + 2) + 3 * 2 + 2
    )
    for k in kernels[arch]:
        assert (k.stack_bytes, k.spilled_bytes) == (0, 0), k.name
        local = [o for o in k.code.opcodes if re.match(r"(LDL|STL)\b", o)]
        assert not local, (k.name, local)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_body_moves_16_bytes_at_a_time(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        if k.name.form == "samples":
            access = "LDG" if k.name.op == "samples_backward" else "STG"
            width = ".64" if machine_code.ELEMENT_SIZE[k.name.dtype] == 2 else ".128"
            loop = [i.opcode for i in k.code.loop(access, width[1:])]
            accesses = [o for o in loop if o.startswith(("LDG", "STG"))]
            assert len(accesses) == 1, (k.name, accesses)
            assert accesses[0].startswith(access), k.name
            assert width in accesses[0], k.name
            continue
        if k.name.form == "sum":
            continue
        if k.name.form == "head":  # of rows of whole vectors
            loads = sum(map(machine_code.is_vector_load, k.code.instructions))
            stores = sum(map(machine_code.is_vector_store, k.code.instructions))
            assert (loads, stores) == ((5, 4) if k.name.op == "head_backward" else (4, 1)), k.name
            continue
        if k.name.form == "kl_head":
            path, _ = k.code.full_chunk(k.name)
            loads = sum(map(machine_code.is_vector_load, path))
            stores = sum(map(machine_code.is_vector_store, path))
            vectors = machine_code.ELEMENT_SIZE[k.name.dtype]  # 4, or two of them in a loop
            each = (3, 2) if k.name.op == "head_backward" else (2, 1)
            assert (loads, stores) == (each[0] * vectors, each[1] * vectors), k.name
            continue
        if k.name.form == "elements":
            assert not any(map(machine_code.is_vector_store, k.code.instructions)), k.name
            continue
        # a full block, and what it leaves: one vector a thread
        for vectors in (machine_code.VECTORS_PER_THREAD, 1) if k.name.form == "whole" else (1,):
            body = k.code.path(vectors)
            loads = [i.opcode for i in body if i.opcode.startswith("LDG")]
            # besides the inputs there is at most the key, two words of 8 bytes, and in rows the
            # other way to an input: one element that is repeated
            inputs = 1 if reads_one_operand(k.name) else 2
            inputs = 0 if k.name.op == "noise" else inputs
            assert sum(".128" in o for o in loads) == inputs * vectors, k.name
            repeated = inputs if k.name.form == "rows" else 0
            words = 0 if k.name.source == "none" else 2
            width = {2: ".U16", 4: "", 8: ".64"}[machine_code.ELEMENT_SIZE[k.name.dtype]]
            elements = [f"LDG.E{width}.CONSTANT"] * repeated
            others = [o for o in loads if ".128" not in o]
            for opcode in elements:
                others.remove(opcode)
            assert all(".64" in o for o in others), k.name
            assert len(others) <= words, k.name
            assert sum(map(machine_code.is_vector_store, body)) == vectors, k.name


@pytest.mark.parametrize("arch", ARCHS)
def test_registers(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        form = "sums" if k.name.op == "samples_backward" else k.name.form
        form = f"{form} backward" if k.name.op == "head_backward" else form
        form = f"bounded {form}" if k.name.bounded else form
        ceiling = (MORE_REGISTERS if k.name.dtype == "float64" else REGISTERS)[form]
        assert k.registers <= ceiling, (k.name, k.registers)


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_per_element(kernels: dict[int, list[Kernel]], arch: int) -> None:
    print(machine_code.table({arch: kernels[arch]}))
    for k in kernels[arch]:
        if k.name.form == "whole":
            ceiling = FLOAT64_CEILING if k.name.dtype == "float64" else CEILING
            slots = k.code.slots_per_element(k.name.dtype)
            assert slots <= ceiling[kind(k.name)][arch], (k.name, slots)
        if k.name.form in ("whole", "rows"):
            alone = k.code.slots_per_element(k.name.dtype, 1)
            one_vector = ONE_VECTOR[k.name.form][kind(k.name)]
            assert alone <= one_vector[machine_code.ELEMENT_SIZE[k.name.dtype]], (k.name, alone)
        if k.name.form == "kl_head":
            path, slots = k.code.full_chunk(k.name)
            ceilings = KL_HEAD[k.name.op][machine_code.ELEMENT_SIZE[k.name.dtype]]
            assert slots <= ceilings[arch], (k.name, slots)
            floor = KL_HEAD_UNDER_WAY[k.name.op][machine_code.ELEMENT_SIZE[k.name.dtype]]
            assert k.code.loads_under_way(path) >= floor, k.name
        if k.name.form == "samples":
            slots = k.code.slots_per_sample(k.name)
            assert slots <= SAMPLE[machine_code.ELEMENT_SIZE[k.name.dtype]][arch], (k.name, slots)


@pytest.mark.parametrize("arch", ARCHS)
def test_log_std_costs_what_log_var_does(kernels: dict[int, list[Kernel]], arch: int) -> None:
    """A unit of 2 is in the constants."""
    of = {k.name: k.code for k in kernels[arch] if k.name.form == "whole"}
    compared = 0
    for name, code in of.items():
        if name.scale == "log_std" and name.source != "none":
            other = of[name._replace(scale="log_var")]
            assert code.slots_per_element(name.dtype) == other.slots_per_element(name.dtype), name
            compared += 1
    assert compared == 3 * 4 * 2


@pytest.mark.parametrize("arch", ARCHS)
def test_loads_under_way(kernels: dict[int, list[Kernel]], arch: int) -> None:
    for k in kernels[arch]:
        if k.name.form == "whole":
            one = reads_one_operand(k.name)
            floor = STD_BACKWARD_UNDER_WAY if one else UNDER_WAY[k.name.op]
            assert k.code.loads_under_way() >= floor, (k.name, k.code.loads_under_way())


def test_a_loop_is_the_shortest_way_around_with_an_access() -> None:
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0030*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;
.L_x_3:
        /*0050*/              @!P1 BRA `(.L_x_4) ;
        /*0060*/                   IADD3 R4, R4, R4, RZ ;
.L_x_4:
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
    code = machine_code.parse_code(listing)
    assert [i.address for i in code.loop("STG", "128")] == [0x10, 0x20, 0x30, 0x50, 0x70]
    for missing in (listing.replace(".128", ""), listing.replace("@!P2 BRA `(.L_x_1)", "NOP")):
        with pytest.raises(ValueError, match="no loop with STG of 128"):
            machine_code.parse_code(missing).loop("STG", "128")


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
    """No flush to zero, no approximation but the first guess of a root.

    But in a quotient, which IEEE 754 binds: 1 / sigma, in the gradient of the divergence where the
    scale is no logarithm, and in heads of every form, by sigma.
    """
    for k in kernels[arch]:
        if k.name.dtype == "float64":
            continue  # the roots of float64 start from a guess of their own
        if k.name.op == "kl_divergence_backward" and kind(k.name) not in (
            "kl log_var",
            "kl log_std",
        ):
            continue
        if k.name.form == "head":
            continue
        for opcode in k.code.opcodes:
            assert not re.match(r"F(FMA|MUL|ADD)\b.*\.(FTZ|SAT|RZ|RM|RP)", opcode), (k.name, opcode)
            if opcode.startswith("MUFU"):
                assert opcode == "MUFU.RSQ", (k.name, opcode)
