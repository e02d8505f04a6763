"""Run a function in some processes that make a gloo group, and collect what each returns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from helpers import patience

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


def _rank(rank: int, count: int, folder: str, run: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    try:
        torch.save(run(rank), f"{folder}/{rank}.pt")
        # None leaves while another still talks to it.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    # At once: once in some twenty runs a thread of torch's was still there when the interpreter
    # ended, and the process with it ("terminate called without an active exception").
    os._exit(0)


def run_ranks(count: int, folder: Path, run: Callable[[int], Any], seconds: int = 120) -> list[Any]:
    """What run(rank) returned on each rank; an error of one is an error here."""
    context = torch.multiprocessing.spawn(
        _rank, (count, str(folder), run), nprocs=count, join=False
    )
    end = time.monotonic() + patience(seconds)
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
