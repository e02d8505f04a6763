"""The cases that every mutant of mutate_ptx.py runs, small ones first.

A kernel's cases are launches, recorded as test_cuda.py records them, with the buffers that they
read and what the kernel as it is writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from digest import extremes
from gpu_run import (
    BLOCK,
    CPU_OPS,
    FEW_BLOCKS,
    Dims,
    GeneratorState,
    Gpu,
    Launch,
    WholeGrid,
    make_problem,
    numbered,
)
from helpers import assert_same_bits, inputs, key_of
from machine_code import Name
from ptx import Kernel, Machine, Memory, PTXError
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A loop that a mutant makes a few times longer has changed some bits by then.
STEP_FACTOR = 4

Array = np.ndarray[Any, np.dtype[Any]]


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
        if self.kernel_name.source == "Generator":  # which counts to 2^62, from 2^63 on
            offset = 2**63 + offset % 2**62
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
        if self.kernel_name.source == "NoKey":
            pass
        elif self.kernel_name.source == "KeyTensor":
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
            at = 4 * int(keys[0, 1]) % 2**64
            state = GeneratorState(int(keys[0, 0]), at, 0, 0, addresses[3])
            if captured:
                # the graph's own part of the offset comes on top
                state = GeneratorState(0, 4 * 6, addresses[4], addresses[5], addresses[3])
        shifted = [a + s * self.itemsize for a, s in zip(addresses[:3], shift, strict=True)]
        if self.kernel_name.op == "noise":
            shifted[:2] = [0, 0]  # which reads neither
        numbers = numbered(dims, slice_numel)
        if apart:
            for _, strides in numbers:
                strides[3:] = [strides[3] + apart * (strides[4] // 2), 0]
        problem = make_problem(
            numbers,
            (shifted[0], shifted[1], shifted[2]),
            addresses[3] if self.kernel_name.source == "KeyTensor" else 0,
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

        if self.kernel_name.form == "whole":
            grid = WholeGrid(numel, self.itemsize)
            blocks = blocks or range(grid.blocks)
            return grid.elements(blocks), blocks

        def first_element(block: int) -> int:
            if self.kernel_name.form == "rows":
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
            if self.kernel_name.source == "NoKey":
                parts.append(CPU_OPS[self.kernel_name.op](*part))
                continue
            form = FORMS[self.kernel_name.scale]
            unused = (self.kernel_name.op, form) == ("sample_backward", "std")
            key = key_of(seed, offset + counter)
            out = CPU_OPS[self.kernel_name.op](x, None if unused else log_var, key, form)
            parts.append(out[skipped:])
        return torch.cat(parts)

    def _aimed(
        self, log_var: Tensor, keys: Array, elements: range, slices: range, slice_numel: int
    ) -> Tensor:
        """x that cancels sigma eps, or takes the product next to where it rounds the other way.

        Of a divergence, 0: what is left is the part of log_var. Of noise it is not read.
        """
        if self.kernel_name.op in ("kl_divergence", "noise"):
            return torch.zeros(log_var.shape, dtype=self.dtype)
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
    log_var[::17] = float("inf")
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

    def last_full(n: int) -> range:
        return range(FEW_BLOCKS - n, FEW_BLOCKS)

    block = made.per_block
    few = FEW_BLOCKS * block  # from here on there are full blocks
    odd = odd_values(made.dtype)
    made.add("a full block", contiguous(few), blocks=last_full(1))
    made.add("a tail", contiguous(11), offset=2**64 - 1)
    made.add("aimed", contiguous(few), blocks=last_full(4), aimed=True)
    for tail in range(1, 5):
        made.add(f"aimed, tail {tail}", contiguous(block - tail), aimed=True)
    for n in (1, 2, 3, 4):
        made.add(f"{n} elements", contiguous(n))
    made.add("a long tail", contiguous(block - 1))
    made.add(
        "blocks and a tail",
        contiguous(few + block // 2 + 5),
        blocks=range(FEW_BLOCKS - 2, FEW_BLOCKS + 3),
        offset=2**64 - few // 4 + 300,
    )
    made.add("the last without full blocks", contiguous(few - 1), blocks=range(2045, 2048))
    for turn in range(4):  # each lane of each vector of a thread gets some
        values = (odd[0].roll(turn * (block // 4 + 1)), odd[1].roll(turn * (block // 4 + 1)))
        made.add(f"extremes, {turn}", contiguous(few), blocks=last_full(2), values=values)
        made.add(f"extremes in the tail, {turn}", contiguous(block - 2), values=values)
    for turn in range(8):  # one word of 256 shows the half step of u
        made.add(f"a tail's words, {turn}", contiguous(block - 1), offset=10_007 * turn)
    made.add("beyond 2^63", contiguous(few), blocks=last_full(1), offset=2**63 - few // 4 + 3)
    if made.kernel_name.source == "KeyTensor":
        made.add(
            "a block",
            contiguous(few + 7),
            blocks=range(FEW_BLOCKS - 1, FEW_BLOCKS + 1),
            first_index=2**40 + 12,
        )
    for power in (31, 33, 35):
        last = (2**power + 77) // block
        for label, first in (("middle", last // 2), ("end", last - 1)):
            blocks = range(first, first + 2)
            made.add(
                f"2^{power}, {label}", contiguous(2**power + 77), blocks=blocks, about="places"
            )
    if made.kernel_name.source == "Generator":
        made.add("captured", contiguous(few), blocks=range(1), captured=True)
        made.add("captured, a tail", contiguous(2 * block + 11), captured=True)
        made.add("captured, odd", contiguous(5), captured=True, offset=2**61 + 3)
    for error in (-1.0, 1.0):
        made.add(
            f"root off by {error}",
            contiguous(few),
            blocks=last_full(8),
            approx_error=error,
            about="values",
        )
        made.add(
            f"root off by {error}, tail", contiguous(block - 3), approx_error=error, about="values"
        )
    for turn in range(16):  # what is left of a vector is less than one
        made.add(
            f"left, {turn}",
            contiguous(2 * made.per_vector - 1 - turn % 2),
            offset=10_007 * turn,
            aimed=True,
            about="values",
        )
    for label, n in (("many", min(2**16, largest)), ("most", largest)):
        blocks = last_full(n // block)
        made.add(f"{label}, full", contiguous(few), blocks=blocks, aimed=True, about="values")
        # below the full blocks, of which float32 has some from 2^20 on
        made.add(f"{label}, tail", contiguous(n - 1), offset=3, aimed=True, about="values")


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
        four: Dims = [
            (3, [91 * c, 0, 8 * c]),
            (2, [40 * c, 30 * c, 4 * c]),
            (2, [5 * c, 4 * c, 2 * c]),
            (c, [1, 1, 1]),
        ]
        made.add("four dims", four)
        made.add("expanded", [(5, [0, c, c]), (c, [1, 1, 1])], offset=2**64 - 2)
        if batched:
            for n in (c, 2 * step, 8 * step) if rows else (c, 3, 9):
                made.add(f"keys of {n}", [(35 * n, [1, 1, 1])], slice_numel=n)
            made.add("keys of chunks", [(35, [pad, c, c]), (c, [1, 1, 1])], slice_numel=5 * c)
            made.add("keys of four dims", four, slice_numel=c)
            made.add(
                "a block of four dims",
                four,
                slice_numel=c,
                first_index=2**34 + 8,
                apart=2**33 + 12,
            )
            made.add(
                "a block",
                [(35, [pad, c, c]), (c, [1, 1, 1])],
                slice_numel=c,
                first_index=2**34 + 8,
                apart=2**33 + 12,
            )
        elif made.kernel_name.source == "Generator":
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
    if made.kernel_name.index_bits == 64 and made.kernel_name.source == "Generator":
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
            for n, first, apart in ((5, 3, 7), (40, 2**34 + 1, 2**33 + 3), (1, 1, 3), (9, 0, 44)):
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
    if made.kernel_name.index_bits == 64:
        c = 600_011
        for rows in range(2**31 // c + 1, 2**31 // c + 5):  # tails of every length
            last = -(-rows * c // (4 * BLOCK))
            made.add(
                f"{rows} rows, the end",
                [(rows, [c + 1, c, c]), (c, [1, 1, 1])],
                blocks=range(last - 1, last),
                about="places",
            )
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
