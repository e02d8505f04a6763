"""The stand-in GPU of this process: its connection to the interpreter, and what tests ask of it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx import Kernel, Machine, PTXError, Stats
from torch import Tensor

from .images import ImageError, kernel_in, kernel_of
from .library import (
    Library,
    OnCapture,
    OnHostFunction,
    OnLaunch,
    OnResolve,
    OnTask,
)
from .memory import DeviceMemory, Stores, name_of


@dataclass(frozen=True)
class Launch:
    kernel: str
    device: int
    stream: int
    grid: int
    block: int


@dataclass(frozen=True)
class Run:
    """A launch as the interpreter ran it, and what it did."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: list[bytes]
    blocks: list[int] | None  # of its grid, those that ran; None: all
    stats: Stats  # by the names that StandIn.name_of gives
    stores: list[Stores]


@dataclass
class Events:
    """What a block of code made the stand-in do."""

    launches: list[Launch] = field(default_factory=list)
    synchronisations: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    allocations: list[int] = field(default_factory=list)

    def add(self, log: str) -> None:
        for line in log.splitlines():
            kind, *rest = line.split("\t")
            if kind == "launch":
                name, *numbers = rest
                self.launches.append(Launch(name, *map(int, numbers)))
            elif kind == "synchronisation":
                self.synchronisations.append(rest[0])
            elif kind in ("copy", "fill"):
                self.copies.append(rest[0])
            elif kind == "allocation":
                self.allocations.append(int(rest[0]))


# A grid beyond this would take an hour: of it some blocks run, and whoever reads what the
# others would have written is told that nobody has.
MOST_BLOCKS = 1 << 19


