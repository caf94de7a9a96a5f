// What only the CPU kernels need to know of how tensors lie; ../layout.h has the rest.
#pragma once

#include "../layout.h"
#include "memory.h"

namespace elbo {

// Whether the caches are left to others when a tensor is written: from a third of the last-level one on. What is read
// beside it is twice as large, so that little of both would be there when it is read, and it is written without being
// read first (measured, with 32 MB of cache: 0.8 of a step's time at 25 MB and more; at 12 MB 0.95, and 0.7 on a busy
// EPYC with AVX2).
inline bool passes_caches(int64_t bytes) {
  return bytes >= static_cast<int64_t>(elbo_memory::last_level_cache() / 3);
}

// As empty_strided, for a result that may be large: its memory then comes from the pool.
inline Tensor empty_pooled(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype, const Tensor& like) {
  size_t bytes = like.element_size();
  for (int64_t size : sizes) bytes *= size;
  elbo_memory::Block* block = bytes < elbo_memory::kSmallest ? nullptr : elbo_memory::take(bytes);
  if (block == nullptr) return empty_strided(sizes, strides, dtype, like);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, -1, &handle, 0, nullptr, 0,
      [](void*, void* owner) { elbo_memory::give_back(static_cast<elbo_memory::Block*>(owner)); }, block));
  return Tensor(handle);
}

}  // namespace elbo
