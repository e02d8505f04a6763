#include "launch.h"

#include <atomic>
#include <string>

#include "../common/forms.h"

namespace reparam_fused {
namespace {

// Below so many full blocks a thread takes one vector, and waits for its memory once and not
// four times: there are then too few blocks to hide it, less than 31 for each of the 132
// multiprocessors of an H200. It takes 12 more instructions an element in float32 and 6 in the
// half types, on sm_90. Of 4M elements in float32, forward and backward, an H200 takes 1.03 and
// 1.05 of torch.add's time with it, 1.14 and 1.24 without (benchmarks/gpu_report.md); in
// bfloat16 it makes no difference there.
constexpr int64_t kFewBlocks = 4096;

enum Kind { kWhole, kRows32, kRows64, kElements32, kElements64, kKinds };

bool has_form(Op op) { return op == kSample || op == kSampleBackward; }
bool draws(Op op) { return has_form(op) || op == kNoise; }
int64_t size_of(DType dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

// A kernel as kernels.cu names it
struct Name {
  Op op;
  Form form;
  DType dtype;
  bool generator;

  CudaKernel find(Kind kind, int device) const {
    // Each is looked up once. Two threads that do so at a time find the same.
    static std::atomic<CudaKernel> known[kOps][form_count()][kDTypes][2][kKinds];
    std::atomic<CudaKernel>& kernel = known[op][form][dtype][generator][kind];
    if (kernel == nullptr) kernel = find_cuda_kernel(text(kind), device);
    return kernel;
  }

 private:
  std::string text(Kind kind) const {
    constexpr const char* kOpNames[] = {"sample", "sample_backward", "noise", "kl_divergence",
                                        "kl_divergence_backward"};
    constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};
    constexpr const char* kKindNames[] = {"whole", "rows32", "rows64", "elements32", "elements64"};
    std::string name = kOpNames[op];
    if (has_form(op)) name += std::string("_") + form_name(form);
    name += std::string("_") + kDTypeNames[dtype];
    if (draws(op)) name += generator ? "_generator" : "_key";
    return name + "_" + kKindNames[kind];
  }
};

// So many threads, in blocks of kBlock
template <class... Arguments>
void enqueue_kernel(CudaKernel kernel, int64_t threads, int device, CudaStream stream,
                    Arguments... arguments) {
  void* pointers[] = {&arguments...};
  launch_cuda(kernel, (threads + kBlock - 1) / kBlock, kBlock, device, stream, pointers);
}

struct Launch {
  Name name;
  int device;
  CudaStream stream;
  int64_t per_vector, per_counter;  // elements

