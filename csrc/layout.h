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

#include "span.h"

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

inline Tensor in_order_of(const Tensor& t, const Tensor& lead, ScalarType dtype) {
  if (same_order(t, lead) && t.scalar_type() == dtype) return t;
  Tensor copy = empty_in_order(lead, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor in_order_of(const Tensor& t, const Tensor& lead) {
  return in_order_of(t, lead, t.scalar_type());
}

inline Span span_of(const Tensor& t) {
  return {
      static_cast<char*>(t.data_ptr()), t.scalar_type(), static_cast<int64_t>(t.element_size()),
      t.size(0) == 1 ? 0 : t.stride(0)};
}

// A result with empty_like's strides; written through a buffer where those are not the leader's order, or where the
// kernel writes another dtype.
struct Output {
  Tensor result, buffer;
  bool direct;

  Output(const Tensor& input, const Tensor& lead, ScalarType written)
      : result(torch::stable::empty_like(input)), buffer(result) {
    const bool dense = result.size(0) == 1 || result.stride(0) == sample_size(result);
    direct = same_order(result, lead) && dense && written == input.scalar_type();
    if (!direct) buffer = empty_in_order(lead, written);
  }

  Tensor finish() {
    if (!direct) torch::stable::copy_(result, buffer);
    return result;
  }
};

}  // namespace elbo
