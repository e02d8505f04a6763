// The engine of the stand-in GPU, and what Python asks of it.

#include "device.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#define API extern "C" __attribute__((visibility("default")))

namespace stand_in {
namespace {

// The addresses of device memory. They are handed out once, so that what was freed is
// never somebody else's; behind every allocation lies a page that nobody may touch.
constexpr size_t kArenaBytes = size_t{1} << 45;
constexpr size_t kPage = 4096;
constexpr int kPoison = 0xff;  // NaN in every floating-point type
// Larger memory is not poisoned, so that tensors of more than 2^31 elements cost nothing
// where nobody touches them.
constexpr size_t kMostPoisoned = size_t{1} << 26;
// Freed memory may still be read by what was enqueued before. Above this it is waited for.
constexpr size_t kMostFreed = size_t{1} << 28;

using OnResolve = int (*)(const void* image, const char* file, const char* name, int capability,
                          unsigned* sizes, int* count);
using OnLaunch = int (*)(int kernel, const unsigned* grid, const unsigned* block,
                         unsigned shared_bytes, void** arguments, int device);
using OnTask = int (*)(long id);
using OnCapture = void (*)(int begins);

struct Fault {
  std::string function;
  int calls_before;
  Status status;
  bool for_good;
};

struct State {
  std::recursive_mutex mutex, executor;
  uint8_t *arena = nullptr, *written = nullptr;
  size_t next = 0;
  std::map<uintptr_t, Allocation> allocations;
  std::map<uintptr_t, size_t> pinned;
  size_t device_bytes = kDeviceBytes, in_use[kDevices] = {}, freed_bytes = 0;
  std::vector<uintptr_t> to_unmap;

  std::vector<std::unique_ptr<Stream>> streams;
  Stream* defaults[kDevices] = {};
  int executing = 0;  // tasks, one within the other
  uint64_t enqueued = 0, tickets = 0, captures_made = 0;
  std::vector<std::unique_ptr<Capture>> captures;
  uint64_t seed = 0;
  std::atomic<int> pause_microseconds{0};

  Status lasting = kSuccess;
  std::string lasting_detail;
  std::vector<Fault> faults;
  bool recording = false;
  std::string log, log_text;
  int capabilities[kDevices] = {120, 120};

  OnResolve on_resolve = nullptr;
  OnLaunch on_launch = nullptr;
  OnTask on_task = nullptr;
  // Python's tasks that nobody will run again
  std::vector<long> forgotten;
  OnCapture on_capture = nullptr;
};

// Never destroyed: torch releases streams and memory as the process ends.
State& state() {
  static State* state = [] {
    auto* made = new State;
    for (uint8_t** area : {&made->arena, &made->written}) {
      const bool is_arena = area == &made->arena;
      void* at = mmap(nullptr, kArenaBytes, is_arena ? PROT_NONE : PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) {
        std::perror("stand-in GPU: mmap");
        std::abort();
      }
      *area = static_cast<uint8_t*>(at);
    }
    for (int device = 0; device < kDevices; ++device) {
      made->streams.push_back(std::make_unique<Stream>(Stream{device, device}));
      made->defaults[device] = made->streams.back().get();
    }
    return made;
  }();
  return *state;
}

thread_local std::string detail;
thread_local Status detail_of = kSuccess;

size_t whole_pages(size_t size) { return (size + kPage - 1) / kPage * kPage; }
size_t place_of(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - state().arena;
}
std::string number(uint64_t value) { return std::to_string(value); }

// Gives the pages of freed memory back, once nothing runs or is queued that may use them.
void unmap_freed() {
  State& s = state();
  if (s.executing > 0) return;
  for (const auto& stream : s.streams) {
    if (!stream->queue.empty()) return;
  }
  for (const uintptr_t base : s.to_unmap) {
    void* pages = reinterpret_cast<void*>(base);
    const size_t bytes = whole_pages(s.allocations.at(base).size);
    madvise(pages, bytes, MADV_DONTNEED);
    mprotect(pages, bytes, PROT_NONE);
    madvise(s.written + place_of(pages), bytes, MADV_DONTNEED);
  }
  s.to_unmap.clear();
  s.freed_bytes = 0;
}

// How the bytes of an access lie: empty where all is well.
std::string trouble(const void* pointer, size_t size, int device) {
  const Allocation* a = allocation_of(pointer);
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (a == nullptr) return number(size) + " bytes at an address that is in no allocation";
  const std::string where = number(size) + " bytes at byte " + number(at - a->base) +
                            " of an allocation of " + number(a->size) + " bytes";
  if (at + size > a->base + a->size) return "out of bounds: " + where;
  const uint64_t running = thread_state().running;
  const uint64_t now = running ? running : state().enqueued + 1;
  if (a->freed && a->freed < now) return "use after free: " + where;
  if (device >= 0 && a->device != device) {
    return "memory of device " + number(a->device) + " used on device " + number(device) + ": " +
           where;
  }
  return "";
}

Status run(Stream* stream) {
  const std::shared_ptr<Task> task = stream->queue.front();
  stream->queue.pop_front();
  uint64_t& running = thread_state().running;
  const uint64_t outer = running;
  running = task->number;
  ++state().executing;
  detail.clear();
  const Status status = task->run();
  --state().executing;
  running = outer;
  if (status == kSuccess) return kSuccess;
  return fail_for_good(status, task->name + ", enqueued as number " + number(task->number) +
                                   " on stream " + number(stream->number) + ": " + detail);
}

Status run_until(Stream* stream, const std::function<bool()>& done) {
  while (state().lasting == kSuccess && !done()) {
    if (stream->queue.empty()) {
      return fail_for_good(kLaunchFailed, "waits for what no stream has queued");
    }
    if (const Status status = run(stream)) return status;
  }
  return state().lasting;
}

void forget_all_work() {
  State& s = state();
  for (const auto& stream : s.streams) {
    stream->queue.clear();
    stream->capture = nullptr;
    stream->frontier.clear();
  }
  s.captures.clear();
}

double now_in_milliseconds() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(since).count();
}

void* python(const char* function) { return dlsym(RTLD_DEFAULT, function); }

void invalidate(Capture* capture) { capture->invalid = true; }

Capture* capture_with(uint64_t id) {
  for (const auto& capture : state().captures) {
    if (capture->id == id) return capture.get();
  }
  return nullptr;
}

}  // namespace

Guard::Guard() { state().mutex.lock(); }
Guard::~Guard() { state().mutex.unlock(); }

Unlocked::Unlocked() { state().mutex.unlock(); }
Unlocked::~Unlocked() { state().mutex.lock(); }

Executor::Executor() {
  State& s = state();
  if (s.executor.try_lock()) return;
  const Unlocked unlocked;
  const auto holds = reinterpret_cast<int (*)()>(python("PyGILState_Check"));
  if (holds == nullptr || !holds()) {
    s.executor.lock();
    return;
  }
  const auto let_go = reinterpret_cast<void* (*)()>(python("PyEval_SaveThread"));
  const auto take = reinterpret_cast<void (*)(void*)>(python("PyEval_RestoreThread"));
  void* thread = let_go();
  s.executor.lock();
  take(thread);
}
Executor::~Executor() { state().executor.unlock(); }

Status fail(Status status, const std::string& text) {
  detail = text;
  detail_of = status;
  return status;
}

Status fail_for_good(Status status, const std::string& text) {
  State& s = state();
  if (s.lasting == kSuccess) {
    s.lasting = status;
    s.lasting_detail = text;
    forget_all_work();
  }
  return s.lasting;
}

ThreadState& thread_state() {
  thread_local ThreadState thread;
  return thread;
}

void note(const std::string& kind, const std::string& text) {
  if (state().recording) state().log += kind + "\t" + text + "\n";
}

Status enter(const char* function) {
  State& s = state();
  for (auto fault = s.faults.begin(); fault != s.faults.end(); ++fault) {
    if (fault->function != function || fault->calls_before-- > 0) continue;
    const Fault found = *fault;
    s.faults.erase(fault);
    const std::string text = std::string(function) + " was made to fail";
    return found.for_good ? fail_for_good(found.status, text) : fail(found.status, text);
  }
  return s.lasting;
}

