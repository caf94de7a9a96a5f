// Launches, as cuda_runtime.h has them: blocks one after another, or all at once.
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block.h"

namespace shim {

int mutant = 0;

namespace {

constexpr int kSharedBytes = 227 << 10;  // that a block may ask for: an H100's

// Set by the tests, between launches.
int multiprocessors = 3;
bool idle = false;

// Memory, and where in it the first thread of all has accessed several words at once, one access after the other.
const char *watched = nullptr, *watched_end = nullptr;
std::vector<int64_t> seen;

int launches = 0;
std::string failure;

constexpr const char* kStuckMessage = "threads wait at a barrier or a shuffle that others do not reach";

void run_in_turn(dim3 grid, dim3 size, void (*body)(const void*), const void* argument) {
  for (int b : order_of(static_cast<int>(grid.x))) {
    block.begin({static_cast<unsigned>(b), 0, 0}, grid, size, body, argument);
    Block::Outcome outcome;
    while ((outcome = block.round()) == Block::kRan) {
    }
    if (outcome == Block::kDone) continue;
    failure = kStuckMessage;
    return block.fibers.clear();  // those stopped in the middle cannot be used again
  }
}

// A block on a thread of its own, which runs a round when told to; so one thread runs at a time, and the schedule
// decides everything.
class Resident {
 public:
  Resident(unsigned index, dim3 grid, dim3 size, void (*body)(const void*), const void* argument)
      : thread_([=] {
          block.begin({index, 0, 0}, grid, size, body, argument);
          for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return told_; });
            if (stop_) return;
            outcome_ = block.round();
            told_ = false;
            changed_.notify_all();
          }
        }) {}

  ~Resident() {
    tell(true);
    thread_.join();
  }

  Block::Outcome round() {
    tell(false);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !told_; });
    return outcome_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool told_ = false, stop_ = false;
  Block::Outcome outcome_ = Block::kRan;
  std::thread thread_;  // last: it uses the others

  void tell(bool stop) {
    const std::lock_guard<std::mutex> lock(mutex_);
    told_ = true;
    stop_ = stop;
    changed_.notify_all();
  }
};

Meeting whole_grid;

void run_together(dim3 grid, dim3 size, void (*body)(const void*), const void* argument) {
  whole_grid = {static_cast<int>(grid.x * size.x), 0, 0};
  std::vector<std::unique_ptr<Resident>> blocks;
  for (unsigned b = 0; b < grid.x; ++b) blocks.push_back(std::make_unique<Resident>(b, grid, size, body, argument));
  for (;;) {
    bool alive = false, ran = false;
    for (int b : order_of(static_cast<int>(grid.x))) {
      const Block::Outcome outcome = blocks[b]->round();
      alive |= outcome != Block::kDone;
      ran |= outcome == Block::kRan;
    }
    if (!alive) return;
    if (!ran) {
      failure = kStuckMessage;
      return;
    }
  }
}

}  // namespace

void meet_block() {
  block.meet(block.all);
}

void meet_warp() {
  block.meet(block.warps[threadIdx.x / kWarpSize].meeting);
}

void meet_grid() {
  block.meet(whole_grid);
}

char* exchange() {
  return block.warps[threadIdx.x / kWarpSize].places[block.current->shuffles++ % 2];
}

void see(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) failure = "a vector is not aligned";
  const char* at = static_cast<const char*>(p);
  if (watched <= at && at < watched_end && blockIdx.x == 0 && threadIdx.x == 0) seen.push_back(at - watched);
}

cudaError_t launch(
    dim3 grid, dim3 size, void (*body)(const void*), const void* argument, size_t shared, bool cooperative) {
  failure.clear();
  if (shared > kSharedBytes) failure = "a block asks for more shared memory than there is";
  if (cooperative && static_cast<int>(grid.x) > multiprocessors) failure = "the blocks do not fit at once";
  ++launches;
  if (idle) return cudaSuccess;
  if (failure.empty()) (cooperative ? run_together : run_in_turn)(grid, size, body, argument);
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

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? shim::multiprocessors : shim::kSharedBytes;
  return cudaSuccess;
}

// Of csrc/cuda/elbo_step.cuh: the memory that CUDA gives a block with its launch.
namespace elbo {
thread_local float on_chip[shim::kSharedBytes / sizeof(float)];
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

// From now on launches do nothing, or something again.
extern "C" __attribute__((visibility("default"))) void shim_idle(bool on) {
  shim::idle = on;
}

extern "C" __attribute__((visibility("default"))) void shim_mutant(int number) {
  shim::mutant = number;
}

extern "C" __attribute__((visibility("default"))) void shim_watch(const char* begin, int64_t bytes) {
  shim::watched = begin;
  shim::watched_end = begin + bytes;
  shim::seen.clear();
}

// How many there were; `to` has room for `most`.
extern "C" __attribute__((visibility("default"))) int64_t shim_seen(int64_t* to, int64_t most) {
  std::copy_n(shim::seen.data(), std::min<int64_t>(most, shim::seen.size()), to);
  return shim::seen.size();
}

extern "C" __attribute__((visibility("default"))) int shim_launches() {
  return shim::launches;
}
