// The end of a norm of few partials and the scaling after it, in one launch: every block combines them for itself.
#pragma once

#include "norm.cuh"
#include "scale.cuh"

namespace fastclip::cuda {

// As long as there is room beside it.
using FusedTable = Table<2040>;

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, 4)
    clip_kernel(const __grid_constant__ Arguments<FinishArguments, AnyTable> arguments) {
  __shared__ double clip_coef;
  const FinishArguments& finish = arguments.own;
  const double partial = combined<kThreads>(finish.kind, finish.partials, finish.slots);
  if (threadIdx.x == 0)
    clip_coef = finish_clip(root(finish.kind, partial, finish.clip.norm_type), finish, blockIdx.x == 0);
  __syncthreads();
  if (clip_coef != 1) scale_chunks(arguments.table, clip_coef, finish.clip.nonfinite == Nonfinite::kZero);
}

}  // namespace fastclip::cuda
