"""The CUDA kernels of the heads in the PTX interpreter, launched as csrc/cuda/launch_head.cpp does.

Of a driver there is a recorder alone, and of torch nothing but the oracle: what nvcc makes of
csrc/cuda is run on memory whose every byte has to be written once.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import machine_code
import numpy as np
import pytest
import torch
from gpu_run import ptx
from helpers import assert_same_bits, key_of
from machine_code import ROOT
from ptx import Kernel, Machine, Memory, Module
from torch import Tensor

from reparam_fused import reference
from reparam_fused._ops import TERMS
from reparam_fused.random import split

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        not machine_code.has_nvcc(), reason="no nvcc to compile the CUDA kernels with"
    ),
]

ARCH = 90
KEY = key_of(17, 2**32 - 7)
BOUNDS, PRIOR_BOUNDS = (-0.5, 0.75, 0.125), (-0.75, 0.5, 0.0)
HEAD, HEAD_BACKWARD = 6, 7  # csrc/common/problem.h
DTYPE_IDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
OnLaunch = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p))
Floats = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    summed: int
    term: str = "kl_divergence"
    form: str = "log_var"
    bounds: Floats | None = None
    prior: str | None = None  # its form; None: there is none
    prior_bounds: Floats | None = None
    batch: tuple[int, ...] | None = ()  # of the key; None: none
    place: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None)
    samples: int | None = None
    values: tuple[float, ...] = field(default=())  # of mu and the scale, over and over

    @property
    def full(self) -> tuple[int, ...]:
        return self.shape if self.samples is None else (self.samples, *self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.full)

    @property
    def row(self) -> int:
        return math.prod(self.full[len(self.full) - self.summed :])

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.numel)

        def draw(*shape: int, low: float = -2.0) -> Tensor:
            return torch.empty(shape).uniform_(low, 2.0, generator=generator)

        total = torch.float64 if dtype == torch.float64 else torch.float32
        # a std is above 0: of a prior, or of a log_prob
        made = {
            "mu": draw(*self.shape),
            "scale": draw(*self.shape, low=0.25 if self.form == "std" else -2.0),
            "loc": draw(*self.full),
            "prior": draw(*self.full, low=0.25 if self.prior == "std" else -2.0),
            "grad_z": draw(*self.full),
        }
        if self.values:
            cycle = torch.tensor(self.values).repeat(-(-self.numel // len(self.values)))
            made["scale"] = cycle[: math.prod(self.shape)].reshape(self.shape)
        tensors = {name: t.to(dtype) for name, t in made.items()}
        rows = self.full[: len(self.full) - self.summed]
        return tensors | {"grad_total": draw(*rows).to(total)}

    def key(self) -> Tensor | None:
        if self.batch is None:
            return None
        return split(KEY, math.prod(self.batch)).reshape(*self.batch, 2) if self.batch else KEY

    def arguments(self, dtype: torch.dtype, *, backward: bool) -> tuple[Any, ...]:
        t = self.tensors(dtype)
        given = [t["mu"], t["scale"], self.key()]
        given += [t["loc"], t["prior"]] if self.prior else [None, None]
        if backward:
            given += [None if self.batch is None else t["grad_z"], t["grad_total"]]
        options = (self.form, self.prior or "std", *self.place, self.bounds, self.prior_bounds)
        return (*given, self.term, self.summed, *options, self.samples)

    def numbering(self) -> tuple[list[int], list[int], int, int, int]:
        """Strides of the noise and of the keys, the dimensions of a segment, and its elements."""
        key = self.key()
        batch = list(key.shape[:-1]) if key is not None else []
        while batch and batch[-1] == 1:
            batch.pop()
        ndim = len(self.full)
        index, keys, stride, first = [0] * ndim, [0] * ndim, 1, 0
        for d in reversed(range(ndim)):
            whole = self.place[0][d] if self.place[0] else self.full[d]
            offset = self.place[1][d] if self.place[1] else 0
            if d < len(batch) and batch[d] != 1:
                assert key is not None
                keys[d] = key.stride(d)
            if d >= len(batch) or (d == 0 and self.samples is not None and batch[0] == 1):
                index[d], first, stride = stride, first + offset * stride, stride * whole
        outer, segment = ndim, 1
        while outer > 0 and index[outer - 1] == segment:
            outer -= 1
            segment *= self.full[outer]
        return index, keys, outer, segment, first


def array(t: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of it, as the interpreter's memory has them."""
    return t.contiguous().flatten().view(torch.uint8).numpy().copy()


