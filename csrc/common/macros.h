#pragma once

// The headers of this folder hold the noise contract, once, for the host and
// for the device. They are templates over a lane type V (see lane.md in the
// README of csrc): a vector register on the CPU, one value on a GPU.
#if defined(__CUDACC__)
#define REPARAM_FUSED_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define REPARAM_FUSED_INLINE __forceinline
#else
#define REPARAM_FUSED_INLINE inline __attribute__((always_inline))
#endif
