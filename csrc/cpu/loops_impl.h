// The loops as templates over V, the vector operations of one ISA; included by the loops_<isa>.cpp files alone.
// Every ISA gives the same bits: element i of a run adds to float64 lane i % 32, and squares of float32 and below are
// exact in float64 (so fusing the multiply-add changes nothing). Sums of float64 are pairs in 16 lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "half.h"
#include "loops.h"

namespace fastclip::cpu {
namespace {

constexpr int kLanes = 32;

// Asks for the n elements that come 1 KiB after x: the hardware's own prefetch stops at every page.
template <class T>
inline void prefetch(const T* x, int n) {
  constexpr int kDistance = 1024, kLine = 64;
  for (int byte = 0; byte < n * static_cast<int>(sizeof(T)); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(x) + kDistance + byte);
}

template <class T>
using opmath_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The operations with one element per register: the portable ISA, and the tails of the others.
struct Scalar {
  // Reductions work on float64 registers, whatever the dtype.
  using Doubles = double;
  static constexpr int kDoubles = 1;
  static double zero() { return 0.0; }
  template <class T>
  static double load(const T* x) {
    return to_double(*x);
  }
  static void store(double* lanes, double x) { *lanes = x; }
  template <class A>
  static A add(A a, A b) {
    return a + b;
  }
  static double sub(double a, double b) { return a - b; }
  static double abs(double x) { return std::fabs(x); }
  static double add_square(double sum, double x) { return sum + x * x; }
  // x * x - square, which a double holds.
  static double square_error(double x, double square) {
#ifndef __FP_FAST_FMA
    // Without the instruction a library call: Dekker's halves are exact where neither square nor error leaves float64.
    if (square >= 0x1p-900 && square < 0x1p900) {
      const double shifted = x * 0x1.0000002p27, high = shifted - (shifted - x), low = x - high;
      return ((high * high - square) + 2.0 * high * low) + low * low;
    }
#endif
    return std::fma(x, x, -square);
  }

