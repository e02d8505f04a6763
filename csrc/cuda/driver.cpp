#include "driver.h"

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <atomic>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <type_traits>

namespace reparam_fused {
namespace {

#if defined(_WIN32)
#define REPARAM_FUSED_CUDAAPI __stdcall
void* open_driver() { return reinterpret_cast<void*>(LoadLibraryA("nvcuda.dll")); }
void* find(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}
#else
#define REPARAM_FUSED_CUDAAPI
void* open_driver() { return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); }
void* find(void* library, const char* name) { return dlsym(library, name); }
#endif

// Of cuda.h
using Result = int;
using Handle = void*;
constexpr Result kSuccess = 0;
// A refusal of the image, which will be one the next time too
constexpr Result kRefusals[] = {
    200,  // CUDA_ERROR_INVALID_IMAGE
    209,  // CUDA_ERROR_NO_BINARY_FOR_GPU
    218,  // CUDA_ERROR_INVALID_PTX
    221,  // CUDA_ERROR_JIT_COMPILER_NOT_FOUND
    222,  // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    223,  // CUDA_ERROR_JIT_COMPILATION_DISABLED
    500,  // CUDA_ERROR_NOT_FOUND
    801,  // CUDA_ERROR_NOT_SUPPORTED
};
constexpr int kRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

template <class... Parameters>
using Function = Result(REPARAM_FUSED_CUDAAPI*)(Parameters...);

struct Driver {
  Function<Result, const char**> error_name, error_text;
  Function<int*> context_device;
  Function<Handle*> get_context;
  Function<Handle> set_context;
  Function<Handle*, int> retain_primary;
  Function<int*> exchange_capture_mode;
  Function<Handle*, const void*, void*, void*, unsigned, void*, void*, unsigned> load;
  Function<Handle*, Handle, const char*> get_kernel;
  Function<Handle*, Handle> get_function;
  Function<Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle,
           void**, void**>
      launch;
};

// What there is once for the process. The image stays, for the driver may read it later.
struct State {
  std::mutex mutex;
  std::string path, why_not = "no image was given", image;
  Driver driver{};
  Handle library = nullptr;
  std::map<int, std::string> refusals;  // of the devices that were asked for; empty: served
};
State& state() {
  static State& state = *new State;  // of which no thread is robbed at the end of the process
  return state;
}

// Devices that are served, read without the mutex
std::atomic<uint64_t> served{0};
constexpr int kMostDevices = 64;

std::string words(const Driver& driver, Result result) {
  const char *name = nullptr, *text = nullptr;
  if (driver.error_name(result, &name) != kSuccess || name == nullptr) name = "unknown";
  if (driver.error_text(result, &text) != kSuccess || text == nullptr) text = "";
  return std::string(name) + ": " + text;
}

void check(const Driver& driver, Result result, const std::string& doing) {
  if (result == kSuccess) return;
  throw std::runtime_error("CUDA error: " + words(driver, result) + " (" + doing + ")");
}

bool is_refusal(Result result) {
  for (const Result refusal : kRefusals) {
    if (result == refusal) return true;
  }
  return false;
}

// Why there is no driver that can be used, or nothing.
std::string open(Driver* driver) {
  void* const library = open_driver();
  if (library == nullptr) return "there is no CUDA driver";
  std::string missing;
  const auto look_up = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(find(library, name));
    if (*function == nullptr && missing.empty()) missing = name;
  };
  look_up("cuGetErrorName", &driver->error_name);
  look_up("cuGetErrorString", &driver->error_text);
  look_up("cuCtxGetDevice", &driver->context_device);
  look_up("cuCtxGetCurrent", &driver->get_context);
  look_up("cuCtxSetCurrent", &driver->set_context);
  look_up("cuDevicePrimaryCtxRetain", &driver->retain_primary);
  look_up("cuThreadExchangeStreamCaptureMode", &driver->exchange_capture_mode);
  look_up("cuLibraryLoadData", &driver->load);
  look_up("cuLibraryGetKernel", &driver->get_kernel);
  look_up("cuKernelGetFunction", &driver->get_function);
  look_up("cuLaunchKernel", &driver->launch);
  if (missing.empty()) return "";
  return "the CUDA driver has no " + missing + ": it is older than CUDA 12";
}

