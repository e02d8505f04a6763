#include "kernels.cuh"
#include "keys.cuh"

// All kernels there are, compiled to data that launch.cpp loads by the driver: each by its name,
// of what it computes, of what, with whose key and how the elements lie, as in
// sample_log_var_float32_generator_rows32.

namespace reparam_fused {

#define REPARAM_FUSED_KERNEL(name) extern "C" __global__ void __launch_bounds__(kBlock) name

#define REPARAM_FUSED_CUT(name, Op, T, Source, Index, bits)                                        \
  REPARAM_FUSED_KERNEL(name##_rows##bits)(const T* __restrict__ x, const T* __restrict__ scale,    \
                                          T* __restrict__ out, Index vectors,                      \
                                          Layout<Index> layout, Source source) {                   \
    rows<Op>(x, scale, out, vectors, layout, source);                                              \
  }                                                                                                \
  REPARAM_FUSED_KERNEL(name##_elements##bits)(                                                     \
      const T* __restrict__ x, const T* __restrict__ scale, T* __restrict__ out, Index counters,   \
      Layout<Index> layout, Index segment_numel, Divisor<Index> segment_counters, Source source) { \
    elements<Op>(x, scale, out, counters, layout, segment_numel, segment_counters, source);        \
  }

// Indices of `whole` are 64-bit: on sm_90 32-bit ones save 0.1 instructions an element.
#define REPARAM_FUSED_OF_TYPE(name, Op, T, Source)                                             \
  REPARAM_FUSED_KERNEL(name##_whole)(const T* __restrict__ x, const T* __restrict__ scale,     \
                                     T* __restrict__ out, int64_t numel, uint32_t full_blocks, \
                                     Source source) {                                          \
    whole<Op>(x, scale, out, numel, full_blocks, source);                                      \
  }                                                                                            \
  REPARAM_FUSED_CUT(name, Op, T, Source, uint32_t, 32)                                         \
  REPARAM_FUSED_CUT(name, Op, T, Source, uint64_t, 64)

#define REPARAM_FUSED_KERNELS(op, Op, by, Source)             \
  REPARAM_FUSED_OF_TYPE(op##_float32##by, Op, float, Source)  \
  REPARAM_FUSED_OF_TYPE(op##_float64##by, Op, double, Source) \
  REPARAM_FUSED_OF_TYPE(op##_float16##by, Op, Half, Source)   \
  REPARAM_FUSED_OF_TYPE(op##_bfloat16##by, Op, BFloat16, Source)

#define REPARAM_FUSED_FORM(form, Form)                                      \
  REPARAM_FUSED_KERNELS(sample_##form, Sample<Form>, _key, KeyTensor)       \
  REPARAM_FUSED_KERNELS(sample_##form, Sample<Form>, _generator, Generator) \
  REPARAM_FUSED_KERNELS(sample_backward_##form, SampleBackward<Form>, _key, KeyTensor)

// The table
static_assert(Forms::kSize == 2, "a form has a line here");
REPARAM_FUSED_FORM(log_var, LogVar)
REPARAM_FUSED_FORM(std, Std)
REPARAM_FUSED_KERNELS(noise, Noise, _key, KeyTensor)
REPARAM_FUSED_KERNELS(kl_divergence, KlDivergence, , NoKey)
REPARAM_FUSED_KERNELS(kl_divergence_backward, KlDivergenceBackward, , NoKey)

REPARAM_FUSED_KERNEL(child_keys)(const uint64_t* __restrict__ keys, int64_t n, uint64_t first,
                                 int64_t total, uint4* __restrict__ out) {
  write_children(keys, n, first, total, out);
}
REPARAM_FUSED_KERNEL(fold_in)(const uint64_t* __restrict__ keys, int64_t key_stride,
                              const uint64_t* __restrict__ data, int64_t data_stride, int64_t n,
                              uint4* __restrict__ out) {
  write_folded(keys, key_stride, data, data_stride, n, out);
}

}  // namespace reparam_fused
