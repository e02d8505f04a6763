"""The Triton kernels without a GPU: interpreted, and as the PTX that Triton compiles offline."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from digest import extremes
from helpers import (
    FORMS,
    NOISY_OPS,
    OPS,
    READING_OPS,
    SCALED_OPS,
    assert_same_bits,
    inputs,
    key_of,
    needs_kernels,
    patience,
)
from torch import Tensor

import reparam_fused
from reparam_fused import _draw, _extensions, _ops, reference

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = needs_kernels

import machine_code  # noqa: E402
import triton_code  # noqa: E402
import triton_run  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from reparam_fused import triton_kernels  # noqa: E402

ARCHS = (80, 90, 100, 120)
DTYPES = triton_code.DTYPES
PER_BLOCK = {torch.float32: 2048, torch.float16: 4096, torch.bfloat16: 4096}
needs_nvdisasm = pytest.mark.skipif(machine_code.nvdisasm() is None, reason="no nvdisasm")


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(params=NOISY_OPS)
def noisy_op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


# An architecture for each dtype: of half types ptxas gets instructions that others have not.
FORM_CASES = [(80, torch.float32), (90, torch.bfloat16), (120, torch.float16)]
each_form_case = pytest.mark.parametrize(
    ("arch", "dtype"), FORM_CASES, ids=[f"sm_{arch}-{dtype}" for arch, dtype in FORM_CASES]
)
each_form = pytest.mark.parametrize("form", FORMS)
# By number, as ops take them: a clamp, with zeros of both signs; and with something added to sigma
CLAMPED = [(-1.0, 2.0, 0.0), (0.0, math.inf, 0.0), (-math.inf, -0.0, 0.0)]
RAISED = [(-math.inf, 1.5, 0.25), (-math.inf, math.inf, 0.25)]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=patience(600),
        check=False,
    )


def compare(
    arch: int,
    x: Tensor,
    scale: Tensor,
    key: Tensor,
    *,
    op: str,
    kernel: object,
    form: str = "log_var",
    block: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
) -> None:
    unused = op == "sample_backward" and form == "std"
    expected = OPS[op](x, None if unused else scale, key, form, *block)
    options = {"form": form, "global_shape": block[0], "global_offset": block[1]}
    # Triton packs a half element with what is in a register that nobody wrote.
    for undefined in (None,) if x.dtype == torch.float32 else (0, 2**64 - 1):
        out, plan, stats = triton_run.run(
            arch, x, scale, key if op in NOISY_OPS else None, op=op, undefined=undefined, **options
        )
        if op == "noise":
            assert {n for n, read in stats.read_bytes.items() if read} == {plan.kernel.arg_names[3]}
        assert plan.kernel is kernel
        assert_same_bits(out, expected)


def test_interpreted_kernels_give_the_bits_of_the_cpu() -> None:
    script = str(Path(__file__).with_name("triton_interpreted.py"))
    result = run_python(script, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "compared"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kernels_give_the_bits_of_the_cpu(arch: int, dtype: torch.dtype, op: str) -> None:
    """Tails of every length, offsets that carry and wrap, values that are extreme or not finite."""
    block = PER_BLOCK[dtype]
    whole = triton_kernels.whole_kernel
    for n in [*range(1, 18), *range(block - 1, block + 9), 2 * block, 65539]:
        key = key_of(0x9E3779B97F4A7C15 + n, 2**32 - 7)
        compare(arch, *inputs(n, dtype=dtype, seed=n), key, op=op, kernel=whole)
    for offset in (2**63 - 3, 2**64 - 1, 2**64 - 300):
        for n in (33, block):
            key = key_of(2**64 - 59, offset)
            compare(arch, *inputs(n, dtype=dtype), key, op=op, kernel=whole)
    log_var = extremes(dtype)
    for value in (1.0, float("inf"), float("nan")):
        x = torch.full_like(log_var, value)
        compare(arch, x, log_var, key_of(1), op=op, kernel=whole)


@pytest.mark.parametrize("op", READING_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kernels_read_views_where_they_lie(dtype: torch.dtype, op: str) -> None:
    x, log_var = inputs(3, 10, 7, 16, dtype=dtype)
    wide, _ = inputs(6, 5, 4, 33, dtype=dtype, seed=5)
    key = key_of(11, 2**32 - 3)
    elements, whole = triton_kernels.elements_kernel, triton_kernels.whole_kernel
    # the kernel without noise, for which memory has an order of its own
    cases = [
        (whole, x.transpose(1, 3), log_var.transpose(1, 3), key),
        (elements, x.to(memory_format=torch.channels_last), log_var, key),
        (whole, x, log_var, reparam_fused.split(key_of(17, 2**64 - 1), 3)),
        (
            elements,
            x[..., :1].expand(3, 10, 7, 16),
            log_var,
            reparam_fused.split(key, 30).view(3, 10, 2),
        ),
        (elements, *wide[..., :32].chunk(2, dim=-1), key),
        (elements, x.flatten()[1], log_var.flatten()[1], key),  # no dimension, and not aligned
    ]
    for kernel, *case in cases:
        compare(90, *case, op=op, kernel=elements if op in NOISY_OPS else kernel)


@pytest.mark.parametrize("op", SCALED_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_std(arch: int, dtype: torch.dtype, op: str) -> None:
    x, std = inputs(PER_BLOCK[dtype] + 5, dtype=dtype)
    y, y_std = inputs(6, 7, 16, dtype=dtype)
    for kernel, a, b, key in (
        (triton_kernels.whole_kernel, x, std, key_of(2**64 - 59, 2**64 - 300)),
        (
            triton_kernels.whole_kernel,
            torch.ones_like(extremes(dtype)),
            extremes(dtype),
            key_of(3),
        ),
        (
            triton_kernels.elements_kernel,
            y.transpose(0, 2),
            y_std.transpose(0, 2),
            reparam_fused.split(key_of(4), 16),
        ),
    ):
        compare(
            arch,
            a,
            a if op == "sample_backward" else b,
            key,
            op=op,
            kernel=kernel,
            form="std",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks(dtype: torch.dtype, noisy_op: str) -> None:
    """Each element has the noise of its place in the whole."""
    whole, elements = triton_kernels.whole_kernel, triton_kernels.elements_kernel
    key = key_of(77, 2**32 - 9)
    far = (9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7)
    for kernel, block, shape, k in (
        (whole, ((6000,), (256,)), (5001,), key),
        (whole, ((30, 40), (7, 0)), (11, 40), key),
        (elements, ((30, 64), (7, 16)), (11, 32), key),
        (elements, ((6000,), (257,)), (3001,), key),
        (elements, ((64, 3), (5, 1)), (50, 1), key),
        (elements, ((5, 6, 7), (1, 2, 3)), (3, 3, 3), key),
        (elements, far, (3, 2, 9), reparam_fused.split(key, 6)[::2]),
    ):
        x, scale = inputs(*shape, dtype=dtype)
        compare(90, x, scale, k, op=noisy_op, kernel=kernel, block=block)


@each_form_case
@each_form
@pytest.mark.parametrize("op", READING_OPS)
def test_forms_and_bounds(arch: int, dtype: torch.dtype, form: str, op: str) -> None:
    """Against reference.py, over special values and the range of the type."""
    x, scale = inputs(300, dtype=dtype, spread=20.0)
    special = extremes(dtype)
    cases = [(torch.cat([torch.ones_like(special), x]), torch.cat([special, scale]), key_of(7))]
    x, scale = inputs(5, 7, dtype=dtype)
    cases.append((x.t(), scale[:, :1].expand(5, 7).t(), reparam_fused.split(key_of(9), 7)))
    drawn = op in SCALED_OPS
    function = getattr(reference, {"sample": "sample_from_key"}.get(op, op))
    for bounds in (None, *CLAMPED, *RAISED):
        for x, scale, key in cases:
            unused = op == "sample_backward" and form == "std" and bounds is None
            arguments = (None if unused else scale, *((key,) if drawn else ()), form)
            block = (None, None) if drawn else ()
            expected = function(x, *arguments, *block, bounds)
            out, _, _ = triton_run.run(
                arch, x, scale, key if drawn else None, op=op, undefined=0, form=form, bounds=bounds
            )
            assert_same_bits(out, expected)


def compare_samples(
    arch: int,
    x: Tensor,
    scale: Tensor,
    samples: int,
    key: Tensor,
    *,
    kernel: object = None,
    form: str = "log_var",
    bounds: tuple[float, float, float] | None = None,
    block: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
) -> None:
    """Both ways, with reference.py."""
    given = (key, form, *block, bounds)
    options = {
        "form": form, "bounds": bounds, "global_shape": block[0], "global_offset": block[1]
    }  # fmt: skip
    expected = reference.sample_from_key(x, scale, *given, samples)
    (z,), plan, _ = triton_run.run_samples(
        arch, x, scale, key, samples=samples, undefined=0, **options
    )
    assert kernel in (None, plan.kernel)
    assert z.stride() == expected.stride()
    assert_same_bits(z, expected)
    incoming, _ = inputs(*z.shape, dtype=x.dtype, seed=9)
    incoming = incoming.as_strided(z.shape, z.stride())
    unused = form == "std" and bounds is None
    expected_grads = reference.samples_backward(incoming, None if unused else scale, *given)
    grads, plan, _ = triton_run.run_samples(
        arch, incoming, incoming[0] if unused else scale, key, undefined=0, **options
    )
    assert kernel in (None, plan.kernel)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.stride() == expected.stride()
        assert_same_bits(grad, expected)


@each_form_case
def test_samples(arch: int, dtype: torch.dtype) -> None:
    """Element i of sample k has the noise of index k N + i, wherever that is in a counter."""
    whole, elements = triton_kernels.whole_samples_kernel, triton_kernels.samples_kernel
    key = key_of(2**64 - 59, 2**64 - 300)
    block = 4 * 32 * 16 // dtype.itemsize
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 127, block, block + 8, 3 * block + 16):
        kernel = elements if n * dtype.itemsize % 16 else whole
        compare_samples(arch, *inputs(n, dtype=dtype), 5, key, kernel=kernel)
    for samples in (1, 2, 9):
        compare_samples(arch, *inputs(16, dtype=dtype), samples, key, kernel=whole)
    for form, bounds in (("std", None), ("rho", (-0.5, 0.75, 0.125)), ("log_std", None)):
        for n, kernel in ((40, whole), (43, elements)):
            compare_samples(
                arch, *inputs(n, dtype=dtype), 3, key, kernel=kernel, form=form, bounds=bounds
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_keys_of_samples(dtype: torch.dtype) -> None:
    elements = triton_kernels.samples_kernel
    key = key_of(3, 2**32 - 7)
    x, scale = inputs(6, 12, dtype=dtype)
    rows, each = reparam_fused.split(key, 6), reparam_fused.split(key, 24).view(4, 6, 2)
    for mu, log_var, k in (
        (x.t(), scale.t(), key),
        (x, scale[:, :1], key),
        (x[0], scale, key),
        (x.repeat(1, 2)[:, 1:13], scale[:, ::1], key),
        (x, scale, rows[None]),  # numbered within the stream of a row
        (x[:, :7], scale[:, :7], rows[None]),
        (x[:, :7], scale[:, :7], rows[:4]),  # a key for each sample
        (x, scale, rows[:4]),
        (x, scale, each),
        (x.flatten()[1], scale.flatten()[1], key),
    ):
        compare_samples(90, mu, log_var, 4, k)
    for shape, first in (
        ((9, 7, 13), (2, 1, 1)),
        ((4, 6, 16), (0, 0, 3)),
        ((9, 2**20, 2**30), (4, 9, 2**29 + 1)),
    ):
        compare_samples(90, x, scale, 4, key, kernel=elements, block=(shape, first))
    x, scale = inputs(6, 16, dtype=dtype)
    whole, block = triton_kernels.whole_samples_kernel, ((9, 6, 16), (2, 0, 0))
    compare_samples(90, x, scale, 4, key, kernel=whole, block=block)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("n", [40, 41])
def test_samples_of_a_generator(n: int, captured: bool) -> None:
    seed, offset = 2**63 + 5, 2**34 - 8
    mu, scale = inputs(n)
    key = torch.zeros(2, dtype=torch.uint64)
    generator = CudaGenerator(seed, offset - 40 * captured, 40)
    with draw(CPU if captured else NOT_CAPTURED, generator, 0) as position:
        (z,), _, _ = triton_run.run_samples(90, mu, scale, key, samples=3, position=position)
    assert key.tolist() == [seed, offset // 4 + 2**63]
    assert_same_bits(z, reference.sample_from_key(mu, scale, key, samples=3))


@needs_nvdisasm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_machine_code_of_samples(arch: int, dtype: torch.dtype) -> None:
    """Nothing moves between threads, and no element waits for its mean again."""
    for backward in (False, True):
        code = triton_code.samples(arch, dtype, backward)
        assert not [o for o in code.opcodes if o.startswith(("LDL", "STL", "BAR", "LDS", "STS"))]
        # that of a full block, and that of the last one, whose accesses are of elements
        bodies = triton_code.loops(code)
        wide = [[i.opcode for i in body if ".128" in i.opcode] for body in bodies]
        (hot,) = [i for i, opcodes in enumerate(wide) if opcodes]
        assert [o[:3] for o in wide[hot]] == ["LDG" if backward else "STG"]
        assert len(bodies[hot]) * dtype.itemsize / 16 <= 45.0


@needs_nvdisasm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_machine_code(arch: int, dtype: torch.dtype, op: str) -> None:
    """No spills, 16 bytes at a time whatever n is, and few instructions an element."""
    code = triton_code.whole(arch, dtype, op)
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL", "BAR", "LDS", "STS"))]
    hot = [i.opcode for i in code.hot_path()]
    wide = [o for o in hot if ".128" in o]
    assert sum(o.startswith("LDG") for o in wide) == (2 * 4 if op in READING_OPS else 0)
    assert sum(o.startswith("STG") for o in wide) == 4
    name = str(dtype).removeprefix("torch.")
    assert code.slots_per_element(name) <= (60.0 if op in NOISY_OPS else 32.0)
    if arch == 90 and op == "sample":
        assert triton_code.naive(arch, dtype) > 2 * code.slots_per_element(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernels_compile_for_amd(dtype: torch.dtype, op: str) -> None:
    target = GPUTarget("hip", "gfx942", 64)
    key = key_of(1) if op in NOISY_OPS else None
    x, log_var = inputs(64, 32, dtype=dtype)
    for a, b in ((x, log_var), (x.t(), log_var.t())):
        plan = triton_kernels.plan(a, b, key, torch.empty_like(a), op=op)
        assert triton_run.compile_plan(plan, target).asm["hsaco"]


@pytest.mark.parametrize("shape", [(64, 32), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_compile_for_amd(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, rho = inputs(*shape, dtype=dtype)
    z = torch.empty(3, *shape, dtype=dtype)
    options: dict[str, Any] = {"form": "rho", "bounds": RAISED[0]}
    for plan in (
        triton_kernels.samples_plan(x, rho, key_of(1), z, **options),
        triton_kernels.samples_plan(z, rho, key_of(1), x, torch.empty_like(x), **options),
    ):
        assert triton_run.compile_plan(plan, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]


def test_float64_compiles_for_nvidia(arch: int, op: str) -> None:
    """It calls the device's own functions, which the interpreter of PTX does not follow."""
    x, log_var = inputs(4096, dtype=torch.float64)
    key = key_of(1) if op in NOISY_OPS else None
    plan = triton_kernels.plan(x, log_var, key, torch.empty_like(x), op=op)
    assert triton_run.compile_plan(plan, triton_run.NVIDIA[arch]).asm["cubin"]


