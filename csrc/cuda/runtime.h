// The driver as the launches need it: its devices, and kernels by their place in kernels.def. What fails is a
// std::runtime_error that names the call; nothing of it is kept, so that the next call tries again.
#pragma once

#include <cstddef>
#include <cstdint>

#include "passes.h"

namespace fastclip::cuda {

// Opens the driver's library by this name. Throws where it lacks a function or serves an older CUDA than is needed.
void open_driver(const char* name);

// Loads the kernels for a device, once; all of them at once and before the first launch, so that none is loaded when a
// stream is being captured. Throws where there is no code for it.
void load_kernels(int device);

// Whether the device adds float64 at half the rate of float32.
bool has_fast_float64(Queue queue);

void launch_kernel(const char* name, int kernel, unsigned blocks, unsigned threads, void** parameters, Queue queue);
void set_zero(void* place, size_t bytes, Queue queue);

}  // namespace fastclip::cuda
