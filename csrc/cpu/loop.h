#pragma once

#include "../common/kl_divergence.h"
#include "../common/scalar.h"
#include "derive.h"
#include "head.h"
#include "kernels.h"
#include "rows.h"
#include "samples.h"

#include <utility>

// The one loop over elements. It is included by one file for each ISA, under
// that ISA's target pragmas: everything here is a template over the lane type,
// so that no function compiled for one ISA can be linked into another's code.
//
// It goes by blocks that fit into the first cache. For each, an operand that does not lie in a row
// is copied into one, noise that no row of counters gives is drawn ahead, then there is nothing
// but rows to compute on, and a result goes the other way.

namespace reparam_fused {

template <class V, class T, class Compute, size_t... kIn>
REPARAM_FUSED_INLINE void run_blocks(const Problem& p, int64_t begin, int64_t end,
                                     std::index_sequence<kIn...>) {
  constexpr int kOperands = Compute::kOperands, kResults = Compute::kResults;
  Rows<V, T> in[kOperands > 0 ? kOperands : 1], out[kResults];
  BlockNoise<V, T> noise;
  int64_t unit = 0;
  for (int k = 0; k < kOperands; ++k) in[k].open(p, p.operands[k], p.operand_strides[k], unit);
  for (int k = 0; k < kResults; ++k) out[k].open(p, p.results[k], p.result_strides[k], unit);
  while (begin < end) {
    const int64_t count = block_length<V, T>(p, begin, end, unit, Compute::kDraws, true);
    // For a tile that lies over another its elements have to start a counter.
    using Noise = BlockNoise<V, T>;
    const bool whole = count >= Noise::kTile && count % Noise::kPerCounter == 0;
    const T* operands[kOperands + 1];
    T* results[kResults];
    Wanted<V> wanted;
    for (int k = 0; k < kOperands; ++k) wanted.add(operands[k] = in[k].load(begin, count, whole));
    for (int k = 0; k < kResults; ++k) wanted.add(results[k] = out[k].find(begin, count, whole));
    if constexpr (Compute::kDraws) noise.start(p, 0, begin, count, wanted);
    compute<Compute>(p, noise, count, whole, results, operands[kIn]...);
    for (int k = 0; k < kResults; ++k) out[k].store(results[k], begin, count);
    begin += count;
  }
}

template <class V, class T, class Compute>
void run_kernel(const Problem& p, int64_t begin, int64_t end) {
  run_blocks<V, T, Compute>(p, begin, end, std::make_index_sequence<Compute::kOperands>());
}

template <class V, class Compute>
constexpr KernelTable make_table() {
  return {{run_kernel<V, float, Compute>, run_kernel<V, double, Compute>,
           run_kernel<V, Half, Compute>, run_kernel<V, BFloat16, Compute>}};
}
template <class V>
constexpr KernelTable make_samples_table() {
  return {{run_samples<V, float>, run_samples<V, double>, run_samples<V, Half>,
           run_samples<V, BFloat16>}};
}
template <class V>
constexpr KernelTable make_samples_backward_table() {
  return {{run_samples_backward<V, float>, run_samples_backward<V, double>,
           run_samples_backward<V, Half>, run_samples_backward<V, BFloat16>}};
}
template <class V>
constexpr KernelTable make_head_table() {
  return {{run_head<V, float>, run_head<V, double>, run_head<V, Half>, run_head<V, BFloat16>}};
}
template <class V>
constexpr KernelTable make_head_backward_table() {
  return {{run_head_backward<V, float>, run_head_backward<V, double>, run_head_backward<V, Half>,
           run_head_backward<V, BFloat16>}};
}

template <class V>
constexpr Kernels make_kernels() {
  return {V::kName,
          make_table<V, ByForm<Sample>>(),
          make_table<V, ByForm<SampleBackward>>(),
          make_table<V, ForAll<Noise>>(),
          make_table<V, ByForm<KlDivergence>>(),
          make_table<V, ByForm<KlDivergenceBackward>>(),
          make_samples_table<V>(),
          make_samples_backward_table<V>(),
          make_head_table<V>(),
          make_head_backward_table<V>(),
          sum_chunks<V, float>,
          sum_chunks<V, double>,
          derive_children<V>,
          derive_folded<V>};
}

}  // namespace reparam_fused
