// The twin as a kernel of its own: linked with csrc/cpu/dispatch.cc and csrc/bindings/cpu.cc it is
// an extension like the engine's, which tests/engines/test_native.py compares with the Python
// reference.
#include "twin.h"

#include "cpu/kernel.h"

namespace fastsample {

extern const Kernel kernel_baseline;
const Kernel kernel_baseline = {
    "twin", 4,
    [](const Batch& batch, int64_t r, Draws draws, const Workspace&) {
      return draws.begin ? kValid : twin::sample_row(batch, r);  // all draws at once
    },
    [](const int32_t* words, int64_t n, int32_t* ids, int64_t) {
      for (int64_t i = 0; i < n * 32; ++i) {
        if ((uint32_t)words[i / 32] >> i % 32 & 1) *ids++ = (int32_t)i;
      }
    },
    nullptr};  // parts of rows: tests/distributed/test_part.py has another twin

}  // namespace fastsample
