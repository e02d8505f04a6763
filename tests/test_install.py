"""What a user meets on installing: with a compiler, without one, and on import."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reparam_fused
from reparam_fused import _extensions

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "reparam_fused", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def copy_sources(to: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            built = shutil.ignore_patterns("*.so", "__pycache__", "*_missing.txt")
            shutil.copytree(source, to / name, ignore=built)
        else:
            shutil.copy(source, to / name)
    return to


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def path_without_compilers(folder: Path) -> str:
    """A PATH with the few tools that pip needs."""
    for tool in ("uname", "env"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent)])


USE_IT = """
import sys, warnings
# a developer's editable install would find its own _C for the copy under test
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, reparam_fused
    x = torch.zeros(9, requires_grad=True)
    for _ in range(3):
        z = reparam_fused.fused_reparameterize(x, x, key=reparam_fused.key(42))
        z.sum().backward()
ours = [str(w.message) for w in caught if "reparam_fused" in str(w.message)]
print(len(ours))
print(ours[0] if ours else "")
print(reparam_fused.backends()["cpu"])
print(reparam_fused.backends()["cuda"])
print(z.view(torch.int32).tolist())
"""


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_install_without_a_working_compiler(tmp_path: Path, compiler: str) -> None:
    """It still installs, works, and says once what is missing and how to get it."""
    source = copy_sources(tmp_path)
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    if compiler == "broken":
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
    path = path_without_compilers(broken.parent)
    target = tmp_path / "site"
    result = run(
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps",
        "--target", str(target), str(source),
        cwd=tmp_path, PATH=path, CXX=str(broken), CUDA_HOME=str(tmp_path),
        REPARAM_FUSED_REQUIRE_EXT="", FORCE_CUDA="",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not list(target.rglob("*.so"))
    used = run(sys.executable, "-c", USE_IT, cwd=tmp_path / "bin", PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    count, warning, backend, cuda, bits = used.stdout.splitlines()
    assert count == "1"
    assert "C++ extension is missing" in warning
    assert "install a C++17 compiler" in warning
    assert backend.startswith("missing (")
    reason = "no nvcc was found" if torch.version.cuda else "torch is a build without CUDA"
    assert cuda.startswith(f"missing ({reason}")
    zero = torch.zeros(9)
    z = reparam_fused.fused_reparameterize(zero, zero, key=reparam_fused.key(42))
    assert bits == str(z.view(torch.int32).tolist())


@pytest.mark.parametrize("switch", ["FORCE_CUDA", "REPARAM_FUSED_REQUIRE_EXT"])
def test_what_must_be_built_or_fail(tmp_path: Path, switch: str) -> None:
    """FORCE_CUDA=1 asks for a toolkit, REPARAM_FUSED_REQUIRE_EXT=1 for a compiler."""
    source = copy_sources(tmp_path)
    (tmp_path / "bin").mkdir()
    result = run(
        sys.executable, "setup.py", "-q", "build_ext",
        cwd=source, PATH=path_without_compilers(tmp_path / "bin"), CUDA_HOME=str(tmp_path),
        **{"FORCE_CUDA": "", "REPARAM_FUSED_REQUIRE_EXT": "", "CXX": "/none", switch: "1"},
    )  # fmt: skip
    assert result.returncode != 0
    name = {"FORCE_CUDA": "_cuda", "REPARAM_FUSED_REQUIRE_EXT": "_C"}[switch]
    assert f"reparam_fused.{name} cannot be built: " in result.stderr
    left_out = "reparam_fused: reparam_fused._cuda was left out: "
    assert (left_out in result.stderr) == (switch != "FORCE_CUDA")


def test_a_toolkit_of_another_release_is_left_out(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is a build without CUDA")
    source = copy_sources(tmp_path)
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'release 11.8, V11.8.89'\necho '#$ TOP=/x' >&2\n")
    nvcc.chmod(0o755)
    result = run(
        sys.executable, "setup.py", "-q", "build_ext",
        cwd=source, CUDA_HOME=str(tmp_path), FORCE_CUDA="1",
    )  # fmt: skip
    assert result.returncode != 0
    expected = f"nvcc is release 11.8, but torch is built for CUDA {torch.version.cuda}"
    assert expected in result.stderr


# nvcc --list-gpu-arch of CUDA 12.6, 12.8 and 13.0
LISTED = {
    "8.0;8.6;8.9;9.0+PTX": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120",
    "9.0;10.0+PTX": "75 80 86 87 88 89 90 100 110 103 120 121",
}


def test_a_toolkit_builds_what_it_lists() -> None:
    """With PTX for the newest architecture that it knows."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = ("ARCHS", "known_archs")
    wanted = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name in names)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names)
    ]
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), "setup.py", "exec"), scope)
    for expected, numbers in LISTED.items():
        listed = "".join(f"compute_{number}\n" for number in numbers.split())
        archs = "9.0;10.0" if expected.startswith("9.0") else scope["ARCHS"]
        assert scope["known_archs"](archs, listed) == expected


def test_backends_names_the_isa() -> None:
    cpu = reparam_fused.backends()["cpu"]
    if _extensions.cpu is None:
        assert cpu.startswith("missing (")
    else:
        assert cpu in {f"C++ kernels, {isa}" for isa in ("scalar", "avx2", "avx512")}


def modules() -> list[str]:
    compiled = ("_C", "_cuda", "__main__")
    names = [m.name for m in pkgutil.iter_modules(reparam_fused.__path__) if m.name not in compiled]
    return ["reparam_fused", *(f"reparam_fused.{name}" for name in names)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    if name == "reparam_fused.triton_kernels":
        pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
    for public in getattr(module, "__all__", []):
        assert ">>>" in (getattr(module, public).__doc__ or ""), f"{public} has no example"


def test_readme_examples() -> None:
    """The Python of the README runs, and prints what it says."""
    failed, attempted = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert failed == 0
    assert attempted > 0


def test_no_flag_that_gives_up_ieee() -> None:
    """Looked for in the flags and pragmas, not in the prose."""
    text = (ROOT / "setup.py").read_text()
    assert "-ffp-contract=off" in text
    for source in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]:
        assert not re.search(r"-ffast-math|-Ofast|use_fast_math|_MM_SET_FLUSH", source.read_text())


def test_how_much_of_csrc_sees_torch() -> None:
    """What includes torch's headers, by way of others too, is what a new torch may break."""
    sources = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.*")}
    bound = {path for path, text in sources.items() if "#include <torch/" in text}
    assert bound
    while True:
        found = {
            path
            for path, text in sources.items()
            if any(
                (path.parent / name).resolve() in bound
                for name in re.findall(r'#include "(.*)"', text)
            )
        }
        if found <= bound:
            break
        bound |= found
    lines = {path.name: len(sources[path].splitlines()) for path in bound}
    assert sum(lines.values()) <= 500, lines


def test_version_is_said_once_more_in_pyproject() -> None:
    assert f'version = "{reparam_fused.__version__}"' in (ROOT / "pyproject.toml").read_text()
