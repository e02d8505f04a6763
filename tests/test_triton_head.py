"""The head's Triton kernels without a GPU: as the PTX that Triton compiles, and interpreted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, assert_same_bits, extremes, inputs, key_of, patience
from test_heads import FAR
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, reference

pytest.importorskip("triton", reason="triton is not installed")

import machine_code
import triton_code
import triton_run
from ptx import Machine, Memory
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from reparam_fused import triton_head, triton_kernels
from reparam_fused.triton_kernels import Plan

Head = tuple[Tensor, ...]
DTYPES = triton_code.DTYPES
# An architecture for each
CASES = [(80, torch.float32), (90, torch.bfloat16), (120, torch.float16)]
each_dtype = pytest.mark.parametrize(("arch", "dtype"), CASES, ids=[str(d) for _, d in CASES])
RESULTS = {"z_ptr", "total_ptr", "by_mu_ptr", "by_scale_ptr", "by_loc_ptr", "by_prior_ptr"}
CLAMPED, RAISED = (-1.0, 0.75, 0.0), (-math.inf, 1.5, 0.25)
KEY = key_of(2**64 - 59, 2**32 - 7)


def compiled(plan: Plan, target: GPUTarget) -> CompiledKernel:
    types = tuple(
        p.annotation_type or triton_run._type(a)
        for p, a in zip(plan.kernel.params, plan.arguments, strict=False)
    )
    aligned = tuple(
        i for i, a in enumerate(plan.arguments) if isinstance(a, Tensor) and a.data_ptr() % 16 == 0
    )
    constants = dict(plan.constants)
    if "NEWTON" in constants:
        constants["NEWTON"] = target.backend == "cuda"
    return triton_run._compile(plan.kernel, types, aligned, tuple(constants.items()), target)


def execute(arch: int, plan: Plan, undefined: int | None) -> None:
    """As a GPU would: every byte of a result written once."""
    code = compiled(plan, triton_run.NVIDIA[arch])
    kernel, memory = triton_run._parse(code.asm["ptx"]), Memory()
    values: list[int] = []
    for name, argument in zip(plan.kernel.arg_names, plan.arguments, strict=False):
        if isinstance(argument, Tensor):
            start = argument.storage_offset() * argument.element_size()
            storage = triton_run._storage(argument)
            values.append(memory.allocate(name, storage, writable=name in RESULTS) + start)
        elif argument is not None:
            values += argument if isinstance(argument, tuple) else [argument]
    values += [0] * (len(kernel.parameters) - len(values))  # Triton's scratch memory
    params = [
        int(v).to_bytes(p.size, "little", signed=v < 0)
        for v, p in zip(values, kernel.parameters, strict=True)
    ]
    Machine(kernel, memory, undefined=undefined).launch(
        (plan.programs, 1, 1), (32 * triton_kernels.WARPS, 1, 1), params,
        shared_bytes=code.metadata.shared,
    )  # fmt: skip
    for name, argument in zip(plan.kernel.arg_names, plan.arguments, strict=False):
        if name in RESULTS and argument is not None:
            memory.check_written_once(name)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Of the launches, which are not done."""
    found: list[Plan] = []
    monkeypatch.setattr(triton_head, "_run", lambda plan, device: found.append(plan))
    return found


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Plan]]:
    """Launches are run as on this architecture, and noted."""

    def choose(arch: int) -> list[Plan]:
        found: list[Plan] = []

        def run(plan: Plan, device: torch.device) -> None:
            found.append(plan)
            # A half element may be packed with what is in a register that nobody wrote.
            execute(arch, plan, None if torch.float32 == plan.arguments[0].dtype else 2**64 - 1)

        monkeypatch.setattr(triton_head, "_run", run)
        return found

    return choose


def assert_alike(actual: Head, expected: Head) -> None:
    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert got.stride() == wanted.stride()
        assert_same_bits(got, wanted, f"result {i}")


