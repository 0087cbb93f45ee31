// fastsample._cuda: records and a stream in, exceptions out, the GIL released. Python has validated
// everything. Importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/on_device.h"
#include "bindings/unlocked.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace fastsample {
namespace {

constexpr int kOldestArch = FASTSAMPLE_OLDEST_GPU;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Device query(int index) {
  Device d = {};
  d.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
           attribute(cudaDevAttrComputeCapabilityMinor, index);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  d.shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  d.shared_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  // sm_90 and sm_10x allow more than the portable size; later ones are not known to.
  const bool large = d.arch >= 90 && d.arch < 110;
  d.largest_cluster = d.arch < 90 ? 1 : large ? kLargestCluster : kPortableCluster;
  return d;
}

// Lets this thread do what a capture forbids and what does not belong to it: load kernels, ask for
// occupancies.
class OutsideCapture {
 public:
  OutsideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

const Launches& launches_for(DType dtype) {
  return dtype == kFloat32   ? launches_float32
         : dtype == kFloat16 ? launches_float16
                             : launches_bfloat16;
}

std::atomic<int32_t> tuned_parts{0};

// A device as the driver describes it, asked for once.
class Known {
 public:
  // It must be current.
  static Known& at(int index) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Known>> all;
    const std::lock_guard<std::mutex> lock(mutex);
    if (all.size() <= (size_t)index) all.resize((size_t)index + 1);
    if (!all[(size_t)index]) all[(size_t)index].reset(new Known(index));
    return *all[(size_t)index];
  }

  Device device() const {
    Device d = device_;
    d.parts = tuned_parts.load(std::memory_order_relaxed);
    return d;
  }

  int64_t resident(DType dtype, const Plan& plan, bool plain) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_tuple(dtype, plan.policy, plan.parts, plan.shared, plain);
    const auto found = resident_.find(key);
    if (found != resident_.end()) return found->second;
    const OutsideCapture here;
    int teams = 0;
    // A cluster that no group of multiprocessors can hold is an error on some devices: 0 either
    // way.
    if (launches_for(dtype).resident(device_, plan, plain, &teams) != cudaSuccess) teams = 0;
    return resident_[key] = teams;
  }

 private:
  explicit Known(int index) : device_(query(index)) {
    const OutsideCapture here;
    for (const Launches* launches : {&launches_float32, &launches_float16, &launches_bfloat16}) {
      check(launches->prepare(device_), "preparing the kernels");
    }
    check(prepare_lists(), "preparing the lists");
  }

  const Device device_;
  std::mutex mutex_;
  std::map<std::tuple<DType, Policy, int32_t, int32_t, bool>, int64_t> resident_;
};

using Lent = std::pair<uintptr_t, int64_t>;  // address, bytes

// Launches and returns None; or launches nothing and returns how many bytes of workspace and boards
// it needs. With `advance`, each row's offset is one more afterwards; nothing else may read it.
std::optional<std::pair<int64_t, int64_t>> run(const RowArguments& rows, const CallArguments& call,
                                               int device_index, uintptr_t stream, Lent workspace,
                                               Lent boards,
                                               const std::optional<DraftArguments>& drafts,
                                               bool advance) {
  const WithoutGil unlocked;
  const OnDevice current(device_index);
  Known& known = Known::at(device_index);
  const Device device = known.device();
  const Batch batch = batch_of(rows, call, drafts ? &*drafts : nullptr);
  const Shape shape = shape_of(batch);
  Layout layout =
      layout_for(device, batch, rows.bias_entries, plan(device, shape, [&](const Plan& candidate) {
                   return known.resident(batch.logits.dtype, candidate, is_plain(batch.rows));
                 }));
  if (layout.workspace > workspace.second || layout.boards > boards.second) {
    return std::make_pair(layout.workspace, layout.boards);
  }
  Workspace ws;
  lay_out(batch, layout, (char*)workspace.first, (char*)boards.first, ws);
  if (advance) ws.offsets = (int64_t*)rows.offsets;
  const Launches& launches = launches_for(batch.logits.dtype);
  cudaError_t error = launches.sample(batch, layout.sample, ws, (cudaStream_t)stream);
  while (error == cudaErrorCooperativeLaunchTooLarge && shrink(device, shape, layout.sample)) {
    error = launches.sample(batch, layout.sample, ws, (cudaStream_t)stream);
  }
  check(error, "launching the sampler");
  if (wants_kept(batch.out)) {
    check(launches.keep(batch, layout.outputs, ws, (cudaStream_t)stream), "launching what is kept");
  }
  if (batch.out.weights) {
    check(launches.law(batch, layout.outputs, ws, (cudaStream_t)stream), "launching the law");
  }
  if (wants_outputs(batch.out)) {
    check(launches.outputs(batch, layout.outputs, ws, (cudaStream_t)stream),
          "launching the outputs");
  }
  return std::nullopt;
}

void list(uintptr_t bitmask, int64_t rows, int32_t words, uintptr_t row_ptr, uintptr_t ids,
          int64_t size, int device_index, uintptr_t stream) {
  const WithoutGil unlocked;
  const OnDevice current(device_index);
  const Lists lists = {(const int32_t*)bitmask, rows,          words,
                       (const int64_t*)row_ptr, (int32_t*)ids, size};
  check(list_kept(lists, (cudaStream_t)stream), "launching the lists");
}

std::optional<std::string> why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || (!error && !count)) {
    return "there is no NVIDIA GPU with a driver that CUDA " +
           std::to_string(CUDART_VERSION / 1000) + " can use (" + cudaGetErrorString(error) + ")";
  }
  if (error) return std::string("CUDA cannot be used: ") + cudaGetErrorString(error);
  return std::nullopt;
}

// Also prepares the device's kernels, so that no later call has to.
std::optional<std::string> why_not_device(int index) {
  const int arch = query(index).arch;
  if (arch >= kOldestArch) {
    const OnDevice current(index);
    (void)Known::at(index);
    return std::nullopt;
  }
  return "GPU " + std::to_string(index) + " has compute capability " + std::to_string(arch / 10) +
         "." + std::to_string(arch % 10) + ", and " + std::to_string(kOldestArch / 10) + "." +
         std::to_string(kOldestArch % 10) + " is the oldest it is built for";
}

void tune(int32_t parts, int32_t threads) {
  if (!may_share(parts) || (threads != 0 && threads != kThreads)) {
    throw std::invalid_argument("tune(parts, threads): parts is 0 or a power of two up to " +
                                std::to_string(kMaxParts) + ", threads 0 or " +
                                std::to_string(kThreads));
  }
  tuned_parts = parts;
}

}  // namespace
}  // namespace fastsample

PYBIND11_MODULE(_cuda, m) {
  namespace fs = fastsample;
  m.doc() = "The CUDA engine: see fastsample.backends.cuda, its only caller but for tuning sweeps.";
  fs::add_fields(m);
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("run", &fs::run, "Launch and return None, or the bytes of memory that it needs first.");
  m.def("list_kept", &fs::list, "Launch what makes lists of ids of bitmasks.");
  m.def("why_not", &fs::why_not, "Why no GPU can be used, or None.");
  m.def("why_not_device", &fs::why_not_device, "Why this GPU cannot be used, or None.");
  m.def("tune", &fs::tune,
        "Blocks per row for this process, and threads per block; 0: as planned.");
}
