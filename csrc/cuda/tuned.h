// Blocks per row that were the fastest when they were measured: `python -m bench gpu` prints this
// table. The first entry that fits counts; where none does, tuning.h estimates.
#pragma once

#include <stdint.h>

namespace fastsample {

struct Tuned {
  int32_t arch;      // 80, 90, ...
  int32_t itemsize;  // bytes per logit
  int64_t rows;      // at most
  int32_t vocab;     // at most
  int32_t parts;     // blocks per row
};

constexpr Tuned kTuned[] = {
    {0, 0, 0, 0, 0},  // no GPU has been measured
};

}  // namespace fastsample
