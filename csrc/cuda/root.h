#pragma once

#include "../common/macros.h"

namespace reparam_fused {

// sqrt(a) from an estimate of 1 / sqrt(a): one Newton step on a fused remainder, as
// ptxas takes it for sqrt.rn from the same instruction (test_machine_code.py), but
// without the slow path for what lies outside [2^-60, 2^60]. Correctly rounded there
// for every estimate within 2^-22.9, the promise of the PTX ISA for rsqrt.approx, but
// for two of some 50 million pairs (test_numerics.py), which sqrt.rn rules out.
template <class V>
REPARAM_FUSED_INLINE typename V::F root(typename V::F a, typename V::F estimate) {
  const auto s = V::mul(a, estimate);
  const auto remainder = V::fma(-s, s, a);
  return V::fma(remainder, V::mul(estimate, V::set(0.5f)), s);
}

}  // namespace reparam_fused
