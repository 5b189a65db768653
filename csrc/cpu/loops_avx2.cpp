// Compiled with -mavx2 -mfma -mf16c; runs only where isa.cpp saw all three.
#include <immintrin.h>

#include "loops_impl.h"

namespace fastclip::cpu {
namespace {

struct Avx2 {
  using Doubles = __m256d;
  static constexpr int kDoubles = 4;
  static __m256d zero() { return _mm256_setzero_pd(); }
  static __m256d load(const double* x) { return _mm256_loadu_pd(x); }
  static __m256d load(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
  static __m256d load(const bfloat16* x) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
  }
  static __m256d load(const float16* x) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }
  static void store(double* lanes, __m256d x) { _mm256_storeu_pd(lanes, x); }
  static __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
  static __m256d sub(__m256d a, __m256d b) { return _mm256_sub_pd(a, b); }
  static __m256d abs(__m256d x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
  static __m256d add_square(__m256d sum, __m256d x) { return _mm256_fmadd_pd(x, x, sum); }
  static __m256d square_error(__m256d x, __m256d square) { return _mm256_fmsub_pd(x, x, square); }

  template <class T>
  static constexpr int width = std::is_same_v<T, double> ? 4 : 8;
  static __m256d load_opmath(const double* x) { return _mm256_loadu_pd(x); }
  static __m256 load_opmath(const float* x) { return _mm256_loadu_ps(x); }
  static __m256 load_opmath(const bfloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static __m256 load_opmath(const float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static void store_opmath(double* out, __m256d x) { _mm256_storeu_pd(out, x); }
  static void store_opmath(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
  static void store_opmath(bfloat16* out, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
  }
  static void store_opmath(float16* out, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // For a value that the dtype holds: no rounding.
  template <class T, class Register>
  static void store_exact(T* out, Register x) {
    store_opmath(out, x);
  }
  static void store_exact(bfloat16* out, __m256 x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
  }
  static __m256 broadcast(float x) { return _mm256_set1_ps(x); }
  static __m256d broadcast(double x) { return _mm256_set1_pd(x); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256d mul(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
  // max and min return their second operand when either is NaN: x survives.
  static __m256 clamp(__m256 x, __m256 lo, __m256 hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, x)); }
  static __m256d clamp(__m256d x, __m256d lo, __m256d hi) { return _mm256_min_pd(hi, _mm256_max_pd(lo, x)); }
  static bool differ(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_OQ)) != 0; }
  static bool differ(__m256d a, __m256d b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NEQ_OQ)) != 0; }
};

}  // namespace

const Loops kLoopsAvx2 = make_loops<Avx2>("avx2");

}  // namespace fastclip::cpu
