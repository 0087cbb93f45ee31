// What csrc/bindings/on_device.h asks of CUDA, of a machine with two devices that notes what is
// asked.
#pragma once

#include <set>
#include <string>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

typedef int cudaError_t;
typedef int cudaDriverEntryPointQueryResult;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoDevice = 100;
constexpr int cudaEnableDefault = 0;

struct Machine {
  int current = 0;
  std::set<int> contexts;  // devices that have one
  std::vector<int> set;    // each device that was made current
  bool has_entry_point = true, knows_state = true, fails = false;
};
inline Machine machine;

inline cudaError_t cudaGetDevice(int* device) {
  *device = machine.current;
  return machine.fails ? cudaErrorNoDevice : cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorNoDevice;
  machine.set.push_back(device);
  machine.contexts.insert(device);
  machine.current = device;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "no device"; }

inline int state_of(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = (int)machine.contexts.count(device);
  return machine.knows_state ? 0 : 1;
}

inline cudaError_t entry_point(const std::string& name, void** found) {
  const bool known = machine.has_entry_point && name == "cuDevicePrimaryCtxGetState";
  *found = known ? (void*)state_of : nullptr;
  return cudaSuccess;
}

#if CUDART_VERSION >= 12050
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult*) {
  return entry_point(name, found);
}
#else
inline cudaError_t cudaGetDriverEntryPoint(const char* name, void** found, int,
                                           cudaDriverEntryPointQueryResult*) {
  return entry_point(name, found);
}
#endif
