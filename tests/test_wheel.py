"""What a wheel and an sdist hold, and what they need of the machine where they are installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import needs_kernels
from installing import ROOT, copy_sources, failing_compiler, run

import reparam_fused
from reparam_fused import _extensions

PACKAGE = Path(reparam_fused.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("*.so"))

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
    assert LIBRARIES
    for library in LIBRARIES:
        listed = subprocess.run(
            ["readelf", "--version-info", "--wide", str(library)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        wanted = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", listed)
        assert "GLIBC" in dict(wanted)
        for name, version in wanted:
            assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"


def symbols(library: Path, which: str, kinds: str) -> set[str]:
    """Those of these kinds, as nm names them; with versions, where they have one."""
    listed = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split()[-2:] for line in listed.splitlines()]
    return {name for kind, name in lines if kind in kinds}


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="how ELF names what it wants")
def test_what_is_asked_of_other_libraries() -> None:
    """The stable shims of libtorch_cpu, libc and libstdc++, whose symbols have versions: nothing of
    any other part of torch, and of CUDA nothing. Of Python only by _C (abi3audit in make wheel)."""
    names = [path.name.partition(".")[0] for path in LIBRARIES]
    assert names in (["_C", "libreparam_fused"], ["libreparam_fused"])
    for library in LIBRARIES:
        wanted = symbols(library, "--undefined-only", "U")
        of_the_system = {n for n in wanted if re.search("@(GLIBC|GLIBCXX|CXXABI|GCC)_", n)}
        torch = {n for n in wanted if re.match(r"aoti_torch_|torch_[a-z]", n)}
        python = {n for n in wanted if re.match("_?Py", n)}
        assert torch
        assert bool(python) == library.name.startswith("_C")
        assert wanted == of_the_system | torch | python
        dynamic = subprocess.run(
            ["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True
        ).stdout
        needed = {re.sub(r"[-.].*", "", name) for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
        assert needed - {"libstdc++", "libm", "libgcc_s", "libc", "ld"} == {"libtorch_cpu"}


@needs_kernels
def test_what_is_given_to_others() -> None:
    """A few names of C, so that nothing of another library's can be taken for something here."""
    given = {p.name.partition(".")[0]: symbols(p, "--defined-only", "TDBR") for p in LIBRARIES}
    assert given["libreparam_fused"] == {
        "reparam_fused_isa",
        "reparam_fused_library",
        "reparam_fused_use_cuda_image",
        "reparam_fused_cuda_refusal",
    }
    assert given.get("_C", {"PyInit__C"}) == {"PyInit__C"}


@needs_kernels
def test_how_large_it_is() -> None:
    """Compressed, as in a wheel: 5 MB with the CUDA kernels, 1.5 MB without."""

    def compressed(paths: list[Path]) -> int:
        done = subprocess.run(["gzip", "-c", *map(str, paths)], capture_output=True, check=True)
        return len(done.stdout)

    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".so")]
    assert compressed(files) < 1_500_000
    if _extensions.KERNELS.is_file():
        assert compressed([*files, _extensions.KERNELS]) < 5_000_000


@needs_kernels
def test_without_the_module_the_ops_serve(tmp_path: Path) -> None:
    """As in a wheel of py3-none, under another name, which is where Hugging Face's kernels are."""
    copy = tmp_path / "of_a_hub"
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(PACKAGE, copy, ignore=ignored)
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, of_a_hub as r
x = torch.linspace(-2, 2, 99, requires_grad=True)
z = r.fused_reparameterize(x, x, key=r.key(42))
z.sum().backward()
torch.manual_seed(3)
print(r._extensions.module, r.backends()["cpu"])
print(*torch.stack([z, x.grad, r.fused_reparameterize(x, x)]).detach().flatten().tolist())
print(r.split(r.key(1), 2).tolist())
"""
    expected = program.replace("of_a_hub as r", "reparam_fused as r")
    alone, whole = (
        run(sys.executable, "-c", p, tmp_path, cwd=tmp_path) for p in (program, expected)
    )
    assert alone.stdout.startswith("None C++ kernels"), alone.stdout
    assert alone.stdout.splitlines()[1:] == whole.stdout.splitlines()[1:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the sources, as `python -m build` makes it in an environment that has them."""
    source = copy_sources(tmp_path_factory.mktemp("sdist") / "source")
    made = run(
        sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')",
        cwd=source,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (archive,) = source.glob("dist/*.tar.gz")
    return archive


def test_the_sdist_has_every_source_and_nothing_that_is_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [
        path for folder in ("csrc", "reparam_fused") for path in (ROOT / folder).rglob("*.*")
    ]
    built = {".so", ".fatbin", ".pyc"}

    def is_built(path: Path) -> bool:
        return path.suffix in built or path.name == "built_with.txt"

    expected = {path.relative_to(ROOT).as_posix() for path in sources if not is_built(path)}
    assert expected - held == set()
    assert not [name for name in held if is_built(Path(name))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["there", "hidden", "broken"])
def test_the_sdist_in_an_environment_of_another_torch(
    sdist: Path, other_torch: Path, tmp_path: Path, compiler: str
) -> None:
    """A fresh one: it is installed there, and the quick part of the tests passes."""
    broken = failing_compiler(tmp_path)
    variables = {"hidden": {"CXX": "none"}, "broken": {"CXX": str(broken)}}.get(compiler, {})
    python = other_torch / "bin" / "python"
    path = os.pathsep.join([str(other_torch / "bin"), os.environ["PATH"]])
    installed = run(
        python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--force-reinstall",
        sdist, PATH=path, REPARAM_FUSED_REQUIRE_EXT="", FORCE_CUDA="", CUDA_HOME="/nonexistent",
        cwd=tmp_path, **variables,
    )  # fmt: skip
    if compiler == "broken":
        assert installed.returncode != 0
        assert f"no space for {broken}" in installed.stderr
        return
    assert installed.returncode == 0, installed.stderr
    tests = shutil.copytree(ROOT / "tests", tmp_path / "tests")
    quick = ["test_functional.py", "test_reference.py", "test_std.py", "test_validation.py"]
    done = run(python, "-m", "pytest", "-q", *quick, cwd=tests, PATH=path)
    assert done.returncode == 0, done.stdout
    named = run(python, "-c", "import reparam_fused as r; print(r.backends()['cpu'])", cwd=tmp_path)
    assert named.stdout.startswith("missing (" if compiler == "hidden" else "C++ kernels")


@pytest.fixture(scope="module")
def other_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", folder, cwd=folder).returncode == 0
    needed = ("setuptools>=77", "wheel", "ninja", "numpy", "pytest", "hypothesis", "expecttest")
    pip = (folder / "bin" / "python", "-m", "pip", "install", "-q")
    made = run(*pip, "torch==2.13.0", *needed, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder
