"""The CUDA kernels without a GPU: launches recorded, PTX executed, bits as on the CPU."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import gpu_run
import numpy as np
import pytest
import torch
from digest import extremes
from gpu_run import (
    ARCHS,
    BLOCK,
    CPU_OPS,
    FEW_BLOCKS,
    NOISY_OPS,
    READING_OPS,
    SCALED_OPS,
    Dims,
    GeneratorState,
    Gpu,
    Launch,
    WholeGrid,
    dimensions,
    make_problem,
    numbered,
    run,
)
from helpers import assert_same_bits, inputs, key_of, needs_cuda_build, needs_kernels
from ptx import Machine, Memory, Stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import reparam_fused
from reparam_fused import _ops

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not gpu_run.has_nvcc(), reason="no nvcc to compile the CUDA kernels with"),
]

# Elements of one full block of the kernel for contiguous tensors
PER_BLOCK = {torch.float32: 2048, torch.float64: 1024, torch.float16: 4096, torch.bfloat16: 4096}


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    return Gpu(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(params=ARCHS, ids=lambda arch: f"compute_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture(params=CPU_OPS)
def op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(params=NOISY_OPS)
def noisy_op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def assert_as_on_the_cpu(result: gpu_run.Result, op: str, *arguments: Tensor) -> None:
    """Bits, in float64 too: the kernels are the same headers, though only ULPs are promised."""
    assert_same_bits(result.out, CPU_OPS[op](*arguments))


def test_sizes(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """Whole vectors, tails of every length, one block and several."""
    block = PER_BLOCK[dtype] // 4  # with one vector a thread
    sizes = [*range(1, 18), *range(block - 1, block + 9), 2 * block, 65539]
    for n in sizes:
        x, log_var = inputs(n, dtype=dtype, seed=n)
        key = key_of(0x9E3779B97F4A7C15 + n, 2**32 - 7)
        result = run(gpu, arch, op, x, log_var, key)
        assert result.launch.name.form == "whole"
        assert result.launch.grid == WholeGrid(n, dtype.itemsize).blocks
        assert_as_on_the_cpu(result, op, x, log_var, key)


@pytest.mark.parametrize("offset", [2**32 - 7, 2**63 - 3, 2**64 - 1, 2**64 - 300])
def test_offsets_carry_and_wrap(
    gpu: Gpu, arch: int, noisy_op: str, offset: int, dtype: torch.dtype
) -> None:
    for n in (PER_BLOCK[dtype], 33):
        x, log_var = inputs(n, dtype=dtype)
        key = key_of(2**64 - 59, offset)
        assert_as_on_the_cpu(run(gpu, arch, noisy_op, x, log_var, key), noisy_op, x, log_var, key)


def test_extreme_and_non_finite_values(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """In full blocks and in the rest."""
    log_var = extremes(dtype).repeat(6)
    block = PER_BLOCK[dtype]
    full = log_var.numel() // block
    assert full > 0
    for x in (0.0, 1.0, float("inf"), float("nan")):
        x_tensor = torch.full_like(log_var, x)
        result = run(gpu, arch, op, x_tensor, log_var, key_of(1))
        assert_as_on_the_cpu(result, op, x_tensor, log_var, key_of(1))
        values = x_tensor[: full * block], log_var[: full * block]
        blocks = range(FEW_BLOCKS - full, FEW_BLOCKS)
        window = run_blocks(gpu, arch, op, dtype, FEW_BLOCKS * block, blocks, values=values)
        assert_same_bits(window.out, window.expected)


@pytest.mark.parametrize("op", READING_OPS)
def test_layouts(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """Views are read where they lie: by vectors where their runs allow, else by elements."""
    x, log_var = inputs(3, 10, 7, 16, dtype=dtype)
    wide, _ = inputs(6, 10, 32, dtype=dtype, seed=5)
    views: list[tuple[str, tuple[Tensor, ...]]] = [
        ("rows", wide.chunk(2, dim=-1)),
        ("rows", wide.chunk(2, dim=1)),
        ("rows", (x[0, 0], log_var[:, :, :7].select(1, 3))),
        ("rows", (x[:, 3:4].expand(3, 10, 7, 16), log_var)),
        ("permuted rows", (x.transpose(0, 2), log_var.transpose(0, 2))),
        ("permuted elements", (x.transpose(1, 3), log_var.transpose(1, 3))),
        ("elements", (x.to(memory_format=torch.channels_last), log_var)),
        ("elements", (x[..., ::3], log_var[..., ::3])),
        ("elements", (x.flatten()[1:], log_var.flatten()[1:])),
        ("elements", (x.flatten()[1:41], log_var.flatten()[16:56])),
        ("elements", (x[..., :1].expand(3, 10, 7, 16), log_var)),
        ("elements", tuple(wide[..., :30].chunk(2, dim=-1))),
        ("elements", (x[0, 0, 0, 0].expand(77), log_var.flatten()[:77])),
        ("elements", tuple(inputs(2, 5, 33, dtype=dtype)[0][..., :16])),
        ("elements", (log_var[0, 0], inputs(7, 33, dtype=dtype)[0][:, :16])),
    ]
    key = key_of(11, 2**32 - 3)
    for form, (a, b) in views:
        result = run(gpu, arch, op, a, b, key)
        if form.startswith("permuted ") and op not in NOISY_OPS:
            form, bits = "whole", 64  # memory has an order of its own
        else:
            form, bits = form.removeprefix("permuted "), 32
        assert (result.launch.name.form, result.launch.name.index_bits) == (form, bits)
        assert_as_on_the_cpu(result, op, a, b, key)


def test_batched_keys(gpu: Gpu, arch: int, noisy_op: str, dtype: torch.dtype) -> None:
    """Slices of one counter and of several, in numbers that are and are not powers of two."""
    shapes = [(5, 16), (3, 72), (5, 7), (3, 19), (4, 1)]
    for form, shape in zip(["rows"] * 2 + ["elements"] * 3, shapes, strict=True):
        keys = reparam_fused.split(key_of(17, 2**64 - 1), shape[0])
        x, log_var = inputs(*shape, dtype=dtype)
        result = run(gpu, arch, noisy_op, x, log_var, keys)
        assert result.launch.name.form == form
        assert_as_on_the_cpu(result, noisy_op, x, log_var, keys)


@pytest.mark.parametrize("op", SCALED_OPS)
def test_std(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """The other form of the scale: tails, views, batched keys, extreme values.

    Its gradient reads grad_z alone: what the PTX loads in place of the scale, and does not use,
    ptxas leaves out (test_machine_code.py counts).
    """
    x, std = inputs(3, 10, 7, 16, dtype=dtype)
    cases = [
        ("whole", *inputs(PER_BLOCK[dtype] + 5, dtype=dtype), key_of(2**64 - 59, 2**64 - 300)),
        ("whole", torch.ones_like(extremes(dtype)), extremes(dtype), key_of(3)),
        ("rows", x.transpose(0, 2), std.transpose(0, 2), key_of(11, 2**32 - 3)),
        ("elements", x[..., ::3], std[..., ::3], key_of(12)),
        ("elements", *inputs(5, 7, dtype=dtype), reparam_fused.split(key_of(17), 5)),
    ]
    for kernel, a, b, key in cases:
        result = run(gpu, arch, op, a, b if op == "sample" else a, key, form="std")
        assert (result.launch.name.form, result.launch.name.scale) == (kernel, "Std")
        arguments = (a, b if op == "sample" else None, key, "std")
        assert_same_bits(result.out, CPU_OPS[op](*arguments))


# The kernel, global_shape, global_offset, shape
BLOCKS = [
    ("whole", (6000,), (256,), (5001,)),
    ("whole", (30, 40), (7, 0), (11, 40)),
    ("rows", (30, 64), (7, 16), (11, 32)),
    ("rows", (3, 5, 8, 16), (1, 2, 4, 0), (2, 3, 4, 16)),
    ("elements", (6000,), (257,), (3001,)),
    ("elements", (30, 41), (7, 13), (11, 20)),
    ("elements", (30, 43), (7, 3), (11, 40)),
    ("elements", (64, 3), (5, 1), (50, 1)),
    ("elements", (5, 6, 7), (1, 2, 3), (3, 3, 3)),
    ("elements", (9,), (7,), (1,)),
]


@pytest.mark.parametrize(("kernel", "whole", "offset", "shape"), BLOCKS)
def test_blocks(
    gpu: Gpu,
    arch: int,
    noisy_op: str,
    kernel: str,
    whole: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Each element has the noise of its place in the whole."""
    x, scale = inputs(*shape, dtype=dtype)
    key = key_of(77, 2**32 - 9)
    result = run(gpu, arch, noisy_op, x, scale, key, block=(whole, offset))
    assert result.launch.name.form == kernel
    assert_same_bits(result.out, CPU_OPS[noisy_op](x, scale, key, "log_var", whole, offset))


