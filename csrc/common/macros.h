#pragma once

// The headers of this folder hold the noise contract, once, for the host and
// for the device. They are templates over a lane type V: a vector register on
// the CPU, one value on a GPU (scalar.h says what such a type has).
#if defined(__CUDACC__)
#define REPARAM_FUSED_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define REPARAM_FUSED_INLINE __forceinline
#define REPARAM_FUSED_NOINLINE __declspec(noinline)
#define REPARAM_FUSED_PREFETCH(address) static_cast<void>(address)
#else
#define REPARAM_FUSED_INLINE inline __attribute__((always_inline))
#define REPARAM_FUSED_NOINLINE __attribute__((noinline))
#define REPARAM_FUSED_PREFETCH(address) __builtin_prefetch(address)
#endif