  template <class... Arguments>
  void enqueue(Kind kind, int64_t threads, Arguments... arguments) const {
    enqueue_kernel(name.find(kind, device), threads, device, stream, arguments...);
  }
};

// Sizes and strides in units of `unit` elements, which divides them: 1, or a vector
// where the innermost stride is 1. Noise is counted in units of `index_unit`: elements,
// or counters with every vector.
template <class Index>
Layout<Index> make_layout(const Problem& p, int64_t unit, int64_t index_unit) {
  Layout<Index> layout{};
  layout.ndim = p.ndim;
  layout.first_index = p.first_index / index_unit;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = p.ndim - 1 - d;
    const int64_t inner = d == 0 ? unit : 1, outer = unit / inner;
    layout.sizes[d] = Divisor<Index>(static_cast<Index>(p.sizes[from] / inner));
    layout.x_strides[d] = p.x_strides[from] / outer;
    layout.scale_strides[d] = p.scale_strides[from] / outer;
    layout.out_strides[d] = p.out_strides[from] / outer;
    layout.index_strides[d] = p.index_strides[from] * inner / index_unit;
    layout.key_strides[d] = p.key_strides[from];
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

// Every run of the innermost dimension is one of whole 16-byte vectors and counters.
bool runs_of_vectors(const Problem& p, int64_t per_vector, int64_t per_counter) {
  if (!aligned(p.x) || !aligned(p.scale) || !aligned(p.out)) return false;
  const int inner = p.ndim - 1;
  bool fits = p.x_strides[inner] == 1 && p.scale_strides[inner] == 1 && p.out_strides[inner] == 1 &&
              p.index_strides[inner] == 1 && p.sizes[inner] % per_vector == 0 &&
              p.first_index % per_counter == 0;
  for (int d = 0; d < inner; ++d) {
    fits = fits && p.x_strides[d] % per_vector == 0 && p.scale_strides[d] % per_vector == 0 &&
           p.out_strides[d] % per_vector == 0 && p.index_strides[d] % per_counter == 0;
  }
  return fits;
}

template <class Index, class Source>
void launch_cut(const Launch& launch, const Problem& p, int64_t numel, const Source& source) {
  constexpr bool kShort = sizeof(Index) == 4;
  const int64_t per_vector = launch.per_vector, per_counter = launch.per_counter;
  if (runs_of_vectors(p, per_vector, per_counter)) {
    const int64_t vectors = numel / per_vector;
    return launch.enqueue(kShort ? kRows32 : kRows64, vectors, p.x, p.scale, p.out,
                          static_cast<Index>(vectors),
                          make_layout<Index>(p, per_vector, per_counter), source);
  }
  // A segment that begins within a counter may end within another.
  const int64_t cut = begins_with_counters(p, per_counter) ? 0 : per_counter - 1;
  const int64_t segment_counters = (p.segment_numel + per_counter - 1 + cut) / per_counter;
  const int64_t counters = numel / p.segment_numel * segment_counters;
  launch.enqueue(kShort ? kElements32 : kElements64, counters, p.x, p.scale, p.out,
                 static_cast<Index>(counters), make_layout<Index>(p, 1, 1),
                 static_cast<Index>(p.segment_numel),
                 Divisor<Index>(static_cast<Index>(segment_counters)), source);
}

// The source of the noise of a tensor that begins with this counter
KeyTensor from(KeyTensor source, uint64_t counter) { return {source.keys, counter}; }
template <class Source>
Source from(Source source, uint64_t) {
  return source;
}

template <class Source>
void launch_from(const Source& source, const Launch& launch, const Problem& p) {
  const int64_t per_vector = launch.per_vector, per_counter = launch.per_counter;
  int64_t numel = 1;
  for (int d = 0; d < p.ndim; ++d) numel *= p.sizes[d];
  if (numel == 0) return;
  const bool whole = p.ndim == 1 && p.x_strides[0] == 1 && p.scale_strides[0] == 1 &&
                     p.out_strides[0] == 1 && p.outer_ndim == 0 &&
                     p.first_index % per_counter == 0 && aligned(p.x) && aligned(p.scale) &&
                     aligned(p.out);
  if (whole) {
    constexpr int64_t kVectors = kBlock * kVectorsPerThread;
    const int64_t vectors = numel / per_vector;
    const int64_t full_blocks = vectors < kFewBlocks * kVectors ? 0 : vectors / kVectors;
    const int64_t rest =
        vectors - full_blocks * kVectors + (numel % per_vector + per_counter - 1) / per_counter;
    return launch.enqueue(kWhole, full_blocks * kBlock + rest, p.x, p.scale, p.out, numel,
                          static_cast<uint32_t>(full_blocks),
                          from(source, static_cast<uint64_t>(p.first_index / per_counter)));
  }
  // In 32 bits every count of elements and of counters stays below 2^31: a counter
  // of a short segment may stand for one element.
  return numel <= INT32_MAX ? launch_cut<uint32_t>(launch, p, numel, source)
                            : launch_cut<uint64_t>(launch, p, numel, source);
}

void launch_at(Op op, DType dtype, const Problem& p, const Generator* generator, int device,
               CudaStream stream) {
  const Launch launch{{op, p.form, dtype, generator != nullptr},
                      device,
                      stream,
                      kVectorBytes / size_of(dtype),
                      dtype == kDouble ? 2 : 4};
  if (generator != nullptr) return launch_from(*generator, launch, p);
  if (draws(op)) return launch_from(KeyTensor{p.keys, 0}, launch, p);
  launch_from(NoKey{}, launch, p);
}

const void* advance(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

// A problem of more dimensions than a kernel takes, slice by slice along the outermost.
void launch_slices(Op op, DType dtype, const Problem& p, int device, CudaStream stream) {
  if (p.ndim <= kMaxDims) return launch_at(op, dtype, p, nullptr, device, stream);
  Problem slice = p;
  slice.ndim = p.ndim - 1;
  for (auto* table : {&slice.sizes, &slice.x_strides, &slice.scale_strides, &slice.out_strides,
                      &slice.index_strides, &slice.key_strides}) {
    ++*table;
  }
  if (p.outer_ndim > 0) {
    --slice.outer_ndim;
  } else {
    slice.segment_numel /= p.sizes[0];
  }
  const int64_t bytes = size_of(dtype);
  for (int64_t i = 0; i < p.sizes[0]; ++i) {
    slice.x = advance(p.x, i * p.x_strides[0] * bytes);
    slice.scale = advance(p.scale, i * p.scale_strides[0] * bytes);
    slice.out = const_cast<void*>(advance(p.out, i * p.out_strides[0] * bytes));
    slice.first_index = p.first_index + i * p.index_strides[0];
    if (p.keys != nullptr) slice.keys = p.keys + i * p.key_strides[0];
    launch_slices(op, dtype, slice, device, stream);
  }
}

}  // namespace

void launch_on_cuda(Op op, DType dtype, const Problem& p, const Generator* generator, int device,
                    CudaStream stream) {
  if (p.ndim <= kMaxDims) return launch_at(op, dtype, p, generator, device, stream);
  Problem rest = p;
  if (generator != nullptr) {
    // A kernel for one element says which key it is: the slices have the noise of places within.
    constexpr int64_t kOne = 1;
    const Problem first{p.form, p.x,   p.scale, p.out, nullptr, 0, 1, &kOne,
                        &kOne,  &kOne, &kOne,   &kOne, &kOne,   0, 1};
    launch_at(op, dtype, first, generator, device, stream);
    rest.keys = generator->key_out;
  }
  launch_slices(op, dtype, rest, device, stream);
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
