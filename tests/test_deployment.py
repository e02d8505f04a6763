"""Models that leave the process: exported, packed by a compiler, pickled, averaged, replicated."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compilers import compilers, on_devices
from helpers import assert_same_bits, inputs, leaves, needs_kernels
from ranks import needs_gloo, run_ranks
from torch import Tensor
from torch._inductor import config as inductor_config

import reparam_fused
from reparam_fused import fused_kl_divergence, fused_reparameterize

KEY = reparam_fused.key(7)


class Encoder(torch.nn.Module):
    """Without a key of its own: its noise is the program's."""

    def forward(self, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        return fused_reparameterize(mu, log_var), fused_kl_divergence(mu, log_var)


class ByRho(torch.nn.Module):
    """A further form of the scale, within bounds, and several samples."""

    def forward(self, mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"rho": rho, "clamp": (-1.0, None), "min_std": 0.1}
        z = fused_reparameterize(mu, **options, sample_shape=(2,))
        return z, fused_kl_divergence(mu, **options)


class Keyed(torch.nn.Module):
    """With a key in a buffer, as int64, which all of torch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("key", KEY.view(torch.int64).clone())

    def forward(self, mu: Tensor, log_var: Tensor) -> Tensor:
        return self.scale * fused_reparameterize(mu, log_var, key=self.key)


SIGMA: dict[type[torch.nn.Module], Callable[[Tensor], Tensor]] = {
    Encoder: lambda log_var: torch.exp(0.5 * log_var),
    ByRho: lambda rho: rho.clamp(-1.0).exp().log1p() + 0.1,
}


def assert_a_program_of_torch(
    call: Any, mu: Tensor, scale: Tensor, module: type[torch.nn.Module] = Encoder
) -> None:
    """It draws fresh noise of the right size, and computes the divergence."""
    first, second = call(mu, scale), call(mu, scale)
    for z, kl in (first, second):
        torch.testing.assert_close(kl, module()(mu, scale)[1])
        noise = (z - mu) / SIGMA[module](scale)
        assert abs(noise.mean()) < 0.1
        assert abs(noise.std() - 1) < 0.1
    assert (first[0] != second[0]).all()


@pytest.mark.parametrize("module", SIGMA)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx(dynamo: bool, module: type[torch.nn.Module], tmp_path: Path) -> None:
    """By either exporter the call is the line that it replaces, in ONNX's own operators."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    mu, log_var = inputs(40, 30)
    path = str(tmp_path / "encoder.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module(), (mu, log_var), path, dynamo=dynamo, input_names=["mu", "lv"])
    session = onnxruntime.InferenceSession(path)

    def call(*operands: Tensor) -> list[Tensor]:
        given = dict(zip(["mu", "lv"], (t.numpy() for t in operands), strict=True))
        return [torch.from_numpy(t) for t in session.run(None, given)]

    assert_a_program_of_torch(call, mu, log_var, module)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_has_no_place_for_a_key(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as raised:  # noqa: PT011
            torch.onnx.export(Keyed(), inputs(4, 3), str(tmp_path / "x.onnx"), dynamo=dynamo)
    reasons = []
    error: BaseException | None = raised.value
    while error is not None:
        reasons.append(str(error))
        error = error.__cause__ or error.__context__
    assert any("a key cannot go into torch.jit.trace or torch.onnx.export" in r for r in reasons)


def test_a_traced_module_runs_without_the_package(tmp_path: Path) -> None:
    mu, log_var = inputs(40, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Encoder(), (mu, log_var), check_trace=False)
        torch.jit.save(traced, tmp_path / "encoder.pt")
    torch.save((mu, log_var), tmp_path / "operands.pt")
    program = """
import sys, torch
module = torch.jit.load("encoder.pt")
operands = torch.load("operands.pt")
torch.save([module(*operands) for _ in range(2)], "results.pt")
assert "reparam_fused" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
    results = iter(torch.load(tmp_path / "results.pt"))
    assert_a_program_of_torch(lambda *_: next(results), mu, log_var)


@compilers("eager", "aot_eager", "inductor")
def test_a_key_in_a_compiled_function(backend: str, device: torch.device) -> None:
    """Made there, split there, or held by a module."""
    mu, log_var = (t.to(device) for t in inputs(6, 3))

    def made(mu: Tensor, log_var: Tensor) -> Tensor:
        key = reparam_fused.key(7, device=device)
        first, second = reparam_fused.split(key)
        return fused_reparameterize(mu, log_var, key=first) + fused_reparameterize(
            mu, log_var, key=reparam_fused.fold_in(second, 5)
        )

    module = Keyed().to(device)
    for call in (made, module):
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(mu, log_var), call(mu, log_var))
        torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_a_key_in_an_exported_program(strict: bool, device: torch.device) -> None:
    mu, log_var = (t.to(device) for t in inputs(6, 3))
    module = Keyed().to(device)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (mu, log_var), strict=strict), buffer)
    buffer.seek(0)
    assert_same_bits(torch.export.load(buffer).module()(mu, log_var), module(mu, log_var))


@pytest.mark.parametrize(
    ("backend", "option", "device"),
    on_devices(
        ("eager", ""),
        ("aot_eager", ""),
        *(("inductor", option) for option in ("", "fallback_random", "cpp_wrapper")),
    ),
    indirect=["device"],
)
def test_one_seed_compiled_or_not(backend: str, option: str, device: torch.device) -> None:
    """A seed gives a compiled call the noise of the eager one, in each of several calls."""

    def twice(mu: Tensor, log_var: Tensor) -> Tensor:
        z = fused_reparameterize(mu, log_var)
        return fused_reparameterize(z, log_var)

    mu, log_var = (t.to(device).requires_grad_() for t in inputs(6, 3))
    results = []
    with inductor_config.patch({option: True} if option else {}):
        for call in (twice, torch.compile(twice, backend=backend, fullgraph=True)):
            torch.manual_seed(3)
            for _ in range(2):
                z = call(mu, log_var)
                results.append((z.detach(), *torch.autograd.grad(z.sum(), (mu, log_var))))
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        assert_same_bits(compiled[0], eager[0])
        for a, b in zip(compiled[1:], eager[1:], strict=True):
            torch.testing.assert_close(a, b)


@needs_kernels
def test_aot_inductor_with_a_key_in_a_buffer(tmp_path: Path) -> None:
    mu, log_var = inputs(6, 3)
    module = Keyed()
    with torch.no_grad():
        program = torch.export.export(module, (mu, log_var))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        assert_same_bits(loaded(mu, log_var), module(mu, log_var))


def test_a_key_survives_copies() -> None:
    """torch.save, deepcopy, a state_dict; as int64 also pickle, which torch has not for uint64."""
    mu, log_var = inputs(6, 3)
    for key in (KEY, KEY.view(torch.int64)):
        buffer = io.BytesIO()
        torch.save(key, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(key), torch.load(buffer)]
        if key.dtype == torch.int64:
            copies.append(pickle.loads(pickle.dumps(key)))
        for again in copies:
            assert again.dtype == key.dtype
            assert_same_bits(
                fused_reparameterize(mu, log_var, key=again),
                fused_reparameterize(mu, log_var, key=KEY),
            )
    module, other = Keyed(), Keyed()
    other.key.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(other)).key, module.key)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers: bool) -> None:
    module = Keyed()
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=use_buffers)
    for scale in (1.0, 3.0):
        module.scale.data.fill_(scale)
        averaged.update_parameters(module)
    assert torch.equal(averaged.module.key, KEY.view(torch.int64))
    mu, log_var = inputs(6, 3)
    assert_same_bits(averaged(mu, log_var).detach(), 2 * fused_reparameterize(mu, log_var, key=KEY))


def replicated(rank: int) -> Tensor:
    from torch.nn.parallel import DistributedDataParallel

    module = Keyed()
    module.key += rank  # the first rank's is to be everybody's
    model = DistributedDataParallel(module)
    z = model(*inputs(6, 3))
    z.sum().backward()
    return z.detach()


@needs_gloo
def test_a_key_in_a_buffer_of_a_replicated_module(tmp_path: Path) -> None:
    expected = fused_reparameterize(*inputs(6, 3), key=KEY)
    for z in run_ranks(2, tmp_path, replicated):
        assert_same_bits(z, expected)


def test_keys_of_numpy() -> None:
    for seed in (np.int64(5), np.uint64(2**63 + 5), np.array([5, 6]), np.uint8(5)):
        words = reparam_fused.key(seed).view(torch.int64).numpy().view(np.uint64)
        assert np.array_equal(words[..., 0], np.asarray(seed).astype(np.uint64))
        assert not words[..., 1].any()


def test_operands_of_a_module_are_not_kept_by_the_key() -> None:
    """A key that a call drew holds 16 bytes and nothing else."""
    mu, log_var = leaves(6, 3)
    z = fused_reparameterize(mu, log_var)
    keys = [t for t in z.grad_fn.saved_tensors if t is not None and t.shape == (2,)]
    assert [t.untyped_storage().nbytes() for t in keys] == [16]
