"""The threads of a few blocks: their registers, who runs, and what warps do together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .arithmetic import Array
from .errors import PTXError
from .model import Instruction, Kernel, Source
from .scratch import RaceDetector, Scratch

WARP = 32
_FAR = 1 << 60


class Threads:
    """Live threads, one array lane each; threads that exit leave the arrays.

    A register is an array of its bits: a lane for each thread, or shape (1,) where all have the
    same. Of the threads the `active` ones (None: all) are at `pc`, and of these the `selected` ones
    pass the guard of the current instruction. The others wait at their place in `pcs`.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: Array,
        addresses: Mapping[str, Array],
        shared_bytes: int,
    ) -> None:
        self.kernel, self.block_shape = kernel, block
        size = block[0] * block[1] * block[2]
        warps = -(-size // WARP)
        self.block_size, self.block_indices = size, blocks
        self.count = size * blocks.size
        linear = np.tile(np.arange(size), blocks.size)
        self.block = np.repeat(np.arange(blocks.size), size)
        self.warp = self.block * warps + linear // WARP
        self.lane = linear % WARP
        self.thread = self.warp * WARP + self.lane

        self.pc, self.until = 0, _FAR
        self.pcs: Array | None = None
        self.active: Array | None = None
        self.selected: Array | None = None
        self.running = self.executing = self.count

        total_warps = warps * blocks.size
        self.shared = Scratch("shared", blocks.size, shared_bytes)
        self.races = RaceDetector(blocks.size * shared_bytes, blocks.size, total_warps)
        self.local = Scratch("local", total_warps * WARP, kernel.local_bytes)
        self.registers: list[Array | None] = [None] * len(kernel.register_names)
        self.undefined: list[Array | None] = [None] * len(kernel.register_names)
        self._preset(linear, grid, addresses)

    def _preset(
        self, linear: Array, grid: tuple[int, int, int], addresses: Mapping[str, Array]
    ) -> None:
        bx, by, bz = self.block_shape
        ctaid = self.block_indices[self.block]
        # One-dimensional launches keep the other axes uniform.
        values = {
            "tid.x": linear % bx if by * bz > 1 else linear,
            "tid.y": linear // bx % by if by > 1 else [0],
            "tid.z": linear // (bx * by) if bz > 1 else [0],
            "ctaid.x": ctaid % grid[0] if self.block_indices.size > 1 else ctaid[:1] % grid[0],
            "ctaid.y": ctaid // grid[0] % grid[1] if grid[1] > 1 else [0],
            "ctaid.z": ctaid // (grid[0] * grid[1]) if grid[2] > 1 else [0],
            "laneid": self.lane,
            "warpid": linear // WARP,
        }
        for axis, threads, blocks in zip("xyz", self.block_shape, grid, strict=True):
            values[f"ntid.{axis}"], values[f"nctaid.{axis}"] = [threads], [blocks]
        for name, slot in self.kernel.presets.items():
            if name in addresses:
                self.registers[slot] = addresses[name]
            else:
                self.registers[slot] = np.asarray(values[name]).astype(np.uint32)

    # Who runs

    def schedule(self) -> bool:
        """Choose the threads that are furthest behind, and how far they may go before others."""
        if self.pcs is not None and self.count:
            self.pc = int(self.pcs.min())
            behind = self.pcs == self.pc
            if behind.all():
                self.pcs = self.active = None
                self.until, self.running = _FAR, self.count
            else:
                self.active = np.flatnonzero(behind)
                self.until = int(self.pcs[~behind].min())
                self.running = self.active.size
        elif self.pcs is None:
            self.running = self.count
        self.drop_guard()
        return self.count > 0

    def park(self) -> None:
        """The active threads wait at pc, where others are."""
        if self.pcs is not None:
            self.pcs[self._positions(self.active)] = self.pc

    def apply_guard(self, instruction: Instruction) -> bool:
        """Select the active threads whose guard holds; False if there are none."""
        source = Source(instruction.guard, np.dtype(np.bool_), inverted=instruction.guard_inverted)
        (holds,) = self.read((source,))
        if holds.all():
            return True
        if not holds.any():
            return False
        self.selected = np.flatnonzero(holds) if self.active is None else self.active[holds]
        self.executing = self.selected.size
        return True

    def drop_guard(self) -> None:
        self.selected, self.executing = self.active, self.running

    def branch(self, target: int) -> bool:
        """Send the selected threads to `target`; True if they left the other active ones."""
        if self.executing == self.running:
            self.pc = target
            return False
        self._split()[self.selected] = target
        return True

    def exit(self) -> bool:
        if self.executing == self.count:
            self.count = 0
            return True
        self._split()
        keep = np.ones(self.count, np.bool_)
        keep[self._positions(self.selected)] = False
        self._keep(np.flatnonzero(keep))
        return True

    def _split(self) -> Array:
        """Make pcs hold the place of every thread."""
        if self.pcs is None:
            self.pcs = np.full(self.count, self.pc, np.int64)
        else:
            self.pcs[self.active] = self.pc
        return self.pcs

    def _keep(self, positions: Array) -> None:
        def part(value: Array | None) -> Array | None:
            return value if value is None or value.size == 1 else value[positions]

        if self.count > 1:
            self.registers = [part(value) for value in self.registers]
            self.undefined = [part(value) for value in self.undefined]
        for name in ("pcs", "block", "warp", "lane", "thread"):
            setattr(self, name, getattr(self, name)[positions])
        self.count = positions.size

    def _positions(self, lanes: Array | None) -> Array | slice:
        return slice(None) if lanes is None else lanes

    def of_selected(self, values: Array) -> Array:
        return values if self.selected is None else values[self.selected]

    def describe(self, lane: int) -> str:
        """The block and thread of a position among the selected ones."""
        position = lane if self.selected is None else int(self.selected[lane])
        bx, by, _ = self.block_shape
        warps = -(-self.block_size // WARP)
        linear = int(self.thread[position]) % (warps * WARP)
        tid = (linear % bx, linear // bx % by, linear // (bx * by))
        return f"block {self.block_indices[self.block[position]]}, thread {tid}"

    # Registers

    def read(self, sources: Iterable[Source]) -> list[Array]:
        """The operands of the selected threads, each a lane for each thread or shape (1,)."""
        values = []
        registers, undefined, selected = self.registers, self.undefined, self.selected
        for source in sources:
            if source.constant is not None:
                values.append(source.constant)
                continue
            slot = source.slot
            value = registers[slot]
            if value is None or undefined[slot] is not None:
                self._check_defined(slot)
            if selected is not None and value.size > 1:
                value = value[selected]
            if source.narrow is not None:
                value = value.astype(source.narrow)
            if value.dtype is not source.dtype:
                value = value.view(source.dtype)
            if source.inverted:
                value = ~value
            values.append(value)
        return values

    def _check_defined(self, slot: int) -> None:
        undefined, name = self.undefined[slot], self.kernel.register_names[slot]
        if undefined is None:
            raise PTXError(f"reads {name}, which is not initialised", 0)
        lanes = self.of_selected(undefined)
        if lanes.any():
            raise PTXError(f"reads {name}, which is not initialised", int(np.argmax(lanes)))

    def write(self, instruction: Instruction, result: Array | tuple[Array, ...]) -> None:
        results = result if type(result) is tuple else (result,)
        for destination, value in zip(instruction.destinations, results, strict=True):
            if destination is None:
                continue
            dtype = destination.dtype
            if value.dtype is not dtype:
                if value.dtype.itemsize == dtype.itemsize:
                    value = value.view(dtype)
                elif value.dtype.kind == "i":  # a wider register gets the sign
                    value = value.astype(f"i{dtype.itemsize}").view(dtype)
                else:
                    value = value.view(f"u{value.dtype.itemsize}").astype(dtype)
            if self.selected is None:
                self.registers[destination.slot] = value
                self.undefined[destination.slot] = None
            else:
                self._write_selected(destination.slot, value)

    def _write_selected(self, slot: int, value: Array) -> None:
        # Registers are never changed in place: mov makes two of them share an array.
        old, undefined = self.registers[slot], self.undefined[slot]
        if old is None:
            full, undefined = np.zeros(self.count, value.dtype), np.ones(self.count, np.bool_)
        else:
            full = np.repeat(old, self.count) if old.size == 1 else old.copy()
        full[self.selected] = value
        self.registers[slot] = full
        if undefined is not None:
            undefined = undefined.copy()
            undefined[self.selected] = False
            self.undefined[slot] = undefined if undefined.any() else None

    # Warps and blocks

    def _executing_masks(self) -> Array:
        """Of each selected thread, the lanes of its warp that are selected."""
        warps = self.of_selected(self.warp)
        lanes = np.left_shift(1, self.of_selected(self.lane))
        # Exact: sums below 2^32 in float64.
        return np.bincount(warps, weights=lanes).astype(np.uint32)[warps]

    def _check_mask(self, mask: Array) -> None:
        executing = self._executing_masks()
        wrong = executing != mask
        if wrong.any():
            lane = int(np.argmax(wrong))
            named = int(np.broadcast_to(mask, wrong.shape)[lane])
            raise PTXError(
                f"the mask {named:#010x} is not that of the active lanes, {executing[lane]:#010x}",
                lane,
            )

    def block_barrier(self, operands: list[int]) -> None:
        """bar.sync: all threads of a block must be here together, none may have exited."""
        if operands[0] > 15 or operands[1:] not in ([], [self.block_size]):
            raise PTXError(f"a barrier {operands} of a part of the block is not supported")
        blocks = self.block_indices.size
        here = np.bincount(self.of_selected(self.block), minlength=blocks)
        divergent = (here > 0) & (here < self.block_size)
        if divergent.any():
            first = int(np.argmax(divergent))
            lane = int(np.argmax(self.of_selected(self.block) == first))
            present = f"{here[first]} of the block's {self.block_size} threads"
            raise PTXError(f"divergent barrier: only {present} are here", lane)
        self.races.block_epoch[here > 0] += 1

    def warp_barrier(self, instruction: Instruction) -> None:
        self._check_mask(self.read(instruction.sources)[0])
        self.races.warp_epoch[np.unique(self.of_selected(self.warp))] += 1

    def shuffle(self, instruction: Instruction) -> None:
        value, b, c, mask = self.read(instruction.sources)
        self._check_mask(mask)
        lane = self.of_selected(self.lane)
        b, clamp = b.astype(np.int64) & 31, c.astype(np.int64) & 31
        segment = c.astype(np.int64) >> 8 & 31
        limit = (lane & segment) | (clamp & ~segment)
        mode = instruction.operation.mode
        if mode == "up":
            source = lane - b
            valid = source >= limit
        else:
            first = lane & segment
            source = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
            valid = source <= limit
        source = np.where(valid, source, lane)
        threads = self.of_selected(self.thread)
        index = np.full(int(threads.max()) // WARP * WARP + WARP, -1)
        index[threads] = np.arange(threads.size)
        index = index[threads - lane + source]
        if (index < 0).any():
            at = int(np.argmax(index < 0))
            raise PTXError(f"reads lane {source[at]}, which is not active", at)
        moved = np.broadcast_to(value, threads.shape)[index]
        self.write(instruction, (moved, valid)[: len(instruction.destinations)])

    def vote(self, instruction: Instruction) -> None:
        predicate, mask = self.read(instruction.sources)
        self._check_mask(mask)
        warps = self.of_selected(self.warp)
        bits = np.left_shift(1, self.of_selected(self.lane)) * predicate
        ballot = np.bincount(warps, weights=bits).astype(np.uint32)[warps]
        results = {
            "ballot": ballot,
            "any": ballot != 0,
            "all": ballot == mask,
            "uni": (ballot == 0) | (ballot == mask),
        }
        self.write(instruction, results[instruction.operation.mode])

    def active_mask(self, instruction: Instruction) -> None:
        self.write(instruction, self._executing_masks())
