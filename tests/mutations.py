"""Break the code in one place at a time, and see the suite go red.

    python tests/mutations.py            all of them, two hours on 2 cores
    python tests/mutations.py tail key   those whose name has one of these words
    python tests/mutations.py GPU        those that the stand-in GPU has to find

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
    test: str = "test_kernels"  # goes first
    on: str = ""  # "cuda" or "triton": on the stand-in GPU, by these kernels


MUTATIONS = [
    Mutation("philox multiplier", "csrc/common/philox.h", "0xD2511F53u", "0xD2511F55u"),
    Mutation("philox key step", "csrc/common/philox.h", "0xBB67AE85u", "0xBB67AE87u"),
    Mutation("philox rounds", "csrc/common/philox.h", "round < 10", "round < 9"),
    Mutation("philox word order", "csrc/common/philox.h", "c.w3, seed.key1()), low0", "c.w3, seed.key1()), low1"),
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
    Mutation("tail index", "csrc/cpu/loop.h", "static_cast<uint64_t>(index / kPerCounter)", "static_cast<uint64_t>((index + kPerCounter - 1) / kPerCounter)"),
    Mutation("tail scatter", "csrc/cpu/loop.h", "return skipped + element;", "return element;"),
    Mutation("stride of a gathered operand", "csrc/cpu/loop.h", "= run[i * stride];", "= run[i];"),
    Mutation("slice restarts its index", "csrc/cpu/loop.h", "    advance(position % p.segment_numel);\n", ""),
    Mutation("row step of the cursor", "csrc/cpu/loop.h", "step(d, -index_[d]);", ""),
    Mutation("merged dimensions", "csrc/call.h", "joined = merged.back().stride[k] == next.stride[k] * next.size;", "joined = true;"),
    Mutation("key of another slice", "csrc/cpu/loop.h", "key_ += n * p_.key_strides[d];", ""),
    Mutation("short rows: place in the tile", "csrc/cpu/loop.h", "lane * kPerCounter + skipped + i", "lane * kPerCounter + i"),
    Mutation("short rows: counter", "csrc/cpu/loop.h", "key[1] + index / kPerCounter", "key[1]"),
    Mutation("short rows: seed of the row before", "csrc/cpu/loop.h", "seeds_[lane] = key[0];", "seeds_[lane] = lane > 0 ? seeds_[lane - 1] : key[0];"),
    Mutation("short rows: end of a row", "csrc/cpu/loop.h", "if (taken > segments.left())", "if (false)"),
    Mutation("short rows: end of a thread's share", "csrc/cpu/loop.h", "if (taken > most - count)", "if (false)"),
    Mutation("short rows: merged operands", "csrc/cpu/loop.h", "joined = merged[k][last] == strides[k][d] * p.sizes[d];", "joined = true;"),
    Mutation("short rows: key step", "csrc/common/philox.h", "V::add(word1, V::set(kPhiloxW1))", "V::add(word1, V::set(kPhiloxW0))"),
    Mutation("short rows: halves of words", "csrc/cpu/avx512.h", "or_(even, set(1u))", "even"),
    Mutation("short rows: avx2 halves of words", "csrc/cpu/avx2.h", "_mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);\n    const U order", "_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);\n    const U order"),
    Mutation("thread share", "csrc/cpu/reparam_cpu.cpp", "kernel(call.problem(), begin * kMaxTile,", "kernel(call.problem(), begin * (kMaxTile + 1),"),
    Mutation("saved key", "csrc/fast_path.cpp", "variable_list{key, scale}", "variable_list{key.clone().zero_(), scale}"),
    Mutation("saved key in Python", "reparam_fused/autograd.py", "ctx.save_for_backward(*((key, scale) if", "ctx.save_for_backward(*((torch.zeros_like(key), scale) if"),
    Mutation("mu kept", "csrc/fast_path.cpp", "variable_list{key, scale}", "variable_list{key, scale, mu}"),
    Mutation("grad_mu copied", "reparam_fused/autograd.py", "grad_mu = grad_z.sum_to_size(", "grad_mu = grad_z.clone().sum_to_size("),
    Mutation("a gradient filled for the key", "reparam_fused/autograd.py", "returns.\n        ctx.set_materialize_grads(False)", "returns.", "test_autograd"),
    Mutation("a gradient filled for none in C++", "csrc/fast_path.cpp", "    ctx->set_materialize_grads(false);\n    if (scale", "    if (scale", "test_autograd"),
    Mutation("second derivative's half", "reparam_fused/autograd.py", 'grad * grad_z, scale, key, *ctx.options) * 0.5', 'grad * grad_z, scale, key, *ctx.options) * 1.0'),
    Mutation("second derivative's half in C++", "csrc/fast_path.cpp", ".mul(0.5)", ".mul(1.0)"),
    Mutation("the key drawn twice the same", "csrc/fast_path.cpp", "data[0] = generator->random64();", "data[0] = 1;"),
    Mutation("generator ignored", "csrc/fast_path.cpp", "data[0] = generator->random64();", "data[0] = at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>()->random64();"),
    Mutation("forward-mode tangent dropped", "csrc/fast_path.cpp", "&& !t._fw_grad(/*level=*/0).defined()", ""),
    Mutation("no OpenMP", "setup.py", '["-fopenmp"]', "[]"),
    Mutation("GPU: last full block", "csrc/cuda/launch.cuh", "0 : vectors / kVectors;", "0 : vectors / kVectors + 1;", "test_cuda", "cuda"),
    Mutation("GPU: what is left of a vector", "csrc/cuda/launch.cuh", "(numel % kPerVector<T> + kPerCounter<T> - 1)", "(numel % kPerVector<T>)", "test_cuda", "cuda"),
    Mutation("GPU: the vectors after full blocks", "csrc/cuda/kernels.cuh", "full_blocks * kVectors +", "full_blocks * kBlock +", "test_cuda", "cuda"),
    Mutation("GPU: grid", "csrc/cuda/launch.cuh", "(threads + kBlock - 1) / kBlock", "threads / kBlock", "test_cuda", "cuda"),
    Mutation("GPU: unaligned pointers", "csrc/cuda/launch.cuh", "reinterpret_cast<uintptr_t>(p) % 16 == 0", "true", "test_cuda", "cuda"),
    Mutation("GPU: rows that vectors cannot take", "csrc/cuda/launch.cuh", "p.x_strides[d] % per_vector == 0 &&", "", "test_cuda", "cuda"),
    Mutation("GPU: slices that vectors cannot take", "csrc/cuda/launch.cuh", "p.index_strides[d] % per_counter == 0;", "true;", "test_cuda", "cuda"),
    Mutation("GPU: 32-bit indices too far", "csrc/cuda/launch.cuh", "numel <= INT32_MAX", "numel <= 4 * int64_t{INT32_MAX}", "test_cuda", "cuda"),
    Mutation("GPU: key of another slice", "csrc/cuda/kernels.cuh", "__ldg(keys + at + 1)", "__ldg(keys + 1)", "test_cuda", "cuda"),
    Mutation("GPU: captured offset", "csrc/cuda/kernels.cuh", "key.offset += static_cast<uint64_t>(*state.captured_offset);", "", "test_cuda", "cuda"),
    Mutation("GPU: a generator's own domain", "csrc/cuda/kernels.cuh", " + (uint64_t{1} << 63)", "", "test_cuda", "cuda"),
    Mutation("GPU: key not written", "csrc/cuda/kernels.cuh", "state.key_out[1] = key.offset;", "", "test_cuda", "cuda"),
    Mutation("GPU: division", "csrc/cuda/kernels.cuh", "/ d + 1);", "/ d);", "test_cuda", "cuda"),
    Mutation("GPU: counter of a vector", "csrc/cuda/kernels.cuh", "i * kBlock * kCountersPerVector<T>", "i * kBlock", "test_cuda", "cuda"),
    Mutation("GPU: half of a pair", "csrc/cuda/thread.h", "word & 0xffff0000u", "word", "test_cuda", "cuda"),
    Mutation("GPU: clamp drops NaN", "csrc/cuda/thread.h", "min.NaN.xorsign.abs", "min.xorsign.abs", "test_cuda", "cuda"),
    Mutation("GPU: root not corrected", "csrc/cuda/root.h", "return V::fma(remainder, V::mul(estimate, V::set(0.5f)), s);", "return s;", "test_cuda", "cuda"),
    Mutation("std taken for log_var", "csrc/cpu/loop.h", "if (form != 0)", "if (false)", "test_std"),
    Mutation("a block's first index", "csrc/cpu/loop.h", "index_(p.first_index)", "index_(0)", "test_blocks"),
    Mutation("a block's rows", "csrc/cpu/loop.h", "index_ += n * p_.index_strides[d];", "", "test_blocks"),
    Mutation("gradient of std", "csrc/fast_path.cpp", "is_std ? std::nullopt : std::optional(saved[1])", "saved.back()", "test_std"),
    Mutation("vmap of a block", "reparam_fused/autograd.py", "(info.batch_size, *global_shape), (0, *global_offset)", "(info.batch_size, *global_shape), (1, *global_offset)", "test_blocks"),
    Mutation("vmap: noise batched though the key is not", "reparam_fused/autograd.py", "key = key.expand(info.batch_size, *key.shape[1:])", "pass", "test_transforms"),
    Mutation("jvp drops the scale", "reparam_fused/autograd.py", "tangent = total(mu_t, by_scale)", "tangent = mu_t", "test_transforms"),
    Mutation("a seed in the graph", "reparam_fused/_draw.py", "return torch.randint(0, 2**32, (2,), device=device, generator=generator)", "return torch.tensor([1, 2], device=device)", "test_compile"),
    Mutation("drawn again for a memory budget", "reparam_fused/_partitioner.py", "meta[\"recompute\"] = CheckpointPolicy.PREFER_RECOMPUTE", "meta[\"recompute\"] = CheckpointPolicy.MUST_SAVE", "test_compile"),
    Mutation("one tensor twice in a graph", "reparam_fused/functional.py", "if compiling and scale is mu:", "if False:", "test_compile"),
    Mutation("autocast ignored", "reparam_fused/functional.py", "else log_var.float()", "else log_var", "test_autocast"),
    Mutation("a shard's place", "reparam_fused/_dtensor.py", "global_offset = (*[0] * batch, *offset[batch:])", "global_offset = [0] * len(shape)", "test_dtensor"),
    Mutation("a shard's keys", "reparam_fused/_dtensor.py", "if key.size(dim) > 1:", "if False:", "test_dtensor"),
    Mutation("gradient of what broadcasts over ranks", "reparam_fused/_dtensor.py", "Partial() if broadcast", "Replicate() if broadcast", "test_dtensor"),
    Mutation("a key for each rank", "reparam_fused/_dtensor.py", "    for dim in range(mesh.ndim):\n", "    for dim in range(0):\n", "test_dtensor"),
    Mutation("shards gathered", "reparam_fused/_dtensor.py", "placements[i] = Shard(dim + added)", "pass", "test_dtensor"),
    Mutation("a patch undone by the first", "reparam_fused/_patch.py", "if replacement.patches > 0:", "if False:", "test_patch"),
    Mutation("a patch over somebody's wrapper", "reparam_fused/_patch.py", "if vars(owner).get(name) is not method:", "if False:", "test_patch"),
    Mutation("a patch in force after its end", "reparam_fused/_patch.py", "if \"normal\" not in _replacements:", "if False:", "test_patch"),
    Mutation("Triton: lanes before a block", "reparam_fused/triton_kernels.py", "(position >= 0) & ", "", "test_triton"),
    Mutation("Triton: a block's first counter", "reparam_fused/triton_kernels.py", "(first // per_counter + first_counter)", "(first // per_counter)", "test_triton"),
    Mutation("Triton: std taken for log_var", "reparam_fused/triton_kernels.py", "\"LOG_VAR\": form == \"log_var\"", "\"LOG_VAR\": True", "test_triton"),
    Mutation("GPU: a block's first index", "csrc/cuda/launch.cuh", "layout.first_index = p.first_index / index_unit;", "layout.first_index = 0;", "test_cuda", "cuda"),
    Mutation("GPU: a block's first counter", "csrc/cuda/kernels.cuh", "return {keys, counter};", "return {keys, 0};", "test_cuda", "cuda"),
    Mutation("GPU: counters cut at both ends", "csrc/cuda/launch.cuh", "? 0 : kPerCounter<T> - 1;", "? 0 : 0;", "test_cuda", "cuda"),
    Mutation("GPU: lanes before a block", "csrc/cuda/kernels.cuh", "in_segment == 0 ? skipped : 0", "0", "test_cuda", "cuda"),
    Mutation("GPU: std taken for log_var", "csrc/cuda/launch.cuh", "if (form != 0)", "if (form == 0)", "test_cuda", "cuda"),
    Mutation("divergence: coefficient, one ULP", "csrc/common/kl_divergence.h", "0x1.110c5ep-7f", "0x1.110c60p-7f", "test_kl_divergence"),
    Mutation("divergence: low part of ln 2", "csrc/common/kl_divergence.h", "V::set(-0x1.05c610p-29f)", "V::set(0.0f)", "test_kl_divergence"),
    Mutation("divergence: fp64 coefficient", "csrc/common/kl_divergence.h", "0x1.a01a01a01a219p-13", "0x1.a01a01b01a219p-13", "test_kl_divergence"),
    Mutation("divergence: clamp", "csrc/common/kl_divergence.h", "V::clamp(x, 90.0f)", "V::clamp(x, 89.0f)", "test_kl_divergence"),
    Mutation("divergence: infinity less infinity", "csrc/common/kl_divergence.h", "magnitude<V>(sum)", "sum", "test_kl_divergence"),
    Mutation("divergence: operands swapped", "csrc/cpu/loop.h", "apply<V, R>(x[j], scale[j], eps[j])", "apply<V, R>(scale[j], x[j], eps[j])", "test_kl_divergence"),
    Mutation("divergence: second derivative", "reparam_fused/kl_divergence.py", "return by_log_var + 0.5 * grad", "return by_log_var", "test_kl_divergence"),
    Mutation("divergence: second derivative in C++", "csrc/fast_path.cpp", ".add(product, 0.5)", "", "test_kl_divergence"),
    Mutation("divergence: mu kept", "csrc/fast_path.cpp", "mu.requires_grad() ? mu : Tensor()", "mu", "test_kl_divergence"),
    Mutation("divergence: jvp drops mu", "reparam_fused/kl_divergence.py", "by_mu = mu * mu_t", "pass", "test_kl_divergence"),
    Mutation("divergence: vmap of fewer dimensions", "reparam_fused/autograd.py", "*[1] * (rank - t.dim() + 1), ", "", "test_kl_divergence"),
    Mutation("divergence: autocast ignored", "reparam_fused/kl_divergence.py", "log_var = functional.autocast_exp(mu, log_var)", "pass", "test_kl_divergence"),
    Mutation("divergence: shards not aligned", "reparam_fused/_dtensor.py", "local = call(*(_local(t, whole.shape, placements) for t in (mu, log_var)))", "local = call(mu.to_local(), log_var.to_local())", "test_dtensor"),
    Mutation("divergence: patched from another", "reparam_fused/_patch.py", "and other is None", "", "test_patch"),
    Mutation("GPU: divergence", "csrc/cuda/kl_divergence_backward.cu", "launch<KlDivergenceBackward>", "launch<KlDivergence>", "test_cuda", "cuda"),
    Mutation("Triton: a generator's own domain", "reparam_fused/triton_kernels.py", " ^ _DOMAIN", "", "test_triton"),
    Mutation("Triton: captured offset", "reparam_fused/triton_kernels.py", "offset += tl.load(offset_ptr)", "pass", "test_triton"),
    Mutation("a failed draw", "reparam_fused/_draw.py", "generator.set_offset(before)", "pass", "test_triton"),
    Mutation("Triton: divergence", "reparam_fused/triton_kernels.py", "tl.abs(sum) * 4.0", "sum * 4.0", "test_triton"),
    # The binding, the launchers and call.h, on the stand-in GPU
    Mutation("GPU: device of sample_from_key", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(mu.device());\n  check_binary(mu.device());\n  const Launch launch(mu, scale, key", "  check_binary(mu.device());\n  const Launch launch(mu, scale, key", "test_gpu", "cuda"),
    Mutation("GPU: device of sample_backward", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(grad_z.device());\n", "", "test_gpu", "cuda"),
    Mutation("GPU: device of noise", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(key.device());\n", "", "test_gpu", "cuda"),
    Mutation("GPU: device of kl_divergence", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(mu.device());\n  check_binary(mu.device());\n  return Launch(mu, log_var", "  check_binary(mu.device());\n  return Launch(mu, log_var", "test_gpu", "cuda"),
    Mutation("GPU: device of kl_divergence_backward", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(grad.device());\n", "", "test_gpu", "cuda"),
    Mutation("GPU: device of sample", "csrc/cuda/reparam_cuda.cpp", "  const c10::cuda::CUDAGuard guard(mu.device());\n  check_binary(mu.device());\n  const Launch launch(mu, scale, std::nullopt", "  check_binary(mu.device());\n  const Launch launch(mu, scale, std::nullopt", "test_gpu", "cuda"),
    Mutation("GPU: wrong stream", "csrc/cuda/reparam_cuda.cpp", "c10::cuda::getCurrentCUDAStream()", "c10::cuda::getDefaultCUDAStream()", "test_gpu", "cuda"),
    Mutation("GPU: a synchronisation", "csrc/cuda/reparam_cuda.cpp", "    if (dense_.has_value()) call_", "    C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));\n    if (dense_.has_value()) call_", "test_gpu", "cuda"),
    Mutation("GPU: offset not advanced", "csrc/cuda/reparam_cuda.cpp", "philox_cuda_state(increment_)", "philox_cuda_state(0)", "test_gpu", "cuda"),
    Mutation("GPU: offset advanced by elements", "csrc/cuda/reparam_cuda.cpp", "((call.out().numel() + per_block - 1) / per_block)", "(call.out().numel())", "test_gpu", "cuda"),
    Mutation("GPU: blocks of float64 as of float32", "csrc/cuda/reparam_cuda.cpp", "call.dtype() == kDouble ? 2 : 4", "4", "test_gpu", "cuda"),
    Mutation("GPU: blocks of mu, not of the output", "csrc/cuda/reparam_cuda.cpp", "(call.out().numel() + per_block - 1)", "(static_cast<int64_t>(call.x().storage().nbytes() / call.x().element_size()) + per_block - 1)", "test_gpu", "cuda"),
    Mutation("GPU: the key filled on another stream", "csrc/cuda/reparam_cuda.cpp", "const at::Tensor key = at::empty({2}, options);", "at::Tensor key = at::empty({2}, options);\n  {\n    const c10::cuda::CUDAStreamGuard other(c10::cuda::getDefaultCUDAStream());\n    key.zero_();\n  }", "test_gpu", "cuda"),
    Mutation("GPU: launch not checked", "csrc/cuda/reparam_cuda.cpp", "C10_CUDA_CHECK(enqueue(call.dtype(), call.problem(), c10::cuda::getCurrentCUDAStream()));", "(void)enqueue(call.dtype(), call.problem(), c10::cuda::getCurrentCUDAStream());", "test_gpu", "cuda"),
    Mutation("GPU: empty tensors launched", "csrc/cuda/reparam_cuda.cpp", "    if (call_.empty()) return call_.out();\n", "", "test_gpu", "cuda"),
    Mutation("GPU: a failed draw not taken back", "csrc/cuda/reparam_cuda.cpp", "    draw.undo();\n", "", "test_gpu", "cuda"),
    Mutation("GPU: drawn before the key is allocated", "csrc/cuda/reparam_cuda.cpp", "  const Launch launch(mu, scale, std::nullopt, {form});", "  (void)at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator(mu.device().index()))->philox_cuda_state(4);\n  const Launch launch(mu, scale, std::nullopt, {form});", "test_gpu", "cuda"),
    Mutation("GPU: every error blamed on the binary", "csrc/cuda/reparam_cuda.cpp", "status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction", "status == cudaSuccess", "test_gpu", "cuda"),
    Mutation("GPU: binary not asked for", "csrc/cuda/reparam_cuda.cpp", "  const cudaError_t status = has_cuda_binary();", "  const cudaError_t status = cudaSuccess;", "test_gpu", "cuda"),
    Mutation("GPU: error of the binary left behind", "csrc/cuda/reparam_cuda.cpp", "  (void)cudaGetLastError();  // or the next call of torch would report it\n", "", "test_gpu", "cuda"),
    Mutation("GPU: no lock of the generator", "csrc/cuda/reparam_cuda.cpp", "    const std::lock_guard<std::mutex> lock(generator_->mutex_);\n    const at::PhiloxCudaState", "    const at::PhiloxCudaState", "test_gpu", "cuda"),
    Mutation("GPU: generator of the first device", "csrc/cuda/reparam_cuda.cpp", "getDefaultCUDAGenerator(mu.device().index())", "getDefaultCUDAGenerator(0)", "test_gpu", "cuda"),
    Mutation("GPU: generator ignored", "csrc/cuda/reparam_cuda.cpp", "                      generator, at::cuda", "                      std::nullopt, at::cuda", "test_gpu", "cuda"),
    Mutation("GPU: a graph's own offset ignored", "csrc/cuda/reparam_cuda.cpp", "GeneratorState{0, state.offset_intragraph_,", "GeneratorState{0, 0,", "test_gpu", "cuda"),
    Mutation("GPU: captured state read at capture", "csrc/cuda/kernels.cuh", "if (state.captured_seed != nullptr) {", "if (false) {", "test_gpu", "cuda"),
    Mutation("GPU: copy of many dimensions dropped", "csrc/cuda/reparam_cuda.cpp", "    if (dense_.has_value()) call_.out().copy_(dense_->out());\n", "", "test_gpu", "cuda"),
    Mutation("GPU: too many dimensions not refused", "csrc/cuda/reparam_cuda.cpp", "call.empty() || call.problem().ndim <= kMaxDims,", "true,", "test_gpu", "cuda"),
    Mutation("GPU: device of the scale unchecked", "csrc/call.h", "TORCH_CHECK(x.device() == scale.device(),", "TORCH_CHECK(true,", "test_gpu", "cuda"),
    Mutation("GPU: device of the key unchecked", "csrc/call.h", "key.device() == out.device() && ", "", "test_gpu", "cuda"),
    Mutation("GPU: words of a key apart", "csrc/call.h", "key->stride(-1) == 1 ? *key : key->contiguous()", "*key", "test_gpu", "cuda"),
    Mutation("GPU: merged dimensions", "csrc/call.h", "joined = merged.back().stride[k] == next.stride[k] * next.size;", "joined = true;", "test_gpu", "cuda"),
    Mutation("GPU: ones at the end of a batch", "csrc/call.h", "  while (dims > 0 && key.size(dims - 1) == 1) --dims;\n", "", "test_gpu", "cuda"),
    Mutation("GPU: stride of a key", "csrc/call.h", "dims[d].stride[kKey] = keys_.stride(d);", "dims[d].stride[kKey] = 2;", "test_gpu", "cuda"),
    Mutation("GPU: noise of slices numbered on", "csrc/call.h", "      if (d < batch) continue;\n", "", "test_gpu", "cuda"),
    Mutation("GPU: a block begins at 0", "csrc/call.h", "      first += offset * stride;\n", "", "test_gpu", "cuda"),
    Mutation("GPU: strides of the output", "csrc/call.h", "x.sizes() == scale.sizes() && in_row_major_order(x) && in_row_major_order(scale)", "x.sizes() == scale.sizes()", "test_gpu", "cuda"),
    Mutation("GPU: grads of FusedDraw materialised", "reparam_fused/autograd.py", "        ctx.set_materialize_grads(False)\n        _, scale, key", "        _, scale, key", "test_gpu", "cuda"),
    Mutation("GPU: noise of two filled operands", "reparam_fused/random.py", "return _ops.noise(key, size, dtype, global_shape, global_offset)", "zero = torch.full((), -0.0, dtype=dtype, device=key.device).expand(size)\n    return _ops.sample_from_key(zero, torch.ones_like(zero), key, 'std', global_shape, global_offset)", "test_gpu", "cuda"),
    Mutation("GPU: sample of the extension under Triton", "reparam_fused/_ops.py", 'library.impl("sample", _triton_sample, "CUDA")', "pass", "test_gpu", "triton"),
    Mutation("GPU: Triton's device", "reparam_fused/triton_kernels.py", "nullcontext() if on_cpu else torch.get_device_module(device).device(device)", "nullcontext()", "test_gpu", "triton"),
    Mutation("GPU: Triton's operands of two devices", "reparam_fused/triton_kernels.py", "    if x.device != scale.device:\n", "    if False:\n", "test_gpu", "triton"),
    Mutation("GPU: Triton's key of another device", "reparam_fused/triton_kernels.py", " or key.device != x.device", "", "test_gpu", "triton"),
    Mutation("GPU: Triton's draw moves nothing", "reparam_fused/_draw.py", "generator.philox_state(4 * blocks)", "generator.philox_state(0)", "test_gpu", "triton"),
    Mutation("GPU: Triton's failed draw not taken back", "reparam_fused/_draw.py", "            generator.set_offset(before)\n        raise", "            pass\n        raise", "test_gpu", "triton"),
]  # fmt: skip


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "REPARAM_FUSED_REQUIRE_EXT": "1",
        "TORCH_CUDA_ARCH_LIST": "12.0+PTX",  # what the stand-in runs
    }
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "FAILED by a hang", "")


# What takes long and is not about the code.
LEFT_OUT = {"test_install", "test_machine_code", "test_ptx", "test_mutate_ptx"}
BUILD = ("setup.py", "-q", "build_ext", "--inplace")


def killed_by(copy: Path, mutation: Mutation) -> str:
    """The first test that fails, 'the build', or '' for a survivor."""
    if (
        mutation.file.startswith(("csrc", "setup.py"))
        and run(copy, sys.executable, *BUILD).returncode
    ):
        return "the build"
    # Most mutations end in the first file, within seconds.
    files = sorted(copy.glob("tests/test_*.py"), key=lambda f: (f.stem != mutation.test, f.stem))
    stand_in = ["tests/gpu/run.py", *(["--triton"] if mutation.on == "triton" else [])]
    tests = run(
        copy, sys.executable, *(stand_in if mutation.on else []), "-m", "pytest",
        "-x", "-q", "--no-header", "-p", "no:cacheprovider",
        "--deselect", "tests/test_kernels.py::test_more_than_2_to_31_elements",
        *(str(f) for f in files if f.stem not in LEFT_OUT),
    )  # fmt: skip
    failures = [x for x in tests.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return failures[0].split(" ")[1] if failures else "an error" if tests.returncode else ""


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if run(copy, sys.executable, *BUILD).returncode:
            raise SystemExit("the unchanged code does not build")
        for on in sorted({mutation.on for mutation in chosen}):
            nothing = Mutation("nothing", "", "", "", "test_gpu" if on else "test_kernels", on)
            if killer := killed_by(copy, nothing):
                raise SystemExit(f"red before any mutation: {killer}")
        for mutation in chosen:
            target = copy / mutation.file
            original = target.read_text()
            if original.count(mutation.old) < 1:
                raise SystemExit(f"{mutation.name}: '{mutation.old}' is not in {mutation.file}")
            target.write_text(original.replace(mutation.old, mutation.new, 1))
            killer = killed_by(copy, mutation)
            survivors += not killer
            print(f"{mutation.name:40} {killer or 'SURVIVED'}", flush=True)
            target.write_text(original)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