def test_a_block_far_out_with_batched_keys(
    gpu: Gpu, arch: int, noisy_op: str, dtype: torch.dtype
) -> None:
    for kernel, whole, offset, shape in (
        ("rows", (9, 2**30, 2**20), (4, 2**29 + 1, 2**19), (3, 2, 16)),
        ("elements", (9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7), (3, 2, 9)),
    ):
        x, scale = inputs(*shape, dtype=dtype)
        keys = reparam_fused.split(key_of(77, 2**64 - 3), 6)[::2]  # read where they lie
        result = run(gpu, arch, noisy_op, x, scale, keys, block=(whole, offset))
        assert result.launch.name.form == kernel
        assert_same_bits(result.out, CPU_OPS[noisy_op](x, scale, keys, "log_var", whole, offset))


@functools.cache
def window(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return inputs(n, dtype=dtype, seed=3)


class Window(NamedTuple):
    launch: Launch
    stats: Stats
    out: Tensor
    expected: Tensor  # what the CPU makes of the same values at the same counters

    @property
    def kind(self) -> tuple[str, int]:
        return self.launch.name.form, self.launch.name.index_bits


def run_window(
    gpu: Gpu,
    arch: int,
    op: str,
    dtype: torch.dtype,
    dims: Dims,
    blocks: range,
    elements: range,
    *,
    values: tuple[Tensor, Tensor] | None = None,
    offset: int = 2**64 - 2**31,  # wraps within the tensor
    form: str = "log_var",
) -> Window:
    """A few blocks of a launch that no memory would hold.

    `elements` are the logical indices that the blocks compute; x and log_var have their values
    there, at the places that dims gives them.
    """
    itemsize = torch.empty(0, dtype=dtype).element_size()
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[itemsize]
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
    index = np.arange(elements.start, elements.stop)
    places = np.zeros((3, index.size), np.int64)
    rest = index
    for size, strides in reversed(dims):
        rest, along = rest // size, rest % size
        places += along * np.array(strides)[:, None]
    memory = Memory()
    values = values or window(index.size, dtype)
    addresses = []
    arrays = []
    for name, where, value in zip(("x", "log_var", "out"), places, (*values, None), strict=True):
        start = int(where.min())
        array = np.zeros(int(where.max()) - start + 1, bits)
        if value is not None:
            array[where - start] = value.view(ints).numpy().view(bits)
        arrays.append(array)
        if op == "noise" and value is not None:
            addresses.append(0)  # nothing is there to read
            continue
        addresses.append(
            memory.allocate(name, array, writable=value is None, start=start * itemsize)
        )
    key = np.array([77, offset], np.uint64)
    numel = int(np.prod([size for size, _ in dims]))
    problem = make_problem(
        numbered(dims, numel),
        (addresses[0], addresses[1], addresses[2]),
        memory.allocate("key", key),
        form=form,
    )
    status, (launch,) = gpu.record(op, dtype, problem)
    assert status == 0
    machine = Machine(gpu.kernel(arch, launch.kernel), memory)
    stats = machine.launch((launch.grid, 1, 1), (launch.block, 1, 1), launch.params, blocks=blocks)
    if len(dims) == 1:
        memory.check_written_once("out")
    out = arrays[2][places[2] - places[2].min()].view(
        {2: np.int16, 4: np.int32, 8: np.int64}[itemsize]
    )
    per_counter = 2 if dtype == torch.float64 else 4
    assert elements.start % per_counter == 0
    scale = None if (op, form) == ("sample_backward", "std") else values[1]
    key = key_of(77, offset + elements.start // per_counter)
    expected = CPU_OPS[op](values[0], scale, key, form)
    return Window(launch, stats, torch.from_numpy(out.copy()).view(dtype), expected)


def run_blocks(
    gpu: Gpu, arch: int, op: str, dtype: torch.dtype, numel: int, blocks: range, **options: Any
) -> Window:
    """These blocks of a contiguous tensor."""
    grid = WholeGrid(numel, dtype.itemsize)
    window = run_window(
        gpu, arch, op, dtype, [(numel, [1, 1, 1])], blocks, grid.elements(blocks), **options
    )
    assert (window.kind, window.launch.grid) == (("whole", 64), grid.blocks)
    return window


def test_full_blocks(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """Where there are enough: what they leave by vectors, and what is left of a vector."""
    block = PER_BLOCK[dtype]
    numel = FEW_BLOCKS * block
    per_counter = 2 if dtype == torch.float64 else 4
    carry = 2**64 - numel // per_counter + 3  # the offset wraps in the last full block
    for rest in (0, 1, 16 // dtype.itemsize + 1, block // 4, block // 2 + 3, block - 1):
        blocks = range(FEW_BLOCKS - 1, WholeGrid(numel + rest, dtype.itemsize).blocks)
        for form in ("log_var", "std") if op in SCALED_OPS else ("log_var",):
            window = run_blocks(gpu, arch, op, dtype, numel + rest, blocks, offset=carry, form=form)
            assert_same_bits(window.out, window.expected)
    # with an element less every thread takes one vector
    last = WholeGrid(numel - 1, dtype.itemsize).blocks
    window = run_blocks(gpu, arch, op, dtype, numel - 1, range(last - 2, last))
    assert window.launch.grid >= 4 * FEW_BLOCKS
    assert_same_bits(window.out, window.expected)


@pytest.mark.parametrize("numel", [2**31 + 4103, 2**33 + 77, 2**35 + 5])
def test_windows_of_large_contiguous_tensors(
    gpu: Gpu, arch: int, op: str, numel: int, dtype: torch.dtype
) -> None:
    last = WholeGrid(numel, dtype.itemsize).blocks
    for blocks in (range(last // 2, last // 2 + 2), range(last - 2, last)):
        window = run_blocks(gpu, arch, op, dtype, numel, blocks)
        assert_same_bits(window.out, window.expected)


@pytest.mark.parametrize("rows", [2**10, 2**11 + 1, 2**13 + 3])
def test_windows_of_large_views(
    gpu: Gpu, arch: int, op: str, rows: int, dtype: torch.dtype
) -> None:
    """2^30 elements go with 32-bit indices, and more than 2^31 with 64-bit ones."""
    columns = 2**20
    bits = 32 if rows * columns < 2**31 else 64
    per_vector = 16 // torch.empty(0, dtype=dtype).element_size()
    per_counter = 2 if dtype == torch.float64 else 4
    for form, strides, per_thread in (
        ("rows", [2 * columns, columns, columns], per_vector),
        ("elements", [2 * columns + 1, columns, columns], per_counter),
    ):
        dims = [(rows, strides), (columns, [1, 1, 1])]
        first = rows * columns // (BLOCK * per_thread) - 1  # the last block
        elements = range(first * BLOCK * per_thread, rows * columns)
        window = run_window(gpu, arch, op, dtype, dims, range(first, first + 1), elements)
        assert window.kind == (form, bits)
        assert_same_bits(window.out, window.expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_windows_of_dimensions_beyond_32_bits(
    gpu: Gpu, arch: int, op: str, dtype: torch.dtype
) -> None:
    """Sizes and indices that share the upper half of 64 bits, where division has a shortcut."""
    size = 2**35 + 128
    for form, dims, per_thread in (
        ("rows", [(2, [2 * size, size, size]), (size, [1, 1, 1])], 8),
        ("elements", [(2, [size + 1, size, size]), (size, [1, 1, 1])], 4),
    ):
        first = 2 * size // (BLOCK * per_thread) - 1
        elements = range(first * BLOCK * per_thread, (first + 1) * BLOCK * per_thread)
        window = run_window(gpu, arch, op, dtype, dims, range(first, first + 1), elements)
        assert window.kind == (form, 64)
        assert_same_bits(window.out, window.expected)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("form", ["whole", "full blocks", "rows", "elements"])
def test_the_generator_gives_the_key(
    gpu: Gpu, arch: int, form: str, captured: bool, dtype: torch.dtype
) -> None:
    """By value, or read on the device where a graph is captured: and the kernel writes it down."""
    n = PER_BLOCK[dtype] * (FEW_BLOCKS if form == "full blocks" else 1) + 40
    x, log_var = inputs(1 if form == "full blocks" else 2, n, dtype=dtype)
    out = torch.empty_like(x)
    if form in ("whole", "full blocks"):
        x, log_var, out = x[0], log_var[0], out[0]
    elif form == "elements":
        x, log_var, out = x[:, 1:9], log_var[:, 1:9], out[:, 1:9]
    else:
        x, log_var, out = x[:, :16], log_var[:, :16], out[:, :16]
    seed, offset = 2**63 + 5, 2**32 - 2
    memory = Memory()
    addresses = (
        memory.allocate("x", gpu_run.storage(x)) + x.storage_offset() * x.element_size(),
        memory.allocate("log_var", gpu_run.storage(log_var))
        + log_var.storage_offset() * x.element_size(),
        memory.allocate("out", gpu_run.storage(out), writable=True)
        + out.storage_offset() * x.element_size(),
    )
    key = np.full(2, 2**64 - 1, np.uint64)
    key_out = memory.allocate("key", key, writable=True)
    state = GeneratorState(seed=seed, offset=4 * offset, key_out=key_out)
    if captured:
        # the graph's own part of the offset comes on top
        state = GeneratorState(
            offset=4 * 6,
            captured_seed=memory.allocate("seed", np.array([seed], np.uint64)),
            captured_offset=memory.allocate("offset", np.array([4 * (offset - 6)], np.uint64)),
            key_out=key_out,
        )
    dims, _ = dimensions(x, log_var, out, key_of(0))
    problem = make_problem(dims, addresses, 0)
    status, (launch,) = gpu.record("sample", dtype, problem, state)
    assert (status, launch.name.form) == (0, form.replace("full blocks", "whole"))
    machine = Machine(gpu.kernel(arch, launch.kernel), memory)
    # of many full blocks the first one, which is not the only one to draw
    blocks = range(2) if form == "full blocks" else range(launch.grid)
    machine.launch((launch.grid, 1, 1), (launch.block, 1, 1), launch.params, blocks=blocks)
    memory.check_written_once("key")
    assert key.tolist() == [seed, offset + 2**63]
    expected = _ops.sample_from_key(x, log_var, key_of(seed, offset + 2**63))
    if form == "full blocks":
        out, expected = (t[: 2 * PER_BLOCK[dtype]] for t in (out, expected))
    assert_same_bits(out, expected)


def test_the_hardware_s_approximate_root_does_not_show(gpu: Gpu, arch: int) -> None:
    """rsqrt.approx may be off by 2^-22.9: by that much either way, or by chance, the bits hold."""
    x, log_var = inputs(65536)
    key = key_of(5)
    expected = _ops.sample_from_key(x, log_var, key)
    for error in (-1.0, 1.0, np.random.default_rng(0)):
        result = run(gpu, arch, "sample", x, log_var, key, approx_error=error)
        assert_same_bits(result.out, expected)


def test_traffic(gpu: Gpu, arch: int, op: str, dtype: torch.dtype) -> None:
    """Each element is read twice and written once, 16 bytes at a time: 12 bytes in float32.

    Of noise it is only written.
    """
    reads = op in READING_OPS
    size = dtype.itemsize
    n = 4 * PER_BLOCK[dtype]
    blocks = range(FEW_BLOCKS - 4, FEW_BLOCKS)
    full = run_blocks(gpu, arch, op, dtype, FEW_BLOCKS * PER_BLOCK[dtype], blocks).stats
    few = run(gpu, arch, op, *inputs(n, dtype=dtype), key_of(1)).stats
    for stats, scale in ((full, "log_var"), (few, "scale")):
        assert stats.read_bytes["x"] == stats.read_bytes[scale] == (n * size if reads else 0)
        assert stats.written_bytes["out"] == n * size
        for name, kind in (("x", "ld"), (scale, "ld"), ("out", "st"))[0 if reads else 2 :]:
            assert set(stats.widths[name, kind]) == {16}
            assert stats.sectors[name] == n * size // 32  # every sector is used whole
    # what is left of a vector goes one by one, and no more; rows of vectors never do
    left = run(gpu, arch, op, *inputs(n + 5, dtype=dtype), key_of(1)).stats
    per_vector = 16 // size
    rows = run(gpu, arch, op, *inputs(64, 64, dtype=dtype)[0].chunk(2, dim=1), key_of(1)).stats
    for access in (("x", "ld"), ("out", "st"))[0 if reads else 1 :]:
        assert left.widths[access] == {16: (n + 5) // per_vector, size: 5 % per_vector}
        assert set(rows.widths[access]) == {16}


def test_noise_reads_nothing_but_the_key(gpu: Gpu, arch: int) -> None:
    """In every kernel of it: the addresses of operands are not even taken."""
    for name in re.findall(r"\.entry (\w+)\(", gpu.source("noise", arch)):
        text = gpu.kernel_source(arch, name)
        assert re.findall(r"ld\.(?!param)\S+", text) == ["ld.global.nc.u64"] * 2, name
        assert f"{name}_param_2" in text.partition("{")[2]
        for operand in (0, 1):
            assert f"{name}_param_{operand}" not in text.partition("{")[2]


def test_nothing_is_launched_for_an_empty_problem(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    for dims in ([(0, [1, 1, 1])], [(3, [0, 1, 1]), (0, [1, 1, 1])]):
        assert gpu.record(op, dtype, make_problem(numbered(dims, 0), (0, 0, 0), 0)) == (0, [])


def test_a_launch_goes_to_the_given_stream_without_shared_memory(gpu: Gpu, op: str) -> None:
    problem = make_problem([(5000, [1, 1, 1, 1, 0])], (4096, 8192, 16384), 256)
    status, (launch,) = gpu.record(op, torch.float32, problem, stream=0x1234)
    assert (status, launch.stream, launch.shared_bytes) == (0, 0x1234, 0)
    assert (launch.grid, launch.block) == (10, BLOCK)  # 1250 vectors


def test_a_grid_that_no_gpu_has_is_refused(gpu: Gpu, op: str) -> None:
    problem = make_problem([(2**46, [2, 2, 2, 1, 0])], (4096, 8192, 16384), 256)
    status, launches = gpu.record(op, torch.float32, problem)
    assert (status, launches) == (9, [])  # cudaErrorInvalidConfiguration


def test_a_device_without_a_binary_is_named(gpu: Gpu) -> None:
    message = gpu.binary_message(209, 7, 5)  # cudaErrorNoKernelImageForDevice
    assert message is not None
    assert gpu.binary_message(0, 9, 0) is None
    assert "compute capability 7.5" in message
    assert "this build has 9.0" in message
    assert 'TORCH_CUDA_ARCH_LIST="7.5"' in message


needs_cuda_extension = pytest.mark.skipif(
    _ops.cuda_extension is None,
    reason=f"the CUDA extension is not built: {_ops.cuda_missing_reason}",
)


@needs_cuda_extension
def test_the_extension_works_without_a_gpu() -> None:
    """It was imported with the package; the CPU path runs beside it."""
    assert reparam_fused.backends()["cuda"].startswith("C++ kernels for compute capability 8.0 8.6")
    x, log_var = inputs(99)
    assert reparam_fused.fused_reparameterize(x, log_var).isfinite().all()
    for name in ("sample_from_key", *gpu_run.OPS):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"reparam_fused::{name}", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_cuda_build
def test_cuda_tensors_are_refused_by_name_without_a_driver() -> None:
    with pytest.raises(RuntimeError, match="NVIDIA"):
        reparam_fused.key(42, device="cuda")


@needs_cuda_build
@pytest.mark.parametrize("with_key", [False, True])
def test_fake_cuda_tensors_trace(with_key: bool, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        mu = torch.empty(4, 1, 6, device="cuda", dtype=dtype, requires_grad=True)
        log_var = torch.empty(4, 5, 6, device="cuda", dtype=dtype, requires_grad=True)
        key = torch.empty(2, dtype=torch.uint64, device="cuda")
        z = reparam_fused.fused_reparameterize(mu, log_var, key=key if with_key else None)
        # the autograd engine itself asks for a device, so the backward op is called alone
        for out in (z, _ops.sample_backward(z, log_var, key)):
            assert (out.shape, out.dtype, out.device.type) == ((4, 5, 6), dtype, "cuda")
            assert out.stride() == torch.add(mu, log_var).stride()
        assert z.requires_grad


def test_ptx_is_what_the_build_compiles() -> None:
    """The interpreter's sources are the build's: every .cu file of csrc/cuda."""
    built = {path.stem for path in (Path(gpu_run.ROOT) / "csrc" / "cuda").glob("*.cu")}
    assert built == set(gpu_run.OPS)
