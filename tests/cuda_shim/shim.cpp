// The scheduler behind cuda_runtime.h.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {
namespace {

constexpr size_t kStack = size_t{256} << 10;
constexpr int kPatience = 100000;  // rounds in which nobody meets anybody: the threads wait for something else for ever

enum Schedule { kAscending, kDescending, kRandom };

// Set by the tests, between launches.
Schedule schedule = kAscending;
std::mt19937 random_numbers;
int multiprocessors = 1;
std::string failure;

std::vector<int> order_of(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == kDescending) std::reverse(order.begin(), order.end());
  if (schedule == kRandom) std::shuffle(order.begin(), order.end(), random_numbers);
  return order;
}

// Where threads wait until `size` of them are there.
struct Meeting {
  int size = 0, arrived = 0, held = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) char places[2][16 * kWarpSize];  // in turn: a fast lane may be one shuffle ahead of a slow one
};

struct Fiber {
  void* stack = nullptr;
  ucontext_t context;
  jmp_buf at;
  bool started = false, done = false;
  uint3 index;
  int shuffles = 0;
  const Meeting* waits_for = nullptr;
  int since = 0;

  Fiber() : stack(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Fiber() {
    munmap(stack, kStack);
  }
  Fiber(const Fiber&) = delete;

  bool ready() const {
    return !done && (waits_for == nullptr || waits_for->held != since);
  }
};

// The block of an OS thread. Its fibers outlive it, to be used again by the next.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Meeting all;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  int meetings = 0;  // held since the block began

  void begin(uint3 index, dim3 grid, dim3 size, void (*run)(const void*), const void* with) {
    blockIdx = index;
    gridDim = grid;
    blockDim = size;
    body = run;
    argument = with;
    const int threads = static_cast<int>(size.x);
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    warps.assign((threads + kWarpSize - 1) / kWarpSize, {});
    for (Warp& warp : warps) warp.meeting.size = kWarpSize;
    all = {threads, 0, 0};
    meetings = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = *fibers[i];
      f.done = false;
      f.index = {static_cast<unsigned>(i), 0, 0};
      f.shuffles = 0;
      f.waits_for = nullptr;
    }
  }

  // Lets every thread that can run do so once. False when all are done; an error where none can.
  bool round() {
    bool alive = false, ran = false;
    for (int i : order_of(all.size)) {
      Fiber& f = *fibers[i];
      alive |= !f.done;
      if (!f.ready()) continue;
      f.waits_for = nullptr;
      ran = true;
      enter(f);
    }
    if (alive && !ran) failure = "threads wait at a barrier or a shuffle that others do not reach";
    return alive && ran;
  }

  void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.held;
      ++meetings;
      return;
    }
    current->waits_for = &meeting;
    current->since = meeting.held;
    leave();
  }

  void enter(Fiber& f);
  void leave();
  void abandon();
};

thread_local Block block;

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer keeps a record of the stack in use.
thread_local void* scheduler_fake = nullptr;
thread_local const void* scheduler_stack = nullptr;
thread_local size_t scheduler_size = 0;
void to_fiber(Fiber& f) {
  __sanitizer_start_switch_fiber(&scheduler_fake, f.stack, kStack);
}
void in_scheduler() {
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
}
void to_scheduler(void** fake) {
  __sanitizer_start_switch_fiber(fake, scheduler_stack, scheduler_size);
}
void in_fiber(void* fake) {
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}
#else
void to_fiber(Fiber&) {}
void in_scheduler() {}
void to_scheduler(void**) {}
void in_fiber(void*) {}
#endif

void run_fiber() {
  in_fiber(nullptr);
  for (;;) {
    block.body(block.argument);
    block.current->done = true;
    block.leave();
  }
}

// setjmp and longjmp, since swapcontext asks the kernel for the signal mask each time; it is needed for a first entry.
void Block::enter(Fiber& f) {
  current = &f;
  threadIdx = f.index;
  to_fiber(f);
  if (_setjmp(scheduler) == 0) {
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
    setcontext(&f.context);
  }
  in_scheduler();
}

void Block::leave() {
  void* fake = nullptr;
  to_scheduler(&fake);
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
  in_fiber(fake);
}

// After a failed launch: fibers stopped in the middle cannot be used again.
void Block::abandon() {
  fibers.clear();
}

void run_in_turn(dim3 grid, dim3 size, void (*body)(const void*), const void* argument) {
  for (int b : order_of(static_cast<int>(grid.x))) {
    block.begin({static_cast<unsigned>(b), 0, 0}, grid, size, body, argument);
    while (block.round()) {
    }
    if (!failure.empty()) return block.abandon();
  }
}

}  // namespace

void meet_block() {
  block.meet(block.all);
}

void meet_warp() {
  block.meet(block.warps[threadIdx.x / kWarpSize].meeting);
}

void yield() {
  block.leave();
}

char* exchange() {
  return block.warps[threadIdx.x / kWarpSize].places[block.current->shuffles++ % 2];
}

cudaError_t launch(dim3 grid, dim3 size, void (*body)(const void*), const void* argument, size_t, bool) {
  failure.clear();
  run_in_turn(grid, size, body, argument);
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace shim

const char* cudaGetErrorString(cudaError_t) {
  return shim::failure.c_str();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shim::multiprocessors;
  return cudaSuccess;
}

// --------------------------------------------------------------------------------- what PyTorch has with CUDA only

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

extern "C" int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

extern "C" int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}

// ------------------------------------------------------------------------------------------- what the tests call

extern "C" __attribute__((visibility("default"))) void shim_schedule(int kind, unsigned seed) {
  shim::schedule = static_cast<shim::Schedule>(kind);
  shim::random_numbers.seed(seed);
}

extern "C" __attribute__((visibility("default"))) void shim_multiprocessors(int count) {
  shim::multiprocessors = count;
}
