// Picks the ISA once and runs the rows of a batch, with each thread's scratch.
#include "cpu/dispatch.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
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

namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernel*> find_supported() {
  std::vector<const Kernel*> kernels;
#if defined(FASTSAMPLE_HAS_avx512)
  if (has_avx512()) kernels.push_back(&kernel_avx512);
#endif
#if defined(FASTSAMPLE_HAS_avx2)
  if (has_avx2()) kernels.push_back(&kernel_avx2);
#endif
#if defined(FASTSAMPLE_HAS_neon)
  kernels.push_back(&kernel_neon);
#endif
#if defined(FASTSAMPLE_HAS_baseline)
  kernels.push_back(&kernel_baseline);
#endif
  return kernels;
}

// Kernels that this CPU can run, best first. Asked once: a virtual machine traps each cpuid.
const std::vector<const Kernel*>& supported() {
  static const std::vector<const Kernel*> kernels = find_supported();
  return kernels;
}

const Kernel& find_kernel(const std::string& name, const char* what) {
  std::string names;
  for (const Kernel* k : supported()) {
    if (name == k->isa) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->isa;
  }
  throw std::invalid_argument(std::string(what) + " = '" + name + "': this CPU can run " + names);
}

std::atomic<const Kernel*> chosen{nullptr};

// Scratch that grows to the largest batch seen and is then reused. It begins at a page: where few
// values are copied, vectors are stored to the same place again and again, which takes many times
// as long across two pages.
template <class T>
struct Buffer {
  static constexpr std::align_val_t kPage{4096};
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, kPage); }
  };
  std::unique_ptr<T, Delete> data;
  size_t size = 0;

  T* at_least(size_t n) {
    if (n > size) {
      data.reset();
      size = 0;
      // Not initialised: pages that are never touched cost nothing.
      data.reset(static_cast<T*>(::operator new(n * sizeof(T), kPage)));
      size = n;
    }
    return data.get();
  }
};

struct Scratch {
  Buffer<float> block_max, values, spare, list_x;
  Buffer<uint64_t> group_mass;
  Buffer<int32_t> edit_start, segment, list_id;
  Buffer<Edit> edits;

  Workspace workspace(int32_t vocab, size_t num_edits) {
    const size_t blocks = (size_t)(vocab + kBlock - 1) / kBlock;
    const size_t groups = (blocks + kGroup - 1) / kGroup;
    const size_t tokens = (size_t)vocab + kPad;
    return Workspace{block_max.at_least(blocks + kPad),
                     group_mass.at_least(groups),
                     edit_start.at_least(blocks + 1),
                     edits.at_least(num_edits),
                     segment.at_least(groups + 1),
                     values.at_least(tokens),
                     spare.at_least(tokens),
                     list_x.at_least(tokens),
                     list_id.at_least(tokens),
                     nullptr};
  }
};

Workspace workspace_for(const Batch& batch) {
  thread_local Scratch scratch;
  size_t edits = 0;
  if (batch.rows.output.data) edits += (size_t)batch.rows.output.length;
  if (batch.rows.prompt.data) edits += (size_t)batch.rows.prompt.length;
  if (const int64_t* ptr = batch.rows.bias.row_ptr) {
    int64_t most = 0;
    for (int64_t r = 0; r < batch.logits.rows; ++r) most = std::max(most, ptr[r + 1] - ptr[r]);
    edits += (size_t)most;
  }
  return scratch.workspace(batch.logits.vocab, edits);
}

// The contract's float environment (nearest-even, subnormals kept), whatever the caller's thread
// has set.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"((uint64_t)0));
  }
  ~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

const void* row_address(const Logits& l, int64_t row) {
  return (const char*)l.data + row * l.stride * (l.dtype == kFloat32 ? 4 : 2);
}

// Whether a row was open: of all threads one is told so.
bool claim(uint8_t* taken) {
  return !__atomic_load_n(taken, __ATOMIC_RELAXED) &&
         !__atomic_exchange_n(taken, (uint8_t)1, __ATOMIC_RELAXED);
}

// Samples rows until none is open. Each thread takes every `threads`-th row, in every batch the
// same ones, which its core may still hold; then what the others have left, so that expensive rows
// do not wait for each other.
int64_t run_rows(const Batch& batch, const Kernel& k, int threads, int thread, uint8_t* taken) {
  const FloatEnvironment environment;
  const int64_t rows = batch.logits.rows;
  Workspace workspace = workspace_for(batch);
  int64_t invalid = 0;
  for (int i = 0; i < threads; ++i) {
    for (int64_t r = (thread + i) % threads; r < rows; r += threads) {
      if (!claim(taken + r)) continue;
      const int64_t next = r + threads;
      workspace.ahead = next < rows ? row_address(batch.logits, next) : nullptr;
      const Status status = k.sample_row(batch, r, workspace);
      batch.out.status[r] = status;
      invalid += status != kValid;
    }
  }
  return invalid;
}

}  // namespace

const Kernel& kernel() {
  const Kernel* k = chosen.load(std::memory_order_acquire);
  if (!k) {
    const char* name = getenv("FASTSAMPLE_ISA");
    k = name && *name ? &find_kernel(name, "FASTSAMPLE_ISA") : supported().front();
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernel* k : supported()) names.push_back(k->isa);
  return names;
}

void force_isa(const std::string& name) {
  chosen.store(&find_kernel(name, "isa"), std::memory_order_release);
}

int64_t sample_batch(const Batch& batch, int threads) {
  const Kernel& k = kernel();
  std::atomic<int64_t> invalid{0};
  thread_local Buffer<uint8_t> buffer;
  uint8_t* taken = buffer.at_least((size_t)batch.logits.rows);
  std::fill_n(taken, batch.logits.rows, (uint8_t)0);
  // A thread that has less than this to read costs more to wake than it saves.
  constexpr int64_t kLogitsPerThread = 1 << 16;
  const int64_t useful = batch.logits.rows * batch.logits.vocab / kLogitsPerThread + 1;
  const int used = (int)std::min({(int64_t)threads, batch.logits.rows, useful});
  run_on_threads(used, [&](int thread) { invalid += run_rows(batch, k, used, thread, taken); });
  return invalid;
}

}  // namespace fastsample
