"""The CUDA kernels on the stand-in GPU, for every architecture: bits as on the CPU, and traffic.

The binding, the choice of a kernel and its launch are the installed extension's; the kernel is what
nvcc makes of csrc/cuda for an architecture here. Of the four of them 80 differs from 90 by the
clamp alone, and 120 from 100 by its name, so that MAIN takes every test and the others a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import machine_code
import numpy as np
import pytest
import torch
from digest import extremes
from gpu.stand_in import StandIn
from gpu_run import BLOCK, FEW_BLOCKS, Gpu, Result, WholeGrid, Window, ptx
from helpers import (
    DTYPES,
    FORMS,
    NOISY_OPS,
    OPS,
    READING_OPS,
    SCALED_OPS,
    assert_same_bits,
    inputs,
    key_of,
    needs_cuda_build,
    needs_kernels,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import reparam_fused
from reparam_fused import _extensions, _ops

pytestmark = needs_kernels
needs_cuda_extension = pytest.mark.skipif(
    not _extensions.has_cuda,
    reason=f"there are no CUDA kernels: {_extensions.cuda_missing_reason}",
)

MAIN = 90
KEY = key_of(17, 2**32 - 7)
BOUNDS = (-0.5, 0.75, 0.125)
ARCHS = (MAIN, 80, 100, 120)
# Elements of one full block of the kernel for contiguous tensors
PER_BLOCK = {torch.float32: 2048, torch.float64: 1024, torch.float16: 4096, torch.bfloat16: 4096}


def on(stand_in: StandIn, arch: int) -> Gpu:
    if not _extensions.has_cuda:
        pytest.skip(f"not by the CUDA kernels: {_extensions.cuda_missing_reason}")
    if not machine_code.has_nvcc():
        pytest.skip("no nvcc to compile the CUDA kernels with")
    return Gpu(stand_in, arch)


@pytest.fixture
def gpu(stand_in: StandIn) -> Gpu:
    return on(stand_in, MAIN)


@pytest.fixture(params=ARCHS, ids=lambda arch: f"compute_{arch}")
def each_gpu(stand_in: StandIn, request: pytest.FixtureRequest) -> Gpu:
    return on(stand_in, request.param)


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(params=NOISY_OPS)
def noisy_op(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def assert_as_on_the_cpu(result: Result, op: str, *arguments: object) -> None:
    """Bits, in float64 too: the kernels are the same headers, though only ULPs are promised."""
    assert_same_bits(result.out, OPS[op](*arguments))


def per_counter(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float64 else 4


def test_sizes(each_gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Whole vectors, tails of every length, one block and several."""
    block = PER_BLOCK[dtype] // 4  # with one vector a thread
    sizes = [*range(1, 18), *range(block - 1, block + 9), 2 * block, 65539]
    if each_gpu.arch != MAIN:
        sizes = [1, 7, 17, block - 1, block + 3, 4099]
    for n in sizes:
        x, log_var = inputs(n, dtype=dtype, seed=n)
        key = key_of(0x9E3779B97F4A7C15 + n, 2**32 - 7)
        result = each_gpu.run(op, x, log_var, key)
        assert result.name.form == "whole"
        assert result.run.grid == (WholeGrid(n, dtype.itemsize).blocks, 1, 1)
        assert result.run.block == (BLOCK, 1, 1)
        assert_as_on_the_cpu(result, op, x, log_var, key)


@pytest.mark.parametrize("offset", [2**32 - 7, 2**63 - 3, 2**64 - 1, 2**64 - 300])
def test_offsets_carry_and_wrap(gpu: Gpu, noisy_op: str, offset: int, dtype: torch.dtype) -> None:
    for n in (PER_BLOCK[dtype], 33):
        x, log_var = inputs(n, dtype=dtype)
        key = key_of(2**64 - 59, offset)
        assert_as_on_the_cpu(gpu.run(noisy_op, x, log_var, key), noisy_op, x, log_var, key)


