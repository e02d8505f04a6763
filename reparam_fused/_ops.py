"""The ops, declared once: schemas, fake kernels, and reference.py under the compiled kernels.

    sample_from_key(mu, scale, key, ...) -> z
    sample_backward(grad_z, scale, key, ...) -> grad_scale
    noise(key, size, dtype, ...) -> eps
    sample(mu, scale, generator=None, ...) -> (z, key)
    traced_key(device) -> key
    kl_divergence(mu, log_var) -> kl
    kl_divergence_backward(grad, log_var) -> grad_log_var

The first three are pure functions: randomness enters only through the key. The fourth
draws a key, on a GPU in the kernel that uses it; the fifth draws one in a graph. The
last two have no noise.

`form` says what the scale is, "log_var" or "std"; the gradient of a std does not depend
on it, and takes None. (global_shape, global_offset) is the block's place in a larger
tensor, of whose noise it takes its part.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module, resources
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _draw, reference

library = torch.library.Library("reparam_fused", "DEF")
_BLOCK = "SymInt[]? global_shape=None, SymInt[]? global_offset=None"
library.define(
    f"sample_from_key(Tensor mu, Tensor scale, Tensor key, str form='log_var', {_BLOCK}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "sample_backward(Tensor grad_z, Tensor? scale, Tensor key, str form='log_var', "
    f"{_BLOCK}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"noise(Tensor key, SymInt[] size, ScalarType dtype, {_BLOCK}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "sample(Tensor mu, Tensor scale, Generator? generator=None, str form='log_var')"
    " -> (Tensor z, Tensor key)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
library.define(
    "traced_key(Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)

for _schema in (
    "kl_divergence(Tensor mu, Tensor log_var) -> Tensor",
    "kl_divergence_backward(Tensor grad, Tensor log_var) -> Tensor",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _load_extension(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none."""
    try:
        return import_module(f"reparam_fused.{name}"), ""
    except ImportError as error:
        note = resources.files("reparam_fused") / f"{name}_missing.txt"
        reason = note.read_text().strip() if note.is_file() else str(error)
        return None, reason


extension, missing_reason = _load_extension("_C")

# The one switch between the kernels for GPUs
gpu_choice = os.environ.get("REPARAM_FUSED_GPU", "")
if gpu_choice not in ("", "cuda", "triton"):
    raise ValueError(f"REPARAM_FUSED_GPU must be cuda or triton, got '{gpu_choice}'")
cuda_extension: ModuleType | None
if gpu_choice == "triton":  # the import alone would register its kernels
    cuda_extension, cuda_missing_reason = None, "REPARAM_FUSED_GPU=triton"
else:
    cuda_extension, cuda_missing_reason = _load_extension("_cuda")
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
def _warn_reference(device_type: str) -> None:
    if device_type == "cpu":
        warnings.warn(
            "reparam_fused runs on its slow reference path: the C++ extension is missing "
            f"({missing_reason}). To get it, {HOW_TO_BUILD}",
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


# What csrc/call.h checks of a direct call, for the kernels in Python


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"reparam_fused: {message}")


def _check_form(form: str = "log_var", *_: Any) -> None:
    _require(form in ("log_var", "std"), f"expected form to be log_var or std, got {form}")


def _check_backward(scale: Tensor | None, form: str = "log_var", *_: Any) -> None:
    _check_form(form)
    _require(
        (scale is not None) == (form == "log_var"),
        "sample_backward takes a scale in the form log_var, and none in the form std",
    )


