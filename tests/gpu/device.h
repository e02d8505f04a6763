#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// The stand-in GPU: what driver.cpp and runtime.cpp, its two faces, have in common.
// Device memory is host memory of which every allocation and every written byte is
// known; streams are queues that run no sooner than somebody waits for them; kernels
// go to Python, which runs their PTX.

namespace stand_in {

// CUresult and cudaError_t agree on the numbers used here.
using Status = int;
enum : Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidConfiguration = 9,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNoBinary = 209,
  kUnsupportedPtx = 222,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kLaunchFailed = 719,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureMerge = 902,
  kCaptureUnmatched = 903,
  kCaptureUnjoined = 904,
  kCaptureIsolation = 905,
  kCapturedEvent = 907,
  kCaptureWrongThread = 908,
};

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t{8} << 30;  // unless a test asks for more

// Held by every function of the two interfaces, and never while Python is called: a thread
// may wait for it that has Python's lock, and locks of torch's.
class Guard {
 public:
  Guard();
  ~Guard();
  Guard(const Guard&) = delete;
};

// Let go of for the time of a call of Python or of torch.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
};

// Held by the one thread that runs what is queued. Whoever has to wait for it lets go of
// Python's lock, which that thread may need.
class Executor {
 public:
  Executor();
  ~Executor();
  Executor(const Executor&) = delete;
};

// Remembers what to say of the error, beside CUDA's own words.
Status fail(Status status, const std::string& detail);
// After it every call fails, until reset(), as after a kernel's fault on a real GPU.
Status fail_for_good(Status status, const std::string& detail);
const char* message(Status status);

// What every call begins with: it fails if a test has asked for it or if an earlier kernel did.
Status enter(const char* function);
void note(const std::string& kind, const std::string& detail);

// Threads

struct ThreadState {
  int device = 0;
  int context = -1;  // of this device; -1: none yet
  int capture_mode = 0;
  uint64_t running = 0;  // the number of the task that it runs
  Status last_error = kSuccess;
};
ThreadState& thread_state();

// Memory

struct Allocation {
  uintptr_t base;
  size_t size;
  int device;
  uint64_t freed = 0;  // no work that was enqueued later may use it
};
Status allocate(void** pointer, size_t size, int device);
Status release(void* pointer);
Status allocate_pinned(void** pointer, size_t size);
Status release_pinned(void* pointer);
size_t bytes_in_use(int device);
size_t device_bytes();
bool is_device_memory(const void* pointer);
bool is_pinned(const void* pointer);
const Allocation* allocation_of(const void* pointer);

// Work

struct Task {
  std::string name;
  std::function<Status()> run;
  uint64_t number = 0;
};

struct Node {
  std::shared_ptr<Task> task;
  std::vector<int> after;
};
struct Graph {
  std::deque<Node> nodes;  // where they are is what they are called
  std::vector<std::shared_ptr<void>> owned;
};

struct Stream;
struct Capture {
  uint64_t id;
  int mode;
  std::thread::id thread;
  Stream* origin;
  std::unique_ptr<Graph> graph;
  bool invalid = false;
};

struct Stream {
  int device;
  int number;
  std::deque<std::shared_ptr<Task>> queue;
  Capture* capture = nullptr;
  std::vector<int> frontier;  // nodes of the capture that the next one comes after
};

struct Event {
  int device;
  uint64_t ticket = 0, done = 0;  // of the last record that was asked for, and that ran
  Stream* stream = nullptr;
  uint64_t capture_id = 0;
  std::vector<int> frontier;
  double milliseconds = 0;
};

// The stream that a handle stands for on the current device; null where there is none.
Stream* stream_of(void* handle);
Stream* new_stream(int device);
void enqueue(Stream* stream, std::string name, std::function<Status()> run);
Status synchronize(Stream* stream);
Status synchronize_device(int device);
// Lets some work happen, as time would: success if all is done.
Status query(Stream* stream);
Status record(Event* event, Stream* stream);
Status wait(Stream* stream, Event* event);
Status synchronize(Event* event);
Status query(Event* event);

Status copy(void* to, const void* from, size_t size, Stream* stream);
Status fill(void* to, int value, size_t size, Stream* stream);

// Graphs

Status begin_capture(Stream* stream, int mode);
Status end_capture(Stream* stream, Graph** graph);
Status launch_graph(const Graph& graph, Stream* stream);
// Refuses, and ends the captures, where a call might break one: an allocation, a wait.
Status while_capturing();

// Kernels

struct Function {
  const void* image;
  std::string file, name;
  int kernel = -1;  // of the interpreter, once it knows it for a device of this capability
  int capability = 0;
  std::vector<unsigned> parameters = {};
};
struct Sizes {
  unsigned x, y, z;
};
Status resolve(Function& function, int device);
Status launch(Function& function, Sizes grid, Sizes block, unsigned shared_bytes, Stream* stream,
              void** arguments);

// What a test asks for

int capability(int device);  // 10 major + minor
// Where torch asks whether it captures, which it does in the midst of what its locks protect:
// so long, that a thread without the lock would come between.
void pause();
void reset();

}  // namespace stand_in