  // Elementwise passes work on registers of the opmath type.
  template <class T>
  static constexpr int width = 1;
  static float load_opmath(const float* x) { return *x; }
  static double load_opmath(const double* x) { return *x; }
  static float load_opmath(const bfloat16* x) { return to_float(*x); }
  static float load_opmath(const float16* x) { return to_float(*x); }
  static void store_opmath(double* out, double x) { *out = x; }
  template <class T>
  static void store_opmath(T* out, float x) {
    from_float(x, out);
  }
  // For a value that the dtype holds: no rounding.
  template <class T, class A>
  static void store_exact(T* out, A x) {
    store_opmath(out, x);
  }
  template <class A>
  static A broadcast(A x) {
    return x;
  }
  template <class A>
  static A mul(A a, A b) {
    return a * b;
  }
  template <class A>
  static A clamp(A x, A lo, A hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
  template <class A>
  static bool differ(A a, A b) {
    return a < b || a > b;
  }
};

struct Squares {
  template <class V>
  static typename V::Doubles add(typename V::Doubles sum, typename V::Doubles x) {
    return V::add_square(sum, x);
  }
  // The term, and what was rounded away from it.
  template <class V>
  static typename V::Doubles term(typename V::Doubles x, typename V::Doubles* error) {
    const auto square = V::mul(x, x);
    *error = V::square_error(x, square);
    return square;
  }
};

struct Magnitudes {
  template <class V>
  static typename V::Doubles add(typename V::Doubles sum, typename V::Doubles x) {
    return V::add(sum, V::abs(x));
  }
  template <class V>
  static typename V::Doubles term(typename V::Doubles x, typename V::Doubles*) {
    return V::abs(x);
  }
};

// (*sum, *error) += (term, term_error), without rounding anything of the size of the sum away (Knuth's two-sum).
template <class V>
inline void add_exactly(typename V::Doubles* sum, typename V::Doubles* error, typename V::Doubles term,
                        typename V::Doubles term_error) {
  const auto total = V::add(*sum, term), part = V::sub(total, *sum);
  const auto lost = V::add(V::sub(*sum, V::sub(total, part)), V::sub(term, part));
  *sum = total;
  *error = V::add(*error, V::add(lost, term_error));
}

// Looks at no element beside the sum.
struct NoLook {
  static constexpr int kBlock = 0;
};

// Calls step(i) for whole steps of so many of n elements, and look(i, count) for all of them, block by block, while
// they are in the L1 cache. Returns where the last step ended.
template <int kStep, class Step, class Look>
inline int64_t for_each_step(int64_t n, const Step& step, Look& look) {
  int64_t i = 0;
  if constexpr (Look::kBlock > 0) {
    for (; i + Look::kBlock <= n; look(i, Look::kBlock), i += Look::kBlock)
      for (int64_t j = i; j < i + Look::kBlock; j += kStep) step(j);
    if (i < n) look(i, n - i);
  }
  for (; i + kStep <= n; i += kStep) step(i);
  return i;
}

// Sums of float64 as pairs.
template <class V, class Term, class Look = NoLook>
Partial norm_pairs(const void* data, int64_t n, Look&& look = {}) {
  constexpr int kPairs = 16, kRegisters = kPairs / V::kDoubles;
  const double* x = static_cast<const double*>(data);
  typename V::Doubles sums[kRegisters], errors[kRegisters];
  for (int r = 0; r < kRegisters; ++r) sums[r] = errors[r] = V::zero();
  const auto add_block = [&](const double* block) {
    for (int r = 0; r < kRegisters; ++r) {
      auto error = V::zero();
      const auto term = Term::template term<V>(V::load(block + r * V::kDoubles), &error);
      add_exactly<V>(&sums[r], &errors[r], term, error);
    }
  };
  const auto step = [&](int64_t i) {
    prefetch(x + i, kPairs);
    add_block(x + i);
  };
  const int64_t i = for_each_step<kPairs>(n, step, look);
  if (i < n) {  // the tail, padded with zeros, which add nothing
    double tail[kPairs] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof(double));
    add_block(tail);
  }
  // As in norm_sum: lanes[i] += lanes[i + width].
  for (int width = kRegisters / 2; width > 0; width /= 2)
    for (int r = 0; r < width; ++r) add_exactly<V>(&sums[r], &errors[r], sums[r + width], errors[r + width]);
  double lanes[V::kDoubles], lost[V::kDoubles];
  V::store(lanes, sums[0]);
  V::store(lost, errors[0]);
  for (int width = V::kDoubles / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane)
      add_exactly<Scalar>(&lanes[lane], &lost[lane], lanes[lane + width], lost[lane + width]);
  return {lanes[0], lost[0]};
}

template <class V, class T, class Term, class Look = NoLook>
Partial norm_sum(const void* data, int64_t n, Look&& look = {}) {
  constexpr int kRegisters = kLanes / V::kDoubles;
  const T* x = static_cast<const T*>(data);
  typename V::Doubles sums[kRegisters];
  for (int r = 0; r < kRegisters; ++r) sums[r] = V::zero();
  const auto add_block = [&sums](const T* block) {
    for (int r = 0; r < kRegisters; ++r) sums[r] = Term::template add<V>(sums[r], V::load(block + r * V::kDoubles));
  };
  const auto step = [&](int64_t i) {
    prefetch(x + i, kLanes);
    add_block(x + i);
  };
  const int64_t i = for_each_step<kLanes>(n, step, look);
  if (i < n) {  // the tail, padded with zeros, which add nothing
    T tail[kLanes] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof(T));
    add_block(tail);
  }
  // lanes[i] += lanes[i + width], halving width: whole registers while it is a multiple of theirs, then single lanes.
  for (int width = kRegisters / 2; width > 0; width /= 2)
    for (int r = 0; r < width; ++r) sums[r] = V::add(sums[r], sums[r + width]);
  double lanes[V::kDoubles];
  V::store(lanes, sums[0]);
  for (int width = V::kDoubles / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return {lanes[0]};
}

// |x| as an unsigned integer: it orders as |x| does, with NaN above inf, so that a max keeps NaN by construction.
template <class T>
using magnitude_t =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
magnitude_t<T> magnitude(const T& x) {
  return bit_cast<magnitude_t<T>>(x) & (std::numeric_limits<magnitude_t<T>>::max() >> 1);
}

// The bits of infinity.
template <class T>
constexpr magnitude_t<T> kInfinity = std::is_same_v<T, double>     ? magnitude_t<T>(0x7ff0000000000000)
                                     : std::is_same_v<T, float>    ? magnitude_t<T>(0x7f800000)
                                     : std::is_same_v<T, bfloat16> ? magnitude_t<T>(0x7f80)
                                                                   : magnitude_t<T>(0x7c00);

// The compiler vectorises the integer loops for the ISA of the file.
template <class T>
magnitude_t<T> largest_magnitude(const T* x, int64_t n) {
  magnitude_t<T> max = 0;
  for (int64_t i = 0; i < n; ++i) max = magnitude(x[i]) > max ? magnitude(x[i]) : max;
  return max;
}

template <class T>
Partial norm_max(const void* data, int64_t n) {
  return {to_double(bit_cast<T>(largest_magnitude(static_cast<const T*>(data), n)))};
}

template <class T>
Partial norm_min(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  magnitude_t<T> min = std::numeric_limits<magnitude_t<T>>::max(), max = 0;
  for (int64_t i = 0; i < n; ++i) {
    min = magnitude(x[i]) < min ? magnitude(x[i]) : min;
    max = magnitude(x[i]) > max ? magnitude(x[i]) : max;
  }
  const double largest = to_double(bit_cast<T>(max));
  if (largest != largest) return {largest};
  return {n > 0 ? to_double(bit_cast<T>(min)) : std::numeric_limits<double>::infinity()};
}

template <class T>
Partial norm_any(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  magnitude_t<T> any = 0;
  for (int64_t i = 0; i < n; ++i) any |= magnitude(x[i]);
  return {any != 0 ? 1.0 : 0.0};
}

// The largest magnitude and the counts, of blocks that were just read. Most blocks have nothing to count: their
// extremes tell.
template <class T>
struct Counts {
  static constexpr int kBlock = 8192 / sizeof(T);
  const T* x;
  magnitude_t<T> largest = 0;
  int64_t nonfinite = 0, zeros = 0;

