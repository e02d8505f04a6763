"""The scale given as a standard deviation: z = mu + std * eps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digest import extremes
from helpers import assert_as_on_cpu, assert_same_bits, inputs, key_of, needs_kernels
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, fused_reparameterize, reference

KEY = key_of(5, 2**32 - 3)


def double(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def cases(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tails, offsets that carry and wrap, views, batches of keys, values that are extreme."""
    x, std = inputs(6, 10, 16, dtype=dtype, device=device)
    key = KEY.to(device)
    several = [
        (*inputs(n, dtype=dtype, seed=n, device=device), key_of(9, offset, device))
        for n in (0, 1, 5, 63, 129, 1021)
        for offset in (0, 2**32 - 7, 2**64 - 5)
    ]
    several += [
        (x.transpose(0, 2), std.transpose(0, 2), key),
        (x[..., ::3], std[..., ::3], key),
        (x[:, :1].expand(6, 10, 16), std, reparam_fused.split(key, 6)),
    ]
    if dtype != torch.float64:  # where reference.py is off by ULPs of the largest std
        largest = extremes(dtype).to(device)
        several.append((torch.ones_like(largest), largest, key))
    return several


@needs_kernels
def test_kernels_against_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    both = zip(cases(dtype, device), cases(dtype, torch.device("cpu")), strict=True)
    for (x, std, key), (x_cpu, std_cpu, key_cpu) in both:
        z = _ops.sample_from_key(x, std, key, "std").cpu()
        grad = _ops.sample_backward(x, None, key, "std").cpu()
        expected_z = reference.sample_from_key(x_cpu, std_cpu, key_cpu, "std")
        expected_grad = reference.sample_backward(x_cpu, None, key_cpu, "std")
        if dtype == torch.float64:
            torch.testing.assert_close(z, expected_z, rtol=1e-13, atol=1e-14, equal_nan=True)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-14)
        else:
            assert_same_bits(z, expected_z)
            assert_same_bits(grad, expected_grad)


def test_it_is_the_eager_line(both_paths: str, dtype: torch.dtype, device: torch.device) -> None:
    mu, std = inputs(7, 33, dtype=dtype)
    z = fused_reparameterize(mu.to(device), std=std.to(device), key=KEY.to(device))
    eps = reparam_fused.noise(KEY, 7, 33, dtype=torch.float64 if dtype == torch.float64 else None)
    expected = (mu.double() + std.double() * eps.double()).to(dtype)
    torch.testing.assert_close(z.cpu(), expected)
    assert z.dtype == dtype


def test_it_has_the_noise_of_the_other_form(dtype: torch.dtype, device: torch.device) -> None:
    zero = torch.zeros(999, dtype=dtype, device=device)
    one = fused_reparameterize(zero, std=torch.ones_like(zero), key=KEY.to(device))
    zero = zero.cpu()
    assert_as_on_cpu(one + 0.0, fused_reparameterize(zero, zero, key=KEY) + 0.0)


def test_draws_from_the_generator(both_paths: str, device: torch.device) -> None:
    mu, std = inputs(50, device=device)
    torch.manual_seed(3)
    z = fused_reparameterize(mu, std=std)
    assert not torch.equal(z, fused_reparameterize(mu, std=std))
    torch.manual_seed(3)
    assert_same_bits(fused_reparameterize(mu, std=std), z)
    generator = torch.Generator(device).manual_seed(3)
    assert_same_bits(fused_reparameterize(mu, std=std, generator=generator), z)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((1,), (2, 3))])
