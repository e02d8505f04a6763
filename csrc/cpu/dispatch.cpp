#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace reparam_fused {
namespace {

#if defined(__x86_64__)
// clang's __builtin_cpu_supports does not know f16c.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Narrowest first.
std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported{&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2) supported.push_back(&kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    supported.push_back(&kAvx512Kernels);
  }
#elif defined(__aarch64__) || defined(_M_ARM64)
  supported.push_back(&kNeonKernels);
#endif
  return supported;
}

const Kernels& choose_kernels() {
  const auto supported = supported_kernels();
  const char* forced = std::getenv("REPARAM_FUSED_ISA");
  if (forced == nullptr || *forced == '\0') return *supported.back();
  std::string names;
  for (const Kernels* kernels : supported) {
    if (std::string(forced) == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::runtime_error("REPARAM_FUSED_ISA is '" + std::string(forced) +
                           "', but this CPU and build have: " + names);
}

// The dimension in which neighbours in memory differ, where it is not the last one: of the first
// tensor that has such.
int near_dimension(const Problem& p) {
  const int last = p.ndim - 1;
  for (const auto* strides : {p.result_strides, p.operand_strides}) {
    for (int k = 0; k < kMaxOperands; ++k) {
      if (strides[k] == nullptr || strides[k][last] <= 1) continue;
      int near = last;
      for (int d = 0; d < last; ++d) {
        if (p.sizes[d] >= 4 && strides[k][d] != 0 && strides[k][d] < strides[k][near]) near = d;
      }
      if (near != last) return near;
    }
  }
  return last;
}

// Columns [first, first + n) of a problem, in panels of so many, and in a panel row after row, for
// rows that are near each other in memory: a block is then of many rows and few columns, and
// takes whole lines of the cache from each. The elements keep their noise. Owns its tables.
struct Panels {
  Problem problem;
  int64_t numel;

  Panels(const Problem& p, size_t size, int near, int64_t first, int64_t n, int64_t width)
      : problem(p), numel(n) {
    const int last = p.ndim - 1;
    int dims = 0;
    const auto add = [&](int d, int64_t size, int64_t step) {
      sizes_[dims] = size;
      from_[dims] = d;
      steps_[dims++] = step;
    };
    for (int d = 0; d < last; ++d) {
      if (d != near) add(d, p.sizes[d], 1);
      numel *= p.sizes[d];
    }
    add(last, n / width, width);
    add(near, p.sizes[near], 1);
    add(last, width, 1);
    problem.ndim = problem.outer_ndim = dims;
    problem.sizes = sizes_;
    auto reorder = [&, table = 0](const int64_t*& strides) mutable {
      int64_t* const reordered = strides_[table++];
      for (int d = 0; d < dims; ++d) reordered[d] = strides[from_[d]] * steps_[d];
      strides = reordered;
    };
    auto move = [&](const int64_t*& strides, auto& memory) {
      if (strides == nullptr || memory == nullptr) return;
      memory = (const_cast<char*>(static_cast<const char*>(memory)) +
                first * strides[last] * static_cast<int64_t>(size));
      reorder(strides);
    };
    for (int k = 0; k < kMaxOperands; ++k) move(problem.operand_strides[k], problem.operands[k]);
    for (int k = 0; k < kMaxResults; ++k) move(problem.result_strides[k], problem.results[k]);
    problem.first_index += first * p.index_strides[last];
    problem.keys += first * p.key_strides[last];
    reorder(problem.index_strides);
    reorder(problem.key_strides);
    problem.segment_numel = 1;
    while (problem.outer_ndim > 0 &&
           problem.index_strides[problem.outer_ndim - 1] == problem.segment_numel) {
      problem.segment_numel *= sizes_[--problem.outer_ndim];
    }
  }
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;

 private:
  int from_[kMaxDims + 1];
  int64_t sizes_[kMaxDims + 1], steps_[kMaxDims + 1];
  int64_t strides_[kMaxOperands + kMaxResults + 2][kMaxDims + 1];
};

// A panel is of a multiple of so many columns.
constexpr int64_t kPanel = 64;

// By threads, each of whole units and of so many at least
int32_t run_units(Kernel kernel, const Problem& problem, int64_t numel, int64_t unit, int64_t grain,
                  ParallelFor parallel_for) {
  struct Job {
    Kernel kernel;
    const Problem& problem;
    int64_t numel, unit;
  } job{kernel, problem, numel, unit};
  if (numel <= grain) {
    kernel(problem, 0, numel);
    return 0;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.kernel(job.problem, begin * job.unit, std::min(end * job.unit, job.numel));
  };
  return parallel_for(0, (numel + unit - 1) / unit, grain / unit, run, &job);
}

int32_t run(Kernel kernel, const Problem& problem, int64_t numel, int64_t unit,
            ParallelFor parallel_for) {
  // A segment that ends within a counter takes the whole of it.
  const int64_t drawn = (problem.segment_numel + 3) / 4 * 4;
  int64_t grain = kGrain / std::max<int64_t>(problem.samples, 1);
  grain = std::max(drawn > kGrain ? grain : grain * problem.segment_numel / drawn, unit);
  return run_units(kernel, problem, numel, unit, grain, parallel_for);
}

// What there are of chunks of a row to its sum, by the same rule until it is one
template <class S>
void sum_chunks(void (*sum)(const S*, int64_t, int64_t, S*), std::vector<S> sums, int64_t rows,
                S* totals) {
  while (static_cast<int64_t>(sums.size()) > rows) {
    const int64_t n = static_cast<int64_t>(sums.size()) / rows;
    const int64_t chunk = kSumStride * kSumTerms * 16 / static_cast<int64_t>(sizeof(S));
    std::vector<S> next(rows * ((n + chunk - 1) / chunk));
    sum(sums.data(), rows, n, next.data());
    sums = std::move(next);
  }
  std::copy(sums.begin(), sums.end(), totals);
}

template <class S>
int32_t run_head(Kernel kernel, const Problem& problem, int64_t numel, int64_t bytes,
                 void (*sum)(const S*, int64_t, int64_t, S*), ParallelFor parallel_for) {
  const int64_t chunk = kSumStride * kSumTerms * 16 / bytes, rows = numel / problem.row;
  const int64_t pieces = (problem.row + chunk - 1) / chunk, piece = std::min(problem.row, chunk);
  const int64_t grain = std::max<int64_t>(kGrain / piece, 1);
  if (pieces == 1 || problem.totals == nullptr) {
    return run_units(kernel, problem, rows * pieces, 1, grain, parallel_for);
  }
  Problem by_chunks = problem;
  std::vector<S> sums(rows * pieces);
  by_chunks.totals = sums.data();
  const int32_t error = run_units(kernel, by_chunks, rows * pieces, 1, grain, parallel_for);
  if (error == 0) sum_chunks(sum, std::move(sums), rows, static_cast<S*>(problem.totals));
  return error;
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& kernels = choose_kernels();
  return kernels;
}

int32_t run_kernel(Op op, DType dtype, const Problem& problem, int64_t numel,
                   ParallelFor parallel_for) {
  constexpr KernelTable Kernels::* of_op[] = {
      &Kernels::sample,        &Kernels::sample_backward,        &Kernels::noise,
      &Kernels::kl_divergence, &Kernels::kl_divergence_backward, &Kernels::samples_backward,
      &Kernels::head,          &Kernels::head_backward};
  const size_t sizes[] = {sizeof(float), sizeof(double), 2, 2};
  if (numel == 0) return 0;
  if (op == kHead || op == kHeadBackward) {
    const Kernels& kernels = cpu_kernels();
    const Kernel kernel = (kernels.*of_op[op]).of[dtype];
    const auto bytes = static_cast<int64_t>(sizes[dtype]);
    return dtype == kDouble
               ? run_head(kernel, problem, numel, bytes, kernels.sum_double, parallel_for)
               : run_head(kernel, problem, numel, bytes, kernels.sum_float, parallel_for);
  }
  const auto of = op == kSample && problem.samples != 1 ? &Kernels::samples : of_op[op];
  const Kernel kernel = (cpu_kernels().*of).of[dtype];
  const int near = near_dimension(problem), last = problem.ndim - 1;
  const int64_t columns = problem.sizes[last];
  if (near == last || columns < (near == last - 1 ? 2 * kPanel : kPanel / 4)) {
    return run(kernel, problem, numel, kMaxTile, parallel_for);
  }
  const int64_t rows = std::min(problem.sizes[near], kLarge / kPanel);
  const int64_t width = columns < 2 * kPanel
                            ? columns
                            : std::min(std::max(kBlock / rows, kPanel), columns) / kPanel * kPanel;
  const int64_t whole = columns / width * width;
  const Panels panels(problem, sizes[dtype], near, 0, whole, width);
  const int32_t error = run(kernel, panels.problem, panels.numel, rows * width, parallel_for);
  if (error != 0 || whole == columns) return error;
  const Panels rest(problem, sizes[dtype], near, whole, columns - whole, columns - whole);
  return run(kernel, rest.problem, rest.numel, kMaxTile, parallel_for);
}

}  // namespace reparam_fused
