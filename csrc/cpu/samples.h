#pragma once

#include "rows.h"

// K samples of each element. For a block, what does not depend on the noise is made once, in the
// registers' type, and each sample then takes the noise and little else.

namespace reparam_fused {

template <class V, class T>
void run_samples(const Problem& p, int64_t begin, int64_t end) {
  using S = typename BlockNoise<V, T>::S;
  Rows<V, T> in[2], out;
  BlockNoise<V, T> noise;
  alignas(64) S mu[kPadded<V, T>], sigma[kPadded<V, T>];
  S* const moments[] = {mu, sigma};
  int64_t unit = 0;
  for (int k = 0; k < 2; ++k) in[k].open(p, p.operands[k], p.operand_strides[k], unit);
  out.open(p, p.results[0], p.result_strides[0], unit);
  while (begin < end) {
    const int64_t count = block_length<V, T>(p, begin, end, unit, true, false);
    const bool whole = count % BlockNoise<V, T>::kTile == 0;
    compute<ByForm<Moments>>(p, noise, count, whole, moments, in[0].load(begin, count, whole),
                             in[1].load(begin, count, whole));
    for (int64_t sample = 0; sample < p.samples; ++sample) {
      const int64_t start = sample * p.sample_stride;
      T* const z = out.find(begin, count, whole, start);
      Wanted<V> wanted;
      wanted.add(z);
      noise.start(p, sample, begin, count, wanted);
      // Std: sigma as it is
      compute<ForAll<Sample<Std>>>(p, noise, count, whole, &z, static_cast<const S*>(mu),
                                   static_cast<const S*>(sigma));
      out.store(z, begin, count, start);
    }
    begin += count;
  }
}

template <class V, class T>
void run_samples_backward(const Problem& p, int64_t begin, int64_t end) {
  using S = typename BlockNoise<V, T>::S;
  Rows<V, T> grad_z, scale, out[2];
  BlockNoise<V, T> noise;
  alignas(64) S grad_mu[kPadded<V, T>], grad_sigma[kPadded<V, T>];
  S* const sums[] = {grad_mu, grad_sigma};
  int64_t unit = 0;
  grad_z.open(p, p.operands[0], p.operand_strides[0], unit);
  scale.open(p, p.operands[1], p.operand_strides[1], unit);
  for (int k = 0; k < 2; ++k) out[k].open(p, p.results[k], p.result_strides[k], unit);
  while (begin < end) {
    const int64_t count = block_length<V, T>(p, begin, end, unit, true, false);
    const bool whole = count % BlockNoise<V, T>::kTile == 0;
    for (S* const sum : sums) std::memset(sum, 0, (count + BlockNoise<V, T>::kTile) * sizeof(S));
    for (int64_t sample = 0; sample < p.samples; ++sample) {
      const T* const grads = grad_z.load(begin, count, whole, sample * p.sample_stride);
      Wanted<V> wanted;
      wanted.add(grads);
      noise.start(p, sample, begin, count, wanted);
      compute<ForAll<AddSample>>(p, noise, count, whole, sums, grads,
                                 static_cast<const S*>(grad_mu), static_cast<const S*>(grad_sigma));
    }
    T* const results[] = {out[0].find(begin, count, whole), out[1].find(begin, count, whole)};
    compute<ByForm<Gradients>>(p, noise, count, whole, results, static_cast<const S*>(grad_mu),
                               static_cast<const S*>(grad_sigma), scale.load(begin, count, whole));
    for (int k = 0; k < 2; ++k) out[k].store(results[k], begin, count);
    begin += count;
  }
}

}  // namespace reparam_fused