def some_blocks(grid: int) -> list[int]:
    """Those around the ends, the middle, and the powers of two, where indices overflow."""
    middles = [0, grid // 2, grid - 1, *(1 << i for i in range(grid.bit_length()))]
    near = {m + i for m in middles for i in range(-16, 17)}
    return sorted(b for b in near if 0 <= b < grid)


class StandIn:
    """Kernels, work of the host and its log. One for a process."""

    def __init__(self, caching: bool) -> None:
        self.library: Any = Library()
        self._options()
        self.caching = caching
        self._kernels: list[Kernel | None] = []
        self._tasks: dict[int, Callable[[], None]] = {}
        self._held: dict[int, Tensor] = {}
        self._ids = itertools.count(1)
        self.memories = [DeviceMemory(self.library, device) for device in range(2)]
        # kept alive for the library
        self._callbacks = (
            OnResolve(self._resolve),
            OnLaunch(self._launch),
            OnTask(self._run_task),
            OnCapture(self._capture),
            OnHostFunction(self._let_go),
        )
        self.library.connect(*self._callbacks[:4])
        self._runtime = self.library.runtime()
        from .host_ops import HostOps

        self._host_ops = HostOps(self)

    def _options(self) -> None:
        """What a test may set, until the next reset."""
        # The part of their documented error that approximate instructions make
        self.approx_error: float | np.random.Generator = 0.0
        # Of a grid of so many blocks, those that run; None: all, as far as that ends today
        self.blocks: Callable[[int], Iterable[int]] | None = None
        # By the name of a kernel, PTX to run in place of its module's own
        self.ptx: Mapping[str, str] = {}
        # The newest launch that ended well, and a list that takes all of them
        self.last: Run | None = None
        self.runs: list[Run] | None = None

    # From the library

    def _resolve(
        self, image: int, file: bytes, name: bytes, capability: int, sizes: Any, count: Any
    ) -> int:
        if b"spin_kernel" in name:  # torch.cuda._sleep
            sizes[0], count[0] = 8, 1
            self._kernels.append(None)
            return len(self._kernels) - 1
        try:
            if b"/torch/lib/" in file:
                text = f"tests/gpu/host_ops.py has no operation for torch's {name.decode()}"
                raise ImageError(801, text)
            kernel = kernel_of(image, name.decode(), capability)
        except ImageError as error:
            self.library.detail(str(error).encode())
            return -error.status
        except Exception as error:
            self.library.detail(f"{type(error).__name__}: {error}".encode())
            return -801
        for i, parameter in enumerate(kernel.parameters):
            sizes[i] = parameter.size
        count[0] = len(kernel.parameters)
        self._kernels.append(kernel)
        return len(self._kernels) - 1

    def _launch(
        self, number: int, grid: Any, block: Any, shared_bytes: int, arguments: Any, device: int
    ) -> int:
        kernel = self._kernels[number]
        if kernel is None:
            return 0
        if kernel.name in self.ptx:
            kernel = kernel_in(self.ptx[kernel.name], kernel.name)
        values = [
            ctypes.string_at(arguments[i], parameter.size)
            for i, parameter in enumerate(kernel.parameters)
        ]
        sizes = (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])
        blocks: list[int] | None = None
        if self.blocks is not None:
            blocks = list(self.blocks(grid[0]))
        elif grid[0] > MOST_BLOCKS:
            blocks = some_blocks(grid[0])
        memory = self.memories[device]
        # Triton packs half types into words of which it leaves a half undefined.
        undefined = 0 if kernel.required_block is not None else None
        try:
            machine = Machine(kernel, memory, approx_error=self.approx_error, undefined=undefined)
            stats = machine.launch(*sizes, values, blocks=blocks, shared_bytes=shared_bytes)
        except PTXError as error:
            self.library.detail(str(error).encode())
            return 700
        except Exception as error:
            self.library.detail(f"{type(error).__name__}: {error}".encode())
            return 719
        finally:
            stores = memory.end_launch()
        self.last = Run(kernel, *sizes, values, blocks, stats, stores)
        if self.runs is not None:
            self.runs.append(self.last)
        return 0

    def _run_task(self, number: int) -> int:
        try:
            with torch.no_grad():
                self._tasks[number]()
        except Exception as error:
            self.library.detail(f"{type(error).__name__}: {error}".encode())
            return 700
        return 0

    def _capture(self, begins: int) -> None:
        """A capture needs torch's caching allocator: CUDA's own is refused within it."""
        if not self.caching:
            torch._C._cuda_cudaCachingAllocator_enable(bool(begins))

    def _let_go(self, number: int) -> None:
        self._held.pop(number, None)

    # For host_ops.py

    def enqueue(self, name: str, device: int, work: Callable[[], None]) -> None:
        """Work of the host on the current stream of the device, when its turn comes."""
        while forgotten := self.library.forgotten():
            self._tasks.pop(forgotten, None)
        number = next(self._ids)
        self._tasks[number] = work
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            self._check(self.library.enqueue(stream, name.encode(), number))

    def memcpy(self, to: Tensor, source: Tensor, *, wait: bool) -> None:
        """The bytes of a tensor, by the stand-in's runtime."""
        device = (source if source.is_cuda else to).device
        stream = torch.cuda.current_stream(device).cuda_stream
        size = to.numel() * to.element_size()
        with torch.cuda.device(device):
            status = self._runtime.cudaMemcpyAsync(
                ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source.data_ptr()),
                ctypes.c_size_t(size), 4, ctypes.c_void_p(stream),
            )  # fmt: skip
            if status == 0 and not wait and not source.is_cuda:
                # Pinned memory is read when its turn comes, and nobody's before.
                number = next(self._ids)
                self._held[number] = source
                self._runtime.cudaLaunchHostFunc(
                    ctypes.c_void_p(stream), self._callbacks[-1], ctypes.c_void_p(number)
                )
            if status == 0 and wait:
                status = self._runtime.cudaStreamSynchronize(ctypes.c_void_p(stream))
            self._check(status)

    def _check(self, status: int) -> None:
        if status:
            text = self.library.message(status).decode()
            kind = torch.OutOfMemoryError if status == 2 else torch.AcceleratorError
            raise kind(f"CUDA error: {text}")

    # For tests

    @contextmanager
    def events(self) -> Iterator[Events]:
        """What the code of a with block makes the stand-in do, known after it."""
        self.library.log(1)
        events = Events()
        try:
            yield events
        finally:
            events.add(self.library.log(0).decode())

    def fail(self, function: str, status: int, *, after: int = 0, lasting: bool = False) -> None:
        """Let a call of a function of CUDA fail, after so many that do not."""
        self.library.fault(function.encode(), after, status, int(lasting))

    def set_capability(self, device: int, capability: int) -> None:
        """The compute capability, 90 for 9.0, until the next reset."""
        self.library.capability(device, capability)

    def set_memory(self, size: int) -> None:
        """The bytes that each device has, until the next reset."""
        self.library.memory(size)

    def shuffle(self, seed: int) -> None:
        """The order of the streams when the whole device is waited for; 0: the newest first."""
        self.library.order(seed)

    def pause(self, microseconds: int) -> None:
        """How long torch waits where it asks whether it captures: within its generators' locks."""
        self.library.pause(microseconds)

    def bytes_in_use(self, device: int = 0) -> int:
        return int(self.library.bytes_in_use(device))

    def bytes_of(self, tensor: Tensor) -> np.ndarray:
        """The memory of a contiguous tensor, as it is now."""
        first = tensor.data_ptr() - self.library.base
        part: np.ndarray = self.library.bytes[first : first + tensor.nbytes]
        return part

    def written(self, tensor: Tensor) -> np.ndarray:
        """Which bytes of a contiguous tensor have been written, as ones."""
        first = tensor.data_ptr() - self.library.base
        part: np.ndarray = self.library.written_bytes[first : first + tensor.nbytes]
        return part

    def name_of(self, tensor: Tensor) -> str:
        """The allocation of a tensor, as Stats names it."""
        return name_of(tensor.untyped_storage().data_ptr())

    def reset(self) -> None:
        """As a new process would find it, but for what torch holds."""
        self.library.reset()
        self._options()


_stand_in: StandIn | None = None


def attach(caching: bool = False) -> StandIn:
    """The stand-in of this process, which run.py has started.

    Without caching every tensor is an allocation of its own, so that its bounds are known.
    """
    global _stand_in
    if _stand_in is None:
        _stand_in = StandIn(caching)
        # torch.cuda's own function waits until CUDA is initialised.
        torch._C._cuda_cudaCachingAllocator_enable(caching)
    return _stand_in
