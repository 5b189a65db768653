#include <algorithm>
#include <cmath>

#include "loops_impl.h"

namespace fastclip::cpu {

const Loops kLoopsScalar = make_loops<Scalar>("scalar");

namespace {

// Calls f(x) with x as a pointer to elements of its dtype.
template <class F>
auto with_elements(Dtype dtype, void* x, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(x));
    case Dtype::kFloat64:
      return f(static_cast<double*>(x));
    case Dtype::kBFloat16:
      return f(static_cast<bfloat16*>(x));
    default:
      return f(static_cast<float16*>(x));
  }
}

void round_to(double x, double* out) { *out = x; }
template <class T>
void round_to(double x, T* out) {
  from_float(static_cast<float>(x), out);
}

}  // namespace

double norm_pow(Dtype dtype, const void* data, int64_t n, double norm_type, double unit) {
  return with_elements(dtype, const_cast<void*>(data), [=](const auto* x) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += std::pow(std::fabs(to_double(x[i])) / unit, norm_type);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
  });
}

void scale_wide(Dtype dtype, void* data, int64_t n, double coef) {
  with_elements(dtype, data, [=](auto* x) {
    for (int64_t i = 0; i < n; ++i) round_to(to_double(x[i]) * coef, x + i);
  });
}

bool sanitize(Dtype dtype, void* data, int64_t n) {
  return with_elements(dtype, data, [=](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    constexpr int64_t kBlock = 1024;
    T infinity;
    round_to(std::numeric_limits<double>::infinity(), &infinity);
    bool changed = false;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = std::min(n, begin + kBlock);
      if (largest_magnitude(x + begin, end - begin) < magnitude(infinity)) continue;
      for (int64_t i = begin; i < end; ++i)
        if (magnitude(x[i]) >= magnitude(infinity)) std::memset(x + i, 0, sizeof(T));
      changed = true;
    }
    return changed;
  });
}

}  // namespace fastclip::cpu
