// Kernels whose outcome is known, right and wrong ones; main runs the check that its argument names.
#include <cstdio>

#include "cuda_runtime.h"

namespace {

using cuda_on_cpu::simulator;

constexpr int kThreads = 256, kWarps = 8;

void check(bool good, const char* what) {
  if (!good) throw std::logic_error(what);
}

template <class... P, class... A>
void launch(unsigned grid, unsigned block, void (*kernel)(P...), A... arguments) {
  cuda_on_cpu::run(grid, block, kernel, std::tuple<P...>(arguments...));
}

template <class... A>
bool throws(const char* message, A... arguments) {
  try {
    launch(arguments...);
  } catch (const std::runtime_error& error) {
    if (std::strstr(error.what(), message) != nullptr) return true;
    std::fprintf(stderr, "%s\n", error.what());
  }
  return false;
}

// Two barriers in a loop: one before what the round before has read is overwritten, one before it is read.
__global__ void sum_kernel(const int* in, int rounds, int* out) {
  __shared__ int warps[kWarps];
  for (int i = 0; i < rounds; ++i) {
    int sum = in[i * kThreads + static_cast<int>(threadIdx.x)] + static_cast<int>(blockIdx.x);
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    sum = 0;
    for (const int warp : warps) sum += warp;
    out[static_cast<int>(blockIdx.x) * rounds + i] = sum;
  }
}

// How often sum_kernel was wrong or threw, of ten seeds.
int wrong_sums(int dropped_barrier) {
  constexpr int kBlocks = 3, kRounds = 3;
  std::vector<int> in(kRounds * kThreads), expected(kBlocks * kRounds);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<int>(i * i % 1009);
    for (int b = 0; b < kBlocks; ++b) expected[static_cast<size_t>(b) * kRounds + i / kThreads] += in[i] + b;
  }
  simulator.dropped_barrier =
      dropped_barrier < 0 ? nullptr : simulator.barriers().at(static_cast<size_t>(dropped_barrier));
  int wrong = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    std::vector<int> out(expected.size());
    simulator.seed(seed);
    try {
      launch(kBlocks, kThreads, sum_kernel, in.data(), kRounds, out.data());
    } catch (const std::runtime_error&) {
    }
    wrong += out != expected;
  }
  return wrong;
}

void reduction() { check(wrong_sums(-1) == 0, "the sums"); }

void dropped_barrier() {
  reduction();
  check(simulator.barriers().size() == 2, "two barriers");
  check(wrong_sums(0) > 5, "what is missing before a write is noticed");
  check(wrong_sums(1) > 5, "what is missing before a read is noticed");
  reduction();
}

__global__ void shuffle_kernel(double* doubles, uint64_t* integers) {
  const unsigned t = threadIdx.x;
  doubles[t] = __shfl_xor_sync(0xffffffffu, t + 0.5, 5);
  integers[t] = __shfl_xor_sync(0xffffffffu, uint64_t{t} << 40, 31);
}

void shuffle() {
  std::vector<double> doubles(64);
  std::vector<uint64_t> integers(64);
  launch(1, 64, shuffle_kernel, doubles.data(), integers.data());
  for (unsigned t = 0; t < 64; ++t) {
    check(doubles[t] == (t ^ 5) + 0.5, "double");
    check(integers[t] == uint64_t{t ^ 31} << 40, "integer");
  }
}

__global__ void some_exit_kernel(unsigned threads) {
  if (threadIdx.x >= threads) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 5)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_or_shuffle_kernel() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void half_a_warp_kernel() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1, 1);
}

void divergence() {
  launch(2, 64, some_exit_kernel, 64u);
  check(throws("thread 0 and 62 more: __syncthreads at selftest.cpp:", 2, 64, some_exit_kernel, 63u), "one exits");
  check(throws("thread 63 and 0 more: exited", 2, 64, some_exit_kernel, 63u), "says which");
  check(throws("thread 5 and 58 more: __syncthreads", 1, 64, two_barriers_kernel), "two barriers");
  check(throws("thread 16 and 15 more: a shuffle", 1, 32, barrier_or_shuffle_kernel), "barrier and shuffle");
  check(throws("thread 0 and 31 more: a shuffle", 1, 64, half_a_warp_kernel), "lanes exit");
  check(throws("thread 0 and 15 more: a shuffle", 1, 16, half_a_warp_kernel), "lanes that do not exist");
  launch(2, 64, some_exit_kernel, 64u);
}

#ifdef __clang__
using Vector = uint64_t;  // it does not check copies of structs
#else
using Vector = uint4;
#endif

__global__ void copy_kernel(const Vector* from, Vector* to) { to[threadIdx.x] = from[threadIdx.x]; }

void misaligned() {
  std::vector<Vector> from(33), to(32);
  launch(1, 32, copy_kernel, static_cast<const Vector*>(from.data()), to.data());
  const auto* shifted =
      reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(from.data()) + sizeof(Vector) / 2);
  check(throws(" and 0 more: a misaligned access at selftest.cpp:", 1, 32, copy_kernel, shifted, to.data()), "shifted");
}

__global__ void poison_kernel(double* doubles, float* floats) {
  __shared__ double wide[3];
  __shared__ float narrow[5];
  doubles[blockIdx.x] = wide[threadIdx.x];
  floats[blockIdx.x] = narrow[threadIdx.x];
  wide[threadIdx.x] = narrow[threadIdx.x] = 0;
}

void poison() {
  double doubles[2] = {};
  float floats[2] = {};
  launch(2, 1, poison_kernel, doubles, floats);
  for (int block = 0; block < 2; ++block)
    check(doubles[block] != doubles[block] && floats[block] != floats[block], "NaN");
  check(std::memcmp(&doubles[0], &doubles[1], sizeof(double)) != 0, "differs from block to block");
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, void (*)()> checks{
      {"reduction", reduction},   {"dropped_barrier", dropped_barrier}, {"shuffle", shuffle},
      {"divergence", divergence}, {"misaligned", misaligned},           {"poison", poison},
  };
  try {
    checks.at(arguments[1])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
