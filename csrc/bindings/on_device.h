// The device that a call is for, made current while it runs.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastsample {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether a device has a context already, which making it current would create. Unknown counts as
// no.
inline bool has_context(int device) {
  typedef int State(int device, unsigned* flags, int* active);  // cuDevicePrimaryCtxGetState
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found,
                                                             12000, cudaEnableDefault, &status);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &status);
#endif
  unsigned flags = 0;
  int active = 0;
  return !error && found && !((State*)found)(device, &flags, &active) && active;
}

// Makes a device current, and the caller's again at the end if that creates nothing there.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != index;
    if (changed_) check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_ && has_context(before_)) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace fastsample
