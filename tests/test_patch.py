"""patch(): what it replaces runs fused, the rest runs as before, and nothing of it stays."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ON_STAND_IN
from helpers import CALLS_CAN_BE_PLAIN, assert_same_bits, count_patched, patience
from test_compile import compilers
from test_functional import Marked
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.distributions import HalfNormal, Independent, LogNormal, Normal
from torch.fx.experimental.proxy_tensor import make_fx

import reparam_fused
from reparam_fused import _extensions, _heads, _patch, _posteriors, patch

ORIGINAL, ORIGINAL_SAMPLE = Normal.rsample, Normal.sample
SEED = 3
VAE = "diffusers.models.autoencoders.vae"
ALL_DEVICES = frozenset({"cpu", "cuda"})


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    assert Normal.rsample is ORIGINAL
    yield
    assert vars(Normal)["rsample"] is ORIGINAL
    assert vars(Normal)["sample"] is ORIGINAL_SAMPLE
    assert not _patch._replacements
    assert not _patch._pairs


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The fused calls. Without the extension they are those of the reference path."""
    monkeypatch.setattr(_patch, "_DEVICES", ALL_DEVICES)
    return count_patched(monkeypatch)


def parameters(
    *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64).add(0.1).to(dtype)
    return loc.to(device).requires_grad_(), scale.to(device).requires_grad_()


def rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def check_gradients(z: Tensor, loc: Tensor, scale: Tensor) -> None:
    """Against the eager line with the noise that z shows."""
    eps = ((z - loc) / scale).detach()
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape).to(z.device)
    actual = torch.autograd.grad((z * weight).sum(), (loc, scale))
    expected = torch.autograd.grad(((loc + eps * scale) * weight).sum(), (loc, scale))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sample_shape", [(), (1,), (5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("shapes", [((), ()), ((4,), (4,)), ((3, 1), (4,)), ((0,), (1,))])
