"""The public call as a user of torch would expect it to behave."""

from __future__ import annotations

import copy
from itertools import product
from typing import ClassVar

import pytest
import torch
from conftest import DTYPES
from helpers import assert_as_on_cpu, assert_same_bits, eager, inputs, key_of
from torch import Tensor

import reparam_fused
from reparam_fused import fused_reparameterize

KEY = key_of(13)


@pytest.mark.parametrize(
    ("mu_shape", "log_var_shape"),
    [
        ((4, 5), (5,)),
        ((5,), (4, 5)),
        ((4, 1), (1, 5)),
        ((), (3,)),
        ((2, 3), ()),
        ((), ()),
        ((0,), (1,)),
        ((3, 0, 2), (0, 1)),
        ((0,), ()),
    ],
)
def test_broadcasting(
    both_paths: str,
    mu_shape: tuple[int, ...],
    log_var_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    mu, _ = inputs(*mu_shape, device=device)
    _, log_var = inputs(*log_var_shape, device=device)
    key = KEY.to(device)
    z = fused_reparameterize(mu, log_var, key=key)
    shape = torch.broadcast_shapes(mu_shape, log_var_shape)
    assert z.shape == shape
    eps = reparam_fused.noise(KEY, shape)
    expected = eager(mu.cpu(), log_var.cpu(), eps)
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mu_dtype", "log_var_dtype"), list(product(DTYPES, DTYPES)))
def test_mixed_dtypes(
    both_paths: str, mu_dtype: torch.dtype, log_var_dtype: torch.dtype, device: torch.device
) -> None:
    for log_var_shape in ((40,), ()):
        mu, _ = inputs(40, dtype=mu_dtype, device=device)
        _, log_var = inputs(*log_var_shape, dtype=log_var_dtype, device=device)
        mu.requires_grad_()
        log_var.requires_grad_()
        z = fused_reparameterize(mu, log_var, key=KEY.to(device))
        common = torch.result_type(mu, log_var)
        assert z.dtype == common
        promoted = (t.detach().cpu().to(common) for t in (mu, log_var))
        assert_as_on_cpu(z, fused_reparameterize(*promoted, key=KEY))
        grad_mu, grad_log_var = torch.autograd.grad(z.sum(), (mu, log_var))
        assert grad_mu.dtype == mu_dtype
        assert grad_log_var.dtype == log_var_dtype
        assert grad_log_var.shape == log_var.shape


def test_memory_format_is_that_of_the_eager_line(both_paths: str, device: torch.device) -> None:
    mu, log_var = inputs(2, 3, 4, 5, device=device)
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3),
        lambda t: t[:, ::2],
        lambda t: t[:, :1].expand(2, 3, 4, 5),
    ):
        a, b = view(mu), view(log_var)
        z = fused_reparameterize(a, b, key=KEY.to(device))
        assert z.stride() == eager(a, b, torch.randn_like(a)).stride()
        dense = a.cpu().contiguous(), b.cpu().contiguous()
        assert_same_bits(z, fused_reparameterize(*dense, key=KEY))


def test_one_element_wherever_it_lies(both_paths: str, device: torch.device) -> None:
    """Of no dimension, or of one; its address need not be a vector's."""
    for where in (0, 1, slice(1, 2)):
        mu, log_var = (t[where] for t in inputs(8))
        z = fused_reparameterize(*(t[where] for t in inputs(8, device=device)), key=KEY.to(device))
        assert_same_bits(z, fused_reparameterize(mu, log_var, key=KEY))


def test_the_inputs_are_left_alone(both_paths: str, device: torch.device) -> None:
    given = *inputs(100, device=device), KEY.to(device)
    before = [t.clone() for t in given]
    mu, log_var, key = given
    z = fused_reparameterize(mu, log_var, key=key)
    z.zero_()
    for t, was in zip(given, before, strict=True):
        assert torch.equal(t, was)


def test_negated_views(both_paths: str, device: torch.device) -> None:
    """A lazily negated view, as the imaginary part of a conjugate is."""
    mu = torch.complex(*inputs(10)).to(device).conj().imag
    assert mu.is_neg()
    z = fused_reparameterize(mu, mu, key=KEY.to(device))
    plain = mu.resolve_neg().cpu()
    assert_same_bits(z, fused_reparameterize(plain, plain, key=KEY))


def test_parameters_and_deepcopy(both_paths: str, device: torch.device) -> None:
    mu = torch.nn.Parameter(torch.zeros(4, device=device))
    log_var = copy.deepcopy(mu)
    fused_reparameterize(mu, log_var, key=KEY.to(device)).sum().backward()
    assert mu.grad is not None
    assert mu.grad.tolist() == [1.0] * 4


