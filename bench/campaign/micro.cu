// Constants of a GPU that the engine's costs rest on, as a line of JSON for each: what it is, and
// its figures or why there are none. bench/campaign/micro.py compiles and runs it:
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -fmad=false -Icsrc -o micro bench/campaign/micro.cu
//   ./micro BYTES...     (sizes whose plain read is timed)
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace {

namespace fs = fastsample;
using fs::u64;

constexpr int kTurns = 200;  // of a barrier, and hops of a chain of loads
constexpr int kReplays = 5;

void check(cudaError_t error) {
  if (error) throw std::runtime_error(cudaGetErrorString(error));
}

std::string text(const char* format, ...) {
  char buffer[512];
  va_list values;
  va_start(values, format);
  vsnprintf(buffer, sizeof buffer, format, values);
  va_end(values);
  return buffer;
}

// Prints what `figures` returns, or its failure, which ends nothing else.
template <class Figures>
void report(const std::string& key, Figures figures) {
  try {
    printf("{%s, \"figures\": {%s}}\n", key.c_str(), std::string(figures()).c_str());
  } catch (const std::exception& error) {
    (void)cudaGetLastError();
    printf("{%s, \"failed\": \"%s\"}\n", key.c_str(), error.what());
  }
  fflush(stdout);
}

struct Memory {
  explicit Memory(size_t bytes) {
    check(cudaMalloc(&data, bytes));
    check(cudaMemset(data, 0, bytes));
  }
  ~Memory() { (void)cudaFree(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data = nullptr;
};

template <class T>
T fetch(const Memory& memory) {
  T value;
  check(cudaMemcpy(&value, memory.data, sizeof value, cudaMemcpyDefault));
  return value;
}

enum Kind { kAlone, kCluster, kCooperative };

struct Grid {
  int blocks, cluster, threads;
  size_t shared;
  Kind kind;
};

template <class Kernel>
cudaLaunchConfig_t configure(Kernel kernel, const Grid& grid, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)grid.blocks);
  config.blockDim = dim3((unsigned)grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.attrs = attribute;
  config.numAttrs = grid.kind == kAlone ? 0 : 1;
  *attribute = {};
  if (grid.kind == kCluster) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = (unsigned)grid.cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    if (grid.cluster > fs::kPortableCluster) {
      check(cudaFuncSetAttribute((const void*)kernel,
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
  } else if (grid.kind == kCooperative) {
    attribute->id = cudaLaunchAttributeCooperative;
    attribute->val.cooperative = 1;
  }
  check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)grid.shared));
  return config;
}

// Runs a kernel once to load it, then once more.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configure(kernel, grid, &attribute);
  for (int turn = 0; turn < 2; ++turn) {
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
    check(cudaDeviceSynchronize());
  }
}

// Rows in flight as planned, beside the clusters that the driver says are resident, and beside an
// estimate that knows nothing of groups of multiprocessors. One kernel stands for all, which may
// use as many registers as it does.
std::string residency(const fs::Device& device, const fs::Shape& shape) {
  const auto kernel = fs::sample_kernel<float, fs::kClusterPolicy, true>;
  int clusters = 0;
  int64_t estimate = 0;
  const auto resident = [&](const fs::Plan& plan) -> int64_t {
    estimate = fs::resident_teams(device, plan);
    if (plan.policy != fs::kClusterPolicy) return estimate;
    const Grid grid = {plan.parts, plan.parts, plan.threads, (size_t)plan.shared, kCluster};
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configure(kernel, grid, &attribute);
    check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared));
    check(cudaOccupancyMaxActiveClusters(&clusters, (const void*)kernel, &config));
    return clusters;
  };
  const fs::Plan plan = fs::plan(device, shape, resident);
  return text(
      "\"policy\": %d, \"parts\": %d, \"shared_bytes\": %d, \"teams\": %d, \"resident\": %d, "
      "\"estimate\": %lld",
      (int)plan.policy, plan.parts, plan.shared, plan.teams, clusters, (long long)estimate);
}

