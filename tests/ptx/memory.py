"""Global memory over NumPy arrays: bounds, alignment, write counts, and the traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array
from .errors import PTXError

# Each buffer has a slot of 2^40 addresses with its byte 0 in the middle, so that an address tells
# which buffer was meant even where it is out of bounds. Below are shared, local and param.
_SLOT_BITS = 40
_MIDDLE = 1 << (_SLOT_BITS - 1)


class Buffer:
    """Bytes [start, start + size) of a tensor whose byte 0 has the device address `address`."""

    def __init__(self, name: str, array: Array, address: int, start: int, writable: bool) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: the array must be contiguous")
        if writable and not array.flags.writeable:
            raise ValueError(f"{name}: the array is read-only")
        self.name, self.address, self.start, self.writable = name, address, start, writable
        self.data = array.reshape(-1).view(np.uint8)
        self.writes = np.zeros(self.data.size if writable else 0, np.uint16)
        self._views: dict[tuple[int, int, bool], Array] = {}

    def _rows(self, width: int, element: int, counts: bool = False) -> Array:
        """The bytes, or their write counts, as a row for each aligned access of `width` bytes."""
        key = (width, element, counts)
        if key not in self._views:
            source = self.writes if counts else self.data
            first = -(self.address + self.start) % width
            whole = max(0, source.size - first) // width * width
            rows = source[first : first + whole]
            rows = rows if counts else rows.view(f"V{element}" if element > 8 else f"u{element}")
            self._views[key] = rows.reshape(whole // width, -1)
        return self._views[key]

    def _row_numbers(self, addresses: Array, width: int) -> Array:
        base = self.address + self.start
        return (addresses - (base + -base % width)) // width

    def load(self, addresses: Array, width: int, element: int) -> Array:
        return self._rows(width, element)[self._row_numbers(addresses, width)]

    def store(self, addresses: Array, width: int, values: Array) -> None:
        """Write the rows `values`, of `width` bytes each; of two lanes at one place the last."""
        self._check_writable()
        numbers = self._row_numbers(addresses, width)
        self._rows(width, values.itemsize)[numbers] = values.view(
            f"V{values.itemsize}" if values.itemsize > 8 else f"u{values.itemsize}"
        )
        self._count(numbers, width)

    def atomic_add(self, addresses: Array, values: Array) -> Array:
        """Add the lanes in order; what each found there."""
        self._check_writable()
        numbers = self._row_numbers(addresses, values.itemsize)
        cells = self._rows(values.itemsize, values.itemsize)
        old = np.empty_like(values)
        for lane, number in enumerate(numbers):
            old[lane : lane + 1] = cells[number].view(values.dtype)
            cells[number] = (old[lane : lane + 1] + values[lane]).view(cells.dtype)
        self._count(numbers, values.itemsize)
        return old

    def _check_writable(self) -> None:
        if not self.writable:
            raise PTXError(f"writes to {self.name}, which is read-only", 0)

    def _count(self, numbers: Array, width: int) -> None:
        counts = self._rows(width, 1, counts=True)
        if (np.diff(numbers) > 0).all():
            counts[numbers] += 1
        else:  # a fancy += would count a repeated row once
            np.add.at(counts, numbers, 1)


@dataclass
class Stats:
    """What a launch did. A thread whose guard is false issues an instruction, no more."""

    instructions: int = 0
    steps: int = 0  # that threads took together, at most
    executed: list[int] = field(default_factory=list)
    read_bytes: Counter[str] = field(default_factory=Counter)
    written_bytes: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    widths: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)

    def record(self, name: str, kind: str, width: int, addresses: Array, warps: Array) -> None:
        """One instruction of the threads in `warps`; `addresses` is theirs, or one for all."""
        count = warps.size
        if kind != "st":
            self.read_bytes[name] += count * width
        if kind != "ld":
            self.written_bytes[name] += count * width
        self.widths.setdefault((name, kind), Counter())[width] += count
        sectors = addresses >> 5
        low = sectors.min()
        keys = warps * (sectors.max() - low + 1) + (sectors - low)
        steps = np.diff(keys)
        if not (steps >= 0).all():
            steps = np.diff(np.sort(keys))
        self.sectors[name] += int(np.count_nonzero(steps)) + 1


class Memory:
    """The buffers that kernels see."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._by_name: dict[str, Buffer] = {}

    def allocate(
        self, name: str, array: Array, *, writable: bool = False, misalign: int = 0, start: int = 0
    ) -> int:
        """Give `array` a device address, and return that of byte 0 of its tensor.

        The array itself holds bytes [start, start + nbytes); `misalign` is the address modulo 256.
        """
        if name in self._by_name:
            raise ValueError(f"{name} is allocated already")
        if not 0 <= misalign < 256 or not 0 <= start <= _MIDDLE // 2:
            raise ValueError(f"{name}: misalign={misalign}, start={start}")
        address = ((len(self.buffers) + 1) << _SLOT_BITS) + _MIDDLE + misalign
        buffer = Buffer(name, array, address, start, writable)
        self.buffers.append(buffer)
        self._by_name[name] = buffer
        return address

    def check_written_once(self, name: str, expected: range | None = None) -> None:
        """Every byte of the array (those in `expected`) has been written once, and no other."""
        writes = self._by_name[name].writes
        want = np.zeros_like(writes) if expected is not None else np.ones_like(writes)
        if expected is not None:
            want[expected.start : expected.stop : expected.step] = 1
        wrong = np.flatnonzero(writes != want)
        if wrong.size:
            first = wrong[0]
            raise PTXError(
                f"{name}: byte {first} was written {writes[first]} times instead of {want[first]} "
                f"({wrong.size} such bytes)"
            )

    def address_of(self, name: str) -> int | None:
        buffer = self._by_name.get(name)
        return buffer.address if buffer else None

    def locate(self, addresses: Array, width: int) -> Iterator[tuple[Buffer, Array | slice]]:
        """The buffers that hold these accesses, each with its part of the lanes."""
        misaligned = addresses & (width - 1) != 0
        if misaligned.any():
            lane = int(np.argmax(misaligned))
            raise PTXError(
                f"misaligned {width}-byte access: {self._describe(addresses[lane])}", lane
            )
        slots = addresses >> _SLOT_BITS
        if (slots == slots[0]).all():
            yield self._check(addresses, width, None), slice(None)
            return
        for slot in np.unique(slots):
            lanes = np.flatnonzero(slots == slot)
            yield self._check(addresses[lanes], width, lanes), lanes

    def _check(self, addresses: Array, width: int, lanes: Array | None) -> Buffer:
        slot = (int(addresses[0]) >> _SLOT_BITS) - 1
        low = high = 0
        if 0 <= slot < len(self.buffers):
            buffer = self.buffers[slot]
            low = buffer.address + buffer.start
            high = low + buffer.data.size - width
            if addresses.min() >= low and addresses.max() <= high:
                return buffer
        lane = int(np.argmax((addresses < low) | (addresses > high)))
        message = f"out of bounds: {width} bytes at {self._describe(addresses[lane])}"
        raise PTXError(message, int(lanes[lane]) if lanes is not None else lane)

    def _describe(self, address: int) -> str:
        slot = (int(address) >> _SLOT_BITS) - 1
        if not 0 <= slot < len(self.buffers):
            return f"address {int(address):#x}, which is in no buffer"
        buffer = self.buffers[slot]
        stop = buffer.start + buffer.data.size
        return f"byte {address - buffer.address} of {buffer.name} (bytes {buffer.start} to {stop})"
