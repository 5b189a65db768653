// The passes over a list of tensors in memory that the CPU addresses: chunked, threaded, the same bits for any thread
// count. Lists are read by the loops of cpu/loops.h.
#pragma once

#include <vector>

#include "../clip.h"
#include "../views.h"

namespace fastclip::cpu {

// sum |x|^p, max |x|, min |x| or the number of tensors with a non-zero: the norm before its root.
double norm_partial(const std::vector<TensorView>& tensors, double norm_type);

// The norm over all elements of all tensors; 0 where there are none.
double total_norm(const std::vector<TensorView>& tensors, double norm_type);

// norms[i] = the total norm of tensor, or unit, i alone.
void norms(const Tensors& tensors, double norm_type, double* norms);

// table[4 i] = of tensor i sum |x|^2, max |x|, how many elements are not finite, and how many are 0. Returns the sum of
// squares of all, to the bits of norm_partial.
double stats(const std::vector<TensorView>& tensors, double* table);

// x *= coef; writes nothing where coef, rounded to the opmath type of the tensor, is 1. With `zero` a coef of 0 makes
// zeros also of inf and NaN.
void scale(const std::vector<TensorView>& tensors, double coef, bool zero);

// The same with coefs[i] for tensor, or unit, i.
void scale_each(const Tensors& tensors, const double* coefs);

// What each tensor, or unit, is clipped to.
struct EachBound {
  const double* bounds;    // one for each
  const double* divisors;  // of norms; null: they are measured as they are
  double least;            // of each_coef

  double measure(double norm, int64_t i) const { return divisors == nullptr ? norm : norm / divisors[i]; }
  double coef(double measure, int64_t i) const { return each_coef(measure, bounds[i], least); }
};

// Scales each tensor, or unit, by its coefficient, one of a chunk or less right after its norm was read; measures[i] is
// that before.
void clip_each(const Tensors& tensors, double norm_type, const EachBound& bound, double* measures);

// x = 0 where x is not finite; writes only blocks that change.
void sanitize(const std::vector<TensorView>& tensors);

// x = min(max(x, lo), hi) with the bounds rounded to each tensor's dtype; writes only registers that change.
// The bounds have passed check_bound.
void clamp(const std::vector<TensorView>& tensors, double lo, double hi);

// sums[k] = the sum of the examples of tensor k, which are its units, each clipped to max_norm by its norm over all
// tensors, or with `per_layer` over one; norms receives those. They are as many of each, with the layout of its sum.
// False where a coefficient is below float32, which holds sums of 16 and 32 bits.
bool clipped_sums(const Tensors& examples, const std::vector<TensorView>& sums, double max_norm, bool per_layer,
                  double* norms);

}  // namespace fastclip::cpu
