"""Bad input: one exception, before any work, that says what was wrong and what is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, needs_kernels
from torch import Tensor

import reparam_fused
from reparam_fused import (
    fold_in,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
    key,
    nn,
    noise,
    split,
)

FLOATS = "must be float32, float64, float16 or bfloat16"
KEY = "key must be a uint64 tensor of shape (2,) or (*batch, 2)"


def quantized(x: Tensor) -> Tensor:
    return torch._empty_affine_quantized(
        x.shape, scale=0.1, zero_point=0, dtype=torch.qint8, device=x.device
    )


def nested(words: Tensor) -> Tensor:
    return torch.nested.nested_tensor([words.long(), words.long()])


def default_generator(x: Tensor) -> torch.Generator:
    return torch.cuda.default_generators[0] if x.is_cuda else torch.default_generator


# Of zeros of shape (4, 3) and a key; the message may name their device.
Call = Callable[[Tensor, Tensor], Any]
CASES: list[tuple[Call, type[Exception], str]] = [
    (
        lambda x, k: fused_reparameterize([1.0], x),
        TypeError,
        "argument 'mu' must be Tensor, not list",
    ),
    (
        lambda x, k: fused_reparameterize(x, "0"),
        TypeError,
        "argument 'log_var' must be Tensor, not str",
    ),
    (lambda x, k: fused_reparameterize(x.long(), x), TypeError, f"mu {FLOATS}, got torch.int64"),
    (
        lambda x, k: fused_reparameterize(x, x.bool()),
        TypeError,
        f"log_var {FLOATS}, got torch.bool",
    ),
    (
        lambda x, k: fused_reparameterize(x.cfloat(), x),
        TypeError,
        f"mu {FLOATS}, got torch.complex64",
    ),
    (
        lambda x, k: fused_reparameterize(x, x.to(torch.float8_e4m3fn)),
        TypeError,
        f"log_var {FLOATS}, got torch.float8_e4m3fn",
    ),
    (
        lambda x, k: fused_reparameterize(x.to_sparse(), x),
        TypeError,
        "mu must be a dense tensor (torch.strided), got layout torch.sparse_coo",
    ),
    (
        lambda x, k: fused_reparameterize(torch.nested.nested_tensor([x, x]), x),
        TypeError,
        "mu must be a dense tensor (torch.strided), got a nested tensor",
    ),
    (
        lambda x, k: fused_reparameterize(quantized(x), x),
        TypeError,
        f"mu {FLOATS}, got torch.qint8",
    ),
    (
        lambda x, k: fused_reparameterize(x, x[:, 0]),
        RuntimeError,
        "the shapes of mu and log_var must broadcast, got mu (4, 3) and log_var (4,)",
    ),
    (
        lambda x, k: fused_reparameterize(x, x.to("meta")),
        RuntimeError,
        "mu and log_var must be on the same device, got mu on DEVICE and log_var on meta",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=k, generator=torch.Generator(x.device)),
        ValueError,
        "expected key or generator, got both",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=42),
        TypeError,
        f"{KEY}, as reparam_fused.key(seed) gives, got int",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=k.int()),
        TypeError,
        "got dtype torch.int32",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=k[:1]),
        RuntimeError,
        f"{KEY}, as reparam_fused.key(seed) gives, got shape (1,)",
    ),
    (lambda x, k: fused_reparameterize(x, x, key=k[0]), RuntimeError, "got shape ()"),
    (
        lambda x, k: fused_reparameterize(x, x, key=key(1, device="meta")),
        RuntimeError,
        "key must be on the device of mu, DEVICE, got meta",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=split(k, 3)),
        RuntimeError,
        "the batch shape of key must broadcast with the leading dimensions of the output (4, 3), "
        "got (3,)",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=split(k, 12).view(4, 3, 1, 2)),
        RuntimeError,
        "got (4, 3, 1)",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, generator=7),
        TypeError,
        "argument 'generator' must be torch.Generator, not int",
    ),
    (
        lambda x, k: fused_reparameterize(
            x.to("meta"), x.to("meta"), generator=torch.Generator(x.device)
        ),
        RuntimeError,
        "generator must be on the device of mu, meta, got DEVICE",
    ),
    (lambda x, k: key(1.5), TypeError, "argument 'seed' must be int, not float"),
    (lambda x, k: key(-1), ValueError, "seed must be in [0, 2**64), got -1"),
    (lambda x, k: key(2**64), ValueError, "seed must be in [0, 2**64)"),
    (lambda x, k: split(x), TypeError, f"split(): {KEY}"),
    (lambda x, k: split(k, 0), ValueError, "num must be positive, got 0"),
    (lambda x, k: split(k, 2.0), TypeError, "argument 'num' must be int, not float"),
    (lambda x, k: fold_in(k, 0.5), TypeError, "argument 'data' must be int, not float"),
    (lambda x, k: fold_in(k, 2**64), ValueError, "data must be in [-2**63, 2**64), got"),
    (lambda x, k: noise(k, 3, dtype=torch.int32), TypeError, f"dtype {FLOATS}, got torch.int32"),
    (lambda x, k: noise(k, 3, dtype="float32"), TypeError, f"dtype {FLOATS}, got 'float32'"),
    (lambda x, k: noise(k, 3, dtype=np.ones(2)), TypeError, f"dtype {FLOATS}, got array([1., 1"),
    (lambda x, k: noise(k, 3, dtype=torch.qint8), TypeError, f"dtype {FLOATS}, got torch.qint8"),
    (
        lambda x, k: noise(k, 2**63),
        RuntimeError,
        "shape must be of less than 2**60 elements, got (9",
    ),
    (lambda x, k: noise(k, 2**62), RuntimeError, "shape must be of less than 2**60"),
    (lambda x, k: noise(k, 0, 2**63), RuntimeError, "shape must be of less than 2**60"),
    (lambda x, k: noise(k, 2**40, 2**40), RuntimeError, "shape must be of less than 2**60"),
    (
        lambda x, k: noise(k.view(torch.int64).to_sparse(), 3),
        TypeError,
        "as reparam_fused.key(seed) gives, got layout",
    ),
    (lambda x, k: split(k.view(torch.int64).to_sparse()), TypeError, f"split(): {KEY}"),
    (lambda x, k: fold_in(k.view(torch.int64).to_sparse(), 1), TypeError, f"fold_in(): {KEY}"),
    (lambda x, k: fused_reparameterize(x, x, key=k.view(torch.int64).to_sparse()), TypeError, KEY),
    (lambda x, k: split(k, 2**63), ValueError, "num must be small enough for a tensor, got 9223"),
    (lambda x, k: split(k.expand(0, 2), 2**62), ValueError, "num must be small enough for a ten"),
    (lambda x, k: split(k, 2**62), ValueError, "num must be small enough for a tensor, got 4611"),
    (
        lambda x, k: fused_reparameterize(x, x, sample_shape=(2**32, 2**32)),
        RuntimeError,
        "sample_shape must be of less than 2**60 elements, got (4294967296, 4294967296)",
    ),
    (lambda x, k: noise(k, 3, 4.5), TypeError, "noise(): shape must be ints, got (3, 4.5)"),
    (lambda x, k: noise(k, (2, -1)), RuntimeError, "noise(): shape must not be negative, got (2,"),
    (lambda x, k: noise(k, k), TypeError, "noise(): shape must be ints, got (tensor([1, 0]"),
    (lambda x, k: noise(k, [1] * 65), RuntimeError, "noise(): shape must have at most 64 dim"),
    (
        lambda x, k: fused_reparameterize(x.view([1] * 65 + [12]), 0.0),
        RuntimeError,
        "mu and log_var must have at most 64 dimensions, got 66",
    ),
    # Numbers that Python has and no float holds, numbers of numpy, which wrap, and what has no
    # truth value
    (lambda x, k: fused_reparameterize(x, 10**400), ValueError, "log_var must be a number that a"),
    (lambda x, k: fused_kl_divergence(x, std=-(2**1024)), ValueError, "std must be a number that"),
    (
        lambda x, k: fused_reparameterize(x, x, clamp=(None, 10**400)),
        ValueError,
        "clamp must be of numbers that a float holds, got (None, 1",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, min_std=10**400),
        ValueError,
        "min_std must be finite and at least 0, got 1",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, min_std=x[0]),
        TypeError,
        "argument 'min_std' must be float, not Tensor",
    ),
    (
        lambda x, k: fused_kl_divergence(x, x, min_std=np.zeros(2)),
        TypeError,
        "argument 'min_std' must be float, not ndarray",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, sample_shape=(np.int64(2**40), np.int64(2**40))),
        RuntimeError,
        "sample_shape must be of less than 2**60 elements",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, sample_shape=np.array([2.5])),
        TypeError,
        "fused_reparameterize(): sample_shape must be ints",
    ),
    (
        lambda x, k: fused_reparameterize_kl(x, x, dim=-1, sample_shape=np.array([2.5])),
        TypeError,
        "fused_reparameterize_kl(): sample_shape must be ints",
    ),
    (
        lambda x, k: fused_reparameterize_log_prob(x, x, dim=-1, sample_shape=None),
        TypeError,
        "fused_reparameterize_log_prob(): sample_shape must be ints, got None",
    ),
    (
        lambda x, k: fused_kl_divergence(x, x, dim=np.array([0, 1])),
        TypeError,
        "dim must be an int, a sequence of ints or None, got array",
    ),
    (
        lambda x, k: fused_reparameterize_log_prob(x, x, dim=-1, tanh="no"),
        TypeError,
        "argument 'tanh' must be bool, not str",
    ),
    (
        lambda x, k: fused_reparameterize_log_prob(x, x, dim=-1, tanh=x),
        TypeError,
        "argument 'tanh' must be bool, not Tensor",
    ),
    (
        lambda x, k: fused_kl_divergence(x, x, prior=reparam_fused.Normal),
        TypeError,
        "prior must be torch.distributions.Normal, not type",
    ),
    (
        lambda x, k: fused_reparameterize_kl(x, x, dim=-1, key=k, generator=x),
        ValueError,
        "fused_reparameterize_kl(): expected key or generator, got both",
    ),
    (lambda x, k: nn.Reparameterize(["std"]), ValueError, "form must be one of log_var, std, "),
    # Integers that are no dense tensor
    (lambda x, k: split(nested(k)), TypeError, "as reparam_fused.key(seed) gives, got a nested"),
    (lambda x, k: fused_reparameterize(x, x, key=nested(k)), TypeError, "gives, got a nested"),
    (lambda x, k: fold_in(k, nested(k)), TypeError, "data must be a dense tensor (torch.strided)"),
    (lambda x, k: fold_in(k, k.long().to_sparse()), TypeError, "data must be a dense tensor"),
    (lambda x, k: key(nested(k)), TypeError, "key(): seed must be a dense tensor (torch.strided)"),
    (lambda x, k: key(k.long().to_sparse()), TypeError, "key(): seed must be a dense tensor"),
    (lambda x, k: key(np.array(["a"])), TypeError, "key(): seed must be an int or integers, got"),
    # Before a key is drawn
    (
        lambda x, k: key(generator=default_generator(x), device=3.5),
        TypeError,
        "key(): argument 'device' must be torch.device or str, not float",
    ),
    (lambda x, k: key(generator=default_generator(x), device="nil"), RuntimeError, "device"),
    (lambda x, k: noise(split(k), 3), RuntimeError, "noise(): the batch shape of key must"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_bad_input(
    both_paths: str, call: Call, error: type[Exception], message: str, device: torch.device
) -> None:
    x, k = torch.zeros(4, 3, device=device), key(1, device=device)
    generators = [torch.default_generator, *torch.cuda.default_generators]
    states = [generator.get_state() for generator in generators]
    with pytest.raises(error, match=re.escape(message.replace("DEVICE", str(device)))):
        call(x, k)
    for generator, state in zip(generators, states, strict=True):
        assert torch.equal(generator.get_state(), state)
    assert not x.any()
    assert k.tolist() == [1, 0]


def test_a_device_that_is_not_there_moves_no_generator() -> None:
    """Red where key() draws before it asks for it; the words are torch's."""
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"NVIDIA|CUDA"):
        key(generator=torch.default_generator, device="cuda:99")
    assert torch.equal(before, torch.get_rng_state())


