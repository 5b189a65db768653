// The inner loops over one contiguous run of elements, one table of them per instruction set (ISA).
#pragma once

#include <cstdint>

#include "../clip.h"

namespace fastclip::cpu {

// The partial of some elements. A sum comes with what was rounded away from it: of float64 numbers in every addition,
// of all others, whose sums are exact or nearly so in float64, where partials are combined.
struct Partial {
  double value;
  double error = 0.0;

  // Rounded once. What is not finite has no error.
  double rounded() const { return value - value == 0.0 ? value + error : value; }
};

// What a look at some elements tells.
struct Stats {
  Partial squares{0.0};
  double largest = 0.0;  // magnitude; NaN where one is
  int64_t nonfinite = 0;
  int64_t zeros = 0;
};

struct Loops {
  const char* isa;
  // Partial of n elements: sum |x|^2, sum |x|, max |x|, min |x|, or 1 if any is non-zero. kPow is norm_pow below.
  Partial (*norm_partial[kNumDtypes][kNumNormKinds])(const void* x, int64_t n);
  // Of n elements, with the sum of squares to the bits of norm_partial.
  Stats (*stats[kNumDtypes])(const void* x, int64_t n);
  // x *= coef, with coef rounded to the opmath type of the dtype. Coefficients below float32 are for scale_wide below.
  void (*scale[kNumDtypes])(void* x, int64_t n, double coef);
  // x = min(max(x, lo), hi), NaN kept, storing only vectors that change; returns whether any did.
  bool (*clamp[kNumDtypes])(void* x, int64_t n, double lo, double hi);
  // sum += coefs[0] * x[0] + ..., in that order and in the opmath type of the dtype, over `count` rows of n elements.
  void (*add_scaled[kNumDtypes])(void* sum, const void* const* x, const double* coefs, int64_t count, int64_t n);
};

extern const Loops kLoopsScalar;
#if defined(__x86_64__)
extern const Loops kLoopsAvx2;
extern const Loops kLoopsAvx512;
#elif defined(__aarch64__)
extern const Loops kLoopsNeon;
#endif

// What is rare, with the same code on every ISA.
// sum (|x| / unit)^p for the p that have no loop of their own.
double norm_pow(Dtype dtype, const void* x, int64_t n, double norm_type, double unit);
// x *= coef in float64, then rounded as torch rounds float64: to 16 bits by way of float32.
void scale_wide(Dtype dtype, void* x, int64_t n, double coef);
// x = 0 where x is not finite; returns whether any was.
bool sanitize(Dtype dtype, void* x, int64_t n);

// The table of the best ISA that this machine has, or of FASTCLIP_CPU_ISA; chosen once.
// Throws std::runtime_error when that names an ISA which is unknown or missing here.
const Loops& loops();

}  // namespace fastclip::cpu
