"""The ops, declared once: schemas, fake kernels, and reference.py under the compiled kernels.

    sample_from_key(mu, log_var, key) -> z
    sample_backward(grad_z, log_var, key) -> grad_log_var

Both are pure functions: randomness enters only through the key.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module, resources
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from . import reference

library = torch.library.Library("reparam_fused", "DEF")
library.define(
    "sample_from_key(Tensor mu, Tensor log_var, Tensor key) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "sample_backward(Tensor grad_z, Tensor log_var, Tensor key) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none."""
    try:
        return import_module("reparam_fused._C"), ""
    except ImportError as error:
        note = resources.files("reparam_fused") / "_build_error.txt"
        reason = note.read_text().strip() if note.is_file() else str(error)
        return None, reason


extension, missing_reason = _load_extension()
HOW_TO_BUILD = (
    "install a C++17 compiler (Debian: apt-get install g++) and ninja, then run: "
    "pip install --no-build-isolation --force-reinstall --no-deps reparam_fused"
)


@functools.cache
def _warn_reference(device_type: str) -> None:
    if device_type == "cpu":
        warnings.warn(
            "reparam_fused runs on its slow reference path: the C++ extension is missing "
            f"({missing_reason}). To get it, {HOW_TO_BUILD}",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"reparam_fused has no kernel for {device_type} tensors yet, and runs on its slow "
            "reference path",
            stacklevel=2,
        )


def _sample_from_key(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    _warn_reference(mu.device.type)
    return reference.sample_from_key(mu, log_var, key)


def _sample_backward(grad_z: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    _warn_reference(grad_z.device.type)
    return reference.sample_backward(grad_z, log_var, key)


# The compiled CPU kernels are registered for CPU, which goes before this.
library.impl("sample_from_key", _sample_from_key, "CompositeExplicitAutograd")
library.impl("sample_backward", _sample_backward, "CompositeExplicitAutograd")


def _fake(x: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    return torch.add(x, log_var)  # the same dtype, shape and strides


torch.library.register_fake("reparam_fused::sample_from_key", _fake, lib=library)
torch.library.register_fake("reparam_fused::sample_backward", _fake, lib=library)

Op: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
sample_from_key: Op = torch.ops.reparam_fused.sample_from_key.default
sample_backward: Op = torch.ops.reparam_fused.sample_backward.default
