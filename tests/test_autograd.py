"""Gradients: against the eager formula with the same noise, of every order, on both paths."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_as_on_cpu, assert_same_bits, eager, inputs, key_of, leaves
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_fused
from reparam_fused import (
    _ops,
    fused_kl_divergence,
    fused_reparameterize,
    fused_reparameterize_kl,
    fused_reparameterize_log_prob,
)

KEY = key_of(21, 2**32 - 2)


SHAPES = [((5, 7), (5, 7)), ((5, 7), (7,)), ((1, 7), (5, 1)), ((), ()), ((3, 1, 2), (4, 1))]


@pytest.mark.parametrize(("mu_shape", "log_var_shape"), SHAPES)
def test_gradcheck(
    both_paths: str,
    mu_shape: tuple[int, ...],
    log_var_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    most = 2 if device.type == "cuda" else 7  # each element takes many launches
    mu, _ = leaves(*(min(n, most) for n in mu_shape), device=device)
    _, log_var = leaves(*(min(n, most) for n in log_var_shape), device=device)
    key = KEY.to(device)

    def sample(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key)

    assert gradcheck(sample, (mu, log_var))
    assert gradgradcheck(sample, (mu, log_var))


def test_gradients_are_those_of_the_eager_line(both_paths: str, device: torch.device) -> None:
    """To the third order, in value: gradcheck would not see a wrong z."""
    eps = reparam_fused.noise(KEY, 33, 5, dtype=torch.float64)
    results = []
    for place in (device, "cpu"):
        mu, log_var = leaves(33, 5, device=place)
        weight = torch.linspace(-1, 1, 165, dtype=torch.float64).view(33, 5).to(place)
        if not results:
            z = fused_reparameterize(mu, log_var, key=KEY.to(device))
        else:
            z = eager(mu, log_var, eps)
        first = torch.autograd.grad((z**3 * weight).sum(), (mu, log_var), create_graph=True)
        second = torch.autograd.grad(
            sum((g * weight).sum() for g in first), (mu, log_var), create_graph=True
        )
        third = torch.autograd.grad(second[1].sum(), (mu, log_var))
        results.append([t.cpu() for t in (z, *first, *second, *third)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", ["one", "batched"])
def test_gradient_uses_the_noise_of_the_forward(
    both_paths: str, dtype: torch.dtype, keys: str, device: torch.device
) -> None:
    mu, log_var = leaves(9, 100, dtype=dtype, device=device)
    key = KEY if keys == "one" else reparam_fused.split(KEY, 9)
    grad_z, _ = inputs(9, 100, dtype=dtype, seed=4, device=device)
    z = fused_reparameterize(mu, log_var, key=key.to(device))
    grad_mu, grad_log_var = torch.autograd.grad(z, (mu, log_var), grad_z)
    assert_same_bits(grad_mu, grad_z)
    expected = _ops.sample_backward(grad_z.cpu(), log_var.detach().cpu(), key)
    assert_as_on_cpu(grad_log_var, expected)
    # With a graph asked for, the bits are the same.
    z = fused_reparameterize(mu, log_var, key=key.to(device))
    _, again = torch.autograd.grad(z, (mu, log_var), grad_z, create_graph=True)
    assert_same_bits(again, grad_log_var)


@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients_against_fp64(
    both_paths: str, low: torch.dtype, device: torch.device
) -> None:
    """No worse than one rounding to the dtype and the ULPs of float32 before it.

    The eager line in the same dtype, with the same noise, is measured beside it: it rounds
    after every operation.
    """
    mu, log_var = leaves(20_000, dtype=low)
    grad_z, _ = inputs(20_000, dtype=low, seed=4)
    eps = reparam_fused.noise(KEY, 20_000)
    given = mu.to(device), log_var.to(device)
    z = fused_reparameterize(*given, key=KEY.to(device))
    _, ours = (g.cpu() for g in torch.autograd.grad(z, given, grad_z.to(device)))
    _, theirs = torch.autograd.grad(eager(mu, log_var, eps.to(low)), (mu, log_var), grad_z)
    exact = grad_z.double() * eps.double() * torch.exp(0.5 * log_var.detach().double()) / 2
    rounding = torch.finfo(low).eps / 2
    # measured: 3.3 units of 2^-24 in float32, 0.995 of a rounding in the half types;
    # half a denormal's step below the normals
    budget = (rounding + 4 * 2.0**-24) * exact.abs() + torch.finfo(low).smallest_normal * rounding
    ours_error, theirs_error = ((g.double() - exact).abs() for g in (ours, theirs))
    assert (ours_error <= budget).all()
    # measured: 1.09 times eager's mean error in float32, 0.51 in float16, 0.55 in bfloat16
    assert ours_error.mean() <= 1.25 * theirs_error.mean()


@pytest.mark.parametrize(
    ("mu_needs", "log_var_needs"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_requires_grad_on_either(
    both_paths: str, mu_needs: bool, log_var_needs: bool, device: torch.device
) -> None:
    mu, log_var = inputs(4, 4, device=device)
    mu.requires_grad_(mu_needs)
    log_var.requires_grad_(log_var_needs)
    z = fused_reparameterize(mu, log_var, key=KEY.to(device))
    assert z.requires_grad == (mu_needs or log_var_needs)
    assert_same_bits(z, fused_reparameterize(*inputs(4, 4), key=KEY))
    if z.requires_grad:
        z.sum().backward()
    assert (mu.grad is not None) == mu_needs
    assert (log_var.grad is not None) == log_var_needs
    with torch.no_grad():
        assert not fused_reparameterize(mu, log_var).requires_grad
    with torch.inference_mode():
        assert fused_reparameterize(mu, log_var).is_inference()


def test_mu_is_log_var(both_paths: str, device: torch.device) -> None:
    x, _ = leaves(50, device=device)
    eps = reparam_fused.noise(KEY, 50, dtype=torch.float64)
    fused_reparameterize(x, x, key=KEY.to(device)).sum().backward()
    assert x.grad is not None
    expected = 1 + 0.5 * torch.exp(0.5 * x.detach().cpu()) * eps
    torch.testing.assert_close(x.grad.cpu(), expected, rtol=1e-13, atol=1e-13)


def test_grad_mu_is_grad_z_itself(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(100, device=device)
    grad_z = torch.ones(100, dtype=torch.float64, device=device)
    grad_mu, _ = torch.autograd.grad(fused_reparameterize(mu, log_var), (mu, log_var), grad_z)
    assert grad_mu.data_ptr() == grad_z.data_ptr()


def test_only_log_var_and_the_key_are_kept(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(1000, device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = fused_reparameterize(mu, log_var)
        fused_reparameterize(mu, log_var.detach())
    sizes = sorted(t.untyped_storage().nbytes() for t in kept)
    assert sizes == [16, 8000]
    assert log_var.data_ptr() in [t.data_ptr() for t in kept]
    # and mu is free to go
    mu_alias = weakref.ref(leaf := mu * 1)
    z = fused_reparameterize(leaf, log_var)
    del leaf
    gc.collect()
    assert z.grad_fn is not None
    assert mu_alias() is None


def test_a_second_backward_needs_retain_graph(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(10, device=device)
    z = fused_reparameterize(mu, log_var, key=KEY.to(device))
    first = torch.autograd.grad(z.sum(), log_var, retain_graph=True)
    second = torch.autograd.grad(z.sum(), log_var)
    assert_same_bits(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum(), log_var)


def test_log_var_changed_in_place_is_an_error(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(10, device=device)
    scratch = log_var * 1
    z = fused_reparameterize(mu, scratch)
    scratch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_an_undefined_gradient_is_no_gradient(both_paths: str, device: torch.device) -> None:
    mu, log_var = leaves(10, device=device)

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    z = Drop.apply(fused_reparameterize(mu, log_var))
    grads = torch.autograd.grad(z.sum(), (mu, log_var), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_expanded_gradients_are_read_in_place(
    both_paths: str, dtype: torch.dtype, device: torch.device
) -> None:
    """z.sum() sends back one element, expanded."""
    mu, log_var = leaves(7, 90, dtype=dtype, device=device)
    fused_reparameterize(mu, log_var, key=KEY.to(device)).sum().backward()
    expected = _ops.sample_backward(torch.ones(7, 90, dtype=dtype), log_var.detach().cpu(), KEY)
    assert log_var.grad is not None
    assert_as_on_cpu(log_var.grad, expected)


@pytest.mark.parametrize("op", [_ops.sample_from_key, _ops.sample_backward])
@pytest.mark.parametrize("shapes", [((4, 6), (4, 6)), ((4, 6), (6,)), ((0, 6), (6,))])
def test_opcheck(
    op: torch._ops.OpOverload, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)
    key = KEY.to(device)
    x, _ = leaves(*shapes[0], dtype=torch.float32, device=device)
    _, log_var = leaves(*shapes[1], dtype=torch.float32, device=device)
    torch.library.opcheck(op, (x, log_var, key))
    if shapes[0] == shapes[1]:
        torch.library.opcheck(op, (x.detach().t(), log_var.detach().t(), key))
        torch.library.opcheck(op, (x, log_var, reparam_fused.split(key, 4)))


def test_opcheck_of_noise(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    for key, options in (
        (KEY, ((4, 6), torch.float32)),
        (reparam_fused.split(KEY, 4), ((4, 6), torch.bfloat16)),
        (KEY, ((4, 6), torch.float64, (9, 9), (3, 2))),
        (KEY, ((0, 6), torch.float32)),
    ):
        torch.library.opcheck(_ops.noise, (key.to(device), *options))


def test_opcheck_of_the_op_that_draws(device: torch.device) -> None:
    """All but the comparison of two runs: they draw different noise."""
    torch.use_deterministic_algorithms(False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for generator in (None, torch.Generator(device)):
        arguments = (*leaves(4, 6, device=device), generator)
        torch.library.opcheck(_ops.sample, arguments, test_utils=checks)


def test_opcheck_of_the_ops_in_a_graph(device: torch.device) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    mu, log_var = leaves(4, 6, device=device)
    fresh = torch.zeros((), dtype=torch.int64, device=device)  # the check reads it
    torch.library.opcheck(_ops.sample_fresh, (mu, log_var, fresh), test_utils=checks)
    # which reads what the op itself makes, and nobody writes
    torch.library.opcheck(_ops.traced_sample, (mu, log_var), test_utils=checks[1:])


NOT_KERNELS = {
    "aten::alias", "aten::detach", "aten::expand", "aten::view",
    "aten::is_same_size", "aten::_has_same_storage_numel",
}  # fmt: skip


class Ops(TorchDispatchMode):
    """The names of the ops that are called within it, but for those that move no data."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name() not in NOT_KERNELS:
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["log_var", "std"])
@pytest.mark.parametrize("call", ["key", "no key", "op"])
def test_a_backward_is_one_op(both_paths: str, call: str, form: str) -> None:
    """On a GPU one kernel: nothing is filled for the gradient of a key, which none has."""
    mu, scale = leaves(33, 5)
    if call == "op":
        z, _ = _ops.sample(mu, scale, None, form)
    else:
        options: dict[str, Any] = {form: scale, "key": KEY if call == "key" else None}
        z = fused_reparameterize(mu, **options)
    grad_z = torch.ones_like(z)
    with Ops() as ops:
        torch.autograd.grad(z, (mu, scale), grad_z)
    assert ops.names == ["reparam_fused::sample_backward"]