def test_a_number_is_a_scale(both_paths: str, dtype: torch.dtype, device: torch.device) -> None:
    """Of the dtype of mu."""
    mu, _ = inputs(10, dtype=dtype, device=device)
    number = torch.tensor(0.3, dtype=dtype, device=device)
    for name in ("log_var", "std"):
        z = fused_reparameterize(mu, **{name: 0.3}, key=KEY.to(device))
        assert_same_bits(z, fused_reparameterize(mu, **{name: number}, key=KEY.to(device)))


class Marked(torch.Tensor):
    """A subclass of the kind that users write: __torch_function__ by inheritance."""


def test_a_subclass_stays_one(both_paths: str, device: torch.device) -> None:
    mu, log_var = inputs(10, device=device)
    z = fused_reparameterize(mu.as_subclass(Marked), log_var, key=KEY.to(device))
    assert type(z) is Marked
    assert_same_bits(z.as_subclass(Tensor), fused_reparameterize(*inputs(10), key=KEY))


class Watched(torch.Tensor):
    """A subclass that sees what it is given to."""

    seen: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("at", range(3), ids=["mu", "log_var", "key"])
def test_a_subclass_sees_the_call(both_paths: str, at: int, device: torch.device) -> None:
    given: list[Tensor] = [*inputs(10, device=device), KEY.to(device)]
    given[at] = given[at].as_subclass(Watched)
    Watched.seen.clear()
    fused_reparameterize(*given[:2], key=given[2])
    assert Watched.seen[0] is fused_reparameterize


def test_torch_function_modes_see_the_call(both_paths: str, device: torch.device) -> None:
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    mu, log_var = inputs(10, device=device)
    key = KEY.to(device)
    with Spy():
        fused_reparameterize(mu, log_var, key=key)
    assert fused_reparameterize in seen


def test_dispatch_modes_see_one_op(both_paths: str, device: torch.device) -> None:
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    mu, log_var = inputs(10, device=device)
    key = KEY.to(device)
    with Spy():
        fused_reparameterize(mu, log_var, key=key)
    assert seen == ["reparam_fused.sample_from_key.default"]


def test_meta_tensors() -> None:
    mu = torch.empty(3, 4, device="meta")
    z = fused_reparameterize(mu, mu[0].half(), key=reparam_fused.key(1, device="meta"))
    assert (z.device.type, z.shape, z.dtype) == ("meta", (3, 4), torch.float32)


def test_fake_tensors(device: torch.device) -> None:
    with torch._subclasses.FakeTensorMode():
        mu = torch.empty(3, 4, device=device, requires_grad=True)
        z = fused_reparameterize(mu, mu)
        (grad,) = torch.autograd.grad(z.sum(), mu)
        for t in (z, grad):
            assert (t.device, t.shape) == (mu.device, (3, 4))


def test_noise_takes_a_shape_as_torch_does(device: torch.device) -> None:
    key = KEY.to(device)
    for a, b in (
        (reparam_fused.noise(key, 3, 4), reparam_fused.noise(KEY, (3, 4))),
        (reparam_fused.noise(key, torch.Size([3, 4])), reparam_fused.noise(KEY, [3, 4])),
        (reparam_fused.noise(key, ()), reparam_fused.noise(KEY)),
        (reparam_fused.noise(key, 0), torch.empty(0)),
    ):
        assert a.device == key.device
        assert_same_bits(a, b)


def test_noise_is_one_op(device: torch.device) -> None:
    """Which makes its output, and nothing beside it: on a GPU a single launch."""
    seen = []
    key = KEY.to(device)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        reparam_fused.noise(key, 3, 4, dtype=torch.float16)
        with pytest.raises(TypeError):
            reparam_fused.noise(key, 3, 4, dtype=torch.int32)
    assert seen == ["reparam_fused.noise.default"]


def test_noise_of_meta_and_fake_keys() -> None:
    eps = reparam_fused.noise(reparam_fused.key(1, device="meta"), 3, 4, dtype=torch.float16)
    assert (eps.device.type, eps.shape, eps.dtype) == ("meta", (3, 4), torch.float16)
    with torch._subclasses.FakeTensorMode():
        eps = reparam_fused.noise(torch.empty(3, 2, dtype=torch.uint64), 3, 4)
        assert (eps.shape, eps.dtype, eps.stride()) == ((3, 4), torch.float32, (4, 1))


def test_half_types_are_rounded_once(both_paths: str, device: torch.device) -> None:
    for low in (torch.float16, torch.bfloat16):
        mu, log_var = inputs(1000, dtype=low)
        wide = fused_reparameterize(mu.float(), log_var.float(), key=KEY)
        z = fused_reparameterize(mu.to(device), log_var.to(device), key=KEY.to(device))
        assert_same_bits(z, wide.to(low))
