#pragma once

#include "../common/element.h"
#include "../common/scalar.h"
#include "root.h"

namespace reparam_fused {

// The lane type of one GPU thread: Scalar, with the device's own instructions
// where the compiler's would cost more, or might be contracted. Members as in
// scalar.h.
struct Thread : Scalar {
  static __device__ __forceinline__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ __forceinline__ F sub(F a, F b) { return __fsub_rn(a, b); }
  static __device__ __forceinline__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ F div(F a, F b) { return __fdiv_rn(a, b); }
  static __device__ __forceinline__ D fma(D a, D b, D c) { return __fma_rn(a, b, c); }
  static __device__ __forceinline__ D add(D a, D b) { return __dadd_rn(a, b); }
  static __device__ __forceinline__ D sub(D a, D b) { return __dsub_rn(a, b); }
  static __device__ __forceinline__ D mul(D a, D b) { return __dmul_rn(a, b); }
  static __device__ __forceinline__ D div(D a, D b) { return __ddiv_rn(a, b); }
  static __device__ __forceinline__ D sqrt(D a) { return __dsqrt_rn(a); }
  static __device__ __forceinline__ U sub(U a, U b) { return a - b; }
  static __device__ __forceinline__ Q sub(Q a, Q b) { return a - b; }
  static __device__ __forceinline__ Q add(Q a, Q b) { return a + b; }

  // For a in [2^-60, 2^60]: a radius is at least 2^-30.
  static __device__ __forceinline__ F sqrt(F a) {
    F estimate;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(a));
    return root<Thread>(a, estimate);
  }

  static __device__ __forceinline__ F clamp(F x, F limit) {
    F y;
#if __CUDA_ARCH__ >= 860
    asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
#else
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(-limit));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(limit));
#endif
    return y;
  }
  static __device__ __forceinline__ D clamp(D x, D limit) { return Scalar::clamp(x, limit); }
  static __device__ __forceinline__ F at_least(F x, F low) {
    F y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low_bound(low)));
    return y;
  }
  static __device__ __forceinline__ D at_least(D x, D low) { return Scalar::at_least(x, low); }
  static __device__ __forceinline__ F at_most(F x, F high) {
    F y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(high_bound(high)));
    return y;
  }
  static __device__ __forceinline__ D at_most(D x, D high) { return Scalar::at_most(x, high); }

  // A 64-bit product here costs some 20 more instructions a counter.
  static __device__ __forceinline__ void mulhilo(U a, uint32_t m, U& high, U& low) {
    high = __umulhi(a, m);
    low = a * m;
  }

  // A word of two half-type elements, the first of them in its low half.
  static __device__ __forceinline__ void unpack(const BFloat16*, U word, F& first, F& second) {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ void unpack(const Half*, U word, F& first, F& second) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(first), "=f"(second)
        : "r"(word));
  }
  static __device__ __forceinline__ U pack(BFloat16*, F first, F second) {
    U word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
  }
  static __device__ __forceinline__ U pack(Half*, F first, F second) {
    U word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
  }

  // One element. __ldg, also of keys, is for memory that nobody writes while the kernel runs:
  // right as long as a kernel begins after those before it have ended, and wrong from the day
  // that these are launched to overlap with them (programmatic dependent launch).
  static __device__ __forceinline__ F load(const float* p) { return __ldg(p); }
  static __device__ __forceinline__ D load(const double* p) { return __ldg(p); }
  template <class T>
  static __device__ __forceinline__ F load(const T* p) {
    F x, unused;
    unpack(p, __ldg(&p->bits), x, unused);
    return x;
  }
  static __device__ __forceinline__ void store(float* p, F x) { *p = x; }
  static __device__ __forceinline__ void store(double* p, D x) { *p = x; }
  template <class T>
  static __device__ __forceinline__ void store(T* p, F x) {
    p->bits = static_cast<uint16_t>(pack(p, x, x));
  }

  // The 16 bytes of a vector. A plain load: ptxas may not move it past a store, where it
  // would sink one of read-only memory (__ldg) to its use, and let a thread wait for half as
  // many at a time (test_machine_code.py).
  static __device__ __forceinline__ uint4 load_vector(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
  }
  // One element all along a vector
  static __device__ __forceinline__ uint4 load_repeated(const float* p) {
    const U word = __ldg(reinterpret_cast<const U*>(p));
    return make_uint4(word, word, word, word);
  }
  static __device__ __forceinline__ uint4 load_repeated(const double* p) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(p));
    return make_uint4(words.x, words.y, words.x, words.y);
  }
  template <class T>
  static __device__ __forceinline__ uint4 load_repeated(const T* p) {
    const U word = __ldg(&p->bits) * 0x10001u;
    return make_uint4(word, word, word, word);
  }
  static __device__ __forceinline__ void unpack(const float*, uint4 v, F (&x)[4]) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ void unpack(const double*, uint4 v, D (&x)[2]) {
    x[0] = __hiloint2double(v.y, v.x);
    x[1] = __hiloint2double(v.w, v.z);
  }
  template <class T>
  static __device__ __forceinline__ void unpack(const T* type, uint4 v, F (&x)[8]) {
    unpack(type, v.x, x[0], x[1]);
    unpack(type, v.y, x[2], x[3]);
    unpack(type, v.z, x[4], x[5]);
    unpack(type, v.w, x[6], x[7]);
  }
  static __device__ __forceinline__ uint4 pack(float*, const F (&x)[4]) {
    return make_uint4(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
  }
  static __device__ __forceinline__ uint4 pack(double*, const D (&x)[2]) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]),
                      __double2hiint(x[1]));
  }
  template <class T>
  static __device__ __forceinline__ uint4 pack(T* type, const F (&x)[8]) {
    return make_uint4(pack(type, x[0], x[1]), pack(type, x[2], x[3]), pack(type, x[4], x[5]),
                      pack(type, x[6], x[7]));
  }
};

}  // namespace reparam_fused
