// fastsample._cpu: addresses and strides in, exceptions out, the GIL released. Python has validated
// everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include <chrono>
#include <exception>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastsample {
namespace {

using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t>;         // address, row stride in elements
using Table = std::tuple<Address, int64_t, int64_t>;  // address, row stride, row length
using Triple = std::tuple<Address, Address, Address>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
Column<T> column(const Strided& c, int64_t elements_per_row = 1) {
  return Column<T>{pointer<const T>(std::get<0>(c)), std::get<1>(c) / elements_per_row};
}

Bitmask bitmask(const std::optional<Table>& mask) {
  if (!mask) return Bitmask{nullptr, 0, 0};
  // A mask of no words allows nothing; its address may be null, which would mean no mask at all.
  static const int32_t kNothing = 0;
  const auto [address, stride, words] = *mask;
  return words ? Bitmask{pointer<const int32_t>(address), stride, words} : Bitmask{&kNothing, 0, 0};
}

BiasEntries bias_entries(const std::optional<Triple>& bias) {
  if (!bias) return BiasEntries{nullptr, nullptr, nullptr};
  const auto [row_ptr, ids, values] = *bias;
  return BiasEntries{pointer<const int64_t>(row_ptr), pointer<const int64_t>(ids),
                     pointer<const float>(values)};
}

TokenIds token_ids(const std::optional<Table>& ids) {
  if (!ids || std::get<2>(*ids) == 0) return TokenIds{nullptr, 0, 0};
  const auto [address, stride, length] = *ids;
  return TokenIds{pointer<const int64_t>(address), stride, length};
}

constexpr int64_t kFields = sizeof(RowParams) / sizeof(int32_t);

// A batch's Rows and how many offsets they have, made once and used for many steps; Python keeps
// the tensors alive.
struct SizedRows : Rows {
  int64_t num_offsets;
};

SizedRows make_rows(Strided params, Strided seeds, Strided offsets, int64_t num_offsets) {
  SizedRows rows = {};
  rows.num_offsets = num_offsets;
  rows.params = column<RowParams>(params, kFields);
  rows.seeds = column<int64_t>(seeds);
  rows.offsets = column<int64_t>(offsets);
  return rows;
}

// The same parameters with what changes from step to step.
SizedRows with_inputs(SizedRows rows, std::optional<Table> mask, std::optional<Triple> bias,
                      std::optional<Table> prompt, std::optional<Table> output) {
  rows.bitmask = bitmask(mask);
  rows.bias = bias_entries(bias);
  rows.prompt = token_ids(prompt);
  rows.output = token_ids(output);
  return rows;
}

// What a step's buffers hold, to be put back. (Calls that fill [B, V] have none of their callers'
// to keep.)
class Saved {
 public:
  explicit Saved(const Outputs& out, int64_t rows) : out_(out), rows_(rows) {
    bytes_.swap(spare());
    bytes_.clear();
    each_buffer([&](char* at, size_t n) { bytes_.insert(bytes_.end(), at, at + n); });
  }
  ~Saved() { bytes_.swap(spare()); }
  Saved(const Saved&) = delete;

  void put_back() const {
    const char* from = bytes_.data();
    each_buffer([&](char* at, size_t n) {
      memcpy(at, from, n);
      from += n;
    });
  }

 private:
  // Keeps its memory from call to call.
  static std::vector<char>& spare() {
    thread_local std::vector<char> bytes;
    return bytes;
  }

  template <class F>
  void each_buffer(F f) const {
    const auto each = [&](auto* data, int64_t per_row) {
      if (data) f((char*)data, (size_t)(rows_ * per_row) * sizeof *data);
    };
    each(out_.status, 1);
    each(out_.tokens, out_.num_samples);
    each(out_.logprobs, out_.num_samples);
    each(out_.ranks, out_.num_samples);
    each(out_.top_ids, out_.num_top);
    each(out_.top_logprobs, out_.num_top);
  }

  const Outputs& out_;
  int64_t rows_;
  std::vector<char> bytes_;
};

// The thread whose signals Python handles.
bool is_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
  return pthread_main_np();
#else
  return false;
#endif
}

// A call without the GIL. Not gil_scoped_release: where the interpreter is being finalised, taking
// the lock back ends this thread by unwinding its stack, and to unwind a destructor would abort the
// process.
class Unlocked {
 public:
  void begin() { state_ = PyEval_SaveThread(); }
  void end() { PyEval_RestoreThread(state_); }

