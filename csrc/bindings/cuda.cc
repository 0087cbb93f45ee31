// fastsample._cuda: records and a stream in, exceptions out, the GIL released. Python has validated
// everything. Importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace fastsample {
namespace {

constexpr int kOldestArch = FASTSAMPLE_OLDEST_GPU;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

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

// Makes a device current, and the caller's again at the end.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != index;
    if (changed_) check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A device's properties, asked for once. It must be current.
const Device& device_at(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Device>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= (size_t)index) known.resize((size_t)index + 1);
  std::unique_ptr<Device>& device = known[(size_t)index];
  if (!device) {
    const Device found = query(index);
    for (const Launches* launches : {&launches_float32, &launches_float16, &launches_bfloat16}) {
      check(launches->prepare(found), "preparing the kernels");
    }
    device = std::make_unique<Device>(found);
  }
  return *device;
}

const Launches& launches_for(DType dtype) {
  return dtype == kFloat32   ? launches_float32
         : dtype == kFloat16 ? launches_float16
                             : launches_bfloat16;
}

using Lent = std::pair<uintptr_t, int64_t>;  // address, bytes

// Launches and returns None; or launches nothing and returns how many bytes of workspace and boards
// it needs.
std::optional<std::pair<int64_t, int64_t>> run(const RowArguments& rows, const CallArguments& call,
                                               int device_index, uintptr_t stream, Lent workspace,
                                               Lent boards,
                                               const std::optional<DraftArguments>& drafts) {
  const py::gil_scoped_release unlocked;
  const OnDevice current(device_index);
  const Device& device = device_at(device_index);
  const Batch batch = batch_of(rows, call, drafts ? &*drafts : nullptr);
  const Layout layout = layout_for(device, batch, rows.bias_entries, plan(device, shape_of(batch)));
  if (layout.workspace > workspace.second || layout.boards > boards.second) {
    return std::make_pair(layout.workspace, layout.boards);
  }
  Workspace ws;
  lay_out(batch, layout, (char*)workspace.first, (char*)boards.first, ws);
  const Launches& launches = launches_for(batch.logits.dtype);
  check(launches.sample(batch, layout.sample, ws, (cudaStream_t)stream), "launching the sampler");
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
  const py::gil_scoped_release unlocked;
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

std::optional<std::string> why_not_device(int index) {
  const int arch = query(index).arch;
  if (arch >= kOldestArch) return std::nullopt;
  return "GPU " + std::to_string(index) + " has compute capability " + std::to_string(arch / 10) +
         "." + std::to_string(arch % 10) + ", and " + std::to_string(kOldestArch / 10) + "." +
         std::to_string(kOldestArch % 10) + " is the oldest it is built for";
}

}  // namespace
}  // namespace fastsample

PYBIND11_MODULE(_cuda, m) {
  namespace fs = fastsample;
  m.doc() = "The CUDA engine: see fastsample.backends.cuda, its only caller.";
  fs::add_fields(m);
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("run", &fs::run, "Launch and return None, or the bytes of memory that it needs first.");
  m.def("list_kept", &fs::list, "Launch what makes lists of ids of bitmasks.");
  m.def("why_not", &fs::why_not, "Why no GPU can be used, or None.");
  m.def("why_not_device", &fs::why_not_device, "Why this GPU cannot be used, or None.");
}
