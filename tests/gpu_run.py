"""The CUDA kernels without a GPU: the launchers over a stand-in runtime, their PTX in ptx/.

A tensor's storage becomes a buffer of the interpreter, so that views are read where they lie.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from machine_code import VECTORS_PER_THREAD, Name
from ptx import Kernel, Machine, Memory, Module, Stats
from torch import Tensor

from reparam_fused import _ops

ROOT = Path(__file__).parents[1]
# With a scale, in either form; with a key; with operands
SCALED_OPS = ("sample", "sample_backward")
NOISY_OPS = (*SCALED_OPS, "noise")
READING_OPS = (*SCALED_OPS, "kl_divergence", "kl_divergence_backward")
# All take two operands and a key; those without noise make no use of the key, and noise looks
# at the operands' shape and dtype alone.
CPU_OPS: dict[str, Callable[..., Tensor]] = {
    "sample": _ops.sample_from_key,
    "sample_backward": _ops.sample_backward,
    "noise": lambda x, scale, key, form="log_var", *block: _ops.noise(
        key, x.shape, x.dtype, *block
    ),
    "kl_divergence": lambda mu, log_var, *_: _ops.kl_divergence(mu, log_var),
    "kl_divergence_backward": lambda grad, log_var, *_: _ops.kl_divergence_backward(grad, log_var),
}
OPS = tuple(CPU_OPS)
ARCHS = (80, 90, 100, 120)
BLOCK = 128
# csrc/cuda/launch.cuh: whole tensors of fewer full blocks have none, and one vector a thread
FEW_BLOCKS = 512
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FORMS = ("log_var", "std")
_Sizes = ctypes.POINTER(ctypes.c_int64)
# global_shape and global_offset
Block: TypeAlias = tuple[Sequence[int], Sequence[int]]


class Problem(ctypes.Structure):
    """csrc/common/problem.h"""

    _fields_ = (
        ("form", ctypes.c_int),
        ("x", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("first_index", ctypes.c_int64),
        ("ndim", ctypes.c_int),
        ("sizes", _Sizes),
        ("x_strides", _Sizes),
        ("scale_strides", _Sizes),
        ("out_strides", _Sizes),
        ("index_strides", _Sizes),
        ("key_strides", _Sizes),
        ("outer_ndim", ctypes.c_int),
        ("segment_numel", ctypes.c_int64),
    )


class GeneratorState(ctypes.Structure):
    """csrc/cuda/launch.h"""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("captured_seed", ctypes.c_uint64),
        ("captured_offset", ctypes.c_uint64),
        ("key_out", ctypes.c_uint64),
    )


@dataclass
class Launch:
    kernel: str
    grid: int
    block: int
    shared_bytes: int
    stream: int | None
    params: list[bytes]

    @property
    def name(self) -> Name:
        return Name.parse(self.kernel)


_OnLaunch = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


def nvcc(*arguments: str | Path) -> None:
    result = subprocess.run(
        ["nvcc", "-std=c++17", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr)


class WholeGrid:
    """How csrc/cuda/launch.cuh cuts a contiguous tensor into blocks."""

    def __init__(self, numel: int, itemsize: int) -> None:
        self._numel, self._per_vector = numel, 16 // itemsize
        self._per_counter = 2 if itemsize == 8 else 4
        self._vectors, left = divmod(numel, self._per_vector)
        full = self._vectors // (VECTORS_PER_THREAD * BLOCK)
        self.full_blocks = full if full >= FEW_BLOCKS else 0
        rest = self._vectors - self.full_blocks * VECTORS_PER_THREAD * BLOCK
        rest += -(-left // self._per_counter)
        self.blocks = self.full_blocks + -(-rest // BLOCK)

    def elements(self, blocks: range) -> range:
        """What these blocks compute."""
        return range(self._first(blocks.start), self._first(blocks.stop))

    def _first(self, block: int) -> int:
        full = min(block, self.full_blocks)
        thread = (full * VECTORS_PER_THREAD + block - full) * BLOCK
        beyond = max(thread - self._vectors, 0)  # counters of the vector that is not whole
        element = (thread - beyond) * self._per_vector + beyond * self._per_counter
        return min(element, self._numel)


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


class Gpu:
    """The launchers, and PTX for some architectures."""

    def __init__(self, folder: Path, archs: tuple[int, ...] = ARCHS) -> None:
        self._archs = archs
        self._library_path = folder / "launchers.so"
        self._folder = folder
        sources = [ROOT / "csrc" / "cuda" / f"{op}.cu" for op in OPS]
        jobs: list[Callable[[], None]] = [
            lambda: nvcc(
                # symbolic: torch has put the real runtime before it
                "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-Xlinker", "-Bsymbolic",
                "-gencode", "arch=compute_90,code=compute_90",
                "-o", self._library_path, ROOT / "tests" / "cpp" / "launch_recorder.cpp", *sources,
            )
        ]  # fmt: skip
        for arch in archs:
            for op, source in zip(OPS, sources, strict=True):
                jobs.append(
                    lambda arch=arch, op=op, source=source: nvcc(  # type: ignore[misc]
                        "-ptx", f"-arch=compute_{arch}", "-o", folder / f"{op}.{arch}.ptx", source
                    )
                )
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: job(), jobs))
        self._library = ctypes.CDLL(str(self._library_path))
        self._library.missing_cuda_binary.restype = ctypes.c_char_p
        self._texts = {
            (op, arch): (folder / f"{op}.{arch}.ptx").read_text() for op in OPS for arch in archs
        }
        self._kernels: dict[tuple[int, str], Kernel] = {}
        self._launches: list[Launch] = []
        self._callback = _OnLaunch(self._record)  # kept alive for the library
        self._library.set_on_launch(self._callback)

    def source(self, op: str, arch: int) -> str:
        """The PTX of an op."""
        return self._texts[op, arch]

    def kernel_source(self, arch: int, name: str) -> str:
        """One entry of the PTX, as a module of its own."""
        text = self._texts[Name.parse(name).op, arch]
        header = text[: text.index(".visible .entry")] if ".visible .entry" in text else ""
        header = re.sub(r"^\s*//.*$", "", header, flags=re.M)
        start = re.search(rf"^\.visible \.entry {re.escape(name)}\(", text, re.M)
        assert start is not None, name
        end = text.find("\n}", start.start()) + 2
        return header + text[start.start() : end] + "\n"

    def kernel(self, arch: int, name: str) -> Kernel:
        if (arch, name) not in self._kernels:
            module = Module.parse(self.kernel_source(arch, name))
            self._kernels[arch, name] = module.kernels[name]
        return self._kernels[arch, name]

    def _record(  # called from C++
        self, name: bytes, grid: int, block: int, shared: int, stream: int | None, args: object
    ) -> None:
        kernel = self.kernel(self._archs[0], name.decode())
        params = [
            ctypes.string_at(args[i], parameter.size)  # type: ignore[index]
            for i, parameter in enumerate(kernel.parameters)
        ]
        self._launches.append(Launch(name.decode(), grid, block, shared, stream, params))

    def record(
        self,
        op: str,
        dtype: torch.dtype,
        problem: Problem,
        generator: GeneratorState | None = None,
        stream: int | None = None,
    ) -> tuple[int, list[Launch]]:
        """The status of a launcher, and what it launched."""
        self._launches = []
        status = getattr(self._library, op)(
            DTYPE_CODES[dtype],
            ctypes.byref(problem),
            ctypes.byref(generator) if generator is not None else None,
            ctypes.c_void_p(stream),
        )
        return status, self._launches

    def binary_message(self, status: int, major: int, minor: int) -> str | None:
        """What a user gets on a device for which the runtime finds no binary."""
        self._library.set_binary_status(status)
        try:
            if self._library.has_cuda_binary() == 0:
                return None
            message: bytes = self._library.missing_cuda_binary(major, minor)
            return message.decode()
        finally:
            self._library.set_binary_status(0)


# A size, and its strides in x, scale and out; in a problem, in the noise and the keys too
Dims: TypeAlias = list[tuple[int, list[int]]]


def merged(dims: Dims) -> Dims:
    """Neighbours that everything steps through as through one, joined, as in csrc/call.h."""
    joined: Dims = []
    for size, strides in dims:
        if size == 1:
            continue
        if joined and all(a == b * size for a, b in zip(joined[-1][1], strides, strict=True)):
            joined[-1] = (joined[-1][0] * size, strides)
        else:
            joined.append((size, strides))
    return joined or [(1, [1, 1, 1, 1, 0])]


def numbered(dims: Dims, slice_numel: int) -> Dims:
    """With strides in the noise and in keys for every so many elements, in rows of two words."""
    result: Dims = []
    index, key = 1, 2
    for size, strides in reversed(dims):
        inner = min(size, slice_numel // index) if slice_numel else size
        if inner > 1 or inner == size:
            result.append((inner, [*strides, index, 0]))
            index *= inner
        if size > inner:
            result.append((size // inner, [*(s * inner for s in strides), 0, key]))
            key *= size // inner
    return result[::-1]


def make_problem(
    dims: Dims,
    addresses: tuple[int, int, int],
    keys: int,
    *,
    first_index: int = 0,
    form: str = "log_var",
) -> Problem:
    """dims with all five strides"""
    sizes = (ctypes.c_int64 * len(dims))(*(size for size, _ in dims))
    strides = [(ctypes.c_int64 * len(dims))(*(s[k] for _, s in dims)) for k in range(5)]
    outer_ndim, segment_numel = len(dims), 1
    while outer_ndim and dims[outer_ndim - 1][1][3] == segment_numel:
        outer_ndim -= 1
        segment_numel *= dims[outer_ndim][0]
    return Problem(
        FORMS.index(form),
        *addresses,
        keys,
        first_index,
        len(dims),
        sizes,
        *strides,
        outer_ndim,
        segment_numel,
    )


def storage(tensor: Tensor) -> np.ndarray:
    """The bytes that a tensor's views share."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return flat.numpy()