def test_one_switch_chooses() -> None:
    program = """
import torch, reparam_fused, sys
assert "reparam_fused.triton_kernels" not in sys.modules
print(reparam_fused.backends()["cuda"])
print(reparam_fused.backends()["triton"])
print(*(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"reparam_fused::{op}", "CUDA")
    for op in ("sample_from_key", "sample")
))
"""
    cuda, triton, kernel = run_python("-c", program, REPARAM_FUSED_GPU="triton").stdout.splitlines()
    assert cuda.startswith("missing (REPARAM_FUSED_GPU=triton)")
    assert triton == "kernels for NVIDIA, AMD and Intel GPUs"
    assert kernel == "True True"
    _, triton, kernel = run_python("-c", program, REPARAM_FUSED_GPU="cuda").stdout.splitlines()
    assert triton.startswith("missing (REPARAM_FUSED_GPU=cuda)")
    assert kernel.split() == [str(_extensions.library is not None), "True"]
    wrong = run_python("-c", program, REPARAM_FUSED_GPU="metal")
    assert "REPARAM_FUSED_GPU must be cuda or triton, got 'metal'" in wrong.stderr


class OlderCudaGenerator:
    """What drawn() asks of torch.Generator on CUDA below torch 2.14."""

    def __init__(self, seed: int, offset: int, within: int = 0) -> None:
        self.seed, self.offset, self.within = seed, offset, within

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