def _check_place(
    shape: Sequence[int],
    key: Tensor,
    global_shape: Sequence[int] | None = None,
    global_offset: Sequence[int] | None = None,
) -> None:
    """A key for each slice of an output of this shape, and a block within the whole."""
    batch = key.shape[:-1]
    _require(
        key.dtype == torch.uint64
        and tuple(key.shape[-1:]) == (2,)
        and len(batch) <= len(shape)
        and all(k in (1, n) for k, n in zip(batch, shape, strict=False)),
        f"expected a uint64 key of shape (2,) or (*batch, 2) for {tuple(shape)}, "
        f"got {key.dtype} {tuple(key.shape)}",
    )
    _require(
        (global_shape is None) == (global_offset is None),
        "expected global_shape and global_offset, or neither",
    )
    if global_shape is None or global_offset is None:
        return
    _require(
        len(global_shape) == len(global_offset) == len(shape),
        f"expected global_shape and global_offset to have the {len(shape)} dimensions of the "
        "output",
    )
    for d, (n, first, whole) in enumerate(zip(shape, global_offset, global_shape, strict=True)):
        _require(
            0 <= first <= whole - n,
            f"dimension {d} of the output, {n} from {first}, is not within {whole}",
        )
    _require(
        math.prod(global_shape) < 2**63,
        f"expected global_shape to have less than 2^63 elements, got {tuple(global_shape)}",
    )


def _sample_from_key(mu: Tensor, scale: Tensor, key: Tensor, *options: Any) -> Tensor:
    _check_form(*options)
    _check_place(torch.broadcast_shapes(mu.shape, scale.shape), key, *options[1:])
    _warn_reference(mu.device.type)
    return reference.sample_from_key(mu, scale, key, *options)


def _sample_backward(grad_z: Tensor, scale: Tensor | None, key: Tensor, *options: Any) -> Tensor:
    _check_backward(scale, *options)
    shape = grad_z.shape if scale is None else torch.broadcast_shapes(grad_z.shape, scale.shape)
    _check_place(shape, key, *options[1:])
    _warn_reference(grad_z.device.type)
    return reference.sample_backward(grad_z, scale, key, *options)


def _noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *block: Any) -> Tensor:
    _check_place(size, key, *block)
    _warn_reference(key.device.type)
    return reference.noise(key, torch.Size(size), dtype, *block).to(dtype).contiguous()


def _kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    _warn_reference(mu.device.type)
    return reference.kl_divergence(mu, log_var)


def _kl_divergence_backward(grad: Tensor, log_var: Tensor) -> Tensor:
    _warn_reference(grad.device.type)
    return reference.kl_divergence_backward(grad, log_var)


def _sample(
    mu: Tensor, scale: Tensor, generator: torch.Generator | None = None, form: str = "log_var"
) -> tuple[Tensor, Tensor]:
    _check_form(form)
    fake = torch.add(mu.to("meta"), scale.to("meta"))
    key = _draw.draw_key(mu.device, generator, _draw.blocks(fake.numel(), fake.dtype))
    return sample_from_key(mu, scale, key, form), key


def _traced_key(device: torch.device) -> Tensor:
    from ._partitioner import drawn_once

    with drawn_once():
        words = _draw.traced_words(device)
    return _draw.key_of_words(words)


# Composite: dynamo leaves it to what traces the joint graph, which sees the draw itself.
library.impl("traced_key", _traced_key, "CompositeImplicitAutograd")
# The compiled kernels are registered for CPU and CUDA, which go before this.
library.impl("sample_from_key", _sample_from_key, "CompositeExplicitAutograd")
library.impl("sample_backward", _sample_backward, "CompositeExplicitAutograd")
library.impl("noise", _noise, "CompositeExplicitAutograd")
library.impl("sample", _sample, "CompositeExplicitAutograd")
library.impl("kl_divergence", _kl_divergence, "CompositeExplicitAutograd")
library.impl("kl_divergence_backward", _kl_divergence_backward, "CompositeExplicitAutograd")


def _triton_sample_from_key(mu: Tensor, scale: Tensor, key: Tensor, *options: Any) -> Tensor:
    from . import triton_kernels

    _check_form(*options)
    _check_place(torch.broadcast_shapes(mu.shape, scale.shape), key, *options[1:])
    return triton_kernels.sample_from_key(mu, scale, key, *options)


