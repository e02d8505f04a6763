"""What ptxas makes of the Triton kernels, beside csrc/cuda and beside tl.randn used naively.

python tests/triton_code.py        for sm_90
python tests/triton_code.py 100    for another
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import machine_code
import torch
import triton
import triton.language as tl
from helpers import NOISY_OPS, OPS
from machine_code import Code, Instruction
from triton.compiler import ASTSource, CompiledKernel
from triton_run import NVIDIA, POINTERS, compile_plan

from reparam_fused import triton_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def naive_kernel(mu_ptr, log_var_ptr, z_ptr, seed, n, BLOCK: tl.constexpr):
    """The line as one would write it in Triton."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    mu = tl.load(mu_ptr + i, mask=mask).to(tl.float32)
    log_var = tl.load(log_var_ptr + i, mask=mask).to(tl.float32)
    z = mu + tl.exp(0.5 * log_var) * tl.randn(seed, i)
    tl.store(z_ptr + i, z.to(z_ptr.dtype.element_ty), mask=mask)


def code_of(kernel: CompiledKernel) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((_, text),) = machine_code.functions(machine_code.disassemble(Path(file.name)))
    return machine_code.parse_code(text)


def whole(arch: int, dtype: torch.dtype, op: str) -> Code:
    x = torch.empty(1 << 16, dtype=dtype)
    key = torch.zeros(2, dtype=torch.uint64) if op in NOISY_OPS else None
    plan = triton_kernels.plan(x, x.clone(), key, x.clone(), op=op)
    return code_of(compile_plan(plan, NVIDIA[arch]))


def samples(arch: int, dtype: torch.dtype, backward: bool) -> Code:
    """Of contiguous tensors, their sum if backward."""
    x, z = torch.empty(1 << 16, dtype=dtype), torch.empty(4, 1 << 16, dtype=dtype)
    key = torch.zeros(2, dtype=torch.uint64)
    plan = (
        triton_kernels.samples_plan(z, x, key, x.clone(), x.clone())
        if backward
        else triton_kernels.samples_plan(x, x.clone(), key, z)
    )
    return code_of(compile_plan(plan, NVIDIA[arch]))


def loops(code: Code) -> list[list[Instruction]]:
    """What is within a branch back and where it goes, but for the empty one at the end."""
    found = []
    for i, instruction in enumerate(code.instructions):
        first = code.labels.get(instruction.target or "", i)
        if first < i:
            found.append(code.instructions[first : i + 1])
    return found


def naive(arch: int, dtype: torch.dtype) -> float:
    """Instructions an element, the best case of its block size: one loop, nothing shared."""
    block = 2048
    pointer = POINTERS[dtype]
    signature = dict.fromkeys(["mu_ptr", "log_var_ptr", "z_ptr"], pointer)
    signature |= {"seed": "i32", "n": "i32", "BLOCK": "constexpr"}
    divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 4)}
    source = ASTSource(naive_kernel, signature, {"BLOCK": block}, divisible)
    kernel = triton.compile(source, target=NVIDIA[arch], options={"num_warps": 4})
    return len(code_of(kernel).instructions) / (block // 128)


def main() -> None:
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    built = {
        (k.name.op, k.name.dtype): k.code.slots_per_element(k.name.dtype)
        for k in machine_code.all_kernels((arch,))[arch]
        if (k.name.form, k.name.bounded) == ("whole", False)
        and k.name.scale in ("log_var", "none")
        and k.name.source != "generator"
    }
    print(f"instructions an element on sm_{arch}")
    print(f"{'op':24}{'dtype':10}{'csrc/cuda':>10}{'triton':>10}{'tl.randn':>10}")
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for op in OPS:
            ours = whole(arch, dtype, op).slots_per_element(name)
            rival = f"{naive(arch, dtype):.1f}" if op == "sample" else ""
            print(f"{op:24}{name:10}{built[op, name]:10.1f}{ours:10.1f}{rival:>10}")


if __name__ == "__main__":
    main()
