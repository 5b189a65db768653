// What an engine computes: one table of passes over the tensors of one device. The CPU's run at once; a GPU's are
// queued on the current stream, wait for nothing and read nothing back. Every number is in the memory of the device.
#pragma once

#include "clip.h"
#include "views.h"

namespace fastclip {

// `norms` and `scale_each` take units, too: tensor i is then unit i.
struct Engine {
  const char* dispatch_key;
  // *partial = sum |x|^p, max |x|, min |x| or the number of tensors with a non-zero: the norm before its root.
  void (*norm_partial)(const Tensors&, double norm_type, Number partial);
  // *norm = the norm over all elements of all tensors, 0 where there are none.
  void (*total_norm)(const Tensors&, double norm_type, Number norm);
  // norms[i] = total_norm of tensor i alone; float64.
  void (*norms)(const Tensors&, double norm_type, double* norms);
  // table[4 i] = of tensor i sum |x|^2, max |x|, how many elements are not finite, how many are 0; a NaN makes the
  // first two NaN. *partial = norm_partial of order 2.
  void (*stats)(const Tensors&, double* table, Number partial);
  // x *= coef; writes nothing where coef, rounded to the opmath type of the tensor, is 1. With `zero` a coef of 0 makes
  // zeros also of inf and NaN.
  void (*scale)(const Tensors&, Number coef, bool zero);
  // x *= coefs[i], float64, for tensor i.
  void (*scale_each)(const Tensors&, const double* coefs);
  // x = 0 where x is not finite; writes only what changes.
  void (*sanitize)(const Tensors&);
  // x *= clip_coef(*norm, max_norm).
  void (*clip_with_norm)(const Tensors&, double max_norm, Number norm);
  // x = min(max(x, low), high) with the bounds rounded to each tensor's dtype; writes only what changes.
  void (*clamp)(const Tensors&, double low, double high);
  // *norm = the norm of all that Clip asks for, then x *= clip_factor of the wide norm.
  void (*clip_grad_norm)(const Tensors&, const Clip& clip, Number norm);
};

}  // namespace fastclip
