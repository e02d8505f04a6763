"""The backends of torch.compile, on the devices that each is tried on."""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any

import pytest
from conftest import DEVICES

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler"
)


def on_devices(*cases: Any) -> list[Any]:
    """Each (backend, ...) on every device, but inductor on the CPU alone: on a GPU its kernels
    are Triton's, compiled for seconds, and the op within them is the one that aot_eager calls."""
    return [
        pytest.param(*case, device, marks=needs_compiler if case[0] == "inductor" else ())
        for case, device in product(cases, DEVICES)
        if case[0] != "inductor" or device == "cpu"
    ]


def compilers(*backends: str) -> pytest.MarkDecorator:
    """The test with each backend, on the devices that it is tried on."""
    cases = on_devices(*zip(backends, strict=True))
    return pytest.mark.parametrize(("backend", "device"), cases, indirect=["device"])