const char* message(Status status) {
  static const std::map<Status, const char*> words = {
      {kSuccess, "no error"},
      {kInvalidValue, "invalid argument"},
      {kOutOfMemory, "out of memory"},
      {kInvalidConfiguration, "invalid configuration argument"},
      {kInvalidDevice, "invalid device ordinal"},
      {kInvalidContext, "invalid device context"},
      {kUnsupportedPtx, "the provided PTX was compiled with an unsupported toolchain."},
      {kNoBinary, "no kernel image is available for execution on the device"},
      {kInvalidHandle, "invalid resource handle"},
      {kNotFound, "named symbol not found"},
      {kNotReady, "device not ready"},
      {kIllegalAddress, "an illegal memory access was encountered"},
      {kLaunchFailed, "unspecified launch failure"},
      {kNotSupported, "operation not supported"},
      {kCaptureUnsupported, "operation not permitted when stream is capturing"},
      {kCaptureInvalidated, "operation failed due to a previous error during capture"},
      {kCaptureMerge, "operation would result in a merge of separate capture sequences"},
      {kCaptureUnmatched, "capture was not ended in the same stream as it began"},
      {kCaptureUnjoined, "capturing stream has unjoined work"},
      {kCaptureIsolation, "dependency created on uncaptured work in another stream"},
      {kCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"},
      {kCaptureWrongThread,
       "attempt to terminate a thread-local capture sequence from another thread"},
  };
  const auto found = words.find(status);
  thread_local std::string text;
  text = found == words.end() ? "error " + std::to_string(status) : found->second;
  if (status != kSuccess && status == state().lasting) {
    text += " (stand-in GPU: " + state().lasting_detail + ")";
  } else if (status != kSuccess && status == detail_of && !detail.empty()) {
    text += " (stand-in GPU: " + detail + ")";
  }
  return text.c_str();
}

// Memory

bool is_device_memory(const void* pointer) { return place_of(pointer) < kArenaBytes; }

bool is_pinned(const void* pointer) {
  const auto& pinned = state().pinned;
  auto next = pinned.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (next == pinned.begin()) return false;
  --next;
  return reinterpret_cast<uintptr_t>(pointer) < next->first + next->second;
}

const Allocation* allocation_of(const void* pointer) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const auto& all = state().allocations;
  auto next = all.upper_bound(at);
  if (next == all.begin()) return nullptr;
  --next;
  // the pages behind it are its neighbourhood, so that what runs over its end is told
  return at < next->first + whole_pages(next->second.size) + kPage ? &next->second : nullptr;
}

size_t bytes_in_use(int device) { return state().in_use[device]; }
size_t device_bytes() { return state().device_bytes; }

Status allocate(void** pointer, size_t size, int device) {
  State& s = state();
  const size_t bytes = whole_pages(size);
  if (s.in_use[device] + size > s.device_bytes || s.next + bytes + kPage > kArenaBytes) {
    return fail(kOutOfMemory, number(size) + " bytes");
  }
  uint8_t* const at = s.arena + s.next;
  s.next += bytes + kPage;
  s.in_use[device] += size;
  if (mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) {
    std::perror("stand-in GPU: mprotect");
    std::abort();
  }
  if (size <= kMostPoisoned) std::memset(at, kPoison, size);
  const auto base = reinterpret_cast<uintptr_t>(at);
  s.allocations[base] = {base, size, device};
  note("allocation", number(size));
  *pointer = at;
  return kSuccess;
}

Status release(void* pointer) {
  if (pointer == nullptr) return kSuccess;
  State& s = state();
  const auto found = s.allocations.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == s.allocations.end() || found->second.freed) {
    return fail(kInvalidValue, "frees what is not allocated");
  }
  Allocation& a = found->second;
  a.freed = s.enqueued;
  s.in_use[a.device] -= a.size;
  s.to_unmap.push_back(a.base);
  s.freed_bytes += a.size;
  note("free", number(a.size));
  // An error of what runs then is for whoever waits for it.
  for (int device = 0; s.freed_bytes > kMostFreed && device < kDevices; ++device) {
    if (s.captures.empty()) (void)synchronize_device(device);
  }
  unmap_freed();
  return kSuccess;
}

Status allocate_pinned(void** pointer, size_t size) {
  *pointer = std::aligned_alloc(kPage, whole_pages(std::max(size, size_t{1})));
  state().pinned[reinterpret_cast<uintptr_t>(*pointer)] = size;
  return kSuccess;
}

