// The vocabulary that every engine shares: dtypes, kinds of norm, and the arithmetic that turns partials into a
// coefficient. Meaning follows torch.nn.utils.clip_grad; numbers are float64 until the one rounding at the end.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "fastclip loses NaN, and bits, under -Ofast, -ffast-math and their parts: take them out of CXXFLAGS and CFLAGS"
#endif

#ifdef __CUDACC__
#define FASTCLIP_HD __host__ __device__
#else
#define FASTCLIP_HD
#endif

namespace fastclip {

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDtypes = 4;

FASTCLIP_HD constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// torch.promote_types on the four dtypes.
constexpr Dtype promote(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == Dtype::kFloat64 || b == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// Elements of a chunk, which has one partial: short enough to balance threads and the blocks of a grid, long enough
// (128 KiB and more) to hide its fixed cost. fastclip/backends/triton_.py has the same.
constexpr int kChunkSize = 65536;

// One dimension of a tensor that is not one dense run of memory; strides in elements.
struct Dim {
  int64_t size;
  int64_t stride;
};

// A number in memory, of any of the dtypes; null where there is none.
struct Number {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat64;
};

// What becomes of gradients that are not finite: torch's arithmetic; all become 0 where the norm is not finite; or each
// that is not finite becomes 0 before anything else.
enum class Nonfinite : uint8_t { kPropagate, kZero, kSanitize };

// What is asked of a clip by norm; _ops.py and gradients/contract.py have the same fields in the same order.
struct Clip {
  double max_norm;
  double norm_type;
  Nonfinite nonfinite = Nonfinite::kPropagate;
  Number found_inf;  // float32: receives 1 where the norm is not finite, else 0
  Number inv_scale;  // meant are the gradients times it
};

// kCount is norm_type 0: torch takes the 0-norm of the per-tensor 0-norms, so it counts tensors with a non-zero.
enum class NormKind : uint8_t { kSquares, kAbs, kMax, kMin, kCount, kPow };
constexpr int kNumNormKinds = 6;

inline NormKind norm_kind(double norm_type) {
  if (norm_type == 2) return NormKind::kSquares;
  if (norm_type == 1) return NormKind::kAbs;
  if (norm_type == 0) return NormKind::kCount;
  if (std::isinf(norm_type)) return norm_type > 0 ? NormKind::kMax : NormKind::kMin;
  return NormKind::kPow;
}

// The partial of no elements.
FASTCLIP_HD inline double identity(NormKind kind) { return kind == NormKind::kMin ? double{INFINITY} : 0.0; }

// Both comparisons are written so that a NaN on either side wins.
FASTCLIP_HD inline double max_nan(double a, double b) { return a >= b || a != a ? a : b; }
FASTCLIP_HD inline double min_nan(double a, double b) { return a <= b || a != a ? a : b; }

// Combines partials: of chunks in chunk order, then of devices or ranks.
FASTCLIP_HD inline double combine(NormKind kind, double a, double b) {
  if (kind == NormKind::kMax) return max_nan(a, b);
  if (kind == NormKind::kMin) return min_nan(a, b);
  return a + b;
}

// total_norm from the combined partial.
FASTCLIP_HD inline double root(NormKind kind, double partial, double norm_type) {
  if (kind == NormKind::kSquares) return std::sqrt(partial);
  if (kind != NormKind::kPow) return partial;
  return norm_type != norm_type ? norm_type : std::pow(partial, 1.0 / norm_type);
}

// Where powers leave float64 they are summed in a unit: norm = unit * (sum (|x| / unit)^p)^(1/p). Norms of parts
// combine as elements do, so the partial of a chunk is then its norm.

// Whether powers that were lost below float64 do not matter in a sum, and none was lost above it.
FASTCLIP_HD inline bool is_well_in_float64(double sum) { return sum >= 0x1p-900 && sum < INFINITY; }

// Whether all sums of up to 2^48 powers are so, but for powers of 0, inf and NaN: for engines that cannot look.
FASTCLIP_HD inline bool powers_stay_in_float64(Dtype dtype, double p) {
  // The largest |log2 x|: that of the smallest subnormal.
  const double reach = dtype == Dtype::kFloat64    ? 1074
                       : dtype == Dtype::kFloat32  ? 149
                       : dtype == Dtype::kBFloat16 ? 133
                                                   : 24;
  return !(std::fabs(p) * reach > 900);
}

// Which magnitude is the unit: the largest, for p < 0 the smallest, so that no power is above 1 and one is 1.
FASTCLIP_HD inline NormKind unit_kind(double p) { return p > 0 ? NormKind::kMax : NormKind::kMin; }

// The unit from that magnitude. Powers of 0, inf and NaN say by themselves what the norm is.
FASTCLIP_HD inline double power_unit(double extreme) { return extreme > 0 && extreme < INFINITY ? extreme : 1.0; }

// The norm from the sum of powers in a unit.
FASTCLIP_HD inline double root_in(double unit, double sum, double p) { return unit * root(NormKind::kPow, sum, p); }

FASTCLIP_HD inline bool is_finite(double x) { return std::fabs(x) < INFINITY; }

// min(max_norm / (total_norm + 1e-6), 1) in the order in which torch rounds it: reciprocal, then product. No norm
// reaches a bound of inf.
FASTCLIP_HD inline double clip_coef(double total_norm, double max_norm) {
  if (max_norm == INFINITY) return 1.0;
  double coef = 1.0 / (total_norm + 1e-6) * max_norm;
  return coef > 1.0 ? 1.0 : coef;  // a NaN stays
}

// The norm of the gradients times inv_scale, from theirs.
FASTCLIP_HD inline double scaled_norm(double norm, double norm_type, double inv_scale) {
  if (norm_type == 0) return inv_scale != 0 ? norm : 0.0;  // a count of tensors
  return norm * std::fabs(inv_scale);
}

// What the gradients are multiplied by, from that norm; with kZero a 0 makes zeros of whatever they are.
FASTCLIP_HD inline double clip_factor(double scaled_norm, double inv_scale, const Clip& clip) {
  if (clip.nonfinite == Nonfinite::kZero && !is_finite(scaled_norm)) return 0.0;
  return clip_coef(scaled_norm, clip.max_norm) * inv_scale;
}

// The coefficient of a tensor, or unit, that is clipped by its own measure: 1 within the bound, NaN of NaN. With a
// least number to divide by, one that is at its bound is scaled, too.
inline double each_coef(double measure, double bound, double least) {
  if (least > 0 ? measure < bound : measure <= bound) return 1.0;
  return bound / max_nan(measure, least);
}

// Whether float32 holds a coefficient with fewer bits than its other numbers, or as 0: products are taken in float64.
FASTCLIP_HD inline bool is_below_float32(double coef) { return coef != 0 && std::fabs(coef) < FLT_MIN; }

}  // namespace fastclip
