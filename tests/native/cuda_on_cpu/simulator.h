// Runs the blocks of a grid one after the other, in a random order. Each thread of a block is a fiber that runs until
// it waits for others; who goes on then is random, too.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#define __shared__ static __attribute__((section("cuda_on_cpu_shared")))
extern "C" char __start_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kMostThreads = 1024, kLanes = 32, kMostWarps = kMostThreads / kLanes;
constexpr size_t kStack = 65536 + 9 * 64;  // so that the tops of the stacks lie in different sets of the caches

// Where a thread waits: a line of a kernel.
struct Place {
  const char* what;
  const char* file = nullptr;
  int line = 0;

  bool operator==(const Place& other) const {
    return line == other.line && what == other.what && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    if (file == nullptr) return what;
    const char* slash = std::strrchr(file, '/');
    return std::string(what) + " at " + (slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
  }
};
inline constexpr char kBarrier[] = "__syncthreads", kShuffle[] = "a shuffle";
inline const Place kStart{"start"}, kExit{"exited"};

class Simulator {
 public:
  const Place* dropped_barrier = nullptr;  // which is as if it were not there

  void seed(unsigned seed) { random_ = 0x9e3779b97f4a7c15ull * (seed + 1ull); }

  // The barriers that threads have come to so far.
  std::vector<const Place*> barriers() const {
    std::vector<const Place*> out;
    for (const Place& place : places_)
      if (place.what == kBarrier) out.push_back(&place);
    return out;
  }

  // Throws std::runtime_error where threads wait for others that never come.
  void run(unsigned grid, unsigned block, void (*kernel)(void*), void* arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);
    gridDim = dim3(grid), blockDim = dim3(block);
    kernel_ = kernel, arguments_ = arguments;
    std::vector<unsigned> blocks(grid);
    for (unsigned i = 0; i < grid; ++i) {  // Fisher-Yates
      const unsigned j = below(i + 1);
      blocks[i] = blocks[j], blocks[j] = i;
    }
    for (const unsigned b : blocks) {
      blockIdx = dim3(b, 0, 0);
      poison_shared();
      exited_ = 0;
      std::fill_n(at_, block, &kStart);
      std::fill_n(at_shuffle_, kMostWarps, 0);
      meet_all();
      run_block();
      if (exited_ == block) continue;
      const std::string error = describe();
      ready_warps_ = 0;
      std::fill_n(ready_, kMostWarps, 0);
      std::fill_n(resume_, kMostThreads, nullptr);  // what the threads left on their stacks is lost
      throw std::runtime_error(error);
    }
  }

  // What a thread calls.

  void barrier(const Place& place) {
    const Place* const here = find(place);
    if (here == dropped_barrier) return;
    at_[threadIdx.x] = here;
    if (++at_barrier_ == blockDim.x) meet_all();
    wait();
  }

  // All lanes of a warp bring a value; each receives that of another.
  uint64_t shuffle_xor(uint64_t value, unsigned mask, const Place& place) {
    const unsigned me = threadIdx.x, warp = me / kLanes;
    at_[me] = find(place);
    brought_[me] = value;
    sources_[me] = me ^ mask;
    if (++at_shuffle_[warp] == kLanes) {
      at_shuffle_[warp] = 0;
      for (unsigned t = warp * kLanes; t < (warp + 1) * kLanes; ++t) received_[t] = brought_[sources_[t]];
      meet(warp * kLanes, kLanes);
    }
    wait();
    return received_[me];
  }

  // Ends the launch, or the process where there is none.
  [[noreturn]] void stop(const Place& place) {
    if (!running_) std::abort();
    at_[threadIdx.x] = find(place);
    _longjmp(host_, 1);
  }

 private:
  static unsigned warps() { return (blockDim.x + kLanes - 1) / kLanes; }

  unsigned below(unsigned n) {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return static_cast<unsigned>((random_ * 0x2545f4914f6cdd1dull >> 32) * n >> 32);
  }

  // The first bit that is set from a random one on, of so many.
  unsigned pick(uint32_t bits, unsigned size) {
    const uint32_t on = bits & ~0u << below(size);
    return static_cast<unsigned>(__builtin_ctz(on != 0 ? on : bits));
  }

