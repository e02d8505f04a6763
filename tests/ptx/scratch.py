"""Shared and local memory: one region of bytes for each block, or for each thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import Array
from .errors import PTXError

# Where generic addresses see these spaces; global memory is above them all.
WINDOWS = {"shared": 1 << 32, "local": 2 << 32, "param": 3 << 32}
_NOBODY, _MANY = -1, -2


class Scratch:
    """`count` regions of `size` bytes each. Bytes that nobody wrote cannot be read."""

    def __init__(self, space: str, count: int, size: int) -> None:
        self.space, self.size = space, size
        self.data = np.zeros(count * size, np.uint8)
        self.written = np.zeros(count * size, np.bool_)

    def bytes_of(self, regions: Array, addresses: Array, width: int) -> Array:
        """The indices of the bytes that each lane accesses, a row for each."""
        bad = (addresses < 0) | (addresses > self.size - width) | (addresses & (width - 1) != 0)
        if bad.any():
            lane = int(np.argmax(bad))
            address = int(addresses[lane])
            what = "misaligned" if address % width else "out of bounds"
            raise PTXError(
                f"{what}: {width} bytes at {address} of {self.size} bytes of {self.space} memory",
                lane,
            )
        return (regions * self.size + addresses)[:, None] + np.arange(width)

    def load(self, rows: Array, element: np.dtype[Any]) -> Array:
        unwritten = ~self.written[rows].all(axis=1)
        if unwritten.any():
            raise PTXError(
                f"reads {self.space} memory that nobody wrote", int(np.argmax(unwritten))
            )
        return self.data[rows].view(element)

    def store(self, rows: Array, values: Array) -> None:
        self.data[rows] = values.view(np.uint8)
        self.written[rows] = True


class RaceDetector:
    """Tells when two threads access a byte of shared memory, one of them writing, unordered.

    Two accesses are ordered by a bar.sync of their block between them (the block's epoch differs)
    or, within a warp, by a bar.warp.sync (the warp's epoch differs). Warp epochs only count within
    a block's epoch, so that one stamp, epoch of the block and of the warp, tells both.
    """

    def __init__(self, size: int, blocks: int, warps: int) -> None:
        self.block_epoch = np.zeros(blocks, np.int64)
        self.warp_epoch = np.zeros(warps, np.int64)
        # Thread, block's epoch and warp's epoch of each byte's last accesses.
        self._last = {kind: np.full((3, size), _NOBODY, np.int64) for kind in ("ld", "st")}

    def check(
        self, rows: Array, threads: Array, blocks: Array, values: Array | None, warp_size: int
    ) -> None:
        """A load of the bytes in `rows`, a row for each thread, or a store of `values` there."""
        flat, width = rows.ravel(), rows.shape[1]
        thread = np.repeat(threads, width)
        epoch = np.repeat(self.block_epoch[blocks], width)
        warp = thread // warp_size
        warp_epoch = self.warp_epoch[warp]
        for other in ("st",) if values is None else ("st", "ld"):
            who, when, when_in_warp = self._last[other][:, flat]
            same_warp = (who >= 0) & (who // warp_size == warp)
            ordered = (when != epoch) | (who == thread) | (same_warp & (when_in_warp < warp_epoch))
            if not ordered.all():
                at = int(np.argmin(ordered))
                by = f"thread {who[at] % warp_size} of a warp" if who[at] >= 0 else "some threads"
                raise PTXError(
                    f"race: shared memory {'written' if other == 'st' else 'read'} by {by} is "
                    f"{'read' if values is None else 'written'} without a barrier between",
                    at // width,
                )
        last = self._last["ld" if values is None else "st"]
        before, before_epoch = last[0, flat], last[1, flat]
        last[0, flat], last[1, flat], last[2, flat] = thread, epoch, warp_epoch
        winner = last[0, flat]
        if values is None:
            # Several readers: whoever writes the byte before a barrier races with one of them.
            several = (before_epoch == epoch) & (before != thread) & (before != _NOBODY)
            last[0, flat[several | (winner != thread)]] = _MANY
            return
        # Lanes of a warp may store one value together, as Triton's reductions do.
        stored = np.zeros(last.shape[1], np.uint8)
        stored[flat] = values.ravel()
        clash = (winner // warp_size != warp) | (stored[flat] != values.ravel())
        if clash.any():
            lane = int(np.argmax(clash)) // width
            raise PTXError("race: two threads write one byte of shared memory", lane)
