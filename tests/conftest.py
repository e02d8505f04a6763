"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import reparam_fused
from reparam_fused import functional, kl_divergence

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def pytest_report_header() -> str:
    return f"reparam_fused: {reparam_fused.__file__}, cpu: {reparam_fused.backends()['cpu']}"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills new tensors with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["C++ Function", "Python Function"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test over the C++ fast path, and over the general path in Python."""
    if request.param == "Python Function":
        for module in (functional, kl_divergence):
            monkeypatch.setattr(module, "plain_call", functional.no_plain_call)
    elif functional.plain_call is functional.no_plain_call:
        pytest.skip("the C++ extension is not built")
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
