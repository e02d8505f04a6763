"""What all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from gpu.run import ACTIVE
from gpu.stand_in import StandIn, attach
from helpers import DTYPES, by_the_ops_alone
from hypothesis import settings

import reparam_fused
from reparam_fused import _extensions
from reparam_fused.check import parts

# tests/gpu/run.py has put a stand-in GPU under this process.
ON_STAND_IN = ACTIVE in os.environ
if ON_STAND_IN:
    attach()
HAS_GPU = ON_STAND_IN or torch.cuda.is_available()
DEVICES = ["cuda"] if ON_STAND_IN else ["cpu", "cuda"] if HAS_GPU else ["cpu"]

# Of hypothesis: the same examples each time; by --hypothesis-profile=deep many, others each time
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=200)
settings.register_profile("deep", deadline=None, max_examples=5_000)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """What Inductor compiles lies in a folder of this process: one that several share is read by
    one while another writes it. Triton's cache takes its files at once, and is kept."""
    folder = tempfile.mkdtemp(prefix="reparam_fused-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_report_header() -> str:
    backends = reparam_fused.backends()
    gpu = "none"
    if HAS_GPU:
        kernels = backends["cuda"] if _extensions.has_cuda else backends["triton"]
        gpu = f"{torch.cuda.get_device_name()}, {kernels}"
    return f"reparam_fused: {reparam_fused.__file__}, cpu: {backends['cpu']}, gpu: {gpu}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU need one; on a stand-in the others are left to the machine's own run."""

    def wants_gpu(item: pytest.Item) -> bool:
        fixtures = getattr(item, "fixturenames", ())
        return "device" in fixtures or "cuda" in fixtures or "stand_in" in fixtures

    if ON_STAND_IN:
        config.hook.pytest_deselected(items=[item for item in items if not wants_gpu(item)])
        items[:] = [item for item in items if wants_gpu(item)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if ON_STAND_IN and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # what was asked for has no test of a GPU


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """The stand-in GPU, which counts and which can be made to fail."""
    if not ON_STAND_IN:
        pytest.skip("needs the stand-in GPU: python tests/gpu/run.py -m pytest")
    gpu = attach()
    gpu.reset()
    yield gpu
    gpu.reset()
    torch.cuda.set_stream(torch.cuda.default_stream(0))  # a capture that failed leaves its own


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A GPU, or the stand-in for one."""
    if not HAS_GPU:
        pytest.skip("no GPU; on the stand-in: python tests/gpu/run.py -m pytest")
    if ON_STAND_IN:
        attach().reset()
    yield torch.device("cuda", 0)
    if ON_STAND_IN:
        # Whatever is still queued runs now, so that its faults are this test's.
        torch.cuda.synchronize()
        attach().reset()
        torch.cuda.set_stream(torch.cuda.default_stream(0))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is."""
    if request.param == "cpu":
        return torch.device("cpu")
    found: torch.device = request.getfixturevalue("cuda")
    return found


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills new tensors with NaN, so that an element nobody wrote shows."""
    if ON_STAND_IN:  # it does so itself, with no kernel that would be counted
        yield
        return
    with parts.poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield


@pytest.fixture(params=["module", "op"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test by the module's kernels where the call is plain, and by the ops alone."""
    if request.param == "op":
        by_the_ops_alone(monkeypatch)
    elif _extensions.library is None:
        pytest.skip("the C++ library is not built")
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