@pytest.mark.parametrize("by", ["grad", "scale"])
def test_a_second_backward_computes_what_is_asked_for(by: str) -> None:
    """By either the op once: not the other's too."""
    grad, scale = (
        t.requires_grad_(name == by)
        for t, name in zip(inputs(33, 5), ("grad", "scale"), strict=True)
    )
    for result in (
        _ops.sample_backward(grad, scale, KEY),
        _ops.kl_divergence_backward(grad, scale),
    ):
        with Ops() as ops:
            torch.autograd.grad(result, grad if by == "grad" else scale, torch.ones_like(result))
        assert len([name for name in ops.names if name.startswith("reparam_fused")]) == 1


@pytest.mark.parametrize("form", ["log_var", "std"])
def test_a_tangent_is_one_op(form: str) -> None:
    mu, scale = inputs(33, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scale, torch.ones_like(scale))
        with Ops() as ops:
            fused_reparameterize(mu, **{form: dual}, key=KEY)
    assert ops.names == ["reparam_fused::sample_from_key", "reparam_fused::sample_backward"]


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("with_key", [True, False])
def test_no_gradient_stays_none(both_paths: str, with_key: bool) -> None:
    """And nothing is computed, of the second order too."""
    mu, log_var = leaves(33, 5)
    z = fused_reparameterize(mu, log_var, key=KEY if with_key else None)
    kl = fused_kl_divergence(mu, log_var)
    firsts = (
        torch.autograd.grad(out.square().sum(), (mu, log_var), create_graph=True)[1]
        for out in (z, kl)
    )
    for out in (z, kl, *firsts):
        last = NoGradient.apply(out).sum()
        with Ops() as ops:
            grads = torch.autograd.grad(last, (mu, log_var), allow_unused=True, retain_graph=True)
        assert grads == (None, None)
        assert not [name for name in ops.names if name.startswith("reparam_fused")]


