// The floating-point mode of a thread (x86: MXCSR, aarch64: FPCR), on which the bits of the kernels must not depend.
#pragma once

#include <cstdint>

namespace fastclip::cpu {

// For as long as it lives its thread rounds to nearest, keeps subnormals and traps nothing, whatever mode the caller
// has chosen, as by torch.set_flush_denormal; then that mode is back. Every thread that computes needs one.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : callers_(read()) {
    if (is_other()) write(kDefault);
  }
  ~DefaultFloatMode() {
    if (is_other()) write(callers_);
  }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  bool is_other() const { return (callers_ & kModes) != kDefault; }

  // The clobbers keep memory that the kernels read and write on its side of the change.
#if defined(__x86_64__)
  using Register = uint32_t;
  static constexpr Register kModes = 0xffc0, kDefault = 0x1f80;  // all but the sticky flags; all exceptions masked
  static Register read() {
    Register mode;
    asm volatile("stmxcsr %0" : "=m"(mode) : : "memory");
    return mode;
  }
  static void write(Register mode) { asm volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kModes = ~Register{0}, kDefault = 0;
  static Register read() {
    Register mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return mode;
  }
  static void write(Register mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kModes = 0, kDefault = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  const Register callers_;
};

}  // namespace fastclip::cpu
