"""The divergence from N(0, 1): (mu^2 + exp(log_var) - 1 - log_var) / 2."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from conftest import ON_STAND_IN
from digest import extremes
from helpers import assert_as_on_cpu, assert_same_bits, inputs, needs_cuda_build, needs_kernels
from test_autocast import HALVES, autocast
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributions import Normal, kl_divergence

import reparam_fused
from reparam_fused import _ops, fused_kl_divergence, reference

INFINITY = float("inf")
OPS = [
    (_ops.kl_divergence, reference.kl_divergence),
    (_ops.kl_divergence_backward, reference.kl_divergence_backward),
]
Op = Callable[[Tensor, Tensor], Tensor]


def eager(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + log_var.exp() - 1.0 - log_var)


def double(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def assert_matches_reference(
    op: Op, expected: Op, given: tuple[Tensor, Tensor], on_cpu: tuple[Tensor, Tensor]
) -> None:
    """Bits; in fp64, where reference.py goes through libm, a few ULP."""
    result, wanted = op(*given), expected(*on_cpu)
    assert result.device == given[0].device
    assert result.stride() == wanted.stride()
    if result.dtype == torch.float64:
        torch.testing.assert_close(result.cpu(), wanted, rtol=4e-15, atol=0, equal_nan=True)
    else:
        assert_same_bits(result, wanted)


@needs_kernels
@pytest.mark.parametrize(("op", "expected"), OPS)
def test_kernels_against_the_reference(
    op: Op, expected: Op, dtype: torch.dtype, device: torch.device
) -> None:
    """Ends of tiles of every length, many values, those near 0, at overflow, and not finite."""
    edges = [torch.linspace(a, b, 999).to(dtype) for a, b in ((-91, -85), (85, 91), (708, 712))]
    log_var = torch.cat([extremes(dtype), *edges])
    many = 1 << (13 if device.type == "cuda" else 18)
    for given in (
        *(inputs(n, dtype=dtype, seed=n) for n in (*range(1, 20), 63, 64, 65, 127, 128, 129, 1021)),
        *(inputs(many, dtype=dtype, spread=spread) for spread in (1e-4, 1.0, 30.0)),
        *((torch.full_like(log_var, x), log_var) for x in (0.0, 1.0, INFINITY, float("nan"))),
    ):
        x, scale = (t.to(device) for t in given)
        assert_matches_reference(op, expected, (x, scale), given)


def layouts(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str
) -> list[tuple[Tensor, Tensor]]:
    x, log_var = inputs(*shape, dtype=dtype, device=device)
    last = torch.channels_last
    return [
        (x.transpose(0, 2), log_var.transpose(0, 2)),
        (x.permute(3, 1, 0, 2), log_var.permute(3, 1, 0, 2).contiguous()),
        (x.to(memory_format=last), log_var.to(memory_format=last)),
        (x.to(memory_format=last), log_var),
        (log_var[:, :5], log_var[:, 5:]),
        (x[..., ::3], log_var[:, :1, :, ::3]),
        (x.flatten()[1:], log_var.flatten()[1:]),
        (x[:0], log_var[:0]),
        (x[0, 0, 0, 0], log_var),
        (x[:, 3:4].expand(shape), log_var),
    ]


@needs_kernels
@pytest.mark.parametrize(("op", "expected"), OPS)
def test_layouts(op: Op, expected: Op, dtype: torch.dtype, device: torch.device) -> None:
    shape = (2, 10, 7, 8) if device.type == "cuda" else (6, 10, 14, 8)
    on_cpu = layouts(shape, dtype, "cpu")
    for given, same in zip(layouts(shape, dtype, device), on_cpu, strict=True):
        assert_matches_reference(op, expected, given, same)


@needs_kernels
def test_threads_and_isas_give_the_same_bits() -> None:
    """digest.py goes over the ISAs, for test_kernels.py."""
    mu, log_var = inputs(3, 70_001)
    wanted = [op(mu, log_var) for op, _ in OPS]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for (op, _), first in zip(OPS, wanted, strict=True):
                assert_same_bits(op(mu, log_var), first)
                rows = op(mu.t()[:, :2], log_var.t()[:, :2])
                assert_same_bits(rows, first.t()[:, :2].contiguous())
    finally:
        torch.set_num_threads(before)


def test_it_is_the_divergence_of_torch(
    both_paths: str, dtype: torch.dtype, device: torch.device
) -> None:
    mu, log_var = inputs(7, 33, dtype=dtype)
    kl = fused_kl_divergence(mu.to(device), log_var.to(device))
    normal = Normal(mu.double(), (0.5 * log_var.double()).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).to(dtype)
    assert (kl.dtype, kl.shape) == (dtype, mu.shape)
    torch.testing.assert_close(kl.cpu(), expected)


def test_small_divergences_keep_their_accuracy(device: torch.device) -> None:
    """Within 5 units of 2^-24, where the eager formula in float32 keeps no digit."""
    log_var = torch.cat([torch.logspace(-12, 0, 5000), -torch.logspace(-12, 0, 5000)])
    mu = torch.logspace(-12, 0, 10000)[torch.randperm(10000)]
    exact = reference.kl_divergence(mu.double(), log_var.double())
    kl = fused_kl_divergence(mu.to(device), log_var.to(device)).cpu()
    assert ((kl - exact).abs() / exact).max() < 5 * 2**-24
    assert (kl >= 0).all()
    assert ((eager(mu, log_var) - exact).abs() / exact).max() > 1
    leaf = log_var.clone().to(device).requires_grad_()
    (grad,) = torch.autograd.grad(fused_kl_divergence(mu.to(device), leaf).sum(), leaf)
    exact_grad = 0.5 * torch.expm1(log_var.double())
    assert ((grad.cpu() - exact_grad).abs() / exact_grad.abs()).max() < 3 * 2**-24


def test_values_that_are_not_finite(
    both_paths: str, dtype: torch.dtype, device: torch.device
) -> None:
    """IEEE, in their own element: no infinity less infinity."""
    nan = float("nan")
    mu = torch.tensor([nan, 0.0, 0.0, 0.0, INFINITY, -INFINITY, 0.0]).to(dtype)
    log_var = torch.tensor([0.0, nan, INFINITY, -INFINITY, 0.0, 1.0, 0.0]).to(dtype)
    mu, log_var = mu.to(device), log_var.to(device).requires_grad_()
    kl = fused_kl_divergence(mu, log_var)
    assert kl.isnan().tolist() == [True, True] + [False] * 5
    assert kl[2:].tolist() == [INFINITY] * 4 + [0.0]
    (grad,) = torch.autograd.grad(kl, log_var, torch.ones_like(kl))
    assert grad[1].isnan()
    assert grad[2:5].tolist() == [INFINITY, -0.5, 0.0]


SHAPES = [((5, 7), (5, 7)), ((5, 7), (7,)), ((1, 7), (5, 1)), ((), ()), ((3, 1, 2), (4, 1))]


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradcheck(
    both_paths: str, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    most = 2 if device.type == "cuda" else 7  # each element takes many launches
    mu, log_var = (
        double(*(min(n, most) for n in shape), seed=i, device=device).requires_grad_()
        for i, shape in enumerate(shapes)
    )
    check = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(fused_kl_divergence, (mu, log_var), **check)
    assert torch.autograd.gradgradcheck(fused_kl_divergence, (mu, log_var))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_of_every_order(
    both_paths: str, needed: tuple[bool, bool], device: torch.device
) -> None:
    results = []
    for call, place in ((fused_kl_divergence, device), (eager, "cpu")):
        leaves = [
            double(4, 3, seed=i, device=place).requires_grad_(n) for i, n in enumerate(needed)
        ]
        wanted = [t for t in leaves if t.requires_grad]
        kl = call(*leaves)
        first = torch.autograd.grad(kl.pow(3).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), wanted, create_graph=True
        )
        third = torch.autograd.grad(sum(g.sum() for g in second), wanted)
        results.append([t.cpu() for t in (kl, *first, *second, *third)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_the_gradient_is_that_of_the_kernel(
    both_paths: str, dtype: torch.dtype, device: torch.device
) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(300, dtype=dtype, device=device))
    weight = inputs(300, dtype=dtype, seed=3)[0]
    on_cpu = inputs(300, dtype=dtype)
    for graph in (False, True):
        grads = torch.autograd.grad(
            fused_kl_divergence(mu, log_var), (mu, log_var), weight.to(device), create_graph=graph
        )
        assert_same_bits(grads[0], weight * on_cpu[0])
        assert_as_on_cpu(grads[1], _ops.kl_divergence_backward(weight, on_cpu[1]))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_only_what_a_gradient_needs_is_kept(
    both_paths: str, needed: tuple[bool, bool], device: torch.device
) -> None:
    leaves = [t.requires_grad_(n) for t, n in zip(inputs(1000, device=device), needed, strict=True)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_kl_divergence(*leaves)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves if t.requires_grad}


def test_mu_is_log_var(both_paths: str, device: torch.device) -> None:
    x = double(5, device=device).requires_grad_()
    for call in (fused_kl_divergence, torch.compile(fused_kl_divergence, backend="aot_eager")):
        (grad,) = torch.autograd.grad(call(x, x).sum(), x)
        torch.testing.assert_close(grad.cpu(), double(5) + 0.5 * torch.expm1(double(5)))


def test_mixed_dtypes_are_promoted(both_paths: str, device: torch.device) -> None:
    for mu_dtype, log_var_dtype in product(
        [torch.float32, torch.bfloat16, torch.float64], repeat=2
    ):
        mu, log_var = inputs(5, device=device)
        mu, log_var = (
            t.to(d).requires_grad_() for t, d in ((mu, mu_dtype), (log_var, log_var_dtype))
        )
        kl = fused_kl_divergence(mu, log_var)
        common = torch.result_type(mu, log_var)
        promoted = (t.detach().cpu().to(common) for t in (mu, log_var))
        assert_as_on_cpu(kl, fused_kl_divergence(*promoted))
        grads = torch.autograd.grad(kl.sum(), (mu, log_var))
        assert [g.dtype for g in grads] == [mu_dtype, log_var_dtype]


@needs_cuda_build
@pytest.mark.parametrize("low", HALVES, ids=str)
def test_autocast_of_fake_tensors_on_a_gpu(low: torch.dtype) -> None:
    for mu_dtype, log_var_dtype in product([low, torch.float32, torch.float64], repeat=2):
        with FakeTensorMode(), autocast("cuda", low):
            mu = torch.empty(4, dtype=mu_dtype, device="cuda")
            log_var = torch.empty(4, dtype=log_var_dtype, device="cuda")
            kl = fused_kl_divergence(mu, log_var)
            assert kl.dtype == eager(mu, log_var).dtype


@pytest.mark.parametrize("low", HALVES, ids=str)
def test_autocast(low: torch.dtype, device: torch.device) -> None:
    """On CUDA the exponential is one of autocast's float32 ops, and on the CPU it is not."""
    for mu_dtype, log_var_dtype in product([low, torch.float32, torch.float64], repeat=2):
        mu, log_var = inputs(40)
        mu, log_var = mu.to(mu_dtype), log_var.to(log_var_dtype)
        given = mu.to(device), log_var.to(device)
        with autocast(device.type, low):
            kl = fused_kl_divergence(*given)
            assert kl.dtype == eager(*given).dtype
        if device.type == "cuda" and log_var.dtype == low:
            log_var = log_var.float()
        assert_as_on_cpu(kl, fused_kl_divergence(mu, log_var))


