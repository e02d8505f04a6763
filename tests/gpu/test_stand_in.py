"""The stand-in GPU is stricter than a real one: what would be undefined there fails here."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import images
from .stand_in import StandIn, some_blocks

# Each thread loads a float of x and stores it, doubled, in y.
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 x, .param .u64 y)
{
    .reg .b64 %rd<6>;
    .reg .b32 %r<5>;
    .reg .f32 %f<3>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    mul.wide.s32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f1, [%rd4];
    add.f32 %f2, %f1, %f1;
    st.global.f32 [%rd5], %f2;
    ret;
}
"""
Twice = Callable[..., None]


def _call(function: str, *arguments: Any) -> int:
    status: int = getattr(ctypes.CDLL("libcuda.so.1"), function)(*arguments)
    return status


class _Twice:
    """y = 2 x, launched by the driver: as the program says, whatever that may be."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # a context
        self._image = ctypes.create_string_buffer(PTX.strip().encode())
        module = ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        assert _call("cuModuleLoadData", ctypes.byref(module), self._image) == 0
        name = b"twice"
        assert _call("cuModuleGetFunction", ctypes.byref(self.function), module, name) == 0

    def status(self, x: int, y: int, threads: int, stream: int = 0) -> int:
        values = [ctypes.c_uint64(x), ctypes.c_uint64(y)]
        pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(v) for v in values))
        return _call(
            "cuLaunchKernel", self.function, 1, 1, 1, threads, 1, 1, 0,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip

    def __call__(self, x: Tensor, y: Tensor, threads: int | None = None) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        assert self.status(x.data_ptr(), y.data_ptr(), threads or x.numel(), stream) == 0


@pytest.fixture
def twice(stand_in: StandIn) -> _Twice:
    return _Twice()


def fails_with(stand_in: StandIn, words: str) -> None:
    with pytest.raises(torch.AcceleratorError, match=words):
        torch.cuda.synchronize()
    # and it stays so, as after a kernel's fault on a real GPU
    with pytest.raises(torch.AcceleratorError, match=words):
        torch.zeros(1, device="cuda")
    stand_in.reset()
    assert torch.zeros(1, device="cuda").item() == 0


def test_a_kernel_runs(twice: _Twice) -> None:
    x = torch.arange(8.0).cuda()
    y = torch.empty_like(x)
    twice(x, y)
    assert y.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("which", ["x", "y"])
def test_out_of_bounds(stand_in: StandIn, twice: _Twice, which: str) -> None:
    sizes = {"x": 9, "y": 9} | {which: 8}
    x, y = (torch.zeros(sizes[name], device="cuda") for name in "xy")
    twice(x, y, threads=9)
    fails_with(stand_in, r"kernel twice, enqueued as number \d+ .* out of bounds.* 32 bytes")


def test_bounds_are_those_of_a_tensor_not_of_a_page(stand_in: StandIn, twice: _Twice) -> None:
    x = torch.zeros(8, device="cuda")
    twice(x[1:], torch.zeros(8, device="cuda"), threads=8)
    fails_with(stand_in, "out of bounds")


def test_use_after_free(stand_in: StandIn, twice: _Twice) -> None:
    x, y = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
    twice(x, y)
    place = x.data_ptr()
    del x  # what was enqueued before may still read it
    torch.cuda.synchronize()
    assert twice.status(place, y.data_ptr(), 8) == 0
    fails_with(stand_in, "kernel twice.* use after free")


def test_a_byte_that_a_launch_writes_twice(stand_in: StandIn, twice: _Twice) -> None:
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    for _ in range(2):  # by two launches, which have an order
        twice(x, y)
    torch.cuda.synchronize()
    assert stand_in.last is not None
    assert stand_in.last.stats.written_bytes[stand_in.name_of(y)] == 32
    stand_in.ptx = {"twice": PTX.replace("mul.wide.s32 %rd3, %r4, 4", "mov.u64 %rd3, 8")}
    twice(x, y)
    fails_with(stand_in, "writes byte 8 of an allocation of 32 bytes a second time")


def test_torchs_own_operations_have_bounds_too(stand_in: StandIn) -> None:
    x = torch.zeros(8, device="cuda")
    storage = torch._C._construct_storage_from_data_pointer(x.data_ptr(), x.device, 64)
    longer = torch.empty(0, device="cuda").set_(storage, 0, (9,))
    torch.add(longer, 1)
    fails_with(stand_in, r"aten\.add.*out of bounds")
    stale = torch.empty(0, device="cuda").set_(storage, 0, (8,))
    del x
    torch.add(stale, 1)
    fails_with(stand_in, r"aten\.add.*use after free")


def test_memory_of_another_device(stand_in: StandIn, twice: _Twice) -> None:
    x, y = torch.zeros(8, device="cuda:1"), torch.zeros(8, device="cuda:0")
    torch.cuda.synchronize(1)
    twice(x, y)
    fails_with(stand_in, "memory of device 1 used on device 0")


def test_bytes_that_nobody_wrote(stand_in: StandIn, twice: _Twice) -> None:
    y = torch.zeros(8, device="cuda")
    x = torch.empty(8, device="cuda")
    x[:7] = 1
    twice(x, y)
    fails_with(stand_in, "reads byte 28 of an allocation of 32 bytes, which nobody has written")
    # nor by torch, nor by a copy to the host
    torch.add(torch.empty(3, device="cuda"), 1)
    fails_with(stand_in, "aten.add.*reads bytes that nobody has written")
    with pytest.raises(torch.AcceleratorError, match="byte 0 of 12 was never written"):
        torch.empty(3, device="cuda").cpu()


def test_a_copy_knows_what_was_written(stand_in: StandIn, twice: _Twice) -> None:
    x = torch.empty(8, device="cuda")
    x[:7] = 1
    twice(x.clone(), torch.zeros(8, device="cuda"))
    fails_with(stand_in, "reads byte 28")


def test_fresh_memory_is_poisoned(stand_in: StandIn) -> None:
    """So that what reads it in spite of all, outside of the stand-in's sight, gets NaN."""
    x = torch.empty(3, device="cuda")
    at = x.data_ptr() - stand_in.library.base
    assert (stand_in.library.bytes[at : at + 12] == 0xFF).all()


