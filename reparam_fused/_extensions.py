"""The compiled modules, or the reasons why there are none and what would bring them."""

from __future__ import annotations

import functools
import os
import warnings
from importlib import import_module, resources
from importlib.util import find_spec
from types import ModuleType


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none."""
    try:
        return import_module(f"reparam_fused.{name}"), ""
    except ImportError as error:
        note = resources.files("reparam_fused") / f"{name}_missing.txt"
        reason = note.read_text().strip() if note.is_file() else str(error)
        return None, reason


cpu, cpu_missing_reason = _load("_C")

# The one switch between the kernels for GPUs
gpu_choice = os.environ.get("REPARAM_FUSED_GPU", "")
if gpu_choice not in ("", "cuda", "triton"):
    raise ValueError(f"REPARAM_FUSED_GPU must be cuda or triton, got '{gpu_choice}'")
cuda: ModuleType | None
if gpu_choice == "triton":  # the import alone would register its kernels
    cuda, cuda_missing_reason = None, "REPARAM_FUSED_GPU=triton"
else:
    cuda, cuda_missing_reason = _load("_cuda")
# Imported with the first tensor on a GPU: it takes longer than the rest of the package.
has_triton = gpu_choice != "cuda" and find_spec("triton") is not None

_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps reparam_fused"
HOW_TO_BUILD = (
    f"install a C++17 compiler (Debian: apt-get install g++) and ninja, then run: {_REINSTALL}"
)
HOW_TO_BUILD_CUDA = (
    f"install a CUDA build of torch and the toolkit of its release, then run: {_REINSTALL}"
)


@functools.cache
def warn_reference(device_type: str) -> None:
    """Say once for each kind of device that its tensors are served by reference.py."""
    if device_type == "cpu":
        warnings.warn(
            "reparam_fused runs on its slow reference path: the C++ extension is missing "
            f"({cpu_missing_reason}). To get it, {HOW_TO_BUILD}",
            stacklevel=2,
        )
    elif device_type == "cuda":
        warnings.warn(
            "reparam_fused runs on its slow reference path: triton is missing, and so is the "
            f"CUDA extension ({cuda_missing_reason}). Run: pip install triton. "
            f"Or, for the extension, {HOW_TO_BUILD_CUDA}",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"reparam_fused has no kernel for {device_type} tensors, and runs on its slow "
            "reference path",
            stacklevel=2,
        )