def test_normal(
    fused: list[Any],
    shapes: tuple[tuple[int, ...], ...],
    sample_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    loc, _ = parameters(*shapes[0], device=device)
    _, scale = parameters(*shapes[1], device=device)
    normal = Normal(loc, scale)
    expected = normal.rsample(sample_shape)
    with patch("normal"):
        z = normal.rsample(sample_shape)
        assert normal.rsample(torch.Size(sample_shape)).shape == z.shape
    assert len(fused) == 2
    assert (z.shape, z.dtype, z.requires_grad) == (expected.shape, expected.dtype, True)
    check_gradients(z, loc, scale)


@pytest.mark.parametrize("sample_shape", [(1.0,), (2, -1), 3, "4"])
def test_no_shape_is_none_with_a_patch_either(sample_shape: Any, device: torch.device) -> None:
    normal = Normal(*parameters(4, device=device))
    with patch("normal"):
        normal.rsample((1,))
        with pytest.raises((TypeError, RuntimeError)):
            normal.rsample(sample_shape)


@pytest.mark.parametrize("sample_shape", [(), (3,)])
@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_are_those_of_the_original(
    fused: list[Any],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    dims: int,
    sample_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    loc, _ = parameters(*[4] * dims, dtype=dtype, device=device)
    _, scale = parameters(*[4] * dims, dtype=scale_dtype, device=device)
    normal = Normal(loc, scale)
    with patch("normal"):
        z = normal.rsample(sample_shape)
    assert z.dtype == normal.rsample(sample_shape).dtype
    plain = device.type == "cpu" and sample_shape == () and CALLS_CAN_BE_PLAIN
    assert len(fused) == (dims > 0 or dtype == scale_dtype or plain)


def test_numbers_and_parameters(fused: list[Any], device: torch.device) -> None:
    with patch("normal"), device:
        assert Normal(0.0, 1.0).rsample().shape == ()
        loc = torch.nn.Parameter(torch.zeros(3))
        Normal(loc, torch.ones(3)).rsample().sum().backward()
    assert len(fused) == 2
    assert loc.grad is not None
    assert torch.equal(loc.grad.cpu(), torch.ones(3))


def test_the_seed_counts_and_calls_differ(fused: list[Any], device: torch.device) -> None:
    normal = Normal(*parameters(50, device=device))
    with patch("normal"):
        torch.manual_seed(1)
        first = [normal.rsample(), normal.rsample((2,))]
        torch.manual_seed(1)
        for z in first:
            assert_same_bits(normal.rsample(z.shape[:-1]).detach(), z.detach())
    rows = torch.cat([first[0][None], first[1]])
    assert rows.unique().numel() == rows.numel()
    assert len(fused) == 4


def test_statistics(fused: list[Any], device: torch.device) -> None:
    """Of each element, within 5 standard errors."""
    torch.manual_seed(0)
    loc, scale = parameters(8, device=device)
    n = 10_000 if ON_STAND_IN else 100_000
    with patch("normal"):
        z = Normal(loc, scale).rsample((n,)).detach()
    eps = ((z - loc.detach()) / scale.detach()).cpu()
    assert eps.mean(0).abs().max() < 5 / n**0.5
    assert (eps.square().mean(0) - 1).abs().max() < 5 * (2 / n) ** 0.5
    off_diagonal = eps.T @ eps / n - torch.eye(8, dtype=eps.dtype) * eps.square().mean(0)
    assert off_diagonal.abs().max() < 5 / n**0.5
    assert len(fused) == 1


def test_what_samples_through_normal(fused: list[Any], device: torch.device) -> None:
    loc, scale = parameters(4, 3, device=device)
    with patch("normal"):
        assert LogNormal(loc, scale).rsample().min() > 0
        assert Independent(Normal(loc, scale), 1).rsample((2,)).shape == (2, 4, 3)
        assert HalfNormal(scale).rsample().min() > 0
        assert Normal(loc, scale).expand((5, 4, 3)).rsample().shape == (5, 4, 3)
    assert len(fused) == 4


def test_a_subclass_with_its_own_method_keeps_it(fused: list[Any], device: torch.device) -> None:
    class Own(Normal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            return self.loc

    class Inherits(Normal):
        pass

    loc, scale = parameters(3, device=device)
    with patch("normal"):
        assert Own(loc, scale).rsample() is loc
        assert not fused
        Inherits(loc, scale).rsample()
    assert len(fused) == 1


class Spy:
    """Stands for the original, and does nothing but say that it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def method(self) -> Callable[..., Any]:
        def rsample(distribution: Any, *args: Any) -> Spy:
            self.calls.append(args)
            return self

        return rsample


def dense(**options: Any) -> Tensor:
    return torch.ones(2, 3, **options)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


UNSUPPORTED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "complex": lambda: (dense(dtype=torch.complex64), dense()),
    "complex scale": lambda: (dense(), dense(dtype=torch.complex64)),
    "int": lambda: (dense(dtype=torch.int64), dense(dtype=torch.int64)),
    "float8": lambda: (dense().to(torch.float8_e5m2), dense()),
    "sparse": lambda: (dense().to_sparse(), dense()),
    "sparse scale": lambda: (dense(), dense().to_sparse_csr()),
    "nested": lambda: (torch.nested.nested_tensor([torch.ones(2)]), dense()),
    "jagged": lambda: (jagged(), jagged()),
    "subclass": lambda: (dense().as_subclass(Marked), dense()),
    "subclass of scale": lambda: (dense(), dense().as_subclass(Marked)),
    "no kernel": lambda: (dense(device="meta"), dense(device="meta")),
    "two devices": lambda: (dense(), dense(device="meta")),
    "numbers": lambda: (0.0, 1.0),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_the_unsupported_goes_to_the_original(
    fused: list[Any], monkeypatch: pytest.MonkeyPatch, case: str, device: torch.device
) -> None:
    normal, spy = Normal(0.0, 1.0), Spy()
    with device:
        normal.loc, normal.scale = UNSUPPORTED[case]()
    state = rng_state(device)
    with monkeypatch.context() as m:
        m.setattr(Normal, "rsample", spy.method())
        with patch("normal"):
            assert normal.rsample((2,)) is spy
    assert spy.calls == [((2,),)]
    assert not fused
    assert torch.equal(rng_state(device), state)


def test_without_a_kernel_the_original_is_faster(
    fused: list[Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(_patch, "_DEVICES", frozenset())
    normal = Normal(*parameters(3, device=device))
    torch.manual_seed(1)
    expected = normal.rsample()
    torch.manual_seed(1)
    with patch("normal"):
        assert torch.equal(normal.rsample(), expected)
    assert not fused


def test_devices_are_those_with_compiled_kernels() -> None:
    assert ("cpu" in _patch._DEVICES) == (_extensions.library is not None)
    assert ("cuda" in _patch._DEVICES) == (_extensions.has_triton or _extensions.has_cuda)
    assert "meta" not in _patch._DEVICES


def test_jit_traces_the_original(fused: list[Any], device: torch.device) -> None:
    """Whose noise it is that the program draws, wherever it is loaded."""

    def run(loc: Tensor, scale: Tensor) -> Tensor:
        return Normal(loc, scale, validate_args=False).rsample()

    loc, scale = (t.detach() for t in parameters(4, device=device))
    with patch("normal"):
        traced = torch.jit.trace(run, (loc, scale), check_trace=False)
        assert not fused
        assert "reparam_fused" not in str(traced.inlined_graph)
        torch.manual_seed(SEED)
        z = traced(loc, scale)
        run(loc, scale)
    assert len(fused) == 1
    torch.manual_seed(SEED)
    assert_same_bits(z, run(loc, scale))


def test_forward_mode(fused: list[Any], device: torch.device) -> None:
    """Twice forward too; within torch.compile, where a tangent would be lost, by the original."""
    loc, scale = (t.detach() for t in parameters(4, device=device))
    with patch("normal"), forward_ad.dual_level():
        dual = forward_ad.make_dual(loc, torch.ones_like(loc))
        tangent = forward_ad.unpack_dual(Normal(dual, scale).rsample()).tangent
    assert torch.equal(tangent, torch.ones_like(loc))
    assert len(fused) == 1

    def run(loc: Tensor) -> Tensor:
        return Normal(loc.exp(), scale, validate_args=False).rsample()

    def once(loc: Tensor) -> Tensor:
        return torch.func.jvp(run, (loc,), (loc,))[1]

    def twice(loc: Tensor) -> Tensor:
        return torch.func.jvp(once, (loc,), (loc,))[1]

    with patch("normal"):
        torch.testing.assert_close(twice(loc), loc.exp() * (loc + loc.square()))
        assert len(fused) == 2
        torch.compiler.reset()
        compiled = torch.compile(once, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(loc), loc.exp() * loc)
    assert len(fused) == 2


def test_a_default_device_is_no_subclass(fused: list[Any], device: torch.device) -> None:
    loc, scale = parameters(4, device=device)
    with patch("normal"), device:
        Normal(loc, scale).rsample()
    assert len(fused) == 1


def test_autocast(fused: list[Any], device: torch.device) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(5, 6).to(device)
    x = torch.randn(7, 5).to(device)

    def run() -> Tensor:
        loc, scale = encoder(x).chunk(2, -1)
        return Normal(loc, torch.nn.functional.softplus(scale)).rsample((2,))

    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected = run()
        with patch("normal"):
            z = run()
    assert len(fused) == 1
    # softplus is one of the float32 ops there
    dtype = torch.float32 if device.type == "cuda" else torch.bfloat16
    assert (z.dtype, z.shape) == (expected.dtype, expected.shape) == (dtype, (2, 7, 3))
    z.float().sum().backward()
    assert encoder.bias.grad is not None
    torch.testing.assert_close(encoder.bias.grad[:3].cpu(), torch.full((3,), 14.0))


def test_vmap(fused: list[Any], device: torch.device) -> None:
    loc, scale = (t.detach() for t in parameters(6, 3, device=device))

    def noise(loc: Tensor, scale: Tensor) -> Tensor:
        return (Normal(loc, scale, validate_args=False).rsample((2,)) - loc) / scale

    with patch("normal"):
        different = torch.vmap(noise, randomness="different")(loc, scale)
        same = torch.vmap(noise, randomness="same")(loc, scale)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(noise)(loc, scale)
    assert different.shape == same.shape == (6, 2, 3)
    assert different.unique().numel() == different.numel()
    torch.testing.assert_close(same, same[:1].expand_as(same))
    assert len(fused) == 3


def test_grad_and_vmap_of_it(fused: list[Any], device: torch.device) -> None:
    loc, scale = (t.detach() for t in parameters(6, 3, device=device))

    def loss(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = Normal(loc, scale, validate_args=False).rsample()
        return z.square().sum(), z

    with patch("normal"):
        per_example = torch.vmap(
            torch.func.grad(loss, (0, 1), has_aux=True), randomness="different"
        )
        (grad_loc, grad_scale), z = per_example(loc, scale)
    assert len(fused) == 1
    torch.testing.assert_close(grad_loc, 2 * z)
    torch.testing.assert_close(grad_scale, 2 * z * (z - loc) / scale)


def rsample_of(loc: Tensor, scale: Tensor) -> Tensor:
    return Normal(loc, scale, validate_args=False).rsample((2,))


@compilers("eager", "aot_eager", "inductor")
def test_compiled_calls(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device
) -> None:
    monkeypatch.setattr(_patch, "_DEVICES", ALL_DEVICES)
    loc, scale = parameters(4, 3, device=device)
    torch.compiler.reset()
    compiled = torch.compile(rsample_of, backend=backend, fullgraph=True)
    with patch("normal"):
        torch.manual_seed(4)
        first, second = compiled(loc, scale), compiled(loc, scale)
        torch.manual_seed(4)
        assert_same_bits(compiled(loc, scale).detach(), first.detach())
    assert torch.cat([first, second]).unique().numel() == 2 * first.numel()
    check_gradients(first, loc, scale)


def test_what_is_compiled_follows_the_patch(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Back to the original after the undoing, and no compilation for a second patch."""
    monkeypatch.setattr(_patch, "_DEVICES", ALL_DEVICES)
    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append("reparam_fused.sample_fresh" in str(graph.graph))
        return graph.forward

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=lambda graph, _: graph.forward)
    compiled = torch.compile(rsample_of, backend=backend, fullgraph=True)
    loc, scale = parameters(4, device=device)
    with patch("normal"):
        compiled(loc, scale)
        with patch("normal"):
            compiled(loc, scale)
    compiled(loc, scale)
    assert graphs == [True, False]


def in_force() -> bool:
    return Normal.rsample is not ORIGINAL


def test_in_force_from_the_call_on(fused: list[Any]) -> None:
    undo = patch("normal").undo
    try:
        Normal(*parameters(3)).rsample()
        assert len(fused) == 1
        assert in_force()
    finally:
        undo()
    assert not in_force()
    Normal(*parameters(3)).rsample()
    assert len(fused) == 1


def test_the_method_says_what_it_is() -> None:
    with patch("normal"):
        assert Normal.rsample.__name__ == "rsample"
        assert Normal.rsample.__qualname__ == "Normal.rsample"
        assert Normal.rsample.__wrapped__ is ORIGINAL  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(10))
def test_undone_in_any_order(seed: int) -> None:
    patches = [patch("normal") for _ in range(6)]
    method = Normal.rsample
    random.Random(seed).shuffle(patches)
    for p in patches:
        assert Normal.rsample is method
        p.undo()
        p.undo()  # counts once
    assert not in_force()


def test_nested() -> None:
    with patch("normal", "normal"):
        with patch("normal"):
            pass
        assert in_force()
    assert not in_force()


def test_an_exception_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), patch("normal"):
        _ = 1 / 0
    assert not in_force()


def test_undone_within_the_block() -> None:
    with patch("normal") as p:
        p.undo()
        assert not in_force()
    with pytest.raises(RuntimeError, match=r"call patch\(\) again"), p:
        pass


def test_threads(device: torch.device) -> None:
    """Patches come and go in all of them; whoever holds one finds it in force."""
    loc, scale = (t.detach() for t in parameters(8, device=device))
    rounds = 10 if ON_STAND_IN else 300
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        order = random.Random(seed)
        start.wait()
        held = []
        for _ in range(rounds):
            if held and order.random() < 0.5:
                held.pop(order.randrange(len(held))).undo()
            else:
                held.append(patch("normal"))
            assert not held or in_force()
            assert Normal(loc, scale).rsample().isfinite().all()
        for p in held:
            p.undo()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert not in_force()


def test_one_patch_undone_by_two_threads_counts_once() -> None:
    for _ in range(200):
        outer, inner = patch("normal"), patch("normal")
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(inner.undo)
        assert in_force()
        outer.undo()


