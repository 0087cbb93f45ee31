// Blocks per row that were the fastest when they were measured: `python -m bench tuned` prints
// these lines. The first that fits counts; where none does, tuning.h estimates. The Triton engine's
// table is fastsample/backends/triton_tuned.py.
#pragma once

#include <stdint.h>

namespace fastsample {

struct Tuned {
  int32_t arch;      // 80, 90, ...
  int32_t itemsize;  // bytes per logit
  int64_t rows;      // at most
  int32_t vocab;     // at most
  int32_t parts;     // blocks per row; 0: as many as tuning.h estimates
};

constexpr Tuned kTuned[] = {
    {0, 0, 0, 0, 0},  // no GPU has been measured
};

}  // namespace fastsample