def _triton_sample(
    mu: Tensor, scale: Tensor, generator: torch.Generator | None = None, form: str = "log_var"
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels

    _check_form(form)
    return triton_kernels.sample(mu, scale, generator, form)


def _triton_sample_backward(
    grad_z: Tensor, scale: Tensor | None, key: Tensor, *options: Any
) -> Tensor:
    from . import triton_kernels

    _check_backward(scale, *options)
    shape = grad_z.shape if scale is None else torch.broadcast_shapes(grad_z.shape, scale.shape)
    _check_place(shape, key, *options[1:])
    return triton_kernels.sample_backward(grad_z, scale, key, *options)


def _triton_noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *block: Any) -> Tensor:
    from . import triton_kernels

    _check_place(size, key, *block)
    return triton_kernels.noise(key, size, dtype, *block)


def _triton_kl_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    from . import triton_kernels

    return triton_kernels.kl_divergence(mu, log_var)


def _triton_kl_divergence_backward(grad: Tensor, log_var: Tensor) -> Tensor:
    from . import triton_kernels

    return triton_kernels.kl_divergence_backward(grad, log_var)


if has_triton:
    # A ROCm build of torch calls its GPUs cuda too.
    for _device in ("XPU",) if cuda_extension is not None else ("XPU", "CUDA"):
        library.impl("sample_from_key", _triton_sample_from_key, _device)
        library.impl("sample_backward", _triton_sample_backward, _device)
        library.impl("noise", _triton_noise, _device)
        library.impl("kl_divergence", _triton_kl_divergence, _device)
        library.impl("kl_divergence_backward", _triton_kl_divergence_backward, _device)
    if cuda_extension is None:
        library.impl("sample", _triton_sample, "CUDA")


def _fake(x: Tensor, scale: Tensor | None, key: Tensor, *options: Any) -> Tensor:
    return torch.add(x, x if scale is None else scale)  # the same dtype, shape and strides


def _fake_noise(key: Tensor, size: Sequence[int], dtype: torch.dtype, *block: Any) -> Tensor:
    return key.new_empty(size, dtype=dtype)


def _fake_sample(
    mu: Tensor, scale: Tensor, generator: torch.Generator | None = None, form: str = "log_var"
) -> tuple[Tensor, Tensor]:
    return torch.add(mu, scale), mu.new_empty((2,), dtype=torch.uint64)


torch.library.register_fake("reparam_fused::sample_from_key", _fake, lib=library)
torch.library.register_fake("reparam_fused::sample_backward", _fake, lib=library)
torch.library.register_fake("reparam_fused::noise", _fake_noise, lib=library)
torch.library.register_fake("reparam_fused::sample", _fake_sample, lib=library)
torch.library.register_fake("reparam_fused::kl_divergence", torch.add, lib=library)
torch.library.register_fake("reparam_fused::kl_divergence_backward", torch.add, lib=library)


class KeyOp(Protocol):
    def __call__(
        self,
        x: Tensor,
        scale: Any,
        key: Tensor,
        form: str = ...,
        global_shape: Sequence[int] | None = ...,
        global_offset: Sequence[int] | None = ...,
        /,
    ) -> Tensor: ...


sample_from_key: KeyOp = torch.ops.reparam_fused.sample_from_key.default
sample_backward: KeyOp = torch.ops.reparam_fused.sample_backward.default
noise: Callable[..., Tensor] = torch.ops.reparam_fused.noise.default
sample: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reparam_fused.sample.default
traced_key: Callable[[torch.device], Tensor] = torch.ops.reparam_fused.traced_key.default
kl_divergence: Callable[[Tensor, Tensor], Tensor] = torch.ops.reparam_fused.kl_divergence.default
kl_divergence_backward: Callable[[Tensor, Tensor], Tensor] = (
    torch.ops.reparam_fused.kl_divergence_backward.default
)