# Streams


def test_work_waits_until_it_is_asked_for(stand_in: StandIn, twice: _Twice) -> None:
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    at = y.data_ptr() - stand_in.library.base
    twice(x, y)
    assert not stand_in.library.bytes[at : at + 32].any()
    torch.cuda.synchronize()
    assert stand_in.library.bytes[at : at + 32].any()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_only_events_order_streams(
    stand_in: StandIn, twice: _Twice, waits: bool, seed: int
) -> None:
    """x is written on one stream and read on another."""
    stand_in.shuffle(seed)
    x, y = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.fill_(1)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    twice(x, y)
    torch.cuda.current_stream().synchronize()
    assert y.sum() == (16 if waits else 0)


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_is_not_before_a_later_write(stand_in: StandIn, twice: _Twice, waits: bool) -> None:
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        twice(x, y)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    x.fill_(5)
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    assert y.sum() == (16 if waits else 80)


def test_orders_of_the_streams(stand_in: StandIn, twice: _Twice) -> None:
    """Some seed runs the side stream first when the device is waited for, some the other."""
    seen = set()
    for seed in range(8):
        x, y = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        stand_in.shuffle(seed)
        with torch.cuda.stream(side):
            x.fill_(1)
        twice(x, y)
        torch.cuda.synchronize()
        seen.add(y.sum().item())
    assert seen == {0, 16}


def test_pinned_memory_is_read_late(stand_in: StandIn) -> None:
    pinned, plain = torch.ones(4).pin_memory(), torch.ones(4)
    late, staged = pinned.to("cuda", non_blocking=True), plain.to("cuda", non_blocking=True)
    pinned.fill_(7)
    plain.fill_(7)
    assert (late.sum().item(), staged.sum().item()) == (28, 4)


def test_a_stream_of_another_device(stand_in: StandIn, twice: _Twice) -> None:
    x = torch.zeros(8, device="cuda")
    stream = torch.cuda.Stream("cuda:1")
    assert twice.status(x.data_ptr(), x.data_ptr(), 8, stream.cuda_stream) == 400


