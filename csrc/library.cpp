#include "library.h"

#include <stdexcept>
#include <string>

#include "cuda/driver.h"

// What _extensions.py asks of the library, by ctypes: so that a Python for which there is no
// module of it has the ops nevertheless. No other name is exported.

#if defined(_WIN32)
#define REPARAM_FUSED_API extern "C" __declspec(dllexport)
#else
#define REPARAM_FUSED_API extern "C" __attribute__((visibility("default")))
#endif

// The instruction set of the CPU's kernels, or null and why that is not to be had.
REPARAM_FUSED_API const char* reparam_fused_isa(const char** error) {
  static std::string text;
  try {
    return reparam_fused::cpu_kernels().isa;
  } catch (const std::exception& raised) {
    text = raised.what();
    *error = text.c_str();
    return nullptr;
  }
}

REPARAM_FUSED_API void reparam_fused_use_cuda_image(const char* path, const char* why_not) {
  reparam_fused::use_cuda_image(path, why_not);
}

REPARAM_FUSED_API const char* reparam_fused_cuda_refusal(int device) {
  return reparam_fused::known_cuda_refusal(device);
}

// For connect() of the module
REPARAM_FUSED_API const void* reparam_fused_library() {
  using namespace reparam_fused;
  static constexpr Library library{run_kernel, derive_cpu, word_tensor, draw_word, key_tensor};
  return &library;
}
