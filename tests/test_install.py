"""What a user meets on installing: with a compiler, without one, and on import."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_kernels
from installing import ROOT, copy_sources, failing_compiler, path_without_compilers, run, script

import reparam_fused
from reparam_fused import _extensions

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


def install(source: Path, target: Path, folder: Path, **environment: str) -> str:
    """What pip says of an install of these sources without the machine's compilers."""
    folder.mkdir()
    done = run(
        sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps",
        "--target", str(target), str(source),
        cwd=source, PATH=path_without_compilers(folder),
        **{"CUDA_HOME": str(folder), "REPARAM_FUSED_REQUIRE_EXT": "", "FORCE_CUDA": ""}
        | environment,
    )  # fmt: skip
    return f"{done.returncode}\n{done.stdout}\n{done.stderr}"


def test_install_without_a_compiler(tmp_path: Path) -> None:
    """It still installs, works, and says once what is missing and how to get it."""
    source, target = copy_sources(tmp_path / "source"), tmp_path / "site"
    said = install(source, target, tmp_path / "bin", CXX="none")
    assert said.startswith("0\n"), said
    assert "the libraries of reparam_fused were left out: no C++ compiler was found" in said
    assert "the CUDA kernels of reparam_fused were left out: no nvcc was found" in said
    assert not [*target.rglob("*.so"), *target.rglob("*.fatbin")]
    used = run(sys.executable, "-c", USE_IT, cwd=tmp_path / "bin", PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    count, warning, backend, cuda, bits = used.stdout.splitlines()
    assert count == "1"
    assert "the C++ library is missing (where it was installed, no C++ compiler was" in warning
    assert "install a C++17 compiler" in warning
    # The folder that pip took it from, and not a name on an index, which may be anybody's.
    for hint in (warning, backend, cuda):
        assert hint.endswith(f"pip install --force-reinstall --no-deps {source}"), hint
    assert backend.startswith("missing (where it was installed, no C++ compiler was found)")
    assert cuda.startswith("missing (the C++ library is missing: where it was installed, no C++")
    zero = torch.zeros(9)
    z = reparam_fused.fused_reparameterize(zero, zero, key=reparam_fused.key(42))
    assert bits == str(z.view(torch.int32).tolist())


@pytest.mark.parametrize("built_with", ["2.99.0+cu999", None])
def test_a_library_that_does_not_load(tmp_path: Path, built_with: str | None) -> None:
    """The message says which torch it was built with and which there is, and what the loader says.
    Red where it asks for a compiler, which was there."""
    source = copy_sources(tmp_path / "source")
    (source / "reparam_fused" / _extensions.LIBRARY.name).write_text("not a library")
    if built_with is not None:
        (source / "reparam_fused" / "built_with.txt").write_text(f"{built_with}\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    used = run(sys.executable, "-c", USE_IT, cwd=folder, PYTHONPATH=str(source))
    assert used.returncode == 0, used.stderr
    count, warning, backend, cuda, _ = used.stdout.splitlines()
    assert count == "1"
    for said in (warning, backend, cuda):
        assert f"was built with {f'torch {built_with}' if built_with else 'another torch'}" in said
        assert f"and does not load with torch {torch.__version__}: " in said
        assert _extensions.LIBRARY.name in said.partition(torch.__version__)[2]  # the loader's
        assert "compiler" not in said
        assert "toolkit" not in said
        assert said.endswith(f"pip install --force-reinstall --no-deps {source}")


DIRECT_URLS = {
    "folder": ('{"url": "file://ROOT/my%20source", "dir_info": {}}', "'ROOT/my source'"),
    "git": (
        '{"url": "https://example.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}}',
        "git+https://example.org/a.git@0a1b",
    ),
    "sdist": (
        '{"url": "https://example.org/a-0.1.tar.gz", "archive_info": {}}',
        "https://example.org/a-0.1.tar.gz",
    ),
    # What was built elsewhere would be so again.
    "wheel": ('{"url": "file:///tmp/a-0.1-cp310-abi3-linux_x86_64.whl", "archive_info": {}}', "."),
    "gone": ('{"url": "file://ROOT/gone", "dir_info": {}}', "."),
    "none": (None, "."),
    "no JSON": ("{", "."),
}


@pytest.mark.parametrize("kind", DIRECT_URLS)
def test_the_source_that_an_install_came_from(tmp_path: Path, kind: str) -> None:
    """By the record of the install. Red where a hint names an index's package, or a lost folder."""
    record, expected = DIRECT_URLS[kind]
    (tmp_path / "my source").mkdir()
    package, info = tmp_path / "reparam_fused", tmp_path / "reparam_fused-0.1.0.dist-info"
    package.mkdir()
    info.mkdir()
    if record is not None:
        (info / "direct_url.json").write_text(record.replace("ROOT", str(tmp_path)))
    hint = _extensions.reinstall(package)
    command = f"pip install --force-reinstall --no-deps {expected}"
    assert hint.endswith(command.replace("ROOT", str(tmp_path)))
    assert ("in the root of a checkout" in hint) == (expected == ".")
    (tmp_path / "setup.py").touch()  # a checkout
    assert _extensions.reinstall(package).endswith(f"--no-deps {tmp_path}")


def test_no_hint_names_a_package_that_anybody_may_own() -> None:
    """reparam_fused is on no index: a command that ends there would fetch somebody else's."""
    for path in Path(reparam_fused.__path__[0]).rglob("*.py"):
        assert not re.search(r"pip install [^\n]*\breparam.fused\b", path.read_text()), path


def test_a_compiler_that_fails_fails_the_install(tmp_path: Path) -> None:
    """In its own words, and nothing is left of it."""
    source, target = copy_sources(tmp_path / "source"), tmp_path / "site"
    compiler = failing_compiler(tmp_path)
    said = install(source, target, tmp_path / "bin", CXX=str(compiler))
    assert not said.startswith("0\n"), said
    assert f"no space for {compiler}" in said
    assert not target.exists()


@needs_kernels
def test_an_nvcc_that_fails_fails_the_install(tmp_path: Path) -> None:
    """It is asked for what it lists of our architectures, with PTX of the oldest of them."""
    source, target = copy_sources(tmp_path / "source"), tmp_path / "site"
    script(
        tmp_path / "cuda" / "bin" / "nvcc",
        'case "$1" in --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90;;'
        ' *) echo "cannot compile $*"; exit 1;; esac',
    )
    said = install(source, target, tmp_path / "bin", CXX="none", CUDA_HOME=str(tmp_path / "cuda"))
    assert not said.startswith("0\n"), said
    (command,) = re.findall(r"^ *cannot compile (.*)$", said, re.M)
    assert re.findall(r"arch=\S+", command) == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_80,code=compute_80",
    ]
    assert not target.exists()


@pytest.mark.parametrize("switch", ["FORCE_CUDA", "REPARAM_FUSED_REQUIRE_EXT"])
def test_what_must_be_built_or_fail(tmp_path: Path, switch: str) -> None:
    """FORCE_CUDA=1 asks for a toolkit, REPARAM_FUSED_REQUIRE_EXT=1 for a compiler."""
    source, target = copy_sources(tmp_path / "source"), tmp_path / "site"
    said = install(source, target, tmp_path / "bin", CXX="none", **{switch: "1"})
    assert not said.startswith("0\n"), said
    name = {"FORCE_CUDA": "CUDA kernels", "REPARAM_FUSED_REQUIRE_EXT": "libraries"}[switch]
    assert f"the {name} of reparam_fused cannot be built: no " in said


def test_backends_names_the_isa() -> None:
    cpu = reparam_fused.backends()["cpu"]
    if _extensions.library is None:
        assert cpu.startswith("missing (")
    else:
        assert cpu in {f"C++ kernels, {isa}" for isa in ("scalar", "avx2", "avx512", "neon")}


def modules() -> list[str]:
    compiled = ("_C", "libreparam_fused", "__main__")
    names = [m.name for m in pkgutil.iter_modules(reparam_fused.__path__) if m.name not in compiled]
    return ["reparam_fused", *(f"reparam_fused.{name}" for name in names)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    if name == "reparam_fused.triton_kernels":
        pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
    # An example that doctest does not see, in a comment or under a wrapper, would pass for one.
    assert (attempted > 0) == (">>> " in inspect.getsource(module))
    for public in getattr(module, "__all__", []):
        assert ">>>" in (getattr(module, public).__doc__ or ""), f"{public} has no example"


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
    assert sum(lines.values()) <= 700, lines


def test_version_is_said_once_more_in_pyproject() -> None:
    assert f'version = "{reparam_fused.__version__}"' in (ROOT / "pyproject.toml").read_text()
