// The passes over a list of tensors in the memory of one CUDA device. They are queued on a stream, wait for nothing and
// read nothing back; `scratch` may be given back to the stream's allocator as soon as they return. All memory of the
// host is there before the first launch; where a launch fails after others of the same write, the error says so.
#pragma once

#include <cstdint>
#include <vector>

#include "../clip.h"
#include "../views.h"

namespace fastclip::cuda {

struct Queue {
  int device;
  void* stream;  // CUstream
};

// float64 numbers of scratch that a pass over the tensors takes.
int64_t scratch_size(const std::vector<TensorView>& tensors);

// *result = sum |x|^p, max |x|, min |x| or the number of tensors with a non-zero: the norm before its root.
void norm_partial(const std::vector<TensorView>& tensors, double norm_type, double* scratch, double* result,
                  Queue queue);

// *norm = the norm over all elements of all tensors, 0 where there are none, in `dtype`.
void total_norm(const std::vector<TensorView>& tensors, double norm_type, double* scratch, void* norm, Dtype dtype,
                Queue queue);

// norms[i] = the total norm of tensor i alone.
void norms(const std::vector<TensorView>& tensors, double norm_type, double* scratch, double* norms, Queue queue);

// table[4 i] = of tensor i sum |x|^2, max |x|, how many elements are not finite, and how many are 0; *partial = that of
// norm_partial, to its bits. It takes four times the scratch.
void stats(const std::vector<TensorView>& tensors, double* scratch, double* table, Number partial, Queue queue);

// x *= coef; writes nothing where coef, rounded to the opmath type of the tensor, is 1. With `zero` a coef of 0 makes
// zeros also of inf and NaN.
void scale(const std::vector<TensorView>& tensors, Number coef, bool zero, Queue queue);

// The same with coefs[i] for tensor i.
void scale_each(const std::vector<TensorView>& tensors, const double* coefs, Queue queue);

// x = 0 where x is not finite; writes only vectors that change.
void sanitize(const std::vector<TensorView>& tensors, Queue queue);

// x = min(max(x, lo), hi) with the bounds rounded to each tensor's dtype; writes only vectors that change.
// The bounds have passed check_bound.
void clamp(const std::vector<TensorView>& tensors, double lo, double hi, Queue queue);

// x *= clip_coef(*norm, max_norm), with the writes of scale.
void clip_with_norm(const std::vector<TensorView>& tensors, double max_norm, Number norm, Queue queue);

// *norm = the norm of all that is asked for, then x *= clip_factor.
void clip_grad_norm(const std::vector<TensorView>& tensors, const Clip& clip, double* scratch, Number norm,
                    Queue queue);

}  // namespace fastclip::cuda