def test_somebody_elses_wrapper_is_left_alone(
    fused: list[Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    normal, seen = Normal(*parameters(3, device=device)), []
    p = patch("normal")
    ours = Normal.rsample

    def theirs(self: Normal, *args: Any) -> Tensor:
        seen.append(args)
        return ours(self, *args)

    try:
        setattr(Normal, "rsample", theirs)  # noqa: B010
        normal.rsample()
        assert (len(fused), len(seen)) == (1, 1)

        p.undo()
        assert Normal.rsample is theirs
        torch.manual_seed(1)
        z = normal.rsample()
        torch.manual_seed(1)
        assert torch.equal(z, ORIGINAL(normal))
        assert (len(fused), len(seen)) == (1, 2)

        with patch("normal"):
            normal.rsample()
            assert (len(fused), len(seen)) == (2, 2)
            monkeypatch.setattr(_patch, "_DEVICES", frozenset())
            normal.rsample()  # through theirs and the first of ours
        assert Normal.rsample is theirs
        assert (len(fused), len(seen)) == (2, 3)
    finally:
        setattr(Normal, "rsample", ORIGINAL)  # noqa: B010


@pytest.mark.parametrize("target", ["Normal", "", "normal "])
def test_an_unknown_target(target: str) -> None:
    with pytest.raises(
        ValueError, match=f"targets must be 'normal', 'diffusers' or a class, got '{target}'"
    ):
        patch("normal", target)
    assert not in_force()


@pytest.mark.parametrize("target", [3, None, ["normal"]])
def test_a_target_of_another_type(target: Any) -> None:
    with pytest.raises(
        TypeError, match=r"patch\(\): argument 'targets' must be str or a class, not "
    ):
        patch("normal", target)
    assert not in_force()


def test_a_missing_library_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, VAE, raising=False)
    with pytest.raises(ImportError, match="diffusers"):
        patch("normal", "diffusers")
    assert not in_force()


def test_no_library_is_imported_unasked(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys, reparam_fused\n"
        "reparam_fused.patch('normal')\n"
        "reparam_fused.patch()\n"
        "assert not {'diffusers', 'pyro', 'scvi'} & set(sys.modules)\n"
        "try: reparam_fused.patch('diffusers')\n"
        "except RuntimeError as error: print(error)\n"
    )
    root = str(Path(reparam_fused.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert (done.returncode, done.stdout.strip()) == (0, "imported"), done.stderr


class Latents:
    """As much of diffusers' DiagonalGaussianDistribution as is patched."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.mean, self.logvar = parameters.chunk(2, 1)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: Any = None) -> Any:
        return "original", generator

    def kl(self, other: Any = None) -> Any:
        return "original", other


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    vae = ModuleType(VAE)
    vae.DiagonalGaussianDistribution = Latents  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    monkeypatch.setitem(sys.modules, VAE, vae)
    return vae


def latents(device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64).to(device)


def test_diffusers(fused: list[Any], diffusers: ModuleType, device: torch.device) -> None:
    posterior = Latents(latents(device).requires_grad_())
    original = Latents.sample
    with patch("diffusers"):
        assert Normal.rsample is ORIGINAL
        torch.manual_seed(2)
        z = posterior.sample()
        torch.manual_seed(2)
        assert_same_bits(posterior.sample().detach(), z.detach())
        generator = torch.Generator(device).manual_seed(2)
        state = rng_state(device)
        drawn = posterior.sample(generator)
        assert torch.equal(rng_state(device), state)
        assert_same_bits(posterior.sample(generator=generator.manual_seed(2)), drawn)
    assert vars(Latents)["sample"] is original
    assert len(fused) == 4
    eps = ((z - posterior.mean) / posterior.std).detach()
    for a, b in zip(
        torch.autograd.grad(z.square().sum(), (posterior.mean, posterior.logvar)),
        (2 * z, z * posterior.std * eps),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "case", ["deterministic", "list", "device", "kernel", "number", "after the undoing"]
)
def test_diffusers_leaves_the_rest_to_the_original(
    fused: list[Any],
    diffusers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    device: torch.device,
) -> None:
    posterior = Latents(latents(device), deterministic=case == "deterministic")
    generator: Any = {
        "list": [torch.Generator(device), None],
        "device": torch.Generator(device),
        "number": 3,
    }.get(case)
    if case == "device":
        monkeypatch.setattr(_patch, "_DEVICES", frozenset({"meta"}))
        posterior = Latents(latents().to("meta"))
    if case == "kernel":
        monkeypatch.setattr(_patch, "_DEVICES", frozenset())
    p = patch("diffusers")
    method = Latents.sample
    if case == "after the undoing":
        p.undo()
    with p if case != "after the undoing" else patch("normal"):
        assert method(posterior, generator) == ("original", generator)
    assert not fused


def test_diffusers_kl(diffusers: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    parameters = latents(device).to(dtype).requires_grad_()
    posterior = Latents(parameters)
    original = Latents.kl
    with patch("diffusers"):
        kl = posterior.kl()
        compiled = torch.compile(lambda p: Latents(p).kl(), backend="aot_eager", fullgraph=True)
        assert_same_bits(compiled(parameters).detach(), kl.detach())
    assert vars(Latents)["kl"] is original
    assert (kl.dtype, kl.shape) == (dtype, (2,))
    mean, log_var = (t.double() for t in (posterior.mean, posterior.logvar))
    expected = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum([1, 2, 3])
    torch.testing.assert_close(kl, expected.to(dtype))
    ours, theirs = (torch.autograd.grad(k.sum(), parameters)[0] for k in (kl, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["deterministic", "other", "kernel", "after the undoing"])
def test_diffusers_kl_leaves_the_rest_to_the_original(
    diffusers: ModuleType, monkeypatch: pytest.MonkeyPatch, case: str, device: torch.device
) -> None:
    posterior = Latents(latents(device), deterministic=case == "deterministic")
    other = Latents(latents(device)) if case == "other" else None
    if case == "kernel":
        monkeypatch.setattr(_patch, "_DEVICES", frozenset())
    p = patch("diffusers")
    method = Latents.kl
    if case == "after the undoing":
        p.undo()
    with p if case != "after the undoing" else patch("normal"):
        assert method(posterior, other) == ("original", other)


def test_diffusers_is_a_default_once_imported(
    fused: list[Any], diffusers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Latents.sample
    with patch():
        assert in_force()
        assert Latents.sample is not original
    assert Latents.sample is original
    monkeypatch.delitem(sys.modules, "diffusers")
    with patch():
        assert in_force()
        assert Latents.sample is original


def test_targets_are_counted_apart(diffusers: ModuleType) -> None:
    original = Latents.sample
    both = patch("normal", "diffusers")
    normal = patch("normal")
    both.undo()
    assert in_force()
    assert Latents.sample is original
    normal.undo()


def test_an_inherited_method_is_inherited_again(fused: list[Any], diffusers: ModuleType) -> None:
    class Later(Latents):
        pass

    diffusers.DiagonalGaussianDistribution = Later  # type: ignore[attr-defined]
    with patch("diffusers"):
        assert isinstance(Later(latents()).sample(), Tensor)
        assert Latents(latents()).sample() == ("original", None)
    assert not {"sample", "kl"} & set(vars(Later))
    assert Later(latents()).sample() == ("original", None)


class Posterior:
    """As the copies of LDM's class are: the scale clamped, and its functions taken, at once."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, log_var = parameters.chunk(2, 1)
        self.logvar = log_var.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        self.deterministic = deterministic
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self) -> Any:
        return self.mean + self.std * torch.randn(self.mean.shape).to(self.parameters.device)

    def kl(self, other: Any = None) -> Any:
        if self.deterministic:
            return torch.tensor([0.0])
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1 - self.logvar).sum([1, 2, 3])
        return "from another"


class WithGenerator(Posterior):
    def sample(self, generator: Any = None) -> Any:
        noise = torch.randn(
            self.mean.shape,
            generator=generator,
            device=self.parameters.device,
            dtype=self.parameters.dtype,
        )
        return self.mean + self.std * noise


class Softplus:
    """As Oobleck's is: the scale by softplus, kl of another shape."""

    def __init__(self, parameters: Tensor) -> None:
        self.mean, scale = parameters.chunk(2, 1)
        self.std = torch.nn.functional.softplus(scale) + 1e-4
        self.var = self.std * self.std
        self.logvar = torch.log(self.var)

    def sample(self, generator: Any = None) -> Any:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Any:
        return (self.mean * self.mean + self.var - self.logvar - 1.0).sum(1).mean()


class OfLogVar:
    """No std is kept, and a property cannot be set."""

    __slots__ = ("_log_var", "mean")

    def __init__(self, parameters: Tensor) -> None:
        self.mean, self._log_var = parameters.chunk(2, 1)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self._log_var)

    def sample(self) -> Any:
        return self.mean + self.std * torch.randn_like(self.mean)