// Every block adds to the words of the first one; `wide` with the 64-bit instruction.
__global__ void add_to_peer(u64* out, bool wide) {
  u64* words = (u64*)fs::shared_memory();
  if (threadIdx.x == 0) *words = 0;
  fs::cluster_sync();
  u64* peer = fs::of_cluster_block(words, 0);
  for (int turn = 0; turn < kTurns; ++turn) {
    const u64 value = 0x1ffffffffull * (threadIdx.x + 1);
    if (wide) {
      atomicAdd(peer, value);
    } else {
      fs::add_wide(peer, value);
    }
  }
  fs::cluster_sync();
  if (fs::cluster_rank() == 0 && threadIdx.x == 0) *out = *words;
  fs::cluster_sync();
}

std::string exactness(bool wide) {
  const Memory out(sizeof(u64));
  const Grid grid = {8, 8, 256, 1024, kCluster};
  launch(add_to_peer, grid, (u64*)out.data, wide);
  const u64 expected = 0x1ffffffffull * kTurns * (256 * 257 / 2) * 8;
  return text("\"exact\": %s", fetch<u64>(out) == expected ? "true" : "false");
}

__global__ void cluster_barriers(long long* out, bool relaxed) {
  const long long begin = clock64();
  for (int turn = 0; turn < kTurns; ++turn) {
    if (relaxed) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                       : "memory");
#endif
    } else {
      fs::cluster_sync();
    }
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *out = (clock64() - begin) / kTurns;
}

__global__ void grid_barriers(long long* out, uint32_t* semaphore) {
  fs::Shared& own = *(fs::Shared*)fs::shared_memory();
  if (threadIdx.x == 0) own.semaphore = semaphore;
  __syncthreads();
  const long long begin = clock64();
  for (int turn = 0; turn < kTurns; ++turn) fs::grid_sync(own, (int)blockIdx.x, (int)gridDim.x);
  if (threadIdx.x == 0 && blockIdx.x == 0) *out = (clock64() - begin) / kTurns;
}

std::string cycles_of_cluster(int size, bool relaxed) {
  const Memory out(sizeof(long long));
  launch(cluster_barriers, Grid{size, size, 256, 0, kCluster}, (long long*)out.data, relaxed);
  return text("\"cycles\": %lld", fetch<long long>(out));
}

std::string cycles_of_grid(int blocks) {
  const Memory out(sizeof(long long)), semaphore(sizeof(uint32_t));
  const Grid grid = {blocks, 1, 256, sizeof(fs::Shared), kCooperative};
  launch(grid_barriers, grid, (long long*)out.data, (uint32_t*)semaphore.data);
  return text("\"cycles\": %lld", fetch<long long>(out));
}

// Each thread sums eight neighbouring bins of 64 bits, then once more to clear them: where they lie
// eight apart, and where they are `transposed` so that neighbouring threads meet different banks.
__global__ void sum_bins(long long* out, u64* sink, bool transposed) {
  volatile u64* bins = (volatile u64*)fs::shared_memory();
  for (int i = (int)threadIdx.x; i < 2048; i += 256) bins[i] = (u64)i;
  __syncthreads();
  const long long begin = clock64();
  u64 sum = 0;
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      const int bin = 2047 - 8 * (int)threadIdx.x - i;
      const int at = transposed ? (bin & 7) * 256 + (bin >> 3) : bin;
      sum += bins[at];
      if (round) bins[at] = 0;
    }
  }
  __syncthreads();
  const long long cycles = clock64() - begin;
  if (threadIdx.x == 0) *out = cycles;
  sink[threadIdx.x] = sum;
}

std::string cycles_of_bins(bool transposed) {
  const Memory out(sizeof(long long)), sink(256 * sizeof(u64));
  const Grid grid = {1, 1, 256, 2048 * sizeof(u64), kAlone};
  launch(sum_bins, grid, (long long*)out.data, (u64*)sink.data, transposed);
  return text("\"cycles\": %lld", fetch<long long>(out));
}