CASES_OF_TWO_DEVICES: list[tuple[Call, str]] = [
    (
        lambda x, k: fused_reparameterize(x, x.cpu()),
        "mu and log_var must be on the same device, got mu on cuda:0 and log_var on cpu",
    ),
    (
        lambda x, k: fused_reparameterize(x[0, 0].cpu(), x),
        "mu and log_var must be on the same device, got mu on cpu and log_var on cuda:0",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, key=k.cpu()),
        "key must be on the device of mu, cuda:0, got cpu",
    ),
    (
        lambda x, k: fused_reparameterize(x.cpu(), x.cpu(), key=k),
        "key must be on the device of mu, cpu, got cuda:0",
    ),
    (
        lambda x, k: fused_reparameterize(x, x, generator=torch.Generator()),
        "generator must be on the device of mu, cuda:0, got cpu",
    ),
    (
        lambda x, k: fused_reparameterize(x.cpu(), x.cpu(), generator=torch.Generator(x.device)),
        "generator must be on the device of mu, cpu, got cuda:0",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), CASES_OF_TWO_DEVICES, ids=range(len(CASES_OF_TWO_DEVICES))
)
def test_a_gpu_and_the_cpu_in_one_call(
    both_paths: str, call: Call, message: str, cuda: torch.device
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(torch.zeros(4, 3, device=cuda), key(1, device=cuda))


def test_a_call_without_arguments_is_pythons_own_error(device: torch.device) -> None:
    x = torch.zeros(4, 3, device=device)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused_reparameterize()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        fused_reparameterize(x, x, key(1, device=device))  # type: ignore[misc]


@needs_kernels
@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, 2.0]), key(1)[:1], split(key(1), 12).view(1, 1, 12, 2)], ids=range(3)
)
def test_the_ops_themselves_check_what_memory_safety_needs(
    bad: Tensor, device: torch.device
) -> None:
    x = torch.zeros(4, 3, device=device)
    refused = r"expected a uint64 key of shape \(2,\) or \(\*batch, 2\)"
    with pytest.raises(RuntimeError, match=refused):
        reparam_fused._ops.sample_from_key(x, x, bad.to(device))
    for op in (
        lambda scale: reparam_fused._ops.sample_from_key(x, scale, key(1, device=device)),
        lambda scale: reparam_fused._ops.sample(x, scale),
        lambda scale: reparam_fused._ops.kl_divergence(x, scale),
    ):
        state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
        with pytest.raises(RuntimeError, match=r"bfloat16, got (Int|torch\.int32)"):
            op(x.int())
        now = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
        assert torch.equal(state, now)
    with pytest.raises(RuntimeError, match=refused):
        reparam_fused._ops.noise(bad.to(device), x.shape, torch.float32)


