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
    # The kernels of the CPU, and what they share with those of a GPU
    Mutation("philox multiplier", "csrc/common/philox.h", "0xD2511F53u", "0xD2511F55u"),
    Mutation("philox key step", "csrc/common/philox.h", "0xBB67AE85u", "0xBB67AE87u"),
    Mutation("philox rounds", "csrc/common/philox.h", "round < 10", "round < 9"),
    Mutation("philox word order", "csrc/common/philox.h", "c.w3, seed.key1()), low0", "c.w3, seed.key1()), low1"),
    Mutation("uniform half step", "csrc/common/normal.h", "V::set(0x1p-33f)", "V::set(0x1p-32f)"),
    Mutation("log coefficient, one ULP", "csrc/common/normal.h", "0x1.53846ep-2f", "0x1.538470p-2f"),
    Mutation("log threshold", "csrc/common/normal.h", "0x3f3504f3u", "0x3f3604f3u"),
    Mutation("sin coefficient, one ULP", "csrc/common/normal.h", "0x1.4668f0p+1f", "0x1.4668f2p+1f"),
    Mutation("cos coefficient, one ULP", "csrc/common/normal.h", "-0x1.55d24ap+0f", "-0x1.55d24cp+0f"),
    Mutation("cos and sin swapped", "csrc/common/normal.h", "half_turn<V>(w1, cos, sin);", "half_turn<V>(w1, sin, cos);"),
    Mutation("sign of the odd half turn", "csrc/common/normal.h", "return V::xor_(w, doubled);", "return w;"),
    Mutation("fp64 sin coefficient", "csrc/common/normal.h", "0x1.466bc6775aa7dp+1", "0x1.466bc7775aa7dp+1"),
    Mutation("exp coefficient, one ULP", "csrc/common/sigma.h", "0x1.3b20eep-7f", "0x1.3b20f0p-7f"),
    Mutation("exp low part", "csrc/common/sigma.h", "0x1.4ae0c0p-27f", "0x0p0f"),
    Mutation("exp clamp", "csrc/common/sigma.h", "V::clamp(log_var, 256.0f / unit)", "V::clamp(log_var, 160.0f / unit)"),
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
    Mutation("tail length", "csrc/cpu/rows.h", "count - kTile ? count - kTile : tile", "count - kTile ? 0 : tile"),
    Mutation("tail index", "csrc/cpu/noise.h", "segments.index() % kPerCounter == 0;", "true;"),
    Mutation("tail scatter", "csrc/cpu/walk.h", "move<kScatter>(memory, position, count, block);", ""),
    Mutation("stride of a gathered operand", "csrc/cpu/walk.h", "copy<kMove>(memory + i * stride, block", "copy<kMove>(memory + i * kSize, block"),
    Mutation("slice restarts its index", "csrc/cpu/noise.h", "    advance(position % p.segment_numel);\n", ""),
    Mutation("row step of the cursor", "csrc/cpu/walk.h", "strides_[d - 1] - index[d] * strides_[d]", "strides_[d - 1]"),
    Mutation("key of another slice", "csrc/cpu/noise.h", "key_ += n * p_.key_strides[d];", ""),
    Mutation("short rows: place in the tile", "csrc/cpu/noise.h", "static_cast<int64_t>(skipped),", "0,"),
    Mutation("short rows: counter", "csrc/cpu/noise.h", "+ counter + static_cast<uint64_t>(lane)", "+ static_cast<uint64_t>(lane)"),
    Mutation("short rows: seed of the row before", "csrc/cpu/noise.h", "seeds_[at] = key[i * key_step];", "seeds_[at] = key[(i > 0 ? i - 1 : 0) * key_step];"),
    Mutation("short rows: end of a row", "csrc/cpu/noise.h", "least(length, most - taken)", "(most - taken)"),
    Mutation("short rows: past all of them", "csrc/cpu/noise.h", "segments.advance_segments(n);", "segments.advance_segments(1);"),
    Mutation("short rows: merged operands", "csrc/cpu/walk.h", "strides_[last_] != stride * p.sizes[d]", "false"),
    Mutation("samples: noise of the first", "csrc/cpu/noise.h", "sample * p.sample_index_stride", "0", "test_aarch64"),
    Mutation("samples: key of the first", "csrc/cpu/noise.h", "sample * p.sample_key_stride", "0", "test_aarch64"),
    Mutation("samples: sum of the block before", "csrc/cpu/samples.h", "std::memset(sum, 0,", "if (begin == 0) std::memset(sum, 0,", "test_aarch64"),
    Mutation("panels: noise of the first", "csrc/cpu/dispatch.cpp", "first * p.index_strides[last]", "0", "test_aarch64"),
    Mutation("squares: as they are", "csrc/cpu/walk.h", "= in[j][i]", "= in[i][j]", "test_aarch64"),
    Mutation("drawn ahead: bf16 order", "csrc/cpu/avx512.h", "_mm512_permutex2var_ps(first, even,", "_mm512_permutex2var_ps(first, or_(even, set(1u)),"),
    Mutation("short rows: key step", "csrc/common/philox.h", "V::add(word1, V::set(kPhiloxW1))", "V::add(word1, V::set(kPhiloxW0))"),
    Mutation("short rows: halves of words", "csrc/cpu/avx512.h", "_epi32(a, or_(even, set(1u)), b)", "_epi32(a, even, b)"),
    Mutation("short rows: avx2 halves of words", "csrc/cpu/avx2.h", "_mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);\n    const U order", "_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);\n    const U order"),
    Mutation("neon: lane order", "csrc/cpu/neon.h", "{0, 1, 2, 3}", "{0, 1, 3, 2}", "test_aarch64"),
    Mutation("neon: counter carry", "csrc/cpu/neon.h", "vcltq_u32(low.v, order)", "vdupq_n_u32(0)", "test_aarch64"),
    Mutation("neon: upper halves of the products", "csrc/cpu/neon.h", "vuzp2q_u32(first, second)", "vuzp2q_u32(second, first)", "test_aarch64"),
    Mutation("neon: key step", "csrc/cpu/neon.h", "Neon::add(word1, step1)", "Neon::add(word1, step0)", "test_aarch64"),
    Mutation("neon: words as signed numbers", "csrc/cpu/neon.h", "{vcvtq_f32_u32(x.v)}", "signed_to_float(x)", "test_aarch64"),
    Mutation("neon: short rows: halves of words", "csrc/cpu/neon.h", "vuzp2q_u32(a, b)", "vuzp1q_u32(a, b)", "test_aarch64"),
    Mutation("neon: transpose", "csrc/cpu/neon.h", "n[1] = {vzip2q_f32(a, c)};", "n[1] = {vzip1q_f32(b, d)};", "test_aarch64"),
    Mutation("neon: bf16 shuffle", "csrc/cpu/neon.h", "n[2] = {vzip2q_f32(even.v, n[2].v)};", "n[2] = {vzip2q_f32(odd.v, n[2].v)};", "test_aarch64"),
    Mutation("neon: fp64 shuffle", "csrc/cpu/neon.h", "vzip2q_f64(first.b, second.b)", "vzip2q_f64(second.b, first.b)", "test_aarch64"),
    Mutation("neon: clamp drops NaN", "csrc/cpu/neon.h", "vminq_f32(vmaxq_f32(x.v", "vminq_f32(vmaxnmq_f32(x.v", "test_aarch64"),
    Mutation("neon: fp64 clamp drops NaN", "csrc/cpu/neon.h", "vmaxq_f64(x.b, low.b)", "vmaxnmq_f64(x.b, low.b)", "test_aarch64"),
    Mutation("neon: bf16 rounding", "csrc/cpu/neon.h", "sub(set(0x7fffu), odd)", "set(0x8000u)", "test_aarch64"),
    Mutation("neon: bf16 carry of a NaN", "csrc/cpu/neon.h", "and_(number, sub(set(0x7fffu), odd))", "sub(set(0x7fffu), odd)", "test_numerics"),
    Mutation("neon: bf16 halves of a word", "csrc/cpu/neon.h", "vsriq_n_u32(odd.v, even.v, 16)", "vsriq_n_u32(even.v, odd.v, 16)", "test_aarch64"),
    Mutation("neon: a constant loaded for each use", "csrc/cpu/neon.h", "__asm__(\"\" : \"+w\"(x.v));", "", "test_aarch64"),
    Mutation("neon: never chosen", "csrc/cpu/dispatch.cpp", "  supported.push_back(&kNeonKernels);\n", "", "test_aarch64"),
    Mutation("sums contracted", "setup.py", "\"-ffp-contract=off\", ", "", "test_aarch64"),
    Mutation("sums: a stride left out", "csrc/cpu/sums.h", "for (int64_t j = 0; j < count; ++j) a[j] += terms[done + j];", "for (int64_t j = 0; j + 1 < count; ++j) a[j] += terms[done + j];", "test_heads"),
    Mutation("sums: neighbours for halves", "csrc/cpu/sums.h", "from[group * kSize + i] + from[group * kSize + kHalf + i]", "from[group * kSize + 2 * i] + from[group * kSize + 2 * i + 1]", "test_heads"),
    Mutation("sums: a short row's lanes", "csrc/cpu/sums.h", "for (int i = 0; i + half < have; ++i) sum[i]", "for (int i = 0; i + half + 1 < have; ++i) sum[i]", "test_heads"),
    Mutation("sums: chunks not added", "csrc/cpu/dispatch.cpp", "std::copy(sums.begin(), sums.end(), totals);", "std::copy(sums.begin(), sums.begin(), totals);", "test_heads"),
    Mutation("a row's gradient for all", "csrc/cpu/head.h", "left = p_.row, ++grad)", "left = p_.row)", "test_heads"),
    Mutation("a head's prior by the scale's form", "csrc/cpu/head.h", "prior_.form = p.prior_form;", "prior_.form = p.form;", "test_heads"),
    Mutation("noise not kept for the second pass", "csrc/cpu/noise.h", "      W::store_tile(drawn_ + i, eps);\n    }\n    in_a_row_ = false;", "      W::store_tile(drawn_, eps);\n    }\n    in_a_row_ = false;", "test_heads"),
    Mutation("term: mean without its gradient", "csrc/common/terms.h", "out[0] = V::fma(in[2], in[0], in[3]);", "out[0] = in[3];", "test_heads"),
    Mutation("term: prior's scale", "csrc/common/terms.h", "V::sub(V::mul(half, ratio.distance), slope)", "V::sub(constant<V, R>(0), slope)", "test_heads"),
    Mutation("term: ratio of sigmas near 1", "csrc/common/kl_divergence.h", "V::where_equal(log.rest, constant<V, R>(0), over, log.f)", "log.f", "test_heads"),
    Mutation("term: the constant of a density", "csrc/common/terms.h", "-0.918938533204672742", "-0.91893", "test_heads"),
    Mutation("term: slope of tanh", "csrc/common/terms.h", "V::fma(in[0], slope, ", "V::fma(in[0], four_t, ", "test_heads"),
    Mutation("a head's other dimensions", "reparam_fused/_call.py", "trailing = dims == tuple(range(n - len(dims), n))\n    what", "trailing = True\n    what", "test_heads"),
    Mutation("a head's forward mode", "reparam_fused/_heads.py", "    if _needs_parts():\n", "    if False:\n", "test_heads"),
    Mutation("a head's second derivative", "reparam_fused/_heads.py", "by_scale = by_mu * eps * slope", "by_scale = by_mu * (eps * slope).detach()", "test_heads"),
    Mutation("a prior's mean the other way", "reparam_fused/_heads.py", "by_loc = None if by_prior is None else -by_term_mu", "by_loc = None if by_prior is None else by_term_mu", "test_heads"),
    Mutation("a head's generator not moved", "reparam_fused/_ops.py", "return _draw.draw_key(mu.device, generator, _draw.blocks(mu, scale, samples))\n\n\ndef _draw_key_on_cuda", "return _draw.draw_key(mu.device, torch.Generator(mu.device), 1)\n\n\ndef _draw_key_on_cuda", "test_heads"),
    Mutation("std taken for log_var", "csrc/cpu/rows.h", "if (p.bounds == nullptr && p.form == kLogVar) {", "if (p.bounds == nullptr && p.form <= kStd) {", "test_std"),
    Mutation("a block's first index", "csrc/cpu/noise.h", "index_(p.first_index + sample", "index_(0 + sample", "test_blocks"),
    Mutation("a block's rows", "csrc/cpu/noise.h", "    index_ += n * p_.index_strides[d];\n", "", "test_blocks"),
    Mutation("a shard's place", "reparam_fused/_dtensor.py", "\"global_offset\": (*[0] * batch, *offset[batch:])", "\"global_offset\": [0] * len(whole)", "test_dtensor"),
    Mutation("a shard's keys", "reparam_fused/_dtensor.py", "if key.size(dim) > 1:", "if False:", "test_dtensor"),
    Mutation("gradient of what broadcasts over ranks", "reparam_fused/_dtensor.py", "Partial() if broadcast", "Replicate() if broadcast", "test_dtensor"),
    Mutation("a key for each rank", "reparam_fused/_dtensor.py", "    for dim in range(mesh.ndim):\n", "    for dim in range(0):\n", "test_dtensor"),
    Mutation("shards gathered", "reparam_fused/_dtensor.py", "placements[i] = Shard(dim + added)", "pass", "test_dtensor"),
    Mutation("a patch undone by the first", "reparam_fused/_patch.py", "if replacement.patches > 0:", "if False:", "test_patch"),
    Mutation("a patch over somebody's wrapper", "reparam_fused/_patch.py", "if vars(owner).get(name) is not method:", "if False:", "test_patch"),
    Mutation("a patch in force after its end", "reparam_fused/_patch.py", "if owner not in _replacements:", "if False:", "test_patch"),
    Mutation("Triton: lanes before a block", "reparam_fused/triton_kernels.py", "        mask = inside & (position >= 0) &", "        mask = inside &", "test_triton"),
    Mutation("Triton: a block's first counter", "reparam_fused/triton_kernels.py", "        counter = offset + (first // per_counter + first_counter)", "        counter = offset + (first // per_counter)", "test_triton"),
    Mutation("Triton: std taken for log_var", "reparam_fused/triton_kernels.py", "\"FORM\": form,", "\"FORM\": \"log_var\",", "test_triton"),
    Mutation("divergence: coefficient, one ULP", "csrc/common/kl_divergence.h", "0x1.110c5ep-7f", "0x1.110c60p-7f", "test_kl_divergence"),
    Mutation("divergence: low part of ln 2", "csrc/common/kl_divergence.h", "V::set(-0x1.05c610p-29f)", "V::set(0.0f)", "test_kl_divergence"),
    Mutation("divergence: fp64 coefficient", "csrc/common/kl_divergence.h", "0x1.a01a01a01a219p-13", "0x1.a01a01b01a219p-13", "test_kl_divergence"),
    Mutation("divergence: clamp", "csrc/common/kl_divergence.h", "V::clamp(x, 90.0f)", "V::clamp(x, 89.0f)", "test_kl_divergence"),
    Mutation("divergence: infinity less infinity", "csrc/common/kl_divergence.h", "magnitude<V>(sum)", "sum", "test_kl_divergence"),
    Mutation("divergence: operands swapped", "csrc/common/kl_divergence.h", "out[0] = V::fma(V::mul(in[0], constant<V, R>(0.5)), in[0], excess);", "out[0] = V::fma(V::mul(in[1], constant<V, R>(0.5)), in[1], excess);", "test_kl_divergence"),
    Mutation("divergence: shards not aligned", "reparam_fused/_dtensor.py", "    local_mu, local_scale = (_local(t, whole.shape, placements) for t in (mu, scale))\n    local = call", "    local_mu, local_scale = mu.to_local(), scale.to_local()\n    local = call", "test_dtensor"),
    Mutation("divergence: patched from another", "reparam_fused/_patch.py", "and other is None", "", "test_patch"),
    Mutation("patch: samples counted by the first dimension", "reparam_fused/_patch.py", "math.prod(sample_shape)", "sample_shape[0]", "test_patch"),
    Mutation("patch: a deterministic instance drawn from", "reparam_fused/_patch.py", "        or getattr(instance, \"deterministic\", False)\n", "", "test_patch"),
    Mutation("patch: std that was changed", "reparam_fused/_posteriors.py", "t._version == 0", "True", "test_patch"),
    Mutation("patch: exp of any part", "reparam_fused/_posteriors.py", "        and _number(half) == (0.5 if half.name() == \"MulBackward0\" else 2.0)\n", "", "test_patch"),
    Mutation("patch: a checkpoint unpacked", "reparam_fused/_posteriors.py", "node._raw_saved_self.unpack_hook is not None or ", "", "test_patch"),
    Mutation("patch: a gradient that is waited for", "reparam_fused/_posteriors.py", " and not t.retains_grad", "", "test_patch"),
    Mutation("patch: clamp left out", "reparam_fused/_patch.py", "bounds=(*clamp, 0.0)", "bounds=None", "test_patch"),
    Mutation("patch: noise that elements share", "reparam_fused/_posteriors.py", ", *neighbours))", "))", "test_patch"),
    Mutation("patch: noise of another dtype", "reparam_fused/_posteriors.py", "low.dtype != torch.bfloat16", "False", "test_patch"),
    Mutation("patch: kl over all dimensions", "reparam_fused/_posteriors.py", "sums[dim] = over", "sums[dim] = [*range(1, dim)]", "test_patch"),
    Mutation("Normal: infinite over 0", "reparam_fused/distributions.py", "(-0.5 * log_scale).clamp(max=most)", "-0.5 * log_scale", "test_distributions"),
    Mutation("Normal: bounds lost by expand", "reparam_fused/distributions.py", "self.form, self._bounds, self.arg", "self.form, None, self.arg", "test_distributions"),
    Mutation("Normal: divergence of a scale", "reparam_fused/distributions.py", "_over(difference, of_q)", "difference", "test_distributions"),
    Mutation("Normal: sample with gradients", "reparam_fused/distributions.py", "with torch.no_grad():", "if True:", "test_distributions"),
    Mutation("module: dtype of the mean", "reparam_fused/_call.py", "return mu.dtype if mu.dim() > 0 else scale.dtype", "return mu.dtype", "test_nn"),
    Mutation("scale: softplus coefficient, one ULP", "csrc/common/softplus.h", "-0x1.448ee2p-3f", "-0x1.448ee4p-3f", "test_numerics"),
    Mutation("scale: sigmoid by one step in fp64", "csrc/common/softplus.h", "? 2 : 1", "? 1 : 1", "test_numerics"),
    Mutation("scale: sigmoid of a negative", "csrc/common/softplus.h", "V::where_equal(magnitude<V>(rho), rho, minus_one, t)", "minus_one", "test_numerics"),
    Mutation("scale: clamp in its unit", "csrc/common/sigma.h", "2048.0 / unit", "2048.0", "test_numerics"),
    Mutation("divergence of a std: coefficient, one ULP", "csrc/common/kl_divergence.h", "0x1.548382p-3f", "0x1.548384p-3f", "test_numerics"),
    Mutation("divergence of a std: denormals", "csrc/common/kl_divergence.h", "V::sub(none, V::set(0x1.0a2b24p+4f))", "none", "test_numerics"),
    Mutation("divergence of a std: zero in fp64", "csrc/common/kl_divergence.h", "V::where_equal(s, V::set(0.0), minus_inf, V::set(0.0))", "V::set(0.0)", "test_numerics"),
    Mutation("divergence of a std: sign of the slope", "csrc/common/kl_divergence.h", "V::where_equal(std, s, one, minus_one)", "one", "test_numerics"),
    Mutation("lanes: zero at a bound", "csrc/common/scalar.h", "low == 0 ? -T(0) : low", "low", "test_numerics"),
    Mutation("lanes: bound drops NaN", "csrc/cpu/avx512.h", "_mm512_max_ps(set(low_bound(low)), x)", "_mm512_max_ps(x, set(low_bound(low)))", "test_numerics"),
    Mutation("lanes: fp64 bound", "csrc/cpu/avx512.h", "_mm512_min_pd(bound.b, x.b)", "_mm512_max_pd(bound.b, x.b)", "test_numerics"),
    Mutation("lanes: fp64 select", "csrc/cpu/avx512.h", "_mm512_cmp_pd_mask(a.b, b.b, _CMP_EQ_OQ)", "_mm512_cmp_pd_mask(a.b, b.b, _CMP_EQ_UQ)", "test_numerics"),
    Mutation("neon: select", "csrc/cpu/neon.h", "vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)", "vbslq_f32(vceqq_f32(a.v, b.v), y.v, x.v)", "test_numerics"),
    Mutation("neon: fp64 bound drops NaN", "csrc/cpu/neon.h", "vmaxq_f64(x.b, bound)", "vmaxnmq_f64(x.b, bound)", "test_numerics"),
    Mutation("Triton: a generator's own domain", "reparam_fused/triton_kernels.py", " ^ _DOMAIN", "", "test_triton"),
    Mutation("Triton: captured offset", "reparam_fused/triton_kernels.py", "offset += tl.load(offset_ptr)", "pass", "test_triton"),
    Mutation("Triton: divergence", "reparam_fused/triton_kernels.py", "tl.abs(sum) * 4.0", "sum * 4.0", "test_triton"),
    Mutation("Triton: slope of log_std", "reparam_fused/triton_kernels.py", "factor = sigma\n", "factor = sigma * 0.5\n", "test_triton"),
    Mutation("Triton: bound drops NaN", "reparam_fused/triton_kernels.py", "tl.clamp(scale, bounds[0], bounds[1], propagate_nan=tl.PropagateNan.ALL)", "tl.clamp(scale, bounds[0], bounds[1])", "test_triton"),
    Mutation("Triton: gradient outside of a clamp", "reparam_fused/triton_kernels.py", "grad = tl.where(scale == _within(scale, bounds), grad, 0.0)", "grad = grad * tl.where(scale == _within(scale, bounds), 1.0, 0.0)", "test_triton"),
    Mutation("Triton: sigma not raised", "reparam_fused/triton_kernels.py", "sigma += bounds[2]", "sigma += 0.0", "test_triton"),
    Mutation("Triton: divergence without what is added", "reparam_fused/triton_kernels.py", "return 0.0 if len(bounds) == 3 else power", "return power", "test_triton"),
    Mutation("Triton: divergence in the unit of log_var", "reparam_fused/triton_kernels.py", "2.0 if FORM == \"log_std\" else 0.0", "1.0 if FORM == \"log_std\" else 0.0", "test_triton"),
    Mutation("Triton: samples within a counter", "reparam_fused/triton_kernels.py", "two, one = skipped >= 2, skipped % 2 == 1", "two, one = skipped > 2, skipped % 2 == 1", "test_triton"),
    Mutation("Triton: samples beyond a counter", "reparam_fused/triton_kernels.py", "n4, n5, n6, _ = _normals(counter + 1, seed, NEWTON)", "n4, n5, n6, _ = _normals(counter, seed, NEWTON)", "test_triton"),
    Mutation("Triton: samples numbered by slice", "reparam_fused/triton_kernels.py", "d >= batch or (d == 0 and samples and key is not None and key.size(0) == 1)", "d >= batch", "test_triton"),
    Mutation("Triton: a key for each sample", "reparam_fused/triton_kernels.py", "key = keys + sample * sample_key_stride", "key = keys", "test_triton"),
    Mutation("Triton: a key for each sample of whole tensors", "reparam_fused/triton_kernels.py", "if whole and aligned and key_stride == 0:", "if whole and aligned:", "test_triton"),
    Mutation("Triton: samples that begin within 16 bytes", "reparam_fused/triton_kernels.py", " and stride % per_vector == 0", "", "test_triton"),
    Mutation("Triton: a sum rounded twice", "reparam_fused/triton_kernels.py", "tl.fma(grad, eps[j], sigmas[j])", "grad * eps[j] + sigmas[j]", "test_triton"),
    # The layout of a call: call.h and layout.h
    Mutation("merged dimensions", "csrc/layout.h", "joined = joined && stride[merged - 1] == stride[d] * size;", "joined = joined && stride != nullptr;"),
    Mutation("stride of what broadcasts", "csrc/layout.h", "i < 0 || m != sizes[d] ? 0 : x.strides[i]", "i < 0 ? 0 : x.strides[i]", "test_layouts"),
    Mutation("dtype of one without dimensions", "csrc/layout.h", "if (x == scale || (x_ndim > 0 && scale_ndim == 0)) return x;", "if (x == scale) return x;", "test_functional"),
    Mutation("half types promoted to the first", "csrc/layout.h", "return x == kDouble || scale == kDouble ? kDouble : kFloat;", "return x == kDouble || scale == kDouble ? kDouble : x;", "test_functional"),
    Mutation("operand not cast", "csrc/call.h", "if (scale.dtype != dtype) scale = View((scale_cast_ = cast(scale, dtype)).get());", "", "test_functional"),
    Mutation("strides of the output", "csrc/layout.h", "if (numel() == 0 || (is_packed(x, order) && is_packed(scale, order))) return pack();", "return pack();", "test_functional"),
    Mutation("strides of the output: channels last", "csrc/layout.h", "ndim == 4 && is_packed(x, channels_last)", "false && is_packed(x, channels_last)", "test_layouts"),
    Mutation("strides of the output: in some order", "csrc/layout.h", "if (std::equal(x.strides, x.strides + ndim, scale.strides) && is_packed(x)) {", "if (false) {", "test_layouts"),
    Mutation("strides of the output: expanded operands", "csrc/layout.h", "      if (m == 0 || n == 0) continue;\n", "", "test_layouts"),
    Mutation("strides of the output: the larger outside", "csrc/layout.h", "      if (sizes[a] > sizes[b]) return 1;\n", "", "test_layouts"),
    Mutation("strides of the output: empty dimensions", "csrc/layout.h", "= stride;\n      stride *= std::max<int64_t>(sizes[d], 1);", "= stride;\n      stride *= sizes[d];", "test_layouts"),
    Mutation("noise in the order of memory", "csrc/layout.h", "if (!options.noise && !options.head) sort_by_memory();", "if (!options.head) sort_by_memory();", "test_kernels"),
    Mutation("words of a key apart", "csrc/call.h", "if (key_ && key_->shape.strides[key_->shape.ndim - 1] != 1) {", "if (false) {", "test_blocks"),
    Mutation("ones at the end of a batch", "csrc/layout.h", "    while (batch > 0 && key.sizes[batch - 1] == 1) --batch;\n", "", "test_kernels"),
    Mutation("stride of a key", "csrc/layout.h", "key.sizes[d] != 1 ? key.strides[d] : 0;", "key.sizes[d] != 1 ? 2 : 0;", "test_blocks"),
    Mutation("stride of a key for all", "csrc/layout.h", "d < batch && key.sizes[d] != 1 ? key.strides[d] : 0;", "d < batch ? key.strides[d] : 0;", "test_kernels"),
    Mutation("noise of slices numbered on", "csrc/layout.h", "strides[kIndex][d] = numbered ? stride : 0;\n      if (!numbered) continue;\n", "strides[kIndex][d] = stride;\n"),
    Mutation("a block begins at 0", "csrc/layout.h", "      first += offset * stride;\n", "", "test_blocks"),
    Mutation("a block out of bounds", "csrc/layout.h", "if (offset < 0 || offset > size - sizes[d]) {", "if (false) {", "test_blocks"),
    Mutation("a whole of 2^63 elements", "csrc/layout.h", "if (size != 0 && stride > INT64_MAX / size) {", "if (false) {", "test_blocks"),
    Mutation("key of another batch", "csrc/layout.h", "if (key.sizes[d] != 1 && key.sizes[d] != sizes[d]) return false;", "", "test_fast_module"),
    Mutation("key of too many dimensions", "csrc/layout.h", "key.ndim < 1 || key.ndim > ndim + 1 ||", "key.ndim < 1 ||", "test_fast_module"),
    Mutation("key of one word", "csrc/layout.h", " || key.sizes[key.ndim - 1] != 2) return false;", ") return false;", "test_fast_module"),
    Mutation("key of another dtype", "csrc/call.h", "!key_ || (holds_words(*key_) && key_", "!key_ || (key_", "test_fast_module"),
    Mutation("int64 keys refused", "csrc/call.h", "return t.dtype == aoti_torch_dtype_uint64() || t.dtype == aoti_torch_dtype_int64();", "return t.dtype == aoti_torch_dtype_uint64();", "test_keys"),
    Mutation("scale of a backward without one", "csrc/layout.h", "if (has_scale == (bounded || form_backward_reads(form))) return form;", "return form;", "test_std"),
    Mutation("thread share", "csrc/cpu/dispatch.cpp", "job.kernel(job.problem, begin * job.unit,", "job.kernel(job.problem, begin * (job.unit + 1),"),
    Mutation("every call serial", "csrc/cpu/dispatch.h", "constexpr int64_t kGrain = 8192;", "constexpr int64_t kGrain = int64_t{1} << 40;"),
    # Child keys
    Mutation("children: first", "csrc/layout.h", "n != 1, first, num, nullptr};", "n != 1, 0, num, nullptr};", "test_keys"),
    Mutation("children: num", "csrc/layout.h", "sizes[1] = ndim < 3 ? num * each : each;", "sizes[1] = each;", "test_keys"),
    Mutation("children: one key for all numbers", "csrc/layout.h", "m == 1 ? 0 : 2, each,", "2, each,", "test_keys"),
    Mutation("children: one number for all keys", "csrc/layout.h", "nullptr, n != 1, first", "nullptr, 1, first", "test_keys"),
    Mutation("children: as many as there are keys", "csrc/layout.h", "each = m == 1 ? n : m;", "each = m;", "test_keys"),
    Mutation("children: strides of the keys", "csrc/layout.h", "fit = is_row_major(keys) && ", "fit = ", "test_keys"),
    Mutation("children: strides of the numbers", "csrc/layout.h", "(data == nullptr || is_row_major(*data)) && ", "", "test_keys"),
    Mutation("children: half a key", "csrc/layout.h", "2 * m == numel(keys) && ", "", "test_keys"),
    Mutation("children: less than none", "csrc/layout.h", "num >= 0 &&", "true &&", "test_keys"),
    Mutation("children: keys and numbers that do not go together", "csrc/layout.h", " && (m == n || m == 1 || n == 1);", ";", "test_keys"),
    Mutation("children: dtype of the keys", "csrc/call.h", "      holds_words(keys) && (!data ||", "      (!data ||", "test_keys"),
    Mutation("children: dtype of the numbers", "csrc/call.h", "(holds_words(*data) && data->on_device_of(keys))", "(data->on_device_of(keys))", "test_keys"),
    Mutation("children: next one of all keys", "csrc/cpu/derive.h", "first + static_cast<uint64_t>(j)", "first", "test_keys"),
    Mutation("children: of the first key", "csrc/cpu/derive.h", "children.add(keys + 2 * k, first", "children.add(keys, first", "test_keys"),
    Mutation("children: what a tile has left", "csrc/cpu/derive.h", "lane_ * 2 * sizeof(uint64_t)", "V::kLanes * 2 * sizeof(uint64_t)", "test_csrc"),
    Mutation("children: strides", "csrc/cpu/derive.h", "data[k * data_stride]", "data[k]", "test_keys"),
    Mutation("children: words of a block", "csrc/common/keys.h", "keys[1] = V::from_bits(w.w1);", "keys[1] = V::from_bits(w.w2);", "test_keys"),
    Mutation("children: split of a batch as of one", "csrc/python/plain.cpp", "if (!key.view || key.view->shape.ndim != 1) return", "if (!key.view) return", "test_keys"),
    Mutation("children: a row for one", "csrc/python/plain.cpp", "num < 0 ? 1 : 2", "2", "test_keys"),
    # Draws on the CPU
    Mutation("the key drawn twice the same", "csrc/cpu/reparam_cpu.cpp", "call.draws() == 0 ? 0 : draw_word(generator), 0}", "call.draws() == 0 ? 0 : (draw_word(generator), 1), 0}", "test_generator"),
    Mutation("the key drawn twice the same by the module", "csrc/python/plain.cpp", "words[0] = library->draw_word();", "words[0] = (library->draw_word(), 1);", "test_generator"),
    Mutation("generator ignored", "csrc/cpu/reparam_cpu.cpp", ": draw_word(generator), 0}", ": draw_word(std::nullopt), 0}", "test_generator"),
    Mutation("generator ignored by the module", "csrc/python/plain.cpp", "fill_random(to_python(Owned(library->word_tensor(words))).get(), generator);", "words[0] = library->draw_word();", "test_generator"),
    Mutation("generator moved twice", "csrc/cpu/reparam_cpu.cpp", ": draw_word(generator), 0}", ": (draw_word(generator), draw_word(generator)), 0}", "test_fast_module"),
    Mutation("generator moved twice by the module", "csrc/python/plain.cpp", "words[0] = library->draw_word();", "words[0] = (library->draw_word(), library->draw_word());", "test_fast_module"),
    Mutation("an empty call draws", "csrc/cpu/reparam_cpu.cpp", "call.draws() == 0 ? 0 : draw_word(generator), 0}", "draw_word(generator), 0}", "test_fast_module"),
    Mutation("an empty call draws in Python", "reparam_fused/_draw.py", "    if blocks == 0:\n", "    if False:\n", "test_generator"),
    Mutation("another key than the one that was drawn", "csrc/cpu/reparam_cpu.cpp", "Tensor(key_tensor(key, mu.get()))", "Tensor(empty_key(mu).release())", "test_generator"),
    Mutation("another key than the one the module drew", "csrc/python/plain.cpp", "const Owned drawn(library->key_tensor(words, x.tensor.get()));", "const Owned drawn = empty_key(*x.view);", "test_fast_module"),
    # The compiled module and its plain calls
    Mutation("module: never taken", "csrc/python/module.cpp", "return torch_.complete && is_plain_thread() ? run() : left_to_the_op();", "return false ? run() : left_to_the_op();", "test_fast_module"),
    Mutation("module: not asked", "reparam_fused/_forms.py", "_module = _extensions.module\n", "_module = None\n", "test_fast_module"),
    Mutation("module: transforms of torch.func", "csrc/python/module.cpp", "  if (!says(torch_.are_transforms_active, nullptr, Py_False)) return false;\n", "", "test_fast_module"),
    Mutation("module: dispatch modes", "csrc/python/module.cpp", "  if (!says(torch_.count_dispatch_modes, nullptr, torch_.zero)) return false;\n", "", "test_fast_module"),
    Mutation("module: function modes", "csrc/python/module.cpp", "  if (!says(torch_.is_function_mode_enabled, nullptr, Py_False)) return false;\n", "", "test_fast_module"),
    Mutation("module: tracers", "csrc/python/module.cpp", "  if (!says(torch_.tracing_state, nullptr, Py_None)) return false;\n", "", "test_fast_module"),
    Mutation("module: levels of forward mode", "csrc/python/module.cpp", "if (level == nullptr || PyLong_AsLong(level) >= 0) return false;", "if (level == nullptr) return false;", "test_fast_module"),
    Mutation("module: subclasses", "csrc/python/module.cpp", "  if (!is_of(object, torch_.tensor) && !is_of(object, torch_.parameter)) return false;\n", "", "test_fast_module"),
    Mutation("module: parameters", "csrc/python/module.cpp", "if (!is_of(object, torch_.tensor) && !is_of(object, torch_.parameter)) return false;", "if (!is_of(object, torch_.tensor)) return false;", "test_fast_module"),
    Mutation("module: negated views", "csrc/python/module.cpp", "return says(torch_.is_neg, object, Py_False);", "return true;", "test_fast_module"),
    Mutation("module: tensors without memory", "csrc/python/plain.cpp", "if (view->device_type != aoti_torch_device_type_cpu() || !view->data()) view.reset();", "if (view->device_type != aoti_torch_device_type_cpu()) view.reset();", "test_fast_module"),
    Mutation("module: no gradient of the scale", "csrc/python/plain.cpp", "(requires_grad(given.x) || (has_scale && requires_grad(given.scale)));", "requires_grad(given.x);", "test_fast_module"),
    Mutation("module: recorded without need", "csrc/python/plain.cpp", "aoti_torch_grad_mode_is_enabled() &&", "true &&", "test_fast_module"),
    Mutation("module: forms that do not exist", "csrc/python/module.cpp", "const bool has_form = call.form >= 0 && call.form < form_count();", "const bool has_form = true;", "test_fast_module"),
    Mutation("module: ops that do not exist", "csrc/python/module.cpp", "if (!known || form < 0", "if (form < 0", "test_fast_module"),
    Mutation("module: a scale that is not read", "csrc/python/module.cpp", "has_scale != (arguments[3] != Py_None) || ", "", "test_fast_module"),
    Mutation("module: a key that is not read", "csrc/python/module.cpp", " || noise != (arguments[4] != Py_None)) {", ") {", "test_fast_module"),
    Mutation("module: a draw without a scale", "csrc/python/module.cpp", "if (arguments[2] == Py_None || !read_options", "if (!read_options", "test_fast_module"),
    Mutation("module: errors not cleared", "csrc/python/module.cpp", "PyObject* left_to_the_op() {\n  PyErr_Clear();\n", "PyObject* left_to_the_op() {\n", "test_fast_module"),
    Mutation("module: threads of Python wait", "csrc/python/plain.cpp", "    const WithoutGil without_gil(call.draws() > kGrain);\n    check(library->run_kernel(given.op", "    const WithoutGil without_gil(false);\n    check(library->run_kernel(given.op", "test_fast_module"),
    Mutation("module: another form's kernel", "reparam_fused/_forms.py", "self.id = _kernels[\"forms\"][self.name]", "self.id = 0", "test_std"),
    Mutation("module: another form's draw", "reparam_fused/_forms.py", "return _draw(self.form.id, mu", "return _draw(0, mu", "test_fast_module"),
    Mutation("module: another op's kernel", "reparam_fused/_forms.py", "        op = _KL_BACKWARD\n        if self.draws:", "        op = _KL\n        if self.draws:", "test_autograd"),
    # The table of forms
    Mutation("forms: the line of log_var", "reparam_fused/_forms.py", "std=lambda log_var: torch.exp(0.5 * log_var),", "std=lambda log_var: torch.exp(log_var),", "test_export"),
    Mutation("forms: the line of std", "reparam_fused/_forms.py", "std=lambda std: std,", "std=lambda std: torch.exp(std),", "test_export"),
    Mutation("forms: sigma of log_var", "reparam_fused/_forms.py", "sigma=lambda log_var: reference.sigma(log_var),", "sigma=lambda log_var: reference.sigma(log_var, 0.5),"),
    Mutation("forms: sigma of std", "reparam_fused/_forms.py", "sigma=lambda std: std,", "sigma=lambda std: std.abs(),", "test_std"),
    Mutation("forms: chain of log_var", "reparam_fused/_forms.py", "grad_sigma * reference.sigma(log_var, 0.5)", "grad_sigma * reference.sigma(log_var)"),
    Mutation("forms: chain of std", "reparam_fused/_forms.py", "chain=lambda grad_sigma, _: grad_sigma,", "chain=lambda grad_sigma, std: grad_sigma * std,", "test_std"),
    Mutation("forms: second of log_var", "reparam_fused/_forms.py", "ratio=lambda _: 0.5,", "ratio=lambda _: 1.0,", "test_autograd"),
    Mutation("forms: second of std", "reparam_fused/_forms.py", "chain=lambda grad_sigma, _: grad_sigma,", "chain=lambda grad_sigma, _: grad_sigma,\n            second=lambda first, _: 0 * first,", "test_std"),
    Mutation("forms: second of the divergence", "reparam_fused/_forms.py", "return unit * first + 0.5 * unit**2 * grad", "return unit * first", "test_kl_divergence"),
    Mutation("forms: by_x of the divergence", "reparam_fused/_forms.py", "return grad if self.draws else grad * x", "return grad", "test_kl_divergence"),
    Mutation("forms: by_x of log_var", "reparam_fused/_forms.py", "return grad if self.draws else grad * x", "return grad * 2 if self.draws else grad * x", "test_autograd"),
    Mutation("forms: names of the ops", "reparam_fused/_autograd.py", "op = _ops.sample_backward if call.draws else _ops.kl_divergence_backward", "op = _ops.sample_backward if call.draws else _ops.kl_divergence", "test_kl_divergence"),
    Mutation("forms: names exchanged", "reparam_fused/_forms.py", "form.name: form\n    for form in (", "{'std': 'log_var', 'log_var': 'std'}[str(form.name)]: form\n    for form in (", "test_std"),
    Mutation("wheel: allocator's error of a new libstdc++", "csrc/glibc.cpp", "__throw_bad_array_new_lengthv", "__throw_bad_array_newlengthv", "test_wheel"),
    Mutation("wheel: streams of a new libstdc++", "csrc/glibc.cpp", "void empty(std::stringstream*)\n    AS(", "void empty(std::stringstream*)\n    AS(\"x\" ", "test_wheel"),
    Mutation("wheel: threads of a new glibc", "csrc/glibc.cpp", "char single_threaded AS(", "char single_threaded AS(\"x\" ", "test_wheel"),
    Mutation("wheel: dlsym of a new glibc", "csrc/glibc.cpp", '", " #name "@GLIBC_2.2.5"', '", " #name "@GLIBC_2.34"', "test_wheel"),
    # Derivatives
    Mutation("saved key", "reparam_fused/_autograd.py", "kept = (x, scale, key)", "kept = (x, scale, None if key is None else torch.zeros_like(key))", "test_autograd"),
    Mutation("mu kept", "reparam_fused/_autograd.py", "x if not call.draws and (by_x or tangents) else None,", "x,", "test_autograd"),
    Mutation("divergence: mu kept", "reparam_fused/_autograd.py", "x if not call.draws and (by_x or tangents) else None,", "x if not call.draws else None,", "test_kl_divergence"),
    Mutation("log_var kept for mu alone", "reparam_fused/_autograd.py", "scale if call.backward_reads() and (by_scale or tangents) else None,", "scale if call.backward_reads() else None,", "test_autograd"),
    Mutation("std kept", "reparam_fused/_autograd.py", "scale if call.backward_reads() and (by_scale or tangents) else None,", "scale if by_scale or tangents else None,", "test_std"),
    Mutation("key kept for mu alone", "reparam_fused/_autograd.py", "result[1] if by_scale or tangents or call.samples is not None else None,", "result[1],", "test_autograd"),
    Mutation("gradient kept by the backward of std", "reparam_fused/_autograd.py", "_save(ctx, call, None if scale is None else grad, scale, result[1], result[0])", "_save(ctx, call, grad, scale, result[1], result[0])", "test_std"),
    Mutation("kept as plain attributes", "reparam_fused/_autograd.py", "    ctx.save_for_backward(*kept)\n", "    ctx.save_for_backward(*(None if t is None else t.detach().clone() for t in kept))\n", "test_autograd"),
    Mutation("grad_mu copied", "reparam_fused/_forms.py", "return grad if self.draws else grad * x", "return grad.clone() if self.draws else grad * x", "test_autograd"),
    Mutation("a gradient filled for none", "reparam_fused/_autograd.py", "    ctx.set_materialize_grads(False)\n", "", "test_autograd"),
    Mutation("gradient of a mu that needs none", "reparam_fused/_autograd.py", "            if needs_x:\n", "            if True:\n", "test_kl_divergence"),
    Mutation("gradient of a scale that needs none", "reparam_fused/_autograd.py", "            if needs_scale:\n", "            if True:\n", "test_autograd"),
    Mutation("second derivative by a gradient that needs none", "reparam_fused/_autograd.py", "if ctx.needs_input_grad[2]:", "if True:", "test_autograd"),
    Mutation("second derivative by a scale that needs none", "reparam_fused/_autograd.py", "if ctx.needs_input_grad[3]:", "if True:", "test_autograd"),
    Mutation("second derivative's incoming gradient", "reparam_fused/_autograd.py", "by_scale = _second(ctx.call, grad_out * grad, scale, key)", "by_scale = _second(ctx.call, grad_out, scale, key)", "test_autograd"),
    Mutation("second derivative of a plain backward", "reparam_fused/_autograd.py", "return _apply_backward(call, result, grad, scale)", "return result[0]", "test_autograd"),
    Mutation("plain backward left to the op", "reparam_fused/_autograd.py", "    if not is_compiling():\n        result = call.plain_backward", "    if False:\n        result = call.plain_backward", "test_fast_module"),
    Mutation("plain backward of a block", "reparam_fused/_forms.py", "        if _kernels is None or self.block is not None:\n            return None\n        op = _KL_BACKWARD", "        if _kernels is None:\n            return None\n        op = _KL_BACKWARD", "test_blocks"),
    Mutation("backward of a block", "reparam_fused/_autograd.py", "return (key, call.form.name, *(call.block or ()))", "return (key, call.form.name)", "test_blocks"),
    Mutation("block of an op forgotten", "reparam_fused/_autograd.py", "block = None if global_shape is None else (global_shape, global_offset)", "block = None", "test_blocks"),
    Mutation("form of an op forgotten", "reparam_fused/_autograd.py", "call = Call(FORMS[form], True, bounds, block, *samples)", "call = Call(FORMS[\"log_var\"], True, bounds, block, *samples)", "test_std"),
    Mutation("form of a draw forgotten", "reparam_fused/_autograd.py", "call = Call(FORMS[form], True, bounds, None, samples)", "call = Call(FORMS[\"log_var\"], True, bounds, None, samples)", "test_std"),
    Mutation("plain call not recorded", "reparam_fused/_call.py", "result = Forward.apply(call, result, mu, scale)", "result = result[0]", "test_autograd"),
    Mutation("gradient of the scale alone", "reparam_fused/_autograd.py", "x.requires_grad or (scale is not None and scale.requires_grad)", "x.requires_grad", "test_autograd"),
    Mutation("forward mode not recorded", "reparam_fused/_autograd.py", "    if forward_ad._current_level >= 0:\n        return True\n", "", "test_transforms"),
    Mutation("nothing kept for a tangent", "reparam_fused/_autograd.py", "tangents = forward_ad._current_level >= 0", "tangents = False", "test_transforms"),
    Mutation("jvp drops the scale", "reparam_fused/_autograd.py", "return _total(ctx, by_x, by_scale)", "return _total(ctx, by_x)", "test_transforms"),
    Mutation("divergence: jvp drops mu", "reparam_fused/_autograd.py", "            if x_t is not None:\n                by_x = call.by_x(x_t, x)", "            if False:\n                by_x = call.by_x(x_t, x)", "test_kl_divergence"),
    Mutation("jvp of the backward drops the scale", "reparam_fused/_autograd.py", "return _total(ctx, by_grad, by_scale)", "return _total(ctx, by_grad)", "test_transforms"),
    Mutation("jvp of the backward drops the gradient", "reparam_fused/_autograd.py", "return _total(ctx, by_grad, by_scale)", "return _total(ctx, by_scale)", "test_transforms"),
    Mutation("tangents off for the other levels", "reparam_fused/_autograd.py", "_set_fwd_grad_enabled(True)", "_set_fwd_grad_enabled(False)", "test_transforms"),
    Mutation("tangents of what was kept", "reparam_fused/_autograd.py", "forward_ad.unpack_dual(t).primal for t", "t for t", "test_transforms"),
    Mutation("tangent of a scale that broadcasts", "reparam_fused/_autograd.py", "gradient_of_scale(call, scale_t.expand(ctx.shape), scale, key)", "gradient_of_scale(call, scale_t, scale, key)", "test_transforms"),
    Mutation("shape of a tangent", "reparam_fused/_autograd.py", "start=given[0]).expand(ctx.shape).to(", "start=given[0]).to(", "test_transforms"),
    Mutation("dtype of a tangent", "reparam_fused/_autograd.py", ".expand(ctx.shape).to(ctx.dtype)", ".expand(ctx.shape)", "test_transforms"),
    Mutation("levels of torch.func not allowed", "reparam_fused/_autograd.py", "_functorch.set_single_level_autograd_function_allowed(True)", "_functorch.set_single_level_autograd_function_allowed(allowed)", "test_transforms"),
    Mutation("levels of torch.func left allowed", "reparam_fused/_autograd.py", "_functorch.set_single_level_autograd_function_allowed(allowed)", "pass", "test_transforms"),
    # vmap
    Mutation("vmap: noise batched though the key is not", "reparam_fused/_autograd.py", "key = key.expand(size, *key.shape[1:])", "pass", "test_transforms"),
    Mutation("vmap: noise not batched though the key is", "reparam_fused/_autograd.py", "            if key_dim is None:\n", "            if True:\n                key = key[:1]\n", "test_transforms"),
    Mutation("vmap: examples of fewer dimensions", "reparam_fused/_autograd.py", "rank = max(rank, t.dim() - (dim is not None) - sampled)", "pass", "test_transforms"),
    Mutation("vmap: rank counted with the batch", "reparam_fused/_autograd.py", "rank = max(rank, t.dim() - (dim is not None) - sampled)", "rank = max(rank, t.dim() - sampled)", "test_transforms"),
    Mutation("vmap: batch moved by an exchange", "reparam_fused/_autograd.py", "t.movedim(dim, 0)", "t.transpose(dim, 0)", "test_transforms"),
    Mutation("vmap: batch of the key alone", "reparam_fused/_autograd.py", "if x is not None and x.shape[at] != size:", "if False:", "test_transforms"),
    Mutation("vmap of a block", "reparam_fused/_autograd.py", "zip((size, 0), block, strict=True)", "zip((size, 1), block, strict=True)", "test_blocks"),
    Mutation("vmap of a block without the batch", "reparam_fused/_autograd.py", "if None not in block:", "if False:", "test_blocks"),
    Mutation("vmap: a batch of another level", "reparam_fused/_autograd.py", "    if size is None:  # of tensors", "    if False:  # of tensors", "test_transforms"),
    Mutation("vmap: a tensor that has escaped", "reparam_fused/_autograd.py", "    if level is None:\n", "    if False:\n", "test_transforms"),
    Mutation("vmap: noise of a block", "reparam_fused/_autograd.py", "_ops.noise(key, operands[0].shape, dtype, *block)", "_ops.noise(key, operands[0].shape, dtype)", "test_transforms"),
    Mutation("vmap of keys: a batch of another level", "reparam_fused/_autograd.py", "        if keys_dim is None and data_dim is None:\n            return _ops.derive(keys, data, first, num)\n", "", "test_transforms"),
    Mutation("vmap of keys: batch of the numbers alone", "reparam_fused/_autograd.py", "size = max(size, data.shape[0])", "pass", "test_keys"),
    Mutation("vmap of keys: numbers of each example", "reparam_fused/_autograd.py", "n = max(m, data.shape[1])", "pass", "test_keys"),
    Mutation("vmap of keys: where their batch is", "reparam_fused/_autograd.py", "keys = _batch_first(keys, keys_dim, 2)", "keys = _batch_first(keys, None if keys_dim is None else 0, 2)", "test_keys"),
    Mutation("vmap of keys: where the numbers' batch is", "reparam_fused/_autograd.py", "data = _batch_first(data, data_dim, 1)", "data = _batch_first(data, None if data_dim is None else 0, 1)", "test_keys"),
    Mutation("vmap of keys: where the result's batch is", "reparam_fused/_autograd.py", "derived.view(num, size, n, 2), 1, level)", "derived.view(num, size, n, 2), 0, level)", "test_keys"),
    # From the public functions to the ops
    Mutation("a call of two scales taken", "reparam_fused/_validate.py", "        if log_std is None and log_var is not None:\n", "        if log_var is not None:\n", "test_std"),
    Mutation("a call of key and generator taken", "reparam_fused/_call.py", "(key is None or (generator is None and", "(key is None or (", "test_validation"),
    Mutation("a block taken for a plain call", "reparam_fused/_call.py", "        global_shape is None\n        and global_offset is None\n        and", "        True\n        and", "test_blocks"),
    Mutation("compiled autograd not told", "reparam_fused/_autograd.py", "    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key\n\n    @staticmethod\n    def forward(\n        ctx: Any, call: Call, result: tuple[Tensor, Tensor | None], ", "    @staticmethod\n    def forward(\n        ctx: Any, call: Call, result: tuple[Tensor, Tensor | None], ", "test_compile"),
    Mutation("plain calls within a graph", "reparam_fused/_call.py", "        and not is_compiling()\n    ):", "    ):", "test_compile"),
    Mutation("__torch_function__ of a key", "reparam_fused/_call.py", "for t in (mu, scale, key) if t is not None]\n    if has_torch_function(tensors):\n        return handle_torch_function(\n", "for t in (mu, scale) if t is not None]\n    if has_torch_function(tensors):\n        return handle_torch_function(\n", "test_functional"),
    Mutation("draws of a graph by torch.randint", "reparam_fused/_call.py", "if is_compiling() and generator is None and not _are_functorch_transforms_active():\n            return as", "if False:\n            return as", "test_compile"),
    Mutation("draws of a graph under vmap", "reparam_fused/_call.py", " and not _are_functorch_transforms_active():\n            return as", ":\n            return as", "test_transforms"),
    Mutation("draws under vmap by the op", "reparam_fused/_call.py", "        if not is_compiling() and _levels(TransformType.Vmap) == 0:\n            z", "        if not is_compiling():\n            z", "test_transforms"),
    Mutation("generator ignored under vmap", "reparam_fused/_call.py", "key = _draw.mapped_key(mu.device, generator)", "key = _draw.mapped_key(mu.device, None)", "test_transforms"),
    Mutation("a seed in the graph", "reparam_fused/_draw.py", "return torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)", "return torch.tensor([1, 2], device=device)", "test_transforms"),
    Mutation("ops of a torch.jit.trace", "reparam_fused/_call.py", "return torch._C._get_tracing_state() is not None", "return False", "test_export"),
    Mutation("ops of an ONNX export", "reparam_fused/_call.py", "return torch.onnx.is_in_onnx_export()", "return False", "test_deployment"),
    Mutation("key dropped from a trace", "reparam_fused/_call.py", "    if key is not None or generator is not None:\n        given", "    if False:\n        given", "test_export"),
    Mutation("number of another dtype", "reparam_fused/_call.py", "torch.full((), scale, dtype=mu.dtype, device=mu.device)", "torch.full((), scale, device=mu.device)", "test_functional"),
    Mutation("autocast ignored", "reparam_fused/_call.py", "else scale.float()", "else scale", "test_autocast"),
    Mutation("autocast of float64", "reparam_fused/_call.py", "return scale if scale.dtype == torch.float64 else scale.float()", "return scale.float()", "test_autocast"),
    Mutation("autocast of the CPU", "reparam_fused/_call.py", "if mu.is_cpu or mu.is_meta or", "if mu.is_meta or", "test_autocast"),
    Mutation("autocast of a std", "reparam_fused/_call.py", "    if form != \"std\":\n        scale = _autocast_exp(mu, scale)\n    if _exported()", "    scale = _autocast_exp(mu, scale)\n    if _exported()", "test_autocast"),
    Mutation("divergence: autocast ignored", "reparam_fused/_call.py", "    if form != \"std\":\n        scale = _autocast_exp(mu, scale)\n    if call.bounds", "    if call.bounds", "test_kl_divergence"),
    Mutation("forward mode within a graph", "reparam_fused/_call.py", "if is_compiling() and forward_ad._current_level >= 0:", "if False:", "test_transforms"),
    # The ops, the partitioner
    Mutation("fake key of a draw", "reparam_fused/_ops.py", "samples), mu.new_empty((2,), dtype=torch.uint64)", "samples), mu.new_empty((2,), dtype=torch.int64)", "test_autograd"),
    Mutation("fake strides", "reparam_fused/_ops.py", "return torch.add(x, x if scale is None else scale)  # the same dtype, shape and strides", "return torch.add(x, x if scale is None else scale).contiguous()", "test_autograd"),
    Mutation("fake dtype of noise", "reparam_fused/_ops.py", "return key.new_empty(size, dtype=dtype)", "return key.new_empty(size, dtype=torch.float32)", "test_autograd"),
    Mutation("fake children", "reparam_fused/_ops.py", "n = keys.shape[0] if data is None or data.shape[0] == 1 else data.shape[0]\n    return keys", "n = keys.shape[0]\n    return keys", "test_keys"),
    Mutation("draws not marked as random", "reparam_fused/_ops.py", "    _TAGS[_op].append(torch.Tag.nondeterministic_seeded)", "    pass", "test_compile"),
    Mutation("drawn again for a memory budget", "reparam_fused/_partitioner.py", 'meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE', 'meta["recompute"] = CheckpointPolicy.MUST_SAVE', "test_compile"),
    Mutation("a budget of 1 marked too", "reparam_fused/_partitioner.py", "if config.activation_memory_budget == 1:", "if False:", "test_compile"),
    Mutation("graphs without a backward marked too", "reparam_fused/_partitioner.py", 'if not any("tangents" in str(node.target) for node in inputs):', "if False:", "test_compile"),
    Mutation("the mark of a checkpoint lost", "reparam_fused/_partitioner.py", "        meta.update(outer)\n", "", "test_compile"),
    Mutation("the mark left on what follows", "reparam_fused/_partitioner.py", '        del meta["recompute"]\n', "", "test_compile"),
    # Keys in Python
    Mutation("int64 keys refused by name", "reparam_fused/_validate.py", "    if key.dtype not in KEY_DTYPES:", "    if key.dtype != torch.uint64:", "test_keys"),
    Mutation("keys: first of a split", "reparam_fused/random.py", "keys = _plain_split(key, 0, num)", "keys = _plain_split(key, 1, num)", "test_keys"),
    Mutation("keys: first of a batch's split", "reparam_fused/random.py", "keys = _children(key, None, 0, num)", "keys = _children(key, None, 1, num)", "test_keys"),
    Mutation("keys: child of a batch", "reparam_fused/random.py", "_children(key, None, first, 1)", "_children(key, None, 0, 1)", "test_keys"),
    Mutation("keys: child of one", "reparam_fused/random.py", "child = _plain_split(key, first, None)", "child = _plain_split(key, 0, None)", "test_keys"),
    Mutation("keys: numbers beyond 2^63", "reparam_fused/random.py", "first = data - 2**64 if data >= 2**63 else data", "first = data % 2**63", "test_keys"),
    Mutation("keys: seeds beyond 2^63", "reparam_fused/random.py", "return word - 2**64 if word >= 2**63 else word", "return word % 2**63", "test_keys"),
    Mutation("keys: offset of several seeds", "reparam_fused/random.py", "torch.stack([seeds, torch.zeros_like(seeds)], -1)", "torch.stack([seeds, seeds], -1)", "test_keys"),
    Mutation("keys: generator ignored", "reparam_fused/random.py", "_draw.draw_key(_draw.device_of(generator), generator, 1)", "_draw.draw_key(_draw.device_of(generator), None, 1)", "test_keys"),
    Mutation("keys: the module within a graph", "reparam_fused/random.py", "if torch.compiler.is_compiling() or _extensions.module is None:", "if _extensions.module is None:", "test_compile"),
    Mutation("keys: the module never taken", "reparam_fused/random.py", "if torch.compiler.is_compiling() or _extensions.module is None:", "if True:", "test_fast_module"),
    # Draws on a GPU, in Python; what needs no GPU to show
    Mutation("a failed draw", "reparam_fused/_draw.py", "            generator.set_offset(before)\n", "            pass\n", "test_triton"),
    Mutation("a failed draw undone under another", "reparam_fused/_draw.py", "if generator.get_offset() == (before + 4 * blocks) % 2**64:", "if True:", "test_triton"),
    Mutation("blocks of mu, not of the output", "reparam_fused/_draw.py", "numel = broadcast(mu.shape, scale.shape).numel()", "numel = mu.numel()", "test_triton"),
    Mutation("blocks of float64 as of float32", "reparam_fused/_draw.py", "(2 if torch.result_type(mu, scale) == torch.float64 else 4)", "4", "test_triton"),
    Mutation("offset advanced by elements", "reparam_fused/_draw.py", "return -(-numel // (2 if", "return -(-numel // (1 if", "test_triton"),
    Mutation("offset of older torch not advanced", "reparam_fused/_draw.py", "generator.set_offset((position.offset + 4 * blocks) % 2**64)", "pass", "test_triton"),
    Mutation("a graph's own offset ignored", "reparam_fused/_draw.py", "yield Position(0, int(within.item()), (seed, offset))", "yield Position(0, 0, (seed, offset))", "test_triton"),
    Mutation("Triton: first child", "reparam_fused/triton_kernels.py", "counter += (first + child).to(tl.uint64)", "counter += child.to(tl.uint64)", "test_triton"),
    Mutation("Triton: one key for all numbers", "reparam_fused/triton_kernels.py", "strides = 0 if m == 1 else 2, 0", "strides = 2, 0", "test_triton"),
    Mutation("Triton: one number for all keys", "reparam_fused/triton_kernels.py", "0 if data is None or data.size(0) == 1 else 1\n        _run", "1\n        _run", "test_triton"),
    # On the stand-in GPU: the kernels, the launchers, the binding
    Mutation("GPU: last full block", "csrc/cuda/launch.cpp", "0 : vectors / kVectors;", "0 : vectors / kVectors + 1;", "test_cuda", "cuda"),
    Mutation("GPU: what is left of a vector", "csrc/cuda/launch.cpp", "(numel % per_vector + per_counter - 1)", "(numel % per_vector)", "test_cuda", "cuda"),
    Mutation("GPU: the vectors after full blocks", "csrc/cuda/kernels.cuh", "full_blocks * kVectors +", "full_blocks * kBlock +", "test_cuda", "cuda"),
    Mutation("GPU: grid", "csrc/cuda/enqueue.h", "(threads + kBlock - 1) / kBlock", "threads / kBlock", "test_cuda", "cuda"),
    Mutation("GPU: unaligned pointers", "csrc/cuda/launch.cpp", "reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0", "true", "test_cuda", "cuda"),
    Mutation("GPU: rows that vectors cannot take", "csrc/cuda/launch.cpp", "fits = fits && strides[d] % per_vector == 0;", ";", "test_cuda", "cuda"),
    Mutation("GPU: a column read as vectors", "csrc/cuda/kernels.cuh", "layout.dimensions[0].scale_stride.low == 0", "false", "test_cuda", "cuda"),
    Mutation("GPU: half of an element repeated", "csrc/cuda/thread.h", "* 0x10001u;", ";", "test_cuda", "cuda"),
    Mutation("GPU: strides of 32 bits", "csrc/cuda/arguments.h", "static_cast<uint32_t>(stride >> 32)", "0", "test_cuda", "cuda"),
    Mutation("GPU: slices that vectors cannot take", "csrc/cuda/launch.cpp", "fits = fits && p.index_strides[d] % per_counter == 0;", ";", "test_cuda", "cuda"),
    Mutation("GPU: 32-bit indices too far", "csrc/cuda/enqueue.h", "(int64_t{1} << 31) - kVectorBytes", "(int64_t{1} << 33) - kVectorBytes", "test_cuda", "cuda"),
    Mutation("GPU: whole tensors by parts", "csrc/cuda/launch.cpp", " || is_whole(op, dtype, p));", ");", "test_cuda", "cuda"),
    Mutation("GPU: parts that leave vectors unaligned", "csrc/cuda/enqueue.h", "<< 31) - kVectorBytes", "<< 31) - 1", "test_cuda", "cuda"),
    Mutation("GPU: key of another slice", "csrc/cuda/kernels.cuh", "__ldg(source.keys + at + 1)", "__ldg(source.keys + 1)", "test_cuda", "cuda"),
    Mutation("GPU: captured offset", "csrc/cuda/kernels.cuh", "key.offset += static_cast<uint64_t>(*source.captured_offset);", "", "test_cuda", "cuda"),
    Mutation("GPU: a generator's own domain", "csrc/cuda/kernels.cuh", " + (uint64_t{1} << 63)", "", "test_cuda", "cuda"),
    Mutation("GPU: key not written", "csrc/cuda/kernels.cuh", "source.key_out[1] = key.offset;", "", "test_cuda", "cuda"),
    Mutation("GPU: division", "csrc/cuda/arguments.h", "/ d + 1);", "/ d);", "test_cuda", "cuda"),
    Mutation("GPU: counter of a vector", "csrc/cuda/kernels.cuh", "i * kBlock * kCountersPerVector<T>", "i * kBlock", "test_cuda", "cuda"),
    Mutation("GPU: half of a pair", "csrc/cuda/thread.h", "word & 0xffff0000u", "word", "test_cuda", "cuda"),
    Mutation("GPU: clamp drops NaN", "csrc/cuda/thread.h", "min.NaN.xorsign.abs", "min.xorsign.abs", "test_cuda", "cuda"),
    Mutation("GPU: root not corrected", "csrc/cuda/root.h", "return V::fma(remainder, V::mul(estimate, V::set(0.5f)), s);", "return s;", "test_cuda", "cuda"),
    Mutation("GPU: a block's first index", "csrc/cuda/launch.cpp", "make_layout(p, bytes, 1, 1), p.first_index,", "make_layout(p, bytes, 1, 1), int64_t{0},", "test_cuda", "cuda"),
    Mutation("GPU: a block's first counter", "csrc/cuda/launch.cpp", "{ return {source.keys, counter}; }", "{ return {source.keys, 0}; }", "test_cuda", "cuda"),
    Mutation("GPU: counters cut at both ends", "csrc/cuda/launch.cpp", "? 0 : per_counter - 1;", "? 0 : 0;", "test_cuda", "cuda"),
    Mutation("GPU: lanes before a block", "csrc/cuda/kernels.cuh", "in_segment == 0 ? skipped : 0", "0", "test_cuda", "cuda"),
    Mutation("GPU: std taken for log_var", "csrc/cuda/launch.cpp", '"_") + form_name(form);', '"_") + form_name(0);', "test_cuda", "cuda"),
    Mutation("GPU: divergence", "csrc/cuda/kernels.cu", "_backward_##form, , KlDivergenceBackward<Form>", "_backward_##form, , KlDivergence<Form>", "test_cuda", "cuda"),
    Mutation("GPU: bounds of a kernel ignored", "csrc/cuda/launch.cpp", 'bounded ? "_bounded_" : "_"', '"_"', "test_cuda", "cuda"),
    Mutation("GPU: any form: its number", "csrc/cuda/enqueue.h", "scale.form = form;", "scale.form = 0;", "test_cuda", "cuda"),
    Mutation("GPU: any form: one for another", "csrc/cuda/kernels.cuh", "form - 1, in, eps", "form - 2, in, eps", "test_cuda", "cuda"),
    Mutation("GPU: any form: bounds ignored", "csrc/cuda/enqueue.h", "scale.bounded = bounds != nullptr;", "scale.bounded = false;", "test_cuda", "cuda"),
    Mutation("GPU: any form: what is added to sigma", "csrc/cuda/enqueue.h", "static_cast<R>(given.min_std)", "0", "test_cuda", "cuda"),
    Mutation("GPU: any form: a scale that is not there", "csrc/cuda/launch.cpp", "scale.bounded || form_backward_reads(p.form);", "true;", "test_samples", "cuda"),
    Mutation("GPU: samples all in one place", "csrc/cuda/kernels.cuh", "    out = at(out, samples.stride);\n", "", "test_cuda", "cuda"),
    Mutation("GPU: samples: gradient of the first", "csrc/cuda/kernels.cuh", "    grad_z = at(grad_z, samples.stride);\n", "", "test_cuda", "cuda"),
    Mutation("GPU: samples: noise of the first", "csrc/cuda/kernels.cuh", "    index += samples.index_stride;\n", "", "test_cuda", "cuda"),
    Mutation("GPU: samples: key of the first", "csrc/cuda/kernels.cuh", "        key_at += samples.key_stride;\n", "", "test_cuda", "cuda"),
    Mutation("GPU: samples: key not read again", "csrc/cuda/kernels.cuh", "if (samples.key_stride != 0) {", "if (false) {", "test_cuda", "cuda"),
    Mutation("GPU: samples: key schedule", "csrc/cuda/kernels.cuh", "word1[i] = words.key1();", "word1[i] = words.key0();", "test_cuda", "cuda"),
    Mutation("GPU: samples: shift within a counter", "csrc/cuda/kernels.cuh", "k < skipped; ++k", "k + 1 < skipped; ++k", "test_cuda", "cuda"),
    Mutation("GPU: samples: the counter after", "csrc/cuda/kernels.cuh", "normals<Thread, T>(counter + 1,", "normals<Thread, T>(counter,", "test_cuda", "cuda"),
    Mutation("GPU: samples: last elements of a segment", "csrc/cuda/kernels.cuh", "count = left < kPerCounter<T> ? static_cast<int>(left) : kPerCounter<T>;", "count = kPerCounter<T>;", "test_cuda", "cuda"),
    Mutation("GPU: samples: places along a row", "csrc/cuda/kernels.cuh", "        place.scale.add(1, layout.dimensions[0].scale_stride);\n", "", "test_cuda", "cuda"),
    Mutation("GPU: samples: rows whose elements are apart", "csrc/cuda/launch.cpp", "strides[inner] == 1 && p.sizes[inner] % per_counter == 0 &&", "p.sizes[inner] % per_counter == 0 &&", "test_cuda", "cuda"),
    Mutation("GPU: samples: rows of any length", "csrc/cuda/launch.cpp", "strides[inner] == 1 && p.sizes[inner] % per_counter == 0 &&", "strides[inner] == 1 &&", "test_cuda", "cuda"),
    Mutation("GPU: samples: rows that are not aligned", "csrc/cuda/launch.cpp", "reinterpret_cast<uintptr_t>(data) % (per_counter * bytes) == 0 &&", "data != nullptr &&", "test_cuda", "cuda"),
    Mutation("GPU: samples: rows of samples that are not aligned", "csrc/cuda/launch.cpp", " && p.sample_stride % per_counter == 0;", ";", "test_cuda", "cuda"),
    Mutation("module: tensors of a GPU", "csrc/python/plain.cpp", "if (view->device_type != aoti_torch_device_type_cpu() || !view->data()) view.reset();", "if (!view->data()) view.reset();", "test_fast_module", "cuda"),
    Mutation("GPU: device", "csrc/cuda/reparam_cuda.cpp", "guard_(device_) {", "guard_(0) {", "test_gpu", "cuda"),
    Mutation("GPU: wrong stream", "csrc/cuda/reparam_cuda.cpp", "return torch::stable::accelerator::getCurrentStream(device_).nativeHandle();", "return nullptr;", "test_gpu", "cuda"),
    Mutation("GPU: stream of the first device", "csrc/cuda/reparam_cuda.cpp", "getCurrentStream(device_)", "getCurrentStream(0)", "test_gpu", "cuda"),
    Mutation("GPU: launch not checked", "csrc/cuda/driver.cpp", '  check(driver, result, "launching a kernel of reparam_fused");\n', "  (void)result;\n", "test_gpu", "cuda"),
    Mutation("GPU: empty tensors launched", "csrc/cuda/reparam_cuda.cpp", "if (call.numel() > 0) {", "if (true) {", "test_gpu", "cuda"),
    Mutation("GPU: every error taken for a refusal", "csrc/cuda/driver.cpp", "if (result == refusal) return true;", "if (result != kSuccess) return true;", "test_driver"),
    Mutation("GPU: no error taken for a refusal", "csrc/cuda/driver.cpp", "if (result == refusal) return true;", "if (result == refusal) return false;", "test_driver"),
    Mutation("GPU: one device asked for all", "csrc/cuda/driver.cpp", "  auto known = s.refusals.find(device);", "  auto known = s.refusals.begin();", "test_driver"),
    Mutation("GPU: a thread left without a context", "csrc/cuda/driver.cpp", "  make_current(driver, device);\n  if (blocks", "  if (blocks", "test_driver"),
    Mutation("GPU: a context left behind", "csrc/cuda/driver.cpp", "  ~InContext() { driver_.set_context(before_); }", "  ~InContext() = default;", "test_driver"),
    Mutation("GPU: loading breaks a capture", "csrc/cuda/driver.cpp", "  const RelaxedCapture relaxed(s.driver);\n  Result", "  Result", "test_driver"),
    Mutation("GPU: loading a kernel breaks a capture", "csrc/cuda/driver.cpp", "  const RelaxedCapture relaxed(s.driver);\n  CudaKernel", "  CudaKernel", "test_driver"),
    Mutation("GPU: the image loaded for each device", "csrc/cuda/driver.cpp", "if (s.library == nullptr) {", "if (true) {", "test_driver"),
    Mutation("GPU: a lasting refusal asked for again", "csrc/cuda/driver.cpp", "if (known == s.refusals.end()) known", "known", "test_driver"),
    Mutation("GPU: what an old driver lacks not noticed", "csrc/cuda/driver.cpp", "  if (!why_not.empty()) return why_not;\n", "", "test_driver"),
    Mutation("GPU: a refused call not left to Python", "csrc/cuda/reparam_cuda.cpp", "if (cuda_refusal(device) == nullptr) return", "if (cuda_refusal(device) != nullptr || true) return", "test_driver"),
    Mutation("GPU: another op's kernel", "csrc/cuda/launch.cpp", '"kl_divergence", "kl_divergence_backward", "samples', '"kl_divergence_backward", "kl_divergence", "samples', "test_gpu", "cuda"),
    Mutation("GPU: captured state read at capture", "csrc/cuda/kernels.cuh", "if (source.captured_seed != nullptr) {", "if (false) {", "test_gpu", "cuda"),
    Mutation("GPU: slices of many dimensions all alike", "csrc/cuda/launch.cpp", "part.first_index = p.first_index + i * p.index_strides[0];", "part.first_index = p.first_index;", "test_gpu", "cuda"),
    Mutation("GPU: slices of many dimensions with one key", "csrc/cuda/launch.cpp", "part.keys = p.keys + i * p.key_strides[0];", "part.keys = p.keys;", "test_gpu", "cuda"),
    Mutation("GPU: slices of many dimensions in segments too long", "csrc/cuda/launch.cpp", "    if (p.outer_ndim == 0) part.segment_numel = sizes[0] * within;\n", "", "test_gpu", "cuda"),
    Mutation("GPU: a draw in many dimensions in its own key", "csrc/cuda/launch.cpp", "  launch_at(op, dtype, first, generator, device, stream);\n", "", "test_gpu", "cuda"),
    Mutation("GPU: device of the scale unchecked", "csrc/call.h", "if (!x.on_device_of(scale)) refuse(", "if (false) refuse(", "test_gpu", "cuda"),
    Mutation("GPU: device of the key unchecked", "csrc/call.h", "key_->on_device_of(device_) && ", "", "test_gpu", "cuda"),
    Mutation("GPU: first child", "csrc/cuda/keys.cuh", "first + static_cast<uint64_t>(child)", "static_cast<uint64_t>(child)", "test_keys", "cuda"),
    Mutation("GPU: one key for all numbers", "csrc/cuda/keys.cuh", "write_child(keys + i * key_stride,", "write_child(keys + i * 2,", "test_keys", "cuda"),
    Mutation("GPU: noise of two filled operands", "reparam_fused/random.py", "return _ops.noise(key, size, dtype, global_shape, global_offset)", "zero = torch.full((), -0.0, dtype=dtype, device=key.device).expand(size)\n    return _ops.sample_from_key(zero, torch.ones_like(zero), key, 'std', global_shape, global_offset)", "test_gpu", "cuda"),
    Mutation("GPU: offset not advanced", "reparam_fused/_draw.py", "generator.philox_state(4 * blocks)", "generator.philox_state(0)", "test_gpu", "cuda"),
    Mutation("GPU: generator of the first device", "reparam_fused/_draw.py", "torch.cuda.default_generators[device.index]", "torch.cuda.default_generators[0]", "test_gpu", "cuda"),
    Mutation("GPU: generator ignored", "reparam_fused/_draw.py", "generator = generator or torch.cuda", "generator = torch.cuda", "test_gpu", "cuda"),
    Mutation("GPU: a failed draw not taken back", "reparam_fused/_draw.py", "            generator.set_offset(before)\n        raise", "            pass\n        raise", "test_gpu", "cuda"),
    Mutation("GPU: the key drawn by a kernel of its own", "reparam_fused/_ops.py", 'library.impl("sample", _sample_on_cuda, "CUDA")', "pass", "test_gpu", "cuda"),
    Mutation("GPU: a number waited for", "reparam_fused/_call.py", "return torch.ones((), dtype=scale.dtype, device=mu.device) * scale", "return scale.to(mu.device)", "test_gpu", "cuda"),
    Mutation("GPU: draws of the library under Triton", "csrc/cuda/driver.cpp", "  s.why_not = why_not;\n", "  s.why_not.clear();\n", "test_gpu", "triton"),
    Mutation("GPU: Triton's device", "reparam_fused/triton_kernels.py", "nullcontext() if on_cpu else torch.get_device_module(device).device(device)", "nullcontext()", "test_gpu", "triton"),
    Mutation("GPU: Triton's operands of two devices", "reparam_fused/triton_kernels.py", "    if x.device != scale.device:\n", "    if False:\n", "test_gpu", "triton"),
    Mutation("GPU: Triton's key of another device", "reparam_fused/triton_kernels.py", " or key.device != device", "", "test_gpu", "triton"),
    Mutation("GPU: Triton's draw moves nothing", "reparam_fused/_draw.py", "generator.philox_state(4 * blocks)", "generator.philox_state(0)", "test_gpu", "triton"),
    Mutation("GPU: Triton's failed draw not taken back", "reparam_fused/_draw.py", "            generator.set_offset(before)\n        raise", "            pass\n        raise", "test_gpu", "triton"),
    Mutation("GPU: Triton's int64 keys refused", "reparam_fused/_ops.py", "        key.dtype in KEY_DTYPES\n        and key.layout", "        key.dtype == torch.uint64\n        and key.layout", "test_keys", "triton"),
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
LEFT_OUT = {"test_mutations", "test_install", "test_machine_code", "test_ptx", "test_mutate_ptx"}
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
