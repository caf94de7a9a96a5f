// What only the CPU kernels need to know of how tensors lie; ../layout.h has the rest.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../layout.h"
#include "elbo.h"

namespace elbo {

// Fresh memory for a large result is paid for page by page when it is first written; pages of 2 MiB make that 512 times
// rarer. Only whole pages inside the buffer are named.
inline void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + t.numel() * t.element_size()) / page * page;
  if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// log σ through the data's dimensions in memory order. `values` is contiguous, or in recon's order if it is as large.
inline Broadcast broadcast(const Tensor& values, const Tensor& recon) {
  Broadcast b;
  b.values = span_of(values);
  b.numel = values.numel();
  const int64_t missing = recon.dim() - values.dim();
  const auto stride_of = [&](int64_t k) {  // along recon's dimension k
    return k < missing || values.size(k - missing) == 1 ? 0 : values.stride(k - missing);
  };
  b.dense = values.numel() == recon.numel();
  b.values.batch_stride = recon.size(0) == 1 ? 0 : stride_of(0);
  for (int64_t k : memory_order(recon)) {
    if (!b.sizes.empty() && b.strides.back() == stride_of(k) * recon.size(k)) {
      b.sizes.back() *= recon.size(k);
      b.strides.back() = stride_of(k);
    } else {
      b.sizes.push_back(recon.size(k));
      b.strides.push_back(stride_of(k));
    }
  }
  if (b.sizes.empty()) {
    b.sizes.push_back(1);
    b.strides.push_back(0);
  }
  return b;
}

}  // namespace elbo
