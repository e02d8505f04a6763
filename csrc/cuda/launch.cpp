#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "../common/forms.h"
#include "enqueue.h"

namespace reparam_fused {
namespace {

// Below so many full blocks a thread takes one vector, and waits for its memory once and not
// four times: there are then too few blocks to hide it, less than 31 for each of the 132
// multiprocessors of an H200. It takes 12 more instructions an element in float32 and 6 in the
// half types, on sm_90. Of 4M elements in float32, forward and backward, an H200 takes 1.03 and
// 1.05 of torch.add's time with it, 1.14 and 1.24 without (benchmarks/gpu_report.md); in
// bfloat16 it makes no difference there.
constexpr int64_t kFewBlocks = 4096;

enum Kind { kWhole, kRows, kElements, kSamples, kKinds };

bool draws(Op op) { return op != kKlDivergence && op != kKlDivergenceBackward; }

// A kernel as kernels.cu names it
struct Name {
  Op op;
  DType dtype;
  Form form;
  bool bounded, generator;

  CudaKernel find(Kind kind, int device) const {
    // Each is looked up once. Two threads that do so at a time find the same.
    static std::atomic<CudaKernel> known[kOps][kDTypes][form_count()][2][2][kKinds];
    std::atomic<CudaKernel>& kernel = known[op][dtype][form][bounded][generator][kind];
    if (kernel == nullptr) kernel = find_cuda_kernel(text(kind), device);
    return kernel;
  }

 private:
  std::string text(Kind kind) const {
    constexpr const char* kOpNames[] = {
        "sample",        "sample_backward",        "noise",
        "kl_divergence", "kl_divergence_backward", "samples_backward"};
    constexpr const char* kKindNames[] = {"_whole", "_rows", "_elements", ""};
    std::string name = kind == kSamples && op == kSample ? "samples" : kOpNames[op];
    // The other kinds are of every form, within bounds or not.
    if (op != kNoise && (kind == kWhole || kind == kRows)) {
      name += std::string(bounded ? "_bounded_" : "_") + form_name(form);
    }
    name += std::string("_") + kDTypeNames[dtype];
    if (draws(op)) name += generator ? "_generator" : "_key";
    return name + kKindNames[kind];
  }
};

// Whether the elements are drawn more than once, or not at all
bool has_samples(Op op, const Problem& p) { return op == kSamplesBackward || p.samples != 1; }

// Whether the elements of each counter lie in a row of memory, in the tensor that has the samples
bool samples_lie_in_rows(Op op, const Problem& p, int64_t bytes, int64_t per_counter) {
  const bool summed = op == kSamplesBackward;
  const void* data = summed ? p.operands[0] : p.results[0];
  const int64_t* strides = summed ? p.operand_strides[0] : p.result_strides[0];
  const int inner = p.ndim - 1;
  bool fits = reinterpret_cast<uintptr_t>(data) % (per_counter * bytes) == 0 &&
              strides[inner] == 1 && p.sizes[inner] % per_counter == 0 &&
              p.segment_numel % per_counter == 0 && p.sample_stride % per_counter == 0;
  for (int d = 0; d < inner; ++d) fits = fits && strides[d] % per_counter == 0;
  return fits;
}

// Form and bounds, and whether a gradient depends on the scale
template <class R>
AnyScale<R> scale_of(const Problem& p) {
  AnyScale<R> scale = any_scale<R>(p.form, p.bounds);
  scale.read = scale.bounded || form_backward_reads(p.form);
  return scale;
}

struct Launch {
  const Problem& problem;
  Name name;
  int device;
  CudaStream stream;
  int64_t bytes, per_vector, per_counter;

  // Every kernel takes the tensors first and what follows from the problem last. One that takes
  // less of the latter reads no further.
  template <class... Arguments>
  void enqueue(Kind kind, int64_t threads, Arguments... arguments) const {
    if (name.dtype == kDouble) {
      enqueue_with(scale_of<double>(problem), kind, threads, arguments...);
    } else {
      enqueue_with(scale_of<float>(problem), kind, threads, arguments...);
    }
  }

