// bfloat16 and float16 as bits, and their exact conversions; internal linkage, because files of several ISAs include
// it.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastclip::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
static inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) {  // inf, or a NaN made quiet as the hardware conversion does
    const uint32_t quiet = magnitude > 0x7c00 ? 0x400000u : 0u;
    return bit_cast<float>(sign | 0x7f800000u | quiet | (magnitude & 0x3ffu) << 13);
  }
  // The exponent moves by 112; a subnormal is a multiple of 2^-24.
  const uint32_t wide = magnitude < 0x400 ? bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f)
                                          : (magnitude << 13) + 0x38000000u;
  return bit_cast<float>(sign | wide);
}

// Rounds to nearest even. NaN becomes the quiet NaN that torch writes.
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, bfloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_float(float x, float16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

static inline double to_double(double x) { return x; }
static inline double to_double(float x) { return x; }
static inline double to_double(bfloat16 x) { return to_float(x); }
static inline double to_double(float16 x) { return to_float(x); }

}  // namespace fastclip::cpu