def test_memory_that_is_not_there_moves_no_generator(both_paths: str, device: torch.device) -> None:
    """Red where a key is drawn before what it is for is allocated, and not given back: in heads."""
    zero, generator = torch.zeros(1, device=device), torch.Generator(device).manual_seed(1)
    much, scale = zero.expand(2**45), zero.clone().requires_grad_()
    more = much.view(2**15, 2**30)
    calls: list[Callable[[], Any]] = [
        lambda: fused_reparameterize(much, zero, generator=generator),
        lambda: fused_reparameterize(much, scale, generator=generator),
        lambda: fused_reparameterize(zero, zero, sample_shape=(2**45,), generator=generator),
        lambda: fused_reparameterize(zero, zero, sample_shape=(2**20, 2**25), generator=generator),
        lambda: fused_reparameterize_kl(much, zero, dim=-1, generator=generator),
        lambda: fused_reparameterize_kl(more, zero, dim=0, generator=generator),
        lambda: fused_reparameterize_kl(
            zero, zero, dim=-1, sample_shape=(2**45,), generator=generator
        ),
        lambda: fused_reparameterize_kl(
            zero, zero.expand(2**20, 1), dim=(), sample_shape=(2**25,), generator=generator
        ),
        lambda: fused_reparameterize_log_prob(more, scale, dim=0, generator=generator),
        lambda: fused_reparameterize_log_prob(
            zero, zero, dim=0, sample_shape=(2**20, 2**25), generator=generator
        ),
        lambda: torch.vmap(
            lambda mu: fused_reparameterize(mu, zero, generator=generator), randomness="same"
        )(more),
    ]
    state = generator.get_state()
    for number, call in enumerate(calls):
        with pytest.raises(
            RuntimeError, match=r"can't allocate memory|[Oo]ut of memory|out of mem"
        ):
            call()
        assert torch.equal(generator.get_state(), state), number