  // Lets Python's handlers of signals run where that is due; whether one of them has raised, which
  // this thread's state then holds. The main thread alone asks: it is the one that finalises.
  bool interrupted() {
    constexpr std::chrono::milliseconds kBetween(100);
    const auto now = std::chrono::steady_clock::now();
    const bool first = next_ == std::chrono::steady_clock::time_point();  // the clock starts
    if (!first && now < next_) return false;
    next_ = now + kBetween;
    if (first || !is_main_thread()) return false;
    end();
    raised_ = PyErr_CheckSignals() != 0;
    begin();
    return raised_;
  }
  bool raised() const { return raised_; }

 private:
  PyThreadState* state_ = nullptr;
  std::chrono::steady_clock::time_point next_;
  bool raised_ = false;
};

int64_t run(const SizedRows& rows, Address logits, int64_t stride, int64_t batch_size,
            int32_t vocab, int32_t dtype, Address status, Address tokens, int32_t num_samples,
            bool restore, int threads, Address filtered, Address probabilities, Address logprobs,
            Address ranks, Address top_ids, Address top_logprobs, int32_t num_top, int32_t mode) {
  // Such as the address of a fake tensor, one that was made while torch pretends.
  if (batch_size &&
      (!logits || !status || !rows.params.data || !rows.seeds.data || !rows.offsets.data)) {
    throw std::invalid_argument("logits, params or outputs: a tensor without memory");
  }
  const Batch batch = {
      Logits{pointer<const void>(logits), stride, batch_size, vocab, (DType)dtype},
      rows,
      Outputs{pointer<int32_t>(status), pointer<int64_t>(tokens), pointer<float>(filtered),
              pointer<float>(probabilities), pointer<float>(logprobs), pointer<int64_t>(ranks),
              pointer<int64_t>(top_ids), pointer<float>(top_logprobs), num_samples, num_top,
              (LogprobsMode)mode},
  };
  int64_t invalid = 0;
  std::exception_ptr error;
  std::optional<Saved> saved;
  if (restore) saved.emplace(batch.out, batch_size);
  Unlocked unlocked;
  unlocked.begin();
  try {
    invalid = sample_batch(batch, threads, [&] { return unlocked.interrupted(); });
  } catch (...) {
    error = std::current_exception();
  }
  if (saved && (error || invalid || unlocked.raised())) saved->put_back();
  unlocked.end();
  if (error) std::rethrow_exception(error);
  if (unlocked.raised()) throw py::error_already_set();
  return invalid;
}

// The usual call, apart because each argument takes Python some time.
int64_t run_tokens(const SizedRows& rows, Address logits, int64_t stride, int64_t batch_size,
                   int32_t vocab, int32_t dtype, Address status, Address tokens,
                   int32_t num_samples, bool restore, int threads) {
  return run(rows, logits, stride, batch_size, vocab, dtype, status, tokens, num_samples, restore,
             threads, 0, 0, 0, 0, 0, 0, 0, kNoLogprobs);
}

// The next step of every sequence. Python hands over offsets that it owns.
void advance(const SizedRows& rows) {
  int64_t* offsets = const_cast<int64_t*>(rows.offsets.data);
  for (int64_t r = 0; r < rows.num_offsets; ++r) offsets[r] = (int64_t)((uint64_t)offsets[r] + 1);
}

py::tuple param_fields() {
#define FASTSAMPLE_NAME(type, name) #name,
  constexpr const char* kNames[] = {FASTSAMPLE_PARAM_FIELDS(FASTSAMPLE_NAME)};
#undef FASTSAMPLE_NAME
  py::tuple names(kFields);
  for (int64_t i = 0; i < kFields; ++i) names[(size_t)i] = kNames[i];
  return names;
}

}  // namespace
}  // namespace fastsample

// No state here that the GIL would guard: what threads share in csrc/cpu is atomic or locked.
PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  namespace fs = fastsample;
  m.doc() = "The CPU engine: see fastsample.backends.cpu, its only caller.";
  m.attr("PARAM_FIELDS") = fs::param_fields();
  py::class_<fs::SizedRows>(m, "Rows", py::module_local())
      .def(py::init(&fs::make_rows))
      .def("with_inputs", &fs::with_inputs, "A copy with bitmask, bias, prompt and output ids.");
  m.def("run", &fs::run, "Fill the output buffers; returns the number of invalid rows.");
  m.def("run_tokens", &fs::run_tokens, "The same where nothing but tokens is wanted.");
  m.def("advance", &fs::advance, "Add 1 to every offset.");
  m.def("isa", [] { return fs::kernel().isa; }, "Name of the instruction set in use.");
  m.def(
      "vector_bytes", [] { return fs::kernel().vector_bytes; }, "Vector width of the code in use.");
  m.def("isas", &fs::isas, "Instruction sets that this CPU can run, best first.");
  m.def("force_isa", &fs::force_isa,
        "Use this instruction set from now on; ValueError where it cannot run here.");
}
