// Compiled for aarch64 alone, where every CPU has NEON.
#include <arm_neon.h>

#include "loops_impl.h"

namespace fastclip::cpu {
namespace {

struct Neon {
  // Four registers of 16 bytes as one: the lanes of AVX-512, a line of memory for each prefetch.
  struct Doubles {
    float64x2_t part[4];
  };
  struct Floats {
    float32x4_t part[4];
  };
  template <class F>
  static auto each(const F& f) {
    if constexpr (std::is_same_v<decltype(f(0)), float64x2_t>)
      return Doubles{{f(0), f(1), f(2), f(3)}};
    else
      return Floats{{f(0), f(1), f(2), f(3)}};
  }

  static float32x4_t widen_bfloat16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16)); }
  static float32x4_t widen_float16(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
  static Doubles widen(float32x4_t a, float32x4_t b) {
    return {{vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a), vcvt_f64_f32(vget_low_f32(b)), vcvt_high_f64_f32(b)}};
  }
  template <class T>
  static uint16x8_t load_bits(const T* x) {
    return vld1q_u16(reinterpret_cast<const uint16_t*>(x));
  }
  template <class T>
  static void store_bits(T* out, uint16x4_t low, uint16x4_t high) {
    vst1q_u16(reinterpret_cast<uint16_t*>(out), vcombine_u16(low, high));
  }

  static constexpr int kDoubles = 8;
  static Doubles zero() { return broadcast(0.0); }
  static Doubles load(const double* x) {
    return each([=](int i) { return vld1q_f64(x + 2 * i); });
  }
  static Doubles load(const float* x) { return widen(vld1q_f32(x), vld1q_f32(x + 4)); }
  static Doubles load(const bfloat16* x) {
    const uint16x8_t bits = load_bits(x);
    return widen(widen_bfloat16(vget_low_u16(bits)), widen_bfloat16(vget_high_u16(bits)));
  }
  static Doubles load(const float16* x) {
    const uint16x8_t bits = load_bits(x);
    return widen(widen_float16(vget_low_u16(bits)), widen_float16(vget_high_u16(bits)));
  }
  static void store(double* lanes, Doubles x) {
    for (int i = 0; i < 4; ++i) vst1q_f64(lanes + 2 * i, x.part[i]);
  }
  static Doubles add(Doubles a, Doubles b) {
    return each([=](int i) { return vaddq_f64(a.part[i], b.part[i]); });
  }
  static Floats add(Floats a, Floats b) {
    return each([=](int i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  static Doubles sub(Doubles a, Doubles b) {
    return each([=](int i) { return vsubq_f64(a.part[i], b.part[i]); });
  }
  static Doubles abs(Doubles x) {
    return each([=](int i) { return vabsq_f64(x.part[i]); });
  }
  static Doubles add_square(Doubles sum, Doubles x) {
    return each([=](int i) { return vfmaq_f64(sum.part[i], x.part[i], x.part[i]); });
  }
  static Doubles square_error(Doubles x, Doubles square) {
    return each([=](int i) { return vfmaq_f64(vnegq_f64(square.part[i]), x.part[i], x.part[i]); });
  }

  template <class T>
  static constexpr int width = std::is_same_v<T, double> ? 8 : 16;
  static Doubles load_opmath(const double* x) { return load(x); }
  static Floats load_opmath(const float* x) {
    return each([=](int i) { return vld1q_f32(x + 4 * i); });
  }
  static Floats load_opmath(const bfloat16* x) {
    const uint16x8_t a = load_bits(x), b = load_bits(x + 8);
    return {{widen_bfloat16(vget_low_u16(a)), widen_bfloat16(vget_high_u16(a)), widen_bfloat16(vget_low_u16(b)),
             widen_bfloat16(vget_high_u16(b))}};
  }
  static Floats load_opmath(const float16* x) {
    const uint16x8_t a = load_bits(x), b = load_bits(x + 8);
    return {{widen_float16(vget_low_u16(a)), widen_float16(vget_high_u16(a)), widen_float16(vget_low_u16(b)),
             widen_float16(vget_high_u16(b))}};
  }
  static void store_opmath(double* out, Doubles x) { store(out, x); }
  static void store_opmath(float* out, Floats x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, x.part[i]);
  }
  static uint16x4_t to_bfloat16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000)), 16);
  }
  static void store_opmath(bfloat16* out, Floats x) {
    store_bits(out, to_bfloat16(x.part[0]), to_bfloat16(x.part[1]));
    store_bits(out + 8, to_bfloat16(x.part[2]), to_bfloat16(x.part[3]));
  }
  static uint16x4_t to_float16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
  static void store_opmath(float16* out, Floats x) {
    store_bits(out, to_float16(x.part[0]), to_float16(x.part[1]));
    store_bits(out + 8, to_float16(x.part[2]), to_float16(x.part[3]));
  }
  // For a value that the dtype holds: no rounding.
  template <class T, class Register>
  static void store_exact(T* out, Register x) {
    store_opmath(out, x);
  }
  static void store_exact(bfloat16* out, Floats x) {
    const auto high = [&](int i) { return vshrn_n_u32(vreinterpretq_u32_f32(x.part[i]), 16); };
    store_bits(out, high(0), high(1));
    store_bits(out + 8, high(2), high(3));
  }
  static Floats broadcast(float x) {
    return each([=](int) { return vdupq_n_f32(x); });
  }
  static Doubles broadcast(double x) {
    return each([=](int) { return vdupq_n_f64(x); });
  }
  static Floats mul(Floats a, Floats b) {
    return each([=](int i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  static Doubles mul(Doubles a, Doubles b) {
    return each([=](int i) { return vmulq_f64(a.part[i], b.part[i]); });
  }
  // Comparisons, because the instructions for max and min do not keep the bits of a NaN.
  static Floats clamp(Floats x, Floats lo, Floats hi) {
    return each([=](int i) {
      const float32x4_t raised = vbslq_f32(vcltq_f32(x.part[i], lo.part[i]), lo.part[i], x.part[i]);
      return vbslq_f32(vcgtq_f32(raised, hi.part[i]), hi.part[i], raised);
    });
  }
  static Doubles clamp(Doubles x, Doubles lo, Doubles hi) {
    return each([=](int i) {
      const float64x2_t raised = vbslq_f64(vcltq_f64(x.part[i], lo.part[i]), lo.part[i], x.part[i]);
      return vbslq_f64(vcgtq_f64(raised, hi.part[i]), hi.part[i], raised);
    });
  }
  static bool differ(Floats a, Floats b) {
    const auto differ = [&](int i) {
      return vorrq_u32(vcltq_f32(a.part[i], b.part[i]), vcgtq_f32(a.part[i], b.part[i]));
    };
    return vmaxvq_u32(vorrq_u32(vorrq_u32(differ(0), differ(1)), vorrq_u32(differ(2), differ(3)))) != 0;
  }
  static bool differ(Doubles a, Doubles b) {
    const auto differ = [&](int i) {
      return vorrq_u64(vcltq_f64(a.part[i], b.part[i]), vcgtq_f64(a.part[i], b.part[i]));
    };
    const uint64x2_t any = vorrq_u64(vorrq_u64(differ(0), differ(1)), vorrq_u64(differ(2), differ(3)));
    return vmaxvq_u32(vreinterpretq_u32_u64(any)) != 0;
  }
};

}  // namespace

const Loops kLoopsNeon = make_loops<Neon>("neon");

}  // namespace fastclip::cpu
