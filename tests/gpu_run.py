"""The CUDA kernels on the stand-in GPU: as any architecture's PTX, and a few blocks of large calls.

A tensor of which nobody touches more than a part costs no more than that, so that calls on tensors
of 2^40 bytes are made as a program makes them: the blocks that run, and the elements that those
read, are chosen.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.stand_in import Run, StandIn
from helpers import OPS
from machine_code import ROOT, SOURCE, VECTORS_PER_THREAD, Name, nvcc
from torch import Tensor

BLOCK = 128
# csrc/cuda/launch.cpp: whole tensors of fewer full blocks have none, and one vector a thread
FEW_BLOCKS = 4096
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _compiled(arch: int) -> str:
    """The PTX of all kernels, which is kept for the next process."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu"))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(version + b"".join(path.read_bytes() for path in sources))
    name = f"reparam_fused-{os.getuid()}-{arch}-{state.hexdigest()[:16]}.ptx"
    kept = Path(tempfile.gettempdir()) / name
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as made:
            nvcc("-ptx", f"-arch=compute_{arch}", SOURCE, "-o", f"{made}/kernels.ptx")
            shutil.move(f"{made}/kernels.ptx", kept)
    return kept.read_text()


@functools.cache
def ptx(arch: int) -> Mapping[str, str]:
    """Each kernel's PTX, as a module of its own."""
    text = re.sub(r"^\s*//.*\n", "", _compiled(arch), flags=re.M)
    header, *kernels = re.split(r"^(?=\.visible \.entry)", text, flags=re.M)
    return {re.match(r"\.visible \.entry (\w+)\(", k)[1]: header + k for k in kernels}  # type: ignore[index]


