// The walks over a chunk and the arithmetic on its words, kernel by kernel, against what is obvious.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "../../csrc/cuda/element.cuh"
#include "../../csrc/cuda/norm.cuh"
#include "../../csrc/cuda/scale.cuh"

namespace {

using namespace fastclip;
using namespace fastclip::cuda;

void check(bool holds, const char* what, int64_t number) {
  if (holds) return;
  std::fprintf(stderr, "%s: %lld\n", what, static_cast<long long>(number));
  std::exit(1);
}

using E = Element<Dtype::kBFloat16>;

// What thread t came to, in order, as vectors of the body.
__global__ void walk_kernel(char* data, int count, bool backwards, std::vector<int64_t>* seen) {
  const Run<E> run(data, count);
  const auto note = [&](const Vector<E>&, Vector<E>* place) { seen[threadIdx.x].push_back(place - run.body); };
  if (backwards)
    run.for_each_vector_backwards(note);
  else
    run.for_each_vector(note);
}

// Every vector once. Forwards a thread's addresses rise; backwards its batches of four come in the other order, after
// what is left of them at the end: so the first to be scaled is what the norm read last.
void walks() {
  constexpr int kBatch = 4 * kThreads;
  std::vector<char> memory(kChunkSize * 2 + 64);
  char* const data = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16);
  for (const int vectors :
       {0, 1, kThreads - 1, kThreads, kThreads + 1, kBatch - 1, kBatch, kBatch + 1, 3 * kBatch + 300, kChunkSize / 8}) {
    for (const bool backwards : {false, true}) {
      std::vector<int64_t> seen[kThreads];
      cuda_on_cpu::run(1, kThreads, walk_kernel, {data, vectors * 8, backwards, +seen});
      std::set<int64_t> all;
      for (int t = 0; t < kThreads; ++t) {
        const int64_t mine = (vectors - t + kThreads - 1) / kThreads, whole = mine / 4 * 4;
        check(static_cast<int64_t>(seen[t].size()) == mine, "vectors of a thread", t);
        for (int64_t k = 0; k < mine; ++k) {
          const int64_t from_end = k < mine - whole ? whole + k : (mine - 1 - k) / 4 * 4 + (k - (mine - whole)) % 4;
          check(seen[t][k] == (backwards ? from_end : k) * kThreads + t, "place", k);
          all.insert(seen[t][k]);
        }
      }
      check(static_cast<int64_t>(all.size()) == vectors, "vectors in all", vectors);
    }
  }
}

// All numbers of 16 bits in both halves of a word, within bounds of every kind; a NaN keeps its bits.
template <class T, class ClampPair>
void clamps(const ClampPair& clamp_pair) {
  const double bounds[][2] = {
      {-1, 1}, {0, -0.0},     {1e-30, -1e-30}, {-0.0, 0.0},          {0.25, 3},          {-INFINITY, INFINITY},
      {1, -1}, {-1e-7, 1e-7}, {1e-30, 1e-30},  {INFINITY, INFINITY}, {-2, -1.0009765625}};
  for (const auto& [low, high] : bounds) {
    const Clamp<T> clamp(Bounds{low, high});
    for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
      uint16_t expected = static_cast<uint16_t>(bits);
      const float x = T::widen(expected), lowest = T::widen(clamp.low), highest = T::widen(clamp.high);
      check(lowest <= highest && (high <= low || T::widen(T::narrow(static_cast<float>(low))) == lowest), "bound", 0);
      if (x < lowest) expected = clamp.low;
      if (x > highest) expected = clamp.high;
      uint16_t one = static_cast<uint16_t>(bits);
      check(clamp(one) == (expected != bits) && one == expected, "one", bits);
      const uint32_t other = (bits * 40503u) & 0xffff;
      uint16_t second = static_cast<uint16_t>(other);
      clamp(second);
      const uint32_t pair = clamp_pair(bits | other << 16, clamp.low * 0x10001u, clamp.high * 0x10001u);
      check(pair == (expected | uint32_t{second} << 16), "pair", bits);
    }
  }
}

// The square of a number by FMA in the two-sum has the bits of its product, where float32 holds that.
template <class T>
void squares() {
  Pair by_fma, by_product;
  for (uint32_t i = 0; i < 1u << 16; ++i) {
    const float x = T::widen(static_cast<uint16_t>(i * 40503u)), square = x * x;
    if (!(std::fabs(x) < 0x1p60f) || std::fma(x, x, -square) != 0 || (square == 0 && x != 0)) continue;
    by_fma.add_exact_square(x);
    by_product.add(square);
    check(by_fma.sum == by_product.sum && by_fma.error == by_product.error, "square", i);
  }
  check(by_fma.sum > 0 && by_fma.error != 0, "a sum that rounds", 0);
}

}  // namespace

int main() {
  walks();
  clamps<Element<Dtype::kFloat16>>(Element<Dtype::kFloat16>::clamp_pair);
  clamps<E>(E::clamp_pair);
  clamps<E>(E::clamp_each);
  squares<E>();
  squares<Element<Dtype::kFloat16>>();
}
