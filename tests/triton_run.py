"""The Triton kernels without a GPU: compiled offline from the plan of a launch, run by ptx/."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
from ptx import Kernel, Machine, Memory, Module, Stats
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from reparam_fused import reference, triton_kernels
from reparam_fused.triton_kernels import Plan

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint64: "*u64",
    torch.int64: "*i64",
}
NVIDIA = {arch: GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}


def _type(value: Any) -> Any:
    if value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(v) for v in value)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def _compile(
    kernel: Any, types: tuple[Any, ...], aligned: tuple[int, ...], constants: Any, target: GPUTarget
) -> CompiledKernel:
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False))
    constants = dict.fromkeys((n for n, t in signature.items() if t == "constexpr")) | dict(
        constants
    )
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": triton_kernels.WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def compile_plan(plan: Plan, target: GPUTarget) -> CompiledKernel:
    """As the launch of this plan would compile it on such a GPU."""
    types = tuple(
        parameter.annotation_type or _type(a)
        for parameter, a in zip(plan.kernel.params, plan.arguments, strict=False)
    )
    aligned = tuple(
        i for i, a in enumerate(plan.arguments) if isinstance(a, Tensor) and a.data_ptr() % 16 == 0
    )
    constants = {**plan.constants, "NEWTON": target.backend == "cuda"}
    return _compile(plan.kernel, types, aligned, tuple(constants.items()), target)


def _storage(tensor: Tensor) -> np.ndarray:
    """The bytes that a tensor's views share."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return flat.numpy()


@functools.cache
def _parse(ptx: str) -> Kernel:
    (kernel,) = Module.parse(ptx).kernels.values()
    return kernel


def run(
    arch: int,
    x: Tensor,
    scale: Tensor,
    key: Tensor | None,
    *,
    op: str,
    undefined: int | None = None,
    **options: Any,
) -> tuple[Tensor, Plan, Stats]:
    """An op of tensors of one dtype, as a GPU would compute it: every byte written once."""
    out = torch.empty_like(torch.add(x, scale))
    x, scale = x.expand(out.shape), scale.expand(out.shape)
    if op == "noise":
        x = scale = out
    plan = triton_kernels.plan(x, scale, key, out, op=op, **options)
    return out, plan, execute(arch, plan, {"out_ptr": out}, undefined)


def run_samples(
    arch: int,
    x: Tensor,
    scale: Tensor,
    key: Tensor,
    *,
    samples: int | None = None,
    undefined: int | None = None,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Plan, Stats]:
    """So many samples; or, without a number, the sums over those of x."""
    if samples is not None:
        out = reference.output_of_samples(torch.add(x, scale), samples)
        shape = out.shape[1:]
        plan = triton_kernels.samples_plan(
            x.expand(shape), scale.expand(shape), key, out, **options
        )
        return (out,), plan, execute(arch, plan, {"out_ptr": out}, undefined)
    by_x, out = (torch.empty_like(torch.add(x[0], scale)) for _ in range(2))
    plan = triton_kernels.samples_plan(x, scale.expand(out.shape), key, out, by_x, **options)
    stats = execute(arch, plan, {"out_ptr": out, "by_x_ptr": by_x}, undefined)
    return (by_x, out), plan, stats


def execute(arch: int, plan: Plan, results: dict[str, Tensor], undefined: int | None) -> Stats:
    kernel = _parse(compile_plan(plan, NVIDIA[arch]).asm["ptx"])
    named = {t.untyped_storage().data_ptr(): name for name, t in results.items()}
    written = list(results)
    if plan.constants["DRAWN"]:
        written.append(plan.kernel.arg_names[3])
    memory = Memory()
    buffers: dict[int, int] = {}
    values: list[int] = []
    for name, argument in zip(plan.kernel.arg_names, plan.arguments, strict=False):
        if isinstance(argument, Tensor):
            base = argument.untyped_storage().data_ptr()
            if base not in buffers:
                name = named.get(base, name)  # an operand that is not read may be a result
                # aligned as the storage is, which the plan has looked at
                buffers[base] = memory.allocate(
                    name, _storage(argument), writable=name in written, misalign=base % 16
                )
            values.append(buffers[base] + argument.storage_offset() * argument.element_size())
        elif argument is not None:
            values += argument if isinstance(argument, tuple) else [argument]
    # Triton adds two pointers to scratch memory, which these kernels do not use.
    values += [0] * (len(kernel.parameters) - len(values))
    params = [
        int(v).to_bytes(p.size, "little", signed=v < 0)
        for v, p in zip(values, kernel.parameters, strict=True)
    ]
    block = (32 * triton_kernels.WARPS, 1, 1)
    stats = Machine(kernel, memory, undefined=undefined).launch(
        (plan.programs, 1, 1), block, params
    )
    for name in written:
        memory.check_written_once(name)
    return stats