// A thread that has called nothing of the CUDA runtime has no context yet. The primary one of
// the device is torch's too.
void make_current(const Driver& driver, int device) {
  int current;
  if (driver.context_device(&current) == kSuccess && current == device) return;
  Handle context;
  check(driver, driver.retain_primary(&context, device), "the context of a device");
  check(driver, driver.set_context(context), "the context of a device");
}

// Of a scope, after which the thread has the context that it had.
class InContext {
 public:
  InContext(const Driver& driver, int device) : driver_(driver) {
    check(driver, driver.get_context(&before_), "the context of a thread");
    make_current(driver, device);
  }
  ~InContext() { driver_.set_context(before_); }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  const Driver& driver_;
  Handle before_ = nullptr;
};

// Loading may allocate, which a graph that is being captured, of whatever thread, would not
// stand: it may, where this one says that it knows what it does.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_.exchange_capture_mode(&mode_);
  }
  ~RelaxedCapture() { driver_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxed;
};

// Finds the driver and reads the image, once. Why that cannot be, or nothing.
std::string prepare(State& s) {
  if (!s.image.empty()) return "";
  const std::string why_not = open(&s.driver);
  if (!why_not.empty()) return why_not;
  std::ifstream file(s.path, std::ios::binary);
  s.image.assign(std::istreambuf_iterator<char>(file), {});
  return s.image.empty() ? s.path + " cannot be read" : "";
}

// Why the device cannot be served, or nothing. Any kernel tells: they are in one image.
std::string ask(State& s, int device) {
  if (s.why_not.empty()) s.why_not = prepare(s);
  if (!s.why_not.empty()) return s.why_not;
  const InContext context(s.driver, device);
  const RelaxedCapture relaxed(s.driver);
  Result result = kSuccess;
  if (s.library == nullptr) {
    result = s.driver.load(&s.library, s.image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  }
  Handle kernel, function;
  if (result == kSuccess) result = s.driver.get_kernel(&kernel, s.library, "child_keys");
  if (result == kSuccess) result = s.driver.get_function(&function, kernel);
  if (is_refusal(result)) return "the CUDA driver says " + words(s.driver, result);
  check(s.driver, result, "loading the kernels of reparam_fused");
  return "";
}

}  // namespace

void use_cuda_image(const char* path, const char* why_not) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.path = path;
  s.why_not = why_not;
}

const char* cuda_refusal(int device) {
  const uint64_t bit = device < kMostDevices ? uint64_t{1} << device : 0;
  if ((served & bit) != 0) return nullptr;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  auto known = s.refusals.find(device);
  if (known == s.refusals.end()) known = s.refusals.emplace(device, ask(s, device)).first;
  if (!known->second.empty()) return known->second.c_str();
  served |= bit;
  return nullptr;
}

const char* known_cuda_refusal(int device) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto known = s.refusals.find(device);
  return known == s.refusals.end() ? "" : known->second.c_str();
}

CudaKernel find_cuda_kernel(const std::string& name, int device) {
  const State& s = state();
  make_current(s.driver, device);
  // The driver loads a kernel when it is first asked for it, not with its library.
  const RelaxedCapture relaxed(s.driver);
  CudaKernel kernel, function;
  check(s.driver, s.driver.get_kernel(&kernel, s.library, name.c_str()), "looking up " + name);
  check(s.driver, s.driver.get_function(&function, kernel), "loading " + name);
  return kernel;
}

void launch_cuda(CudaKernel kernel, int64_t blocks, unsigned threads, int device, CudaStream stream,
                 void** arguments) {
  const Driver& driver = state().driver;
  make_current(driver, device);
  if (blocks > INT32_MAX) {
    throw std::runtime_error("CUDA error: invalid configuration: a grid of " +
                             std::to_string(blocks) + " blocks");
  }
  const auto result = driver.launch(kernel, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, 0,
                                    stream, arguments, nullptr);
  check(driver, result, "launching a kernel of reparam_fused");
}

}  // namespace reparam_fused
