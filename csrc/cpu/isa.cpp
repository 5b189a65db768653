#include <cstdlib>
#include <stdexcept>
#include <string>

#include "loops.h"

namespace fastclip::cpu {
namespace {

struct Isa {
  const Loops* loops;
  bool here;
};

const Loops& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every CPU with AVX2 has F16C, which some compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Isa isas[] = {{&kLoopsAvx512, avx512}, {&kLoopsAvx2, avx2}, {&kLoopsScalar, true}};
#elif defined(__aarch64__)
  const Isa isas[] = {{&kLoopsNeon, true}, {&kLoopsScalar, true}};
#else
  const Isa isas[] = {{&kLoopsScalar, true}};
#endif
  const char* wanted = std::getenv("FASTCLIP_CPU_ISA");
  std::string present;
  for (const Isa& isa : isas) {
    if (!isa.here) continue;
    if (wanted == nullptr || *wanted == '\0' || isa.loops->isa == std::string(wanted)) return *isa.loops;
    present += std::string(present.empty() ? "" : ", ") + isa.loops->isa;
  }
  throw std::runtime_error("FASTCLIP_CPU_ISA: expected one of " + present + " on this machine, got " + wanted);
}

}  // namespace

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

}  // namespace fastclip::cpu