class Launcher:
    """csrc/cuda/launch_head.cpp on a device that is the PTX interpreter."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.launch_head.restype = ctypes.c_char_p
        self.library.workspace_of_head.restype = ctypes.c_int64
        self.library.workspace_of_head.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self.parsed: dict[str, Kernel] = {}
        self.kernels: list[str] = []
        self.machines: list[Machine] = []

    def kernel(self, name: str) -> Kernel:
        if name not in self.parsed:
            self.parsed[name] = Module.parse(ptx(ARCH)[name]).kernels[name]
        return self.parsed[name]

    def run(self, case: Case, dtype: torch.dtype, *, backward: bool) -> tuple[Tensor, ...]:
        """As reference.head or head_backward returns them, where there are any."""
        memory = Memory()
        t = case.tensors(dtype)
        total = t["grad_total"].dtype
        size, rows = dtype.itemsize, case.numel // case.row

        def operand(name: str, data: Tensor) -> int:
            return memory.allocate(name, array(data))

        wanted: list[str] = []
        data: dict[str, np.ndarray[Any, Any]] = {}

        def result(name: str, nbytes: int) -> int:
            data[name] = np.full(nbytes, 0xA5, np.uint8)
            wanted.append(name)
            return memory.allocate(name, data[name], writable=True)

        noise = case.batch is not None
        given: list[str | None] = ["mu", "scale"]
        given += ["loc", "prior"] if case.prior else [None, None]
        given.append("grad_z" if backward and noise else None)
        operands = [
            0 if name is None else operand(name, t[name].expand(case.full)) for name in given
        ]
        results, totals, grad_totals, workspace = [0] * 4, 0, 0, 0
        if backward:
            grad_totals = operand("grad_totals", t["grad_total"])
            names = ["grad_mu", "grad_scale"] + (["grad_loc", "grad_prior"] if case.prior else [])
            for k, name in enumerate(names):
                if (case.term, name) != ("log_prob", "grad_mu"):
                    results[k] = result(name, case.numel * size)
        else:
            if noise:
                results[0] = result("z", case.numel * size)
            totals = result("totals", rows * total.itemsize)
            nbytes = self.library.workspace_of_head(DTYPE_IDS[dtype], rows, case.row)
            if nbytes:
                workspace = memory.allocate("workspace", np.zeros(nbytes, np.uint8), writable=True)
        key = case.key()
        keys = 0 if key is None else operand("keys", key.view(torch.int64))
        index, key_strides, outer, segment, first = case.numbering()
        failed: list[BaseException] = []
        self.kernels, self.machines = [], []

        def launch(name: bytes, blocks: int, arguments: Any) -> None:
            try:
                kernel = self.kernel(name.decode())
                parameters = [
                    ctypes.string_at(arguments[k], p.size) for k, p in enumerate(kernel.parameters)
                ]
                machine = Machine(kernel, memory, step_limit=5_000_000)
                machine.launch((blocks,), (128,), parameters)
                self.kernels.append(kernel.name)
                self.machines.append(machine)
            except BaseException as error:  # it cannot pass through C
                failed.append(error)

        def numbers(values: Sequence[int]) -> Any:
            return (ctypes.c_int64 * len(values))(*values)

        def bounds(values: Floats | None) -> Any:
            return None if values is None else (ctypes.c_double * 3)(*values)

        refusal = self.library.launch_head(
            ctypes.c_int(HEAD_BACKWARD if backward else HEAD), ctypes.c_int(DTYPE_IDS[dtype]),
            case.form.encode(), bounds(case.bounds), (case.prior or "std").encode(),
            bounds(case.prior_bounds), ctypes.c_int(TERMS.index(case.term)), numbers(operands),
            numbers(results), ctypes.c_uint64(keys), ctypes.c_int64(first),
            ctypes.c_int(len(case.full)), numbers(case.full), numbers(index), numbers(key_strides),
            ctypes.c_int(outer), ctypes.c_int64(segment), ctypes.c_int64(case.row),
            ctypes.c_uint64(totals), ctypes.c_uint64(grad_totals), ctypes.c_uint64(workspace),
            OnLaunch(launch),
        )  # fmt: skip
        if failed:
            raise failed[0]
        if refusal:
            raise RuntimeError(refusal.decode())
        for name in wanted:
            memory.check_written_once(name)
        row_shape = t["grad_total"].shape
        return tuple(
            torch.from_numpy(data[name]).view(total if name == "totals" else dtype)
            .reshape(row_shape if name == "totals" else case.full)
            for name in wanted
        )  # fmt: skip


def build(root: Path, folder: Path) -> Launcher:
    library = folder / "head.so"
    sources = [root / "tests" / "cpp" / "head.cpp", root / "csrc" / "cuda" / "launch_head.cpp"]
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *map(str, sources), "-o", str(library)],
        check=True,
    )
    return Launcher(library)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return build(ROOT, tmp_path_factory.mktemp("head"))


def check(launcher: Launcher, case: Case, dtype: torch.dtype) -> list[str]:
    """Both directions; the kernels of the first."""
    forward = None
    for backward in (False, True):
        oracle = reference.head_backward if backward else reference.head
        expected = [e for e in oracle(*case.arguments(dtype, backward=backward)) if e.numel()]
        actual = launcher.run(case, dtype, backward=backward)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)
            else:
                assert_same_bits(a, e)
        forward = forward or launcher.kernels
    assert forward is not None
    return forward


LENGTHS = (1, 3, 4, 20, 24, 40, 2047, 2048, 2049, 5000)


@pytest.mark.parametrize("length", LENGTHS)
def test_rows(launcher: Launcher, dtype: torch.dtype, length: int) -> None:
    """Of less than a vector, of a few, of a chunk and of several, whole vectors or not."""
    rows = 3 if length > 100 else 37
    kernels = check(launcher, Case((rows, length), 1), dtype)
    name = str(dtype).removeprefix("torch.")
    per_vector = 16 // dtype.itemsize
    fast = dtype != torch.float64 and length % per_vector == 0
    expected = [f"head_kl_log_var_{name}" if fast else f"head_{name}"]
    if length > 512 * per_vector:
        expected.append("sum_float64" if dtype == torch.float64 else "sum_float32")
    assert kernels == expected


def test_a_row_whose_chunks_are_more_than_a_chunk(launcher: Launcher) -> None:
    """Its sums are summed twice: rows of 2048 float64 sums, of 1024 terms each."""
    case = Case((1025 * 1024 + 1,), 1, batch=None)
    assert check(launcher, case, torch.float64) == ["head_float64", "sum_float64", "sum_float64"]


FORMS_AND_BOUNDS = [
    ("log_var", None), ("log_std", None), ("std", None), ("rho", None),
    ("log_var", BOUNDS), ("log_var", PRIOR_BOUNDS), ("rho", BOUNDS),
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_terms_of_every_form(launcher: Launcher, dtype: torch.dtype, term: str) -> None:
    for form, bounds in FORMS_AND_BOUNDS:
        check(launcher, Case((5, 20), 1, term, form, bounds), dtype)


PRIORS = [
    ("log_var", None, "log_var", None),
    ("log_std", PRIOR_BOUNDS, "log_var", PRIOR_BOUNDS),
    ("log_var", None, "std", None),
    ("rho", BOUNDS, "log_std", BOUNDS),
    ("std", None, "rho", None),
    ("log_var", BOUNDS, "log_var", None),
]


@pytest.mark.parametrize("batch", [(), None], ids=["z", "no noise"])
def test_priors(launcher: Launcher, dtype: torch.dtype, batch: tuple[int, ...] | None) -> None:
    """Of which both scales are log_var in some way, or not; the sum goes over two dimensions."""
    for form, bounds, prior, prior_bounds in PRIORS:
        case = Case((3, 2, 21), 2, "kl_divergence", form, bounds, prior, prior_bounds, batch)
        kernels = check(launcher, case, dtype)
        assert kernels == [f"head_{str(dtype).removeprefix('torch.')}"]


def test_without_noise(launcher: Launcher, dtype: torch.dtype) -> None:
    for summed in (0, 1, 2):
        check(launcher, Case((9, 20), summed, batch=None), dtype)


PLACES = [
    # a key for each row, for each of the rows of two, for parts of a row
    Case((5, 20), 1, batch=(5,)),
    Case((5, 4096), 1, batch=(5,)),
    Case((4, 3, 7), 2, batch=(4, 3)),
    Case((4, 3, 16), 1, batch=(4, 1)),
    Case((2, 13, 5), 2, batch=(1, 13)),
    Case((9, 3), 0, batch=(9,)),
    # shards: rows of a whole, from a counter on or not, and parts of rows
    Case((5, 40), 1, place=((9, 40), (3, 0))),
    Case((5, 21), 1, place=((9, 21), (2, 0))),
    Case((5, 20), 1, place=((9, 41), (3, 13))),
    Case((5, 16), 1, place=((9, 64), (3, 32))),
    Case((3, 2, 9), 1, batch=(3,), place=((9, 2**30, 2**20), (4, 2**29 + 1, 2**19 + 7))),
    Case((4097,), 1, place=((9999,), (1001,))),
    # samples, of which each has a key, or all are numbered behind each other
    Case((6, 20), 1, "log_prob", samples=3),
    Case((6, 21), 1, "log_prob", samples=3, batch=(3,)),
    Case((6, 21), 1, "tanh_log_prob", samples=3, batch=(1, 6)),
    Case((6, 21), 1, "tanh_log_prob", samples=2, batch=(2, 6)),
]


@pytest.mark.parametrize("case", PLACES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_places_in_the_noise(launcher: Launcher, case: Case, dtype: torch.dtype) -> None:
    check(launcher, case, dtype)


EXTREMES = (0.0, -0.0, 1e-3, -1e-3, 1.0, 90.0, -90.0, 1e4, -1e4, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("form", ["log_var", "std", "rho"])
def test_extreme_scales(launcher: Launcher, dtype: torch.dtype, term: str, form: str) -> None:
    """Each element its own row, and a row of whole vectors."""
    check(launcher, Case((48,), 0, term, form, values=EXTREMES), dtype)


def test_sums_are_not_minus_zero(launcher: Launcher) -> None:
    case = Case((7, 1), 1, "log_prob")
    _, total = launcher.run(case, torch.float32, backward=False)
    assert not total.signbit().logical_and(total == 0).any()


def test_more_elements_than_a_launch_counts(tmp_path: Path) -> None:
    """As of more than 2^31, but of 2^8: parts of whole rows, where elements are counted."""
    for folder in ("csrc/common", "csrc/cuda", "tests/cpp"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    header = tmp_path / "csrc" / "cuda" / "enqueue.h"
    text = header.read_text()
    assert text.count("int64_t{1} << 31") == 1
    header.write_text(text.replace("int64_t{1} << 31", "int64_t{1} << 8"))
    launcher = build(tmp_path, tmp_path)
    for case, launches in (
        (Case((9, 61), 1), 1),  # one segment is not counted
        (Case((9, 61), 1, batch=(9,)), 3),
        (Case((9, 61), 2, batch=None), 1),
        (Case((3, 5, 61), 2, batch=(3,)), 3),  # each a segment
        (Case((3, 5, 61), 1, batch=(3, 5)), 6),  # a place of the first, and parts of it
        (Case((8, 60), 1, place=((9, 90), (1, 30))), 2),
        (Case((12, 61), 1, "tanh_log_prob", samples=3, batch=(3,)), 3),
    ):
        for prior in ("std", None) if case.term == "kl_divergence" else (None,):
            case = replace(case, prior=prior)
            assert len(check(launcher, case, torch.float32)) == launches, case
    with pytest.raises(RuntimeError, match="cannot sum rows of 549 elements"):
        check(launcher, Case((9, 61), 2, batch=(9,)), torch.float32)
