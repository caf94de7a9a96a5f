// Which tensors the kernels can walk as they lie, and what becomes of the others.
//
// A kernel walks a sample as one dense block, in memory order. So a tensor can be used in place if each sample is
// dense, whatever the order of its dimensions (contiguous, channels_last, permuted inside the sample) and however far
// apart the samples are (chunks of a packed tensor). Tensors that are walked together must share that order: the first
// one, the leader, decides it, and the others are copied into it if they differ.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "elbo.h"

namespace elbo {

using torch::stable::Tensor;

inline int64_t sample_size(const Tensor& t) {
  return t.numel() / t.size(0);
}

inline bool same_order(const Tensor& a, const Tensor& b) {
  const auto size = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t k = 1; k < size.size(); ++k) {
    if (size[k] > 1 && x[k] != y[k]) return false;
  }
  return true;
}

// The dimensions of a sample longer than 1, outermost in memory first.
inline std::vector<int64_t> memory_order(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  std::vector<int64_t> order;
  for (int64_t k = 1; k < t.dim(); ++k) {
    if (size[k] > 1) order.push_back(k);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return stride[a] > stride[b]; });
  return order;
}

inline bool samples_are_dense(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  const auto order = memory_order(t);
  for (auto k = order.rbegin(); k != order.rend(); ++k) {
    if (stride[*k] != expected) return false;
    expected *= size[*k];
  }
  return true;
}

inline Tensor leader(const Tensor& t) {
  return samples_are_dense(t) ? t : torch::stable::contiguous(t);
}

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

// A dense batch of another tensor's shape and order inside the sample.
inline Tensor empty_in_order(const Tensor& lead, ScalarType dtype) {
  const auto stride = lead.strides();
  std::vector<int64_t> strides(stride.begin(), stride.end());
  strides[0] = sample_size(lead);
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(lead.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      lead.dim(), lead.sizes().data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, -1, &handle));
  return Tensor(handle);
}

inline Tensor in_order_of(const Tensor& t, const Tensor& lead) {
  if (same_order(t, lead)) return t;
  Tensor copy = empty_in_order(lead, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline Span span_of(const Tensor& t) {
  return {
      static_cast<char*>(t.data_ptr()), t.scalar_type(), static_cast<int64_t>(t.element_size()),
      t.size(0) == 1 ? 0 : t.stride(0)};
}

// A result with empty_like's strides; written through a buffer where those are not the leader's order.
struct Output {
  Tensor result, buffer;
  bool direct;

  Output(const Tensor& input, const Tensor& lead) : result(torch::stable::empty_like(input)), buffer(result) {
    direct = same_order(result, lead) && (result.size(0) == 1 || result.stride(0) == sample_size(result));
    if (!direct) buffer = empty_in_order(lead, input.scalar_type());
    advise_huge_pages(buffer);
  }

  Tensor finish() {
    if (!direct) torch::stable::copy_(result, buffer);
    return result;
  }
};

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