@pytest.mark.parametrize("call", ["sample", "samples", "divergence", "z", "sum"])
def test_a_sparse_gradient_is_taken(both_paths: str, call: str) -> None:
    """As the eager line takes it; it has the bits of the dense one."""
    mu, log_var = leaves(6, 5)

    def result() -> Tensor:
        if call == "sample":
            return fused_reparameterize(mu, log_var, key=KEY)
        if call == "samples":
            return fused_reparameterize(mu, log_var, sample_shape=(3,), key=KEY)
        if call == "divergence":
            return fused_kl_divergence(mu, log_var)
        z, kl = reparam_fused.fused_reparameterize_kl(mu, log_var, dim=-1, key=KEY)
        return z if call == "z" else kl

    out = result()
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    expected = torch.autograd.grad(out, (mu, log_var), grad)
    actual = torch.autograd.grad(result(), (mu, log_var), grad.to_sparse())
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a.to_dense(), e)


# What a call and the gradient of its scale are named by autograd
NODES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "drawn": (
        lambda mu, log_var: fused_reparameterize(mu, log_var),
        "FusedReparameterizeBackward",
        "FusedReparameterizeBackwardBackward",
    ),
    "of a key": (
        lambda mu, log_var: fused_reparameterize(mu, log_var, key=KEY.to(mu.device)),
        "FusedReparameterizeBackward",
        "FusedReparameterizeBackwardBackward",
    ),
    "samples": (
        lambda mu, log_var: fused_reparameterize(mu, log_var, sample_shape=(2,)),
        "FusedReparameterizeBackward",
        "FusedReparameterizeSamplesBackwardBackward",
    ),
    "kl": (
        lambda mu, log_var: fused_kl_divergence(mu, log_var),
        "FusedKLDivergenceBackward",
        "FusedKLDivergenceBackwardBackward",
    ),
    "sum": (
        lambda mu, log_var: fused_kl_divergence(mu, log_var, dim=-1),
        "FusedKLDivergenceBackward",
        "FusedKLDivergenceBackwardBackward",
    ),
    "sample and sum": (
        lambda mu, log_var: fused_reparameterize_kl(mu, log_var, dim=-1)[1],
        "FusedReparameterizeKLBackward",
        "FusedKLDivergenceBackwardBackward",
    ),
    "log-density": (
        lambda mu, log_var: fused_reparameterize_log_prob(mu, log_var, dim=-1)[1],
        "FusedReparameterizeLogProbBackward",
        "",
    ),
}


@pytest.mark.filterwarnings("ignore")  # in which anomaly mode shows the forward
@pytest.mark.parametrize("case", NODES)
def test_the_names_of_nodes_say_what_they_are(
    both_paths: str, case: str, device: torch.device
) -> None:
    """In grad_fn, where anomaly mode has found a NaN, and in a profile. Red where they are those of
    some private class."""
    call, name, second = NODES[case]
    mu, log_var = leaves(4, 3, device=device)
    result = call(mu, log_var)
    assert result.grad_fn is not None
    assert result.grad_fn.name() == name
    if second:
        (gradient,) = torch.autograd.grad(result.sum(), log_var, create_graph=True)
        assert gradient.grad_fn is not None
        assert gradient.grad_fn.name() == second
    nan = torch.full_like(log_var, torch.nan).requires_grad_()
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan values"),
    ):
        call(mu, nan).sum().backward()
    if device.type == "cuda":
        return  # the profiler asks for more of a GPU than the stand-in is
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call(mu, log_var).sum().backward()
    keys = {event.key for event in recorded.key_averages()}
    assert {name, name.removesuffix("Backward")} <= keys