// A chain of loads from shared memory: of the own block, or of the other one in the cluster.
template <bool kPeer>
__global__ void chase_shared(long long* out, uint32_t* sink) {
  uint32_t* next = (uint32_t*)fs::shared_memory();
  for (uint32_t i = threadIdx.x; i < 1024; i += blockDim.x) next[i] = (i + 33) % 1024;
  fs::cluster_sync();
  const volatile uint32_t* from = next;
  if constexpr (kPeer) from = fs::of_cluster_block(next, 1 - fs::cluster_rank());
  uint32_t at = 0;
  const long long begin = clock64();
  for (int hop = 0; hop < kTurns; ++hop) at = from[at];
  if (threadIdx.x == 0 && blockIdx.x == 0) *out = (clock64() - begin) / kTurns;
  sink[threadIdx.x] = at;
  fs::cluster_sync();
}

template <bool kPeer>
std::string latency_of_shared() {
  const Memory out(sizeof(long long)), sink(32 * sizeof(uint32_t));
  const Grid grid = {2, 2, 32, 4096, kCluster};
  launch(chase_shared<kPeer>, grid, (long long*)out.data, (uint32_t*)sink.data);
  return text("\"cycles\": %lld", fetch<long long>(out));
}

__global__ void chase_global(const uint32_t* next, uint32_t first, long long* out, uint32_t* sink) {
  uint32_t at = first;
  const long long begin = clock64();
  for (int hop = 0; hop < kTurns; ++hop) at = __ldcg(next + at);
  *out = (clock64() - begin) / kTurns;
  *sink = at;
}

// A chain through a buffer in random order, one stop per 4 KiB. The second launch goes the way of
// the first, through lines that the L2 cache has kept; or it starts elsewhere, where nobody has
// been.
std::string latency_of_global(size_t bytes, bool cached) {
  constexpr size_t kStride = 1024;  // words
  std::vector<uint32_t> stops(bytes / 4 / kStride), next(bytes / 4);
  std::iota(stops.begin(), stops.end(), 0u);
  std::shuffle(stops.begin(), stops.end(), std::mt19937(1));
  for (size_t i = 0; i < stops.size(); ++i) {
    next[stops[i] * kStride] = stops[(i + 1) % stops.size()] * (uint32_t)kStride;
  }
  const Memory chain(bytes), out(sizeof(long long)), sink(sizeof(uint32_t));
  check(cudaMemcpy(chain.data, next.data(), bytes, cudaMemcpyDefault));
  if (!cached) const Memory others(bytes);  // which take the place of the chain in the cache
  const size_t begins[] = {0, cached ? 0 : stops.size() / 2};
  for (size_t begin : begins) {
    chase_global<<<1, 1>>>((const uint32_t*)chain.data, stops[begin] * (uint32_t)kStride,
                           (long long*)out.data, (uint32_t*)sink.data);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
  }
  return text("\"cycles\": %lld", fetch<long long>(out));
}

// Reads everything and keeps nothing: what no sampler can do without.
__global__ void read_all(const uint4* from, int64_t vectors, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 7 * step < vectors; i += 8 * step) {
    uint4 batch[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) batch[j] = __ldg(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum |= batch[j].x | batch[j].y | batch[j].z | batch[j].w;
  }
  for (; i < vectors; i += step) {
    const uint4 v = __ldg(from + i);
    sum |= v.x | v.y | v.z | v.w;
  }
  if (sum) *sink = sum;  // never: the memory is zero, which the compiler does not know
}

// The time of one read, among as many in a graph as exceed the L2 cache twice; the median replay.
std::string read_floor(size_t bytes, const cudaDeviceProp& card) {
  const size_t turns = std::min<size_t>(256, std::max<size_t>(2, 2 * card.l2CacheSize / bytes + 1));
  const int64_t vectors = (int64_t)(bytes / sizeof(uint4));
  const int blocks = (int)std::min<int64_t>((vectors + 255) / 256, 8 * card.multiProcessorCount);
  const Memory rows(turns * bytes), sink(sizeof(uint32_t));
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream));
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (size_t turn = 0; turn < turns; ++turn) {
    const uint4* from = (const uint4*)((const char*)rows.data + turn * bytes);
    read_all<<<(unsigned)blocks, 256, 0, stream>>>(from, vectors, (uint32_t*)sink.data);
  }
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  std::vector<float> milliseconds;
  for (int i = 0; i <= kReplays; ++i) {
    float elapsed = 0;
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&elapsed, begin, end));
    if (i) milliseconds.push_back(elapsed);
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  const double us = 1e3 * milliseconds[kReplays / 2] / (double)turns;
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  return text("\"us\": %.3f, \"bytes_per_second\": %.4g", us, 1e6 * (double)bytes / us);
}

