// The vocabulary that every engine shares: dtypes, kinds of norm, and the arithmetic that turns partials into a
// coefficient. Meaning follows torch.nn.utils.clip_grad; numbers are float64 until the one rounding at the end.
#pragma once

#include <cmath>
#include <cstdint>

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

// A number in memory, of any of the dtypes.
struct Number {
  void* data;
  Dtype dtype;
};

// What is asked of a clip by norm; _ops.py and gradients/contract.py have the same fields in the same order.
struct Clip {
  double max_norm;
  double norm_type;
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

// Combines partials: of chunks in chunk order, then of groups or ranks.
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

// min(max_norm / (total_norm + 1e-6), 1) in the order in which torch rounds it: reciprocal, then product.
FASTCLIP_HD inline double clip_coef(double total_norm, double max_norm) {
  double coef = 1.0 / (total_norm + 1e-6) * max_norm;
  return coef > 1.0 ? 1.0 : coef;  // a NaN stays
}

}  // namespace fastclip