def test_a_number_beyond_the_dtype_is_infinite(both_paths: str, device: torch.device) -> None:
    """As torch has it of a number in an operation: torch.full refuses it, in words of its own."""
    ones, k = torch.ones(2, device=device), key(1, device=device)
    huge = fused_reparameterize(ones, std=2**64, key=k)
    assert_same_bits(huge, fused_reparameterize(ones, std=2.0**64, key=k))
    for number in (1e300, 2**200):
        z = fused_reparameterize(ones, std=number, key=k)
        assert z.cpu().isinf().all()
        assert torch.equal(z.cpu() > 0, noise(k.cpu(), 2) > 0)


def test_no_samples_of_many_elements_take_no_time(device: torch.device) -> None:
    """Red by a hang, where the kernel goes over elements of which it draws nothing."""
    mu = torch.zeros(1, 1, device=device).expand(2**20, 2**20)
    assert fused_reparameterize(mu, 0.0, sample_shape=(0,)).shape == (0, 2**20, 2**20)


@needs_kernels
def test_more_elements_than_are_counted() -> None:
    """Red by words about a global_shape, where their number wraps before it is looked at."""
    mu, scale = torch.zeros(1, 1).expand(2**40, 1), torch.zeros(1, 1).expand(1, 2**40)
    for dim in (None, -1, ()):
        with pytest.raises(RuntimeError, match=r"less than 2\^63 elements"):
            fused_kl_divergence(mu, scale, dim=dim)
    for size in ([2**40, 2**40], [2**31, 2**31, 2, 2], [0, 2**40, 2**40]):
        with pytest.raises(RuntimeError, match=r"less than 2\^63 elements"):
            reparam_fused._ops.noise(key(1), size, torch.float32)
    with pytest.raises(RuntimeError, match=r"less than 2\^63 elements"):
        reparam_fused._ops.sample_from_key(mu, mu, key(1), samples=2**40)


