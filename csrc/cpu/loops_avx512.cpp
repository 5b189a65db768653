// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; runs only where isa.cpp saw all of them.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own header's placeholders (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "loops_impl.h"

namespace fastclip::cpu {
namespace {

struct Avx512 {
  using Doubles = __m512d;
  static constexpr int kDoubles = 8;
  static __m512d zero() { return _mm512_setzero_pd(); }
  static __m512d load(const double* x) { return _mm512_loadu_pd(x); }
  static __m512d load(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
  static __m512d load(const bfloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
  static __m512d load(const float16* x) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
  static void store(double* lanes, __m512d x) { _mm512_storeu_pd(lanes, x); }
  static __m512d add(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }
  static __m512d sub(__m512d a, __m512d b) { return _mm512_sub_pd(a, b); }
  static __m512d abs(__m512d x) { return _mm512_abs_pd(x); }
  static __m512d add_square(__m512d sum, __m512d x) { return _mm512_fmadd_pd(x, x, sum); }
  static __m512d square_error(__m512d x, __m512d square) { return _mm512_fmsub_pd(x, x, square); }

  template <class T>
  static constexpr int width = std::is_same_v<T, double> ? 8 : 16;
  static __m512d load_opmath(const double* x) { return _mm512_loadu_pd(x); }
  static __m512 load_opmath(const float* x) { return _mm512_loadu_ps(x); }
  static __m512 load_opmath(const bfloat16* x) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static __m512 load_opmath(const float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void store_opmath(double* out, __m512d x) { _mm512_storeu_pd(out, x); }
  static void store_opmath(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
  static void store_opmath(bfloat16* out, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(kept));
  }
  static void store_opmath(float16* out, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // For a value that the dtype holds: no rounding.
  template <class T, class Register>
  static void store_exact(T* out, Register x) {
    store_opmath(out, x);
  }
  static void store_exact(bfloat16* out, __m512 x) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(high));
  }
  static __m512 broadcast(float x) { return _mm512_set1_ps(x); }
  static __m512d broadcast(double x) { return _mm512_set1_pd(x); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512d mul(__m512d a, __m512d b) { return _mm512_mul_pd(a, b); }
  // max and min return their second operand when either is NaN: x survives.
  static __m512 clamp(__m512 x, __m512 lo, __m512 hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, x)); }
  static __m512d clamp(__m512d x, __m512d lo, __m512d hi) { return _mm512_min_pd(hi, _mm512_max_pd(lo, x)); }
  static bool differ(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ) != 0; }
  static bool differ(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_OQ) != 0; }
};

}  // namespace

const Loops kLoopsAvx512 = make_loops<Avx512>("avx512");

}  // namespace fastclip::cpu
