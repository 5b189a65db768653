// The end of a norm of few partials and the scaling after it, in one launch: every block combines them for itself.
#pragma once

#include "norm.cuh"
#include "scale.cuh"

namespace fastclip::cuda {

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    clip_kernel(const __grid_constant__ Arguments<FinishArguments, AnyTable> arguments) {
  const FinishArguments& finish = arguments.own;
  const double partial = combined<kThreads>(finish.kind, finish.partials, finish.slots);
  const double clip_coef = in_first_thread(
      [&] { return finish_clip(root(finish.kind, partial, finish.clip.norm_type), finish, blockIdx.x == 0); });
  if (clip_coef != 1) scale_chunks(arguments.table, clip_coef, finish.clip.nonfinite == Nonfinite::kZero);
}

}  // namespace fastclip::cuda