 private:
  template <class Scale, class... Arguments>
  void enqueue_with(const Scale& any, Kind kind, int64_t threads, Arguments... arguments) const {
    const Problem& p = problem;
    const CudaKernel kernel = name.find(kind, device);
    const Samples samples{p.samples, p.sample_stride * bytes, p.sample_index_stride,
                          p.sample_key_stride,
                          kind == kSamples && samples_lie_in_rows(name.op, p, bytes, per_counter)};
    if (name.op == kSamplesBackward) {
      return enqueue_kernel(kernel, threads, device, stream, p.operands[0], p.operands[1],
                            p.results[0], p.results[1], arguments..., any, samples);
    }
    enqueue_kernel(kernel, threads, device, stream, p.operands[0], p.operands[1], p.results[0],
                   arguments..., any, samples);
  }
};

// Of elements, or of vectors of `unit` along the innermost dimension, with places in bytes. Noise
// is counted in units of `index_unit`: elements, or counters with every vector.
Layout make_layout(const Problem& p, int64_t bytes, int64_t unit, int64_t index_unit) {
  Layout layout{};
  layout.ndim = p.ndim;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = p.ndim - 1 - d;
    const int64_t inner = d == 0 ? unit : 1;
    layout.dimensions[d] = {Divisor(static_cast<uint32_t>(p.sizes[from] / inner)),
                            Stride(p.operand_strides[0][from] * inner * bytes),
                            Stride(p.operand_strides[1][from] * inner * bytes),
                            Stride(p.result_strides[0][from] * inner * bytes),
                            Stride(p.index_strides[from] * inner / index_unit),
                            Stride(p.key_strides[from])};
  }
  return layout;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// Every segment begins with a counter.
bool begins_with_counters(const Problem& p, int64_t per_counter) {
  bool begins = p.first_index % per_counter == 0;
  for (int d = 0; d < p.outer_ndim; ++d) {
    begins = begins && p.index_strides[d] % per_counter == 0;
  }
  return begins;
}

// Every run along the innermost dimension, the last in the table, is one of whole 16-byte vectors.
bool runs_of_vectors(const void* operand, const int64_t* strides, int ndim, int64_t per_vector) {
  bool fits = aligned(operand) && strides[ndim - 1] == 1;
  for (int d = 0; d < ndim - 1; ++d) fits = fits && strides[d] % per_vector == 0;
  return fits;
}
bool one_element_or_vectors(const void* operand, const int64_t* strides, int ndim,
                            int64_t per_vector) {
  return strides[ndim - 1] == 0 || runs_of_vectors(operand, strides, ndim, per_vector);
}

// The same of operands, which may be one element all along a run, output and counters
bool runs_of_vectors(const Problem& p, int64_t per_vector, int64_t per_counter) {
  const int inner = p.ndim - 1;
  bool fits = p.index_strides[inner] == 1 && p.sizes[inner] % per_vector == 0 &&
              p.first_index % per_counter == 0;
  for (int d = 0; d < inner; ++d) fits = fits && p.index_strides[d] % per_counter == 0;
  return fits && one_element_or_vectors(p.operands[0], p.operand_strides[0], p.ndim, per_vector) &&
         one_element_or_vectors(p.operands[1], p.operand_strides[1], p.ndim, per_vector) &&
         runs_of_vectors(p.results[0], p.result_strides[0], p.ndim, per_vector);
}

bool is_whole(Op op, DType dtype, const Problem& p) {
  // The divergence has such a kernel of a log_var alone.
  if (!draws(op) && (p.bounds != nullptr || p.form != kLogVar)) return false;
  return !has_samples(op, p) && p.ndim == 1 && p.operand_strides[0][0] == 1 &&
         p.operand_strides[1][0] == 1 && p.result_strides[0][0] == 1 && p.outer_ndim == 0 &&
         p.first_index % counter_of(dtype) == 0 && aligned(p.operands[0]) &&
         aligned(p.operands[1]) && aligned(p.results[0]);
}

// The source of the noise of a tensor that begins with this counter
KeyTensor from(KeyTensor source, uint64_t counter) { return {source.keys, counter}; }
template <class Source>
Source from(Source source, uint64_t) {
  return source;
}

template <class Source>
void launch_from(const Source& source, const Launch& launch) {
  const Problem& p = launch.problem;
  const int64_t per_vector = launch.per_vector, per_counter = launch.per_counter;
  const int64_t numel = numel_of(p), bytes = launch.bytes;
  const auto first_counter = static_cast<uint64_t>(p.first_index / per_counter);
  const bool has_samples = reparam_fused::has_samples(launch.name.op, p);
  if (numel == 0) return;
  if (is_whole(launch.name.op, launch.name.dtype, p)) {
    constexpr int64_t kVectors = kBlock * kVectorsPerThread;
    const int64_t vectors = numel / per_vector;
    const int64_t full_blocks = vectors < kFewBlocks * kVectors ? 0 : vectors / kVectors;
    const int64_t rest =
        vectors - full_blocks * kVectors + (numel % per_vector + per_counter - 1) / per_counter;
    return launch.enqueue(kWhole, full_blocks * kBlock + rest, numel,
                          static_cast<uint32_t>(full_blocks), from(source, first_counter));
  }
  if (!has_samples && runs_of_vectors(p, per_vector, per_counter)) {
    const int64_t vectors = numel / per_vector;
    return launch.enqueue(kRows, vectors, static_cast<uint32_t>(vectors),
                          make_layout(p, bytes, per_vector, per_counter),
                          from(source, first_counter));
  }
  // A segment that begins within a counter may end within another. Of samples a thread takes as
  // many elements from the first on, wherever in a counter they are.
  const int64_t cut = has_samples || begins_with_counters(p, per_counter) ? 0 : per_counter - 1;
  const int64_t segment_counters = (p.segment_numel + per_counter - 1 + cut) / per_counter;
  const int64_t counters = numel / p.segment_numel * segment_counters;
  launch.enqueue(has_samples ? kSamples : kElements, counters, static_cast<uint32_t>(counters),
                 make_layout(p, bytes, 1, 1), p.first_index, static_cast<uint32_t>(p.segment_numel),
                 Divisor(static_cast<uint32_t>(segment_counters)), source);
}

void launch_at(Op op, DType dtype, const Problem& p, const Generator* generator, int device,
               CudaStream stream) {
  const int64_t bytes = size_of(dtype);
  const Launch launch{p,
                      {op, dtype, p.form, p.bounds != nullptr, generator != nullptr},
                      device,
                      stream,
                      bytes,
                      kVectorBytes / bytes,
                      counter_of(dtype)};
  if (generator != nullptr) return launch_from(*generator, launch);
  if (draws(op)) return launch_from(KeyTensor{p.keys, 0}, launch);
  launch_from(NoKey{}, launch);
}

const void* advance(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

bool is_one_launch(Op op, DType dtype, const Problem& p) {
  return p.ndim <= kMaxDims && (numel_of(p) <= kMostElements || is_whole(op, dtype, p));
}

// Of a problem that is more than one launch as much of the outermost dimension at a time as one
// takes, or a single place of it, which leaves a dimension less.
void launch_parts(Op op, DType dtype, const Problem& p, int device, CudaStream stream) {
  if (is_one_launch(op, dtype, p)) return launch_at(op, dtype, p, nullptr, device, stream);
  const int64_t within = numel_of(p) / p.sizes[0], bytes = size_of(dtype);
  const int64_t most = p.ndim > kMaxDims ? 1 : std::max<int64_t>(kMostElements / within, 1);
  std::vector<int64_t> sizes(p.sizes, p.sizes + p.ndim);
  for (int64_t i = 0; i < p.sizes[0]; i += most) {
    sizes[0] = std::min(most, p.sizes[0] - i);
    Problem part = p;
    part.sizes = sizes.data();
    for (int k = 0; k < 2; ++k) {
      part.operands[k] = advance(p.operands[k], i * p.operand_strides[k][0] * bytes);
      part.results[k] =
          const_cast<void*>(advance(p.results[k], i * p.result_strides[k][0] * bytes));
    }
    part.first_index = p.first_index + i * p.index_strides[0];
    if (p.keys != nullptr) part.keys = p.keys + i * p.key_strides[0];
    if (p.outer_ndim == 0) part.segment_numel = sizes[0] * within;
    if (sizes[0] == 1 && p.ndim > 1) {
      for (auto* table : {&part.sizes, &part.operand_strides[0], &part.operand_strides[1],
                          &part.result_strides[0], &part.result_strides[1], &part.index_strides,
                          &part.key_strides}) {
        ++*table;
      }
      part.ndim = p.ndim - 1;
      part.outer_ndim = std::max(p.outer_ndim - 1, 0);
    }
    launch_parts(op, dtype, part, device, stream);
  }
}

}  // namespace

void launch_on_cuda(Op op, DType dtype, const Problem& p, const Generator* generator, int device,
                    CudaStream stream) {
  if (generator == nullptr) return launch_parts(op, dtype, p, device, stream);
  if (is_one_launch(op, dtype, p)) return launch_at(op, dtype, p, generator, device, stream);
  // A kernel for one element says which key it is: the parts have the noise of places within.
  constexpr int64_t kOne = 1;
  Problem first = p;
  first.ndim = 1;
  first.sizes = &kOne;
  first.outer_ndim = 0;
  first.segment_numel = first.samples = 1;
  launch_at(op, dtype, first, generator, device, stream);
  Problem rest = p;
  rest.keys = generator->key_out;
  launch_parts(op, dtype, rest, device, stream);
}

void launch_on_cuda(const Derivation& d, int device, CudaStream stream) {
  static std::atomic<CudaKernel> known[2];
  const bool folds = d.data != nullptr;
  const int64_t total = folds ? d.n : d.n * d.count;
  if (total == 0) return;
  std::atomic<CudaKernel>& kernel = known[folds];
  if (kernel == nullptr) kernel = find_cuda_kernel(folds ? "fold_in" : "child_keys", device);
  if (folds) {
    return enqueue_kernel(kernel, total, device, stream, d.keys, d.key_stride, d.data,
                          d.data_stride, d.n, d.out);
  }
  enqueue_kernel(kernel, total, device, stream, d.keys, d.n, d.first, total, d.out);
}

}  // namespace reparam_fused
