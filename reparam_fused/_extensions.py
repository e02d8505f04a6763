"""What is compiled, or the reasons why it is not there and what would bring it.

Three files of this package, of which each may be missing: the library of the ops, which takes
nothing of Python; `_C`, the short way to it for plain calls, a module for every Python with a
GIL; and the CUDA kernels, which are data, and are loaded with the first tensor on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).parent
LIBRARY = _PACKAGE / ("libreparam_fused.dll" if sys.platform == "win32" else "libreparam_fused.so")
KERNELS = _PACKAGE / "kernels.fatbin"


def _load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, whose kernels torch has from now on, or None and the reason."""
    if not LIBRARY.is_file():
        return None, "where it was installed, no C++ compiler was found"
    try:
        return ctypes.CDLL(str(LIBRARY)), ""
    except OSError as error:
        return None, str(error)


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


_REINSTALL = "install reparam_fused again from its source: pip install --force-reinstall --no-deps"
HOW_TO_BUILD = (
    f"install a C++17 compiler (Debian: apt-get install g++) and ninja, then {_REINSTALL}"
)
HOW_TO_BUILD_CUDA = f"install the CUDA toolkit, then {_REINSTALL}"


@functools.cache
def warn_reference(device_type: str) -> None:
    """Say once for each kind of device that its tensors are served by reference.py."""
    if device_type == "cpu":
        warnings.warn(
            "reparam_fused runs on its slow reference path: the C++ library is missing "
            f"({missing_reason}). To get it, {HOW_TO_BUILD}",
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
