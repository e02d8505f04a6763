"""What is compiled, or the reasons why it is not there and what would bring it.

Three files of this package, of which each may be missing: the library of the ops, which takes
nothing of Python; `_C`, the short way to it for plain calls, a module for every Python with a
GIL; and the CUDA kernels, which are data, and are loaded with the first tensor on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import struct
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import torch

_PACKAGE = Path(__file__).parent
LIBRARY = _PACKAGE / ("libreparam_fused.dll" if sys.platform == "win32" else "libreparam_fused.so")
KERNELS = _PACKAGE / "kernels.fatbin"
# Written by setup.py
BUILT_WITH = _PACKAGE / "built_with.txt"


def _load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, whose kernels torch has from now on, or None and the reason."""
    if not LIBRARY.is_file():
        return None, "where it was installed, no C++ compiler was found"
    try:
        return ctypes.CDLL(str(LIBRARY)), ""
    except OSError as error:
        built_with = "another torch"
        with suppress(OSError):
            built_with = f"torch {BUILT_WITH.read_text().strip()}"
        return None, (
            f"it was built with {built_with}, and does not load with torch "
            f"{torch.__version__}: {error}"
        )


def _load_module() -> ModuleType | None:
    """The module, connected to the library; the ops do without it."""
    if library is None:
        return None
    try:
        module = import_module("._C", __package__)
    except ImportError:
        return None
    library.reparam_fused_library.restype = ctypes.c_void_p
    module.connect(library.reparam_fused_library())
    return module


# The one switch between the kernels for GPUs
gpu_choice = os.environ.get("REPARAM_FUSED_GPU", "")
if gpu_choice not in ("", "cuda", "triton"):
    raise ValueError(f"REPARAM_FUSED_GPU must be cuda or triton, got '{gpu_choice}'")
library, missing_reason = _load_library()
module = _load_module()

if gpu_choice == "triton":
    cuda_missing_reason = "REPARAM_FUSED_GPU=triton"
elif library is None:
    cuda_missing_reason = f"the C++ library is missing: {missing_reason}"
elif not KERNELS.is_file():
    cuda_missing_reason = "where it was installed, no nvcc was found"
else:
    cuda_missing_reason = ""
has_cuda = not cuda_missing_reason
# Imported with the first tensor on a GPU: it takes longer than the rest of the package.
has_triton = gpu_choice != "cuda" and find_spec("triton") is not None

if library is not None:
    library.reparam_fused_isa.restype = ctypes.c_char_p
    library.reparam_fused_cuda_refusal.restype = ctypes.c_char_p
    library.reparam_fused_use_cuda_image(os.fsencode(KERNELS), cuda_missing_reason.encode())


def isa() -> str:
    """The instruction set of the library's kernels for CPUs."""
    assert library is not None
    error = ctypes.c_char_p()
    name = library.reparam_fused_isa(ctypes.byref(error))
    if name is None:
        raise RuntimeError((error.value or b"").decode())
    return str(name.decode())


def cuda_refusals() -> dict[int, str]:
    """Why the CUDA kernels do not serve a device, of those devices that have had a tensor."""
    if library is None or not has_cuda or not torch.cuda.is_initialized():
        return {}
    reasons = {d: library.reparam_fused_cuda_refusal(d) for d in range(torch.cuda.device_count())}
    return {device: reason.decode() for device, reason in reasons.items() if reason}


def serves_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels, and not Triton's, serve a GPU that has had a tensor."""
    return has_cuda and (device.index or 0) not in cuda_refusals()


def cuda_archs() -> list[str]:
    """The compute capabilities with machine code in the file of kernels, as "9.0".

    Each part of a fat binary has a header: of its kind (2 is machine code), of the lengths of
    this header and of what follows, and, 12 bytes on, of the capability.
    """
    content = KERNELS.read_bytes()
    archs, at = [], struct.unpack_from("<H", content, 6)[0]
    while at < len(content):
        kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
        arch = struct.unpack_from("<I", content, at + 28)[0]
        if kind == 2:
            archs.append(f"{arch // 10}.{arch % 10}")
        at += header + size
    return archs


def _source(package: Path) -> str:
    """What this package was installed from, as pip takes it; '' where there is no record of it."""
    if (package.parent / "setup.py").is_file():
        return str(package.parent)  # a checkout, installed in place
    for record in package.parent.glob("reparam_fused-*.dist-info/direct_url.json"):
        with suppress(OSError, ValueError, KeyError):
            content = json.loads(record.read_text())
            url: str = content["url"]
            if "vcs_info" in content:
                return f"{content['vcs_info']['vcs']}+{url}@{content['vcs_info']['commit_id']}"
            if "dir_info" in content:
                from urllib.request import url2pathname  # takes 15 ms

                folder = Path(url2pathname(urlsplit(url).path))
                return str(folder) if folder.is_dir() else ""
            return "" if url.endswith(".whl") else url
    return ""


def reinstall(package: Path = _PACKAGE) -> str:
    """How to build again. Not by the name of the package, which no index has of us."""
    command = "pip install --force-reinstall --no-deps"
    if source := _source(package):
        return f"build it again: {command} {shlex.quote(source)}"
    return f"build it again, in the root of a checkout of its source: {command} ."


def how_to_build() -> str:
    """What brings the library."""
    if LIBRARY.is_file():  # for another torch, by a compiler that was there
        return reinstall()
    return f"install a C++17 compiler (Debian: apt-get install g++) and ninja, then {reinstall()}"


def how_to_build_cuda() -> str:
    """What brings the CUDA kernels."""
    if gpu_choice == "triton":
        return "unset REPARAM_FUSED_GPU"
    if library is None:
        return how_to_build()
    return f"install the CUDA toolkit, then {reinstall()}"


@functools.cache
def warn_reference(device_type: str) -> None:
    """Say once for each kind of device that its tensors are served by reference.py."""
    if device_type == "cpu":
        warnings.warn(
            "reparam_fused runs on its slow reference path: the C++ library is missing "
            f"({missing_reason}). To get it, {how_to_build()}",
            stacklevel=2,
        )
    elif device_type == "cuda":
        reasons = cuda_missing_reason or "; ".join(sorted(set(cuda_refusals().values())))
        warnings.warn(
            "reparam_fused runs on its slow reference path: triton is missing, and the CUDA "
            f"kernels cannot be used ({reasons}). Run: pip install triton",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"reparam_fused has no kernel for {device_type} tensors, and runs on its slow "
            "reference path",
            stacklevel=2,
        )
