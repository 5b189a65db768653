// A list of plain tensors, read once (plan.cpp) and then passed over by the engine of its device.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor_list.h"

namespace fastclip {

constexpr int32_t kNoGpu = -1;

struct Plan {
  std::vector<TensorView> tensors;
  int32_t gpu = kNoGpu;  // the index of the CUDA device that holds all of them
};

}  // namespace fastclip
