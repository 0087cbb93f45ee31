// What depends on the processor or the operating system, apart from the kernels' vectors: which
// kernels can run here, how floats are rounded, and how a thread waits.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace fastsample {

#define FASTSAMPLE_DECLARE(isa) extern const Kernel kernel_##isa;
#if defined(FASTSAMPLE_HAS_avx512)
FASTSAMPLE_DECLARE(avx512)
#endif
#if defined(FASTSAMPLE_HAS_avx2)
FASTSAMPLE_DECLARE(avx2)
#endif
#if defined(FASTSAMPLE_HAS_neon)
FASTSAMPLE_DECLARE(neon)
#endif
#if defined(FASTSAMPLE_HAS_baseline)
FASTSAMPLE_DECLARE(baseline)
#endif
#undef FASTSAMPLE_DECLARE

namespace platform {

#if defined(__x86_64__)
// What the processor can do and the operating system allows. __builtin_cpu_supports would be
// shorter, but with the run-time library of zig, which builds the wheels, it says no to everything.
class Cpuid {
 public:
  Cpuid() {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_ = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_ = b;
    if (leaf1_ & bit_OSXSAVE) asm("xgetbv" : "=a"(saved_), "=d"(d) : "c"(0));
  }

  bool avx2() const {
    return all(leaf1_, bit_AVX | bit_F16C | bit_POPCNT) &&
           all(leaf7_, bit_AVX2 | bit_BMI | bit_BMI2) && all(saved_, kYmm);
  }
  bool avx512() const {
    return avx2() && all(leaf7_, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
           all(saved_, kZmm);
  }

 private:
  // Registers that the operating system saves: xmm and ymm; mask registers and zmm.
  static constexpr unsigned kYmm = 6, kZmm = 0xe0;
  static bool all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

  unsigned leaf1_ = 0, leaf7_ = 0, saved_ = 0;
};
#endif

// Of the kernels that were built, those that this processor can run, best first.
inline std::vector<const Kernel*> find_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(FASTSAMPLE_HAS_avx512)
  if (Cpuid().avx512()) kernels.push_back(&kernel_avx512);
#endif
#if defined(FASTSAMPLE_HAS_avx2)
  if (Cpuid().avx2()) kernels.push_back(&kernel_avx2);
#endif
#if defined(FASTSAMPLE_HAS_neon)
  kernels.push_back(&kernel_neon);
#endif
#if defined(FASTSAMPLE_HAS_baseline)
  kernels.push_back(&kernel_baseline);
#endif
  return kernels;
}

// The contract's float environment (nearest-even, subnormals kept), whatever the caller's thread
// has set.
class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(get()) { set(kDefault); }
  ~FloatEnvironment() { set(saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kDefault = 0x1f80;
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t control) { _mm_setcsr((unsigned)control); }
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif

  uint64_t saved_;
};

// Lets the core's other thread work while this one spins.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Linux likes to wake a thread on the core of the one that wakes it, in a virtual machine even
// where another core idles: both would then share that core's time.
#if defined(__linux__)
inline int this_core() { return sched_getcpu(); }

// Confines the calling thread to the other cores that the process may run on, if there are any.
inline void move_off(int core) {
  cpu_set_t cores;
  if (sched_getaffinity(getpid(), sizeof cores, &cores) != 0) return;
  CPU_CLR((size_t)core, &cores);
  sched_setaffinity(0, sizeof cores, &cores);
}
#else
inline int this_core() { return -1; }
inline void move_off(int) {}
#endif

}  // namespace platform
}  // namespace fastsample
