"""Change one operator of the compiled PTX at a time, and see that the bits change.

    python tests/mutate_ptx.py                          every seventh mutant, in the text's order
    python tests/mutate_ptx.py --every 1                all of them, an hour on 2 cores
    python tests/mutate_ptx.py --sample 500 --seed 1    so many, picked at random
    python tests/mutate_ptx.py rows bfloat16            of the kernels whose name has these words

Each mutant runs the cases below, small ones first, as test_cuda.py runs the kernels: launches
recorded, results compared as bits, every byte written once. It is killed by the first case that
goes wrong, be it an error of the interpreter or too many steps. HARMLESS says why those that
survive every case may; the exit status is 1 for any other survivor, and below 90 % killed.

Operators, by the word that names them in the table:

    operation    add, sub; and, or, xor; mul.lo, mul.hi; div, rem; min, max; shl, shr; fma without
                 its addend, or for a mul; another approximation; NaN and sign rules of min dropped
    swap         operands of sub, div, shifts, pairs; of fma and mad a factor and the addend
    same         both operands the first one: d = a op a
    compare      the neighbouring relations, eq and ne
    sign         of integer types, where it matters; of float constants, neg dropped
    constant     integers and shift amounts by 1, floats by one ULP, either way
    rounding     to zero instead of to nearest
    width        half as many bytes loaded, stored or converted
    address      one access width further, or nearer where there is an offset
    drop         no store, no branch, no return; else a mov of the first source, or 0
    branch       guard inverted, or taken always

Not generated, as they are the same: commutative operands swapped, the low part of a product or a
sum of either sign, loads through another cache, addresses of global memory left generic, another
rounding of what is exact (products with a power of two; differences, see below), either sign of
bits that are dropped, and anything else done to a product with 0.

The only differences of floats are m - 1 with m in [sqrt(1/2), sqrt(2)], exact by Sterbenz' lemma,
and magic - shifted in sigma, both of them multiples of 2 of one binade.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import gpu_run
import numpy as np
import torch
from digest import extremes
from gpu_run import BLOCK, GeneratorState, Gpu, Launch, make_problem, numbered
from helpers import assert_same_bits, inputs, key_of
from machine_code import Name
from ptx import Kernel, Machine, Memory, Module, PTXError
from ptx.model import Instruction
from torch import Tensor

from reparam_fused import _ops

CPU_OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sample": _ops.sample_from_key,
    "sample_backward": _ops.sample_backward,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOOR = 0.9
# A loop that a mutant makes a few times longer has changed some bits by then.
STEP_FACTOR = 4

Array = np.ndarray[Any, np.dtype[Any]]
Dims = list[tuple[int, list[int]]]


# Cases


@dataclass
class Area:
    """A buffer of the interpreter; `start` as in Memory.allocate."""

    name: str
    array: Array
    writable: bool = False
    start: int = 0


@dataclass
class Case:
    """A launch, the memory it finds, and what the unchanged kernel leaves there."""

    name: str
    launch: Launch
    areas: list[Area]
    blocks: range
    infinity: int  # the bits of it in out's dtype
    approx_error: float = 0.0
    about: str = ""  # "places" if its values are those of any case, "values" if its places are
    step_limit: int = 1000
    executed: list[int] = field(default_factory=list)
    expected: dict[str, Array] = field(default_factory=dict)
    writes: dict[str, Array] = field(default_factory=dict)

    def execute(self, kernel: Kernel) -> tuple[Memory, list[int]]:
        memory = Memory()
        for area in self.areas:
            array = area.array.copy() if area.writable else area.array
            memory.allocate(area.name, array, writable=area.writable, start=area.start)
        machine = Machine(
            kernel, memory, step_limit=self.step_limit, approx_error=self.approx_error
        )
        grid, block = (self.launch.grid, 1, 1), (self.launch.block, 1, 1)
        stats = machine.launch(grid, block, self.launch.params, blocks=self.blocks)
        return memory, stats.executed

    def learn(self, kernel: Kernel) -> Memory:
        """Run the unchanged kernel, and keep what it does."""
        while True:
            try:
                memory, self.executed = self.execute(kernel)
                break
            except PTXError as error:
                if "steps" not in str(error):
                    raise
                self.step_limit *= 2
        self.step_limit *= STEP_FACTOR
        for area, buffer in zip(self.areas, memory.buffers, strict=True):
            if area.writable:
                self.expected[area.name] = buffer.data.view(area.array.dtype).copy()
                self.writes[area.name] = buffer.writes.copy()
        return memory

    def kills(self, kernel: Kernel) -> str:
        """What goes wrong, or '' if nothing does."""
        try:
            memory, _ = self.execute(kernel)
        except PTXError as error:
            return "steps" if "an endless loop?" in str(error) else "error"
        for area, buffer in zip(self.areas, memory.buffers, strict=True):
            if not area.writable:
                continue
            if not np.array_equal(buffer.writes, self.writes[area.name]):
                return "writes"
            bits, expected = buffer.data.view(area.array.dtype), self.expected[area.name]
            different = bits != expected
            if area.name == "out":  # any NaN will do
                magnitude = 2 * self.infinity - 1 | self.infinity
                nan = ((bits & magnitude) > self.infinity) & (
                    (expected & magnitude) > self.infinity
                )
                different &= ~nan
            if different.any():
                return "bits"
        return ""


FORMS = {"LogVar": "log_var", "Std": "std"}


class Cases:
    """Makes the cases of one kernel."""

    def __init__(self, gpu: Gpu, arch: int, name: Name) -> None:
        self.gpu, self.arch, self.kernel_name = gpu, arch, name
        self.dtype = DTYPES[name.dtype]
        self.itemsize = self.dtype.itemsize
        self.per_vector = 16 // self.itemsize
        self.per_block = BLOCK * self.per_vector * (4 if name.form == "whole" else 1)
        self.bits, self.ints = {
            2: (np.uint16, torch.int16),
            4: (np.uint32, torch.int32),
        }[self.itemsize]
        self.cases: list[Case] = []

    def add(
        self,
        label: str,
        dims: Dims,
        *,
        blocks: range | None = None,
        slice_numel: int = 0,
        values: tuple[Tensor, Tensor] | None = None,
        offset: int = 2**32 - 7,
        shift: tuple[int, int, int] = (0, 0, 0),
        approx_error: float = 0.0,
        captured: bool = False,
        about: str = "",
        aimed: bool = False,
        first_index: int = 0,
        apart: int = 0,
    ) -> None:
        """Blocks of a launch on elements at the places that dims give them, `shift` further on.

        Only these elements are in memory. There is a key for each `slice_numel` of them. `aimed`
        x show the last bits of sigma and of the noise. In a slice the noise starts at
        `first_index`; where slices are `apart` they are rows of a block, with one key.
        """
        self.first_index, self.apart = first_index, apart
        numel = int(np.prod([size for size, _ in dims], dtype=object))
        slice_numel = slice_numel or numel
        elements, blocks = self._elements(numel, slice_numel, blocks)
        places = self._places(dims, elements, shift)
        x, log_var = values or inputs(len(elements), dtype=self.dtype, seed=len(self.cases))
        repeats = -(-len(elements) // x.numel())
        tensors = [t.repeat(repeats)[: len(elements)] for t in (x, log_var)]
        areas, indices = [], []
        for area_name, where in zip(("x", "scale", "out"), places, strict=True):
            # a vector that begins before the elements is not one that is read
            start = int(where.min()) // self.per_vector * self.per_vector
            array = np.full(int(where.max()) - start + 1, ~self.bits(0), self.bits)
            areas.append(Area(area_name, array, area_name == "out", start * self.itemsize))
            indices.append(where - start)
        for k in (0, 1):
            areas[k].array[indices[k]] = tensors[k].view(self.ints).numpy().view(self.bits)
            # where places coincide (strides of 0), the last value is what all of them read
            read_back = areas[k].array[indices[k]].view(np.dtype(f"i{self.itemsize}"))
            tensors[k] = torch.from_numpy(read_back).view(self.dtype)

        slices = range(elements.start // slice_numel, (elements.stop - 1) // slice_numel + 1)
        keys = np.empty((len(slices), 2), np.uint64)
        for row, s in zip(keys, slices, strict=True):
            t = 0 if apart else s
            row[:] = [(2**63 + 5 + t * 2654435761) % 2**64, (offset - 2 * t) % 2**64]
        if aimed:
            tensors[0] = self._aimed(tensors[1], keys, elements, slices, slice_numel)
            areas[0].array[indices[0]] = tensors[0].view(self.ints).numpy().view(self.bits)

        state = None
        if self.kernel_name.source == "KeyTensor":
            start = 0 if apart else slices.start * 16
            areas.append(Area("key", keys[: 1 if apart else None].reshape(-1), start=start))
        else:
            areas.append(Area("key", np.zeros(2, np.uint64), writable=True))
            if captured:
                part = (4 * (int(keys[0, 1]) - 6)) % 2**64
                areas.append(Area("seed", keys[0, :1].copy()))
                areas.append(Area("offset", np.array([part], np.uint64)))
        memory = Memory()
        addresses = [
            memory.allocate(a.name, a.array, writable=a.writable, start=a.start) for a in areas
        ]
        if self.kernel_name.source == "Generator":
            state = GeneratorState(int(keys[0, 0]), int(keys[0, 1]), 0, 0, addresses[3])
            if captured:
                # the graph's own part of the offset comes on top; both count 4 for each counter
                state = GeneratorState(0, 4 * 6, addresses[4], addresses[5], addresses[3])
        shifted = [a + s * self.itemsize for a, s in zip(addresses[:3], shift, strict=True)]
        numbers = numbered(dims, slice_numel)
        if apart:
            for _, strides in numbers:
                strides[3:] = [strides[3] + apart * (strides[4] // 2), 0]
        problem = make_problem(
            numbers,
            (shifted[0], shifted[1], shifted[2]),
            0 if state else addresses[3],
            first_index=first_index,
            form=FORMS[self.kernel_name.scale],
        )
        status, launches = self.gpu.record(self.kernel_name.op, self.dtype, problem, state)
        assert status == 0, (self.kernel_name, label, status)
        launch = launches[0]
        assert launch.name == self.kernel_name, (launch.name, self.kernel_name, label)
        infinity = torch.tensor([float("inf")], dtype=self.dtype).view(self.ints).item()
        case = Case(label, launch, areas, blocks, int(infinity), approx_error, about)
        memory = case.learn(self.gpu.kernel(self.arch, launch.kernel))

        out = case.expected["out"][indices[2]].view(np.dtype(f"i{self.itemsize}"))
        assert_same_bits(
            torch.from_numpy(out).view(self.dtype),
            self._expected(tensors, keys, elements, slices, slice_numel),
        )
        once = np.zeros(areas[2].array.size, np.uint16)
        once[indices[2]] = 1
        assert np.array_equal(case.writes["out"], np.repeat(once, self.itemsize))
        if state is not None and 0 in blocks:
            assert case.expected["key"].tolist() == keys[0].tolist()
            memory.check_written_once("key")
        self.cases.append(case)

    def _elements(self, numel: int, slice_numel: int, blocks: range | None) -> tuple[range, range]:
        """The elements that blocks compute, and the blocks if all are meant."""
        slice_counters = -(-slice_numel // 4)
        if (
            self.first_index % 4 or self.apart % 4
        ):  # a counter that is cut may go to either side: all of them
            assert blocks is None
            cut_counters = numel // slice_numel * ((slice_numel + 6) // 4)
            return range(numel), range(-(-cut_counters // BLOCK))

        def first_element(block: int) -> int:
            if self.kernel_name.form != "elements":
                return min(block * self.per_block, numel)
            s, counter = divmod(block * BLOCK, slice_counters)
            return min(s * slice_numel + 4 * counter, numel)

        if blocks is None:
            per_block = self.per_block
            units = numel
            if self.kernel_name.form == "elements":
                units, per_block = numel // slice_numel * slice_counters, BLOCK
            blocks = range(-(-units // per_block))
        return range(first_element(blocks.start), first_element(blocks.stop)), blocks

    def _places(self, dims: Dims, elements: range, shift: tuple[int, int, int]) -> Array:
        rest = np.arange(elements.start, elements.stop)
        places: Array = np.zeros((3, rest.size), np.int64) + np.array(shift)[:, None]
        for size, strides in reversed(dims):
            rest, along = rest // size, rest % size
            places += along * np.array(strides)[:, None]
        return places

    def _expected(
        self,
        tensors: list[Tensor],
        keys: Array,
        elements: range,
        slices: range,
        slice_numel: int,
    ) -> Tensor:
        """What the CPU makes of the same values with the same keys and counters."""
        parts = []
        for (seed, offset), s in zip(keys.tolist(), slices, strict=True):
            low = max(elements.start, s * slice_numel)
            high = min(elements.stop, (s + 1) * slice_numel)
            counter, skipped = divmod(self.first_index + s * self.apart + low - s * slice_numel, 4)
            part = [t[low - elements.start : high - elements.start] for t in tensors]
            x, log_var = (torch.cat([torch.zeros(skipped, dtype=t.dtype), t]) for t in part)
            form = FORMS[self.kernel_name.scale]
            unused = (self.kernel_name.op, form) == ("sample_backward", "std")
            key = key_of(seed, offset + counter)
            out = CPU_OPS[self.kernel_name.op](x, None if unused else log_var, key, form)
            parts.append(out[skipped:])
        return torch.cat(parts)

    def _aimed(
        self, log_var: Tensor, keys: Array, elements: range, slices: range, slice_numel: int
    ) -> Tensor:
        """x that cancels sigma eps, or takes the product next to where it rounds the other way."""
        sample = self.kernel_name.op == "sample"
        x = torch.full(log_var.shape, 0.0 if sample else 1.0)
        product = self._expected([x, log_var.float()], keys, elements, slices, slice_numel)
        if sample or self.itemsize == 4:
            return -product.to(self.dtype)
        # the bits that a half type rounds off, and those that it keeps
        dropped = 23 - {torch.bfloat16: 7, torch.float16: 10}[self.dtype]
        best = np.full(product.shape, 2**31)
        for factor in np.linspace(1, 2, 128, endpoint=False, dtype=np.float32):
            bits = (product.numpy() * factor).view(np.int32)
            distance = np.abs((bits & (1 << dropped) - 1) - (1 << dropped - 1))
            x[torch.from_numpy(distance < best)] = float(factor)
            best = np.minimum(best, distance)
        return x.to(self.dtype)


def odd_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every extreme log_var with x as 0, 1, inf and NaN, and with small ones that show a sum."""
    log_var = extremes(dtype)
    # sigma from a denormal to overflow; one more, so that each repetition meets other lanes
    near = torch.linspace(-210, 182, 1059).to(dtype)
    log_var = torch.cat([log_var, near])
    log_var[::13] = float("nan")
    xs = [0.0, 1.0, float("inf"), float("nan"), 1e-30]
    return torch.tensor(xs).to(dtype).repeat_interleave(log_var.numel()), log_var.repeat(len(xs))


