"""The stand-in's device memory, as the interpreter of PTX sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx.arithmetic import Array
from ptx.errors import PTXError
from ptx.memory import Buffer, Memory

from .library import Library

# What the stand-in knows of a byte: 0 if nobody has written it
_WRITTEN, _WRITTEN_NOW = 1, 2  # before this launch, by this launch


class Allocation(Buffer):
    """One allocation; which of its bytes were written is known to the stand-in."""

    def __init__(self, data: Array, address: int, written: Array, stores: list[Stores]) -> None:
        super().__init__(name_of(address), data, address, 0, False)
        self.writable, self.writes, self._stores = True, written, stores

    @property
    def about(self) -> str:
        return f"an allocation of {self.data.size} bytes"

    def load(self, addresses: Array, width: int, element: int) -> Array:
        written = self._rows(width, 1, counts=True)[self._row_numbers(addresses, width)]
        if not written.all():
            lane, byte = np.argwhere(written == 0)[0]
            at = int(addresses[lane]) + int(byte) - self.address
            raise PTXError(f"reads byte {at} of {self.about}, which nobody has written", int(lane))
        return super().load(addresses, width, element)

    def store(self, addresses: Array, width: int, values: Array) -> None:
        numbers = self._row_numbers(addresses, width)
        again = (self._rows(width, 1, counts=True)[numbers] == _WRITTEN_NOW).any(1)
        if not (np.diff(numbers) > 0).all():
            first = np.unique(numbers, return_index=True)[1]
            again[np.setdiff1d(np.arange(numbers.size), first)] = True
        if again.any():
            lane = int(np.argmax(again))
            at = int(addresses[lane]) - self.address
            raise PTXError(f"writes byte {at} of {self.about} a second time", lane)
        super().store(addresses, width, values)

    def _count(self, numbers: Array, width: int) -> None:
        self._rows(width, 1, counts=True)[numbers] = _WRITTEN_NOW
        self._stores.append(Stores(self, numbers, width))

    def rows(self, stores: Stores) -> tuple[Array, Array]:
        """The bytes of these stores as rows to look at or to change, and which are written."""
        return self._rows(stores.width, 1), self._rows(stores.width, 1, counts=True)


@dataclass(frozen=True)
class Stores:
    """Where one instruction wrote: accesses of a width, by their numbers in an allocation."""

    allocation: Allocation
    numbers: Array
    width: int

    def settle(self) -> None:
        """They are of an earlier launch from here on."""
        self.allocation.rows(self)[1][self.numbers] = _WRITTEN

    def undo(self, poison: int) -> None:
        """As if nobody had written there."""
        data, written = self.allocation.rows(self)
        data[self.numbers], written[self.numbers] = poison, 0


def name_of(address: int) -> str:
    """An allocation's name in the statistics of a launch."""
    return f"the allocation at {address:#x}"


class DeviceMemory(Memory):
    """Real addresses: an access has to lie in an allocation of the device that is in use.

    No byte is written twice by one launch, but for atomics: on a GPU either might be the last.
    """

    def __init__(self, library: Library, device: int) -> None:
        super().__init__()
        self._library, self._device = library, device
        self._seen: dict[int, Allocation] = {}
        self._stores: list[Stores] = []

    def end_launch(self) -> list[Stores]:
        """What the launch wrote. The next one may write there again."""
        stores = list(self._stores)
        self._stores.clear()  # which the allocations hold
        for store in stores:
            store.settle()
        return stores

    def locate(self, addresses: Array, width: int) -> Iterator[tuple[Buffer, Any]]:
        base, size = self._library.base, self._library.size
        if not base <= int(addresses[0]) < base + size:
            yield from super().locate(addresses, width)  # a variable of the kernel's module
            return
        if (addresses & (width - 1)).any():
            lane = int(np.argmax(addresses & (width - 1) != 0))
            raise PTXError(f"misaligned {width}-byte access", lane)
        left: Array | None = None
        while True:
            lanes = addresses if left is None else addresses[left]
            buffer = self._allocation(int(lanes[0]), width, 0 if left is None else int(left[0]))
            inside = (lanes >= buffer.address) & (
                lanes <= buffer.address + buffer.data.size - width
            )
            if inside.all():
                yield buffer, slice(None) if left is None else left
                return
            if not inside[0]:  # the lookup has said that it begins there, so it ends beyond
                raise PTXError(f"out of bounds of {buffer.about}", 0)
            indices = np.arange(addresses.size) if left is None else left
            yield buffer, indices[inside]
            left = indices[~inside]

    def _allocation(self, address: int, width: int, lane: int) -> Allocation:
        trouble = self._library.trouble(address, width, self._device)
        if trouble:
            raise PTXError(trouble.decode(), lane)
        base, size = ctypes.c_size_t(), ctypes.c_size_t()
        self._library.find(address, ctypes.byref(base), ctypes.byref(size))
        found = self._seen.get(base.value)
        if found is None:
            first = base.value - self._library.base
            part = slice(first, first + size.value)
            found = self._seen[base.value] = Allocation(
                self._library.bytes[part],
                base.value,
                self._library.written_bytes[part],
                self._stores,
            )
        return found
