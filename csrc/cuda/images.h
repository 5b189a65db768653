// The device code in the library, written by nvrtc.py when it is built.
#pragma once

namespace fastclip::cuda {

struct Image {
  int arch;     // 10 * major + minor of the compute capability
  bool is_ptx;  // for that one and all later ones, else for its major and this minor or later
  const char* code;
};

extern const Image kImages[];
extern const int kNumImages;
// Of the kernels of kernels.def, in its order.
extern const char* const kKernelNames[];
// The version of CUDA that the compiler is of, as 1000 * major + 10 * minor.
extern const int kCompilerVersion;

}  // namespace fastclip::cuda