def test_gradients_of_every_order(
    both_paths: str, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    most = 2 if device.type == "cuda" else 4  # each element takes many launches
    shapes = tuple(tuple(min(n, most) for n in shape) for shape in shapes)
    mu, std = (
        double(*shape, seed=i, device=device).requires_grad_() for i, shape in enumerate(shapes)
    )
    shape = torch.broadcast_shapes(*shapes)
    eps = reparam_fused.noise(KEY, shape, dtype=torch.float64).to(device)
    key = KEY.to(device)

    def call(m: Tensor, s: Tensor) -> Tensor:
        return fused_reparameterize(m, std=s, key=key)

    torch.testing.assert_close(call(mu, std), mu + std * eps, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(call, (mu, std), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (mu, std))
    g = double(*shape, seed=7, device=device).requires_grad_()
    grads = torch.autograd.grad(call(mu, std), (mu, std), g, create_graph=True)
    expected = torch.autograd.grad(mu + std * eps, (mu, std), g, create_graph=True)
    torch.testing.assert_close(grads, expected)
    (by_g,) = torch.autograd.grad(grads[1].square().sum(), g)
    (expected_by_g,) = torch.autograd.grad(expected[1].square().sum(), g)
    torch.testing.assert_close(by_g, expected_by_g)


def test_only_the_key_is_kept(both_paths: str, device: torch.device) -> None:
    mu, std = (t.requires_grad_() for t in inputs(1000, device=device))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_reparameterize(mu, std=std)
        assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint64, 2)]
        kept.clear()
        _ops.sample_backward(mu, None, KEY.to(device), "std")
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint64, 2)]


def test_torch_func(device: torch.device) -> None:
    mu, std = double(3, 5, device=device), double(3, 5, seed=1, device=device)
    key, keys = KEY.to(device), reparam_fused.split(KEY, 3)

    def call(m: Tensor, s: Tensor, k: Tensor = key) -> Tensor:
        return fused_reparameterize(m, std=s, key=k)

    on_cpu = mu.cpu(), std.cpu()
    batched = torch.vmap(call)(mu, std, keys.to(device))
    assert_as_on_cpu(batched, call(*on_cpu, keys))
    one = torch.vmap(lambda m, s: call(m, s))(mu, std)[1]
    assert_as_on_cpu(one, call(*(t[1] for t in on_cpu), KEY))
    jacobians = [j(call, argnums=(0, 1))(mu, std) for j in (torch.func.jacrev, torch.func.jacfwd)]
    torch.testing.assert_close(*jacobians)
    hessian = torch.func.hessian(lambda s: call(mu, s).square().sum())(std)
    eps = reparam_fused.noise(KEY, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(hessian.view(15, 15).cpu(), (2 * eps.square()).flatten().diag())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str, device: torch.device) -> None:
    mu, std = (t.requires_grad_() for t in inputs(4, 6, device=device))
    on_cpu = [t.requires_grad_() for t in inputs(4, 6)]

    def loss(m: Tensor, s: Tensor, key: Tensor | None) -> Tensor:
        return fused_reparameterize(m, std=s, key=key).square().sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for key in (KEY.to(device), None):
        torch.manual_seed(1)
        first = torch.autograd.grad(compiled(mu, std, key), (mu, std))
        again = torch.autograd.grad(compiled(mu, std, key), (mu, std))
        assert torch.equal(first[0], again[0]) == (key is not None)
        if key is not None:
            expected = torch.autograd.grad(loss(*on_cpu, KEY), on_cpu)
            for a, b in zip(first, expected, strict=True):
                assert_same_bits(a, b)


def test_ops(device: torch.device) -> None:
    mu, std = (t.requires_grad_() for t in inputs(3, 5, device=device))
    key = KEY.to(device)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (_ops.sample_from_key, (mu, std, key, "std")),
        (_ops.sample_backward, (mu, None, key, "std")),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments)
    with pytest.raises(
        RuntimeError, match="expected form to be log_var or std or log_std or rho, got variance"
    ):
        _ops.sample_from_key(mu, std, key, "variance")
    with pytest.raises(RuntimeError, match="takes no scale in the form std"):
        _ops.sample_backward(mu, std, key, "std")


@pytest.mark.parametrize(
    ("given", "got"), [({}, "none"), ({"log_var": 1, "std": 1}, "log_var and std")]
)
def test_one_of_log_var_and_std(given: dict[str, int], got: str, device: torch.device) -> None:
    scales = {name: torch.ones(3, device=device) for name in given}
    with pytest.raises(ValueError, match=f"expected one of log_var, log_std, std, rho, got {got}"):
        fused_reparameterize(torch.ones(3, device=device), **scales)


def test_errors_name_std(device: torch.device) -> None:
    mu = torch.ones(3, device=device)
    with pytest.raises(TypeError, match="argument 'std' must be Tensor, not str"):
        fused_reparameterize(mu, std="1")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes of mu and std must broadcast"):
        fused_reparameterize(mu, std=torch.ones(4, device=device))
