// The stand-in's libcuda.so.1: what torch, Triton and this library look up in it.

#include <cuda.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>

#include "device.h"

#define API extern "C" __attribute__((visibility("default")))
#define ENTER        \
  const Guard guard; \
  if (const Status entered = enter(__func__)) return static_cast<CUresult>(entered)

using namespace stand_in;

namespace {

CUresult result(Status status) { return static_cast<CUresult>(status); }

// A context is its device, and one more: null is none.
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(intptr_t{device} + 1); }
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
}

struct Loaded {
  const void* image;
  int device;  // -1: a library, for every device
};

// A name that nobody has written a stand-in for can be looked up, for torch looks up all it
// may need, but a call says so.
std::string unknown_names[128];
template <size_t I>
CUresult unknown() {
  return result(fail(kNotSupported, unknown_names[I] + " is not known to tests/gpu/driver.cpp"));
}
using Unknown = CUresult (*)();
template <size_t... I>
Unknown unknown_at(size_t i, std::index_sequence<I...>) {
  static const Unknown all[] = {unknown<I>...};
  return all[i];
}

void* find(const char* name) {
  static void* const self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&find), &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  // The runtime asks for cuMemAlloc and means the version of its day.
  for (const std::string suffix : {"", "_v2", "_v3"}) {
    if (void* found = dlsym(self, (name + suffix).c_str())) return found;
  }
  for (size_t i = 0; i < std::size(unknown_names); ++i) {
    if (unknown_names[i].empty()) unknown_names[i] = name;
    if (unknown_names[i] == name) {
      return reinterpret_cast<void*>(unknown_at(i, std::make_index_sequence<128>()));
    }
  }
  return nullptr;
}

CUresult function_of(const void* image, const char* name, Function** made) {
  auto function = new Function{image, "", name};
  if (const Status status = resolve(*function, thread_state().device)) {
    delete function;
    return result(status);
  }
  *made = function;
  return CUDA_SUCCESS;
}

}  // namespace

// For the runtime
API void* stand_in_entry(const char* name) { return find(name); }

#undef cuGetProcAddress
API CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* found) {
  *function = find(name);
  if (found != nullptr) *found = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult status, const char** text) {
  const Guard guard;
  *text = message(status);
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult status, const char** text) {
  static const std::map<int, const char*> names = {
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNoBinary, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {kUnsupportedPtx, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
      {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
  };
  const auto name = names.find(status);
  *text = name == names.end() ? nullptr : name->second;
  return name == names.end() ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* count) {
  *count = kDevices;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const Guard guard;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = capability(device) / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = capability(device) % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 99 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 4;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      *value = 1000000;
      break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 256;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* context) {
  const int device = thread_state().context;
  *context = device < 0 ? nullptr : context_of(device);
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  ThreadState& thread = thread_state();
  thread.context = device_of(context);
  if (thread.context >= 0) thread.device = thread.context;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = thread_state().context;
  return *device < 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER;
  if (device < 0 || device >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  *context = context_of(device);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER;
  if (thread_state().context < 0) return CUDA_ERROR_INVALID_CONTEXT;
  *module = reinterpret_cast<CUmodule>(new Loaded{image, thread_state().context});
  return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER;
  return function_of(reinterpret_cast<Loaded*>(module)->image, name,
                     reinterpret_cast<Function**>(function));
}
#if !defined(OLD_DRIVER)  // which is one of before CUDA 12
API CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**,
                               unsigned, CUlibraryOption*, void**, unsigned) {
  ENTER;
  // It may allocate.
  if (const Status status = while_capturing()) return result(status);
  *library = reinterpret_cast<CUlibrary>(new Loaded{image, -1});
  return CUDA_SUCCESS;
}
API CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  ENTER;
  return function_of(reinterpret_cast<Loaded*>(library)->image, name,
                     reinterpret_cast<Function**>(kernel));
}
API CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  ENTER;
  if (thread_state().context < 0) return CUDA_ERROR_INVALID_CONTEXT;
  // It may be loaded now, and allocate.
  if (const Status status = while_capturing()) return result(status);
  *function = reinterpret_cast<CUfunction>(kernel);
  return result(resolve(*reinterpret_cast<Function*>(kernel), thread_state().device));
}
#endif
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                            unsigned by, unsigned bz, unsigned shared_bytes, CUstream handle,
                            void** arguments, void** packed) {
  ENTER;
  if (thread_state().context < 0) {
    return result(fail(kInvalidContext, "this thread has no current context"));
  }
  if (packed != nullptr) return result(fail(kNotSupported, "packed arguments of a launch"));
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return result(launch(*reinterpret_cast<Function*>(function), {gx, gy, gz}, {bx, by, bz},
                       shared_bytes, stream, arguments));
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments,
                              void** packed) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                        c->blockDimZ, c->sharedMemBytes, c->hStream, arguments, packed);
}

API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  ENTER;
  const int before = thread_state().capture_mode;
  thread_state().capture_mode = *mode;
  *mode = static_cast<CUstreamCaptureMode>(before);
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr at) {
  const Guard guard;
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return result(fail(kNotSupported, "of a pointer"));
  if (!is_device_memory(reinterpret_cast<void*>(at))) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(value) = at;
  return CUDA_SUCCESS;
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr at) {
  const Guard guard;
  const Allocation* found = allocation_of(reinterpret_cast<void*>(at));
  if (found == nullptr) return CUDA_ERROR_NOT_FOUND;
  *base = found->base;
  *size = found->size;
  return CUDA_SUCCESS;
}

// What Triton's driver links to, and these kernels never come to: their names are all it takes.
extern "C" {
#define UNKNOWN(function)                                                                   \
  __attribute__((visibility("default"))) CUresult stand_in_##function() __asm__(#function); \
  CUresult stand_in_##function() {                                                          \
    return result(fail(kNotSupported, #function " is not known to tests/gpu/driver.cpp"));  \
  }
UNKNOWN(cuCtxGetLimit)
UNKNOWN(cuCtxSetLimit)
UNKNOWN(cuPointerGetAttributes)
UNKNOWN(cuOccupancyMaxActiveClusters)
}