Status release_pinned(void* pointer) {
  if (pointer != nullptr && state().pinned.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) {
    return fail(kInvalidValue, "frees what is no pinned memory");
  }
  std::free(pointer);
  return kSuccess;
}

// Work

Stream* stream_of(void* handle) {
  State& s = state();
  const auto value = reinterpret_cast<uintptr_t>(handle);
  if (value <= 1) return s.defaults[thread_state().device];  // the legacy stream
  for (const auto& stream : s.streams) {
    if (stream.get() == handle) return stream.get();
  }
  return nullptr;
}

Stream* new_stream(int device) {
  State& s = state();
  const int number = static_cast<int>(s.streams.size());
  s.streams.push_back(std::make_unique<Stream>(Stream{device, number}));
  return s.streams.back().get();
}

void enqueue(Stream* stream, std::string name, std::function<Status()> work) {
  State& s = state();
  auto task = std::make_shared<Task>(Task{std::move(name), std::move(work), ++s.enqueued});
  if (stream->capture == nullptr) {
    stream->queue.push_back(std::move(task));
    return;
  }
  auto& nodes = stream->capture->graph->nodes;
  nodes.push_back({std::move(task), stream->frontier});
  stream->frontier = {static_cast<int>(nodes.size()) - 1};
}

Status synchronize(Stream* stream) {
  if (stream->capture != nullptr) {
    invalidate(stream->capture);
    return fail(kCaptureUnsupported, "waits for a stream that is capturing");
  }
  const Executor executor;
  const Status status = run_until(stream, [=] { return stream->queue.empty(); });
  unmap_freed();
  return status;
}

// What nothing orders runs in an order that the program did not write: the newest
// stream first, or at random for a seed.
Status synchronize_device(int device) {
  if (const Status status = while_capturing()) return status;
  State& s = state();
  std::vector<Stream*> order;
  for (const auto& stream : s.streams) {
    if (stream->device == device) order.insert(order.begin(), stream.get());
  }
  if (s.seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(s.seed++));
  for (Stream* stream : order) {
    if (const Status status = synchronize(stream)) return status;
  }
  return kSuccess;
}

Status query(Stream* stream) {
  if (stream->capture != nullptr) {
    invalidate(stream->capture);
    return fail(kCaptureUnsupported, "asks for the state of a stream that is capturing");
  }
  const Executor executor;
  if (stream->queue.empty()) return kSuccess;
  if (const Status status = run(stream)) return status;
  return stream->queue.empty() ? kSuccess : kNotReady;
}

Status record(Event* event, Stream* stream) {
  if (stream->device != event->device) {
    return fail(kInvalidHandle, "the event and the stream belong to different devices");
  }
  if (stream->capture != nullptr) {
    event->capture_id = stream->capture->id;
    event->frontier = stream->frontier;
    return kSuccess;
  }
  event->capture_id = 0;
  event->stream = stream;
  const uint64_t ticket = event->ticket = ++state().tickets;
  enqueue(stream, "an event", [=] {
    event->done = std::max(event->done, ticket);
    event->milliseconds = now_in_milliseconds();
    return kSuccess;
  });
  return kSuccess;
}

Status wait(Stream* stream, Event* event) {
  if (event->capture_id != 0) {
    Capture* capture = capture_with(event->capture_id);
    if (capture == nullptr) return fail(kCapturedEvent, "of a capture that has ended");
    if (stream->capture != nullptr && stream->capture != capture) return kCaptureMerge;
    stream->capture = capture;
    for (const int node : event->frontier) {
      auto& frontier = stream->frontier;
      if (std::find(frontier.begin(), frontier.end(), node) == frontier.end()) {
        frontier.push_back(node);
      }
    }
    return kSuccess;
  }
  if (stream->capture != nullptr) {
    invalidate(stream->capture);
    return fail(kCaptureIsolation, "waits in a capture for an event from outside");
  }
  if (event->ticket == 0) return kSuccess;
  const uint64_t ticket = event->ticket;
  Stream* const from = event->stream;
  enqueue(stream, "a wait for an event",
          [=] { return run_until(from, [=] { return event->done >= ticket; }); });
  return kSuccess;
}

