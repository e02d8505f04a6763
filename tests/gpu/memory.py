"""The stand-in's device memory, as the interpreter of PTX sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from ptx.arithmetic import Array
from ptx.errors import PTXError
from ptx.memory import Buffer, Memory

from .library import Library


class _Allocation(Buffer):
    """One allocation; which of its bytes were written is known to the stand-in."""

    def __init__(self, name: str, data: Array, address: int, written: Array) -> None:
        super().__init__(name, data, address, 0, False)
        self.writable, self.writes = True, written

    def load(self, addresses: Array, width: int, element: int) -> Array:
        written = self._rows(width, 1, counts=True)[self._row_numbers(addresses, width)]
        if not written.all():
            lane, byte = np.argwhere(written == 0)[0]
            at = int(addresses[lane]) + int(byte) - self.address
            raise PTXError(f"reads byte {at} of {self.name}, which nobody has written", int(lane))
        return super().load(addresses, width, element)

    def _count(self, numbers: Array, width: int) -> None:
        self._rows(width, 1, counts=True)[numbers] = 1


class DeviceMemory(Memory):
    """Real addresses: an access has to lie in an allocation of the device that is in use."""

    def __init__(self, library: Library, device: int) -> None:
        super().__init__()
        self._library, self._device = library, device
        self._seen: dict[int, _Allocation] = {}

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
                raise PTXError(f"out of bounds of {buffer.name}", 0)
            indices = np.arange(addresses.size) if left is None else left
            yield buffer, indices[inside]
            left = indices[~inside]

    def _allocation(self, address: int, width: int, lane: int) -> _Allocation:
        trouble = self._library.trouble(address, width, self._device)
        if trouble:
            raise PTXError(trouble.decode(), lane)
        base, size = ctypes.c_size_t(), ctypes.c_size_t()
        self._library.find(address, ctypes.byref(base), ctypes.byref(size))
        found = self._seen.get(base.value)
        if found is None:
            first = base.value - self._library.base
            part = slice(first, first + size.value)
            name = f"an allocation of {size.value} bytes"
            found = self._seen[base.value] = _Allocation(
                name, self._library.bytes[part], base.value, self._library.written_bytes[part]
            )
        return found
