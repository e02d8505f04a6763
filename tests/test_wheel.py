"""What a wheel needs of the machine that it is installed on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers import needs_kernels

import reparam_fused

# manylinux_2_28: the C library of 2018 and the C++ library beside it
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def compiler() -> int:
    said = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=False)
    return int(said.stdout.partition(".")[0] or 0)


@needs_kernels
def test_nothing_newer_than_manylinux_2_28_is_asked_for() -> None:
    """By the names of the versions that the libraries want of the system's own."""
    if compiler() > 12:
        pytest.skip("a newer g++ and its glibc ask for more; wheels are built with g++ 12")
    libraries = list(Path(reparam_fused.__file__).parent.glob("*.so"))
    assert libraries
    for library in libraries:
        listed = subprocess.run(
            ["readelf", "--version-info", "--wide", str(library)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        wanted = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", listed)
        assert "GLIBC" in dict(wanted)
        for name, version in wanted:
            assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"
