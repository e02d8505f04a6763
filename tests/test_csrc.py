"""What csrc has for its binding beside the kernels: the list of forms, keys derived from keys."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import machine_code
import numpy as np
import pytest
import torch
from gpu_run import ptx
from ptx import Machine, Memory, Module
from torch import Tensor

from reparam_fused import reference

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
EDGE = 2**64 - 3
KEYS = [[42, 0], [2**64 - 1, EDGE], [2**63, 2**32 - 2], [7, 2**63]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parent / "cpp" / "host.cpp"
    binary = tmp_path_factory.mktemp("cpp") / "host"
    flags = ["-O2", "-std=c++17", "-march=native", "-Wall"]
    command = [str(COMPILER), *flags, str(source), "-o", str(binary)]
    subprocess.run(command, check=True)
    return binary


def output(program: Path, *arguments: object) -> list[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def tensor(words: list[str] | list[int]) -> Tensor:
    return torch.tensor([int(w) for w in words], dtype=torch.uint64)


def child(key: list[int], number: int) -> list[int]:
    """By the definition: seed and offset from the words of one Philox block."""
    block = torch.tensor([(number + 2**63) % 2**64 - 2**63])
    w0, w1, w2, w3 = (int(w) for w in reference.words(tensor(key), block))
    return [w1 << 32 | w0, w3 << 32 | w2]


def lane_types(program: Path) -> list[str]:
    """Those that the program has: of another one it prints nothing."""
    names = ("scalar", "avx2", "avx512", "neon")
    return [n for n in names if output(program, "children", n, 0, 1, *KEYS[0])]


def test_forms(program: Path) -> None:
    known = ["0 log_var 1", "1 std 0", "2 log_std 1", "3 rho 1"]
    assert output(program, "forms") == known
    names = ("log_var", "std", "log_std", "rho", "log_va", "stdd", "", "Std")
    assert [output(program, "form", name) for name in names] == [
        ["0"], ["1"], ["2"], ["3"], ["-1"], ["-1"], ["-1"], ["-1"],
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 5, 2**32 - 3, EDGE])
def test_children(program: Path, first: int, n: int) -> None:
    keys = KEYS[:n]
    for count in (1, 7, 16, 33):
        expected = [w for j in range(count) for k in keys for w in child(k, (first + j) % 2**64)]
        for lanes in lane_types(program):
            words = [w for key in keys for w in key]
            got = output(program, "children", lanes, first, count, *words)
            assert list(map(int, got)) == expected, (lanes, count)


@pytest.mark.parametrize(("key_stride", "data_stride"), [(2, 1), (2, 0), (0, 1), (4, 2), (0, 0)])
def test_fold_in(program: Path, key_stride: int, data_stride: int) -> None:
    n = 21
    words = torch.randint(-(2**63), 2**63 - 1, (4 * n,)).view(torch.uint64).tolist()
    keys = words[: n * key_stride or 2]
    data = [0, 1, 2**64 - 1, *(w ^ 2**63 for w in words[::2])]
    expected = [
        w
        for k in range(n)
        for w in child(keys[k * key_stride : k * key_stride + 2], data[k * data_stride])
    ]
    for lanes in lane_types(program):
        got = output(program, "fold_in", lanes, n, key_stride, data_stride, *keys, *data)
        assert list(map(int, got)) == expected, lanes


def run_cuda(name: str, n_out: int, *arguments: int | list[int]) -> list[int]:
    """What a kernel of keys.cuh makes of numbers and arrays of words, after its own output."""
    kernel = Module.parse(ptx(90)[name]).kernels[name]
    memory = Memory()
    values = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, list):
            argument = memory.allocate(str(i), np.array(argument, np.uint64).view(np.uint8))
        values.append(argument)
    out = np.zeros(16 * n_out, np.uint8)
    values.append(memory.allocate("out", out, writable=True))
    params = [(v % 2**64).to_bytes(8, "little") for v in values]
    Machine(kernel, memory).launch((-(-n_out // 128), 1, 1), (128, 1, 1), params)
    memory.check_written_once("out")
    return [int(w) for w in out.view(np.uint64)]


@pytest.mark.skipif(not machine_code.has_nvcc(), reason="needs nvcc")
def test_cuda() -> None:
    words = [w for key in KEYS for w in key]
    for first in (0, EDGE):
        for n, count in ((1, 300), (3, 70)):
            got = run_cuda("child_keys", n * count, words, n, first, n * count)
            children = [child(k, (first + j) % 2**64) for j in range(count) for k in KEYS[:n]]
            assert got == [w for key in children for w in key]
    data = [EDGE, 2**63, 0, 9]
    folded = [child(k, d) for k, d in zip(KEYS, data, strict=True)]
    got = run_cuda("fold_in", 4, words, 2, data, 1, 4)
    assert got == [w for key in folded for w in key]
    got = run_cuda("fold_in", 2, words, 4, data, 2, 2)
    assert got == [w for key in [*folded[:1], child(KEYS[2], 0)] for w in key]
    got = run_cuda("fold_in", 4, words[2:4], 0, data, 1, 4)
    assert got == [w for d in data for w in child(KEYS[1], d)]
    got = run_cuda("fold_in", 4, words, 2, data[1:2], 0, 4)
    assert got == [w for k in KEYS for w in child(k, 2**63)]
