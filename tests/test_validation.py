"""Bad input: one exception, before any work, that says what was wrong and what is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import needs_kernels

import reparam_fused
from reparam_fused import fold_in, fused_reparameterize, key, noise, split

X = torch.zeros(4, 3)
META = torch.zeros(4, 3, device="meta")
FLOATS = "must be float32, float64, float16 or bfloat16"
KEY = "key must be a uint64 tensor of shape (2,) or (*batch, 2)"

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fused_reparameterize([1.0], X), TypeError, "argument 'mu' must be Tensor, not list"),
    (
        lambda: fused_reparameterize(X, 0.0),
        TypeError,
        "argument 'log_var' must be Tensor, not float",
    ),
    (lambda: fused_reparameterize(X.long(), X), TypeError, f"mu {FLOATS}, got torch.int64"),
    (lambda: fused_reparameterize(X, X.bool()), TypeError, f"log_var {FLOATS}, got torch.bool"),
    (lambda: fused_reparameterize(X.cfloat(), X), TypeError, f"mu {FLOATS}, got torch.complex64"),
    (
        lambda: fused_reparameterize(X, X.to(torch.float8_e4m3fn)),
        TypeError,
        f"log_var {FLOATS}, got torch.float8_e4m3fn",
    ),
    (
        lambda: fused_reparameterize(X.to_sparse(), X),
        TypeError,
        "mu must be a dense tensor (torch.strided), got layout torch.sparse_coo",
    ),
    (
        lambda: fused_reparameterize(torch.nested.nested_tensor([X, X]), X),
        TypeError,
        "mu must be a dense tensor (torch.strided), got a nested tensor",
    ),
    (
        lambda: fused_reparameterize(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), X),
        TypeError,
        f"mu {FLOATS}, got torch.qint8",
    ),
    (
        lambda: fused_reparameterize(X, torch.zeros(4)),
        RuntimeError,
        "the shapes of mu and log_var must broadcast, got mu (4, 3) and log_var (4,)",
    ),
    (
        lambda: fused_reparameterize(X, META),
        RuntimeError,
        "mu and log_var must be on the same device, got mu on cpu and log_var on meta",
    ),
    (
        lambda: fused_reparameterize(X, X, key=key(1), generator=torch.Generator()),
        ValueError,
        "expected key or generator, got both",
    ),
    (
        lambda: fused_reparameterize(X, X, key=42),
        TypeError,
        f"{KEY}, as reparam_fused.key(seed) gives, got int",
    ),
    (
        lambda: fused_reparameterize(X, X, key=torch.tensor([1, 2])),
        TypeError,
        "got dtype torch.int64",
    ),
    (
        lambda: fused_reparameterize(X, X, key=key(1)[:1]),
        RuntimeError,
        f"{KEY}, as reparam_fused.key(seed) gives, got shape (1,)",
    ),
    (lambda: fused_reparameterize(X, X, key=key(1)[0]), RuntimeError, "got shape ()"),
    (
        lambda: fused_reparameterize(X, X, key=key(1, device="meta")),
        RuntimeError,
        "key must be on the device of mu, cpu, got meta",
    ),
    (
        lambda: fused_reparameterize(X, X, key=split(key(1), 3)),
        RuntimeError,
        "the batch shape of key must broadcast with the leading dimensions of the output (4, 3), "
        "got (3,)",
    ),
    (
        lambda: fused_reparameterize(X, X, key=split(key(1), 12).view(4, 3, 1, 2)),
        RuntimeError,
        "got (4, 3, 1)",
    ),
    (
        lambda: fused_reparameterize(X, X, generator=7),
        TypeError,
        "argument 'generator' must be torch.Generator, not int",
    ),
    (
        lambda: fused_reparameterize(META, META, generator=torch.Generator()),
        RuntimeError,
        "generator must be on the device of mu, meta, got cpu",
    ),
    (lambda: key(1.5), TypeError, "argument 'seed' must be int, not float"),
    (lambda: key(-1), ValueError, "seed must be in [0, 2**64), got -1"),
    (lambda: key(2**64), ValueError, "seed must be in [0, 2**64)"),
    (lambda: split(X), TypeError, f"split(): {KEY}"),
    (lambda: split(key(1), 0), ValueError, "num must be positive, got 0"),
    (lambda: split(key(1), 2.0), TypeError, "argument 'num' must be int, not float"),
    (lambda: fold_in(key(1), 0.5), TypeError, "argument 'data' must be int, not float"),
    (lambda: fold_in(key(1), 2**64), ValueError, "data must be in [-2**63, 2**64), got"),
    (lambda: noise(key(1), 3, dtype=torch.int32), TypeError, f"dtype {FLOATS}, got torch.int32"),
    (lambda: noise(key(1), 3, dtype="float32"), TypeError, f"dtype {FLOATS}, got float32"),
    (lambda: noise(key(1), 3, 4.5), TypeError, "noise(): shape must be ints, got (3, 4.5)"),
    (lambda: noise(key(1), (2, -1)), RuntimeError, "noise(): shape must not be negative, got (2,"),
    (lambda: noise(split(key(1)), 3), RuntimeError, "noise(): the batch shape of key must"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_bad_input(
    both_paths: str, call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        call()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_without_arguments_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused_reparameterize()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        fused_reparameterize(X, X, key(1))  # type: ignore[misc]


@needs_kernels
@pytest.mark.parametrize(
    "bad", [torch.tensor([1, 2]), key(1)[:1], split(key(1), 12).view(1, 1, 12, 2)]
)
def test_the_ops_themselves_check_what_memory_safety_needs(bad: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        reparam_fused._ops.sample_from_key(X, X, bad)
    with pytest.raises(RuntimeError):
        reparam_fused._ops.sample_from_key(X, X.long().expand(4, 3).int(), bad)
    with pytest.raises(RuntimeError):
        reparam_fused._ops.noise(bad, X.shape, torch.float32)


@needs_kernels
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (((3,), torch.int32), "expected float32, float64, float16 or bfloat16, got Int"),
        (((-1,), torch.float32), "negative"),
        (((3,), torch.float32, (5,)), "global_shape and global_offset, or neither"),
        (((3,), torch.float32, (5,), (3,)), "is not within"),
    ],
)
def test_the_op_of_noise_checks_its_sizes(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        reparam_fused._ops.noise(key(1), *options)
