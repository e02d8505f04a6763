"""The public call as a user of torch would expect it to behave."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from conftest import DTYPES
from helpers import assert_same_bits, eager, inputs, key_of
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
    eps = reparam_fused.noise(key, shape)
    torch.testing.assert_close(z, eager(mu, log_var, eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mu_dtype", "log_var_dtype"), list(product(DTYPES, DTYPES)))
def test_mixed_dtypes(both_paths: str, mu_dtype: torch.dtype, log_var_dtype: torch.dtype) -> None:
    for log_var_shape in ((40,), ()):
        mu, _ = inputs(40, dtype=mu_dtype)
        _, log_var = inputs(*log_var_shape, dtype=log_var_dtype)
        mu.requires_grad_()
        log_var.requires_grad_()
        z = fused_reparameterize(mu, log_var, key=KEY)
        common = torch.result_type(mu, log_var)
        assert z.dtype == common
        assert_same_bits(z, fused_reparameterize(mu.to(common), log_var.to(common), key=KEY))
        grad_mu, grad_log_var = torch.autograd.grad(z.sum(), (mu, log_var))
        assert grad_mu.dtype == mu_dtype
        assert grad_log_var.dtype == log_var_dtype
        assert grad_log_var.shape == log_var.shape


def test_memory_format_is_that_of_the_eager_line(both_paths: str) -> None:
    mu, log_var = inputs(2, 3, 4, 5)
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3),
        lambda t: t[:, ::2],
        lambda t: t[:, :1].expand(2, 3, 4, 5),
    ):
        a, b = view(mu), view(log_var)
        z = fused_reparameterize(a, b, key=KEY)
        assert z.stride() == eager(a, b, torch.randn_like(a)).stride()
        assert_same_bits(
            z.contiguous(), fused_reparameterize(a.contiguous(), b.contiguous(), key=KEY)
        )


def test_the_inputs_are_left_alone(both_paths: str) -> None:
    mu, log_var = inputs(100)
    before = mu.clone(), log_var.clone(), KEY.clone()
    z = fused_reparameterize(mu, log_var, key=KEY)
    z.zero_()
    assert torch.equal(mu, before[0])
    assert torch.equal(log_var, before[1])
    assert torch.equal(KEY, before[2])


def test_negated_views(both_paths: str) -> None:
    """A lazily negated view, as the imaginary part of a conjugate is."""
    mu = torch.randn(10, dtype=torch.complex64).conj().imag
    assert mu.is_neg()
    z = fused_reparameterize(mu, mu, key=KEY)
    assert_same_bits(z, fused_reparameterize(mu.resolve_neg(), mu.resolve_neg(), key=KEY))


def test_parameters_and_deepcopy(both_paths: str) -> None:
    mu = torch.nn.Parameter(torch.zeros(4))
    log_var = copy.deepcopy(mu)
    fused_reparameterize(mu, log_var, key=KEY).sum().backward()
    assert mu.grad is not None
    assert torch.equal(mu.grad, torch.ones(4))


class Marked(torch.Tensor):
    """A subclass of the kind that users write: __torch_function__ by inheritance."""


def test_a_subclass_stays_one(both_paths: str) -> None:
    mu, log_var = inputs(10)
    z = fused_reparameterize(mu.as_subclass(Marked), log_var, key=KEY)
    assert type(z) is Marked
    assert_same_bits(z.as_subclass(Tensor), fused_reparameterize(mu, log_var, key=KEY))


def test_torch_function_modes_see_the_call(both_paths: str) -> None:
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    mu, log_var = inputs(10)
    with Spy():
        fused_reparameterize(mu, log_var, key=KEY)
    assert fused_reparameterize in seen


def test_dispatch_modes_see_one_op(both_paths: str) -> None:
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    mu, log_var = inputs(10)
    with Spy():
        fused_reparameterize(mu, log_var, key=KEY)
    assert seen == ["reparam_fused.sample_from_key.default"]


def test_meta_and_fake_tensors() -> None:
    mu = torch.empty(3, 4, device="meta")
    z = fused_reparameterize(mu, mu[0].half(), key=reparam_fused.key(1, device="meta"))
    assert (z.device.type, z.shape, z.dtype) == ("meta", (3, 4), torch.float32)
    with torch._subclasses.FakeTensorMode():
        mu = torch.empty(3, 4, requires_grad=True)
        z = fused_reparameterize(mu, mu)
        assert torch.autograd.grad(z.sum(), mu)[0].shape == (3, 4)


def test_noise_takes_a_shape_as_torch_does() -> None:
    for a, b in (
        (reparam_fused.noise(KEY, 3, 4), reparam_fused.noise(KEY, (3, 4))),
        (reparam_fused.noise(KEY, torch.Size([3, 4])), reparam_fused.noise(KEY, [3, 4])),
        (reparam_fused.noise(KEY, ()), reparam_fused.noise(KEY)),
        (reparam_fused.noise(KEY, 0), torch.empty(0)),
    ):
        assert_same_bits(a, b)


def test_half_types_are_rounded_once(both_paths: str) -> None:
    for low in (torch.float16, torch.bfloat16):
        mu, log_var = inputs(1000, dtype=low)
        wide = fused_reparameterize(mu.float(), log_var.float(), key=KEY)
        assert_same_bits(fused_reparameterize(mu, log_var, key=KEY), wide.to(low))
