"""What every test of a client uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import count_patched
from torch import Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The means of the fused calls of a test."""
    return count_patched(monkeypatch)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