BATCHES = [
    ((0, 0), (4, 6), (4, 6)),
    ((1, 0), (6, 4), (4, 6)),
    ((0, None), (4, 6), (6,)),
    ((None, 1), (6,), (6, 4)),
    ((0, 0), (4, 3, 6), (4, 6)),
    ((0, 0), (4, 6), (4, 3, 6)),
    ((0, 0), (1, 6), (1, 6)),
]


@pytest.mark.parametrize(("in_dims", "mu_shape", "log_var_shape"), BATCHES)
@pytest.mark.parametrize(
    "op", [fused_kl_divergence, _ops.kl_divergence, _ops.kl_divergence_backward]
)
def test_vmap(
    op: Op,
    in_dims: tuple[int | None, int | None],
    mu_shape: tuple[int, ...],
    log_var_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    mu, log_var = double(*mu_shape), double(*log_var_shape, seed=1)
    batched = torch.vmap(op, in_dims=in_dims)(mu.to(device), log_var.to(device))
    for i, one in enumerate(batched):
        m, v = (
            t if d is None else t.select(d, i) for t, d in zip((mu, log_var), in_dims, strict=True)
        )
        assert_as_on_cpu(one, op(m, v))


def test_torch_func(device: torch.device) -> None:
    mu, log_var = double(3, 5, device=device), double(3, 5, seed=1, device=device)
    jacobians = [
        transform(fused_kl_divergence, argnums=(0, 1))(mu, log_var)
        for transform in (torch.func.jacrev, torch.func.jacfwd)
    ]
    torch.testing.assert_close(*jacobians)
    total = lambda v: fused_kl_divergence(mu, v).sum()  # noqa: E731
    hessian = torch.func.hessian(total)(log_var).view(15, 15)
    torch.testing.assert_close(hessian, (0.5 * log_var.exp()).flatten().diag())
    per_example = torch.vmap(torch.func.grad(lambda v, m: fused_kl_divergence(m, v).sum()))
    torch.testing.assert_close(per_example(log_var, mu), 0.5 * torch.expm1(log_var))


@pytest.mark.parametrize("by", ["mu", "log_var", "both"])
def test_jvp(by: str, device: torch.device) -> None:
    mu, log_var, t, u = (double(3, 5, seed=i, device=device) for i in range(4))
    with forward_ad.dual_level():
        duals = (
            forward_ad.make_dual(mu, t) if by != "log_var" else mu,
            forward_ad.make_dual(log_var, u) if by != "mu" else log_var,
        )
        tangent = forward_ad.unpack_dual(fused_kl_divergence(*duals)).tangent
    expected = (mu * t if by != "log_var" else 0) + (
        0.5 * torch.expm1(log_var) * u if by != "mu" else 0
    )
    torch.testing.assert_close(tangent, expected)


def test_what_torch_would_get_wrong_in_silence(device: torch.device) -> None:
    """A tangent of a tangent would be zero; in a compiler a tangent is refused."""
    mu, log_var = double(3, device=device), double(3, seed=1, device=device)
    call = lambda v: fused_kl_divergence(mu, v)  # noqa: E731
    _, second = torch.func.jvp(lambda v: torch.func.jvp(call, (v,), (mu,))[1], (log_var,), (mu,))
    torch.testing.assert_close(second, 0.5 * log_var.exp() * mu * mu)

    def tangent(v: Tensor) -> Tensor:
        return torch.func.jvp(call, (v,), (mu,))[1]  # type: ignore[no-any-return]

    torch._dynamo.reset()
    assert_same_bits(torch.compile(tangent, backend="eager")(log_var), tangent(log_var))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, backend="eager", fullgraph=True)(log_var)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if ON_STAND_IN and backend == "inductor":
        pytest.skip("inductor's own kernels have instructions that the interpreter does not know")
    torch.compiler.reset()

    def loss(m: Tensor, v: Tensor) -> Tensor:
        return fused_kl_divergence(m, v)

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for n in (4, 7):
        results = []
        for call, place in ((compiled, device), (loss, "cpu")):
            mu, log_var = (t.requires_grad_() for t in inputs(n, 6, dtype=dtype, device=place))
            kl = call(mu, log_var)
            grads = torch.autograd.grad(kl, (mu, log_var), torch.ones_like(kl))
            results.append([kl, *grads])
        for a, b in zip(*results, strict=True):
            assert_as_on_cpu(a.detach(), b.detach())


