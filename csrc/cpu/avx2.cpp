#if defined(__x86_64__)
// Everything that other files could share comes before the target pragmas, so
// that no code compiled for this ISA can run where it is missing.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "avx2.h"
#include "loop.h"

namespace reparam_fused {
constexpr Kernels kAvx2Kernels = make_kernels<Avx2>();
}  // namespace reparam_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