@dataclass
class Result:
    out: Tensor
    launch: Launch
    stats: Stats


def dimensions(
    x: Tensor, scale: Tensor, out: Tensor, key: Tensor | None, block: Block | None = None
) -> tuple[Dims, int]:
    """As csrc/call.h numbers them, and the noise index of the first element."""
    if key is None:
        order = sorted(range(out.dim()), key=out.stride, reverse=True)
        x, scale, out = (t.permute(order) for t in (x, scale, out))
    batch = [] if key is None else list(key.shape[:-1])
    while batch and batch[-1] == 1:
        batch.pop()
    shape, offset = block or (out.shape, [0] * out.dim())
    dims: Dims = []
    first = 0
    for d, size in enumerate(out.shape):
        index = 0 if d < len(batch) else math.prod(shape[d + 1 :])
        first += offset[d] * index
        key_stride = key.stride(d) if key is not None and d < len(batch) and key.size(d) > 1 else 0
        dims.append((size, [*(t.stride(d) for t in (x, scale, out)), index, key_stride]))
    return merged(dims), first


def run(
    gpu: Gpu,
    arch: int,
    op: str,
    x: Tensor,
    scale: Tensor,
    key: Tensor,
    *,
    form: str = "log_var",
    block: Block | None = None,
    approx_error: float | np.random.Generator = 0.0,
) -> Result:
    """An op of tensors of one dtype, as csrc/cuda computes it: checked, every byte written once."""
    out = torch.empty_like(torch.add(x, scale))
    x, scale = x.expand(out.shape), scale.expand(out.shape)
    if op == "noise":
        x = scale = out
    memory = Memory()
    buffers: dict[int, int] = {}

    def address(name: str, tensor: Tensor, *, writable: bool = False) -> int:
        base = tensor.untyped_storage().data_ptr()
        if base not in buffers:
            buffers[base] = memory.allocate(name, storage(tensor), writable=writable)
        return buffers[base] + tensor.storage_offset() * tensor.element_size()

    reads = op in READING_OPS
    addresses = (
        address("x", x) if reads else 0,
        address("scale", scale) if reads else 0,
        address("out", out, writable=True),
    )
    dims, first_index = dimensions(x, scale, out, key if op in NOISY_OPS else None, block)
    keys = address("key", key) if op in NOISY_OPS else 0
    problem = make_problem(dims, addresses, keys, first_index=first_index, form=form)
    status, launches = gpu.record(op, out.dtype, problem)
    assert status == 0, status
    assert len(launches) == 1
    (launch,) = launches
    machine = Machine(gpu.kernel(arch, launch.kernel), memory, approx_error=approx_error)
    stats = machine.launch((launch.grid, 1, 1), (launch.block, 1, 1), launch.params)
    memory.check_written_once("out")
    return Result(out, launch, stats)
