#include <cmath>

#include "loops_impl.h"

namespace fastclip::cpu {

const Loops kLoopsScalar = make_loops<Scalar>("scalar");

namespace {
template <class T>
double sum_powers(const void* data, int64_t n, double norm_type) {
  const T* x = static_cast<const T*>(data);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += std::pow(std::fabs(to_double(x[i])), norm_type);
  return sum;
}
}  // namespace

double norm_pow(Dtype dtype, const void* x, int64_t n, double norm_type) {
  switch (dtype) {
    case Dtype::kFloat32:
      return sum_powers<float>(x, n, norm_type);
    case Dtype::kFloat64:
      return sum_powers<double>(x, n, norm_type);
    case Dtype::kBFloat16:
      return sum_powers<bfloat16>(x, n, norm_type);
    case Dtype::kFloat16:
      return sum_powers<float16>(x, n, norm_type);
  }
  return 0.0;
}

}  // namespace fastclip::cpu
