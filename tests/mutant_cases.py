"""The cases that every mutant of mutate_ptx.py runs, small ones first.

A kernel's cases are calls on the stand-in GPU: the launch that the binding made of each, the memory
that it finds, and what the kernel as it is leaves there. A mutant is launched in its place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from digest import extremes
from gpu.memory import DeviceMemory, Stores
from gpu.stand_in import Run
from gpu_run import BLOCK, FEW_BLOCKS, Gpu, Result, WholeGrid
from helpers import OPS, assert_same_bits, inputs, key_of
from machine_code import FORMS, Name
from ptx import Kernel, Machine, PTXError
from torch import Tensor

from reparam_fused import _ops

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BOUNDS = (-0.5, 0.75, 0.125)
# A loop that a mutant makes a few times longer has changed some bits by then.
STEP_FACTOR = 4
POISON = 0xFF

Array = np.ndarray[Any, np.dtype[Any]]
Ints: TypeAlias = tuple[int, ...]
Block: TypeAlias = tuple[Ints, Ints]  # global_shape and global_offset


@dataclass
class Case:
    """A launch on memory that is kept, with what the unchanged kernel writes there."""

    name: str
    run: Run
    memory: DeviceMemory
    kept: list[Any]
    of_out: list[bool]  # of each of its stores, whether it goes to the output
    dtype: torch.dtype
    approx_error: float = 0.0
    about: str = ""  # "places" if its values are those of any case, "values" if its places are
    expected: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executed = self.run.stats.executed
        self.expected = [self._data(store).copy() for store in self.run.stores]
        self.size = sum(store.numbers.size * store.width for store in self.run.stores)
        self._undo(self.run.stores)

    def _data(self, store: Stores) -> Array:
        rows: Array = store.allocation.rows(store)[0][store.numbers]
        return rows

    def _undo(self, stores: Sequence[Stores]) -> None:
        for store in stores:
            store.undo(POISON)

    def execute(self, kernel: Kernel) -> str:
        """What goes wrong, or '' if nothing does. Leaves the memory as it was."""
        run = self.run
        machine = Machine(
            kernel,
            self.memory,
            step_limit=STEP_FACTOR * run.stats.steps,
            approx_error=self.approx_error,
        )
        try:
            machine.launch(run.grid, run.block, run.parameters, blocks=run.blocks)
            written = self.memory.end_launch()
            how = self._difference(written)
        except PTXError as error:
            written = self.memory.end_launch()
            how = "steps" if "an endless loop?" in str(error) else "error"
        self._undo(written)
        return how

    def _difference(self, written: Sequence[Stores]) -> str:
        # No byte is written twice: as many of them as there should be are all of them.
        if sum(store.numbers.size * store.width for store in written) != self.size:
            return "writes"
        for store in self.run.stores:
            if not store.allocation.rows(store)[1][store.numbers].all():
                return "writes"
        for store, expected, of_out in zip(
            self.run.stores, self.expected, self.of_out, strict=True
        ):
            bits = self._data(store)
            if np.array_equal(bits, expected):
                continue
            if not of_out:
                return "bits"
            one, other = (torch.from_numpy(b).view(self.dtype) for b in (bits, expected))
            ints = {2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
            nan = one.isnan() & other.isnan()  # any NaN will do
            if not (nan | (one.view(ints) == other.view(ints))).all():
                return "bits"
        return ""


def dense(shape: Ints) -> Ints:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


class Cases:
    """Makes the cases of one kernel."""

    def __init__(self, gpu: Gpu, name: Name) -> None:
        self.gpu, self.kernel_name = gpu, name
        self.dtype = DTYPES[name.dtype]
        self.per_vector = 16 // self.dtype.itemsize
        self.per_block = BLOCK * self.per_vector * (4 if name.form == "whole" else 1)
        self.cases: list[Case] = []
        self.left_out: list[str] = []

    def add(
        self,
        label: str,
        shape: Ints,
        x_strides: Ints | None = None,
        scale_strides: Ints | None = None,
        *,
        blocks: Sequence[range] | None = None,
        batch: int = 0,
        block: Block | None = None,
        values: tuple[Tensor, Tensor] | None = None,
        offset: int = 2**32 - 7,
        shift: tuple[int, int] = (0, 0),
        approx_error: float = 0.0,
        captured: bool = False,
        about: str = "",
        aimed: bool = False,
        form: str = "",
        bounds: Sequence[float] | None = None,
    ) -> None:
        """Blocks of a call, with operands of these strides that begin `shift` elements further on.

        Only what these blocks compute is in memory. There is a key for each place in the first
        `batch` dimensions. `aimed` x show the last bits of sigma and of the noise.
        """
        name, dtype = self.kernel_name, self.dtype
        if name.op == "noise" and block is None and (x_strides or any(shift)):
            # It has no operands: what cuts it into pieces is the whole that it is a part of.
            step = 8 * self.per_vector if name.form == "rows" else 4 - shape[-1] % 4
            grown = tuple(n + 1 for n in shape[batch:-1])
            block = (*shape[:batch], *grown, shape[-1] + step), (0,) * len(shape)
        self.shape, self.batch, self.block = shape, batch, block
        self.form = form or (name.scale if name.scale in FORMS else "log_var")
        self.bounds = BOUNDS if name.bounded else bounds
        if name.source == "generator":  # which counts to 2^62, from 2^63 on
            offset = 2**63 + offset % 2**62
        self.offset = offset
        ranges, blocks = self._elements(blocks)
        elements = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        operands = [
            self._operand(strides or dense(shape), first)
            for strides, first in zip((x_strides, scale_strides), shift, strict=True)
        ]
        given = values or inputs(elements.size, dtype=dtype, seed=len(self.cases))
        cycle = torch.arange(elements.size) % given[0].numel()
        tensors = [t[cycle] for t in given]
        for k in (0, 1):
            self.gpu.fill(operands[k], elements, tensors[k])
            # where places coincide (strides of 0), the last value is what all of them read
            tensors[k] = self.gpu.read(operands[k], elements)
        if aimed:
            tensors[0] = self._aimed(tensors[1], ranges)
            self.gpu.fill(operands[0], elements, tensors[0])

        self.gpu.stand_in.approx_error = approx_error
        out, run, kept = self._launch(operands, ranges, blocks, captured)
        self.gpu.stand_in.approx_error = 0.0
        if Result(out, run).name != name:
            self.left_out.append(label)
            return
        assert_same_bits(self.gpu.read(out, elements), self._expected(tensors, ranges))
        last = out.data_ptr() + out.nbytes
        of_out = []
        for store in run.stores:
            at = store.allocation.address + int(store.numbers[0]) * store.width
            of_out.append(out.data_ptr() <= at < last)
        size = sum(
            s.numbers.size * s.width for s, ours in zip(run.stores, of_out, strict=True) if ours
        )
        assert size == elements.size * dtype.itemsize
        memory = self.gpu.stand_in.memories[0]
        kept = [*kept, *operands, out]
        self.cases.append(Case(label, run, memory, kept, of_out, dtype, approx_error, about))

    def _operand(self, strides: Ints, first: int) -> Tensor:
        span = sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True)) + 1
        storage = torch.empty(first + span, dtype=self.dtype, device="cuda")
        return storage.as_strided(self.shape, strides, first)

    def _launch(
        self,
        operands: list[Tensor],
        ranges: Sequence[range],
        blocks: Sequence[range],
        captured: bool,
    ) -> tuple[Tensor, Run, list[Any]]:
        """The call of these operands, and what it uses beside them."""
        name, gpu = self.kernel_name, self.gpu
        x, scale = operands
        some = list(itertools.chain(*blocks))
        gpu.stand_in.blocks = lambda grid: [b for b in some if b < grid]
        if name.source != "generator":
            key = self._keys(ranges)
            read = None if self._unread else scale
            place = self.block or (None, None)
            outs: list[Tensor] = []
            run = gpu.call(
                lambda: outs.append(OPS[name.op](x, read, key, self.form, *place, self.bounds))
            )
            return outs[0], run, [key]
        generator = torch.Generator("cuda").manual_seed(self._seed(0))
        start = 4 * (self.offset - 2**63)
        pair: list[Tensor] = []
        if not captured:
            generator.set_offset(start)
            run = gpu.call(
                lambda: pair.extend(_ops.sample(x, scale, generator, self.form, self.bounds))
            )
            return pair[0], run, [generator, pair]
        earlier = torch.zeros(24, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = _ops.sample(earlier, earlier, generator)  # the graph's own part of the offset
            pair.extend(_ops.sample(x, scale, generator, self.form, self.bounds))
        generator.manual_seed(self._seed(0))
        generator.set_offset(start - 4 * 6)
        graph.replay()
        torch.cuda.synchronize()
        run = gpu.stand_in.last
        assert run is not None
        return pair[0], run, [generator, graph, earlier, first, pair]

    @property
    def _unread(self) -> bool:
        """Whether the op makes no use of the scale."""
        what = self.kernel_name.op, self.form, self.bounds
        return what == ("sample_backward", "std", None)

    # Keys and noise

    def _seed(self, key: int) -> int:
        return (2**63 + 5 + key * 2654435761) % 2**64

    def _key(self, key: int) -> tuple[int, int]:
        return self._seed(key), (self.offset - 2 * key) % 2**64

    def _keys(self, ranges: Sequence[range]) -> Tensor:
        """On the device, of a batch those that are used."""
        if not self.batch:
            return key_of(*self._key(0)).cuda()
        keys = torch.empty((*self.shape[: self.batch], 2), dtype=torch.uint64, device="cuda")
        per_key = math.prod(self.shape[self.batch :])
        for r in ranges:
            used = np.arange(r.start // per_key, (r.stop - 1) // per_key + 1)
            words = [word for key in used.tolist() for word in self._key(key)]
            places = np.arange(2 * used[0], 2 * used[-1] + 2)
            self.gpu.fill(keys, places, torch.tensor(words, dtype=torch.uint64))
        return keys

    @property
    def _run_numel(self) -> int:
        """Elements that follow each other in the noise."""
        return self.shape[-1] if self.block else math.prod(self.shape[self.batch :])

    def _run_start(self, number: int) -> tuple[int, int]:
        """The key of a run, and the place in its noise where the run begins."""
        if self.block is None:
            return (number if self.batch else 0), 0
        whole, first = self.block
        indices = [int(i) for i in np.unravel_index(number, self.shape[:-1] or (1,))]
        key = index = 0
        for d, (i, n) in enumerate(zip(indices, self.shape[:-1], strict=False)):
            if d < self.batch:
                key = key * n + i
            else:
                index += (first[d] + i) * math.prod(whole[d + 1 :])
        return key, index + first[-1]

    def _elements(self, blocks: Sequence[range] | None) -> tuple[list[range], Sequence[range]]:
        """The elements that blocks compute, and the blocks if all are meant."""
        numel, run = math.prod(self.shape), self._run_numel
        run_counters, cut = -(-run // 4), 0
        if self.kernel_name.form == "elements" and self.block is not None:
            whole, first = self.block
            cut = first[-1] % 4  # elements of a counter before a run
            if cut or whole[-1] % 4:
                run_counters = (run + 6) // 4
            # where runs are cut in several ways, all of them are needed
            assert blocks is None or whole[-1] % 4 == 0
        if self.kernel_name.form == "whole":
            grid = WholeGrid(numel, self.dtype.itemsize)
            blocks = blocks or [range(grid.blocks)]
            return [grid.elements(some) for some in blocks], blocks

        def first_element(block: int) -> int:
            if self.kernel_name.form == "rows":
                return min(block * self.per_block, numel)
            number, counter = divmod(block * BLOCK, run_counters)
            return min(number * run + min(max(4 * counter - cut, 0), run), numel)

        if blocks is None:
            rows = self.kernel_name.form == "rows"
            units = numel if rows else numel // run * run_counters
            blocks = [range(-(-units // (self.per_block if rows else BLOCK)))]
        return [range(first_element(b.start), first_element(b.stop)) for b in blocks], blocks

    def _expected(self, tensors: Sequence[Tensor], ranges: Sequence[range]) -> Tensor:
        """What the CPU makes of the same values with the same keys and counters."""
        name, form = self.kernel_name, self.form
        if name.source == "none":
            return OPS[name.op](*tensors, None, form, None, None, self.bounds)
        parts, at, run = [], 0, self._run_numel
        for elements in ranges:
            for number in range(elements.start // run, (elements.stop - 1) // run + 1):
                low = max(elements.start, number * run)
                high = min(elements.stop, (number + 1) * run)
                key, first = self._run_start(number)
                counter, skipped = divmod(first + low - number * run, 4)
                part = [t[at : at + high - low] for t in tensors]
                at += high - low
                x, scale = (torch.cat([torch.zeros(skipped, dtype=t.dtype), t]) for t in part)
                seed, offset = self._key(key)
                there = key_of(seed, offset + counter)
                read = None if self._unread else scale
                out = OPS[name.op](x, read, there, form, None, None, self.bounds)
                parts.append(out[skipped:])
        return torch.cat(parts)

    def _aimed(self, scale: Tensor, ranges: Sequence[range]) -> Tensor:
        """x that cancels sigma eps, or takes the product next to where it rounds the other way.

        Of a divergence, 0: what is left is the part of log_var. Of noise it is not read.
        """
        if self.kernel_name.op in ("kl_divergence", "noise"):
            return torch.zeros(scale.shape, dtype=self.dtype)
        sample = self.kernel_name.op == "sample"
        x = torch.full(scale.shape, 0.0 if sample else 1.0)
        product = self._expected([x, scale.float()], ranges)
        if sample or self.dtype.itemsize == 4:
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


def make_cases(gpu: Gpu, name: Name, largest: int = 2**20) -> list[Case]:
    """The cases of a kernel: quick ones that kill most first, a million elements last."""
    made = Cases(gpu, name)
    {"whole": _whole, "rows": _rows, "elements": _elements}[name.form](made, largest)
    # Without noise dimensions go in the order of memory, and noise has no operands to be views.
    assert not made.left_out or name.op == "noise" or name.source == "none", made.left_out
    assert len(made.cases) > 2 * len(made.left_out), (name, made.left_out)
    return made.cases


def _whole(made: Cases, largest: int) -> None:
    def last_full(n: int) -> list[range]:
        return [range(FEW_BLOCKS - n, FEW_BLOCKS)]

    block = made.per_block
    few = FEW_BLOCKS * block  # from here on there are full blocks
    odd = odd_values(made.dtype)
    made.add("a full block", (few,), blocks=last_full(1))
    made.add("a tail", (11,), offset=2**64 - 1)
    made.add("aimed", (few,), blocks=last_full(4), aimed=True)
    for tail in range(1, 5):
        made.add(f"aimed, tail {tail}", (block - tail,), aimed=True)
    for n in (1, 2, 3, 4):
        made.add(f"{n} elements", (n,))
    made.add("a long tail", (block - 1,))
    made.add(
        "blocks and a tail",
        (few + block // 2 + 5,),
        blocks=[range(FEW_BLOCKS - 2, FEW_BLOCKS + 3)],
        offset=2**64 - few // 4 + 300,
    )
    made.add(
        "the last without full blocks",
        (few - 1,),
        blocks=[range(4 * FEW_BLOCKS - 3, 4 * FEW_BLOCKS)],
    )
    for turn in range(4):  # each lane of each vector of a thread gets some
        values = (odd[0].roll(turn * (block // 4 + 1)), odd[1].roll(turn * (block // 4 + 1)))
        made.add(f"extremes, {turn}", (few,), blocks=last_full(2), values=values)
        made.add(f"extremes in the tail, {turn}", (block - 2,), values=values)
    for turn in range(8):  # one word of 256 shows the half step of u
        made.add(f"a tail's words, {turn}", (block - 1,), offset=10_007 * turn)
    made.add("beyond 2^63", (few,), blocks=last_full(1), offset=2**63 - few // 4 + 3)
    if made.kernel_name.source == "key":
        first = 2**40 + 12
        made.add(
            "a block",
            (few + 7,),
            blocks=[range(FEW_BLOCKS - 1, FEW_BLOCKS + 1)],
            block=((first + few + 7,), (first,)),
        )
    for numel in (2**31 + 77, 2**33 + 77, 2**32 * made.per_vector + 77):
        last = numel // block
        blocks = [range(last // 2, last // 2 + 2), range(last - 1, last + 1)]
        made.add(f"{numel:#x}", (numel,), blocks=blocks, about="places")
    if made.kernel_name.source == "generator":
        made.add("captured", (few,), blocks=[range(1)], captured=True)
        made.add("captured, a tail", (2 * block + 11,), captured=True)
        made.add("captured, odd", (5,), captured=True, offset=2**61 + 3)
    for error in (-1.0, 1.0):
        made.add(
            f"root off by {error}",
            (few,),
            blocks=last_full(8),
            approx_error=error,
            about="values",
        )
        made.add(f"root off by {error}, tail", (block - 3,), approx_error=error, about="values")
    for turn in range(32):  # what is left of a vector is less than one
        made.add(
            f"left, {turn}",
            (2 * made.per_vector - 1 - turn % 2,),
            offset=10_007 * turn,
            aimed=True,
            about="values",
        )
    for label, n in (("many", min(2**16, largest)), ("most", largest)):
        made.add(f"{label}, full", (few,), blocks=last_full(n // block), aimed=True, about="values")
        # below the full blocks
        made.add(f"{label}, tail", (n - 1,), offset=3, aimed=True, about="values")


def apart(shape: Ints, first: int, step: int) -> Block:
    """Rows of a block that lie `step` from each other in the noise, after a row of the whole."""
    whole = (shape[0] + 1, *shape[1:-1], step)
    return whole, (1, *(0 for _ in shape[1:-1]), first)


def _views(made: Cases, largest: int) -> tuple[Ints, Ints]:
    """What rows and elements have in common. Returns the shape of many elements, and strides."""
    rows = made.kernel_name.form == "rows"
    batched = made.kernel_name.source == "key"
    odd = odd_values(made.dtype)
    step = made.per_vector if rows else 1
    # a size whose multiplier for the division has its top bit set
    c = 20 * step if rows else 37
    pad = 2 * c if rows else 2 * c + 1
    made.add("chunk", (9, c), (pad, 1), (pad, 1))
    made.add("aimed", (150, c), (pad, 1), (pad, 1), aimed=True)
    made.add("permuted", (3, 2, c), (c, 3 * c, 1), (c, 3 * c, 1))
    made.add("half permuted", (3, 2, c), (c, 3 * c, 1))
    made.add("three strides", (7, c), (pad, 1), (c + 8 * step, 1), offset=2**64 - 9)
    four = (3, 2, 2, c)
    four_strides = ((91 * c, 40 * c, 5 * c, 1), (0, 30 * c, 4 * c, 1))
    made.add("four dims", four, *four_strides)
    made.add("expanded", (5, c), (0, 1), offset=2**64 - 2)
    if rows:  # an operand that is one element all along
        made.add("a column of x", (9, c), (3, 0), (pad, 1))
        made.add("a column of the scale", (9, c), (pad, 1), (3, 0))
        made.add("one value", (9, c), (pad, 1), (0, 0))
    if batched:
        for n in (c, 2 * step, 8 * step) if rows else (c, 3, 9):
            made.add(f"keys of {n}", (35, n), batch=1)
        made.add("keys of chunks", (7, 5, c), (5 * pad, pad, 1), batch=1)
        made.add("keys of four dims", four, *four_strides, batch=3)
        far = 2**33 + 12
        made.add("a block of four dims", four, *four_strides, block=apart(four, far - 404, far))
        made.add("a block", (35, c), (pad, 1), block=apart((35, c), 2**32 + 8, far))
    elif made.kernel_name.source == "generator":
        made.add("captured", (9, c), (pad, 1), (pad, 1), captured=True)
        made.add("captured, far", (9, c), (pad, 1), (pad, 1), captured=True, offset=2**61 + 3)
    made.add("extremes", (150, c), (pad, 1), (c, 1), values=odd)
    made.add("beyond 2^63", (40, c), (pad, 1), (c, 1), offset=2**63 - 3)
    numels = [2**30, 2**31 - 2**22]
    columns = 150_000 * made.per_vector if rows else 600_011
    strides = (columns + (8 * step if rows else 1), 1)
    per_block = BLOCK * (made.per_vector if rows else 4)
    for least in numels:
        shape = (-(-least // columns), columns)
        numel = math.prod(shape)
        last = -(-numel // per_block)
        ends = [range(first, first + 2) for first in (0, last // 2 - 1, last - 2)]
        offset = 2**64 - 2**31
        made.add(f"{numel:#x}", shape, strides, blocks=ends, offset=offset, about="places")
        most = [range(last - 8, last)]
        if least == numels[0]:
            made.add("aimed, large", shape, strides, blocks=most, aimed=True)
        made.add(f"{numel:#x}, extremes", shape, strides, blocks=most, values=odd)
        if batched:
            end = last
            if not rows:  # the last counter of each row is not whole
                end = shape[0] * -(-columns // 4) // BLOCK
            some = [range(end - 3, end - 1)]
            made.add(f"{numel:#x}, keys", shape, strides, batch=1, blocks=some, about="places")
            for first in (2**32 + 8,) if rows else (2**32 + 8, 2**32 + 11):
                second = (columns + (6 if first % 4 else 3)) // 4 // BLOCK  # where that row begins
                made.add(
                    f"{numel:#x}, a block from {first}",
                    shape,
                    strides,
                    blocks=some if rows else [range(second, second + 1), *some],
                    block=apart(shape, first, 2**33 + 12),
                    about="places",
                )
    # strides beyond 2^32, of vectors too, in each place that a dimension may have; in bytes with
    # the top bit of their lower halves
    far, run = 2**32 * made.per_vector + 2**31 // made.dtype.itemsize, BLOCK * made.per_vector
    shift = (0, 0) if rows else (1, 0)
    firsts = [row * (run // per_block) for row in (1, 2, 4)]
    made.add(
        "far rows",
        (3, 2, 2, run),
        (far, far, far, 1),
        (far, far, far, 1),
        blocks=[range(first, first + run // per_block) for first in firsts],
        shift=shift,
        about="places",
    )
    return shape, strides


def _rows(made: Cases, largest: int) -> None:
    shape, strides = _views(made, largest)
    _many(made, shape, strides, largest)


def _elements(made: Cases, largest: int) -> None:
    batched = made.kernel_name.source == "key"
    odd = odd_values(made.dtype)
    made.add("rows", (13, 37), (40, 1), (39, 1))
    for n in range(1, 8):
        made.add(f"{n} unaligned", (n,), shift=(1, 0))
    made.add("unaligned", (1001,), shift=(0, 1))
    made.add("strided", (333,), (3,), (2,))
    made.add("transposed", (13, 17), (1, 13), (1, 14))
    far = 2**33 + 2**30
    made.add("far elements", (3, 3), (4 * far, far), (far, 4 * far), about="places")
    for form in FORMS if made.kernel_name.scale == "any" else ():
        for bounds in (None, BOUNDS, (*BOUNDS[:2], 0.0)):
            options: dict[str, Any] = {"form": form, "bounds": bounds}
            label = f"{form} within {bounds}"
            made.add(label, (4001,), (3,), (2,), aimed=True, **options)
            made.add(f"{label}, extremes", (4001,), (3,), (2,), values=odd, **options)
    if batched:
        for n in (1, 2, 3, 5, 7):
            made.add(f"keys of {n} elements", (41, n), batch=1)
        for first in (1, 2, 3, 2**35 + 6):
            made.add(f"a block from {first}", (1001,), block=((first + 1001,), (first,)))
        for n, first, step in ((5, 2, 7), (40, 2**32 + 1, 2**33 + 3), (1, 1, 3), (9, 0, 44)):
            label = f"rows of {n} from {first}, {step} apart"
            made.add(label, (41, n), block=apart((41, n), first, step))
        made.add("keys from 6", (35, 9), batch=1, block=((35, 17), (0, 6)))
        made.add(
            "a key for each element, at the end",
            (2**31 - 16, 1),
            batch=1,
            blocks=[range(2**24 - 1, 2**24)],
            about="places",
        )
    shape, strides = _views(made, largest)
    _many(made, shape, strides, largest)


def _many(made: Cases, shape: Ints, strides: Ints, largest: int) -> None:
    per_block = BLOCK * (made.per_vector if made.kernel_name.form == "rows" else 4)
    for error in (-1.0, 1.0):
        blocks = [range(2**14 // per_block)]
        made.add(
            f"root off by {error}",
            shape,
            strides,
            blocks=blocks,
            approx_error=error,
            about="values",
        )
    blocks = [range(min(2**16, largest) // per_block)]
    made.add("many", shape, strides, blocks=blocks, aimed=True, about="values")
    blocks = [range(largest // per_block)]
    made.add("most", shape, strides, blocks=blocks, offset=3, aimed=True, about="values")
