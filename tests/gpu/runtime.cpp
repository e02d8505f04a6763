// The stand-in's libcudart.so.13: what torch and the CUDA extension import of it. Of what is
// not here, build.py makes functions that say their name and fail.

#include <algorithm>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "device.h"

#define API extern "C" __attribute__((visibility("default")))
// Every call of the runtime gives its thread the context of its current device.
#define ENTER                                     \
  const Guard guard;                              \
  thread_state().context = thread_state().device; \
  if (const Status entered = enter(__func__)) return result(entered)
// The stream that a handle means, as `stream`
#define STREAM(handle)                      \
  Stream* const stream = stream_of(handle); \
  if (stream == nullptr) return result(fail(kInvalidHandle, "no such stream"))

using namespace stand_in;

extern "C" void* stand_in_entry(const char* name);  // driver.cpp

namespace {

cudaError_t result(Status status) {
  if (status != kSuccess && status != kNotReady) thread_state().last_error = status;
  return static_cast<cudaError_t>(status);
}

// The kernels that libraries register as they are loaded, by the address of their stubs
std::map<const void*, Function>& kernels() {
  static auto* kernels = new std::map<const void*, Function>;
  return *kernels;
}

struct FatBinary {  // fatbinary_section.h: __fatBinC_Wrapper_t
  int magic, version;
  const void* data;
  void* file;
};

struct {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} thread_local configuration;

cudaError_t launch_kernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                          size_t shared_bytes, cudaStream_t handle) {
  STREAM(handle);
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return result(fail(kInvalidHandle, "no such kernel"));
  return result(launch(found->second, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                       static_cast<unsigned>(shared_bytes), stream, arguments));
}

template <class T>
T* of(void* handle) {
  return static_cast<T*>(handle);
}

struct UserObject {
  void* pointer;
  cudaHostFn_t destroy;
  unsigned references;
};

}  // namespace

// What was called that is not here: build.py's functions come to this.
API cudaError_t stand_in_unknown(const char* name) {
  const Guard guard;
  return result(fail(kNotSupported, std::string(name) + " is not known to tests/gpu/runtime.cpp"));
}

// Registration

API void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 0; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int,
                                void*, void*, void*, void*, int*) {
  const Guard guard;
  Dl_info info{};
  dladdr(host, &info);
  const auto* binary = reinterpret_cast<const FatBinary*>(handle);
  kernels()[host] = {binary->data, info.dli_fname ? info.dli_fname : "", name};
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                           void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}

