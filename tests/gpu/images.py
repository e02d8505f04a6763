"""From what a driver is given to load to the kernels that the interpreter runs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ptx import Kernel, Module

_FAT_BINARY = 0xBA55ED50


class ImageError(Exception):
    """Why an image cannot be run; `status` is CUDA's number for it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _cuobjdump() -> str:
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = shutil.which("cuobjdump")
    if found is None:
        raise ImageError(801, "there is no cuobjdump, which comes with triton")
    return found


@dataclass
class Image:
    """The PTX of an image, by the capability it is for; and where it has machine code."""

    texts: dict[int, str]
    binaries: set[int]

    def ptx_for(self, capability: int) -> str | None:
        """What a device of this capability would run, as PTX; None if it has no image."""
        compiled = {a for a in self.binaries if a // 10 == capability // 10 and a <= capability}
        newest = [a for a in self.texts if a <= capability]
        if not compiled and not newest:
            return None
        # The interpreter needs PTX, even where a GPU would run the machine code.
        return self.texts[max(newest)] if newest else self.texts[min(self.texts)]


@functools.cache  # it lies in a library, which is never unloaded
def _read_fat_binary(address: int) -> Image:
    _, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    content = ctypes.string_at(address, header + size)
    return _dump(hashlib.sha256(content).hexdigest(), content)


def _dump(digest: str, content: bytes) -> Image:
    """What cuobjdump says of a fat binary; kept between processes, for it takes a second."""
    folder = Path(tempfile.gettempdir()) / f"reparam_fused-images-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    kept = folder / digest
    if not kept.is_file():
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LD_")}
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / "image.fatbin"
            path.write_bytes(content)
            said = [
                subprocess.run(
                    [_cuobjdump(), option, str(path)],
                    capture_output=True, text=True, env=environment, check=False,
                ).stdout
                for option in ("-lelf", "-ptx")
            ]  # fmt: skip
            (Path(made) / "kept").write_text("\n".join(said))
            shutil.move(Path(made) / "kept", kept)
    text = kept.read_text()
    binaries = {int(m[1]) for m in re.finditer(r"\.sm_(\d+)\w*\.cubin", text)}
    texts: dict[int, str] = {}
    for part in re.split(r"^Fatbin ptx code:$", text, flags=re.M)[1:]:
        arch = re.search(r"^arch = sm_(\d+)", part, re.M)
        start = part.find(".version")
        if arch is not None and start >= 0:
            end = part.rfind("}") + 1
            texts[int(arch[1])] = part[start:end]
    return Image(texts, binaries)


def _read_cubin(address: int) -> Image:
    """Triton keeps the PTX beside the machine code in its cache."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    for path in cache.rglob("*.cubin"):
        try:
            code = path.read_bytes()
            if ctypes.string_at(address, min(len(code), 64)) != code[:64] or (
                ctypes.string_at(address, len(code)) != code
            ):
                continue
            text = path.with_suffix(".ptx").read_text()
        except FileNotFoundError:
            continue  # another process has it on its way into the cache, each file by itself
        arch = re.search(r"\.target sm_(\d+)", text)
        assert arch is not None, path
        return Image({int(arch[1]): text}, set())
    raise ImageError(801, "the image is machine code that is not Triton's")


def _image(address: int) -> Image:
    start = ctypes.string_at(address, 4)
    if start == struct.pack("<I", _FAT_BINARY):
        return _read_fat_binary(address)
    if start == b"\x7fELF":
        return _read_cubin(address)
    if start[:2] == b"//" or start == b".ver":  # PTX, which a driver compiles
        text = ctypes.string_at(address).decode()
        arch = re.search(r"\.target sm_(\d+)", text)
        if arch is not None:
            return Image({int(arch[1]): text}, set())
    raise ImageError(200, "the image is neither a fat binary nor PTX nor machine code")


def kernel_of(address: int, name: str, capability: int) -> Kernel:
    """The kernel of this name in the image at this address."""
    text = _image(address).ptx_for(capability)
    if text is None:
        raise ImageError(209, f"{name} has no image for a device of {capability / 10}")
    return kernel_in(text, name)


@functools.lru_cache(maxsize=4096)
def kernel_in(text: str, name: str) -> Kernel:
    """The kernel of this name in a module's PTX."""
    # The other kernels of the module need not be parsed, what it declares before them does.
    header, *kernels = re.split(r"^(?=\.visible \.entry)", text, flags=re.M)
    for kernel in kernels:
        if kernel.startswith(f".visible .entry {name}("):
            return Module.parse(header + kernel).kernels[name]
    raise ImageError(500, f"no kernel {name} in the image")