  // Bytes that are NaN in every dtype and that differ from block to block.
  void poison_shared() {
    const uint32_t word = 0x7ff00001u | below(1 << 20);
    const size_t size = static_cast<size_t>(__stop_cuda_on_cpu_shared - __start_cuda_on_cpu_shared);
    for (size_t i = 0; i < size; i += sizeof(word))
      std::memcpy(__start_cuda_on_cpu_shared + i, &word, std::min(sizeof(word), size - i));
  }

  const Place* find(const Place& place) {
    if (found_ != nullptr && *found_ == place) return found_;
    auto known = std::find(places_.begin(), places_.end(), place);
    if (known == places_.end()) known = places_.insert(known, place);
    return found_ = &*known;
  }

  std::string describe() const {
    std::map<std::string, std::vector<unsigned>> threads;
    for (unsigned t = 0; t < blockDim.x; ++t)
      threads[ready_[t / kLanes] >> t % kLanes & 1 ? "ready" : at_[t]->text()].push_back(t);
    std::string text = "cuda_on_cpu: block " + std::to_string(blockIdx.x) + " of " + std::to_string(gridDim.x) + ":";
    for (const auto& [what, which] : threads) {
      text += " thread " + std::to_string(which.front());
      text += " and " + std::to_string(which.size() - 1) + " more: " + what + ";";
    }
    return text;
  }

  // Lets threads go on that wait at one and the same place.
  void meet(unsigned first, unsigned count) {
    for (unsigned t = first; t < first + count; ++t)
      if (at_[t] != at_[first]) _longjmp(host_, 1);
    for (unsigned t = first; t < first + count; t += kLanes) {
      ready_[t / kLanes] = ~0u >> (kLanes - std::min(kLanes, first + count - t));
      ready_warps_ |= 1u << t / kLanes;
    }
  }

  // From one barrier to the next warps run side by side, or one far ahead of the others, or anything in between.
  void meet_all() {
    at_barrier_ = 0;
    meet(0, blockDim.x);
    patience_ = 1u << below(14);
    warp_ = pick(ready_warps_, warps());
  }

  // The compiler must take this for a call that may read and write any shared variable.
  __attribute__((noinline)) void wait() {
    jmp_buf here;
    resume_[threadIdx.x] = &here;
    asm volatile("" ::: "memory");
    if (_setjmp(here) == 0) run_next();
    asm volatile("" ::: "memory");
  }

  __attribute__((noinline)) void run_block() {
    running_ = true;
    if (_setjmp(host_) == 0) run_next();
    running_ = false;
  }

  [[noreturn]] void run_next() {
    if (ready_warps_ == 0) _longjmp(host_, 1);
    if (ready_[warp_] == 0 || below(patience_) == 0) warp_ = pick(ready_warps_, warps());
    const unsigned lane = pick(ready_[warp_], kLanes), thread = warp_ * kLanes + lane;
    if ((ready_[warp_] &= ~(1u << lane)) == 0) ready_warps_ &= ~(1u << warp_);
    threadIdx = dim3(thread, 0, 0);
    if (resume_[thread] != nullptr) _longjmp(*resume_[thread], 1);
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_ + thread * kStack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, live, 0);
    setcontext(&context);
    std::abort();
  }

  // A thread, of one launch after the other.
  static void live();

  static char* new_stacks() {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }

  std::mutex mutex_;
  uint64_t random_ = 1;
  std::list<Place> places_;
  const Place* found_ = nullptr;
  char* const stacks_ = new_stacks();

  // The launch.
  void (*kernel_)(void*) = nullptr;
  void* arguments_ = nullptr;
  jmp_buf host_;
  bool running_ = false;

  // The block; one bit for each warp and each lane that can go on.
  uint32_t ready_warps_ = 0, ready_[kMostWarps] = {};
  unsigned warp_ = 0, patience_ = 1, at_barrier_ = 0, exited_ = 0, at_shuffle_[kMostWarps];

  // The threads.
  jmp_buf* resume_[kMostThreads] = {};  // null where one has yet to start
  const Place* at_[kMostThreads];
  uint64_t brought_[kMostThreads], received_[kMostThreads];
  unsigned sources_[kMostThreads];
};

inline Simulator simulator;

inline void Simulator::live() {
  for (;;) {
    simulator.kernel_(simulator.arguments_);
    simulator.at_[threadIdx.x] = &kExit;
    ++simulator.exited_;
    simulator.wait();
  }
}

}  // namespace cuda_on_cpu