Status synchronize(Event* event) {
  if (event->capture_id != 0) return kCapturedEvent;
  if (const Status status = while_capturing()) return status;
  const Executor executor;
  const uint64_t ticket = event->ticket;
  return run_until(event->stream, [=] { return event->done >= ticket; });
}

Status query(Event* event) {
  if (event->capture_id != 0) return kCapturedEvent;
  const Executor executor;
  if (event->done < event->ticket) {
    if (const Status status = run(event->stream)) return status;
  }
  return event->done < event->ticket ? kNotReady : kSuccess;
}

Status copy(void* to, const void* from, size_t size, Stream* stream) {
  if (size == 0) return kSuccess;
  const bool to_device = is_device_memory(to), from_device = is_device_memory(from);
  const char* kind = to_device     ? from_device ? "on the device" : "to the device"
                     : from_device ? "to the host"
                                   : "on the host";
  note("copy", kind);
  const bool pageable = (!to_device && !is_pinned(to)) || (!from_device && !is_pinned(from));
  if (pageable && stream->capture != nullptr) {
    invalidate(stream->capture);
    return fail(kCaptureUnsupported, "copies memory of the host that is not pinned");
  }
  std::vector<uint8_t> staged;
  if (!from_device && !is_pinned(from)) {
    const auto* bytes = static_cast<const uint8_t*>(from);
    staged.assign(bytes, bytes + size);
  }
  enqueue(stream, std::string("a copy ") + kind, [=, staged = std::move(staged)] {
    State& s = state();
    std::string wrong;
    if (to_device) wrong = trouble(to, size, -1);
    if (from_device && wrong.empty()) wrong = trouble(from, size, -1);
    if (!wrong.empty()) return fail(kIllegalAddress, wrong);
    if (from_device && !to_device) {
      const uint8_t* written = s.written + place_of(from);
      const auto* gap = static_cast<const uint8_t*>(std::memchr(written, 0, size));
      if (gap != nullptr) {
        return fail(kIllegalAddress,
                    "byte " + number(gap - written) + " of " + number(size) + " was never written");
      }
    }
    std::memmove(to, staged.empty() ? from : staged.data(), size);
    if (to_device) {
      uint8_t* written = s.written + place_of(to);
      if (from_device) {
        std::memmove(written, s.written + place_of(from), size);
      } else {
        std::memset(written, 1, size);
      }
    }
    return Status{kSuccess};
  });
  return !to_device && pageable ? synchronize(stream) : Status{kSuccess};
}

Status fill(void* to, int value, size_t size, Stream* stream) {
  if (size == 0) return kSuccess;
  note("fill", number(size));
  enqueue(stream, "a fill", [=] {
    const std::string wrong = trouble(to, size, -1);
    if (!wrong.empty()) return fail(kIllegalAddress, wrong);
    std::memset(to, value, size);
    std::memset(state().written + place_of(to), 1, size);
    return Status{kSuccess};
  });
  return kSuccess;
}

// Graphs

Status begin_capture(Stream* stream, int mode) {
  State& s = state();
  if (stream == s.defaults[stream->device]) {
    return fail(kCaptureUnsupported, "the legacy stream cannot be captured");
  }
  if (stream->capture != nullptr) return fail(kInvalidValue, "the stream is capturing already");
  s.captures.push_back(std::make_unique<Capture>(Capture{
      ++s.captures_made, mode, std::this_thread::get_id(), stream, std::make_unique<Graph>()}));
  stream->capture = s.captures.back().get();
  stream->frontier.clear();
  const Unlocked unlocked;
  if (s.on_capture != nullptr) s.on_capture(1);
  return kSuccess;
}

