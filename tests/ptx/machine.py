"""Launches: the threads of a few blocks at a time step through a kernel's instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .arithmetic import DTYPES, Array
from .body import DYNAMIC_SHARED
from .errors import PTXError
from .memory import Memory, Stats
from .model import Instruction, Kernel
from .scratch import WINDOWS, Scratch
from .threads import WARP, Threads

_MAX_GRID = (2**31 - 1, 65535, 65535)
_THREADS_AT_ONCE = 1 << 14  # the arrays of a few instructions fit a core's cache

Sizes = tuple[int, int, int]


def _never_written(kernel: Kernel, bits: int) -> dict[int, Array]:
    """The slots that are only read, with a value for each."""
    written = {
        destination.slot
        for instruction in kernel.instructions
        for destination in instruction.destinations
        if destination is not None
    }
    written.update(kernel.presets.values())
    return {
        source.slot: np.full(1, bits % 256**source.dtype.itemsize, f"u{source.dtype.itemsize}")
        for instruction in kernel.instructions
        for source in instruction.sources
        if source.constant is None and source.slot not in written and source.dtype.kind != "b"
    }


class Machine:
    """Runs one kernel on one memory.

    `step_limit` counts the instructions that the threads of a few blocks issue together.
    `approx_error` in [-1, 1] is the part of the documented error that approximate instructions
    make; a generator draws it for each thread. `undefined` is what registers hold that no
    instruction of the kernel writes, as Triton has them in the unused halves of packed words: where
    two values give the same results nothing depends on them. Without it, to read one is an error.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        step_limit: int = 1_000_000,
        approx_error: float | np.random.Generator = 0.0,
        undefined: int | None = None,
    ) -> None:
        self._never_written = {} if undefined is None else _never_written(kernel, undefined)
        self.kernel, self.memory, self.step_limit = kernel, memory, step_limit
        self.approx_error = approx_error
        self.stats = Stats()
        self._parameters = np.zeros(0, np.uint8)
        self._constants: set[str] = set()
        self._symbols = {
            variable.name: self._allocate(variable.name)
            for variable in kernel.variables.values()
            if variable.space in ("global", "const")
        }
        self._handlers: dict[str, Callable[[Instruction, Threads], bool | None]] = {
            "approx": self._approximate,
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic,
            "trap": self._trap,
            "nothing": lambda instruction, threads: None,
            "bra": lambda instruction, threads: threads.branch(instruction.target),
            "exit": lambda instruction, threads: threads.exit(),
            "bar": lambda instruction, threads: threads.block_barrier(
                [int(source.constant[0]) for source in instruction.sources]
            ),
            "warpsync": lambda instruction, threads: threads.warp_barrier(instruction),
            "shfl": lambda instruction, threads: threads.shuffle(instruction),
            "vote": lambda instruction, threads: threads.vote(instruction),
            "activemask": lambda instruction, threads: threads.active_mask(instruction),
        }

    def _allocate(self, name: str) -> int:
        variable = self.kernel.variables[name]
        if variable.space == "const":
            self._constants.add(name)
        address = self.memory.address_of(name)
        if address is None:
            writable = variable.space == "global"
            address = self.memory.allocate(name, variable.data.copy(), writable=writable)
        return address

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        params: Sequence[bytes],
        blocks: Iterable[int] | None = None,
        shared_bytes: int = 0,
    ) -> Stats:
        """Run the grid's blocks, or those with the linear indices `blocks`."""
        kernel = self.kernel
        grid_size, block_size = self._check_sizes(grid, block)
        self._parameters = self._pack(params)
        self.stats = Stats(executed=[0] * len(kernel.instructions))
        count = int(np.prod([int(n) for n in grid_size], dtype=object))
        indices = np.arange(count) if blocks is None else np.array(list(blocks), np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= count):
            raise PTXError(f"kernel {kernel.name}: the grid has {count} blocks")
        at_once = max(1, _THREADS_AT_ONCE // int(np.prod(block_size)))
        presets = {name: np.array([address], np.uint64) for name, address in self._symbols.items()}
        static = -(-kernel.shared_bytes // 16) * 16
        presets[DYNAMIC_SHARED] = np.array([static], np.uint64)
        with np.errstate(all="ignore"):
            for first in range(0, indices.size, at_once):
                part = indices[first : first + at_once]
                threads = Threads(
                    kernel, grid_size, block_size, part, presets, static + shared_bytes
                )
                for slot, value in self._never_written.items():
                    threads.registers[slot] = value
                self._run(threads)
        return self.stats

    def _check_sizes(self, grid: Sequence[int], block: Sequence[int]) -> tuple[Sizes, Sizes]:
        kernel = self.kernel
        gx, gy, gz = (*grid, 1, 1)[:3]
        bx, by, bz = (*block, 1, 1)[:3]
        fits = all(1 <= n <= limit for n, limit in zip((gx, gy, gz), _MAX_GRID, strict=True))
        if not fits or not (1 <= bx <= 1024 and 1 <= by <= 1024 and 1 <= bz <= 64):
            raise PTXError(f"kernel {kernel.name}: cannot launch {grid} blocks of {block} threads")
        if bx * by * bz > (kernel.max_threads or 1024):
            raise PTXError(f"kernel {kernel.name}: {bx * by * bz} threads in a block are too many")
        if kernel.required_block not in (None, (bx, by, bz)):
            raise PTXError(f"kernel {kernel.name}: a block must be {kernel.required_block} threads")
        return (gx, gy, gz), (bx, by, bz)

    def _pack(self, params: Sequence[bytes]) -> Array:
        kernel = self.kernel
        sizes = [parameter.size for parameter in kernel.parameters]
        if [len(value) for value in params] != sizes:
            raise PTXError(
                f"kernel {kernel.name}: parameters of {[len(value) for value in params]} bytes "
                f"instead of {sizes}"
            )
        packed = np.zeros(kernel.parameter_bytes, np.uint8)
        for parameter, value in zip(kernel.parameters, params, strict=True):
            packed[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(
                value, np.uint8
            )
        return packed

    def _run(self, threads: Threads) -> None:
        """Step the threads until all have exited, always those that are furthest behind."""
        instructions, executed = self.kernel.instructions, self.stats.executed
        instruction, steps, limit, issued = None, 0, self.step_limit, 0
        try:
            while threads.schedule():
                while (pc := threads.pc) < threads.until:
                    instruction = instructions[pc] if pc < len(instructions) else None
                    if instruction is None:
                        raise PTXError("runs past the end of the kernel")
                    steps += 1
                    if steps > limit:
                        raise PTXError(f"more than {limit} steps: an endless loop?")
                    threads.pc = pc + 1
                    issued += threads.running
                    guarded = instruction.guard >= 0
                    if guarded and not threads.apply_guard(instruction):
                        continue
                    executed[pc] += threads.executing
                    operation = instruction.operation
                    if operation.kind == "alu":
                        values = threads.read(instruction.sources)
                        threads.write(instruction, operation.function(*values))
                    elif self._handlers[operation.kind](instruction, threads):
                        break
                    if guarded:
                        threads.drop_guard()
                else:
                    threads.park()
        except PTXError as error:
            raise PTXError(self._located(error, instruction, threads)) from None
        self.stats.instructions += issued
        self.stats.steps = max(self.stats.steps, steps)

    def _located(self, error: PTXError, instruction: Instruction | None, threads: Threads) -> str:
        where = f"kernel {self.kernel.name}"
        if instruction is not None:
            where += f", line {instruction.line}: `{instruction.text}`"
        if error.lane is not None:
            where += f", {threads.describe(error.lane)}"
        return f"{where}: {error}"

    def _approximate(self, instruction: Instruction, threads: Threads) -> None:
        values = threads.read(instruction.sources)
        error: float | Array
        if isinstance(self.approx_error, np.random.Generator):
            error = self.approx_error.uniform(-1, 1, max(value.size for value in values))
        else:
            error = self.approx_error
        threads.write(instruction, instruction.operation.function(error, *values))

    def _trap(self, instruction: Instruction, threads: Threads) -> None:
        raise PTXError("reached", 0)

    def _access(self, instruction: Instruction, threads: Threads) -> tuple[str, Array]:
        """The space and the addresses of an access, generic ones resolved."""
        (base,) = threads.read((instruction.base,))
        addresses = base.astype(np.int64) + instruction.offset
        space = instruction.operation.space
        if space != "generic":
            return space, addresses
        for name, window in WINDOWS.items():
            inside = addresses >> 32 == window >> 32
            if inside.all():
                return name, addresses - window
            if inside.any():
                raise PTXError(f"one access to {name} and to other memory is not supported")
        return "global", addresses

    def _load(self, instruction: Instruction, threads: Threads) -> None:
        operation = instruction.operation
        types = operation.destinations
        element = DTYPES[types[0]]
        threads.read(instruction.sources)  # a cache policy, which only has to be there
        space, addresses = self._access(instruction, threads)
        if space in ("global", "const"):
            rows = self._load_global(addresses, operation.width, element.itemsize, space, threads)
        elif space == "param":
            rows = self._load_parameter(addresses, operation.width)
        else:
            scratch, index = self._scratch(space, addresses, operation.width, threads)
            rows = scratch.load(index, element)
        rows = rows.view(element)
        threads.write(instruction, tuple(rows[:, i].copy() for i in range(len(types))))

    def _load_global(
        self, addresses: Array, width: int, element: int, space: str, threads: Threads
    ) -> Array:
        warps = threads.of_selected(threads.warp)
        whole: Array | None = None
        for buffer, part in self.memory.locate(addresses, width):
            if space == "const" and buffer.name not in self._constants:
                raise PTXError(f"{buffer.name} is not .const", 0)
            here = addresses[part]
            if space == "global":
                self.stats.record(
                    buffer.name, "ld", width, here, warps[part] if addresses.size > 1 else warps
                )
            rows = buffer.load(here, width, element)
            if here.size == addresses.size:
                return rows
            if whole is None:
                whole = np.empty((addresses.size, rows.shape[1]), rows.dtype)
            whole[part] = rows
        assert whole is not None
        return whole

    def _load_parameter(self, addresses: Array, width: int) -> Array:
        data = self._parameters
        bad = (addresses < 0) | (addresses > data.size - width) | (addresses & (width - 1) != 0)
        if bad.any():
            lane = int(np.argmax(bad))
            raise PTXError(
                f"out of bounds or misaligned: {width} bytes at {addresses[lane]} of "
                f"{data.size} bytes of parameters",
                lane,
            )
        return data[addresses[:, None] + np.arange(width)]

    def _scratch(
        self,
        space: str,
        addresses: Array,
        width: int,
        threads: Threads,
        values: Array | None = None,
    ) -> tuple[Scratch, Array]:
        """Shared or local memory, and the bytes of each selected thread's access."""
        addresses = np.broadcast_to(addresses, threads.executing)
        thread = threads.of_selected(threads.thread)
        if space == "local":
            return threads.local, threads.local.bytes_of(thread, addresses, width)
        block = threads.of_selected(threads.block)
        index = threads.shared.bytes_of(block, addresses, width)
        threads.races.check(index, thread, block, values, WARP)
        return threads.shared, index

    def _store(self, instruction: Instruction, threads: Threads) -> None:
        operation = instruction.operation
        space, addresses = self._access(instruction, threads)
        addresses = np.broadcast_to(addresses, threads.executing)
        # A cache policy may follow the values.
        count = operation.width // DTYPES[operation.sources[0]].itemsize
        columns = threads.read(instruction.sources)[:count]
        values = np.empty((threads.executing, count), columns[0].dtype)
        for i, column in enumerate(columns):
            values[:, i] = column
        if space == "global":
            warps = threads.of_selected(threads.warp)
            for buffer, part in self.memory.locate(addresses, operation.width):
                buffer.store(addresses[part], operation.width, values[part])
                self.stats.record(buffer.name, "st", operation.width, addresses[part], warps[part])
        elif space == "param":
            raise PTXError("writes to a parameter", 0)
        else:
            scratch, index = self._scratch(
                space, addresses, operation.width, threads, values.view(np.uint8)
            )
            scratch.store(index, values)

    def _atomic(self, instruction: Instruction, threads: Threads) -> None:
        width = instruction.operation.width
        _, addresses = self._access(instruction, threads)
        addresses = np.broadcast_to(addresses, threads.executing)
        (values,) = threads.read(instruction.sources)
        values = np.broadcast_to(values, threads.executing)
        old = np.empty_like(values)
        warps = threads.of_selected(threads.warp)
        for buffer, part in self.memory.locate(addresses, width):
            old[part] = buffer.atomic_add(addresses[part], values[part])
            self.stats.record(buffer.name, "atom", width, addresses[part], warps[part])
        if instruction.destinations:
            threads.write(instruction, old)
