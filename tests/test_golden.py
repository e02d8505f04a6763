"""data/golden_N.json: every backend gives what the contract's version has written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from helpers import DTYPES, FORMS, needs_kernels, patience

from reparam_fused import _extensions

ISAS = ("scalar", "avx2", "avx512", "neon")


def compare(device: torch.device, dtype: torch.dtype, form: str) -> None:
    written = golden.read()
    found = golden.outputs(device, [dtype], [form])
    assert golden.differences(found, written) == []
    assert set(found) <= set(written)


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_as_it_was_written(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Red where one bit of a call differs: the noise, a sample, a gradient, a sum, a key, a draw of
    a generator; and where one is missing from the file."""
    by_triton = device.type == "cuda" and not _extensions.serves_cuda(device)
    if by_triton and (form, dtype) != ("log_var", torch.bfloat16):
        pytest.skip("Triton compiles for minutes: the others with -m slow")
    compare(device, dtype, form)


@pytest.mark.slow
def test_every_output_by_triton(cuda: torch.device) -> None:
    if _extensions.serves_cuda(cuda):
        pytest.skip("the CUDA kernels serve this GPU")
    for dtype in DTYPES:
        for form in FORMS:
            compare(cuda, dtype, form)


def test_every_output_that_is_written_is_looked_at() -> None:
    """Of all dtypes at once."""
    assert set(golden.outputs()) == set(golden.read())


@needs_kernels
def test_by_every_instruction_set() -> None:
    """Red where one of them differs from the file, or where none is looked at."""
    compared = []
    for isa in ISAS:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", golden.__file__],
            env={**os.environ, "REPARAM_FUSED_ISA": isa},
            capture_output=True,
            text=True,
            timeout=patience(600),
        )
        if "REPARAM_FUSED_ISA is" in done.stderr:  # this CPU lacks it
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"C++ kernels, {isa}: {len(golden.read())} compared\n"
        compared.append(isa)
    assert "scalar" in compared


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(golden, "path", lambda contract=1: tmp_path / f"golden_{contract}.json")
    return tmp_path


OUTPUTS = {
    "key": torch.tensor([2**64 - 1, 3], dtype=torch.uint64),
    "half": torch.tensor([-1.5, 65504.0], dtype=torch.float16),
    "brain": torch.tensor([-1.5, torch.nan], dtype=torch.bfloat16),
    "single": torch.tensor([0.1, -0.0]),
    "double": torch.tensor([0.1, 1000.0], dtype=torch.float64),
}


def changed(name: str) -> dict[str, torch.Tensor]:
    """By a unit of the last place, the sign of a zero among them; in float64 by a hundred."""
    value = OUTPUTS[name]
    if value.dtype == torch.float64:
        other = value * (1 + 3e-13)
    else:
        bits = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
        other = (bits ^ torch.tensor([1, 0], dtype=bits.dtype)).view(value.dtype)
    return {**OUTPUTS, name: other}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_written_does_not_change(data: Path, name: str) -> None:
    """Red where --write takes another value for one that it has, or forgets one, or where a
    comparison does not see a bit."""
    assert golden.write(OUTPUTS) == len(OUTPUTS)
    before = (data / "golden_1.json").read_text()
    assert golden.differences(OUTPUTS, golden.read()) == []
    fewer = {key: value for key, value in OUTPUTS.items() if key != name}
    for others in (changed(name), fewer):
        with pytest.raises(SystemExit, match=rf"(?s)CONTRACT.*{name}"):
            golden.write(others)
    assert len(golden.differences(changed(name), golden.read())) == 1
    assert (data / "golden_1.json").read_text() == before
    # Under the next version of the contract it is another file's.
    assert golden.write(changed(name), 2) == len(OUTPUTS)
    assert (data / "golden_1.json").read_text() == before
    assert golden.differences(changed(name), golden.read(2)) == []


def test_what_comes_anew_is_added(data: Path) -> None:
    """To the last digits of float64 that are there, which another machine may not have."""
    golden.write(OUTPUTS)
    before = golden.read()
    near = {**OUTPUTS, "double": OUTPUTS["double"] * (1 + 1e-15), "new": torch.ones(2)}
    assert golden.write(near) == 1
    assert golden.read() == {**before, "new": "3f800000 3f800000"}
