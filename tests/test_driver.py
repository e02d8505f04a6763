"""How the CUDA kernels are loaded and launched, and who serves a GPU for which they cannot be.

Each test is a program of its own on the stand-in GPU: the driver is asked once in a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu.build import Unavailable, build
from gpu.run import ACTIVE

from reparam_fused import _extensions

pytestmark = [
    pytest.mark.skipif(
        not _extensions.has_cuda,
        reason=f"there are no CUDA kernels: {_extensions.cuda_missing_reason}",
    ),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

PRELUDE = """
import threading
import torch
from gpu.stand_in import attach
import reparam_fused
from reparam_fused import _ops, fused_reparameterize, key

stand_in = attach()
host, k = torch.linspace(-2, 2, 5000), key(3)
expected = fused_reparameterize(host, host, key=k)

def launched(device):
    x, its_key = host.to(device), k.to(device)
    torch.cuda.synchronize(device)
    with stand_in.events() as events:
        z = fused_reparameterize(x, x, key=its_key)
    torch.cuda.synchronize(device)
    assert torch.equal(z.cpu(), expected)
    print(device, *(launch.kernel for launch in events.launches))
"""
BY_CUDA, BY_TRITON = "sample_log_var_float32_key_whole", "whole_kernel"
Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A program on the stand-in: what it prints, line by line."""
    try:
        build(old_driver=False)
    except Unavailable as reason:
        pytest.skip(f"no stand-in GPU: {reason}")

    def run(program: str, *options: str, **environment: str) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(PRELUDE + program)
        script = Path(__file__).parent / "gpu" / "run.py"
        of_another = (ACTIVE, "LD_PRELOAD", "LD_LIBRARY_PATH", "REPARAM_FUSED_GPU")
        done = subprocess.run(
            [sys.executable, "-P", str(script), *options, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if k not in of_another} | environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_one_image_serves_both_devices(run: Run) -> None:
    lines = run(
        """
launched("cuda:1")
stand_in.fail("cuLibraryLoadData", 1, lasting=True)  # were it asked for again
launched("cuda:0")
launched("cuda:1")
"""
    )
    assert lines == [f"cuda:{d} {BY_CUDA}" for d in (1, 0, 1)]


def test_a_thread_without_a_context(run: Run) -> None:
    """Its memory comes from what torch keeps: nothing of the runtime has been called in it."""
    lines = run(
        """
x = {d: host.to(d) for d in ("cuda:0", "cuda:1")}
for first in (True, False):
    for device, tensor in x.items():
        warm = [torch.empty_like(tensor) for _ in range(4)]  # which torch keeps
        del warm
        made = []
        thread = threading.Thread(target=lambda: made.append(_ops.kl_divergence(tensor, tensor)))
        thread.start()
        thread.join()
        torch.cuda.synchronize(device)
        print(device, torch.equal(made[0].cpu(), _ops.kl_divergence(host, host)))
print(torch.cuda.current_device())
""",
        "--caching",
    )
    assert lines == ["cuda:0 True", "cuda:1 True"] * 2 + ["0"]


def test_the_first_call_of_all_is_captured(run: Run) -> None:
    """It loads the image in the midst of the capture."""
    lines = run(
        """
x, its_key = host.cuda(), k.cuda()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    z = fused_reparameterize(x, x, key=its_key)
for _ in range(2):
    z.zero_()
    graph.replay()
    torch.cuda.synchronize()
    print(torch.equal(z.cpu(), expected))
"""
    )
    assert lines == ["True", "True"]


def test_an_image_that_the_driver_refuses_is_left_to_triton(run: Run) -> None:
    """As one of before CUDA 13 refuses machine code of nvcc 13. The other device is asked anew."""
    lines = run(
        """
print(reparam_fused.backends()["cuda"])
stand_in.fail("cuLibraryLoadData", 222)
launched("cuda:0")
launched("cuda:0")
launched("cuda:1")
print(reparam_fused.backends()["cuda"])
x = host.cuda()
torch.cuda.manual_seed(7)
z, drawn = _ops.sample(x, x)
print(torch.equal(z.cpu(), _ops.sample_from_key(host, host, drawn.cpu())), drawn.tolist())
y = x.clone().requires_grad_()
fused_reparameterize(y, y, key=k.cuda()).sum().backward()
w = host.clone().requires_grad_()
fused_reparameterize(w, w, key=k).sum().backward()
print(torch.equal(y.grad.cpu(), w.grad))
"""
    )
    before, first, second, other, after, drawn, grad = lines
    assert before.startswith("C++ kernels for compute capability 8.0 ")
    assert "Triton" not in before
    assert (first, second) == (f"cuda:0 {BY_TRITON}",) * 2
    assert other == f"cuda:1 {BY_CUDA}"
    reason = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported"
    assert after.startswith(
        f"{before}; cuda:0 is left to Triton, for the CUDA driver says {reason} toolchain."
    )
    assert drawn == f"True [7, {2**63}]"
    assert grad == "True"


def test_a_device_older_than_the_kernels(run: Run) -> None:
    lines = run(
        """
stand_in.set_capability(1, 75)
launched("cuda:1")
launched("cuda:0")
print(reparam_fused.backends()["cuda"])
"""
    )
    assert lines[:2] == [f"cuda:1 {BY_TRITON}", f"cuda:0 {BY_CUDA}"]
    assert "; cuda:1 is left to Triton, for the CUDA driver says CUDA_ERROR_NO_BINARY" in lines[2]


def test_a_driver_without_libraries_is_left_to_triton(run: Run) -> None:
    lines = run(
        """
launched("cuda:0")
print(reparam_fused.backends()["cuda"])
""",
        "--old-driver",
    )
    assert lines[0] == f"cuda:0 {BY_TRITON}"
    reason = "the CUDA driver has no cuLibraryLoadData: it is older than CUDA 12"
    assert lines[1].endswith(f"; cuda:0 is left to Triton, for {reason}")


@pytest.mark.parametrize("function", ["cuLibraryLoadData", "cuKernelGetFunction"])
def test_an_error_that_may_pass_is_raised(run: Run, function: str) -> None:
    """It is not taken for a refusal, it moves no generator, and the next call asks again."""
    lines = run(
        f"""
x = host.cuda()
offset = torch.cuda.default_generators[0].get_offset()
stand_in.fail("{function}", 2)
try:
    fused_reparameterize(x, x)
except RuntimeError as error:
    print(str(error).splitlines()[0])
print(torch.cuda.default_generators[0].get_offset() - offset)
launched("cuda:0")
"""
    )
    assert "CUDA_ERROR_OUT_OF_MEMORY: out of memory" in lines[0]
    assert lines[1:] == ["0", f"cuda:0 {BY_CUDA}"]


def test_without_triton_the_reference_serves(run: Run) -> None:
    lines = run(
        """
import warnings
stand_in.fail("cuLibraryLoadData", 222)
x = host.cuda()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z, drawn = _ops.sample(x, x)
print(*(w.message for w in caught))
print((z.cpu() - _ops.sample_from_key(host, host, drawn.cpu())).abs().max().item() < 1e-5)
""",
        REPARAM_FUSED_GPU="cuda",
    )
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in lines[0]
    assert lines[1] == "True"