class WholeGrid:
    """How csrc/cuda/launch.cpp cuts a contiguous tensor into blocks."""

    def __init__(self, numel: int, itemsize: int) -> None:
        self._numel, self._per_vector = numel, 16 // itemsize
        self._per_counter = 2 if itemsize == 8 else 4
        self._vectors, left = divmod(numel, self._per_vector)
        full = self._vectors // (VECTORS_PER_THREAD * BLOCK)
        self.full_blocks = full if full >= FEW_BLOCKS else 0
        rest = self._vectors - self.full_blocks * VECTORS_PER_THREAD * BLOCK
        rest += -(-left // self._per_counter)
        self.blocks = self.full_blocks + -(-rest // BLOCK)

    def elements(self, blocks: range) -> range:
        """What these blocks compute."""
        return range(self._first(blocks.start), self._first(blocks.stop))

    def _first(self, block: int) -> int:
        full = min(block, self.full_blocks)
        thread = (full * VECTORS_PER_THREAD + block - full) * BLOCK
        beyond = max(thread - self._vectors, 0)  # counters of the vector that is not whole
        element = (thread - beyond) * self._per_vector + beyond * self._per_counter
        return min(element, self._numel)


@dataclass
class Window:
    """Some blocks of a launch, and the elements that they compute, in the order of logic."""

    blocks: range
    elements: range
    launch: int = 0  # of those of a call


@dataclass
class Result:
    out: Tensor
    run: Run

    @property
    def name(self) -> Name:
        return Name.parse(self.run.kernel.name)


class Gpu:
    """Calls of the ops on the stand-in."""

    def __init__(self, stand_in: StandIn, arch: int) -> None:
        self.stand_in, self.arch = stand_in, arch
        stand_in.ptx = ptx(arch)
        stand_in.set_memory(2**43)

    def call(self, function: Callable[[], Any]) -> Run:
        """The launch of a call that is one, once it has run."""
        (run,) = self.calls(function)
        return run

    def calls(self, function: Callable[[], Any]) -> list[Run]:
        torch.cuda.synchronize()
        self.stand_in.runs = runs = []
        with self.stand_in.events() as events:
            function()
        torch.cuda.synchronize()
        self.stand_in.runs = None
        assert [launch.kernel for launch in events.launches] == [r.kernel.name for r in runs]
        assert all(run.kernel.name in ptx(self.arch) for run in runs)
        return runs

    def run(self, op: str, x: Tensor, scale: Tensor | None, key: Tensor, *options: Any) -> Result:
        """An op of tensors of the host, which are moved as the views that they are."""
        moved = self.moved([x, scale, key])
        result: list[Tensor] = []
        run = self.call(lambda: result.append(OPS[op](*moved, *options)))
        return Result(result[0].cpu(), run)  # where every byte has to be written

    def moved(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """On the device, and in storages that they share as they do here."""
        storages: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            at = storage.data_ptr()
            if at not in storages:
                flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
                storages[at] = flat.cuda()
            return storages[at].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        return [None if t is None else move(t) for t in tensors]

    # Large tensors

    def places(self, tensor: Tensor, elements: np.ndarray) -> np.ndarray:
        """Where elements of a tensor lie, as numbers of elements in the stand-in's memory."""
        first, rest = divmod(tensor.data_ptr() - self.stand_in.library.base, tensor.itemsize)
        assert rest == 0
        places = np.full(elements.size, first)
        left = elements
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            left, along = left // size, left % size
            places += along * stride
        return places

    def _memory(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        library, width = self.stand_in.library, tensor.itemsize
        return library.bytes.view(f"u{width}"), library.written_bytes.reshape(-1, width)

    def fill(self, tensor: Tensor, elements: np.ndarray, values: Tensor) -> None:
        """Give these elements their values; the others stay as nobody has written them."""
        data, written = self._memory(tensor)
        places = self.places(tensor, elements)
        data[places] = values.view(_INTEGERS[tensor.itemsize]).numpy().view(data.dtype)
        written[places] = 1

    def read(self, tensor: Tensor, elements: np.ndarray) -> Tensor:
        data, written = self._memory(tensor)
        places = self.places(tensor, elements)
        assert written[places].all(), "elements that nobody has written"
        bits = data[places].view(f"i{tensor.itemsize}")
        return torch.from_numpy(bits).view(tensor.dtype)

    def windows(
        self,
        op: str,
        x: Tensor,
        scale: Tensor,
        windows: Sequence[Window],
        values: tuple[Tensor, Tensor],
        *,
        key: Tensor,
        noise_at: Callable[[int], tuple[Tensor, int]] | None = None,
        form: str = "log_var",
        bounds: Sequence[float] | None = None,
        place: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
    ) -> tuple[list[Run], Tensor, Tensor]:
        """Blocks of a call on large tensors of the device that nobody has written.

        The operands get `values`, over and over, where the windows are. The launches, what these
        blocks write, and what the CPU makes of the same values, with the key and the index of
        the noise of an element as `noise_at` has them: of one key, as it is numbered.
        """
        parts = [np.arange(w.elements.start, w.elements.stop) for w in windows]
        elements = np.concatenate(parts)
        cycle = torch.from_numpy(elements % values[0].numel())
        given = [v[cycle] for v in values]
        unread = (op, form, bounds) == ("sample_backward", "std", None)
        if op != "noise":
            self.fill(x, elements, given[0])
            self.fill(scale, elements, given[1])
        launches = itertools.count()

        def some(grid: int) -> list[int]:
            launch = next(launches)
            return [b for w in windows if w.launch == launch for b in w.blocks]

        self.stand_in.blocks = some
        on_device = key.cuda()
        result: list[Tensor] = []
        scale_in = None if unread else scale
        runs = self.calls(
            lambda: result.append(OPS[op](x, scale_in, on_device, form, *place, bounds))
        )
        self.stand_in.blocks = None
        # all of these, and no other
        written = sum(s.numbers.size * s.width for run in runs for s in run.stores)
        assert written == elements.size * x.itemsize
        expected = []
        at = 0
        for part in parts:
            a, b = (g[at : at + part.size] for g in given)
            at += part.size
            there, index = noise_at(int(part[0])) if noise_at else (key, int(part[0]))
            block = ((index + part.size,), (index,))
            expected.append(OPS[op](a, None if unread else b, there, form, *block, bounds))
        return runs, self.read(result[0], elements), torch.cat(expected)
