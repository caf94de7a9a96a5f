// What the memory of this machine needs for the bytes of a loss: plain loops that read tensors and write gradients of
// no meaning, on PyTorch's threads. Tensors of any dtype are read as 32-bit words, so no conversion is in the time.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace {

using Word = uint32_t;
constexpr int64_t kGrain = 32768;  // words worth a thread of their own
constexpr int kMost = 4;

// Streams of one length that are read, and written, side by side.
struct Move {
  const Word* in[kMost];
  Word* out[kMost];
  int64_t reads, writes, words;
};

template <int Reads, int Writes>
Word share(const Move& move, int64_t begin, int64_t end) {
  const Word* __restrict in[Reads];
  Word* __restrict out[Writes + 1];
  for (int r = 0; r < Reads; ++r) in[r] = move.in[r];
  for (int w = 0; w < Writes; ++w) out[w] = move.out[w];
  Word sum = 0;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    Word mixed = 0;
    for (int r = 0; r < Reads; ++r) mixed ^= in[r][i];
    for (int w = 0; w < Writes; ++w) out[w][i] = mixed + w;
    if (Writes == 0) sum += mixed;
  }
  return sum;
}

using Share = Word (*)(const Move&, int64_t, int64_t);

Share share_for(const Move& move) {
  switch (move.reads * 10 + move.writes) {
    case 20:
      return share<2, 0>;
    case 21:
      return share<2, 1>;
    case 22:
      return share<2, 2>;
    case 30:
      return share<3, 0>;
    case 32:
      return share<3, 2>;
    case 40:
      return share<4, 0>;
    case 44:
      return share<4, 4>;
    default:
      return nullptr;
  }
}

}  // namespace

// Returns a sum over what was only read, so that the compiler cannot leave the reading out; −1 for streams that no loop
// is compiled for.
extern "C" __attribute__((visibility("default"))) int64_t fused_elbo_bench_move(const Move* moves, int64_t count) {
  std::atomic<Word> total{0};
  for (int64_t k = 0; k < count; ++k) {
    const Move& move = moves[k];
    const Share run = share_for(move);
    if (run == nullptr) return -1;
    torch::stable::parallel_for(
        0, move.words, kGrain, [&](int64_t begin, int64_t end) { total += run(move, begin, end); });
  }
  return total;
}