class ByExp(Posterior):
    """Takes no notice of std."""

    def sample(self) -> Any:
        return self.mean + torch.exp(self.logvar / 2) * torch.randn_like(self.mean)


LIKE_IT: dict[str, Any] = {cls.__name__: cls for cls in (Posterior, WithGenerator, Softplus, ByExp)}
like_it = pytest.mark.parametrize("name", LIKE_IT)


@like_it
def test_a_class(fused: list[Any], name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Sample for sample what the class says of itself, and the gradients are those of its line."""
    cls = LIKE_IT[name]
    methods = {method: getattr(cls, method) for method in ("sample", "kl")}
    parameters = (latents(device) * 12).to(dtype).requires_grad_()  # beyond the clamp too
    instance = cls(parameters)
    expected = instance.sample()
    with patch(cls):
        torch.manual_seed(2)
        z = instance.sample()
        torch.manual_seed(2)
        assert_same_bits(instance.sample().detach(), z.detach())
        assert not torch.equal(instance.sample(), z)
    assert len(fused) == 3
    assert {method: getattr(cls, method) for method in methods} == methods
    assert (z.shape, z.dtype, z.device) == (expected.shape, expected.dtype, expected.device)
    if dtype != torch.float64:
        return
    eps = ((z - instance.mean) / instance.std).detach()
    assert eps.abs().max() < 7
    by_hand = instance.mean + instance.std * eps
    gradients = (
        torch.autograd.grad(t.square().sum(), parameters, retain_graph=True) for t in (z, by_hand)
    )
    torch.testing.assert_close(*gradients)


def test_a_class_has_the_noise_of_the_function(device: torch.device) -> None:
    for cls, scale in ((Posterior, "std"), (Softplus, "std"), (ByExp, "logvar")):
        instance = cls(latents(device))
        with patch(cls):
            torch.manual_seed(2)
            z = instance.sample()
        torch.manual_seed(2)
        form = {"logvar": "log_var"}.get(scale, scale)
        given = {form: getattr(instance, scale)}
        assert_same_bits(z, reparam_fused.fused_reparameterize(instance.mean, **given))


@pytest.mark.parametrize("name", ["WithGenerator", "Softplus"])
def test_a_class_draws_from_the_generator(
    fused: list[Any], name: str, device: torch.device
) -> None:
    instance = LIKE_IT[name](latents(device))
    generator = torch.Generator(device)
    with patch(LIKE_IT[name]):
        state = rng_state(device)
        z = instance.sample(generator.manual_seed(2))
        assert_same_bits(instance.sample(generator=generator.manual_seed(2)), z)
        assert torch.equal(rng_state(device), state)
    assert len(fused) == 2


@like_it
def test_kl_of_a_class(name: str, dtype: torch.dtype, device: torch.device) -> None:
    cls = LIKE_IT[name]
    original = cls.kl
    parameters = latents(device).to(dtype).requires_grad_()
    instance = cls(parameters)
    expected = instance.kl()
    with patch(cls):
        assert (cls.kl is original) == (cls is Softplus)
        kl = instance.kl()
        if cls is not Softplus:
            assert_same_bits(instance.kl(None).detach(), kl.detach())
            assert instance.kl(instance) == instance.kl(other=instance) == "from another"
            fused = reparam_fused.fused_kl_divergence(instance.mean, instance.logvar, dim=(1, 2, 3))
            assert_same_bits(kl.detach(), fused.to(dtype).detach())
    assert (kl.shape, kl.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(kl, expected, rtol=0.02 if dtype.itemsize == 2 else 1e-5, atol=0)
    gradients = [
        torch.autograd.grad(k.sum(), parameters, retain_graph=True)[0] for k in (kl, expected)
    ]
    if dtype == torch.float64:
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dim", range(2, 7))
def test_kl_sums_as_the_class_does(dim: int, device: torch.device) -> None:
    """Over all dimensions or over three of them; what it was not asked of it says itself."""

    class Whole(Posterior):
        def kl(self) -> Any:
            each = 0.5 * (self.mean**2 + self.var - 1 - self.logvar)
            return each.sum(tuple(range(1, each.dim())))

    parameters = torch.randn((2, 4, 3, 2, 2, 2)[:dim], dtype=torch.float64).to(device)
    for cls in (Whole, Posterior):
        instance = cls(parameters)
        with patch(cls):
            if cls is Posterior and dim < 4:
                with pytest.raises(IndexError):
                    instance.kl()
                continue
            kl = instance.kl()
        torch.testing.assert_close(kl, instance.kl())
        over = tuple(range(1, dim)) if cls is Whole else (1, 2, 3)
        fused = reparam_fused.fused_kl_divergence(instance.mean, instance.logvar, dim=over)
        assert torch.equal(kl, fused) or dim == 6


@pytest.mark.parametrize(
    "case",
    [
        "deterministic", "flag", "shape", "missing", "list", "device", "argument", "kernel",
        "after the undoing",
    ],
)  # fmt: skip
def test_a_class_leaves_the_rest_to_the_original(
    fused: list[Any], monkeypatch: pytest.MonkeyPatch, case: str, device: torch.device
) -> None:
    calls: list[Any] = []

    class Spied(WithGenerator):
        def sample(self, generator: Any = None, *args: Any) -> Any:
            if self.mean.shape == (2, 4, 4, 4):
                calls.append((generator, *args))
                return "original"
            return super().sample(generator)

    instance = Spied(latents(device), deterministic=case == "deterministic")
    if case == "flag":
        instance.deterministic = True
    if case == "shape":
        instance.std = instance.std[:, :1]
    if case == "device":
        instance.mean, instance.std = instance.mean.to("meta"), instance.std.to("meta")
    given: tuple[Any, ...] = {
        "list": ([torch.Generator(device)],),
        "argument": (None, 1),
    }.get(case, ())
    if case == "kernel":
        monkeypatch.setattr(_patch, "_DEVICES", frozenset())
    p = patch(Spied)
    method = Spied.sample
    if case == "missing":
        del instance.std
    if case == "after the undoing":
        p.undo()
    state = rng_state(device)
    with p if case != "after the undoing" else patch("normal"):
        calls.clear()
        assert method(instance, *given) == "original"
    assert calls == [given or (None,)]
    assert not fused
    assert torch.equal(rng_state(device), state)


def refused() -> dict[str, type]:
    class Tuple(Posterior):
        def sample(self) -> Any:
            return super().sample(), self.kl()

    class Shared(Posterior):
        def sample(self) -> Any:
            return self.mean + self.std * torch.randn_like(self.mean[:1])

    class Uniform(Posterior):
        def sample(self) -> Any:
            return self.mean + self.std * (torch.rand_like(self.mean) - 0.5) * 12**0.5 * 0.8

    class Mode(Posterior):
        def sample(self) -> Any:
            return self.mean

    class Tempered(Posterior):
        def sample(self) -> Any:
            return self.mean + 0.7 * self.std * torch.randn_like(self.mean)

    class Fixed(Posterior):
        def sample(self) -> Any:
            noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(0))
            return self.mean + self.std * noise

    class Named(Posterior):
        def sample(self) -> Any:
            return self.mean + self.sigma * torch.randn_like(self.mean)  # type: ignore[attr-defined]

    class Demanding(Posterior):
        def sample(self, temperature: float) -> Any:
            return self.mean + temperature * self.std * torch.randn_like(self.mean)

    class Unheeding(Posterior):
        def sample(self, generator: Any = None) -> Any:
            return super().sample()

    return {name: cls for name, cls in locals().items()}


@pytest.mark.parametrize("name", refused())
def test_a_class_that_computes_something_else_is_refused(name: str) -> None:
    """By name, with nothing patched and nothing drawn."""
    cls = refused()[name]
    sample, state = vars(cls)["sample"], torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"patch\(\): .*{name}\.sample\(\) must return mean \+"):
        patch("normal", cls)
    assert vars(cls)["sample"] is sample
    assert not in_force()
    assert torch.equal(torch.get_rng_state(), state)


def no_unpacking(_: Tensor) -> Tensor:
    raise AssertionError("unpacked before the backward, as a checkpoint must not be")


TAKEN = {
    "nothing": "clamped",
    "logvar retained": "logvar",
    "hook on logvar": "logvar",
    "packed": "logvar",
    "no gradients": "std",
    "another std": "std",
    "std in place": "std",
    "std retained": "std",
    "hook on std": "std",
    "another logvar": "std",
    "logvar in place": "std",
}


@pytest.mark.parametrize("change", TAKEN)
def test_what_counts_is_std_as_it_is_held(
    monkeypatch: pytest.MonkeyPatch, change: str, device: torch.device
) -> None:
    """What it comes from stands for it only where it is on record that nothing changed."""
    monkeypatch.setattr(_patch, "_DEVICES", ALL_DEVICES)
    scales: list[Any] = []
    plain = _patch._plain_call
    monkeypatch.setattr(
        _patch,
        "_plain_call",
        lambda *args: scales.append(args[4][1] if args[4] else args[2]) or plain(*args),
    )
    parameters = (latents(device) * 12).requires_grad_()
    instance = Posterior(parameters)
    if change == "packed":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, no_unpacking):
            instance = Posterior(parameters)
    if change == "another std":
        instance.std = instance.std * 0.5
    if change == "another logvar":
        instance.logvar = instance.logvar + 1
    for name in ("std", "logvar"):
        held = getattr(instance, name)
        if change == f"{name} in place":
            with torch.no_grad():
                held.mul_(0.5)
        if change == f"{name} retained":
            held.retain_grad()
        if change == f"hook on {name}":
            held.register_hook(lambda g: g)
    with patch(Posterior), torch.set_grad_enabled(change != "no gradients"):
        torch.manual_seed(1)
        z = instance.sample()
    (scale,) = scales
    taken = {
        "std": scale is instance.std,
        "logvar": scale is instance.logvar,
        "clamped": torch.equal(scale, parameters.chunk(2, 1)[1]),
    }
    assert [name for name, is_it in taken.items() if is_it] == [TAKEN[change]]
    torch.manual_seed(1)
    std = instance.std.detach()
    eps = reparam_fused.fused_reparameterize(torch.zeros_like(std), std=torch.ones_like(std))
    torch.testing.assert_close(z, instance.mean + std * eps, check_stride=False)
    if "retained" in change:
        z.sum().backward()
        expected = eps if change == "std retained" else 0.5 * std * eps
        torch.testing.assert_close(getattr(instance, TAKEN[change]).grad, expected)


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-1, None), (None, 1.0), (1.0, -1.0), "tensors"])
def test_only_a_clamp_by_numbers_is_taken_back(ends: Any, device: torch.device) -> None:
    x = latents(device).requires_grad_() * 1
    if ends == "tensors":
        clamped = x.clamp(torch.zeros_like(x), torch.ones_like(x))
    else:
        clamped = x.clamp(*ends)
    raw, clamp = _posteriors.unclamped(clamped)
    taken = ends == (-1.0, 1.0)
    assert clamp == (ends if taken else None)
    assert torch.equal(raw, x if taken else clamped)
    assert _posteriors.unclamped(x) == (x, None)
    with torch.no_grad():
        x.add_(1)  # what was clamped is no more
    assert _posteriors.unclamped(clamped) == (clamped, None)


@pytest.mark.parametrize("half", [0.25, "half of another", "tensor", "division", "leaf"])
def test_only_exp_of_half_is_taken_for_it(half: Any, device: torch.device) -> None:
    log_var = latents(device).requires_grad_()
    if half != "leaf":
        log_var = log_var * 1
    products: dict[Any, Callable[[], Tensor]] = {
        0.25: lambda: 0.25 * log_var,
        "half of another": lambda: 0.5 * (log_var + 1),
        "tensor": lambda: torch.full_like(log_var, 0.5).requires_grad_() * log_var,
        "division": lambda: log_var / 2,
        "leaf": lambda: 0.5 * log_var,
    }
    std = torch.exp(products[half]())
    assert _posteriors.is_exp_of_half(std, log_var) == (half == "division")
    assert not _posteriors.is_exp_of_half(std, None)
    std.sum().backward()  # and the number is gone
    assert not _posteriors.is_exp_of_half(std, log_var)


def test_kl_has_the_dtype_of_var(device: torch.device) -> None:
    """Which autocast may compute in float32 of a logvar that is not."""
    instance = Posterior(latents(device).bfloat16())
    instance.var = instance.var.float()
    expected = instance.kl()
    with patch(Posterior):
        assert_same_bits(instance.kl(), expected)


# One seed gives one draw, however a call is made, wherever it does so without a patch.


def compiled_by(backend: str) -> Callable[..., Tensor]:
    def run(f: Callable[..., Tensor], *args: Tensor) -> Tensor:
        torch.compiler.reset()
        return torch.compile(f, backend=backend, fullgraph=True)(*args)

    return run


def traced(f: Callable[..., Tensor], *args: Tensor) -> Tensor:
    graph = make_fx(f)(*args)
    torch.manual_seed(SEED)  # tracing draws
    return graph(*args)


def without(mode: Callable[[], Any]) -> Callable[..., Tensor]:
    def run(f: Callable[..., Tensor], *args: Tensor) -> Tensor:
        with mode():
            return f(*args)

    return run


def forward_mode(f: Callable[..., Tensor], loc: Tensor, scale: Tensor) -> Tensor:
    return torch.func.jvp(f, (loc, scale), (scale, loc))[0]


def twice_forward(f: Callable[..., Tensor], loc: Tensor, scale: Tensor) -> Tensor:
    return torch.func.jvp(lambda *x: forward_mode(f, *x), (loc, scale), (loc, scale))[0]


def within_grad(f: Callable[..., Tensor], *args: Tensor) -> Tensor:
    def loss(*args: Tensor) -> tuple[Tensor, Tensor]:
        z = f(*args)
        return z.sum(), z

    return torch.func.grad(loss, has_aux=True)(*args)[1]


def by_checkpoint(f: Callable[..., Tensor], loc: Tensor, scale: Tensor) -> Tensor:
    loc = loc.requires_grad_()
    return torch.utils.checkpoint.checkpoint(f, loc, scale, use_reentrant=False)


WAYS: dict[str, Callable[..., Tensor]] = {
    "gradients": lambda f, loc, scale: f(loc.requires_grad_(), scale.requires_grad_()),
    "inference mode": without(torch.inference_mode),
    "functionalize": lambda f, *args: torch.func.functionalize(f)(*args),
    "grad": within_grad,
    "forward": forward_mode,
    "twice forward": twice_forward,
    "checkpoint": by_checkpoint,
    "make_fx": traced,
    "eager": compiled_by("eager"),
    "aot_eager": compiled_by("aot_eager"),
    "grad, compiled": lambda f, *args: compiled_by("eager")(partial(within_grad, f), *args),
}


def sample_of(cls: Any, loc: Tensor, scale: Tensor) -> Tensor:
    return cls(torch.cat([loc, scale], 1)).sample()  # type: ignore[no-any-return]


SEEDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rsample": lambda m, s: Normal(m, s, validate_args=False).rsample(),
    "rsample (2, 3)": lambda m, s: Normal(m, s, validate_args=False).rsample((2, 3)),
    "sample": lambda m, s: Normal(m, s, validate_args=False).sample(),
    "sample (2, 3)": lambda m, s: Normal(m, s, validate_args=False).sample((2, 3)),
    "LogNormal": lambda m, s: LogNormal(m, s, validate_args=False).sample(),
    "ours": lambda m, s: reparam_fused.Normal(m, s, validate_args=False).rsample(),
    **{name: partial(sample_of, cls) for name, cls in LIKE_IT.items()},
    "ours, sample": lambda m, s: reparam_fused.Normal(m, log_var=s).sample(),
}


def seeded(source: str, way: str, device: torch.device) -> Tensor:
    loc, scale = (t.detach() for t in parameters(40, 6, dtype=torch.float32, device=device))
    torch.manual_seed(SEED)
    call = SEEDED[source]
    return (call(loc, scale) if way == "plainly" else WAYS[way](call, loc, scale)).detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", SEEDED)
def test_one_seed_is_one_draw_however_it_is_called(
    fused: list[Any], source: str, way: str, device: torch.device
) -> None:
    """Bit for bit, as it is without the patch. Red where a way is left to the original."""
    assert_same_bits(seeded(source, way, device), seeded(source, "plainly", device))
    with patch("normal", *LIKE_IT.values()):
        assert_same_bits(seeded(source, way, device), seeded(source, "plainly", device))
    if not source.startswith("ours"):
        assert fused


@pytest.mark.parametrize("sample_shape", [(), (2,), (2, 3)])
def test_sample_is_rsample_without_gradients(
    fused: list[Any], sample_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Red where only one of the two is replaced."""
    for again in (contextlib.nullcontext, lambda: patch("normal")):
        normal = Normal(*parameters(5, 3, dtype=dtype, device=device))
        drawn = []
        with again():
            for method in (normal.rsample, normal.sample):
                torch.manual_seed(SEED)
                drawn.append(method(sample_shape))
        assert_same_bits(drawn[1], drawn[0].detach())
        assert [z.requires_grad for z in drawn] == [True, False]
    assert len(fused) == 2


@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_a_sample_is_that_of_the_original(
    fused: list[Any],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    dims: int,
    device: torch.device,
) -> None:
    """That of loc, which of an rsample is not so."""
    loc, _ = parameters(*[4] * dims, dtype=dtype, device=device)
    _, scale = parameters(*[4] * dims, dtype=scale_dtype, device=device)
    normal = Normal(loc, scale)
    expected = normal.sample((3,))
    with patch("normal"):
        z = normal.sample((3,))
    assert (z.dtype, z.shape) == (expected.dtype, expected.shape)


class ByRow(Posterior):
    """Takes a list of generators too, as diffusers' randn_tensor does: one for each row, or one."""

    def sample(self, generator: Any = None) -> Any:
        if isinstance(generator, list) and len(generator) == 1:
            (generator,) = generator
        if not isinstance(generator, list):
            return self.mean + self.std * self.randn(self.mean.shape, generator)
        shape = (1, *self.mean.shape[1:])
        rows = [self.randn(shape, generator[i]) for i in range(len(self.mean))]
        return self.mean + self.std * torch.cat(rows)

    def randn(self, shape: Any, generator: Any) -> Tensor:
        device, dtype = self.mean.device, self.mean.dtype
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def seeds(*seeds: int, device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


@pytest.fixture(params=["class", "diffusers"])
def by_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A class whose sample() takes a list, and what patches it."""
    if request.param == "diffusers":
        vae = ModuleType(VAE)
        vae.DiagonalGaussianDistribution = ByRow  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
        monkeypatch.setitem(sys.modules, VAE, vae)
    return ByRow if request.param == "class" else request.param


@pytest.mark.parametrize("rows", [1, 2])
def test_a_list_of_one_generator_is_that_generator(
    fused: list[Any], by_row: Any, rows: int, device: torch.device
) -> None:
    """As of the original; the generator is left where it was. Red where a list is left to it."""
    posterior = ByRow(latents(device)[:rows])

    def draw(in_list: bool) -> tuple[Tensor, Tensor]:
        (generator,) = seeds(7, device=device)
        z = posterior.sample([generator] if in_list else generator)
        return z, generator.get_state()

    for context in (contextlib.nullcontext, lambda: patch(by_row)):
        with context():
            (z, state), (again, left) = draw(False), draw(True)
            assert_same_bits(again, z)
            assert torch.equal(left, state)
    assert len(fused) == 2


@pytest.mark.parametrize("further", [0, 1])
def test_a_list_of_generators_draws_each_row_as_it_is_drawn_alone(
    fused: list[Any],
    by_row: Any,
    further: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """As of the original, which takes no notice of further ones; a second draw goes on. Red where
    a list is left to the original, where rows share a key, and where a key moves a generator by
    more or less than a draw."""
    parameters = latents(device).to(dtype)

    def draws(posterior: Any, generator: Any) -> list[Tensor]:
        return [posterior.sample(generator) for _ in range(2)]

    for context in (contextlib.nullcontext, lambda: patch(by_row)):
        with context():
            given = seeds(*(7, 8, 9)[: 2 + further], device=device)
            at_once = draws(ByRow(parameters), given)
            for row, seed in enumerate((7, 8)):
                (generator,) = seeds(seed, device=device)
                alone = draws(ByRow(parameters[row : row + 1]), generator)
                for a, b in zip(at_once, alone, strict=True):
                    assert_same_bits(a[row : row + 1], b)
                assert torch.equal(given[row].get_state(), generator.get_state())
    assert len(fused) == 6


@pytest.mark.parametrize("given", [(7,), (7, 8)])
def test_generators_of_compiled_calls(
    by_row: Any, given: tuple[int, ...], device: torch.device
) -> None:
    """Draw what those of eager ones do, as of the original."""

    def sample(parameters: Tensor, generator: Any) -> Any:
        return ByRow(parameters).sample(generator)

    parameters = latents(device)
    for context in (contextlib.nullcontext, lambda: patch(by_row)):
        with context():
            torch.compiler.reset()
            compiled = torch.compile(sample, backend="aot_eager")
            for of in (list, lambda generators: generators[0]):
                expected = sample(parameters, of(seeds(*given, device=device)))
                assert_same_bits(compiled(parameters, of(seeds(*given, device=device))), expected)


def test_one_generator_twice_in_a_list_goes_on(by_row: Any, device: torch.device) -> None:
    for context in (contextlib.nullcontext, lambda: patch(by_row)):
        with context():
            (generator,) = seeds(7, device=device)
            z = ByRow(latents(device)).sample([generator, generator])
            for row, (other,) in enumerate([seeds(7, device=device)] * 2):
                alone = ByRow(latents(device)[row : row + 1]).sample(other)
                assert_same_bits(z[row : row + 1], alone)


def test_gradients_of_rows(by_row: Any, device: torch.device) -> None:
    parameters = latents(device).requires_grad_()
    with patch(by_row):
        posterior = ByRow(parameters)
        z = posterior.sample(seeds(7, 8, device=device))
    eps = ((z - posterior.mean) / posterior.std).detach()
    by_hand = posterior.mean + posterior.std * eps
    gradients = (
        torch.autograd.grad(t.square().sum(), parameters, retain_graph=True)[0]
        for t in (z, by_hand)
    )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", ["empty", "none in it", "number in it", "tuple"])
def test_what_is_no_list_of_generators_is_left_to_the_original(
    fused: list[Any], by_row: Any, case: str, device: torch.device
) -> None:
    """Which finds its generators as they were. Red where one is drawn from before all are seen."""
    (generator,) = seeds(7, device=device)
    given: Any = {
        "empty": [],
        "none in it": [generator, None],
        "number in it": [generator, 3],
        "tuple": (generator, generator),
    }[case]

    def outcome() -> Any:
        torch.manual_seed(SEED)
        generator.manual_seed(7)
        try:
            return ByRow(latents(device)).sample(given).tolist()
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    with patch(by_row):
        assert outcome() == expected
    assert not fused


def test_a_class_that_takes_no_list_refuses_one(device: torch.device) -> None:
    with patch(WithGenerator), pytest.raises(TypeError):
        WithGenerator(latents(device)).sample(seeds(7, device=device))


def test_what_is_no_such_class() -> None:
    with pytest.raises(TypeError, match=r"must have the method sample, .*Plain has none"):
        patch(type("Plain", (), {}))
    with pytest.raises(TypeError, match=r"argument 'targets' must be str or a class, not Softplus"):
        patch(Softplus(latents()))  # type: ignore[arg-type]


def test_asking_moves_no_generator(device: torch.device) -> None:
    for cls in LIKE_IT.values():
        states = torch.get_rng_state(), rng_state(device)
        patch(cls).undo()
        assert all(
            torch.equal(a, b)
            for a, b in zip(states, (torch.get_rng_state(), rng_state(device)), strict=True)
        )


def test_slots_and_properties(fused: list[Any], device: torch.device) -> None:
    """Nothing that is asked for can be set: an instance made up for that is none of these."""
    with pytest.raises(ValueError, match="must return"):
        patch(OfLogVar)

    class Kept(OfLogVar):
        __slots__ = ("logvar",)

        def __init__(self, parameters: Tensor) -> None:
            super().__init__(parameters)
            self.logvar = self._log_var

        @property
        def std(self) -> Tensor:
            return torch.exp(0.5 * self.logvar)

    with patch(Kept):
        Kept(latents(device)).sample()
    assert len(fused) == 1


def test_patches_of_a_class_nest_and_overlap(fused: list[Any], device: torch.device) -> None:
    """By class: its name in another patch, its subclass and its base are counted apart."""
    original = Posterior.sample
    base, derived = patch(Posterior), patch(WithGenerator)
    again = patch(Posterior, Posterior, "normal")
    assert in_force()
    method = Posterior.sample
    base.undo()
    assert Posterior.sample is method
    again.undo()
    assert Posterior.sample is original
    Posterior(latents(device)).sample()
    assert not fused
    WithGenerator(latents(device)).sample()
    assert len(fused) == 1
    # Its kl is that of the base, patched when this was; and goes to the original by now.
    expected = Posterior(latents(device)).kl()
    torch.testing.assert_close(WithGenerator(latents(device)).kl(), expected)
    derived.undo()
    assert "kl" not in vars(WithGenerator)


def test_the_class_of_a_name_is_the_same_target(
    fused: list[Any], diffusers: ModuleType, device: torch.device
) -> None:
    by_name, by_class = patch("diffusers", "normal"), patch(Latents, Normal)
    method = Latents.sample
    by_name.undo()
    assert Latents.sample is method
    assert in_force()
    Latents(latents(device)).sample()
    assert len(fused) == 1
    by_class.undo()
    assert Latents(latents(device)).sample() == ("original", None)


NOT_PLAIN = "both are made in one pass by the module for plain calls, which is not there"
needs_plain_calls = pytest.mark.skipif(not CALLS_CAN_BE_PLAIN, reason=NOT_PLAIN)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels made at once: both, or a divergence alone."""
    made: list[str] = []
    plain, divergence = _heads.Head.plain, _patch.fused_kl_divergence

    def count_plain(self: Any, *args: Any) -> Any:
        result = plain(self, *args)
        if result is not None and args[-1] is not False:
            made.append("both")
        return result

    def count_divergence(*args: Any, **options: Any) -> Tensor:
        made.append("kl")
        return divergence(*args, **options)

    monkeypatch.setattr(_heads.Head, "plain", count_plain)
    monkeypatch.setattr(_patch, "fused_kl_divergence", count_divergence)
    return made


class Clamped(Latents):
    """What is sampled of it is of its logvar, as of diffusers' own class."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        self.logvar = self.logvar.clamp(-30.0, 20.0)


class ByExpWithGenerator(ByExp):
    def sample(self, generator: Any = None) -> Any:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + torch.exp(self.logvar / 2) * noise


PAIRED: dict[str, Any] = {"diffusers": Clamped, "exp": ByExp, "generator": ByExpWithGenerator}


def asked_before(cls: Any) -> None:
    """So that the next sample is made with its divergence."""
    for _ in range(2):
        instance = cls(latents().requires_grad_())
        instance.sample()
        instance.kl()


@pytest.fixture(params=PAIRED)
def paired(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A class that is patched and has been asked for both."""
    if not CALLS_CAN_BE_PLAIN:
        pytest.skip(NOT_PLAIN)
    cls = PAIRED[request.param]
    if cls is Clamped:
        vae = ModuleType(VAE)
        vae.DiagonalGaussianDistribution = cls  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
        monkeypatch.setitem(sys.modules, VAE, vae)
    with patch("diffusers" if cls is Clamped else cls):
        asked_before(cls)
        yield cls


def drawn(cls: Any, parameters: Tensor) -> tuple[Tensor, ...]:
    """A sample, its divergence, and the gradients of each where they are wanted."""
    instance = cls(parameters)
    torch.manual_seed(2)
    z, kl = instance.sample(), instance.kl()
    state = torch.get_rng_state()
    if not parameters.requires_grad:
        return z, kl, state
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    loss = (z * weight).sum() + kl.square().sum()
    (both,) = torch.autograd.grad(loss, parameters, create_graph=True)
    (second,) = torch.autograd.grad(both.square().sum(), parameters)
    return z, kl, state, both, second


@pytest.mark.parametrize("grad", [True, False])
def test_one_pass_gives_what_two_give(
    paired: Any, passes: list[str], dtype: torch.dtype, grad: bool
) -> None:
    """Bit for bit: the sample, the sum, the gradients of two orders, and where the seed is left."""
    parameters = (latents() * 12).to(dtype).requires_grad_(grad)
    _patch._pairs[paired].asked = False
    apart = drawn(paired, parameters)
    assert passes == ["kl"]
    passes.clear()
    at_once = drawn(paired, parameters)
    assert passes == ["both"]
    assert torch.equal(at_once[2], apart[2])
    for ours, theirs in zip(at_once[:2] + at_once[3:], apart[:2] + apart[3:], strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
        assert (ours.stride(), ours.requires_grad) == (theirs.stride(), theirs.requires_grad)


def test_one_pass_and_the_eager_line(paired: Any, passes: list[str]) -> None:
    parameters = latents().requires_grad_()
    instance = paired(parameters)
    z, kl = instance.sample(), instance.kl()
    assert passes == ["both"]
    assert not any("kl" in name for name in vars(instance))
    mean, log_var = parameters.chunk(2, 1)
    eps = ((z - mean) / torch.exp(0.5 * log_var)).detach()
    by_hand = mean + torch.exp(0.5 * log_var) * eps
    exact = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2, 3))
    torch.testing.assert_close(kl, exact, rtol=1e-12, atol=0)
    ours, theirs = (
        torch.autograd.grad(a.square().sum() + (b * torch.arange(2)).sum(), parameters)[0]
        for a, b in ((z, kl), (by_hand, exact))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@needs_plain_calls
def test_a_backward_of_one_leaves_that_of_the_other(passes: list[str]) -> None:
    """As of two calls, of leaves: none of them is asked to retain a graph."""

    class OfLeaves(ByExp):
        def __init__(self, parameters: Tensor) -> None:
            super().__init__(parameters)
            self.mean, self.logvar = (
                t.detach().clone().requires_grad_() for t in parameters.chunk(2, 1)
            )

    for first, second in ((0, 1), (1, 0)):
        with patch(OfLeaves):
            asked_before(OfLeaves)
            passes.clear()
            instance = OfLeaves(latents())
            both = instance.sample(), instance.kl()
        assert passes == ["both"]
        both[first].sum().backward()
        before = instance.mean.grad.clone()
        both[second].sum().backward()
        gained = instance.mean.grad - before
        torch.testing.assert_close(gained, instance.mean.detach() if second else gained * 0 + 1)


def test_a_checkpoint_finds_as_many_tensors(paired: Any) -> None:
    """Though its first run is asked for the divergence apart, and the next ones at once."""
    from torch.utils.checkpoint import checkpoint

    def loss(parameters: Tensor) -> Tensor:
        instance = paired(parameters)
        return instance.sample().square().sum() + instance.kl().sum()

    parameters = latents().requires_grad_()
    for asked in (False, True):
        _patch._pairs[paired].asked = asked
        torch.manual_seed(1)
        total = checkpoint(loss, parameters, use_reentrant=False)
        _patch._pairs[paired].asked = not asked
        (ours,) = torch.autograd.grad(total, parameters)
        torch.manual_seed(1)
        (theirs,) = torch.autograd.grad(loss(parameters), parameters)
        assert_same_bits(ours, theirs)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mean in place": lambda d: d.mean.mul_(2),
    "what it is a part of in place": lambda d: d.mean._base.mul_(2),
    "logvar in place": lambda d: d.logvar.mul_(2),
    "another mean": lambda d: setattr(d, "mean", d.mean + 1),
    "another logvar": lambda d: setattr(d, "logvar", d.logvar + 1),
    "equal tensors": lambda d: vars(d).update(mean=d.mean.clone(), logvar=d.logvar.clone()),
}


@needs_plain_calls
@pytest.mark.parametrize("change", CHANGES)
def test_a_divergence_is_that_of_what_is_held(change: str, passes: list[str]) -> None:
    """Where that is another than what was sampled it is made anew."""
    with patch(ByExp):
        asked_before(ByExp)
        instance = ByExp(latents())
        passes.clear()
        with torch.no_grad():
            instance.sample()
            CHANGES[change](instance)
            instance.var = instance.logvar.exp()
            kl = instance.kl()
        assert passes == ["both", "kl"]
    torch.testing.assert_close(kl, ByExp.kl(instance))


@needs_plain_calls
def test_gradients_are_wanted_of_the_divergence_alone(passes: list[str]) -> None:
    """What was sampled without has them all the same; and the other way round it has none."""
    parameters = latents().requires_grad_()
    with patch(ByExp):
        asked_before(ByExp)
        passes.clear()
        for wanted in (True, False):
            instance = ByExp(parameters)
            with torch.set_grad_enabled(not wanted):
                instance.sample()
            with torch.set_grad_enabled(wanted):
                kl = instance.kl()
            assert kl.requires_grad is wanted
            if wanted:
                (grad,) = torch.autograd.grad(kl.sum(), parameters)
    assert passes == ["both", "both"]
    (expected,) = torch.autograd.grad(ByExp(parameters).kl().sum(), parameters)
    torch.testing.assert_close(grad, expected)


@needs_plain_calls
def test_who_asks_for_one_gets_one(passes: list[str]) -> None:
    """A divergence is not made where none is asked: at most once more than it is found."""
    new: Callable[[], Any] = lambda: ByExp(latents())  # noqa: E731
    with patch(ByExp):
        for _ in range(3):
            new().sample()
        assert passes == []
        for _ in range(3):  # before what they sample
            instance = new()
            instance.kl()
            instance.sample()
        assert passes == ["kl"] * 3
        passes.clear()
        for _ in range(5):  # of every second one
            instance = new()
            instance.sample()
            instance.kl()
            new().sample()
        assert passes.count("both") == 1
        passes.clear()
    with patch(ByExp):
        asked_before(ByExp)
        for _ in range(5):
            instance = new()
            instance.sample()
            instance.kl()
        for _ in range(5):
            new().sample()
        assert passes == ["kl", "kl", *["both"] * 6]
        # Once more of one instance: it is not made again, nor found twice.
        asked_before(ByExp)
        passes.clear()
        instance = new()
        for _ in range(3):
            instance.sample()
        first, second = instance.kl(), instance.kl()
        assert passes == ["both", "kl"]
        assert_same_bits(first, second)


@needs_plain_calls
@pytest.mark.parametrize("layout", ["chunk", "channels last", "transposed", "expanded", "ones"])
def test_one_pass_lies_as_the_sample_does(layout: str, passes: list[str]) -> None:
    """Where a head's z would lie otherwise they are made apart."""
    parameters = {
        "chunk": latents(),
        "channels last": latents().to(memory_format=torch.channels_last),
        "transposed": latents().transpose(2, 3),
        "expanded": latents()[:, :, :1].expand(2, 8, 4, 4),
        "ones": latents()[:, :, :1, :1].to(memory_format=torch.channels_last),
    }[layout]
    with patch(ByExp):
        asked_before(ByExp)
        passes.clear()
        instance = ByExp(parameters)
        z, _ = instance.sample(), instance.kl()
    assert passes == (["both"] if layout in ("chunk", "expanded") else ["kl"])
    expected = reparam_fused.fused_reparameterize(instance.mean, instance.logvar)
    assert z.stride() == expected.stride()


def test_nothing_is_kept_for_long(paired: Any) -> None:
    """No cycles: what an instance holds goes with it, and copies of it have nothing of that."""
    parameters = latents().requires_grad_()
    gc.disable()
    try:
        instance = paired(parameters)
        instance.sample()
        assert isinstance(vars(instance)[_patch._KEPT], _patch._Kept)
        kept = weakref.ref(vars(instance)[_patch._KEPT].total)
        gone = [*map(weakref.ref, (instance, instance.mean, instance.logvar)), kept]
        del instance
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
    _patch._pairs[paired].credit = 1  # that one was in vain
    asked_before(paired)
    instance = paired(parameters)
    instance.sample()
    copied = pickle.loads(pickle.dumps(instance))
    assert not isinstance(vars(copied)[_patch._KEPT], _patch._Kept)
    assert_same_bits(copied.kl().detach(), instance.kl().detach())


def test_properties_and_slots_are_sampled_apart(passes: list[str]) -> None:
    """Of what an instance does not hold itself nobody knows whether it is the same."""

    class Properties(ByExp):
        def __init__(self, parameters: Tensor) -> None:
            super().__init__(parameters)

        @property
        def logvar(self) -> Tensor:
            return self.held * 1

        @logvar.setter
        def logvar(self, value: Tensor) -> None:
            self.held = value

        def kl(self, other: Any = None) -> Any:
            return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum([1, 2, 3])

    class Slots:
        __slots__ = ("logvar", "mean")
        kl = Properties.kl
        sample = ByExp.sample

        def __init__(self, parameters: Tensor) -> None:
            self.mean, self.logvar = parameters.chunk(2, 1)

    for cls in (Properties, Slots):
        with patch(cls):
            for _ in range(2):
                asked_before(cls)
    assert passes == ["kl"] * 8


@needs_plain_calls
@pytest.mark.parametrize("made_there", ["mean", "logvar"])
def test_inference_mode(made_there: str, passes: list[str]) -> None:
    """Of what was made in it no versions are counted."""
    with patch(ByExp):
        asked_before(ByExp)
        passes.clear()
        instance = ByExp(latents())
        with torch.inference_mode():
            setattr(instance, made_there, getattr(instance, made_there).clone())
        instance.sample()
        instance.kl()
        assert passes == ["kl"]


@needs_plain_calls
def test_within_transforms(passes: list[str]) -> None:
    """What was kept outside of them is made anew, for autograd outside to see."""
    parameters = latents().requires_grad_()
    (expected,) = torch.autograd.grad(ByExp(parameters).kl().sum(), parameters)
    with patch(ByExp):
        asked_before(ByExp)
        passes.clear()
        instance = ByExp(parameters)
        instance.sample()
        mapped = torch.vmap(lambda x: x * instance.kl().sum())(torch.ones(2))
        assert passes == ["both", "kl"]
        (grad,) = torch.autograd.grad(mapped[0], parameters)
        inner = torch.func.grad(lambda p: ByExp(p).kl().sum())(parameters.detach())
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(inner, expected)


@needs_plain_calls
def test_one_pass_draws_from_the_generator(passes: list[str]) -> None:
    """Of those that are none the original has its say."""
    with patch(ByExpWithGenerator):
        asked_before(ByExpWithGenerator)
        passes.clear()
        instance = ByExpWithGenerator(latents().requires_grad_())
        state = torch.get_rng_state()
        z = instance.sample(torch.Generator().manual_seed(2))
        assert passes == ["both"]
        assert torch.equal(torch.get_rng_state(), state)
        assert_same_bits(z, instance.sample(generator=torch.Generator().manual_seed(2)))
        instance.kl()
        for none in (False, 3, [torch.Generator()]):
            asked_before(ByExpWithGenerator)
            with pytest.raises(TypeError, match="generator"):
                instance.sample(none)
            assert _patch._KEPT not in vars(instance)


def test_a_graph_is_not_compiled_again_for_what_was_asked() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def both(parameters: Tensor) -> tuple[Tensor, Tensor]:
        instance = Posterior(parameters)
        return instance.sample(), instance.kl()

    torch.compiler.reset()
    compiled = torch.compile(both, backend=record, fullgraph=True)
    with patch(Posterior):
        for _ in range(3):
            compiled(latents())
            asked_before(Posterior)
    assert len(graphs) == 1


def test_threads_that_ask_for_both(paired: Any) -> None:
    """Of instances of their own, and of one."""
    shared = paired(latents())
    expected = shared.kl()
    start = threading.Barrier(4)

    def work(_: int) -> None:
        start.wait()
        for _ in range(200):
            own = paired(latents())
            assert own.sample().isfinite().all()
            assert_same_bits(own.kl(), expected)
            shared.sample()
            assert_same_bits(shared.kl(), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@compilers("eager", "aot_eager", "inductor")
def test_a_compiled_class(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device
) -> None:
    monkeypatch.setattr(_patch, "_DEVICES", ALL_DEVICES)
    torch.compiler.reset()

    def loss(parameters: Tensor) -> tuple[Tensor, Tensor]:
        posterior = Posterior(parameters)
        return posterior.sample(), posterior.kl()

    parameters = latents(device).requires_grad_()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    unpatched = compiled(parameters)
    with patch(Posterior):
        torch.manual_seed(4)
        z, kl = compiled(parameters)
        torch.manual_seed(4)
        assert_same_bits(compiled(parameters)[0].detach(), z.detach())
        torch.testing.assert_close(kl, unpatched[1])
        posterior = Posterior(parameters)
        assert not torch.equal(compiled(parameters)[0], z)
    eps = ((z - posterior.mean) / posterior.std).detach()
    by_hand = posterior.mean + posterior.std * eps
    gradients = (torch.autograd.grad(t.square().sum(), parameters) for t in (z, by_hand))
    torch.testing.assert_close(*gradients)
