"""The ULPs that csrc/common states, over all inputs where 2^32 is all; and lanes against lanes."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_reference import data_rows
from torch import Tensor

from reparam_fused import reference

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Result of tests/cpp/numerics.cpp -> header, function, and which of its figures
STATED = {
    "radius": ("normal.h", "typename V::F radius(", 0),
    "uniform": ("normal.h", "typename V::F uniform(", 0),
    "half_turn sin": ("normal.h", "typename V::U half_turn(", 0),
    "half_turn cos absolute": ("normal.h", "typename V::U half_turn(", 1),
    "sigma": ("sigma.h", "R sigma(", 0),
    "uniform double": ("normal.h", "typename V::D uniform(", 0),
    "radius double": ("normal.h", "typename V::D radius(", 0),
    "half_turn double sin": ("normal.h", "typename V::D half_turn(", 0),
    "half_turn double cos absolute": ("normal.h", "typename V::D half_turn(", 1),
    "sigma double": ("sigma.h", "R sigma(", 1),
    "half_excess": ("kl_divergence.h", "R half_excess(", 0),
    "half_excess double": ("kl_divergence.h", "R half_excess(", 1),
    "half_expm1": ("kl_divergence.h", "R half_expm1(", 0),
    "half_expm1 double": ("kl_divergence.h", "R half_expm1(", 1),
    "half_excess_of_sigma": ("kl_divergence.h", "R half_excess_of_sigma(", 0),
    "half_excess_of_sigma double": ("kl_divergence.h", "R half_excess_of_sigma(", 1),
    "half_excess_slope": ("kl_divergence.h", "R half_excess_slope(", 0),
    "half_excess_slope double": ("kl_divergence.h", "R half_excess_slope(", 1),
    "softplus": ("softplus.h", "R softplus(", 0),
    "softplus double": ("softplus.h", "R softplus(", 1),
    "sigmoid": ("softplus.h", "R sigmoid(", 0),
    "sigmoid double": ("softplus.h", "R sigmoid(", 1),
    "minus_inverse_of_sum": ("softplus.h", "R minus_inverse_of_sum(", 0),
    "minus_inverse_of_sum double": ("softplus.h", "R minus_inverse_of_sum(", 1),
    "log_sigma": ("terms.h", "R log_sigma(R sigma)", 0),
    "log_sigma double": ("terms.h", "R log_sigma(R sigma)", 1),
    "tanh": ("terms.h", "TanhParts<R> tanh_parts(", 0),
    "tanh double": ("terms.h", "TanhParts<R> tanh_parts(", 1),
    "tanh t": ("terms.h", "TanhParts<R> tanh_parts(", 2),
    "tanh t double": ("terms.h", "TanhParts<R> tanh_parts(", 3),
    "tanh correction absolute": ("terms.h", "struct Tanh {", 0),
    "tanh correction double absolute": ("terms.h", "struct Tanh {", 1),
    "tanh correction": ("terms.h", "struct Tanh {", 2),
    "tanh correction double": ("terms.h", "struct Tanh {", 3),
    "tanh slope": ("terms.h", "struct TanhBackward {", 0),
    "tanh slope double": ("terms.h", "struct TanhBackward {", 1),
    "half_excess_of_ratio near 1": ("kl_divergence.h", "R half_excess_of_ratio(", 0),
    "half_excess_of_ratio near 1 double": ("kl_divergence.h", "R half_excess_of_ratio(", 1),
    "half_excess_of_ratio": ("kl_divergence.h", "R half_excess_of_ratio(", 2),
    "half_excess_of_ratio double": ("kl_divergence.h", "R half_excess_of_ratio(", 3),
    "prior by sigma": ("terms.h", "struct PriorTerm {", 0),
    "prior by sigma double": ("terms.h", "struct PriorTerm {", 1),
    "prior by log_var": ("terms.h", "struct PriorTerm {", 2),
    "prior by log_var double": ("terms.h", "struct PriorTerm {", 3),
}


def stated_error(header: str, function: str, which: int) -> float:
    """A figure of the last comment above the function that says 'Max error'."""
    text = (ROOT / "csrc" / "common" / header).read_text()
    before = text[: text.index(function)]
    sentence = before[before.rindex("Max error") :].split("template")[0]
    figures = re.findall(r"(?<![\w^])\d+(?:\.\d+)?(?:e-\d+)?(?=\s+ULP|\s+absolute)", sentence)
    return float(figures[which])


def compiled(compiler: str, binary: Path, *flags: str) -> Path:
    source = ROOT / "tests" / "cpp" / "numerics.cpp"
    common = ["-O2", "-std=c++17", "-ffp-contract=off", "-pthread", "-w"]
    subprocess.run([compiler, *common, *flags, str(source), "-o", str(binary)], check=True)
    return binary


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    return compiled(COMPILER, tmp_path_factory.mktemp("cpp") / "numerics", "-march=native")


def check_all(program: Path, stride: int) -> None:
    output = subprocess.run([program, str(stride)], capture_output=True, text=True, check=True)
    results = dict(line.rsplit(" ", 1) for line in output.stdout.splitlines())
    print(output.stdout)
    assert set(STATED) < set(results)
    for name, text in results.items():
        if name == "root, wrong":
            limit = 2.0  # as root.h says
        else:
            limit = 0.0 if name.startswith("differ") else stated_error(*STATED[name])
        assert float(text) <= limit, f"{name}: {text}, stated: {limit}"


def test_one_in_a_thousand_inputs(program: Path) -> None:
    check_all(program, 1021)


@pytest.mark.slow
def test_all_inputs(program: Path) -> None:
    """Some minutes on 2 cores."""
    check_all(program, 1)


def excess_of_ratio(x: Tensor, prior: float) -> Tensor:
    s, t = x.abs(), torch.full_like(x, prior)
    return reference.half_excess_of_ratio(s, t, reference.over_one(s, t))


# What tests/cpp/numerics.cpp writes the values of, in its order. The last is what tanh adds to a
# log-density.
OF_A_SCALE: list[Callable[[Tensor], Tensor]] = [
    lambda x: reference.sigma(x, 0.5, 2.0),
    reference.softplus,
    reference.sigmoid,
    reference.half_excess_of_sigma,
    reference.half_excess_slope,
    reference.log_sigma,
    lambda x: excess_of_ratio(x, 1.0),
    lambda x: excess_of_ratio(x, torch.finfo(x.dtype).max),
    lambda x: reference.tanh_parts(x).tanh,
    lambda x: reference._tanh_backward(torch.ones_like(x), x, torch.zeros_like(x)),
    lambda x: reference._tanh_log_prob(x, torch.zeros_like(x)),
]


def arguments(dtype: torch.dtype) -> Tensor:
    """Of every magnitude, and many about those where a function changes its ways."""
    tiny = torch.finfo(dtype).tiny
    edges = [0.0, tiny, 0.5**0.5, 0.5, 1.0, 2**0.5, 2.0, 88.0, 104.0, 709.0, 745.0, math.inf]
    bits = torch.tensor(edges, dtype=dtype).view(BITS[dtype]).unsqueeze(-1)
    near = (bits + torch.arange(-200, 200)).to(BITS[dtype]).flatten().view(dtype)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (200_000,), generator=generator)
    spread = torch.randn(200_000, generator=generator, dtype=dtype) * 100
    return torch.cat([words.view(dtype), spread, near, -near])


def values(program: Path, x: Tensor) -> Tensor:
    """Those that csrc gives, a row a function."""
    name = str(x.dtype).removeprefix("torch.")
    done = subprocess.run(
        [program, name], input=x.numpy().tobytes(), capture_output=True, check=True
    )
    out = torch.frombuffer(bytearray(done.stdout), dtype=x.dtype)
    return out.view(len(OF_A_SCALE), len(x))


def test_reference_gives_the_bits_of_csrc(program: Path) -> None:
    x = arguments(torch.float32)
    for function, expected in zip(OF_A_SCALE, values(program, x), strict=True):
        got = function(x)
        wrong = (got.view(torch.int32) != expected.view(torch.int32)) & ~(
            got.isnan() & expected.isnan()
        )
        assert not wrong.any(), (function, x[wrong], got[wrong], expected[wrong])


def test_reference_in_float64_is_near_csrc(program: Path) -> None:
    x = arguments(torch.float64)
    for function, expected in zip(OF_A_SCALE, values(program, x), strict=True):
        atol = 2e-15 if function is OF_A_SCALE[-1] else 1e-323
        torch.testing.assert_close(function(x), expected, rtol=2e-15, atol=atol, equal_nan=True)


@pytest.mark.parametrize("row", data_rows("philox4x32_10.txt"))
def test_philox_known_answers(program: Path, row: list[int]) -> None:
    words = [f"{w:08x}" for w in row]
    output = subprocess.run([program, *words[:6]], capture_output=True, text=True, check=True)
    assert output.stdout.split() == words[6:]


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_lane_types_of_aarch64(tmp_path: Path) -> None:
    """One in ten thousand inputs, under emulation: test_aarch64.py has the kernels themselves."""
    arm = compiled("aarch64-linux-gnu-g++", tmp_path / "numerics", "-static")
    command = ["qemu-aarch64", str(arm), "lanes", "10007"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.count("differ: ") == 55
    assert re.findall(r".*: .* (?!0$)\S+$", output, re.M) == []