def compare(
    mu: Tensor,
    scale: Tensor,
    key: Tensor | None,
    *,
    term: str = "kl_divergence",
    summed: int = 1,
    prior: tuple[Tensor, Tensor] = (None, None),  # type: ignore[assignment]
    backward: bool = True,
    **named: Any,
) -> None:
    """With reference.py, both ways."""
    options = reference._all_options(**named)
    rest = (term, summed, *options)
    expected = reference.head(mu, scale, key, *prior, *rest)
    assert_alike(triton_kernels.head(mu, scale, key, *prior, *rest), expected)
    if not backward:
        return
    z, total = expected
    grad_z = None if key is None else inputs(*z.shape, dtype=z.dtype, seed=3)[0]
    grad_total, _ = inputs(*total.shape, dtype=total.dtype, seed=4)
    given = (mu, scale, key, *prior, grad_z, grad_total, *rest)
    assert_alike(triton_kernels.head_backward(*given), reference.head_backward(*given))


def rows_of(x: Tensor, n: int) -> Tensor:
    return x[: x.numel() // n * n].view(-1, n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("term", _ops.TERMS)
def test_terms_forms_and_bounds(on: Any, term: str, form: str) -> None:
    """Over special values and the range of the type."""
    arch, dtype = CASES[(FORMS.index(form) + _ops.TERMS.index(term)) % 3]
    on(arch)
    special = extremes(dtype)
    mu, scale = inputs(special.numel(), dtype=dtype)
    scale = torch.where(torch.arange(special.numel()) % 2 == 0, special, scale)
    mu, scale = rows_of(mu, 20), rows_of(scale, 20)
    for bounds in {"std": (RAISED,), "rho": (None,)}.get(form, (CLAMPED, RAISED)):
        compare(mu, scale, KEY, term=term, form=form, bounds=bounds)


@pytest.mark.parametrize(
    ("form", "prior_form", "bounds", "prior_bounds"),
    [
        ("log_var", "log_std", None, CLAMPED),
        ("log_std", "log_var", CLAMPED, None),
        ("log_var", "std", CLAMPED, RAISED),
        ("rho", "log_var", RAISED, None),
        ("std", "rho", None, CLAMPED),
        ("log_std", "log_std", RAISED, None),
    ],
)
def test_priors(on: Any, form: str, prior_form: str, bounds: Any, prior_bounds: Any) -> None:
    i = FORMS.index(form)
    arch, dtype = CASES[i % 3]
    on(arch)
    mu, scale = inputs(60, 16, dtype=dtype)
    loc, prior = inputs(60, 16, dtype=dtype, seed=5)
    prior.view(-1)[::7] = rows_of(extremes(dtype), 7)[:, 0].repeat(2)[: len(prior.view(-1)[::7])]
    prior[:9], loc[:9] = scale[:9], mu[:9]  # the same: the ratio is 1, or near
    prior[4:9] *= 1.0078125
    given = {"form": form, "prior_form": prior_form, "bounds": bounds, "prior_bounds": prior_bounds}
    for key in (None, KEY) if i % 2 else (KEY, None):
        compare(mu, scale, key, prior=(loc, prior), **given)
    compare(mu, scale[:1], None, prior=(loc[:, :1], prior[0]), summed=2, backward=False, **given)


@pytest.mark.parametrize("forms", FAR, ids="-".join)
def test_a_prior_where_a_factor_is_no_number(on: Any, forms: tuple[str, str]) -> None:
    on(90)
    mu, scale, loc, prior = map(torch.tensor, zip(*FAR[forms], strict=True))
    compare(mu, scale, None, prior=(loc, prior), form=forms[0], prior_form=forms[1], summed=0)


@each_dtype
def test_rows(on: Any, arch: int, dtype: torch.dtype) -> None:
    """Of every length: several to a program, a warp or more of it; a chunk of one stride to four;
    chunks of them."""
    plans = on(arch)
    half = dtype != torch.float32
    lengths = {
        torch.float32: [1, 3, 20, 33, 129, 256, 2047, 2048, 2049, 5000],
        torch.bfloat16: [3, 20, 65, 252, 256, 1001, 2048, 2049, 5000],
        torch.float16: [12, 244, 4097, 9001],
    }[dtype]
    for n in lengths:
        mu, std = inputs(5, n, dtype=dtype, seed=n)
        plans.clear()
        backward = n in (3, 20, 244, 5000)
        compare(mu, std, KEY, term="log_prob", form="std", backward=backward)
        chunks = -(-n // (4096 if half else 2048))
        assert sum(p.kernel is triton_head.sums_kernel for p in plans) == (chunks > 1)


@each_dtype
def test_many_rows(monkeypatch: pytest.MonkeyPatch, on: Any, arch: int, dtype: torch.dtype) -> None:
    """Of which a thread has several vectors."""
    plans = on(arch)
    monkeypatch.setattr(triton_head, "_MANY", 2**12)
    for shape in ((1500, 3), (25, 256)):
        mu, std = inputs(*shape, dtype=dtype)
        compare(mu, std, KEY, term="log_prob", form="std", backward=shape[1] == 256)
    assert {p.constants["BLOCK"] for p in plans} == {2048}


def test_keys_samples_and_blocks(on: Any) -> None:
    """Each element has the noise of its place: in the slice of its key, in the whole of a block."""
    on(90)
    mu, scale = inputs(6, 5, 12)
    rows = reparam_fused.split(KEY, 6)
    for x, s, key, samples, whole, first in (
        (mu, scale, KEY, 3, None, None),
        (mu[..., :7], scale[..., :7], KEY, 3, None, None),
        (mu, scale, rows, None, None, None),
        (mu[..., :3], scale[..., :3], rows, None, None, None),
        (mu, scale, reparam_fused.split(KEY, 30).view(6, 5, 2), None, None, None),
        (mu, scale, rows[None], 2, None, None),  # numbered within the stream of a row
        (mu, scale, rows[:3], 3, None, None),  # a key for each sample
        (mu, scale, KEY, None, (9, 5, 12), (2, 0, 0)),
        (mu, scale, KEY, None, (9, 7, 13), (2, 1, 1)),
        (mu.flatten(), scale.flatten(), KEY, None, (999,), (257,)),
        (mu, scale, rows, 6, (9, 2**10, 2**9, 2**30), (2, 1, 1, 2**29 + 3)),
        (mu.half(), scale.half(), KEY, 3, None, None),
        (mu[..., :7].bfloat16(), scale[..., :7].bfloat16(), rows, None, None, None),
        (mu, scale[:1, :, :1], KEY, None, None, None),
        (mu[0, 0, 0], scale[0, 0, 0], KEY, None, None, None),
    ):
        for summed in (1, 2) if s is scale and samples else (min(1, x.dim()),):
            compare(
                x, s, key, term="log_prob", form="std", samples=samples, summed=summed,
                global_shape=whole, global_offset=first,
                backward=x.dim() > 0 and samples in (None, 3),
            )  # fmt: skip


def test_layouts_and_alignment(on: Any) -> None:
    """The sample is laid out as a sum would be; operands may begin anywhere."""
    plans = on(90)
    mu, scale = inputs(2, 8, 4, 4)
    last = mu.to(memory_format=torch.channels_last), scale.to(memory_format=torch.channels_last)
    for x, s in (last, (mu.transpose(0, 3), scale.transpose(0, 3)), (mu, last[1])):
        compare(x, s, KEY, term="tanh_log_prob", summed=3)
    mu, scale = inputs(2 * 2048 + 1)
    plans.clear()
    compare(mu[1:].view(2, -1), scale[1:].view(2, -1), KEY)
    assert all(p.constants["UNIT"] == 4 for p in plans)
    assert {a.data_ptr() % 16 for p in plans for a in p.arguments if isinstance(a, Tensor)} == {0}


def test_each_element_is_a_row(on: Any) -> None:
    plans = on(90)
    mu, scale = inputs(3, 701)
    compare(mu, scale, KEY, term="log_prob", summed=0, samples=2)
    compare(mu[..., None], scale[..., None], None)
    compare(*inputs(5000), KEY, summed=0)
    assert all(p.constants["EACH"] for p in plans)
    assert triton_head.sums_kernel not in [p.kernel for p in plans]


def test_nothing_to_add(on: Any) -> None:
    plans = on(90)
    for shape in ((0, 5), (5, 0), (0,)):
        compare(*inputs(*shape), KEY)
        compare(*inputs(*shape), None, summed=0)
    compare(*inputs(2, 3), KEY, term="log_prob", samples=0)
    assert plans == []


def test_sums(on: Any) -> None:
    """Of sums of sums, and of zeros without a sign."""
    plans = on(90)
    for rows, n in ((3, 2), (700, 20), (2, 2100), (1, 2048 * 2048 + 9)):
        terms, _ = inputs(rows, n, seed=n)
        total = torch.empty(rows)
        triton_head._add_up(terms, total)
        assert_same_bits(total, reference.sum_rows(terms, 4))
    assert len(plans) == 1 + 1 + 2 + 3
    for n in (2, 2048):
        total = torch.empty(3)
        triton_head._add_up(torch.full((3, n), -0.0), total)
        assert_same_bits(total, torch.zeros(3))


def test_interpreted_kernels_agree_with_the_reference() -> None:
    """float64, whose own functions of a GPU the interpreter of PTX does not follow."""
    script = Path(__file__).with_name("triton_head_interpreted.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=script.parent, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=patience(600), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "compared"


def launch_both(
    plans: list[Plan], *shape: int, dtype: torch.dtype, term: str, form: str = "log_var"
) -> list[Plan]:
    """The plans of a head and its backward, without those that add up chunks."""
    plans.clear()
    mu, scale = inputs(*shape, dtype=dtype)
    prior = (mu, scale) if term == "prior" else (None, None)
    rest = ("kl_divergence" if term == "prior" else term, 1, form, form)
    z, total = triton_kernels.head(mu, scale, KEY, *prior, *rest)
    triton_kernels.head_backward(mu, scale, KEY, *prior, z, total, *rest)
    return [p for p in plans if p.kernel is not triton_head.sums_kernel]


def test_kernels_compile_for_amd_and_in_float64(plans: list[Plan]) -> None:
    hip = GPUTarget("hip", "gfx942", 64)
    for dtype, shape, form in (
        (torch.bfloat16, (64, 300), "rho"),
        (torch.float64, (5, 3000), "log_var"),
    ):
        for plan in launch_both(plans, *shape, dtype=dtype, term="prior", form=form):
            assert compiled(plan, hip).asm["hsaco"]
            if dtype == torch.float64:
                assert compiled(plan, triton_run.NVIDIA[90]).asm["cubin"]


@pytest.mark.skipif(machine_code.nvdisasm() is None, reason="no nvdisasm")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_machine_code(plans: list[Plan], dtype: torch.dtype) -> None:
    """No spills, 16 bytes at a time, one exchange between threads, few instructions an element."""
    for shape, term, ceiling in (
        ((64, 4096), "tanh_log_prob", 130),
        ((4096, 256), "kl_divergence", 100),
    ):
        for plan in launch_both(plans, *shape, dtype=dtype, term=term):
            code = triton_code.code_of(compiled(plan, triton_run.NVIDIA[90]))
            opcodes = [i.opcode for i in code.instructions]
            elements = plan.constants["STRIDES"] * plan.constants["BLOCK"] // 128
            vectors = elements * dtype.itemsize // 16
            forward = plan.kernel is triton_head.head_kernel
            wide = [o[:3] for o in opcodes if o.startswith(("LDG", "STG")) and ".128" in o]
            assert wide.count("LDG") == (2 if forward else 3) * vectors
            assert wide.count("STG") == (1 if forward else 2) * vectors
            assert not [o for o in opcodes if o.startswith(("LDL", "STL"))]
            assert sum(o.startswith("BAR") for o in opcodes) == forward
            assert len(opcodes) / elements <= ceiling


def test_one_compilation_serves_rows_alike(plans: list[Plan]) -> None:
    found = set()
    for shape in ((6, 20), (1000, 32), (128, 24)):
        for plan in launch_both(plans, *shape, dtype=torch.float32, term="kl_divergence"):
            found.add(compiled(plan, triton_run.NVIDIA[90]).hash)
    assert len(found) == 2
