// In place of the file that nvrtc.py writes: code that libcuda.cpp knows by its name, of kernels that it has compiled.
#include "../../../csrc/cuda/images.h"

namespace fastclip::cuda {

const Image kImages[] = {{75, false, "sm_75"}, {80, false, "sm_80"}, {90, false, "sm_90"}, {90, true, "compute_90"}};
const int kNumImages = 4;
#define KERNEL(name) #name,
#define KERNEL_OF(name, ...) #name "<" #__VA_ARGS__ ">",
const char* const kKernelNames[] = {
#include "../../../csrc/cuda/kernels.def"
};
const int kCompilerVersion = 12090;

}  // namespace fastclip::cuda