Status end_capture(Stream* stream, Graph** graph) {
  State& s = state();
  Capture* const capture = stream->capture;
  *graph = nullptr;
  if (capture == nullptr) return fail(kInvalidValue, "the stream is not capturing");
  if (capture->origin != stream) return kCaptureUnmatched;
  if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) {
    return kCaptureWrongThread;
  }
  std::unique_ptr<Graph> made = std::move(capture->graph);
  const bool invalid = capture->invalid;
  // what the origin has joined: the nodes that its last ones come after
  std::vector<char> joined(made->nodes.size());
  std::vector<int> left = stream->frontier;
  while (!left.empty()) {
    const int node = left.back();
    left.pop_back();
    if (joined[node]) continue;
    joined[node] = 1;
    left.insert(left.end(), made->nodes[node].after.begin(), made->nodes[node].after.end());
  }
  for (const auto& other : s.streams) {
    if (other->capture != capture) continue;
    other->capture = nullptr;
    other->frontier.clear();
  }
  s.captures.erase(std::find_if(s.captures.begin(), s.captures.end(),
                                [=](const auto& c) { return c.get() == capture; }));
  {
    const Unlocked unlocked;
    if (s.on_capture != nullptr) s.on_capture(0);
  }
  if (invalid) return fail(kCaptureInvalidated, "an earlier call was not permitted");
  if (std::find(joined.begin(), joined.end(), 0) != joined.end()) return kCaptureUnjoined;
  *graph = made.release();
  return kSuccess;
}

// Its nodes, of those that may go next always the last one that was captured
Status launch_graph(const Graph& graph, Stream* stream) {
  std::vector<char> done(graph.nodes.size());
  for (size_t count = 0; count < done.size(); ++count) {
    for (size_t i = done.size(); i-- > 0;) {
      const Node& node = graph.nodes[i];
      const auto is_done = [&](int before) { return done[before] != 0; };
      if (done[i] || !std::all_of(node.after.begin(), node.after.end(), is_done)) continue;
      done[i] = 1;
      enqueue(stream, node.task->name + " of a graph", node.task->run);
      break;
    }
  }
  return kSuccess;
}

Status while_capturing() {
  const int mode = thread_state().capture_mode;
  bool broken = false;
  for (const auto& capture : state().captures) {
    const bool mine = capture->thread == std::this_thread::get_id() && capture->mode != 2;
    const bool anyones = mode == 0 && capture->mode == 0;
    if (mode == 2 || !(mine || anyones)) continue;
    invalidate(capture.get());
    broken = true;
  }
  return broken ? fail(kCaptureUnsupported, "it might break a capture") : Status{kSuccess};
}

// Kernels

int capability(int device) { return state().capabilities[device]; }

Status resolve(Function& function, int device) {
  State& s = state();
  if (function.kernel >= 0 && function.capability == capability(device)) return kSuccess;
  if (s.on_resolve == nullptr) {
    return fail(kNotSupported, "no interpreter is there to run " + function.name);
  }
  unsigned sizes[4096];  // as many as their bytes may be
  int count = 0;
  detail.clear();
  int kernel;
  {
    const int wanted = capability(device);
    const Unlocked unlocked;
    kernel = s.on_resolve(function.image, function.file.c_str(), function.name.c_str(), wanted,
                          sizes, &count);
  }
  if (kernel < 0) return fail(-kernel, detail);
  function.kernel = kernel;
  function.capability = capability(device);
  function.parameters.assign(sizes, sizes + count);
  return kSuccess;
}

Status launch(Function& function, Sizes grid, Sizes block, unsigned shared_bytes, Stream* stream,
              void** arguments) {
  const int device = stream->device;
  if (device != thread_state().device) {
    return fail(kInvalidHandle, "the stream is of device " + number(device) + ", device " +
                                    number(thread_state().device) + " is the current one");
  }
  if (stream->capture != nullptr && stream->capture->invalid) return kCaptureInvalidated;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads > 1024 || block.z > 64 ||
      uint64_t{grid.x} * grid.y * grid.z * threads == 0) {
    return fail(kInvalidConfiguration, "a launch of " + function.name);
  }
  if (const Status status = resolve(function, device)) return status;
  std::vector<std::vector<uint8_t>> values;
  for (size_t i = 0; i < function.parameters.size(); ++i) {
    const auto* bytes = static_cast<const uint8_t*>(arguments[i]);
    values.emplace_back(bytes, bytes + function.parameters[i]);
  }
  note("launch", function.name + "\t" + number(device) + "\t" + number(stream->number) + "\t" +
                     number(grid.x) + "\t" + number(block.x));
  const int kernel = function.kernel;
  enqueue(stream, "kernel " + function.name, [=] {
    std::vector<void*> pointers;
    for (const auto& value : values) pointers.push_back(const_cast<uint8_t*>(value.data()));
    const unsigned grid_xyz[] = {grid.x, grid.y, grid.z};
    const unsigned block_xyz[] = {block.x, block.y, block.z};
    const Unlocked unlocked;
    return state().on_launch(kernel, grid_xyz, block_xyz, shared_bytes, pointers.data(), device);
  });
  return kSuccess;
}