// Kernels

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                 size_t shared_bytes, cudaStream_t stream) {
  ENTER;
  return launch_kernel(kernel, grid, block, arguments, shared_bytes, stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                   size_t shared_bytes, cudaStream_t stream) {
  ENTER;
  return launch_kernel((const void*)kernel, grid, block, arguments, shared_bytes, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel,
                                    void** arguments) {
  ENTER;
  return launch_kernel(kernel, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ENTER;
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return result(fail(kInvalidHandle, "no such kernel"));
  if (const Status status = resolve(found->second, thread_state().device)) return result(status);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Devices

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = thread_state().device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(fail(kInvalidDevice, ""));
  thread_state().device = device;
  ENTER;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  const Guard guard;
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "stand-in GPU");
  p->major = capability(device) / 10;
  p->minor = capability(device) % 10;
  p->totalGlobalMem = device_bytes();
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerMultiprocessor = p->sharedMemPerBlockOptin = 99 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->multiProcessorCount = 4;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->unifiedAddressing = p->concurrentKernels = 1;
  p->l2CacheSize = 1 << 20;
  p->pciBusID = device;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Guard guard;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability(device) / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability(device) % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  const std::string id = "0000:0" + std::to_string(device) + ":00.0";
  std::strncpy(text, id.c_str(), size);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  ENTER;
  note("synchronisation", "of the device");
  return result(synchronize_device(thread_state().device));
}

// Errors

API cudaError_t cudaGetLastError() {
  const Status last = thread_state().last_error;
  thread_state().last_error = kSuccess;
  return static_cast<cudaError_t>(last);
}
API cudaError_t cudaPeekAtLastError() {
  return static_cast<cudaError_t>(thread_state().last_error);
}
API const char* cudaGetErrorString(cudaError_t status) {
  const Guard guard;
  return message(status);
}
API const char* cudaGetErrorName(cudaError_t status) {
  const Guard guard;
  return message(status);
}

// Memory

API cudaError_t cudaMalloc(void** pointer, size_t size) {
  ENTER;
  if (const Status status = while_capturing()) return result(status);
  return result(allocate(pointer, size, thread_state().device));
}
// torch calls this from destructors, where an error would end the process: whatever happened
// before, the memory is released. Nor does it break a capture: only where torch's caching
// allocator is off, which on a GPU keeps what is freed, does a tensor's end come to this.
API cudaError_t cudaFree(void* pointer) {
  const Guard guard;
  return result(release(pointer));
}
API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  ENTER;
  if (const Status status = while_capturing()) return result(status);
  return result(allocate_pinned(pointer, size));
}
API cudaError_t cudaFreeHost(void* pointer) {
  ENTER;
  return result(release_pinned(pointer));
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  ENTER;
  *total = device_bytes();
  *free = device_bytes() - std::min(device_bytes(), bytes_in_use(thread_state().device));
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  ENTER;
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  const Allocation* found = allocation_of(pointer);
  if (found != nullptr) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = found->device;
    attributes->devicePointer = const_cast<void*>(pointer);
  } else if (is_pinned(pointer)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->hostPointer = attributes->devicePointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(copy(to, from, size, stream));
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                    cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(copy(to, from, size, stream));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  ENTER;
  if (const Status status = while_capturing()) return result(status);
  STREAM(nullptr);
  note("synchronisation", "by a copy");
  if (const Status status = copy(to, from, size, stream)) return result(status);
  return result(synchronize(stream));
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(fill(to, value, size, stream));
}
API cudaError_t cudaMemset(void* to, int value, size_t size) {
  ENTER;
  if (const Status status = while_capturing()) return result(status);
  STREAM(nullptr);
  return result(fill(to, value, size, stream));
}

// Streams and events. torch's streams do not wait for the legacy stream; others are not known.

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int) {
  ENTER;
  if (flags != cudaStreamNonBlocking) {
    return result(fail(kNotSupported, "a stream that waits for the legacy stream"));
  }
  *made = reinterpret_cast<cudaStream_t>(new_stream(thread_state().device));
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(synchronize(stream));
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  note("synchronisation", "of a stream");
  return result(synchronize(stream));
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(query(stream));
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  ENTER;
  STREAM(handle);
  return result(wait(stream, of<Event>(event)));
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  ENTER;
  STREAM(handle);
  enqueue(stream, "a function of the host", [=] {
    const Unlocked unlocked;
    function(data);
    return Status{kSuccess};
  });
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
  ENTER;
  *made = reinterpret_cast<cudaEvent_t>(new Event{thread_state().device});
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(record(of<Event>(event), stream));
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER;
  return result(query(of<Event>(event)));
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER;
  note("synchronisation", "of an event");
  return result(synchronize(of<Event>(event)));
}
// What is queued may still record it: it is never freed.
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  ENTER;
  for (const cudaEvent_t event : {begin, end}) {
    if (of<Event>(event)->done < of<Event>(event)->ticket) return cudaErrorNotReady;
  }
  *milliseconds = static_cast<float>(of<Event>(end)->milliseconds - of<Event>(begin)->milliseconds);
  return cudaSuccess;
}

// Graphs

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  ENTER;
  const int before = thread_state().capture_mode;
  thread_state().capture_mode = *mode;
  *mode = static_cast<cudaStreamCaptureMode>(before);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  ENTER;
  STREAM(handle);
  return result(begin_capture(stream, mode));
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  ENTER;
  STREAM(handle);
  return result(end_capture(stream, reinterpret_cast<Graph**>(graph)));
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  pause();
  ENTER;
  STREAM(handle);
  const Capture* const capture = stream->capture;
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id != nullptr) *id = capture == nullptr ? 0 : capture->id;
  if (capture == nullptr) return cudaSuccess;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture->graph.get());
  thread_local std::vector<cudaGraphNode_t> frontier;
  thread_local std::vector<cudaGraphEdgeData> plain_edges;
  frontier.clear();
  for (const int i : stream->frontier) {
    frontier.push_back(reinterpret_cast<cudaGraphNode_t>(&capture->graph->nodes[i]));
  }
  plain_edges.assign(frontier.size(), {});
  if (nodes != nullptr) *nodes = frontier.data();
  if (edges != nullptr) *edges = plain_edges.data();
  if (count != nullptr) *count = frontier.size();
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                              unsigned long long) {
  ENTER;
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return result(launch_graph(*reinterpret_cast<Graph*>(graph), stream));
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  ENTER;
  if (nodes != nullptr) return stand_in_unknown("the nodes of cudaGraphGetNodes");
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  ENTER;
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  ENTER;
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void* pointer, cudaHostFn_t destroy,
                                     unsigned references, unsigned) {
  ENTER;
  *made = reinterpret_cast<cudaUserObject_t>(new UserObject{pointer, destroy, references});
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t handle, unsigned count) {
  ENTER;
  auto* object = reinterpret_cast<UserObject*>(handle);
  object->references -= count;
  if (object->references == 0) {
    object->destroy(object->pointer);
    delete object;
  }
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                          unsigned count, unsigned flags) {
  ENTER;
  if (flags != cudaGraphUserObjectMove) reinterpret_cast<UserObject*>(object)->references += count;
  reinterpret_cast<Graph*>(graph)->owned.emplace_back(
      nullptr, [=](void*) { cudaUserObjectRelease(object, count); });
  return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  const Guard guard;
  *function = stand_in_entry(name);
  if (found != nullptr) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