def run_blocks(
    gpu: Gpu,
    op: str,
    dtype: torch.dtype,
    numel: int,
    blocks: Iterable[range],
    *,
    values: tuple[Tensor, Tensor] | None = None,
    offset: int = 2**64 - 2**31,  # wraps within the tensor
    form: str = "log_var",
    bounds: tuple[float, float, float] | None = None,
) -> Result:
    """These blocks of a contiguous tensor, to the bits of the CPU."""
    grid = WholeGrid(numel, dtype.itemsize)
    x, scale = (torch.empty(numel, dtype=dtype, device="cuda") for _ in range(2))
    windows = [Window(some, grid.elements(some)) for some in blocks]
    values = values or inputs(2**16, dtype=dtype, seed=3)
    key = key_of(77, offset)
    options: dict[str, Any] = {"key": key, "form": form, "bounds": bounds}
    (run,), out, expected = gpu.windows(op, x, scale, windows, values, **options)
    result = Result(out, run)
    assert (result.name.form, run.grid[0]) == ("whole", grid.blocks)
    assert_same_bits(out, expected)
    return result


def test_full_blocks(each_gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Where there are enough: what they leave by vectors, and what is left of a vector."""
    block = PER_BLOCK[dtype]
    numel = FEW_BLOCKS * block
    carry = 2**64 - numel // per_counter(dtype) + 3  # the offset wraps in the last full block
    rests = [0, 1, 16 // dtype.itemsize + 1, block // 4, block // 2 + 3, block - 1]
    for rest in rests if each_gpu.arch == MAIN else rests[-2:]:
        blocks = range(FEW_BLOCKS - 1, WholeGrid(numel + rest, dtype.itemsize).blocks)
        for form in ("log_var", "std") if op in SCALED_OPS else ("log_var",):
            run_blocks(each_gpu, op, dtype, numel + rest, [blocks], offset=carry, form=form)
    # with an element less every thread takes one vector
    last = WholeGrid(numel - 1, dtype.itemsize).blocks
    result = run_blocks(each_gpu, op, dtype, numel - 1, [range(last - 2, last)])
    assert result.run.grid[0] >= 4 * FEW_BLOCKS


@pytest.mark.parametrize("op", SCALED_OPS)
def test_full_blocks_of_every_form(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Within bounds and without, each by a kernel of its own, and what they leave."""
    for form, bounds in itertools.product(FORMS, (None, BOUNDS)):
        numel = FEW_BLOCKS * PER_BLOCK[dtype] + 9
        blocks = range(FEW_BLOCKS - 1, WholeGrid(numel, dtype.itemsize).blocks)
        name = run_blocks(gpu, op, dtype, numel, [blocks], form=form, bounds=bounds).name
        assert (name.scale, name.bounded) == (form, bounds is not None)


@pytest.mark.parametrize("op", READING_OPS)
def test_rows_of_every_form(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """By a kernel of the form; where elements lie otherwise, by that of any."""
    x, scale = inputs(9, 64, dtype=dtype)
    key = key_of(11, 2**32 - 3)
    for form, bounds in itertools.product(FORMS, (None, BOUNDS)):
        read = None if (op, form, bounds) == ("sample_backward", "std", None) else scale
        for kind, first in (("rows", 8), ("elements", 9)):
            views = [None if t is None else t[:, first : first + 32] for t in (x, read)]
            arguments = (*views, key, form, None, None, bounds)
            result = gpu.run(op, *arguments)
            expected = (
                ("rows", form, bounds is not None) if kind == "rows" else (kind, "any", False)
            )
            assert (result.name.form, *result.name[2:4]) == expected
            assert_as_on_the_cpu(result, op, *arguments)


def test_extreme_and_non_finite_values(each_gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """In full blocks and in the rest."""
    log_var = extremes(dtype).repeat(6)
    block = PER_BLOCK[dtype]
    full = log_var.numel() // block
    assert full > 0
    for x in (0.0, 1.0, float("inf"), float("nan")):
        x_tensor = torch.full_like(log_var, x)
        result = each_gpu.run(op, x_tensor, log_var, key_of(1))
        assert_as_on_the_cpu(result, op, x_tensor, log_var, key_of(1))
        blocks = range(FEW_BLOCKS - full, FEW_BLOCKS)
        values = x_tensor, log_var
        run_blocks(each_gpu, op, dtype, FEW_BLOCKS * block, [blocks], values=values)


@pytest.mark.parametrize("op", READING_OPS)
def test_layouts(each_gpu: Gpu, op: str, dtype: torch.dtype) -> None:
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
        ("rows", (x[..., 3:4].expand(3, 10, 7, 16), log_var)),
        ("rows", (x, log_var[..., 5:6])),
        ("rows", (x.transpose(0, 1)[..., :1], log_var.transpose(0, 1))),
        ("rows", (log_var, x[0, 0, 0, 1])),
        ("rows", (x[0, 0, 0, 3], log_var[0, :, 1:, :1].expand(10, 6, 16))),
        ("elements", (x[..., 1:], log_var[..., :1])),
        ("elements", tuple(wide[..., :30].chunk(2, dim=-1))),
        ("elements", (x[0, 0, 0, 0].expand(77), log_var.flatten()[:77])),
        ("elements", tuple(inputs(2, 5, 33, dtype=dtype)[0][..., :16])),
        ("elements", (log_var[0, 0], inputs(7, 33, dtype=dtype)[0][:, :16])),
    ]
    key = key_of(11, 2**32 - 3)
    for form, (a, b) in views:
        result = each_gpu.run(op, a, b, key)
        if form.startswith("permuted ") and op not in NOISY_OPS:
            kind = "whole"  # memory has an order of its own
        else:
            kind = form.removeprefix("permuted ")
        assert result.name.form == kind
        assert_as_on_the_cpu(result, op, a, b, key)


def test_batched_keys(gpu: Gpu, noisy_op: str, dtype: torch.dtype) -> None:
    """Slices of one counter and of several, in numbers that are and are not powers of two."""
    shapes = [(5, 16), (3, 72), (5, 7), (3, 19), (4, 1)]
    for form, shape in zip(["rows"] * 2 + ["elements"] * 3, shapes, strict=True):
        keys = reparam_fused.split(key_of(17, 2**64 - 1), shape[0])
        x, log_var = inputs(*shape, dtype=dtype)
        result = gpu.run(noisy_op, x, log_var, keys)
        assert result.name.form == form
        assert_as_on_the_cpu(result, noisy_op, x, log_var, keys)


@pytest.mark.parametrize("op", SCALED_OPS)
def test_std(each_gpu: Gpu, op: str, dtype: torch.dtype) -> None:
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
        arguments = (a, b if op == "sample" else None, key, "std")
        result = each_gpu.run(op, *arguments)
        scale = "any" if kernel == "elements" else "std"
        assert (result.name.form, result.name.scale) == (kernel, scale)
        assert_as_on_the_cpu(result, op, *arguments)


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


def test_blocks(gpu: Gpu, noisy_op: str, dtype: torch.dtype) -> None:
    """Each element has the noise of its place in the whole."""
    for kernel, whole, offset, shape in BLOCKS:
        x, scale = inputs(*shape, dtype=dtype)
        arguments = (x, scale, key_of(77, 2**32 - 9), "log_var", whole, offset)
        result = gpu.run(noisy_op, *arguments)
        assert result.name.form == kernel
        assert_as_on_the_cpu(result, noisy_op, *arguments)


def test_a_block_far_out_with_batched_keys(gpu: Gpu, noisy_op: str, dtype: torch.dtype) -> None:
    for kernel, whole, offset, shape in (
        ("rows", (9, 2**30, 2**20), (4, 2**29 + 1, 2**19), (3, 2, 16)),
        ("elements", (9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7), (3, 2, 9)),
    ):
        x, scale = inputs(*shape, dtype=dtype)
        keys = reparam_fused.split(key_of(77, 2**64 - 3), 6)[::2]  # read where they lie
        arguments = (x, scale, keys, "log_var", whole, offset)
        result = gpu.run(noisy_op, *arguments)
        assert result.name.form == kernel
        assert_as_on_the_cpu(result, noisy_op, *arguments)


def test_windows_of_large_contiguous_tensors(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Of more elements than 31 bits count, and of more vectors than 32 do."""
    for numel in (2**31 + 4103, 2**32 * (16 // dtype.itemsize) + 5):
        last = WholeGrid(numel, dtype.itemsize).blocks
        blocks = [range(last // 2, last // 2 + 2), range(last - 2, last)]
        run_blocks(gpu, op, dtype, numel, blocks)


# csrc/cuda/launch.cpp: what is not whole goes by parts of so many elements
MOST_ELEMENTS = 2**31 - 16


def parts(rows: int, columns: int, form: str) -> list[tuple[range, str]]:
    """The elements of each launch for a view of rows, of which a single one may be whole."""
    most = max(MOST_ELEMENTS // columns, 1)
    made = []
    for row in range(0, rows, most):
        part = range(row * columns, min(row + most, rows) * columns)
        if form == "rows" and len(part) == columns:
            made.append((part, "whole"))
            continue
        for first in range(part.start, part.stop, MOST_ELEMENTS):
            made.append((range(first, min(first + MOST_ELEMENTS, part.stop)), form))
    return made


def windows_of(launches: list[tuple[range, str]], dtype: torch.dtype) -> tuple[list[Window], Any]:
    """The first and the last blocks of each launch and one between; the forms and the grids."""
    windows, expected = [], []
    for launch, (part, form) in enumerate(launches):
        if form == "whole":
            grid = WholeGrid(len(part), dtype.itemsize)
            blocks, elements = grid.blocks, grid.elements
        else:
            per_block = BLOCK * (16 // dtype.itemsize if form == "rows" else per_counter(dtype))
            blocks = -(-len(part) // per_block)

            def elements(some: range, step: int = per_block, numel: int = len(part)) -> range:
                return range(some.start * step, min(some.stop * step, numel))

        expected.append((form, blocks))
        for block in sorted({0, blocks // 3, blocks - 1}):
            some = range(block, block + 1)
            there = elements(some)
            moved = range(part.start + there.start, part.start + there.stop)
            windows.append(Window(some, moved, launch))
    return windows, expected


def run_view(
    gpu: Gpu,
    op: str,
    shape: tuple[int, int],
    strides: tuple[int, int],
    form: str,
    dtype: torch.dtype,
    *,
    first: int = 0,
    key: Tensor | None = None,
    **options: Any,
) -> None:
    """Some blocks of each launch of a call whose x is a view."""
    span = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    x = torch.empty(span, dtype=dtype, device="cuda").as_strided(shape, strides, first)
    scale = torch.empty(shape, dtype=dtype, device="cuda")
    windows, launches = windows_of(parts(*shape, form), dtype)
    values = inputs(2**16, dtype=dtype, seed=3)
    key = key_of(77, 2**64 - 2**31) if key is None else key
    runs, out, expected = gpu.windows(op, x, scale, windows, values, key=key, **options)
    assert [(Result(out, run).name.form, run.grid[0]) for run in runs] == launches
    assert_same_bits(out, expected)


@pytest.mark.parametrize("op", READING_OPS)
@pytest.mark.parametrize("rows", [2**10, 2**11, 2**11 + 1, 2**13 + 3])
def test_windows_of_large_views(gpu: Gpu, op: str, rows: int, dtype: torch.dtype) -> None:
    """2^30 elements are one launch; of 2^31 and more each part is one, the last a single row."""
    run_view(gpu, op, (rows, 2**20), (2**21, 1), "rows", dtype)
    run_view(gpu, op, (rows, 2**20), (2**21 + 8, 1), "elements", dtype, first=1)


@pytest.mark.parametrize("op", READING_OPS)
def test_windows_of_rows_beyond_31_bits(gpu: Gpu, op: str) -> None:
    """Each goes by itself: whole, or by parts that begin with vectors of both operands."""
    size = 2**32 + 128
    run_view(gpu, op, (2, size), (2 * size, 1), "rows", torch.bfloat16)
    run_view(gpu, op, (2, size), (size + 8, 1), "elements", torch.bfloat16, first=1)
    run_view(gpu, op, (1, size), (size, 1), "elements", torch.bfloat16, first=1)


@pytest.mark.parametrize("op", READING_OPS)
def test_windows_of_far_rows(gpu: Gpu, op: str) -> None:
    """In memory further from each other than 32 bits count, and in the noise of the whole."""
    # both halves of a stride in bytes, and the top bit of the lower one
    shape, far, key = (3, 2**11), 2**33 + 2**30, key_of(5, 2**64 - 9)

    def in_block(element: int) -> tuple[Tensor, int]:
        row, column = divmod(element, shape[1])
        return key, (row + 1) * far + column + 2**32 + 8

    block: dict[str, Any] = {"place": ((5, far), (1, 2**32 + 8)), "noise_at": in_block}
    for form, first in (("rows", 0), ("elements", 1)):
        run_view(gpu, op, shape, (far, 1), form, torch.bfloat16, first=first)
        run_view(gpu, op, shape, (far, 1), form, torch.bfloat16, first=first, key=key, **block)


@pytest.mark.parametrize(
    ("noisy_op", "form"),
    [*((op, "rows") for op in NOISY_OPS), *((op, "elements") for op in SCALED_OPS)],
)
def test_windows_of_large_blocks_and_batches(gpu: Gpu, noisy_op: str, form: str) -> None:
    """A part has the noise of its place: in its slice, in the whole, or by its own keys."""
    rows, columns, first = 2**11 + 1, 2**20, int(form == "elements")
    key, keys = key_of(5, 2**64 - 9), reparam_fused.split(key_of(17, 2**64 - 3), rows)
    views: dict[str, Any] = {"shape": (rows, columns), "strides": (columns + 8, 1), "form": form}
    views |= {"first": first, "dtype": torch.bfloat16}
    whole, offset = (rows + 5, 3 * columns), (5, columns + 4)

    def in_block(element: int) -> tuple[Tensor, int]:
        row, column = divmod(element, columns)
        return key, (row + offset[0]) * whole[1] + column + offset[1]

    def in_batch(element: int) -> tuple[Tensor, int]:
        return keys[element // columns], element % columns

    run_view(gpu, noisy_op, **views, key=key, place=(whole, offset), noise_at=in_block)
    run_view(gpu, noisy_op, **views, key=keys, noise_at=in_batch)


def test_a_large_draw_by_parts(gpu: Gpu) -> None:
    """One launch for the key, and then as with that key."""
    row = inputs(63, dtype=torch.bfloat16)[0]
    x = row.cuda().expand((2**31 + 2**20) // 63, 63)
    results: list[Tensor] = []
    gpu.stand_in.blocks = lambda grid: range(1)
    runs = gpu.calls(lambda: results.extend(_ops.sample(x, x, None)))
    sources = [Result(results[0], run).name.source for run in runs]
    assert sources == ["generator", "key", "key"]
    expected = _ops.sample_from_key(*[row.repeat(9)] * 2, results[1].cpu())[: 4 * BLOCK]
    assert_same_bits(gpu.read(results[0], np.arange(4 * BLOCK)), expected)


# Samples


def assert_samples_as_on_the_cpu(
    gpu: Gpu, mu: Tensor, scale: Tensor, key: Tensor, samples: int, *options: Any
) -> None:
    """The draw, and the sums of its gradients: one launch each, of the kernel of every form."""
    form, *rest = options
    place, bounds = rest[:2] if rest else (None, None), rest[2] if rest[2:] else None
    x, s, k = gpu.moved([mu, scale, key])
    results: list[Any] = []
    run = gpu.call(
        lambda: results.append(_ops.sample_from_key(x, s, k, form, *place, bounds, samples))
    )
    assert Result(results[0], run).name.op == "samples"
    assert_same_bits(
        results[0].cpu(), _ops.sample_from_key(mu, scale, key, form, *place, bounds, samples)
    )
    grad_z, _ = inputs(samples, *mu.shape, dtype=mu.dtype, seed=4)
    unread = form == "std" and bounds is None
    arguments = (None if unread else scale, key, form, *place, bounds)
    grad, s, k = gpu.moved([grad_z, None if unread else scale, key])
    run = gpu.call(lambda: results.append(_ops.samples_backward(grad, s, k, form, *place, bounds)))
    assert Result(results[0], run).name.op == "samples_backward"
    for ours, theirs in zip(results[1], _ops.samples_backward(grad_z, *arguments), strict=True):
        assert_same_bits(ours.cpu(), theirs)


def test_samples(each_gpu: Gpu, dtype: torch.dtype) -> None:
    """Rows of every length within a counter, of one key, of one each, and of one each sample."""
    forms = itertools.cycle(itertools.product(FORMS, (None, BOUNDS)))
    for n in (4, 5, 6, 7, 24) if each_gpu.arch == MAIN else (8, 7):
        keys = reparam_fused.split(key_of(17, 2**64 - 2), 15).view(5, 3, 2)
        for key in (key_of(3, 2**64 - 1), keys[:1], keys[:, :1], keys):
            form, bounds = next(forms)
            mu, scale = inputs(3, n, dtype=dtype, seed=n)
            assert_samples_as_on_the_cpu(each_gpu, mu, scale, key, 5, form, None, None, bounds)


def test_samples_of_views(gpu: Gpu, dtype: torch.dtype) -> None:
    """Whose elements lie in a row, or whose gradients alone do not."""
    wide, log_var = inputs(6, 64, dtype=dtype)
    pairs = [
        (wide[:, :32], log_var[:, 32:]),
        (wide[:, 1:33], log_var[:1, :32]),
        (wide.t(), log_var.t()),
        (wide[:, ::2], log_var[:, :1].expand(6, 32)),
        (wide[:, 3], log_var[:, 2]),
    ]
    for mu, scale in pairs:
        assert_samples_as_on_the_cpu(gpu, mu, scale, key_of(5, 2**32 - 3), 3, "rho")
    key = key_of(5, 2**32 - 3)
    grads, _ = inputs(3, 6, 72, dtype=dtype, seed=8)
    views = [
        grads[..., 8:40],
        grads[..., 1:33],  # which does not begin with a vector
        grads[..., 8::2],
        grads[..., 8:38],  # rows of more than whole counters, though a sample is of whole ones
        grads.as_strided((3, 6, 32), (6 * 32 + 1, 32, 1)),  # the second sample begins within one
        grads[:1, :, :32].expand(3, 6, 32),
    ]
    for grad_z in views:
        scale, _ = inputs(6, grad_z.shape[2], dtype=dtype)
        moved = gpu.moved([grad_z, scale, key])
        ours = _ops.samples_backward(*moved)
        for a, b in zip(ours, _ops.samples_backward(grad_z, scale, key), strict=True):
            assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("columns", [2**31 + 4, 2**34 + 5])
@pytest.mark.parametrize("batched", [False, True])
def test_samples_of_a_block_far_out(
    gpu: Gpu, columns: int, batched: bool, dtype: torch.dtype
) -> None:
    """Further out in the noise than 32 bits count, and so are samples from each other."""
    keys = reparam_fused.split(key_of(5, 2**64 - 9), 3)[None]
    mu, scale = inputs(3, 9, dtype=dtype)
    place = (9, 2**20, columns), (2, 2**19 + 1, columns - 9)
    if batched:
        place = (9, 3, columns), (2, 0, columns - 9)
    key = keys if batched else key_of(77, 2**64 - 3)
    assert_samples_as_on_the_cpu(gpu, mu, scale, key, 4, "log_std", *place)


@pytest.mark.parametrize("numel", [2**26 + 8, 2**26 + 5])
def test_windows_of_many_samples(gpu: Gpu, numel: int, dtype: torch.dtype) -> None:
    """More than 2^31 elements in all, of which one launch takes all samples."""
    samples, step = 33, BLOCK * per_counter(dtype)
    last = -(-numel // step) - 1
    parts = [range(first, first + step) for first in (0, last // 2 * step)]
    parts.append(range(last * step, numel))
    elements = np.concatenate([np.arange(p.start, p.stop) for p in parts])
    all_elements = (np.arange(samples)[:, None] * numel + elements).ravel()
    key, on_device = key_of(5, 2**64 - 9), key_of(5, 2**64 - 9).cuda()
    values = inputs(elements.size, dtype=dtype)
    grad_z, _ = inputs(samples, elements.size, dtype=dtype, seed=2)
    mu, scale = (torch.empty(numel, dtype=dtype, device="cuda") for _ in range(2))
    grad = torch.empty(samples, numel, dtype=dtype, device="cuda")
    for tensor, value in ((mu, values[0]), (scale, values[1])):
        gpu.fill(tensor, elements, value)
    gpu.fill(grad, all_elements, grad_z.flatten())
    gpu.stand_in.blocks = lambda grid: [0, last // 2, grid - 1]
    results: list[Any] = []
    options = ("log_var", None, None, None)
    runs = [
        gpu.call(
            lambda: results.append(_ops.sample_from_key(mu, scale, on_device, *options, samples))
        ),
        gpu.call(lambda: results.append(_ops.samples_backward(grad, scale, on_device))),
    ]
    sizes = [sum(s.numbers.size * s.width for s in run.stores) for run in runs]
    assert sizes == [all_elements.size * dtype.itemsize, 2 * elements.size * dtype.itemsize]
    assert all(run.grid[0] == last + 1 for run in runs)
    z = gpu.read(results[0], all_elements).view(samples, -1)
    grads = [gpu.read(t, elements) for t in results[1]]
    at = 0
    for part in parts:
        window = slice(at, at + len(part))
        at += len(part)
        m, s, g = values[0][window], values[1][window], grad_z[:, window]
        place = (samples, numel), (0, part.start)
        expected = _ops.sample_from_key(m, s, key, "log_var", *place, None, samples)
        assert_same_bits(z[:, window], expected)
        sums = _ops.samples_backward(g, s, key, "log_var", *place)
        for ours, theirs in zip(grads, sums, strict=True):
            assert_same_bits(ours[window], theirs)


def test_samples_in_many_dimensions(gpu: Gpu) -> None:
    """More than a kernel takes: each part has all samples, and a draw the key of the whole."""
    shape, order = (2,) * 17, [*range(0, 17, 2), *range(1, 17, 2)]
    mu, log_var = inputs(*shape, dtype=torch.bfloat16)
    log_var = log_var.permute(order)
    x, s, key = gpu.moved([mu, log_var, KEY])
    options = ("rho", None, None, None)
    expected = _ops.sample_from_key(mu, log_var, KEY, *options, 2)
    results: list[Any] = []
    runs = gpu.calls(lambda: results.append(_ops.sample_from_key(x, s, key, *options, 2)))
    assert len(runs) == 2
    assert_same_bits(results[0].cpu(), expected)
    grad_z = expected.flip(0)
    sums = _ops.samples_backward(grad_z, log_var, KEY, "rho")
    for ours, theirs in zip(_ops.samples_backward(grad_z.cuda(), s, key, "rho"), sums, strict=True):
        assert_same_bits(ours.cpu(), theirs)
    runs = gpu.calls(lambda: results.append(_ops.sample(x, s, None, "rho", None, 2)))
    z, drawn = (t.cpu() for t in results[1])
    assert [Result(z, run).name.source for run in runs] == ["generator", "key", "key"]
    assert_same_bits(z, _ops.sample_from_key(mu, log_var, drawn, *options, 2))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("form", ["whole", "full blocks", "rows", "elements"])
def test_the_generator_gives_the_key(
    gpu: Gpu, form: str, captured: bool, dtype: torch.dtype
) -> None:
    """By value, or read on the device where a graph is captured: and the kernel writes it down."""
    n = PER_BLOCK[dtype] * (FEW_BLOCKS if form == "full blocks" else 1) + 40
    x, log_var = inputs(1 if form == "full blocks" else 2, n, dtype=dtype)
    if form in ("whole", "full blocks"):
        x, log_var = x[0], log_var[0]
    elif form == "elements":
        x, log_var = x[:, 1:9], log_var[:, 1:9]
    else:
        x, log_var = x[:, :16], log_var[:, :16]
    moved = gpu.moved([x, log_var])
    earlier = torch.zeros(24, dtype=dtype, device="cuda")
    seed, offset = 2**63 + 5, 2**32 - 2
    generator = torch.cuda.default_generators[0]
    results: list[Tensor] = []

    def draw() -> None:
        results[:] = _ops.sample(*moved, None)

    if form == "full blocks":  # of many the first one, which is not the only one to draw
        gpu.stand_in.blocks = lambda grid: range(min(2, grid))
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _ops.sample(earlier, earlier, None)  # the graph's own part of the offset
            draw()
        generator.manual_seed(seed)
        generator.set_offset(4 * (offset - 24 // per_counter(dtype)))
        graph.replay()
        torch.cuda.synchronize()
    else:
        generator.manual_seed(seed)
        generator.set_offset(4 * offset)
        gpu.call(draw)
    run = gpu.stand_in.last
    assert run is not None
    assert Result(results[0], run).name.form == form.replace("full blocks", "whole")
    assert results[1].tolist() == [seed, offset + 2**63]
    expected = _ops.sample_from_key(x, log_var, key_of(seed, offset + 2**63))
    if form == "full blocks":
        results[0], expected = (t[: 2 * PER_BLOCK[dtype]] for t in (results[0], expected))
    assert_same_bits(results[0], expected)


def test_the_hardware_s_approximate_root_does_not_show(each_gpu: Gpu) -> None:
    """rsqrt.approx may be off by 2^-22.9: by that much either way, or by chance, the bits hold."""
    x, log_var = inputs(65536 if each_gpu.arch == MAIN else 8192)
    for error in (-1.0, 1.0, np.random.default_rng(0)):
        each_gpu.stand_in.approx_error = error
        result = each_gpu.run("sample", x, log_var, key_of(5))
        assert_as_on_the_cpu(result, "sample", x, log_var, key_of(5))


def test_traffic(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Each element is read twice and written once, 16 bytes at a time: 12 bytes in float32.

    Of noise it is only written.
    """
    size = dtype.itemsize
    n = 4 * PER_BLOCK[dtype]
    operands = 2 if op in READING_OPS else 0
    blocks = [range(FEW_BLOCKS - 4, FEW_BLOCKS)]
    key = key_of(1)
    for result in (
        run_blocks(gpu, op, dtype, FEW_BLOCKS * PER_BLOCK[dtype], blocks),
        gpu.run(op, *inputs(n, dtype=dtype), key),
    ):
        stats = result.run.stats
        buffers = {name: kind for name, kind in stats.widths if 16 in stats.widths[name, kind]}
        assert sorted(buffers.values()) == ["ld"] * operands + ["st"]
        for name, kind in buffers.items():
            assert stats.read_bytes[name] == (n * size if kind == "ld" else 0)
            assert stats.written_bytes[name] == (n * size if kind == "st" else 0)
            assert stats.widths[name, kind] == {16: n * size // 16}
            assert stats.sectors[name] == n * size // 32  # every sector is used whole
        others = {access for access in stats.widths if access[0] not in buffers}
        assert len(others) == (op in NOISY_OPS)  # the key
    # what is left of a vector goes one by one, and no more; rows of vectors never do
    left = gpu.run(op, *inputs(n + 5, dtype=dtype), key).run.stats
    expected = {16: (n + 5) * size // 16, size: (n + 5) % (16 // size)}
    widths = [w for access, w in left.widths.items() if 16 in w]
    assert widths == [{k: v for k, v in expected.items() if v}] * (operands + 1)
    if operands:
        chunks = inputs(64, 64, dtype=dtype)[0].chunk(2, dim=1)
        rows = gpu.run(op, *chunks, key)
        assert rows.name.form == "rows"
        widths = [w for w in rows.run.stats.widths.values() if 16 in w]
        assert [set(w) for w in widths] == [{16}, {16}]  # the chunks share an allocation


def test_a_grid_that_no_gpu_has_is_refused(gpu: Gpu) -> None:
    """A thread for four vectors of 2^42, in 2^31 blocks."""
    gpu.stand_in.set_memory(2**45)
    with gpu.stand_in.events() as events, pytest.raises(RuntimeError, match="configuration"):
        _ops.noise(key_of(1, device="cuda"), [2**43], torch.bfloat16)
    assert events.launches == []
    gpu.run("noise", *inputs(100), key_of(1))  # and the next call works


@needs_cuda_extension
def test_the_extension_works_without_a_gpu() -> None:
    """It was imported with the package; the CPU path runs beside it."""
    assert reparam_fused.backends()["cuda"].startswith("C++ kernels for compute capability 8.0 9.0")
    x, log_var = inputs(99)
    assert reparam_fused.fused_reparameterize(x, log_var).isfinite().all()
    for name in ("sample_from_key", *OPS):
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


@pytest.mark.skipif(not machine_code.has_nvcc(), reason="no nvcc to compile the CUDA kernels with")
def test_every_kernel_has_its_name() -> None:
    """Each op of each dtype and source of noise, of the forms one by one where that is fast."""
    draws = [("sample", "_key"), ("sample", "_generator"), ("sample_backward", "_key")]
    divergences = [("kl_divergence", ""), ("kl_divergence_backward", "")]
    names = [f"noise_{{}}_key_{kind}" for kind in ("whole", "rows", "elements")]
    names += ["samples_{}_key", "samples_{}_generator", "samples_backward_{}_key"]
    for op, source in draws + divergences:
        names.append(f"{op}_{{}}{source}_elements")
        for form in FORMS:
            for bounded in ("", "bounded_"):
                kinds = ["rows"]
                if source or (form == "log_var" and not bounded):
                    kinds.append("whole")
                names += [f"{op}_{bounded}{form}_{{}}{source}_{kind}" for kind in kinds]
    names += ["head_{}", "head_backward_{}"]
    expected = {n.format(str(dtype).removeprefix("torch.")) for n in names for dtype in DTYPES}
    for dtype in ("float32", "float16", "bfloat16"):
        expected |= {f"head_kl_log_var_{dtype}", f"head_backward_kl_log_var_{dtype}"}
    expected |= {"sum_float32", "sum_float64"}
    assert ptx(MAIN).keys() == expected | set(machine_code.OF_KEYS)
