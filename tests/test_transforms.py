"""torch.func and forward mode: vmap, jvp, jacobians; within torch.compile no silent zeros."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_as_on_cpu, assert_same_bits, inputs, key_of
from torch import Tensor
from torch.autograd import forward_ad

import reparam_fused
from reparam_fused import _ops, fused_reparameterize

KEY = key_of(21, 2**32 - 2)


def draw(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def operands(device: torch.device) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
    """mu, log_var, and the call of them with a key."""
    mu, log_var = draw(3, 5, device=device), draw(3, 5, seed=1, device=device)
    return mu, log_var, with_key(device)


def with_key(device: torch.device) -> Callable[..., Tensor]:
    key = KEY.to(device)
    return lambda mu, log_var: fused_reparameterize(mu, log_var, key=key)


# in_dims, and the shapes that go with them
BATCHES = [
    ((0, 0, None), (4, 6), (4, 6)),
    ((1, 0, None), (6, 4), (4, 6)),
    ((0, None, None), (4, 6), (6,)),
    ((None, 1, None), (6,), (6, 4)),
    ((0, 0, None), (4, 3, 6), (4, 6)),
    ((0, 0, None), (4, 6), (4, 3, 6)),
    ((2, 0, None), (3, 6, 4), (4, 6)),
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
    device: torch.device,
) -> None:
    """The noise is batched if and only if the key is."""
    mu, log_var = draw(*mu_shape, device=device), draw(*log_var_shape, seed=1, device=device)
    n = max(t.shape[d] for t, d in zip((mu, log_var), in_dims[:2], strict=True) if d is not None) \
        if in_dims[:2] != (None, None) else 4  # fmt: skip
    key = KEY.to(device)
    if in_dims[2] is not None:
        key = reparam_fused.split(key, n).movedim(0, in_dims[2])

    def call(m: Tensor, v: Tensor, k: Tensor) -> Tensor:
        return op(m, v, key=k) if op is fused_reparameterize else op(m, v, k)

    result = torch.vmap(call, in_dims=in_dims)(mu, log_var, key)
    for i in range(n):
        one = [
            (t if d is None else t.select(d, i)).cpu()
            for t, d in zip((mu, log_var, key), in_dims, strict=True)
        ]
        assert_as_on_cpu(result[i], call(*one))


def test_vmap_within_vmap_and_batches_of_keys(device: torch.device) -> None:
    keys = reparam_fused.split(KEY, 6).view(2, 3, 2)
    batch = draw(2, 3, 5), draw(2, 3, 5, seed=1), keys
    call = lambda m, v, k: fused_reparameterize(m, v, key=k)  # noqa: E731
    expected = call(*batch)
    on_device = [t.to(device) for t in batch]
    assert_as_on_cpu(torch.vmap(torch.vmap(call))(*on_device), expected)
    assert_as_on_cpu(torch.vmap(call)(*on_device), expected)
    noise = torch.vmap(lambda k: reparam_fused.noise(k, 5))(on_device[2][0])
    assert_same_bits(noise, reparam_fused.noise(keys[0], 3, 5))


def test_vmap_within_vmap_of_what_the_inner_does_not_batch(device: torch.device) -> None:
    """It is none of the inner one, whose result it goes into."""
    key = KEY.to(device)
    mu, x = draw(3, 5, device=device), draw(4, seed=1, device=device)
    keys = reparam_fused.split(key, 3)
    for call, rows in (
        (lambda m: fused_reparameterize(m, m, key=key), mu),
        (lambda k: reparam_fused.fold_in(k, 3).view(torch.int64) % 8, keys),
        (lambda k: reparam_fused.split(k[None])[0].view(torch.int64) % 8, keys),
    ):
        inner = lambda t, call=call: torch.vmap(lambda v: (v + call(t), call(t)))(x)  # noqa: E731
        sums, results = torch.vmap(inner)(rows)
        assert sums.shape[:2] == results.shape[:2] == (3, 4)
        for i, j in itertools.product(range(3), range(4)):
            assert_same_bits(sums[i, j], x[j] + call(rows[i]))


def test_vmap_of_noise(device: torch.device) -> None:
    """A batch of keys, wherever it lies; blocks have no place of their own in the batch."""
    key = KEY.to(device)
    mu, log_var = draw(3, 5, device=device), draw(3, 5, seed=1, device=device)
    keys = reparam_fused.split(key, 12).view(3, 4, 2)
    rows = torch.vmap(lambda k: reparam_fused.noise(k, 4, 5), in_dims=1)(keys[:, 0].T)
    assert_same_bits(rows, reparam_fused.noise(keys[:, 0], 3, 4, 5))
    within = torch.vmap(torch.vmap(lambda k: reparam_fused.noise(k, 5)), in_dims=1)(keys)
    assert_same_bits(within, reparam_fused.noise(keys, 3, 4, 5).transpose(0, 1))
    block = {"global_shape": (7, 9), "global_offset": (2, 3)}
    for call in (
        lambda k: reparam_fused.noise(k, 4, 5, **block),
        lambda k: reparam_fused.noise(k[None], 4, 5, **block),
        lambda k: fused_reparameterize(mu[0, :1].expand(4, 5), log_var[0], key=k, **block),
    ):
        each = torch.stack([call(k) for k in keys[0]])
        assert_same_bits(torch.vmap(call)(keys[0]), each)
    fixed = torch.vmap(lambda x: x + reparam_fused.noise(key, 5, dtype=torch.float64))(mu)
    assert_same_bits(fixed, mu + reparam_fused.noise(key, 5, dtype=torch.float64))


def test_vmap_randomness_modes(device: torch.device) -> None:
    """As torch.randn has them: also where nothing that is drawn for is batched."""
    zero = torch.zeros(4, 6, device=device)
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


def test_vmap_draws_from_the_generator_that_is_given(device: torch.device) -> None:
    zero = torch.zeros(4, 6, device=device)
    generator = torch.Generator(device)
    call = lambda x: fused_reparameterize(x, x, generator=generator)  # noqa: E731
    for randomness in ("different", "same"):
        drawn = []
        for seed in (1, 2):
            generator.manual_seed(7)
            torch.manual_seed(seed)
            drawn.append(torch.vmap(call, randomness=randomness)(zero))
        assert_same_bits(*drawn)


def test_what_torch_func_allows_is_as_before(device: torch.device) -> None:
    """A call within a level lets a Function in that torch would keep out, for itself alone."""
    from torch._C import _functorch

    mu, log_var, call = operands(device)
    allowed = []

    def loss(mu: Tensor) -> Tensor:
        z = call(mu, log_var)
        allowed.append(_functorch.get_single_level_autograd_function_allowed())
        return z.sum()

    torch.func.grad(loss)(mu)
    assert allowed == [False]


def test_jvp(device: torch.device) -> None:
    eps = reparam_fused.noise(KEY, 3, 5, dtype=torch.float64)
    mu, log_var, call = operands(device)
    mu_t, log_var_t = draw(3, 5, seed=2), draw(3, 5, seed=3)
    z, tangent = torch.func.jvp(call, (mu, log_var), (mu_t.to(device), log_var_t.to(device)))
    assert_same_bits(z, call(mu, log_var))
    expected = mu_t + 0.5 * torch.exp(0.5 * log_var.cpu()) * eps * log_var_t
    torch.testing.assert_close(tangent.cpu(), expected)


def test_jvp_of_one_input_that_broadcasts_in_another_dtype(device: torch.device) -> None:
    mu = torch.zeros(4, 1, dtype=torch.bfloat16, device=device)
    log_var = torch.zeros(5, device=device)
    sample = with_key(device)
    for at in (0, 1):
        inputs = [mu, log_var]
        call = lambda t, at=at, inputs=inputs: sample(*inputs[:at], t, *inputs[at + 1 :])  # noqa: E731
        ones = torch.ones_like(inputs[at])
        tangent_of = lambda t, call=call: torch.func.jvp(call, (t,), (t,))[1]  # noqa: E731
        z, tangent = torch.func.jvp(call, (inputs[at],), (ones,))
        for t in (tangent, *torch.func.jvp(tangent_of, (inputs[at],), (ones,))):
            assert (t.shape, t.dtype) == (z.shape, z.dtype)
        expected = torch.ones_like(z) if at == 0 else 0.5 * z
        torch.testing.assert_close(tangent, expected)


def test_jvp_without_a_key(device: torch.device) -> None:
    mu, log_var, _ = operands(device)
    torch.manual_seed(3)
    z, tangent = torch.func.jvp(fused_reparameterize, (mu, log_var), (mu, log_var))
    torch.testing.assert_close(tangent, mu + 0.5 * (z - mu) * log_var)
    torch.manual_seed(3)
    assert_same_bits(fused_reparameterize(mu, log_var), z)


def test_forward_ad(device: torch.device) -> None:
    mu, log_var, call = operands(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(log_var, torch.ones_like(log_var))
        z, tangent = forward_ad.unpack_dual(call(mu, dual))
    torch.testing.assert_close(tangent, 0.5 * (z - mu))


def test_second_derivatives(device: torch.device) -> None:
    """Of sum(z^2) by log_var, against the formula."""
    mu, log_var, call = operands(device)

    def loss(log_var: Tensor) -> Tensor:
        return call(mu, log_var).square().sum()

    noise = call(torch.zeros_like(mu), log_var)  # sigma eps
    second = 0.5 * noise * noise + 0.5 * (mu + noise) * noise
    expected = torch.diag(second.flatten()).view(3, 5, 3, 5)
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in itertools.product((jacfwd, jacrev), repeat=2):
        torch.testing.assert_close(outer(inner(loss))(log_var), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(log_var), expected)


@pytest.mark.parametrize("shapes", [((3, 5), (3, 5)), ((3, 5), (5,)), ((1, 5), (3, 1))])
def test_jacfwd_equals_jacrev(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    """A wrong batching of the noise passes gradcheck, and shows here."""
    mu, log_var = draw(*shapes[0], device=device), draw(*shapes[1], seed=1, device=device)
    forward = torch.func.jacfwd(with_key(device), (0, 1))(mu, log_var)
    reverse = torch.func.jacrev(with_key(device), (0, 1))(mu, log_var)
    for f, r in zip(forward, reverse, strict=True):
        torch.testing.assert_close(f, r)


def test_gradcheck_of_all_modes(device: torch.device) -> None:
    n = 1 if device.type == "cuda" else 5  # each element is many launches
    mu, log_var = (t[:2, :n].clone().requires_grad_() for t in operands(device)[:2])
    call = with_key(device)
    assert torch.autograd.gradcheck(
        call, (mu, log_var), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        call, (mu, log_var), check_fwd_over_rev=True, check_rev_over_rev=True,
        check_batched_grad=True,
    )  # fmt: skip


def test_is_grads_batched(both_paths: str, device: torch.device) -> None:
    mu, log_var, call = operands(device)
    z = call(mu.requires_grad_(), log_var.requires_grad_())
    grads = draw(4, 3, 5, seed=7, device=device)
    batched = torch.autograd.grad(z, (mu, log_var), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(z, (mu, log_var), grad, retain_graph=True)
        for b, o in zip(batched, one, strict=True):
            assert_same_bits(b[i], o)


def test_per_example_gradients(device: torch.device) -> None:
    mu, log_var, _ = operands(device)

    def loss(log_var: Tensor, mu: Tensor, key: Tensor) -> Tensor:
        return fused_reparameterize(mu, log_var, key=key).square().sum()

    keys = reparam_fused.split(KEY.to(device), 3)
    each = torch.vmap(torch.func.grad(loss))(log_var, mu, keys)
    for i in range(3):
        one = (t[i].cpu() for t in (log_var, mu, keys))
        assert_as_on_cpu(each[i], torch.func.grad(loss)(*one))


def test_no_silent_zeros_within_a_compiler(device: torch.device) -> None:
    """A traced op has a zero tangent: refused in one graph, and left to eager in several."""
    mu, log_var, call = operands(device)

    def tangent(mu: Tensor, log_var: Tensor) -> Tensor:
        result: Tensor = torch.func.jvp(call, (mu, log_var), (mu, log_var))[1]
        return result

    expected = tangent(mu, log_var)
    assert_same_bits(torch.compile(tangent, backend="eager")(mu, log_var), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, backend="eager", fullgraph=True)(mu, log_var)
    torch._dynamo.reset()


def test_vmap_within_a_compiler(device: torch.device) -> None:
    sample = with_key(device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        different, same = (
            torch.vmap(lambda m, v: fused_reparameterize(m, v), randomness=randomness)
            for randomness in ("different", "same")
        )
        return torch.vmap(sample)(mu, log_var), different(mu, log_var), same(mu, log_var)

    zero = torch.zeros(3, 5, device=device)
    fixed, different, same = call(zero, zero)
    assert_same_bits(fixed, reparam_fused.noise(KEY, 5).expand(3, 5))
    assert different.unique().numel() == 15
    assert same.unique(dim=0).shape == (1, 5)
    torch._dynamo.reset()


def test_a_tensor_that_escaped_from_vmap(device: torch.device) -> None:
    """Is refused, as torch's own operations refuse it."""
    mu, log_var = inputs(3, 5, device=device)
    escaped: list[Tensor] = []
    torch.vmap(lambda t: (escaped.append(t), t)[1])(mu)
    with pytest.raises(RuntimeError, match="used outside of it"):
        fused_reparameterize(escaped[0], log_var[0], key=key_of(1, device=device))
