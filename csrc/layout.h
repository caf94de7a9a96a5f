// Which tensors the kernels can walk as they lie, and what becomes of the others.
//
// A kernel walks a sample as one dense block, in memory order. So a tensor can be used in place if each sample is
// dense, whatever the order of its dimensions (contiguous, channels_last, permuted inside the sample) and however far
// apart the samples are (chunks of a packed tensor). Tensors that are walked together must share that order: the first
// one decides it, and the others are copied into it if they differ.
#pragma once

#include "errors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "span.h"

namespace elbo {

using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

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
  if (t.is_contiguous()) return true;  // most are, and a hierarchy has hundreds of tensors
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  const auto order = memory_order(t);
  for (auto k = order.rbegin(); k != order.rend(); ++k) {
    if (stride[*k] != expected) return false;
    expected *= size[*k];
  }
  return true;
}

// Calls f, which makes a tensor of another's size on its device.
template <class F>
inline Tensor as_large_as(const Tensor& like, F f) {
  return elbo_errors::taking(like.numel() * like.element_size(), like.is_cpu(), f);
}

// The tensor itself, or a copy of it, whose samples are dense.
inline Tensor walkable(const Tensor& t) {
  return samples_are_dense(t) ? t : as_large_as(t, [&] { return torch::stable::contiguous(t); });
}

// An uninitialised tensor on another's device. Through a function of the ABI's own: those that call the dispatcher by
// an operator's name take longer than a small gradient.
inline Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int64_t bytes = aoti_torch_dtype_element_size(type);
  for (int64_t size : sizes) bytes *= size;
  return elbo_errors::taking(bytes, like.is_cpu(), [&] {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device_type, device_index, &handle));
    return Tensor(handle);
  });
}

// How a tensor is made: empty_strided, or what takes its place.
using MakeEmpty = Tensor (*)(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype, const Tensor& like);

// A dense batch of a walkable tensor's shape and order inside the sample.
inline Tensor empty_in_order(const Tensor& walked, ScalarType dtype) {
  const auto stride = walked.strides();
  std::vector<int64_t> strides(stride.begin(), stride.end());
  strides[0] = sample_size(walked);
  return empty_strided(walked.sizes(), strides, dtype, walked);
}

inline Tensor in_order_of(const Tensor& t, const Tensor& walked, ScalarType dtype) {
  if (same_order(t, walked) && t.scalar_type() == dtype) return t;
  Tensor copy = empty_in_order(walked, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor in_order_of(const Tensor& t, const Tensor& walked) {
  return in_order_of(t, walked, t.scalar_type());
}

inline Tensor of_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Whether torch.empty_like would give a tensor the strides of this one: its elements fill a block of memory.
inline bool is_dense(const Tensor& t) {
  return t.is_contiguous() || (samples_are_dense(t) && (t.size(0) == 1 || t.stride(0) == sample_size(t)));
}

// A result with empty_like's strides; written through a buffer where those are not the order that the kernels walk in,
// or where they write another dtype.
struct Output {
  Tensor result;
  OptTensor buffer;

  Output(const Tensor& input, const Tensor& walked, ScalarType written, MakeEmpty empty)
      : result(
            is_dense(input) ? empty(input.sizes(), input.strides(), input.scalar_type(), input)
                            : as_large_as(input, [&] { return torch::stable::empty_like(input); })) {
    const bool direct = written == input.scalar_type() && same_order(result, walked) && is_dense(result);
    if (!direct) buffer = empty_in_order(walked, written);
  }

  const Tensor& written_to() const {
    return buffer ? *buffer : result;
  }

  Tensor finish() {
    if (buffer) torch::stable::copy_(result, *buffer);
    return result;
  }
};

}  // namespace elbo