  void operator()(int64_t begin, int64_t count) {
    magnitude_t<T> most = 0, least = std::numeric_limits<magnitude_t<T>>::max();
    for (int64_t i = begin; i < begin + count; ++i) {
      const magnitude_t<T> m = magnitude(x[i]);
      most = m > most ? m : most;
      least = m < least ? m : least;
    }
    largest = most > largest ? most : largest;
    // A block is too short for the counts to leave 16 bits.
    if (most >= kInfinity<T>) nonfinite += count_of(begin, count, [](auto m) { return m >= kInfinity<T>; });
    if (least == 0) zeros += count_of(begin, count, [](auto m) { return m == 0; });
  }

 private:
  template <class Is>
  magnitude_t<T> count_of(int64_t begin, int64_t count, const Is& is) const {
    magnitude_t<T> found = 0;
    for (int64_t i = begin; i < begin + count; ++i) found = static_cast<magnitude_t<T>>(found + is(magnitude(x[i])));
    return found;
  }
};

template <class V, class T>
Stats stats(const void* data, int64_t n) {
  Counts<T> counts{static_cast<const T*>(data)};
  Stats found;
  if constexpr (std::is_same_v<T, double>)
    found.squares = norm_pairs<V, Squares>(data, n, counts);
  else
    found.squares = norm_sum<V, T, Squares>(data, n, counts);
  found.largest = to_double(bit_cast<T>(counts.largest));
  found.nonfinite = counts.nonfinite;
  found.zeros = counts.zeros;
  return found;
}

template <class V, class T>
void scale(void* data, int64_t n, double coef) {
  T* x = static_cast<T*>(data);
  const auto c = static_cast<opmath_t<T>>(coef);
  const auto c_wide = V::broadcast(c);
  int64_t i = 0;
  for (; i + V::template width<T> <= n; i += V::template width<T>) {
    prefetch(x + i, V::template width<T>);
    V::store_opmath(x + i, V::mul(V::load_opmath(x + i), c_wide));
  }
  for (; i < n; ++i) Scalar::store_opmath(x + i, Scalar::mul(Scalar::load_opmath(x + i), c));
}

// Stores one register if clamping changes it.
template <class V, class T, class Register>
bool clamp_register(T* x, Register lo, Register hi) {
  const auto before = V::load_opmath(x);
  const auto after = V::clamp(before, lo, hi);
  if (!V::differ(before, after)) return false;
  V::store_exact(x, after);
  return true;
}

template <class V, class T>
bool clamp(void* data, int64_t n, double lo_wide, double hi_wide) {
  constexpr int64_t kBlock = 256;
  T* x = static_cast<T*>(data);
  const auto lo = static_cast<opmath_t<T>>(lo_wide), hi = static_cast<opmath_t<T>>(hi_wide);
  const auto lo_register = V::broadcast(lo), hi_register = V::broadcast(hi);
  // 16-bit types are slow to widen: a look at the magnitudes, as integers, finds blocks where nothing can change.
  const bool can_look = sizeof(T) == 2 && lo <= 0 && hi >= 0;
  T nearer{};
  Scalar::store_opmath(&nearer, -lo < hi ? -lo : hi);
  bool changed = false, look = can_look;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    if (look) {
      prefetch(x + begin, kBlock);
      if (largest_magnitude(x + begin, end - begin) <= magnitude(nearer)) continue;
    }
    bool block_changed = false;
    int64_t i = begin;
    for (; i + V::template width<T> <= end; i += V::template width<T>) {
      prefetch(x + i, V::template width<T>);
      block_changed |= clamp_register<V>(x + i, lo_register, hi_register);
    }
    for (; i < end; ++i) block_changed |= clamp_register<Scalar>(x + i, lo, hi);
    changed |= block_changed;
    look = can_look && !block_changed;  // where one block changes the next is likely to
  }
  return changed;
}

template <int kRows, class V, class T>
void add_rows(opmath_t<T>* sum, const void* const* rows, const double* coefs, int64_t n) {
  const T* x[kRows];
  opmath_t<T> c[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const T*>(rows[r]);
    c[r] = static_cast<opmath_t<T>>(coefs[r]);
  }
  int64_t i = 0;
  for (; i + V::template width<T> <= n; i += V::template width<T>) {
    auto total = V::load_opmath(sum + i);
    for (int r = 0; r < kRows; ++r) total = V::add(total, V::mul(V::load_opmath(x[r] + i), V::broadcast(c[r])));
    V::store_opmath(sum + i, total);
  }
  for (; i < n; ++i)
    for (int r = 0; r < kRows; ++r) sum[i] += Scalar::load_opmath(x[r] + i) * c[r];
}

// The sums are read and written once for every four rows.
template <class V, class T>
void add_scaled(void* sum, const void* const* x, const double* coefs, int64_t count, int64_t n) {
  constexpr int kRows = 4;
  auto* const sums = static_cast<opmath_t<T>*>(sum);
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) add_rows<kRows, V, T>(sums, x + r, coefs + r, n);
  for (; r < count; ++r) add_rows<1, V, T>(sums, x + r, coefs + r, n);
}

