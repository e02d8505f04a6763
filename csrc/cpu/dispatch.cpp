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

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& kernels = choose_kernels();
  return kernels;
}

int32_t run_kernel(Op op, DType dtype, const Problem& problem, int64_t numel,
                   ParallelFor parallel_for) {
  constexpr KernelTable Kernels::* of_op[] = {&Kernels::sample, &Kernels::sample_backward,
                                              &Kernels::noise, &Kernels::kl_divergence,
                                              &Kernels::kl_divergence_backward};
  if (numel == 0) return 0;
  struct Job {
    Kernel kernel;
    const Problem& problem;
    int64_t numel;
  } job{(cpu_kernels().*of_op[op]).of[dtype], problem, numel};
  if (numel <= kGrain) {
    job.kernel(problem, 0, numel);
    return 0;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.kernel(job.problem, begin * kMaxTile, std::min(end * kMaxTile, job.numel));
  };
  return parallel_for(0, (numel + kMaxTile - 1) / kMaxTile, kGrain / kMaxTile, run, &job);
}

}  // namespace reparam_fused
