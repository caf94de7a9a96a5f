// Where the results of a block go: straight into tensors of what is computed with, past the caches if they are to; else
// into scratch, and from there, converted, into the tensors that want them.
#pragma once

#include "convert.h"

namespace elbo {

template <class A, int Count>
class BlockResults {
 public:
  BlockResults(const Span* const (&spans)[Count], int64_t sample, int64_t first, bool past_caches)
      : spans_(spans), sample_(sample), first_(first) {
    for (int k = 0; k < Count; ++k) {
      at_[k] = spans[k]->base ? write_to(*spans[k], sample, first, scratch_[k]) : scratch_[k];
      const bool aligned = reinterpret_cast<uintptr_t>(at_[k]) % kVectorBytes == 0;
      past_caches_[k] = past_caches && aligned && at_[k] != scratch_[k];
    }
  }

  BlockResults(const BlockResults&) = delete;

  template <class N>
  ELBO_INLINE void put(int k, int64_t i, Vector<A> v, N lanes) {
    if (std::is_same_v<N, AllLanes<A>> && past_caches_[k]) {
      stream(at_[k] + i, v);
    } else {
      store(at_[k] + i, v, lanes);
    }
  }

  // After the last `put` of n elements.
  void finish(int64_t n) {
    bool any_past_caches = false;
    for (int k = 0; k < Count; ++k) {
      if (spans_[k]->base) written(*spans_[k], sample_, first_, n, at_[k]);
      any_past_caches |= past_caches_[k];
    }
    if (any_past_caches) streamed();
  }

  // To be read where it was not put past the caches.
  const A* at(int k) const {
    return at_[k];
  }

 private:
  const Span* const (&spans_)[Count];
  const int64_t sample_, first_;
  A scratch_[Count][kBlock];
  A* at_[Count];
  bool past_caches_[Count];
};

}  // namespace elbo