def test_no_keys_have_no_children(device: torch.device) -> None:
    """Red where what is empty is not taken for contiguous."""
    none = torch.empty(4, 0, dtype=torch.int64, device=device).t().view(0, 2, 2)[..., 0]
    assert split(none, 3).shape == (3, 0, 2)
    assert fold_in(none, 7).shape == (0, 2)


@needs_kernels
def test_children_of_numbers_are_of_one_each(device: torch.device) -> None:
    """Red where derive() has memory for more of them, which nobody writes."""
    keys, data = key([1, 2, 3], device=device), torch.tensor([7], device=device)
    assert reparam_fused._ops.derive(keys, data, 0, 1).shape == (1, 3, 2)
    for op in (reparam_fused._ops.derive, torch.ops.reparam_fused.derive.python):
        for num in (0, 2):
            with pytest.raises(RuntimeError, match="contiguous keys"):
                op(keys, data, 0, num)
        for wrong in (keys.view(-1), keys.view(2, 3), keys[None]):
            with pytest.raises(RuntimeError, match="contiguous keys"):
                op(wrong, None, 0, 1)


@pytest.mark.parametrize("overload", ["default", "python"])
def test_the_ops_take_dense_tensors_alone(
    overload: str, device: torch.device, recwarn: pytest.WarningsRecorder
) -> None:
    """Of one device, and no None. Red where a check of _ops.py looks at dtypes only."""
    ops = torch.ops.reparam_fused
    x, k = torch.zeros(4, 3, device=device), key(1, device=device)
    bad = [x.to_sparse(), x.to_sparse_csr(), torch.nested.nested_tensor([x, x]), None]
    bad += [x.to_mkldnn()] if device.type == "cpu" else []
    calls: dict[str, Callable[[Any], Any]] = {
        "sample_from_key": lambda t: (t, x, k),
        "sample_backward": lambda t: (t, x, k),
        "samples_backward": lambda t: (t, x[0], k),
        "kl_divergence": lambda t: (x, t),
        "kl_divergence_backward": lambda t: (t, x),
        "head": lambda t: (t, x, k, None, None, "log_prob", 1),
        "head_backward": lambda t: (x, x, k, None, None, x, t, "log_prob", 0),
        "sample": lambda t: (t, x),
    }
    for name, arguments in calls.items():
        op = getattr(ops, name)
        if overload not in op.overloads():
            continue
        state = torch.get_rng_state()
        for t in bad:
            with pytest.raises(RuntimeError):
                getattr(op, overload)(*arguments(t))
        assert torch.equal(torch.get_rng_state(), state)
    assert not [w for w in recwarn if "missing" in str(w.message)]