def test_ops(dtype: torch.dtype, device: torch.device) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(3, 5, dtype=dtype, device=device))
    for op, _ in OPS:
        torch.library.opcheck(op, (mu, log_var))
        torch.library.opcheck(op, (mu.t(), log_var[0, 0]))


def test_export_and_meta(device: torch.device) -> None:
    class Kl(torch.nn.Module):
        def forward(self, mu: Tensor, log_var: Tensor) -> Tensor:
            return fused_kl_divergence(mu, log_var).sum(-1)

    mu, log_var = inputs(4, 6, device=device)
    exported = torch.export.export(Kl(), (mu, log_var))
    assert_same_bits(exported.module()(mu, log_var), Kl()(mu, log_var))
    meta = fused_kl_divergence(mu.to("meta"), log_var.to("meta"))
    assert (meta.shape, meta.device.type) == ((4, 6), "meta")


def test_a_subclass_decides_for_itself(device: torch.device) -> None:
    class Mine(Tensor):
        pass

    mu, log_var = inputs(4, device=device)
    kl = fused_kl_divergence(mu.as_subclass(Mine), log_var)
    assert type(kl) is Mine
    assert_same_bits(kl.as_subclass(Tensor), fused_kl_divergence(*inputs(4)))


def test_inference_mode_and_no_grad(both_paths: str, device: torch.device) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(4, device=device))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not fused_kl_divergence(mu, log_var).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: ([1.0], x), TypeError, "argument 'mu' must be Tensor, not list"),
        (lambda x: (x, "0"), TypeError, "argument 'log_var' must be Tensor, not str"),
        (lambda x: (x, x.long()), TypeError, "log_var must be float32, float64"),
        (lambda x: (x.to_sparse(), x), TypeError, "mu must be a dense tensor"),
        (lambda x: (x, x[:2]), RuntimeError, "shapes of mu and log_var must broadcast"),
        (lambda x: (x, x.to("meta")), RuntimeError, "on the same device"),
    ],
    ids=range(6),
)
def test_errors(
    arguments: Callable[[Tensor], tuple[Tensor, Tensor]],
    error: type[Exception],
    message: str,
    device: torch.device,
) -> None:
    given = arguments(torch.ones(3, device=device))
    with pytest.raises(error, match=r"^fused_kl_divergence\(\): .*" + message):
        reparam_fused.fused_kl_divergence(*given)