template <class V, class T>
constexpr void fill(Loops& loops, Dtype dtype) {
  const int d = static_cast<int>(dtype);
  if constexpr (std::is_same_v<T, double>) {
    loops.norm_partial[d][static_cast<int>(NormKind::kSquares)] = [](const void* x, int64_t n) {
      return norm_pairs<V, Squares>(x, n);
    };
    loops.norm_partial[d][static_cast<int>(NormKind::kAbs)] = [](const void* x, int64_t n) {
      return norm_pairs<V, Magnitudes>(x, n);
    };
  } else {
    loops.norm_partial[d][static_cast<int>(NormKind::kSquares)] = [](const void* x, int64_t n) {
      return norm_sum<V, T, Squares>(x, n);
    };
    loops.norm_partial[d][static_cast<int>(NormKind::kAbs)] = [](const void* x, int64_t n) {
      return norm_sum<V, T, Magnitudes>(x, n);
    };
  }
  loops.norm_partial[d][static_cast<int>(NormKind::kMax)] = norm_max<T>;
  loops.norm_partial[d][static_cast<int>(NormKind::kMin)] = norm_min<T>;
  loops.norm_partial[d][static_cast<int>(NormKind::kCount)] = norm_any<T>;
  loops.stats[d] = stats<V, T>;
  loops.scale[d] = scale<V, T>;
  loops.clamp[d] = clamp<V, T>;
  loops.add_scaled[d] = add_scaled<V, T>;
}

template <class V>
constexpr Loops make_loops(const char* isa) {
  Loops loops{};
  loops.isa = isa;
  fill<V, float>(loops, Dtype::kFloat32);
  fill<V, double>(loops, Dtype::kFloat64);
  fill<V, bfloat16>(loops, Dtype::kBFloat16);
  fill<V, float16>(loops, Dtype::kFloat16);
  return loops;
}

}  // namespace
}  // namespace fastclip::cpu
