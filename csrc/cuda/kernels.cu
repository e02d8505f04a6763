#include "head.cuh"
#include "kernels.cuh"
#include "keys.cuh"

// All kernels there are, compiled to data that launch.cpp loads by the driver: each by its name,
// of what it computes, of what, with whose key and how the elements lie, as in
// sample_log_var_float32_generator_rows.

namespace reparam_fused {

#define REPARAM_FUSED_KERNEL(name) extern "C" __global__ void __launch_bounds__(kBlock) name
#define REPARAM_FUSED_CUT(name, Limits) \
  extern "C" __global__ void __launch_bounds__(kBlock, kCutBlocks<Limits>) name
#define REPARAM_FUSED_POINTERS(T) \
  const T* __restrict__ x, const T* __restrict__ scale, T* __restrict__ out
#define REPARAM_FUSED_SEGMENTS \
  Layout layout, int64_t first_index, uint32_t segment_numel, Divisor segment_counters
template <class T>
using AnyScaleOf = AnyScale<typename Element<Thread, T>::Register>;
template <class T>
using LimitsOf = Limits<typename Element<Thread, T>::Register>;
template <class T>
using UnboundedOf = Unbounded;

// Indices of `whole` are 64-bit: on sm_90 32-bit ones save 0.1 instructions an element.
#define REPARAM_FUSED_WHOLE_OF(T, name, Op, Source, LimitsOf)                                   \
  REPARAM_FUSED_KERNEL(name##_whole)(REPARAM_FUSED_POINTERS(T), int64_t numel,                  \
                                     uint32_t full_blocks, Source source, LimitsOf<T> limits) { \
    whole<Op>(x, scale, out, numel, full_blocks, source, limits);                               \
  }
#define REPARAM_FUSED_ROWS_OF(T, name, Op, Source, LimitsOf)                                      \
  REPARAM_FUSED_CUT(name##_rows, LimitsOf<T>)(REPARAM_FUSED_POINTERS(T), uint32_t vectors,        \
                                              Layout layout, Source source, LimitsOf<T> limits) { \
    rows<Op>(x, scale, out, vectors, layout, source, limits);                                     \
  }
#define REPARAM_FUSED_ELEMENTS_OF(T, name, Op, Source)                                          \
  REPARAM_FUSED_CUT(name##_elements, Unbounded)(REPARAM_FUSED_POINTERS(T), uint32_t counters,   \
                                                REPARAM_FUSED_SEGMENTS, Source source,          \
                                                AnyScaleOf<T> any) {                            \
    elements<Op>(x, scale, out, counters, layout, first_index, segment_numel, segment_counters, \
                 source, any);                                                                  \
  }
#define REPARAM_FUSED_SAMPLES_OF(T, name, Source)                                                \
  REPARAM_FUSED_KERNEL(name)(REPARAM_FUSED_POINTERS(T), uint32_t groups, REPARAM_FUSED_SEGMENTS, \
                             Source source, AnyScaleOf<T> any, Samples samples) {                \
    draw_samples(x, scale, out, groups, layout, first_index, segment_numel, segment_counters,    \
                 source, any, samples);                                                          \
  }
#define REPARAM_FUSED_SUMS_OF(T, name, Source)                                         \
  REPARAM_FUSED_KERNEL(name)(REPARAM_FUSED_POINTERS(T), T* __restrict__ grad_scale,    \
                             uint32_t groups, REPARAM_FUSED_SEGMENTS, Source source,   \
                             AnyScaleOf<T> any, Samples samples) {                     \
    sum_samples(x, scale, out, grad_scale, groups, layout, first_index, segment_numel, \
                segment_counters, source, any, samples);                               \
  }

#define REPARAM_FUSED_TYPES(each, op, by, ...)                                           \
  each(float, op##_float32##by, __VA_ARGS__) each(double, op##_float64##by, __VA_ARGS__) \
      each(Half, op##_float16##by, __VA_ARGS__) each(BFloat16, op##_bfloat16##by, __VA_ARGS__)
#define REPARAM_FUSED_ROWS(op, by, ...) \
  REPARAM_FUSED_TYPES(REPARAM_FUSED_ROWS_OF, op, by, __VA_ARGS__)
#define REPARAM_FUSED_VECTORS(op, by, ...)                         \
  REPARAM_FUSED_TYPES(REPARAM_FUSED_WHOLE_OF, op, by, __VA_ARGS__) \
  REPARAM_FUSED_ROWS(op, by, __VA_ARGS__)
#define REPARAM_FUSED_ELEMENTS(op, by, ...) \
  REPARAM_FUSED_TYPES(REPARAM_FUSED_ELEMENTS_OF, op, by, __VA_ARGS__)

#define REPARAM_FUSED_WITHIN(form, Form, LimitsOf)                                    \
  REPARAM_FUSED_VECTORS(sample_##form, _key, Sample<Form>, KeyTensor, LimitsOf)       \
  REPARAM_FUSED_VECTORS(sample_##form, _generator, Sample<Form>, Generator, LimitsOf) \
  REPARAM_FUSED_VECTORS(sample_backward_##form, _key, SampleBackward<Form>, KeyTensor, LimitsOf)
// The divergence is the code of two where it is not of a logarithm: nearly all of the file, in
// `whole`.
#define REPARAM_FUSED_KL(each, form, Form, LimitsOf)                \
  each(kl_divergence_##form, , KlDivergence<Form>, NoKey, LimitsOf) \
      each(kl_divergence_backward_##form, , KlDivergenceBackward<Form>, NoKey, LimitsOf)
#define REPARAM_FUSED_FORM(form, Form)                 \
  REPARAM_FUSED_WITHIN(form, Form, UnboundedOf)        \
  REPARAM_FUSED_WITHIN(bounded_##form, Form, LimitsOf) \
  REPARAM_FUSED_KL(REPARAM_FUSED_ROWS, bounded_##form, Form, LimitsOf)

// The table
static_assert(Forms::kSize == 4, "a form has a line here");
REPARAM_FUSED_FORM(log_var, LogVar)
REPARAM_FUSED_FORM(std, Std)
REPARAM_FUSED_FORM(log_std, LogStd)
REPARAM_FUSED_FORM(rho, Rho)
REPARAM_FUSED_KL(REPARAM_FUSED_VECTORS, log_var, LogVar, UnboundedOf)
REPARAM_FUSED_KL(REPARAM_FUSED_ROWS, log_std, LogStd, UnboundedOf)
REPARAM_FUSED_KL(REPARAM_FUSED_ROWS, std, Std, UnboundedOf)
REPARAM_FUSED_KL(REPARAM_FUSED_ROWS, rho, Rho, UnboundedOf)
REPARAM_FUSED_VECTORS(noise, _key, Noise, KeyTensor, UnboundedOf)
// Of every form
REPARAM_FUSED_ELEMENTS(sample, _key, AnyForm<Sample>, KeyTensor)
REPARAM_FUSED_ELEMENTS(sample, _generator, AnyForm<Sample>, Generator)
REPARAM_FUSED_ELEMENTS(sample_backward, _key, AnyForm<SampleBackward>, KeyTensor)
REPARAM_FUSED_ELEMENTS(noise, _key, Noise, KeyTensor)
REPARAM_FUSED_ELEMENTS(kl_divergence, , AnyForm<KlDivergence>, NoKey)
REPARAM_FUSED_ELEMENTS(kl_divergence_backward, , AnyForm<KlDivergenceBackward>, NoKey)
REPARAM_FUSED_TYPES(REPARAM_FUSED_SAMPLES_OF, samples, _key, KeyTensor)
REPARAM_FUSED_TYPES(REPARAM_FUSED_SAMPLES_OF, samples, _generator, Generator)
REPARAM_FUSED_TYPES(REPARAM_FUSED_SUMS_OF, samples_backward, _key, KeyTensor)

// So many blocks fit on a multiprocessor: told of none, ptxas saves registers for more, and spills.
#define REPARAM_FUSED_HEAD_BACKWARD_OF(T, name, function)                                  \
  extern "C" __global__ void __launch_bounds__(kBlock, 5) name(Head<RegisterOf<T>> head) { \
    function<T>(head);                                                                     \
  }
#define REPARAM_FUSED_HEAD_OF(T, name, function) \
  REPARAM_FUSED_KERNEL(name)(Head<RegisterOf<T>> head) { function<T>(head); }
#define REPARAM_FUSED_KL_HEAD(each, op, function)                        \
  each(float, op##_float32, function) each(Half, op##_float16, function) \
      each(BFloat16, op##_bfloat16, function)
REPARAM_FUSED_TYPES(REPARAM_FUSED_HEAD_OF, head, , any_head)
REPARAM_FUSED_TYPES(REPARAM_FUSED_HEAD_BACKWARD_OF, head_backward, , any_head_backward)
REPARAM_FUSED_KL_HEAD(REPARAM_FUSED_HEAD_OF, head_kl_log_var, kl_head)
REPARAM_FUSED_KL_HEAD(REPARAM_FUSED_HEAD_OF, head_backward_kl_log_var, kl_head_backward)
REPARAM_FUSED_KERNEL(sum_float32)(const float* __restrict__ terms, float* __restrict__ out,
                                  Rows rows) {
  sum_chunks(terms, out, rows);
}
REPARAM_FUSED_KERNEL(sum_float64)(const double* __restrict__ terms, double* __restrict__ out,
                                  Rows rows) {
  sum_chunks(terms, out, rows);
}

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
