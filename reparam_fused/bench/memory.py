"""The most that a call holds at one time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def _wait_for(allocated: int, device: torch.device) -> None:
    """The thread of a backward lets go of its tensors some time after it has given its results."""
    last = time.monotonic() + 10
    while torch.cuda.memory_allocated(device) != allocated:
        if time.monotonic() > last:
            raise RuntimeError("memory that a call took was not freed")
        time.sleep(0.01)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler writes of itself, past Python, to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that was allocated at one time, beyond what there was before.

    On the CPU by torch's profiler, on a GPU by the caching allocator. The call is made twice: what
    it keeps from its first time does not count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        call()
        _wait_for(before, device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait_for(before, device)
        return torch.cuda.max_memory_allocated(device) - before
    call()
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        call()
    allocated = peak = 0
    for event in result.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