void pause() {
  const int microseconds = state().pause_microseconds;
  if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

void reset() {
  State& s = state();
  s.pause_microseconds = 0;
  forget_all_work();
  s.lasting = thread_state().last_error = kSuccess;
  s.faults.clear();
  s.capabilities[0] = s.capabilities[1] = 120;
  s.device_bytes = kDeviceBytes;
  s.seed = 0;
  unmap_freed();
}

}  // namespace stand_in

// For Python

using namespace stand_in;

API void stand_in_connect(OnResolve on_resolve, OnLaunch on_launch, OnTask on_task,
                          OnCapture on_capture) {
  const Guard guard;
  State& s = state();
  s.on_resolve = on_resolve;
  s.on_launch = on_launch;
  s.on_task = on_task;
  s.on_capture = on_capture;
}
API void* stand_in_arena() { return state().arena; }
API void* stand_in_written() { return state().written; }
API size_t stand_in_arena_bytes() { return kArenaBytes; }
// Why bytes may not be accessed by the work that runs now, or "".
API const char* stand_in_trouble(const void* pointer, size_t size, int device) {
  const Guard guard;
  thread_local std::string text;
  text = trouble(pointer, size, device);
  return text.c_str();
}
// The allocation of an address: whether there is one.
API int stand_in_find(const void* pointer, uintptr_t* base, size_t* size) {
  const Guard guard;
  const Allocation* a = allocation_of(pointer);
  if (a == nullptr) return 0;
  *base = a->base;
  *size = a->size;
  return 1;
}
API void stand_in_detail(const char* text) { detail = text; }
// Work of Python's on a stream of the current device, by an id that is given back.
API int stand_in_enqueue(void* handle, const char* name, long id) {
  const Guard guard;
  const Status entered = enter("a kernel of torch");
  Stream* const stream = stream_of(handle);
  const std::shared_ptr<void> owner(nullptr, [id](void*) { state().forgotten.push_back(id); });
  if (entered) return entered;
  if (stream == nullptr || stream->device != thread_state().device) {
    return fail(kInvalidHandle, "a stream that is not of the current device");
  }
  note("launch", std::string(name) + "\t" + number(stream->device) + "\t" + number(stream->number) +
                     "\t1\t1");
  enqueue(stream, name, [id, owner] {
    const Unlocked unlocked;
    return state().on_task(id);
  });
  return kSuccess;
}
// The next of the ids that will not be asked for again, or 0.
API long stand_in_forgotten() {
  const Guard guard;
  auto& forgotten = state().forgotten;
  if (forgotten.empty()) return 0;
  const long id = forgotten.back();
  forgotten.pop_back();
  return id;
}
API const char* stand_in_message(int status) { return message(status); }
API void stand_in_fault(const char* function, int calls_before, int status, int for_good) {
  const Guard guard;
  state().faults.push_back({function, calls_before, status, for_good != 0});
}
API void stand_in_capability(int device, int capability) {
  const Guard guard;
  state().capabilities[device] = capability;
}
// How much memory a device has. Where nobody touches it, it costs nothing.
API void stand_in_memory(size_t bytes) {
  const Guard guard;
  state().device_bytes = bytes;
}
API void stand_in_pause(int microseconds) { state().pause_microseconds = microseconds; }
API void stand_in_order(uint64_t seed) {
  const Guard guard;
  state().seed = seed;
}
// Everything that was noted since the last call, a line each; and whether to go on.
API const char* stand_in_log(int recording) {
  const Guard guard;
  State& s = state();
  s.log_text = std::move(s.log);
  s.log.clear();
  s.recording = recording != 0;
  return s.log_text.c_str();
}
API size_t stand_in_bytes_in_use(int device) {
  const Guard guard;
  return bytes_in_use(device);
}
API void stand_in_reset() {
  const Guard guard;
  reset();
}
