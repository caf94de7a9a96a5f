// A block on its OS thread: its CUDA threads as fibers, and where they meet. Included by shim.cpp alone.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {
namespace {

constexpr size_t kStack = size_t{256} << 10;

enum Schedule { kAscending, kDescending, kRandom };

// Set by the tests, between launches.
Schedule schedule = kAscending;
std::mt19937 random_numbers;

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
    for (int i = 0; i < threads; ++i) {
      Fiber& f = *fibers[i];
      f.done = false;
      f.index = {static_cast<unsigned>(i), 0, 0};
      f.shuffles = 0;
      f.waits_for = nullptr;
    }
  }

  enum Outcome { kDone, kRan, kStuck };

  // Lets the warps run in turn, each as far as it can: one may be far ahead of the others, as on a GPU.
  Outcome round() {
    bool alive = false, ran = false;
    for (int w : order_of(static_cast<int>(warps.size()))) {
      bool more = true;
      while (more) {
        more = false;
        for (int i : order_of(kWarpSize)) {
          Fiber& f = *fibers[w * kWarpSize + i];
          alive |= !f.done;
          if (!f.ready()) continue;
          f.waits_for = nullptr;
          more = ran = true;
          enter(f);
        }
        if (schedule == kRandom && random_numbers() % 2) break;  // or not so far
      }
    }
    return !alive ? kDone : ran ? kRan : kStuck;
  }

  void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.held;
      return;
    }
    current->waits_for = &meeting;
    current->since = meeting.held;
    leave();
  }

  void enter(Fiber& f);
  void leave();
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

}  // namespace
}  // namespace shim
