"""The ULPs that csrc/common states, over all inputs where 2^32 is all; and lanes against lanes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_reference import data_rows

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

# Result of tests/cpp/numerics.cpp -> header, function, and which of its figures
STATED = {
    "radius": ("normal.h", "typename V::F radius(", 0),
    "uniform": ("normal.h", "typename V::F uniform(", 0),
    "half_turn sin": ("normal.h", "typename V::U half_turn(", 0),
    "half_turn cos absolute": ("normal.h", "typename V::U half_turn(", 1),
    "sigma": ("reparam.h", "typename V::F sigma(", 0),
    "uniform double": ("normal.h", "typename V::D uniform(", 0),
    "radius double": ("normal.h", "typename V::D radius(", 0),
    "half_turn double sin": ("normal.h", "typename V::D half_turn(", 0),
    "half_turn double cos absolute": ("normal.h", "typename V::D half_turn(", 1),
    "sigma double": ("reparam.h", "typename V::D sigma(", 0),
    "half_excess": ("kl_divergence.h", "R half_excess(", 0),
    "half_excess double": ("kl_divergence.h", "R half_excess(", 1),
    "half_expm1": ("kl_divergence.h", "R half_expm1(", 0),
    "half_expm1 double": ("kl_divergence.h", "R half_expm1(", 1),
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
    assert output.count("differ: ") == 14
    assert re.findall(r".*: .* (?!0$)\S+$", output, re.M) == []
