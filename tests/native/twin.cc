// The twin as a kernel of its own: linked with csrc/cpu/dispatch.cc and csrc/bindings/cpu.cc it is
// an extension like the engine's, which tests/engines/test_native.py compares with the Python
// reference.
#include "twin.h"

#include "cpu/kernel.h"

namespace fastsample {

extern const Kernel kernel_baseline;
const Kernel kernel_baseline = {
    "twin", 4, [](const Batch& batch, int64_t r, Draws draws, const Workspace&) {
      return draws.begin ? kValid : twin::sample_row(batch, r);  // all draws at once
    }};

}  // namespace fastsample
