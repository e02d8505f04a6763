"""The one timer: rivals take turns, and what is compared is what they took in the same round.

Other work shares most machines and their clocks drift, so that a time alone says little.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

Call = Callable[[], object]
#: Where a GPU finds the operands: in memory, or in its L2 cache as far as they fit
Cache = Literal["cold", "warm"]

#: A block of calls takes at least this long, far above the resolution of the clock.
BLOCK = 2e-4
#: Some times the L2 cache of any GPU
FLUSHED_BYTES = 2**28
#: For so many cycles a GPU waits, until the host has queued all of what is timed.
QUEUEING_CYCLES = 500_000


class Turns:
    """Seconds a call, for each of several calls that take turns.

    Args:
        calls: the rivals by name. Each is called twice first, to warm it up.
        device: where they work.
        cache: None times the host, which waits for the device at the end of a block of calls.
            Otherwise a GPU's events time one call.
    """

    def __init__(
        self, calls: Mapping[str, Call], device: torch.device, cache: Cache | None = None
    ) -> None:
        self.calls, self.device, self.cache = dict(calls), device, cache
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.block = 1
        for call in self.calls.values():
            call()
        #: What each took when it was called for the second time
        self.warm = {name: self._by_the_host(call) for name, call in self.calls.items()}
        if cache is None:
            self.block = max(1, int(BLOCK / min(self.warm.values())))
        else:
            self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def take(self, name: str) -> float:
        """Time one turn of this rival."""
        call = self.calls[name]
        seconds = self._by_the_host(call) if self.cache is None else self._by_events(call)
        self.seconds[name].append(seconds)
        return seconds

    def rounds(self, seconds: float) -> int:
        """How many take so long: at least 5, or 3 where these would take four times as long."""
        one = sum(self.warm.values()) * self.block
        return max(5 if 5 * one < 4 * seconds else 3, int(seconds / one))

    def run(self, seconds: float) -> None:
        """Rounds for so many seconds."""
        with quiet():
            for _ in range(self.rounds(seconds)):
                for name in self.calls:
                    self.take(name)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _by_the_host(self, call: Call) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(self.block):
            call()
        self._wait()
        return (time.perf_counter() - start) / self.block

    def _by_events(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.cache == "cold":
                self.flushed.zero_()
            else:
                call()
            torch.cuda._sleep(QUEUEING_CYCLES)
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many threads of the CPU meanwhile; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