def make_cases(gpu: Gpu, arch: int, name: Name, largest: int = 2**20) -> list[Case]:
    """The cases of a kernel: quick ones that kill most first, a million elements last."""
    made = Cases(gpu, arch, name)
    {"whole": _whole, "rows": _rows, "elements": _elements}[name.form](made, largest)
    return made.cases


def _whole(made: Cases, largest: int) -> None:
    def contiguous(n: int) -> Dims:
        return [(n, [1, 1, 1])]

    block = made.per_block
    odd = odd_values(made.dtype)
    made.add("a full block", contiguous(block))
    made.add("a tail", contiguous(11), offset=2**64 - 1)
    made.add("aimed", contiguous(4 * block), aimed=True)
    for tail in range(1, 5):
        made.add(f"aimed, tail {tail}", contiguous(block - tail), aimed=True)
    for n in (1, 2, 3, 4):
        made.add(f"{n} elements", contiguous(n))
    made.add("a long tail", contiguous(block - 1))
    made.add("blocks and a tail", contiguous(2 * block + 5), offset=2**64 - 300)
    made.add("extremes", contiguous(2 * block), values=odd)
    made.add("extremes in the tail", contiguous(block - 2), values=odd)
    made.add("beyond 2^63", contiguous(block), offset=2**63 - 3)
    if made.kernel_name.source == "KeyTensor":
        made.add("a block", contiguous(block + 7), first_index=2**40 + 12)
    for power in (31, 33, 35):
        last = (2**power + 77) // block
        for label, first in (("middle", last // 2), ("end", last - 1)):
            blocks = range(first, first + 2)
            made.add(
                f"2^{power}, {label}", contiguous(2**power + 77), blocks=blocks, about="places"
            )
    if made.kernel_name.source == "Generator":
        made.add("captured", contiguous(block), captured=True)
        made.add("captured, a tail", contiguous(2 * block + 11), captured=True)
        made.add("captured, odd", contiguous(5), captured=True, offset=2**61 + 3)
    for error in (-1.0, 1.0):
        made.add(f"root off by {error}", contiguous(8 * block), approx_error=error, about="values")
        made.add(
            f"root off by {error}, tail", contiguous(block - 3), approx_error=error, about="values"
        )
    made.add("many", contiguous(min(2**16, largest)), aimed=True, about="values")
    made.add("most", contiguous(largest), offset=3, aimed=True, about="values")


def _views(made: Cases, largest: int) -> Dims:
    """What rows and elements have in common. Returns the dims of many elements."""
    rows = made.kernel_name.form == "rows"
    batched = made.kernel_name.source == "KeyTensor"
    odd = odd_values(made.dtype)
    step = made.per_vector if rows else 1
    # a size whose multiplier for the division has its top bit set
    c = 20 * step if rows else 37
    pad = 2 * c if rows else 2 * c + 1
    if made.kernel_name.index_bits == 32:
        made.add("chunk", [(9, [pad, pad, c]), (c, [1, 1, 1])])
        made.add("aimed", [(150, [pad, pad, c]), (c, [1, 1, 1])], aimed=True)
        made.add("permuted", [(3, [c, c, 2 * c]), (2, [3 * c, 3 * c, c]), (c, [1, 1, 1])])
        made.add("three strides", [(7, [pad, c, c + 8 * step]), (c, [1, 1, 1])], offset=2**64 - 9)
        made.add(
            "four dims",
            [
                (3, [91 * c, 0, 8 * c]),
                (2, [40 * c, 30 * c, 4 * c]),
                (2, [5 * c, 4 * c, 2 * c]),
                (c, [1, 1, 1]),
            ],
        )
        made.add("expanded", [(5, [0, c, c]), (c, [1, 1, 1])], offset=2**64 - 2)
        if batched:
            for n in (c, 2 * step, 8 * step) if rows else (c, 3, 9):
                made.add(f"keys of {n}", [(35 * n, [1, 1, 1])], slice_numel=n)
            made.add("keys of chunks", [(35, [pad, c, c]), (c, [1, 1, 1])], slice_numel=5 * c)
            made.add(
                "a block",
                [(35, [pad, c, c]), (c, [1, 1, 1])],
                slice_numel=c,
                first_index=2**34 + 8,
                apart=2**33 + 12,
            )
        else:
            made.add("captured", [(9, [pad, c, c]), (c, [1, 1, 1])], captured=True)
            odd_offset = 2**61 + 3
            made.add(
                "captured, far",
                [(9, [pad, c, c]), (c, [1, 1, 1])],
                captured=True,
                offset=odd_offset,
            )
        made.add("extremes", [(150, [pad, c, c]), (c, [1, 1, 1])], values=odd)
        made.add("beyond 2^63", [(40, [pad, c, c]), (c, [1, 1, 1])], offset=2**63 - 3)
        numels = [2**30, 2**31 - 2**22]
    else:
        # the last has more vectors, and more counters, than 32 bits count
        numels = [2**31 + 2**20, 2**33 + 3 * 2**20, made.per_vector * 2**32 + 2**20]
    columns = 150_000 * made.per_vector if rows else 600_011
    for least in numels:
        numel = -(-least // columns) * columns
        dims: Dims = [
            (numel // columns, [columns + (8 * step if rows else 1), columns, columns]),
            (columns, [1, 1, 1]),
        ]
        last = -(-numel // (BLOCK * (made.per_vector if rows else 4)))
        if made.kernel_name.index_bits == 64 and least == numels[0]:
            made.add("a block", dims, blocks=range(1))
        for label, first in (("start", 0), ("middle", last // 2 - 1), ("end", last - 2)):
            made.add(
                f"{numel:#x}, {label}",
                dims,
                blocks=range(first, first + 2),
                offset=2**64 - 2**31,
                about="places",
            )
        if least == numels[0]:
            made.add("aimed, large", dims, blocks=range(last - 8, last), aimed=True)
        made.add(f"{numel:#x}, extremes", dims, blocks=range(last - 8, last), values=odd)
        if batched:
            made.add(
                f"{numel:#x}, keys",
                dims,
                blocks=range(last - 3, last - 1),
                slice_numel=columns,
                about="places",
            )
            made.add(
                f"{numel:#x}, a block",
                dims,
                blocks=range(last - 3, last - 1),
                slice_numel=columns,
                first_index=2**34 + 8,
                apart=2**33 + 12,
                about="places",
            )
    # strides beyond 2^32, of vectors too, in each place that a dimension may have
    far, run = 2**32 * made.per_vector, BLOCK * made.per_vector
    away = [far, far, far]
    outermost = 3 if made.kernel_name.index_bits == 32 else 3 * 2**22
    per_row = run // (BLOCK * (made.per_vector if rows else 4))
    for row in (1, 2, 4):
        made.add(
            f"far rows, {row}",
            [
                (outermost, away),
                (2, away),
                (2, away),
                (run, [1, 1, 1]),
            ],
            blocks=range(row * per_row, (row + 1) * per_row),
            shift=(0, 0, 0) if rows else (1, 0, 0),
            about="places",
        )
    if made.kernel_name.index_bits == 64:
        long = 2**32 + 5 * run  # a size beyond 2^32 in a place where sizes are divided by
        for row in (0, 1):
            first = 5 * per_row + long // run * per_row * row
            made.add(
                f"long rows, {row}",
                [(3, [2 * long, long, long]), (long, [1, 1, 1])],
                blocks=range(first, first + 2),
                shift=(0, 0, 0) if rows else (1, 0, 0),
                about="places",
            )
        if batched or not rows:  # one dimension
            made.add(
                "unaligned, or keys",
                [(3 * 2**31 // c * c, [1, 1, 1])],
                blocks=range(2**22 + 1, 2**22 + 3),
                slice_numel=c if batched else 0,
                shift=(0, 0, 0) if rows else (1, 0, 0),
                about="places",
            )
    if made.kernel_name.index_bits == 64 and not batched:
        made.add("captured", dims, blocks=range(2), captured=True)
        made.add("captured, far", dims, blocks=range(2), captured=True, offset=2**61 + 3)
    return dims


def _rows(made: Cases, largest: int) -> None:
    dims = _views(made, largest)
    if made.kernel_name.index_bits == 64:
        v = made.per_vector
        made.add(
            "short rows",
            [(2**31 + 2**20, [2 * v, v, v]), (v, [1, 1, 1])],
            blocks=range(2**24 + 5, 2**24 + 7),
            about="places",
        )
    _many(made, dims, largest)


def _elements(made: Cases, largest: int) -> None:
    batched = made.kernel_name.source == "KeyTensor"
    if made.kernel_name.index_bits == 32:
        made.add("a block", [(13, [40, 39, 38]), (37, [1, 1, 1])])
        for n in range(1, 8):
            made.add(f"{n} unaligned", [(n, [1, 1, 1])], shift=(1, 0, 0))
        made.add("unaligned", [(1001, [1, 1, 1])], shift=(0, 1, 0))
        made.add("strided", [(333, [3, 2, 1])])
        made.add("transposed", [(13, [1, 1, 1]), (17, [13, 14, 15])])
        if batched:
            for n in (1, 2, 3, 5, 7):
                made.add(f"keys of {n} elements", [(41 * n, [1, 1, 1])], slice_numel=n)
            for first in (1, 2, 3, 2**35 + 6):
                made.add(f"a block from {first}", [(1001, [1, 1, 1])], first_index=first)
            for n, first, apart in ((5, 3, 7), (40, 2**34 + 1, 2**33 + 3), (1, 1, 3), (8, 0, 44)):
                made.add(
                    f"rows of {n} from {first}, {apart} apart",
                    [(41 * n, [1, 1, 1])],
                    slice_numel=n,
                    first_index=first,
                    apart=apart,
                )
            made.add("keys from 6", [(35 * 9, [1, 1, 1])], slice_numel=9, first_index=6)
            made.add(
                "a key for each element, at the end",
                [(2**31 - 1, [1, 1, 1])],
                slice_numel=1,
                blocks=range(2**24 - 1, 2**24),
                about="places",
            )
    elif batched:
        for n in (1, 3, 1025):
            numel = (2**31 + 2**20) // n * n
            counters = numel // n * -(-n // 4)
            last = counters // BLOCK - 1
            made.add(
                f"keys of {n} elements",
                [(numel, [1, 1, 1])],
                slice_numel=n,
                blocks=range(last - 1, last + 1),
                about="places",
            )
    dims = _views(made, largest)
    _many(made, dims, largest)


def _many(made: Cases, dims: Dims, largest: int) -> None:
    per_block = BLOCK * (made.per_vector if made.kernel_name.form == "rows" else 4)
    for error in (-1.0, 1.0):
        blocks = range(2**14 // per_block)
        made.add(f"root off by {error}", dims, blocks=blocks, approx_error=error, about="values")
    made.add(
        "many", dims, blocks=range(min(2**16, largest) // per_block), aimed=True, about="values"
    )
    made.add("most", dims, blocks=range(largest // per_block), offset=3, aimed=True, about="values")


# Mutants


@dataclass(frozen=True)
class Mutant:
    kernel: Name
    line: int  # of the kernel's own text
    pc: int
    operator: str
    old: str
    new: str
    # old -> new with constants for the registers that hold one, and without numbers
    shape: str

    def __str__(self) -> str:
        return f"{describe(self.kernel)}:{self.line}: {shorten(self.old)} -> {shorten(self.new)}"


def describe(name: Name) -> str:
    return f"{name.form}{name.index_bits} {name.op} {name.scale} {name.dtype} {name.source}"


def shorten(text: str) -> str:
    """Parameters are named after their kernel."""
    return re.sub(r"\b_Z\w+_(param_\d+)", r"\1", text)


_INTEGER = re.compile(r"-?\d+")
_FLOAT = re.compile(r"0f[0-9A-F]{8}")
_REGISTER = re.compile(r"%[a-z]+\d+")
_DROPPED = "membar.cta"  # which does nothing
_COMPARISONS = {
    "lt": ("le", "gt"),
    "le": ("lt", "ge"),
    "gt": ("ge", "lt"),
    "ge": ("gt", "le"),
    "eq": ("ne",),
    "ne": ("eq",),
}
_OTHER_OPERATION = {
    "add": ("sub",),
    "sub": ("add",),
    "and": ("or", "xor"),
    "or": ("and", "xor"),
    "xor": ("and", "or"),
    "min": ("max",),
    "max": ("min",),
    "shl": ("shr",),
    "shr": ("shl",),
    "div": ("rem",),
    "rem": ("div",),
}
_HALF_WIDTH = {"64": "32", "32": "16", "16": "8"}


def float_neighbours(literal: str) -> list[str]:
    bits = int(literal[2:], 16)
    return [f"0f{bits + step:08X}" for step in (1, -1) if 0 <= bits + step < 2**32]


def is_power_of_two(literal: str) -> bool:
    return bool(_FLOAT.fullmatch(literal)) and int(literal[2:], 16) & 0x7FFFFF == 0


class Mutator:
    """The mutants of a kernel's instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name = kernel, Name.parse(kernel.name)
        self.constants: dict[str, str] = {}
        written = Counter(
            kernel.register_names[d.slot] for i in kernel.instructions for d in i.destinations if d
        )
        for instruction in kernel.instructions:
            m = re.fullmatch(r"mov\.\w+ (%\w+), (0f\w+|-?\d+)", instruction.text)
            if m is not None and written[m[1]] == 1:
                self.constants[m[1]] = m[2]

    def __iter__(self) -> Iterator[Mutant]:
        for pc, instruction in enumerate(self.kernel.instructions):
            seen = {instruction.text}
            for operator, new in self._changes(instruction.text):
                if new not in seen:
                    seen.add(new)
                    shape = f"{self._shape(instruction.text)} -> {self._shape(new)}"
                    yield Mutant(
                        self.name, instruction.line, pc, operator, instruction.text, new, shape
                    )

    def _shape(self, text: str) -> str:
        def value(m: re.Match[str]) -> str:
            return self.constants.get(m[0], m[0].rstrip("0123456789"))

        destination, comma, rest = shorten(text).partition(",")
        destination = re.sub(r"(%[a-z]+)\d+", r"\1", destination)
        return re.sub(r"\$L\w+", "$L", destination + comma + _REGISTER.sub(value, rest))

    def _changes(self, text: str) -> Iterator[tuple[str, str]]:
        guard, instruction = re.fullmatch(r"(@!?%\w+ )?(.*)", text).groups("")  # type: ignore[union-attr]
        opcode, _, rest = instruction.partition(" ")
        if guard:
            yield (
                "branch",
                (guard[:1] + guard[2:] if "!" in guard else "@!" + guard[1:]) + instruction,
            )
            yield "branch", instruction
        if opcode.split(".")[0] in ("bra", "ret", "st"):
            yield "drop", _DROPPED
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        for operator, new_opcode, new_parts in self._instruction_changes(opcode, parts):
            yield operator, f"{guard}{new_opcode} {', '.join(new_parts)}"

    def _instruction_changes(
        self, opcode: str, parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        base, *modifiers = opcode.split(".")
        kind = modifiers[-1] if modifiers else ""
        if base in ("ld", "st"):
            yield from self._access_changes(opcode, parts)
            return
        if base in ("bra", "ret"):
            return
        destination, *sources = parts
        values = [self.constants.get(source, source) for source in sources]
        if base == "cvta" or (base == "mul" and "0" in values):
            return
        yield from self._opcode_changes(base, modifiers, parts)
        ordered = base in ("sub", "div", "rem", "shl", "shr") or (
            base == "cvt" and len(sources) == 2
        )
        if ordered and (_REGISTER.match(sources[1]) or base in ("sub", "div")):
            yield "swap", opcode, [destination, sources[1], sources[0]]
        if base in ("fma", "mad"):
            yield "swap", opcode, [destination, sources[0], sources[2], sources[1]]
        if len(sources) == 2 and base not in ("min", "max", "cvt"):
            yield "same", opcode, [destination, sources[0], sources[0]]
        for k, source in enumerate(sources):
            for operator, value in self._constant_changes(source):
                yield operator, opcode, [destination, *sources[:k], value, *sources[k + 1 :]]
        yield from self._dropped(base, kind, destination, sources)

    def _constant_changes(self, source: str) -> Iterator[tuple[str, str]]:
        if _INTEGER.fullmatch(source):
            yield "constant", str(int(source) + 1)
            yield "constant", str(int(source) - 1)
        elif _FLOAT.fullmatch(source):
            for value in float_neighbours(source):
                yield "constant", value
            yield "sign", f"0f{int(source[2:], 16) ^ 1 << 31:08X}"

    def _opcode_changes(
        self, base: str, modifiers: list[str], parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        def joined(base: str, modifiers: list[str]) -> str:
            return ".".join([base, *modifiers])

        kind = modifiers[-1] if modifiers else ""
        for other in _OTHER_OPERATION.get(base, ()):
            if (base, other) == ("shl", "shr"):
                yield "operation", joined(other, ["u" + kind[1:]]), parts
            elif (base, other) == ("shr", "shl"):
                yield "operation", joined(other, ["b" + kind[1:]]), parts
            else:
                yield "operation", joined(other, modifiers), parts
        flipped = {"u": "s", "s": "u"}.get(kind[:1], "") + kind[1:]
        if base == "mul" and modifiers[0] in ("lo", "hi"):
            part = {"lo": "hi", "hi": "lo"}[modifiers[0]]
            yield "operation", joined(base, [part, kind]), parts
        if base in ("fma", "mad"):
            without = [*modifiers] if base == "fma" else [modifiers[0], kind]
            yield "operation", joined("mul", without), parts[:3]
            yield "operation", joined("add", modifiers if base == "fma" else [kind]), [
                parts[0], parts[1], parts[3],
            ]  # fmt: skip
        if base == "min" and "xorsign" in modifiers:
            yield "operation", "min.NaN.f32", parts
            yield "operation", "min.xorsign.abs.f32", parts
        if base in ("min", "max") and modifiers == ["NaN", "f32"]:
            yield "operation", f"{base}.f32", parts
        if base == "rsqrt":
            yield "operation", "rcp.approx.ftz.f32", parts
            yield "operation", "sqrt.approx.ftz.f32", parts
        if base == "setp":
            for comparison in _COMPARISONS[modifiers[0]]:
                yield "compare", joined(base, [comparison, *modifiers[1:]]), parts
        signed_matters = (
            base in ("min", "max", "div", "rem", "shr")
            or (base == "mul" and modifiers[0] in ("hi", "wide"))
            or (base == "setp" and modifiers[0] not in ("eq", "ne"))
        )
        if base == "shr" and parts[-1] == "32":
            signed_matters = False  # the upper half, which is all that is used
        if signed_matters and kind[:1] in "us" and kind[1:].isdigit():
            yield "sign", joined(base, [*modifiers[:-1], flipped]), parts
        if base == "cvt":
            yield from self._conversion_changes(modifiers, parts)
        elif "rn" in modifiers and base != "sub":
            exact = base == "mul" and any(
                is_power_of_two(self.constants.get(p, p)) for p in parts[1:]
            )
            if not exact:
                yield "rounding", joined(base, ["rz" if m == "rn" else m for m in modifiers]), parts

    def _conversion_changes(
        self, modifiers: list[str], parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        *rounding, to, source = modifiers
        if rounding:
            yield "rounding", ".".join(["cvt", "rz", to, source]), parts
        if source in ("u32", "s32") and (to[0] == "f" or int(to[1:]) > int(source[1:])):
            other = {"u": "s", "s": "u"}[source[0]] + source[1:]
            yield "sign", ".".join(["cvt", *rounding, to, other]), parts
        if source in ("u64", "s64", "u32", "s32") and to[0] != "f":
            narrow = source[0] + _HALF_WIDTH[source[1:]]
            if to != narrow:
                yield "width", ".".join(["cvt", to, narrow]), parts
            else:
                yield "width", ".".join(["cvt", to, source[0] + _HALF_WIDTH[narrow[1:]]]), parts

    def _access_changes(
        self, opcode: str, parts: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        base, *modifiers = opcode.split(".")
        kind = modifiers[-1]
        count = int(modifiers[-2][1:]) if modifiers[-2] in ("v2", "v4") else 1
        at = 0 if base == "st" else 1
        inside = parts[at][1:-1]
        where, _, offset = inside.partition("+")
        width = count * int(kind[1:]) // 8
        for step in (width, -width) if offset else (width,):
            moved = list(parts)
            moved[at] = f"[{where}+{int(offset or 0) + step}]"
            if moved[at].endswith("+0]"):
                moved[at] = f"[{where}]"
            yield "address", opcode, moved
        if count > 1:
            halved = [m if m != f"v{count}" else f"v{count // 2}" for m in modifiers]
            lanes = parts[1 - at][1:-1].split(",")
            narrow = list(parts)
            narrow[1 - at] = "{" + ",".join(lanes[: count // 2]) + "}"
            halved = [m for m in halved if m != "v1"]
            yield "width", ".".join([base, *halved]), narrow
            swapped = list(parts)
            swapped[1 - at] = "{" + ",".join([lanes[1], lanes[0], *lanes[2:]]) + "}"
            yield "swap", opcode, swapped
        elif kind[0] != "f":
            half = kind[0] + _HALF_WIDTH[kind[1:]]
            yield "width", ".".join([base, *modifiers[:-1], half]), parts
        if base == "ld" and count == 1:
            mov = "mov.f32" if kind == "f32" else f"mov.b{kind[1:]}"
            yield "drop", mov, [parts[0], "0f00000000" if kind == "f32" else "0"]

    def _dropped(
        self, base: str, kind: str, destination: str, sources: list[str]
    ) -> Iterator[tuple[str, str, list[str]]]:
        """The destination gets a source that fits it, or 0."""
        register = destination.rstrip("0123456789")
        type_name = {"%f": "f32", "%r": "b32", "%rd": "b64", "%rs": "b16"}.get(register)
        if type_name is None:
            return  # a predicate, whose branch is changed; or the halves of a word
        fitting = [s for s in sources if s.rstrip("0123456789") == register]
        if base == "mov":
            fitting = []
        zero = "0f00000000" if type_name == "f32" else "0"
        if sources != [zero]:
            yield "drop", f"mov.{type_name}", [destination, fitting[0] if fitting else zero]


class Workbench:
    """Makes a kernel with one instruction changed, without reading all of it again."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.split("\n")
        (self.kernel,) = Module.parse(source).kernels.values()
        self.head = source[: source.index("{\n", source.index(".visible")) + 2]
        declared = re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", source)
        self.types = {prefix: kind for kind, prefix in declared}
        names = self.kernel.register_names
        self.slots = {name: slot for slot, name in enumerate(names)}
        # of an asm statement in braces: the same name may be declared again
        self.scoped = {name for name in names if name.isidentifier()}
        self.targets = {
            i.text.split()[-1]: i.target for i in self.kernel.instructions if i.target >= 0
        }

    def mutated(self, mutant: Mutant) -> Kernel:
        """Raises PTXError if the new text is none."""
        original = self.kernel.instructions[mutant.pc]
        if self.scoped & set(re.findall(r"(?<![%.\w])\w+", mutant.new)):
            return self._parsed_again(mutant)
        used = sorted(set(_REGISTER.findall(mutant.new)))
        declared = "".join(f".reg .{self.types[r.rstrip('0123456789')]} {r};\n" for r in used)
        label = re.search(r"\$L\w+", mutant.new)
        text = f"{self.head}{declared}{label[0] + ':' if label else ''} {mutant.new};\n}}\n"
        (small,) = Module.parse.__wrapped__(text).kernels.values()
        (new,) = small.instructions
        names = {slot: self.slots[name] for slot, name in enumerate(small.register_names)}
        new = replace(
            new,
            line=original.line,
            guard=names.get(new.guard, -1),
            destinations=tuple(d and replace(d, slot=names[d.slot]) for d in new.destinations),
            sources=tuple(replace(s, slot=names.get(s.slot, -1)) for s in new.sources),
            base=new.base and replace(new.base, slot=names.get(new.base.slot, -1)),
            target=self.targets[label[0]] if label else -1,
        )
        instructions = list(self.kernel.instructions)
        instructions[mutant.pc] = new
        return replace(self.kernel, instructions=instructions)

    def _parsed_again(self, mutant: Mutant) -> Kernel:
        line = self.lines[mutant.line - 1]
        (statement,) = [part for part in line.split(";") if " ".join(part.split()) == mutant.old]
        changed = line.replace(statement, mutant.new)
        lines = [*self.lines[: mutant.line - 1], changed, *self.lines[mutant.line :]]
        (kernel,) = Module.parse.__wrapped__("\n".join(lines)).kernels.values()
        return kernel


# Runs


@dataclass
class Subject:
    """A kernel with its cases, as processes get it."""

    source: str
    cases: list[Case]


@dataclass
class Verdict:
    mutant: Mutant
    killer: str  # the case, or '' for a survivor
    how: str  # of a survivor: 'masked' if a case changed a register, or may have


def judge(mutants: list[Mutant], bench: Workbench, cases: list[Case]) -> list[Verdict]:
    """Verdicts on mutants of one kernel."""
    verdicts: list[Verdict] = []
    alive: dict[Mutant, Kernel] = {}
    masked: Counter[Mutant] = Counter()
    for mutant in mutants:
        try:
            alive[mutant] = bench.mutated(mutant)
        except PTXError:
            verdicts.append(Verdict(mutant, "parsing", "error"))
    for case in cases:
        for mutant in infecting(bench.kernel, alive, case) if alive else ():
            if how := case.kills(alive[mutant]):
                verdicts.append(Verdict(mutant, case.name, how))
                del alive[mutant]
            else:
                masked[mutant] += 1
    return verdicts + [Verdict(mutant, "", "masked" if masked[mutant] else "") for mutant in alive]


def infecting(kernel: Kernel, mutants: dict[Mutant, Kernel], case: Case) -> list[Mutant]:
    """The mutants that may make a difference to a case: only these need a run of their own.

    One run of the unchanged kernel tells: each instruction computes its mutants' results too.
    """
    infected: set[Mutant] = set()
    instructions = list(kernel.instructions)
    comparable: dict[int, list[Mutant]] = {}
    for mutant, changed in mutants.items():
        old, new = instructions[mutant.pc], changed.instructions[mutant.pc]
        if not case.executed[mutant.pc] and old.guard < 0:
            continue
        arithmetic = "f32 " in mutant.old and mutant.old[:3] not in ("ld.", "st.")
        if case.about == ("places" if arithmetic else "values"):
            continue
        if (
            old.operation.kind == new.operation.kind == "alu"
            and old.destinations == new.destinations
            and len(old.destinations) == 1
            and old.guard < 0
        ):
            comparable.setdefault(mutant.pc, []).append(mutant)
        else:
            infected.add(mutant)
    for pc, here in comparable.items():
        others = {mutant: mutants[mutant].instructions[pc] for mutant in here}
        instructions[pc] = _beside(instructions[pc], others, infected)
    if comparable:
        case.execute(replace(kernel, instructions=instructions))
    return [mutant for mutant in mutants if mutant in infected]


def _beside(
    instruction: Instruction, others: dict[Mutant, Instruction], infected: set[Mutant]
) -> Instruction:
    """The instruction, noting in `infected` which of the others give another result."""
    own, count = instruction.operation.function, len(instruction.sources)
    (destination,) = instruction.destinations
    assert own is not None
    assert destination is not None
    dtype = destination.dtype
    sources = list(instruction.sources)
    parts: dict[Mutant, tuple[Callable[..., Array], slice]] = {}
    for mutant, other in others.items():
        assert other.operation.function is not None
        parts[mutant] = (
            other.operation.function,
            slice(len(sources), len(sources) + len(other.sources)),
        )
        sources += other.sources

    def bits(value: Array) -> Array:
        """What Threads.write puts into the register."""
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        signed = value.dtype.kind == "i"
        wide = value.astype(f"i{dtype.itemsize}") if signed else value.view(f"u{value.itemsize}")
        return wide.view(dtype) if signed else wide.astype(dtype)

    def compute(*values: Array) -> Array:
        result: Array = own(*values[:count])
        for mutant, (function, part) in parts.items():
            if mutant not in infected and (bits(function(*values[part])) != bits(result)).any():
                infected.add(mutant)
        return result

    operation = replace(instruction.operation, function=compute)
    return replace(instruction, operation=operation, sources=tuple(sources))


_subjects: dict[Name, Subject] = {}


def _start(subjects: dict[Name, Subject]) -> None:
    _subjects.update(subjects)


def _judge_some(mutants: list[Mutant]) -> list[Verdict]:
    subject = _subjects[mutants[0].kernel]
    return judge(mutants, Workbench(subject.source), subject.cases)


def kernel_names(gpu: Gpu, arch: int, dtypes: Iterable[str]) -> dict[Name, str]:
    """The mangled names, by what they mean."""
    mangled = [
        m for op in gpu_run.OPS for m in re.findall(r"\.entry (\w+)\(", gpu.source(op, arch))
    ]
    wanted = set(dtypes)
    return {name: m for m in mangled if (name := Name.parse(m)).dtype in wanted}


def all_mutants(gpu: Gpu, arch: int, names: dict[Name, str]) -> list[Mutant]:
    return [mutant for mangled in names.values() for mutant in Mutator(gpu.kernel(arch, mangled))]


def subjects_of(
    gpu: Gpu, arch: int, names: dict[Name, str], mutants: Iterable[Mutant], largest: int = 2**20
) -> dict[Name, Subject]:
    """The kernels of these mutants."""
    return {
        name: Subject(gpu.kernel_source(arch, names[name]), make_cases(gpu, arch, name, largest))
        for name in dict.fromkeys(mutant.kernel for mutant in mutants)
    }


def judge_all(
    subjects: dict[Name, Subject], mutants: list[Mutant], processes: int
) -> list[Verdict]:
    chunks: list[list[Mutant]] = []
    for mutant in mutants:
        if not chunks or len(chunks[-1]) >= 800 or chunks[-1][0].kernel != mutant.kernel:
            chunks.append([])
        chunks[-1].append(mutant)
    if processes == 1:
        _start(subjects)
        return [verdict for chunk in chunks for verdict in _judge_some(chunk)]
    verdicts: list[Verdict] = []
    # A fork shares the memory of the cases; the processes do without torch.
    with ProcessPoolExecutor(processes, get_context("fork"), _start, (subjects,)) as pool:
        for done in pool.map(_judge_some, chunks):
            before = len(verdicts) // 5000
            verdicts += done
            if len(verdicts) // 5000 > before:
                print(f"{len(verdicts)} of {len(mutants)}", file=sys.stderr, flush=True)
    return verdicts


class Harmless(NamedTuple):
    """Why mutants may survive: `operator kernel: shape` matches the pattern.

    If `same`, a survivor is excused only where it gave the result of the original every time that
    any case ran it, before anything that follows could hide a difference.
    """

    pattern: str
    reason: str
    same: bool = False


HARMLESS = [
    # Arithmetic that is exact
    Harmless(
        r"^rounding .*: cvt\.rn\.f32\.s32",
        "the exponent in its place: 8 significant bits at most",
        same=True,
    ),
    Harmless(r"^rounding .*: mul\.rn\.f32 %f, %f, %f ", "a product with 2^h", same=True),
    # Integers that never have the bit in question
    Harmless(
        r"^sign \w+32 .*: (setp\.ge\.u32|mul\.wide\.u32 %rd, %r, 2 |cvt\.u64\.u32|min\.u32)",
        "in 32-bit kernels every count and index is below 2^31 (launch.cuh)",
        same=True,
    ),
    Harmless(
        r"^sign rows32 .*: shr\.u32 %r, %r, %r ",
        "vectors are below 2^29, and what is shifted is below twice that",
        same=True,
    ),
    Harmless(
        r"^sign \w+64 .*: (mul\.wide\.u32 %rd, %r, \d+|cvt\.u64\.u32 %rd, %r|setp\.lt\.u32)",
        "block and thread numbers are below 2^31, and so are quotients by sizes of 2 and more",
        same=True,
    ),
    Harmless(
        r"^sign \w+64 .*: (div\.u64|rem\.u64|min\.[su]64|setp\.(lt|ge)\.[su]64)",
        "64-bit indices and counts are below 2^63",
        same=True,
    ),
    Harmless(
        r"^sign .*: (setp\.(lt|ge)\.s32|mul\.wide\.s32 %rd, %r, 8) ",
        "ndim, a dimension, or what is left of 4: never negative",
        same=True,
    ),
    Harmless(
        r"^width .*: (ld\.param\.u32 .* -> ld\.param\.u16|cvt\.u64\.u32 .* -> cvt\.u64\.u16)",
        "ndim, a divisor's shift, a thread's number: below 2^16",
    ),
    # The ways through the code
    Harmless(
        r": (setp\.lt\.s32 %p, (%r, 2|1, %r|%r, %r) |mov\.u32 %r, 1 -> )",
        "a further turn of the loop over dimensions: the quotient by the outermost size is 0, the "
        "remainder the index, so that the last step adds the same",
    ),
    Harmless(
        r"^drop \w+32 .*: @%p bra ",
        "the loop over dimensions for only one: as a further turn of it",
    ),
    Harmless(
        r"64 .*: (and\.b64 %rd, %rd, -4294967296 |setp\.eq\.s64 %p, %rd, 0 |@%p bra .* -> membar)",
        "division in 64 bits where 32 were enough: the same quotient",
    ),
    Harmless(
        r"^drop .*: mov\.u64 %rd, %rd -> mov\.b64 %rd, 0", "a sum that starts at 0", same=True
    ),
    Harmless(
        r"^compare whole.*: setp\.(lt|ge)\.s64", "a turn with no elements left writes none of them"
    ),
    Harmless(
        r": setp\.lt\.s32 %p, %r, 1 -> |drop .*: @%p bra ",
        "a counter has an element at least: the first of them is always there",
        same=True,
    ),
    Harmless(
        r"^(operation|drop) whole.*: sub\.s64 %rd, %rd, %rd -> (add|mov)",
        "what is left before the first element of a counter, which is always there",
    ),
    Harmless(
        r"^constant .*: min\.[su](64|32) %rd?, %rd?, 4 ",
        "what is left is only compared with 1 to 4: any bound that the comparison does not reach",
    ),
    Harmless(
        r" Generator: (mul\.lo|mul\.hi|mad\.lo|div|rem|ld\.param\.u32 %r, \[param_[567])",
        "there is one slice: its number is 0, the quotient and what it is multiplied with unused",
    ),
    Harmless(
        r"64 .*: or\.b64 %rd, %rd, %rd -> xor\.b64",
        "64-bit division where 32 bits are enough: shows where index and size share their upper "
        "halves, for which test_cuda.py has a dimension of 2^32 vectors",
    ),
    Harmless(
        r"^drop whole.*: min\.s64 %rd, %rd, 4 ",
        "in the last block less than 2^13 elements are left",
    ),
    Harmless(r" Generator: shr\.u32 %r, %r, %r ", "there is one slice: its number is not used"),
    # Philox and Box-Muller
    Harmless(
        r"^constant .*: mov\.u32 %r, 0 -> mov\.u32 %r, 1$",
        "the upper half of 1 times a 32-bit number is 0, as that of 0",
    ),
    Harmless(
        r": xor\.b32 %r, %r, %r -> or\.b32",
        "the sign bit of a radius, and the first round's product with 0, are clear",
        same=True,
    ),
    Harmless(
        r"^constant .*: add\.s32 %r, %r, -1060439283",
        "moves one float of 2^24 to the other side of sqrt(1/2), where the polynomial still holds",
    ),
    Harmless(
        r": (mov\.f32 %f, 0f21800000 |fma\.rn\.f32 %f, %f, 0fB4317218, 0f21800000 )",
        "2^-60 is there for u = 1, 128 words of 2^32, and lost on any other sum but a tie",
    ),
    Harmless(
        r"^constant .*: mov\.f32 %f, 0f3F000000 ",
        "one ULP of a Newton step's correction is 2^-47 of the root",
    ),
    Harmless(
        r"^constant .*: mov\.f32 %f, 0f43800000 ",
        "clamp: past 256 sigma is inf or 0 already, and stays so up to the next float",
    ),
    Harmless(
        r"^(constant .*: mov\.f32 %f, 0f|rounding .*: (fma|mul)\.rn\.f32 )",
        "one ULP in a term of a polynomial: other bits in a register, but none in the output of "
        "2^20 elements, whose x are aimed at the last bits (in the tail of whole kernels, of 2^12)",
    ),
]


def reason_for(verdict: Verdict) -> str:
    """Why a survivor is harmless, or ''."""
    mutant = verdict.mutant
    text = f"{mutant.operator} {describe(mutant.kernel)}: {mutant.shape}"
    for harmless in HARMLESS:
        if re.search(harmless.pattern, text) and not (harmless.same and verdict.how):
            return harmless.reason
    return ""


def report(verdicts: list[Verdict], unreached: Mapping[str, int]) -> str:
    def table(title: str, label: Callable[[Verdict], str]) -> list[str]:
        total = Counter(label(v) for v in verdicts)
        killed = Counter(label(v) for v in verdicts if v.killer)
        width = max(map(len, total)) + 2
        rows = [f"{title:{width}} mutants  killed"]
        for key, n in sorted(total.items()):
            rows.append(f"{key:{width}} {n:7}  {killed[key]:6}  {killed[key] / n:6.1%}")
        return [*rows, ""]

    survivors = [v for v in verdicts if not v.killer]
    lines = table("kernel", lambda v: describe(v.mutant.kernel))
    lines += table("operator", lambda v: v.mutant.operator)
    hows = Counter(v.how for v in verdicts if v.killer)
    lines += ["killed by " + ", ".join(f"{how} {n}" for how, n in hows.most_common()), ""]
    killers = Counter(v.killer for v in verdicts if v.killer)
    lines += ["by case", *(f"{n:7}  {case}" for case, n in killers.most_common()), ""]
    reasons: dict[str, list[Verdict]] = {}
    for v in survivors:
        reasons.setdefault(reason_for(v), []).append(v)
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(group)} survivors: {reason or 'NO REASON'}")
        shapes = Counter((v.mutant.operator, v.mutant.shape, v.how or "same") for v in group)
        for (operator, shape, how), n in shapes.most_common():
            lines.append(f"    {n:4} {operator} ({how}): {shape}")
        if not reason:
            lines += [f"    {v.mutant.operator}: {v.mutant}" for v in group]
        lines.append("")
    for where, n in unreached.items():
        lines.append(f"no case reaches {n} instructions of {where}")
    lines.append(
        f"{len(verdicts)} mutants, {len(verdicts) - len(survivors)} killed "
        f"({1 - len(survivors) / len(verdicts):.2%}), {len(survivors)} survivors, "
        f"{len(reasons.get('', []))} of them without a reason"
    )
    return "\n".join(lines)


def unreached(subjects: dict[Name, Subject]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, subject in subjects.items():
        executed = np.array([case.executed for case in subject.cases]).sum(axis=0)
        if missing := int((executed == 0).sum()):
            counts[describe(name)] = missing
    return counts


def passes(verdicts: list[Verdict]) -> bool:
    survivors = [v for v in verdicts if not v.killer]
    return all(map(reason_for, survivors)) and len(survivors) <= (1 - FLOOR) * len(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="kernels whose name has all of these")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--every", type=int, default=7, help="run one of so many mutants")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants; all of them if 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gpu = Gpu(Path(folder), (options.arch,))
        names = kernel_names(gpu, options.arch, options.dtypes)
        names = {n: m for n, m in names.items() if set(options.words) <= set(describe(n).split())}
        mutants = all_mutants(gpu, options.arch, names)
        if options.sample:
            chosen = random.Random(options.seed).sample(range(len(mutants)), options.sample)
            mutants = [mutants[i] for i in sorted(chosen)]
        else:
            mutants = mutants[options.seed % options.every :: options.every]
        subjects = subjects_of(gpu, options.arch, names, mutants)
        print(
            f"{len(mutants)} mutants, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
        )
        verdicts = judge_all(subjects, mutants, options.processes)
    print(report(verdicts, unreached(subjects)))
    print(f"{time.monotonic() - began:.0f} s with {options.processes} processes")
    return 0 if passes(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