def test_a_tensor_on_another_device_makes_no_result(device: torch.device) -> None:
    """Red where an op's fake kernel, which torch asks where any tensor is of meta, gives of the
    others a sum, or memory that nobody wrote."""
    x = torch.zeros(3, device=device)
    for call in (
        lambda k: reparam_fused._ops.sample_from_key(x, x, k),
        lambda k: reparam_fused._ops.sample_backward(x, x, k),
        lambda k: reparam_fused._ops.samples_backward(x[None], x, k),
        lambda k: reparam_fused._ops.head(x, x, k, None, None, "log_prob", 1),
        lambda k: reparam_fused._ops.head(x, x, None, x, k.float(), "kl_divergence", 1),
        lambda k: reparam_fused._ops.sample_fresh(x, x, k),
        lambda k: reparam_fused._ops.draw_key(x, x, k),
        lambda k: reparam_fused._ops.draw_key(x[0], k.float()),
        lambda k: reparam_fused._ops.derive(key([1, 2], device=device), k.long(), 0, 1),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call(key(1, device="meta"))


def test_the_ops_take_no_sparse_key(recwarn: pytest.WarningsRecorder) -> None:
    """And do not say that a compiler is missing."""
    x, sparse = torch.zeros(3), key(1).view(torch.int64).to_sparse()
    calls = {
        "layout torch.sparse_coo": lambda: reparam_fused._ops.sample_from_key(x, x, sparse),
        "of layout torch.sparse": lambda: reparam_fused._ops.noise(sparse, (3,), torch.float32),
        "contiguous keys": lambda: reparam_fused._ops.derive(sparse[None], None, 0, 2),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert not [w for w in recwarn if "missing" in str(w.message)]


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
