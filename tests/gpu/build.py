"""Builds the stand-in's two libraries, in seconds, once for a state of its sources."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("device.h", "device.cpp", "driver.cpp", "runtime.cpp", "build.py")


class Unavailable(Exception):
    """Why there can be no stand-in GPU here."""


def _torch_folder() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    folder = Path(spec.origin).parent
    if not (folder / "lib" / "libtorch_cuda.so").is_file():
        raise Unavailable("torch is a build without CUDA")
    return folder


def _toolkit() -> Path:
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        raise Unavailable("no nvcc or no g++ was found")
    # What is on the PATH may be a wrapper: nvcc itself knows where its toolkit is.
    dry_run = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"TOP=(.+)", dry_run.stderr)
    if found is None:
        raise Unavailable("nvcc does not say where its toolkit is")
    return Path(found[1].strip()).resolve()


def _nm(library: Path, which: str) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines()}


def _unknown(torch: Path, built: Path) -> str:
    """A function for each that torch imports of the runtime and runtime.cpp does not have."""
    wanted: set[str] = set()
    libraries = [*(torch / "lib").glob("*.so"), *torch.parent.glob("nvidia/nvshmem/lib/*.so*")]
    for library in libraries:
        wanted |= {s for s in _nm(library, "--undefined-only") if re.match("_*cuda[A-Z]", s)}
    missing = sorted(wanted - _nm(built, "--defined-only"))
    lines = ['extern "C" int stand_in_unknown(const char*);']
    lines += [
        f'extern "C" __attribute__((visibility("default"))) int {name}() '
        f'{{ return stand_in_unknown("{name}"); }}'
        for name in missing
    ]
    return "\n".join(lines) + "\n"


def build(old_driver: bool) -> Path:
    """The folder of libcudart and libcuda."""
    torch, toolkit = _torch_folder(), _toolkit()
    try:
        release = version("torch")
    except PackageNotFoundError:
        raise Unavailable("torch does not say its version") from None
    text = b"".join((HERE / name).read_bytes() for name in SOURCES)
    digest = hashlib.sha256(
        text + f"{release} {torch} {toolkit} {old_driver}".encode()
    ).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"reparam_fused-stand-in-{os.getuid()}-{digest}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as made:
        _compile(torch, toolkit, Path(made), old_driver)
        with contextlib.suppress(FileExistsError):  # another process was as fast
            shutil.copytree(made, folder)
    return folder


def _compile(torch: Path, toolkit: Path, folder: Path, old_driver: bool) -> None:
    def gcc(*arguments: str | Path) -> None:
        command = ["g++", "-std=c++17", "-O1", "-fPIC", f"-I{toolkit / 'include'}"]
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"the stand-in GPU cannot be built:\n{done.stderr}")

    driver = folder / "libcuda.so.1"
    gcc(
        "-shared", "-Wl,-soname,libcuda.so.1", "-o", driver,
        HERE / "device.cpp", HERE / "driver.cpp", "-ldl", *(["-DOLD_DRIVER"] if old_driver else []),
    )  # fmt: skip
    runtime = sorted((torch.parent / "nvidia").glob("*/lib/libcudart.so.*"))
    if not runtime:
        raise Unavailable("torch's libcudart was not found")
    name = runtime[0].name
    # torch asks for its symbols by this version
    (folder / "version").write_text(f"{name} {{ global: cuda*; __cuda*; stand_in_*; local: *; }};")
    gcc("-c", "-o", folder / "runtime.o", HERE / "runtime.cpp")
    link = ("-shared", f"-Wl,-soname,{name}", f"-Wl,--version-script={folder / 'version'}")
    link += ("-Wl,-rpath,$ORIGIN", "-o", folder / name, folder / "runtime.o", driver, "-ldl")
    gcc(*link)
    (folder / "unknown.cpp").write_text(_unknown(torch, folder / name))
    gcc(*link, folder / "unknown.cpp")
    for left in ("version", "runtime.o"):
        (folder / left).unlink()