class CudaGenerator(OlderCudaGenerator):
    def philox_state(self, increment: int) -> tuple[Tensor, Tensor, Tensor]:
        def signed(value: int) -> Tensor:
            return torch.tensor([(value + 2**63) % 2**64 - 2**63])

        state = signed(self.seed), signed(self.offset), signed(self.within)
        self.offset = (self.offset + increment) % 2**64
        return state


# The state is "on this device" where a graph is captured: an index makes another of it.
CPU, NOT_CAPTURED = torch.device("cpu"), torch.device("cpu", 0)


def draw(device: torch.device, generator: OlderCudaGenerator, blocks: int) -> Any:
    return _draw.drawn(device, generator, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_the_key_is_the_position_of_the_generator(seed: int) -> None:
    """In Philox blocks, of which it moves on by those that are used, from 2^63 on."""
    offset = 2**63 + 2**34 - 8
    for generator in (CudaGenerator(seed, offset), OlderCudaGenerator(seed, offset)):
        with draw(NOT_CAPTURED, generator, 100) as position:
            key = _draw.key_at(position, CPU)
        assert key.tolist() == [seed, offset // 4 + 2**63]
        assert generator.offset == offset + 400
    with draw(CPU, CudaGenerator(seed, offset, within=40), 100) as position:
        key = _draw.key_at(position, CPU)
    assert key.tolist() == [seed, offset // 4 + 10 + 2**63]


@pytest.mark.parametrize("of_torch", [CudaGenerator, OlderCudaGenerator])
@pytest.mark.parametrize("offset", [8, 2**64 - 40])
def test_a_failed_call_puts_the_generator_back(
    of_torch: type[OlderCudaGenerator], offset: int
) -> None:
    generator = of_torch(3, offset)

    def fail(of_another: int) -> None:
        with draw(NOT_CAPTURED, generator, 100):
            generator.set_offset((generator.offset + of_another) % 2**64)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail(0)
    assert generator.offset == offset
    with pytest.raises(MemoryError):
        fail(8)
    assert generator.offset == (offset + 408) % 2**64


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_draws_the_key(arch: int, dtype: torch.dtype, captured: bool) -> None:
    """And writes it down, once."""
    seed, offset = 2**63 + 5, 2**34 - 8
    device = CPU if captured else NOT_CAPTURED
    for shape, kernel in (
        ((PER_BLOCK[dtype] + 40,), triton_kernels.whole_kernel),
        ((9, 70), triton_kernels.elements_kernel),
    ):
        x, log_var = inputs(*shape, dtype=dtype)
        if kernel is triton_kernels.elements_kernel:
            x, log_var = x[:, 1:], log_var[:, 1:]
        key = torch.zeros(2, dtype=torch.uint64)
        with draw(device, CudaGenerator(seed, offset - 40 * captured, 40), 0) as position:
            out, plan, _ = triton_run.run(
                arch, x, log_var, key, op="sample", undefined=0, position=position
            )
        assert plan.kernel is kernel
        assert key.tolist() == [seed, offset // 4 + 2**63]
        assert_same_bits(out, _ops.sample_from_key(x, log_var, key))


def test_one_compilation_serves_every_position() -> None:
    """The types and attributes that Triton looks its compiled kernels up by do not change."""
    backend = make_backend(triton_run.NVIDIA[90])
    x, log_var = inputs(64, 32)
    key = torch.zeros(2, dtype=torch.uint64)
    for a, b in ((x, log_var), (x.t(), log_var.t())):
        found = set()
        for seed, offset in ((0, 0), (1, 16), (2**31, 2**40), (-(2**63), -4)):
            plan = triton_kernels.plan(
                a, b, key, torch.empty_like(a), op="sample", position=_draw.Position(seed, offset)
            )
            bind = create_function_from_signature(
                plan.kernel.signature, plan.kernel.params, backend
            )
            found.add(str(bind(*plan.arguments, **plan.constants)[1]))
        assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_compilation_serves_all_bounds_and_numbers_of_samples(dtype: torch.dtype) -> None:
    """But for what is added to sigma in a divergence, of which there are those with and without."""
    backend = make_backend(triton_run.NVIDIA[90])

    def compilation(plan: triton_kernels.Plan) -> str:
        bind = create_function_from_signature(plan.kernel.signature, plan.kernel.params, backend)
        return str((bind(*plan.arguments, **plan.constants)[1], plan.constants))

    key = key_of(1)
    for shape in ((16, 16), (15, 15)):
        x, scale = inputs(*shape, dtype=dtype)
        for op in READING_OPS:
            drawn = key if op in SCALED_OPS else None
            for few in (CLAMPED, RAISED):
                plans = [
                    triton_kernels.plan(x, scale, drawn, torch.empty_like(x), op=op, bounds=b)
                    for b in (*few, (1.0, 16.0, few[0][2]), (1e-300, 1e300, few[0][2]))
                ]
                assert len({compilation(plan) for plan in plans}) == 1
        found = set()
        for samples, bounds in ((1, CLAMPED[0]), (2, RAISED[0]), (16, CLAMPED[1]), (7, RAISED[1])):
            z = torch.empty(samples, *shape, dtype=dtype)
            found.add(compilation(triton_kernels.samples_plan(x, scale, key, z, bounds=bounds)))
        assert len(found) == 1


def test_blocks_of_a_call() -> None:
    """A counter for four elements of the output, of two in float64."""

    def blocks(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> int:
        return _draw.blocks(*(torch.empty(shape, dtype=dtype) for shape in shapes))

    assert [blocks((n,), (n,)) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert blocks((5,), (5,), dtype=torch.float64) == 3
    assert blocks((3, 1), (5,)) == 4
    assert _draw.blocks(torch.empty(5), torch.empty(5, dtype=torch.float64)) == 3
