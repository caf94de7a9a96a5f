// Stands in for CUDA's header: the one group that the kernels use.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const {
    shim::meet_grid();
  }
};

inline grid_group this_grid() {
  return {};
}

}  // namespace cooperative_groups
