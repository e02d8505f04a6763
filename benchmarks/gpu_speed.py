"""Speed on a GPU, as ratios: beside the eager line, torch.compile of it, and torch.add.

    python benchmarks/gpu_speed.py                  a minute or two, most of it torch.compile's
    python benchmarks/gpu_speed.py --no-compile     half a minute
    python benchmarks/gpu_speed.py --warm           fill the caches of the compilers, no times

The time on the GPU is that of CUDA graphs of some calls, by CUDA events, the rivals replayed in
turn: a ratio is the median over the rounds, with the quartiles. The inputs of the calls in a graph
rotate, so that no cache holds them. The floor is torch.add on the same tensors, once for each
output: twice with the backward of a sample, three times with that of the divergence. The time of
the host is that of many calls of 128 x 20, which the GPU finishes sooner than Python makes them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import reparam_fused
from reparam_fused import fused_kl_divergence, fused_reparameterize

Call = Callable[[int], object]  # with the number of the inputs to take
M = 2**20
ROUNDS = 21
CACHED = 256 * M  # bytes, some times the L2 of any GPU: what the inputs of a graph take at least


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def eager_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + log_var.exp() - 1.0 - log_var)


# Each shape is compiled, as the caller of one shape has it.
torch._dynamo.config.recompile_limit = 64
compiled = torch.compile(eager, dynamic=False)
compiled_kl = torch.compile(eager_kl, dynamic=False)


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def captured(call: Call, inputs: int, calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i % inputs)
    return graph


def in_turn(rivals: dict[str, Call], inputs: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call on the GPU, of each round."""
    graphs = {}
    for name, call in rivals.items():
        try:
            graphs[name] = captured(call, inputs, calls)
        except Exception as error:  # of a rival: the others still run
            if name == "fused":
                raise
            print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(ROUNDS + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            torch.cuda._sleep(200_000)  # until the host has queued what is timed
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:  # those before warm up
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return times


def line(case: str, times: dict[str, list[float]], moved: int | None = None) -> None:
    ours = times["fused"]
    ratios = {
        name: spread([m / s if name == "floor" else s / m for m, s in zip(ours, t, strict=True)])
        for name, t in times.items()
        if name != "fused"
    }
    row = f"{case:48} fused {spread(ours, 1):>26} us"
    if moved is not None:
        row += f"  {moved / statistics.median(ours) / 1e3:6.0f} GB/s"
    for name, ratio in ratios.items():
        what = "fused / floor" if name == "floor" else f"{name} / fused"
        row += f"  {what} {ratio}"
    print(row, flush=True)


class Case:
    """Inputs, and what to do with them, with or without the backward."""

    def __init__(
        self,
        name: str,
        make: Callable[[], tuple[Tensor, Tensor]],
        rivals: dict[str, Callable[[Tensor, Tensor], Tensor]],
        outputs: int = 2,
        copies: int | None = None,
    ) -> None:
        self.name, self.rivals, self.outputs = name, rivals, outputs
        mu, log_var = make()
        numel = torch.broadcast_shapes(mu.shape, log_var.shape).numel()
        self.dense = mu.shape == log_var.shape
        self.nbytes = numel * mu.dtype.itemsize
        self.count = copies or max(2, min(32, CACHED // (2 * self.nbytes)))
        self.inputs = []
        for _ in range(self.count):
            mu, log_var = (t.detach().requires_grad_() for t in make())
            self.inputs.append((mu, log_var, torch.randn_like(mu.detach())))

    def forward(self, call: Callable[[Tensor, Tensor], object], i: int) -> object:
        mu, log_var, _ = self.inputs[i]
        with torch.no_grad():
            return call(mu, log_var)

    def both(self, call: Callable[[Tensor, Tensor], Tensor], i: int) -> object:
        mu, log_var, grad_z = self.inputs[i]
        return torch.autograd.grad(call(mu, log_var), (mu, log_var), grad_z)

    def floors(self, i: int) -> None:
        mu, log_var, grad_z = self.inputs[i]
        with torch.no_grad():
            torch.add(mu, log_var)
            for _ in range(self.outputs - 1):
                torch.add(grad_z, log_var)

    def run(self, calls: int | None = None) -> None:
        calls = calls or max(4, self.count)
        for what, method, floor, outputs in (
            ("forward", self.forward, partial(self.forward, torch.add), 1),
            ("forward + backward", self.both, self.floors, self.outputs),
        ):
            rivals: dict[str, Call] = {n: partial(method, c) for n, c in self.rivals.items()}
            times = in_turn(rivals | {"floor": floor}, self.count, calls)
            moved = 3 * outputs * self.nbytes if self.dense else None
            line(f"{self.name}, {what}", times, moved)


def uniform(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mu, log_var = (torch.randn(shape, device="cuda").to(dtype) for _ in "ab")
    return mu, log_var


def halves(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first, second = uniform(rows, 2 * columns, dtype=dtype)[0].chunk(2, dim=1)
    return first, second


def column(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mu, log_var = uniform(rows, columns, dtype=dtype)
    return mu, log_var[:, :1].contiguous()


def cases(compile_too: bool, keyed: bool) -> Iterator[tuple[Case, int | None]]:
    key = reparam_fused.key(1, device="cuda")
    with_key = partial(fused_reparameterize, key=key)
    fused = with_key if keyed else fused_reparameterize
    plain: dict[str, Callable[..., Tensor]] = {"fused": fused, "eager": eager}
    rivals = plain | ({"compile": compiled} if compile_too else {})
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for n in (4 * M, 64 * M, 256 * M):
            yield Case(f"{n // M}M {short}", partial(uniform, n, dtype=dtype), rivals), None
        make, shape = partial(uniform, 64 * M, dtype=dtype), (64 * M // 1024, 1024)
        yield Case(f"64M {short}, a key", make, plain | {"fused": with_key}), None
        per_row = partial(fused_reparameterize, key=reparam_fused.split(key, shape[0]))
        make_rows = partial(uniform, *shape, dtype=dtype)
        yield Case(f"64M {short}, a key a row", make_rows, plain | {"fused": per_row}), None
        yield Case(f"64M {short}, chunk(2)", partial(halves, *shape, dtype), plain), None
        yield Case(f"64M {short}, log_var a column", partial(column, *shape, dtype), plain), None
        kl: dict[str, Callable[..., Tensor]] = {"fused": fused_kl_divergence, "eager": eager_kl}
        if compile_too:
            kl["compile"] = compiled_kl
        yield Case(f"64M {short}, divergence", make, kl, outputs=3), None
    # Among these is where csrc/cuda/launch.cpp changes from one vector a thread to four.
    for n in (2047, 2560, 2**16, 2**18, 2**20, 2**21, 2**22, 2**23, 2**24):
        for dtype in (torch.float32, torch.bfloat16):
            make = partial(uniform, n, dtype=dtype)
            yield Case(f"{n} {str(dtype).removeprefix('torch.')}", make, plain), 40


def host(rounds: int = ROUNDS, calls: int = 200) -> None:
    """Microseconds of Python and C++ for a call of 128 x 20, beside that of others."""
    mu, log_var, grad_z = (torch.randn(128, 20, device="cuda") for _ in "abc")
    key = reparam_fused.key(1, device="cuda")
    leaves = mu.clone().requires_grad_(), log_var.clone().requires_grad_()

    def both(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*leaves), leaves, grad_z)

    rivals: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {
            "fused": lambda: fused_reparameterize(mu, log_var),
            "eager": lambda: eager(mu, log_var),
            "add": lambda: torch.add(mu, log_var),
            "with a key": lambda: fused_reparameterize(mu, log_var, key=key),
        },
        "forward + backward": {
            "fused": both(fused_reparameterize),
            "eager": both(eager),
            "mul": both(torch.mul),
            "with a key": both(partial(fused_reparameterize, key=key)),
        },
    }
    for what, calls_of in rivals.items():
        times: dict[str, list[float]] = {name: [] for name in calls_of}
        for i in range(rounds + 2):
            for name, call in calls_of.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                seconds = time.perf_counter() - start
                if i >= 2:
                    times[name].append(seconds / calls * 1e6)
        parts = "  ".join(f"{name} {spread(t, 1)} us" for name, t in times.items())
        ratios = [e / f for e, f in zip(times["eager"], times["fused"], strict=True)]
        print(f"host, 128 x 20, {what}: {parts}  eager / fused {spread(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--key", action="store_true", help="for Triton with torch below 2.14,"
                        " whose generators a graph does not capture there")  # fmt: skip
    arguments = parser.parse_args()
    found = partial(cases, not arguments.no_compile, arguments.key)
    print(torch.cuda.get_device_name(), f"torch {torch.__version__},", reparam_fused.backends())
    if arguments.warm:
        for case, _ in found():
            for name, call in case.rivals.items():
                if name != "eager":
                    case.forward(call, 0)
                    case.both(call, 0)
        return
    host()
    start = time.perf_counter()
    for case, calls in found():
        case.run(calls)
        del case
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
