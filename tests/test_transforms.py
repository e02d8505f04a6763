"""torch.func and forward mode: vmap, jvp, jacobians; within torch.compile no silent zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_same_bits, key_of
from torch import Tensor
from torch.autograd import forward_ad

import reparam_fused
from reparam_fused import _ops, fused_reparameterize

KEY = key_of(21, 2**32 - 2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MU, LOG_VAR = draw(3, 5), draw(3, 5, seed=1)


def with_key(mu: Tensor, log_var: Tensor) -> Tensor:
    return fused_reparameterize(mu, log_var, key=KEY)


# in_dims, and the shapes that go with them
BATCHES = [
    ((0, 0, None), (4, 6), (4, 6)),
    ((1, 0, None), (6, 4), (4, 6)),
    ((0, None, None), (4, 6), (6,)),
    ((None, 1, None), (6,), (6, 4)),
    ((0, 0, None), (4, 3, 6), (4, 6)),
    ((0, 0, None), (4, 6), (4, 3, 6)),
    ((0, 0, 0), (4, 6), (4, 6)),
    ((None, None, 0), (6,), (6,)),
    ((0, None, 1), (4, 6), (2, 6)),
    ((0, 0, None), (1, 6), (1, 6)),
]


@pytest.mark.parametrize(("in_dims", "mu_shape", "log_var_shape"), BATCHES)
@pytest.mark.parametrize("op", [fused_reparameterize, _ops.sample_from_key, _ops.sample_backward])
def test_vmap_is_a_call_for_each_example(
    op: Callable[..., Tensor],
    in_dims: tuple[int | None, ...],
    mu_shape: tuple[int, ...],
    log_var_shape: tuple[int, ...],
) -> None:
    """The noise is batched if and only if the key is."""
    mu, log_var = draw(*mu_shape), draw(*log_var_shape, seed=1)
    n = max(t.shape[d] for t, d in zip((mu, log_var), in_dims[:2], strict=True) if d is not None) \
        if in_dims[:2] != (None, None) else 4  # fmt: skip
    key = KEY if in_dims[2] is None else reparam_fused.split(KEY, n).movedim(0, in_dims[2])

    def call(m: Tensor, v: Tensor, k: Tensor) -> Tensor:
        return op(m, v, key=k) if op is fused_reparameterize else op(m, v, k)

    result = torch.vmap(call, in_dims=in_dims)(mu, log_var, key)
    for i in range(n):
        one = [
            t if d is None else t.select(d, i)
            for t, d in zip((mu, log_var, key), in_dims, strict=True)
        ]
        assert_same_bits(result[i], call(*one))


def test_vmap_within_vmap_and_batches_of_keys() -> None:
    keys = reparam_fused.split(KEY, 6).view(2, 3, 2)
    mu, log_var = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    call = lambda m, v, k: fused_reparameterize(m, v, key=k)  # noqa: E731
    assert_same_bits(torch.vmap(torch.vmap(call))(mu, log_var, keys), call(mu, log_var, keys))
    assert_same_bits(torch.vmap(call)(mu, log_var, keys), call(mu, log_var, keys))
    noise = torch.vmap(lambda k: reparam_fused.noise(k, 5))(keys[0])
    assert_same_bits(noise, reparam_fused.noise(keys[0], 3, 5))


def test_vmap_of_noise() -> None:
    """A batch of keys, wherever it lies; blocks have no place of their own in the batch."""
    keys = reparam_fused.split(KEY, 12).view(3, 4, 2)
    rows = torch.vmap(lambda k: reparam_fused.noise(k, 4, 5), in_dims=1)(keys[:, 0].T)
    assert_same_bits(rows, reparam_fused.noise(keys[:, 0], 3, 4, 5))
    within = torch.vmap(torch.vmap(lambda k: reparam_fused.noise(k, 5)), in_dims=1)(keys)
    assert_same_bits(within, reparam_fused.noise(keys, 3, 4, 5).transpose(0, 1))
    block = {"global_shape": (7, 9), "global_offset": (2, 3)}
    for call in (
        lambda k: reparam_fused.noise(k, 4, 5, **block),
        lambda k: reparam_fused.noise(k[None], 4, 5, **block),
        lambda k: fused_reparameterize(MU[0, :1].expand(4, 5), LOG_VAR[0], key=k, **block),
    ):
        each = torch.stack([call(k) for k in keys[0]])
        assert_same_bits(torch.vmap(call)(keys[0]), each)
    fixed = torch.vmap(lambda x: x + reparam_fused.noise(KEY, 5, dtype=torch.float64))(MU)
    assert_same_bits(fixed, MU + reparam_fused.noise(KEY, 5, dtype=torch.float64))


def test_vmap_randomness_modes() -> None:
    """As torch.randn has them: also where nothing that is drawn for is batched."""
    zero = torch.zeros(4, 6)
    for call in (
        lambda x: fused_reparameterize(x, x),
        lambda x: fused_reparameterize(zero[0], zero[0]) + x,
    ):
        different = torch.vmap(call, randomness="different")(zero)
        assert different.flatten().unique().numel() == 24
        same = torch.vmap(call, randomness="same")(zero)
        assert torch.equal(same, same[:1].expand(4, 6))
        assert same[0].unique().numel() == 6
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(call)(zero)
        torch.manual_seed(1)
        first = torch.vmap(call, randomness="different")(zero)
        torch.manual_seed(1)
        assert_same_bits(torch.vmap(call, randomness="different")(zero), first)


def test_jvp() -> None:
    eps = reparam_fused.noise(KEY, 3, 5, dtype=torch.float64)
    mu_t, log_var_t = draw(3, 5, seed=2), draw(3, 5, seed=3)
    z, tangent = torch.func.jvp(with_key, (MU, LOG_VAR), (mu_t, log_var_t))
    assert_same_bits(z, with_key(MU, LOG_VAR))
    expected = mu_t + 0.5 * torch.exp(0.5 * LOG_VAR) * eps * log_var_t
    torch.testing.assert_close(tangent, expected)


def test_jvp_of_one_input_that_broadcasts_in_another_dtype() -> None:
    mu, log_var = torch.zeros(4, 1, dtype=torch.bfloat16), torch.zeros(5)
    for at in (0, 1):
        inputs = [mu, log_var]
        call = lambda t, at=at, inputs=inputs: with_key(*inputs[:at], t, *inputs[at + 1 :])  # noqa: E731
        z, tangent = torch.func.jvp(call, (inputs[at],), (torch.ones_like(inputs[at]),))
        assert (tangent.shape, tangent.dtype) == (z.shape, z.dtype)
        expected = torch.ones(4, 5) if at == 0 else 0.5 * z
        torch.testing.assert_close(tangent, expected)


def test_jvp_without_a_key() -> None:
    torch.manual_seed(3)
    z, tangent = torch.func.jvp(fused_reparameterize, (MU, LOG_VAR), (MU, LOG_VAR))
    torch.testing.assert_close(tangent, MU + 0.5 * (z - MU) * LOG_VAR)
    torch.manual_seed(3)
    assert_same_bits(fused_reparameterize(MU, LOG_VAR), z)


def test_forward_ad() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(LOG_VAR, torch.ones_like(LOG_VAR))
        z, tangent = forward_ad.unpack_dual(with_key(MU, dual))
    torch.testing.assert_close(tangent, 0.5 * (z - MU))


def test_second_derivatives() -> None:
    """Of sum(z^2) by log_var, against the formula; forward over forward is refused."""

    def loss(log_var: Tensor) -> Tensor:
        return with_key(MU, log_var).square().sum()

    noise = with_key(torch.zeros_like(MU), LOG_VAR)  # sigma eps
    second = 0.5 * noise * noise + 0.5 * (MU + noise) * noise
    expected = torch.diag(second.flatten()).view(3, 5, 3, 5)
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev)):
        torch.testing.assert_close(outer(inner(loss))(LOG_VAR), expected)
    with pytest.raises(NotImplementedError, match="make one of the two reverse-mode"):
        jacfwd(jacfwd(loss))(LOG_VAR)
    torch.testing.assert_close(torch.func.hessian(loss)(LOG_VAR), expected)


@pytest.mark.parametrize("shapes", [((3, 5), (3, 5)), ((3, 5), (5,)), ((1, 5), (3, 1))])
def test_jacfwd_equals_jacrev(shapes: tuple[tuple[int, ...], ...]) -> None:
    """A wrong batching of the noise passes gradcheck, and shows here."""
    mu, log_var = draw(*shapes[0]), draw(*shapes[1], seed=1)
    forward = torch.func.jacfwd(with_key, (0, 1))(mu, log_var)
    reverse = torch.func.jacrev(with_key, (0, 1))(mu, log_var)
    for f, r in zip(forward, reverse, strict=True):
        torch.testing.assert_close(f, r)


def test_gradcheck_of_all_modes() -> None:
    mu, log_var = MU.clone().requires_grad_(), LOG_VAR.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        with_key, (mu, log_var), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        with_key, (mu, log_var), check_fwd_over_rev=True, check_rev_over_rev=True,
        check_batched_grad=True,
    )  # fmt: skip


def test_is_grads_batched(both_paths: str) -> None:
    mu, log_var = MU.clone().requires_grad_(), LOG_VAR.clone().requires_grad_()
    z = with_key(mu, log_var)
    grads = draw(4, 3, 5, seed=7)
    batched = torch.autograd.grad(z, (mu, log_var), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(z, (mu, log_var), grad, retain_graph=True)
        for b, o in zip(batched, one, strict=True):
            assert_same_bits(b[i], o)


def test_per_example_gradients() -> None:
    def loss(log_var: Tensor, mu: Tensor, key: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key).square().sum()

    keys = reparam_fused.split(KEY, 3)
    each = torch.vmap(torch.func.grad(loss))(LOG_VAR, MU, keys)
    for i in range(3):
        assert_same_bits(each[i], torch.func.grad(loss)(LOG_VAR[i], MU[i], keys[i]))


def test_no_silent_zeros_within_a_compiler() -> None:
    """A traced op has a zero tangent: refused in one graph, and left to eager in several."""

    def tangent(mu: Tensor, log_var: Tensor) -> Tensor:
        result: Tensor = torch.func.jvp(with_key, (mu, log_var), (mu, log_var))[1]
        return result

    expected = tangent(MU, LOG_VAR)
    assert_same_bits(torch.compile(tangent, backend="eager")(MU, LOG_VAR), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, backend="eager", fullgraph=True)(MU, LOG_VAR)
    torch._dynamo.reset()


def test_vmap_within_a_compiler() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.vmap(lambda m, v: fused_reparameterize(m, v), randomness="different")
        return torch.vmap(with_key)(mu, log_var), drawn(mu, log_var)

    zero = torch.zeros(3, 5)
    fixed, drawn = call(zero, zero)
    assert_same_bits(fixed, reparam_fused.noise(KEY, 5).expand(3, 5))
    assert drawn.unique().numel() == 15
    torch._dynamo.reset()
