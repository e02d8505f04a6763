"""What every test of a client uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from reparam_fused import _patch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the fused calls of a test."""
    seen: list[Any] = []
    real = _patch.fused_reparameterize

    def count(*args: Tensor, **options: Any) -> Tensor:
        seen.append(args)
        return real(*args, **options)

    monkeypatch.setattr(_patch, "fused_reparameterize", count)
    return seen


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
