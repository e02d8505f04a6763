"""What bad input gets: one exception, before any work, naming the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: The ends of a clamp, of which either may be None
Clamp: TypeAlias = tuple[float | None, float | None]
Scale: TypeAlias = Tensor | float

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEY_DTYPES = (torch.uint64, torch.int64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip
_DTYPE_NAMES = "float32, float64, float16 or bfloat16"
#: Of a result, as in many operations of torch; csrc/layout.h has tables of so many.
MAX_RANK = 64


def broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    """Their common shape, which torch takes 30 us to find where they are one."""
    return a if a == b else torch.broadcast_shapes(a, b)


def check_dtype(function: str, name: str, dtype: object) -> None:
    """dtype must be one that the kernels compute."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"{function}(): {name} must be {_DTYPE_NAMES}, got {dtype!r}")


def check_tensor(function: str, name: str, value: object) -> None:
    """value must be a dense floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )
    check_dtype(function, name, value.dtype)
    check_dense(function, name, value)


def layout_of(t: Tensor) -> str:
    """What a tensor is that is not dense; else nothing."""
    if t.is_nested:
        return "a nested tensor"
    return "" if t.layout == torch.strided else f"layout {t.layout}"


def check_dense(function: str, name: str, value: Tensor) -> None:
    if layout := layout_of(value):
        raise TypeError(
            f"{function}(): {name} must be a dense tensor (torch.strided), got {layout}"
        )


def check_pair(function: str, mu: object, name: str, scale: object) -> torch.Size:
    """mu and a scale of this name must go together; their broadcast shape.

    As in torch, the scale may be a number, or a tensor without dimensions on the CPU.
    """
    check_tensor(function, "mu", mu)
    assert isinstance(mu, Tensor)
    if isinstance(scale, (int, float, torch.SymFloat)) and not isinstance(scale, bool):
        if isinstance(scale, int) and _as_float(scale) is None:
            raise ValueError(
                f"{function}(): {name} must be a number that a float holds, got {scale}"
            )
        return _checked_rank(function, name, mu.shape)
    check_tensor(function, name, scale)
    assert isinstance(scale, Tensor)
    if mu.device != scale.device and not (scale.dim() == 0 and scale.device.type == "cpu"):
        raise RuntimeError(
            f"{function}(): mu and {name} must be on the same device, "
            f"got mu on {mu.device} and {name} on {scale.device}"
        )
    try:
        shape = broadcast(mu.shape, scale.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): the shapes of mu and {name} must broadcast, "
            f"got mu {tuple(mu.shape)} and {name} {tuple(scale.shape)}"
        ) from None
    return _checked_rank(function, name, shape)


def _checked_rank(function: str, name: str, shape: torch.Size) -> torch.Size:
    if len(shape) > MAX_RANK:
        raise RuntimeError(
            f"{function}(): mu and {name} must have at most {MAX_RANK} dimensions, got {len(shape)}"
        )
    return shape


def check_key(function: str, key: object) -> None:
    """key must be a uint64 tensor (*batch, 2), or the same bits as int64."""
    expected = "a uint64 tensor of shape (2,) or (*batch, 2), as reparam_fused.key(seed) gives"
    if not isinstance(key, Tensor):
        raise TypeError(f"{function}(): key must be {expected}, got {type(key).__name__}")
    if key.dtype not in KEY_DTYPES:
        raise TypeError(f"{function}(): key must be {expected}, got dtype {key.dtype}")
    if layout := layout_of(key):
        raise TypeError(f"{function}(): key must be {expected}, got {layout}")
    if key.dim() == 0 or key.shape[-1] != 2:
        raise RuntimeError(f"{function}(): key must be {expected}, got shape {tuple(key.shape)}")


def check_data(function: str, key: Tensor, data: Tensor) -> torch.Size:
    """data must be integers, each for a key of the batch; the shape of both."""
    if data.dtype not in INTEGERS:
        raise TypeError(f"{function}(): data must be an int or integers, got dtype {data.dtype}")
    check_dense(function, "data", data)
    if data.device != key.device:
        raise RuntimeError(
            f"{function}(): data must be on the device of key, {key.device}, got {data.device}"
        )
    try:
        return broadcast(key.shape[:-1], data.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): data must broadcast with the batch shape of key "
            f"{tuple(key.shape[:-1])}, got {tuple(data.shape)}"
        ) from None


def check_key_batch(function: str, key: Tensor, shape: torch.Size) -> None:
    """The batch of the key must broadcast with the leading dimensions of the output."""
    batch = key.shape[:-1]
    if len(batch) > len(shape) or any(k not in (1, n) for k, n in zip(batch, shape, strict=False)):
        raise RuntimeError(
            f"{function}(): the batch shape of key must broadcast with the leading dimensions of "
            f"the output {tuple(shape)}, got {tuple(batch)}"
        )


def check_sizes(function: str, name: str, sizes: Iterable[object]) -> torch.Size:
    """sizes must be those of a tensor, whose bytes 63 bits can count in any dtype."""
    try:
        # Those of numpy would wrap where they are multiplied.
        shape = tuple(
            n if isinstance(n, (int, torch.SymInt)) else operator.index(n)  # type: ignore[arg-type]
            for n in sizes
        )
        if any(n < 0 for n in shape):
            raise RuntimeError(f"{function}(): {name} must not be negative, got {shape}")
        if len(shape) > MAX_RANK:
            raise RuntimeError(
                f"{function}(): {name} must have at most {MAX_RANK} dimensions, got {len(shape)}"
            )
        # Of a size that torch.compile leaves open nothing is to be asked.
        known = [n for n in shape if type(n) is int]
        if max([1, *known]) >= 2**60 or math.prod(known) >= 2**60:
            raise RuntimeError(
                f"{function}(): {name} must be of less than 2**60 elements, got {shape}"
            )
        return torch.Size(shape)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{function}(): {name} must be ints, got {sizes!r}") from None


def check_block(
    function: str, shape: torch.Size, key: object, global_shape: object, global_offset: object
) -> None:
    """The block of this shape must lie within the larger tensor, and have a key."""
    if (global_shape is None) != (global_offset is None):
        given = "global_offset" if global_shape is None else "global_shape"
        raise ValueError(
            f"{function}(): expected global_shape and global_offset together, got {given} alone"
        )
    if global_shape is None:
        return
    if key is None:
        raise ValueError(
            f"{function}(): global_shape needs a key: blocks that drew keys of their own would "
            "not be parts of one whole"
        )
    for name, sizes in (("global_shape", global_shape), ("global_offset", global_offset)):
        if not isinstance(sizes, Sequence) or not all(
            isinstance(n, (int, torch.SymInt)) for n in sizes
        ):
            raise TypeError(f"{function}(): {name} must be a sequence of ints, got {sizes!r}")
        if len(sizes) != len(shape):
            raise RuntimeError(
                f"{function}(): {name} must have the {len(shape)} dimensions of the output "
                f"{tuple(shape)}, got {tuple(sizes)}"
            )
    assert isinstance(global_shape, Sequence)
    assert isinstance(global_offset, Sequence)
    for n, whole, first in zip(shape, global_shape, global_offset, strict=True):
        if not 0 <= first <= whole - n:
            raise RuntimeError(
                f"{function}(): the block {tuple(shape)} at global_offset {tuple(global_offset)} "
                f"must be within global_shape {tuple(global_shape)}"
            )
    if math.prod(global_shape) >= 2**63:
        raise RuntimeError(
            f"{function}(): global_shape must have less than 2**63 elements, "
            f"got {tuple(global_shape)}"
        )


def form_of(
    function: str,
    log_var: Scale | None,
    log_std: Scale | None,
    std: Scale | None,
    rho: Scale | None,
) -> tuple[str, Scale]:
    """The one scale that is given, and in which form."""
    # Without a table: a call of 256 elements is not to wait for one.
    if std is None and rho is None:
        if log_std is None and log_var is not None:
            return "log_var", log_var
        if log_var is None and log_std is not None:
            return "log_std", log_std
    elif log_var is None and log_std is None:
        if rho is None and std is not None:
            return "std", std
        if std is None and rho is not None:
            return "rho", rho
    return one_of(function, {"log_var": log_var, "log_std": log_std, "std": std, "rho": rho})


def one_of(function: str, scales: Mapping[str, Scale | None]) -> tuple[str, Scale]:
    """The one of these that is given, after its name."""
    given = [(form, scale) for form, scale in scales.items() if scale is not None]
    if len(given) != 1:
        got = " and ".join(form for form, _ in given) or "none"
        raise ValueError(f"{function}(): expected one of {', '.join(scales)}, got {got}")
    return given[0]


def check_bool(function: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}(): argument '{name}' must be bool, not {type(value).__name__}")


def _as_float(number: float) -> float | None:
    """None for an integer beyond all floats."""
    try:
        return float(number)
    except OverflowError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def bounds_of(function: str, clamp: object, min_std: object) -> tuple[float, float, float] | None:
    """The ends of the clamp and min_std as numbers; None where they do nothing."""
    low, high = -math.inf, math.inf
    if clamp is not None:
        if (
            not isinstance(clamp, (tuple, list))
            or len(clamp) != 2
            or not all(end is None or _is_number(end) for end in clamp)
        ):
            raise TypeError(
                f"{function}(): clamp must be (low, high), numbers of which either may be None, "
                f"got {clamp!r}"
            )
        ends = [end if end is None else _as_float(end) for end in clamp]
        if ends.count(None) != clamp.count(None):
            raise ValueError(
                f"{function}(): clamp must be of numbers that a float holds, got {clamp!r}"
            )
        low = low if ends[0] is None else ends[0]
        high = high if ends[1] is None else ends[1]
        if not low <= high:
            raise ValueError(f"{function}(): clamp must have low <= high, got {clamp!r}")
    if not _is_number(min_std):
        raise TypeError(
            f"{function}(): argument 'min_std' must be float, not {type(min_std).__name__}"
        )
    assert isinstance(min_std, (int, float))
    added = _as_float(min_std)
    if added is None or not 0 <= added < math.inf:
        raise ValueError(f"{function}(): min_std must be finite and at least 0, got {min_std}")
    bounds = low, high, added
    return None if bounds == (-math.inf, math.inf, 0.0) else bounds


def check_reparameterize(
    function: str,
    mu: object,
    form: str,
    scale: object,
    sample_shape: Sequence[int],
    key: object,
    generator: object,
    global_shape: object,
    global_offset: object,
) -> torch.Size:
    """The arguments of fused_reparameterize; the shape of one sample."""
    one = check_pair(function, mu, form, scale)
    shape = torch.Size((*sample_shape, *one)) if len(sample_shape) > 0 else one
    assert isinstance(mu, Tensor)
    if key is not None and generator is not None:
        raise ValueError(f"{function}(): expected key or generator, got both")
    if key is not None:
        check_key(function, key)
        assert isinstance(key, Tensor)
        if key.device != mu.device:
            raise RuntimeError(
                f"{function}(): key must be on the device of mu, {mu.device}, got {key.device}"
            )
        check_key_batch(function, key, shape)
        of_samples = tuple(key.shape[:-1][: len(sample_shape)])
        ones = (1,) * len(of_samples)
        if of_samples not in (ones, tuple(sample_shape)):
            raise RuntimeError(
                f"{function}(): key must tell all dimensions of sample_shape "
                f"{tuple(sample_shape)} apart or none, got batch shape {tuple(key.shape[:-1])}"
            )
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{function}(): argument 'generator' must be torch.Generator, "
                f"not {type(generator).__name__}"
            )
        if generator.device.type != mu.device.type:
            raise RuntimeError(
                f"{function}(): generator must be on the device of mu, {mu.device}, "
                f"got {generator.device}"
            )
    check_block(function, shape, key, global_shape, global_offset)
    if isinstance(global_shape, Sequence) and len(sample_shape) > 1:
        whole = tuple(global_shape[1 : len(sample_shape)])
        if whole != tuple(sample_shape[1:]):
            raise RuntimeError(
                f"{function}(): of sample_shape {tuple(sample_shape)} a block may be cut in the "
                f"first dimension alone, got global_shape {tuple(global_shape)}"
            )
    return one


def check_dims(function: str, dim: object, shape: Sequence[int]) -> tuple[int, ...]:
    """dim must name dimensions of this shape, each once: which, from the first on."""
    n = len(shape)
    if dim is None:
        return tuple(range(n))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        raise TypeError(
            f"{function}(): dim must be an int, a sequence of ints or None, got {dim!r}"
        )
    found = []
    for d in dims:
        # As torch has it, one dimension of a tensor without any may be named.
        if not -max(n, 1) <= d < max(n, 1):
            raise IndexError(
                f"{function}(): dim must be in the range of [{-max(n, 1)}, {max(n, 1) - 1}], "
                f"the dimensions of one sample, got {d}"
            )
        if n > 0:
            found.append(d % n)
    if len(set(found)) != len(found):
        raise RuntimeError(f"{function}(): dim must name each dimension once, got {dim!r}")
    return tuple(sorted(found))


class Prior(NamedTuple):
    """A normal distribution as its mean and a scale of some form."""

    loc: Tensor
    scale: Tensor
    form: str
    bounds: tuple[float, float, float] | None


def prior_of(function: str, prior: object) -> Prior:
    """prior must be a normal distribution."""
    given = getattr(prior, "_parameters_of_kernels", None)
    if given is not None and not isinstance(prior, type):
        return Prior(*given())
    if not isinstance(prior, torch.distributions.Normal):
        raise TypeError(
            f"{function}(): prior must be torch.distributions.Normal, not {type(prior).__name__}"
        )
    return Prior(prior.loc, prior.scale, "std", None)


def check_prior(function: str, prior: Prior, mu: Tensor, shape: Sequence[int]) -> None:
    """The parameters of a prior must broadcast to the shape of mu and its scale."""
    for t in (prior.loc, prior.scale):
        check_tensor(function, "a parameter of prior", t)
        if t.device != mu.device and not (t.dim() == 0 and t.device.type == "cpu"):
            raise RuntimeError(
                f"{function}(): prior must be on the device of mu, {mu.device}, got {t.device}"
            )
        fits = len(t.shape) <= len(shape) and all(
            n in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False)
        )
        if not fits:
            raise RuntimeError(
                f"{function}(): the shape of prior must broadcast to that of one sample, "
                f"{tuple(shape)}, got {tuple(t.shape)}"
            )
