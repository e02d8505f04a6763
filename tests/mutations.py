"""Break the code in one place at a time, and see the suite go red.

    python tests/mutations.py            all of them, half an hour on 2 cores
    python tests/mutations.py tail key   those whose name has one of these words

Works in a copy of the repository, built in place there; the exit status is the
number of survivors. README.md beside this file says what the list is for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation("philox multiplier", "csrc/common/philox.h", "0xD2511F53u", "0xD2511F55u"),
    Mutation("philox key step", "csrc/common/philox.h", "0xBB67AE85u", "0xBB67AE87u"),
    Mutation("philox rounds", "csrc/common/philox.h", "round < 10", "round < 9"),
    Mutation("philox word order", "csrc/common/philox.h", "c.w3, V::set(key1)), low0", "c.w3, V::set(key1)), low1"),
    Mutation("uniform half step", "csrc/common/normal.h", "V::set(0x1p-33f)", "V::set(0x1p-32f)"),
    Mutation("log coefficient, one ULP", "csrc/common/normal.h", "0x1.53846ep-2f", "0x1.538470p-2f"),
    Mutation("log threshold", "csrc/common/normal.h", "0x3f3504f3u", "0x3f3604f3u"),
    Mutation("sin coefficient, one ULP", "csrc/common/normal.h", "0x1.4668f0p+1f", "0x1.4668f2p+1f"),
    Mutation("cos coefficient, one ULP", "csrc/common/normal.h", "-0x1.55d24ap+0f", "-0x1.55d24cp+0f"),
    Mutation("cos and sin swapped", "csrc/common/normal.h", "n0 = V::mul(r, cos);", "n0 = V::mul(r, sin);"),
    Mutation("sign of the odd half turn", "csrc/common/normal.h", "return V::xor_(w, doubled);", "return w;"),
    Mutation("fp64 sin coefficient", "csrc/common/normal.h", "0x1.466bc6775aa7dp+1", "0x1.466bc7775aa7dp+1"),
    Mutation("exp coefficient, one ULP", "csrc/common/reparam.h", "0x1.3b20eep-7f", "0x1.3b20f0p-7f"),
    Mutation("exp low part", "csrc/common/reparam.h", "0x1.4ae0c0p-27f", "0x0p0f"),
    Mutation("exp clamp", "csrc/common/reparam.h", "V::clamp(log_var, 256.0f)", "V::clamp(log_var, 160.0f)"),
    Mutation("exp clamp drops NaN", "csrc/cpu/avx512.h", "_mm512_max_ps(set(-limit), x)", "_mm512_max_ps(x, set(-limit))"),
    Mutation("gradient's half", "csrc/common/reparam.h", "sigma<V>(log_var, 0.5f)", "sigma<V>(log_var)"),
    Mutation("lane order", "csrc/cpu/avx512.h", "0, 4, 8, 12, 1, 5, 9, 13, 2", "0, 4, 8, 12, 1, 5, 9, 14, 2"),
    Mutation("fp64 lane order", "csrc/cpu/avx512.h", "0, 4, 1, 5, 2, 6, 3, 7, 8, 12", "4, 0, 1, 5, 2, 6, 3, 7, 8, 12"),
    Mutation("bf16 lane order", "csrc/cpu/avx512.h", "0, 1, 8, 9, 2, 3", "0, 1, 9, 8, 2, 3"),
    Mutation("avx2 lane order", "csrc/cpu/avx2.h", "0, 2, 4, 6, 1, 3, 5, 7", "0, 2, 4, 6, 1, 3, 7, 5"),
    Mutation("counter carry", "csrc/cpu/avx512.h", "_mm512_cmplt_epu32_mask(low, order)", "__mmask16(0)"),
    Mutation("avx2 counter carry", "csrc/cpu/avx2.h", "(first >> 32) + 1", "(first >> 32)"),
    Mutation("second register's counters", "csrc/cpu/twice.h", "counters<T>(first + V::kLanes, low.b", "counters<T>(first, low.b"),
    Mutation("bf16 rounding", "csrc/cpu/avx512.h", "set(0x7fffu)", "set(0x8000u)"),
    Mutation("scalar half rounding", "csrc/common/scalar.h", "+ 0xfffu +", "+ 0x1000u +"),
    Mutation("tail length", "csrc/cpu/loop.h", "left < kNarrow - skipped ? left : kNarrow - skipped", "left < kNarrow ? left : kNarrow"),
    Mutation("tail index", "csrc/cpu/loop.h", "(index - skipped) / kPerCounter", "index / kPerCounter"),
    Mutation("tail scatter", "csrc/cpu/loop.h", "const T* from = out_tile_ + skipped;", "const T* from = out_tile_;"),
    Mutation("stride of a gathered operand", "csrc/cpu/loop.h", "*to++ = run[i * stride];", "*to++ = run[i];"),
    Mutation("slice restarts its index", "csrc/cpu/loop.h", "position - slice * p.slice_numel", "position"),
    Mutation("row step of the cursor", "csrc/cpu/loop.h", "step(d, -index_[d]);", ""),
    Mutation("merged dimensions", "csrc/call.h", "joined &= last.stride[k] == next.stride[k] * next.size", "joined &= true"),
    Mutation("key of another slice", "csrc/cpu/loop.h", "p.keys[2 * slice + 1], index", "p.keys[1], index"),
    Mutation("thread share", "csrc/cpu/reparam_cpu.cpp", "kernel(call.problem(), begin * kMaxTile,", "kernel(call.problem(), begin * (kMaxTile + 1),"),
    Mutation("saved key", "csrc/fast_path.cpp", "ctx->save_for_backward({log_var, key});", "ctx->save_for_backward({log_var, key.clone().zero_()});"),
    Mutation("saved key in Python", "reparam_fused/autograd.py", "ctx.save_for_backward(log_var, key)", "ctx.save_for_backward(log_var, torch.zeros_like(key))"),
    Mutation("mu kept", "csrc/fast_path.cpp", "ctx->save_for_backward({log_var, key});", "ctx->save_for_backward({log_var, key, mu});"),
    Mutation("grad_mu copied", "reparam_fused/autograd.py", "grad_mu = grad_z.sum_to_size(", "grad_mu = grad_z.clone().sum_to_size("),
    Mutation("second derivative's half", "reparam_fused/autograd.py", "log_var, key) * 0.5", "log_var, key) * 1.0"),
    Mutation("second derivative's half in C++", "csrc/fast_path.cpp", ".mul(0.5)", ".mul(1.0)"),
    Mutation("the key drawn twice the same", "csrc/fast_path.cpp", "data[0] = generator->random64();", "data[0] = 1;"),
    Mutation("generator ignored", "reparam_fused/random.py", "seed.random_(-(2**63), None, generator=generator)", "seed.random_(-(2**63), None)"),
    Mutation("forward-mode tangent dropped", "csrc/fast_path.cpp", "&& !t._fw_grad(/*level=*/0).defined()", ""),
    Mutation("no OpenMP", "setup.py", '["-fopenmp"]', "[]"),
    Mutation("GPU: last full block", "csrc/cuda/launch.cuh", "numel / (kPerThread * kBlock)", "numel / (kPerThread * kBlock) + 1"),
    Mutation("GPU: grid", "csrc/cuda/launch.cuh", "(threads + kBlock - 1) / kBlock", "threads / kBlock"),
    Mutation("GPU: unaligned pointers", "csrc/cuda/launch.cuh", "reinterpret_cast<uintptr_t>(p) % 16 == 0", "true"),
    Mutation("GPU: rows that vectors cannot take", "csrc/cuda/launch.cuh", "p.x_strides[d] % per_vector == 0 &&", ""),
    Mutation("GPU: slices that vectors cannot take", "csrc/cuda/launch.cuh", "slice_numel % per_vector == 0", "true"),
    Mutation("GPU: 32-bit indices too far", "csrc/cuda/launch.cuh", "numel <= INT32_MAX", "numel <= 4 * int64_t{INT32_MAX}"),
    Mutation("GPU: key of another slice", "csrc/cuda/kernels.cuh", "__ldg(keys + 2 * slice + 1)", "__ldg(keys + 1)"),
    Mutation("GPU: captured offset", "csrc/cuda/kernels.cuh", "+ state.offset) / 4", ") / 4"),
    Mutation("GPU: key not written", "csrc/cuda/kernels.cuh", "state.key_out[1] = key.offset;", ""),
    Mutation("GPU: division", "csrc/cuda/kernels.cuh", "/ d + 1);", "/ d);"),
    Mutation("GPU: counter of a vector", "csrc/cuda/kernels.cuh", "i * kBlock * kCountersPerVector<T>", "i * kBlock"),
    Mutation("GPU: half of a pair", "csrc/cuda/thread.h", "word & 0xffff0000u", "word"),
    Mutation("GPU: clamp drops NaN", "csrc/cuda/thread.h", "min.NaN.xorsign.abs", "min.xorsign.abs"),
    Mutation("GPU: root not corrected", "csrc/cuda/root.h", "return V::fma(remainder, V::mul(estimate, V::set(0.5f)), s);", "return s;"),
]  # fmt: skip


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # Without a toolkit in CUDA_HOME only the CPU part is built.
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "REPARAM_FUSED_REQUIRE_EXT": "1",
        "CUDA_HOME": str(copy),
    }
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "FAILED by a hang", "")


# Those that compile the CUDA sources themselves, and what takes long and is not about the code.
GPU_TESTS = {"test_cuda"}
LEFT_OUT = GPU_TESTS | {"test_install", "test_machine_code", "test_ptx", "test_mutate_ptx"}


def killed_by(copy: Path, gpu: bool) -> str:
    """The first test that fails, 'the build', or '' for a survivor."""
    if not gpu:
        build = run(copy, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        if build.returncode:
            return "the build"
    # The kernels' own tests go first: most mutations end there, within seconds.
    files = sorted(copy.glob("tests/test_*.py"), key=lambda f: (f.stem != "test_kernels", f.stem))
    tests = run(
        copy, sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
        "--deselect", "tests/test_kernels.py::test_more_than_2_to_31_elements",
        *(str(f) for f in files if (f.stem in GPU_TESTS if gpu else f.stem not in LEFT_OUT)),
    )  # fmt: skip
    failures = [line for line in tests.stdout.splitlines() if line.startswith("FAILED")]
    return failures[0].split(" ")[1] if failures else "an error" if tests.returncode else ""


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if killer := killed_by(copy, gpu=False):
            raise SystemExit(f"red before any mutation: {killer}")
        for mutation in chosen:
            target = copy / mutation.file
            original = target.read_text()
            if original.count(mutation.old) < 1:
                raise SystemExit(f"{mutation.name}: '{mutation.old}' is not in {mutation.file}")
            target.write_text(original.replace(mutation.old, mutation.new, 1))
            killer = killed_by(copy, gpu=mutation.file.startswith("csrc/cuda/"))
            survivors += not killer
            print(f"{mutation.name:40} {killer or 'SURVIVED'}", flush=True)
            target.write_text(original)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
