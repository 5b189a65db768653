// The device code, compiled by nvrtc.py for each architecture: the templates of kernels.def are instantiated by their
// names, as they are written there.
#include "fused.cuh"
#include "norm.cuh"
#include "scale.cuh"
#include "stats.cuh"

using namespace fastclip;
using namespace fastclip::cuda;