def test_a_thread_begins_without_a_context(stand_in: StandIn, twice: _Twice) -> None:
    statuses: list[int] = []
    x = torch.zeros(8, device="cuda")

    def run() -> None:
        statuses.append(twice.status(x.data_ptr(), x.data_ptr(), 8))
        torch.cuda.current_stream().query()  # a call of the runtime
        statuses.append(twice.status(x.data_ptr(), x.data_ptr(), 8))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert statuses == [201, 0]


def test_threads_may_wait_while_others_call_torch(stand_in: StandIn, twice: _Twice) -> None:
    """The lock of the stand-in and Python's never hold each other up."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
            for _ in range(50):
                twice(x, y)
                assert y.sum().item() == 16
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


# Captures


@pytest.fixture
def caching_allocator(stand_in: StandIn) -> Iterator[None]:
    torch.cuda.memory.caching_allocator_enable(True)
    yield
    torch.cuda.synchronize()
    torch.cuda.memory.caching_allocator_enable(False)


def test_a_capture_runs_nothing_and_a_replay_all(twice: _Twice) -> None:
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice(x, y)
        z = y + 1
    assert y.sum() == 0
    for value in (1, 3):
        x.fill_(value)
        graph.replay()
        assert z.tolist() == [2 * value + 1] * 8


def test_a_tensor_may_end_within_a_capture(twice: _Twice) -> None:
    """As the garbage collector may have it."""
    x, y, left = (torch.ones(8, device="cuda") for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice(x, y)
        del left
    graph.replay()
    assert y.sum() == 16


@pytest.mark.parametrize("waits", [True, False])
def test_side_streams_of_a_capture(twice: _Twice, waits: bool) -> None:
    """Branches that nothing orders are replayed in another order than they were captured in."""
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        x.fill_(2)
        if waits:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            twice(x, y)
        main.wait_stream(side)
    graph.replay()
    assert y.sum() == (32 if waits else 16)


def _wait() -> None:
    torch.cuda.current_stream().synchronize()


def _wait_for_all() -> None:
    torch.cuda.synchronize()


def _read() -> None:
    torch.ones(1, device="cuda").item()


def _allocate() -> None:
    torch.cuda.memory.caching_allocator_enable(False)
    torch.empty(8, device="cuda")


@pytest.mark.parametrize("call", [_wait, _wait_for_all, _read, _allocate])
def test_what_a_capture_does_not_allow(stand_in: StandIn, call: Callable[[], None]) -> None:
    x = torch.ones(8, device="cuda")

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.fill_(2)
            with pytest.raises(torch.AcceleratorError, match="not permitted when stream is captur"):
                call()

    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        capture()
    assert x.sum() == 8


def test_an_allocation_is_refused_to_other_threads_too(stand_in: StandIn) -> None:
    errors: list[BaseException] = []

    def allocate() -> None:
        try:
            torch.cuda.memory.caching_allocator_enable(False)
            torch.empty(8, device="cuda")
        except BaseException as error:
            errors.append(error)

    for mode, refused in (("global", 1), ("thread_local", 0)):
        errors.clear()
        graph, x = torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, capture_error_mode=mode):
                x.fill_(2)
                thread = threading.Thread(target=allocate)
                thread.start()
                thread.join()
        except torch.AcceleratorError:
            assert refused
        assert len(errors) == refused


def test_a_capture_has_to_join_its_streams(stand_in: StandIn) -> None:
    side, x = torch.cuda.Stream(), torch.ones(8, device="cuda")

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.fill_(2)

    with pytest.raises(torch.AcceleratorError, match="unjoined work"):
        capture()


def test_work_from_outside_a_capture(stand_in: StandIn) -> None:
    event, x = torch.cuda.Event(), torch.ones(8, device="cuda")
    event.record()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.fill_(2)
            with pytest.raises(torch.AcceleratorError, match="uncaptured work"):
                torch.cuda.current_stream().wait_event(event)

    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        capture()


# Faults, counts, and what it does not know


def test_a_grid_without_end_runs_in_part(stand_in: StandIn) -> None:
    """Around its ends, its middle and powers of two; elsewhere nobody has written."""
    blocks = some_blocks(2**30 + 5)
    assert {0, 16, 2**20 - 16, 2**29, 2**29 + 2, 2**30, 2**30 + 4} <= set(blocks)
    assert blocks == sorted(set(blocks))
    assert len(blocks) < 1100
    mu = torch.zeros(1, device="cuda", dtype=torch.bfloat16).expand(2**31)
    z = torch.ops.reparam_fused.kl_divergence(mu, mu)
    assert z[-100:].tolist() == [0.0] * 100
    with pytest.raises(torch.AcceleratorError, match="was never written"):
        z[2**30 + 2**28 : 2**30 + 2**28 + 100].cpu()


def test_out_of_memory_on_demand(stand_in: StandIn, caching_allocator: None) -> None:
    torch.cuda.empty_cache()
    stand_in.fail("cudaMalloc", 2)
    torch.empty(8, device="cuda")  # torch frees what it can, and tries again
    torch.cuda.empty_cache()
    for _ in range(2):
        stand_in.fail("cudaMalloc", 2)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(8, device="cuda")
    torch.empty(8, device="cuda")


def test_memory_has_an_end(stand_in: StandIn, caching_allocator: None) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, device="cuda")


@pytest.mark.parametrize("lasting", [False, True])
def test_a_launch_that_fails(stand_in: StandIn, twice: _Twice, lasting: bool) -> None:
    x = torch.zeros(8, device="cuda")
    stand_in.fail("cuLaunchKernel", 719, lasting=lasting)
    assert twice.status(x.data_ptr(), x.data_ptr(), 8) == 719
    assert twice.status(x.data_ptr(), x.data_ptr(), 8) == (719 if lasting else 0)


def test_no_image_for_the_device(stand_in: StandIn, twice: _Twice) -> None:
    stand_in.set_capability(0, 75)
    assert torch.cuda.is_available()
    x = torch.zeros(8, device="cuda")
    assert twice.status(x.data_ptr(), x.data_ptr(), 8) == 209


def test_counts(stand_in: StandIn, twice: _Twice) -> None:
    with stand_in.events() as nothing:
        pass
    assert (nothing.launches, nothing.synchronisations, nothing.copies) == ([], [], [])
    with stand_in.events() as events:
        x = torch.ones(8).cuda()
        y = torch.empty_like(x)
        twice(x, y)
        y.add_(1)
        y.tolist()
    assert [launch.kernel for launch in events.launches] == ["twice", "aten.add_.Scalar"] or [
        launch.kernel for launch in events.launches
    ] == ["twice", "aten.add_.Tensor"]
    assert events.copies == ["to the device", "to the host"]
    assert events.synchronisations == ["of a stream", "of a stream"]
    assert events.allocations == [32, 32]


def test_a_function_that_it_does_not_know_fails_by_name(stand_in: StandIn) -> None:
    handle = ctypes.create_string_buffer(64)
    runtime = stand_in.library.runtime()
    assert runtime.cudaIpcGetMemHandle(handle, None) == 801
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    assert b"cudaIpcGetMemHandle is not known" in runtime.cudaGetErrorString(801)
    entry = ctypes.c_void_p()
    assert runtime.cudaGetDriverEntryPointByVersion(
        b"cuGreenCtxCreate", ctypes.byref(entry), 12000, ctypes.c_uint64(0), None
    ) == 0  # fmt: skip
    assert ctypes.CFUNCTYPE(ctypes.c_int)(entry.value or 0)() == 801


def test_an_operation_of_torch_that_it_does_not_know_fails_by_name(stand_in: StandIn) -> None:
    with pytest.raises(torch.AcceleratorError, match=r"host_ops\.py has no operation for torch's"):
        torch.frac(torch.ones(3, device="cuda"))


def test_a_cache_that_another_process_writes(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cubin whose PTX is not there yet is passed over: red where it is an error."""
    code = b"\x7fELF and the rest"
    for name in ("a", "b", "c", "d"):
        folder = tmp_path / f"tmp.{name}"
        folder.mkdir()
        (folder / "twice.cubin").write_bytes(code)
    (tmp_path / "tmp.b" / "twice.ptx").write_text(PTX)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    held = ctypes.create_string_buffer(code)
    kernel = images.kernel_of(ctypes.addressof(held), "twice", 80)
    assert kernel.name == "twice"