int attribute(cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, 0));
  return value;
}

fs::Device device_of(const cudaDeviceProp& card) {
  fs::Device device = {};
  device.arch = 10 * card.major + card.minor;
  device.multiprocessors = card.multiProcessorCount;
  device.shared_block = (int)card.sharedMemPerBlockOptin;
  device.shared_sm = (int)card.sharedMemPerMultiprocessor;
  device.largest_cluster = card.major == 9 || card.major == 10 ? fs::kLargestCluster
                           : card.major > 10                   ? fs::kPortableCluster
                                                               : 1;
  return device;
}

void measure_clusters(const fs::Device& device) {
  for (int itemsize : {4, 2}) {
    for (int rows : {1, 64, 256}) {
      for (bool edits : {false, true}) {
        report(text("\"what\": \"clusters\", \"itemsize\": %d, \"rows\": %d, \"edits\": %s",
                    itemsize, rows, edits ? "true" : "false"),
               [&] { return residency(device, fs::Shape{rows, 128256, itemsize, edits}); });
      }
    }
  }
  for (bool wide : {false, true}) {
    report(text("\"what\": \"adds to a peer\", \"bits\": %s", wide ? "\"64\"" : "\"2 x 32\""),
           [&] { return exactness(wide); });
  }
  for (int size = 2; size <= device.largest_cluster; size *= 2) {
    for (bool relaxed : {false, true}) {
      report(text("\"what\": \"cluster barrier\", \"blocks\": %d, \"relaxed\": %s", size,
                  relaxed ? "true" : "false"),
             [&] { return cycles_of_cluster(size, relaxed); });
    }
  }
  report("\"what\": \"latency\", \"of\": \"shared memory\"", latency_of_shared<false>);
  report("\"what\": \"latency\", \"of\": \"a peer's shared memory\"", latency_of_shared<true>);
}

}  // namespace

int main(int count, char** arguments) {
  cudaDeviceProp card = {};
  report("\"what\": \"device\"", [&] {
    check(cudaGetDeviceProperties(&card, 0));
    return text(
        "\"name\": \"%s\", \"arch\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, \"clock_khz\": "
        "%d",
        card.name, 10 * card.major + card.minor, card.multiProcessorCount, card.l2CacheSize,
        attribute(cudaDevAttrClockRate));
  });
  if (!card.major) return 1;
  const fs::Device device = device_of(card);
  if (device.arch >= 90) measure_clusters(device);
  for (int blocks = 2; blocks <= fs::kMaxParts; blocks *= 2) {
    report(text("\"what\": \"grid barrier\", \"blocks\": %d", blocks),
           [&] { return cycles_of_grid(blocks); });
  }
  for (bool transposed : {false, true}) {
    report(text("\"what\": \"bins\", \"transposed\": %s", transposed ? "true" : "false"),
           [&] { return cycles_of_bins(transposed); });
  }
  const size_t l2 = (size_t)card.l2CacheSize;
  report("\"what\": \"latency\", \"of\": \"L2 cache\"",
         [&] { return latency_of_global(l2 / 8, true); });
  report("\"what\": \"latency\", \"of\": \"device memory\"",
         [&] { return latency_of_global(2 * l2, false); });
  for (int i = 1; i < count; ++i) {
    const size_t bytes = (size_t)atoll(arguments[i]);
    report(text("\"what\": \"read\", \"bytes\": %zu", bytes),
           [&] { return read_floor(bytes, card); });
  }
  return 0;
}
