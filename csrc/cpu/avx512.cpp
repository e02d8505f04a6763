#if defined(__x86_64__)
// Everything that other files could share comes before the target pragmas, so
// that no code compiled for this ISA can run where it is missing.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC takes its own intrinsics' undefined operands for ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

#include "avx512.h"
#include "loop.h"

namespace reparam_fused {
constexpr Kernels kAvx512Kernels = make_kernels<Avx512>();
}  // namespace reparam_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
