// fastsample._cpu: records in, exceptions out, the GIL released. Python has validated everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/unlocked.h"
#include "cpu/dispatch.h"
#include "cpu/exchange.h"
#include "cpu/search.h"
#include "cpu/split.h"

namespace py = pybind11;

namespace fastsample {
namespace {

// A copy of what a step's buffers hold, to restore them after an error. Buffers of [B, V] are left
// out: a call that fills those never restores.
class Saved {
 public:
  explicit Saved(const Batch& batch)
      : out_(batch.out), rows_(batch.logits.rows), words_((batch.logits.vocab + 31) / 32) {
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
  // One allocation per thread that serves every call.
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
    each(out_.kept_count, 1);
    if (!out_.kept_slots) each(out_.kept_bitmask, words_);  // scratch where ids are listed
    each(out_.log_kept_mass, 1);
    each(out_.entropy, 1);
  }

  const Outputs& out_;
  int64_t rows_, words_;
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

// A call without the GIL that signals may end.
class Interruptible : public Unlocked {
 public:
  // Runs Python's signal handlers when that is due. True once a handler has raised; the exception
  // is then set in this thread's state. Only the main thread asks, and that is the one that
  // finalises.
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
  std::chrono::steady_clock::time_point next_;
  bool raised_ = false;
};

// work(stop) without the GIL; what it throws, or a signal handler raises, is thrown.
template <class Work>
int64_t without_gil(const Batch& batch, bool restore, Work work) {
  int64_t invalid = 0;
  std::exception_ptr error;
  std::optional<Saved> saved;
  if (restore) saved.emplace(batch);
  Interruptible unlocked;
  unlocked.begin();
  try {
    invalid = work([&] { return unlocked.interrupted(); });
  } catch (...) {
    error = std::current_exception();
  }
  if (saved && (error || invalid || unlocked.raised())) saved->put_back();
  unlocked.end();
  if (error) std::rethrow_exception(error);
  if (unlocked.raised()) throw py::error_already_set();
  return invalid;
}

Batch checked(const RowArguments& rows, const CallArguments& call,
              const DraftArguments* drafts = nullptr) {
  // A tensor made while torch pretends (a fake one) has no address.
  if (call.logits.rows &&
      (!call.logits.logits || !call.out.status || !rows.params || !rows.seeds || !rows.offsets)) {
    throw std::invalid_argument("logits, params or outputs: a tensor without memory");
  }
  return batch_of(rows, call, drafts);
}

int64_t run(const RowArguments& rows, const CallArguments& call, int threads, bool restore) {
  const Batch batch = checked(rows, call);
  return without_gil(batch, restore,
                     [&](const auto& stop) { return sample_batch(batch, threads, stop); });
}

// Memory for sets that are to be listed: one per thread, which serves every call. It is not
// initialised: pages that are never touched cost nothing.
class Lent {
 public:
  Lent(Outputs& out, int64_t rows, int64_t words) {
    constexpr int64_t kSlots = 1024;  // more ids of a row are told by its bits
    words_.swap(spare());
    const size_t slots = (size_t)(rows * kSlots), needed = slots + (size_t)(rows * words);
    if (needed > words_.size) words_ = {std::unique_ptr<int32_t[]>(new int32_t[needed]), needed};
    out.kept_slots = words_.data.get();
    out.num_slots = (int32_t)kSlots;
    out.kept_bitmask = out.kept_slots + slots;
  }
  ~Lent() {
    constexpr size_t kWorthKeeping = 1 << 20;
    if (words_.size <= kWorthKeeping) words_.swap(spare());
  }
  Lent(const Lent&) = delete;

 private:
  struct Words {
    std::unique_ptr<int32_t[]> data;
    size_t size = 0;
    void swap(Words& other) {
      std::swap(data, other.data);
      std::swap(size, other.size);
    }
  };
  static Words& spare() {
    thread_local Words words;
    return words;
  }
  Words words_;
};

// Lists what a run has kept behind a report's other outputs.
void list_report(const Batch& batch, const ReportArguments& report, py::bytearray& memory,
                 int threads) {
  const Outputs& out = batch.out;
  const int64_t rows = batch.logits.rows, words = (batch.logits.vocab + 31) / 32;
  auto* row_ptr = (int64_t*)(PyByteArray_AS_STRING(memory.ptr()) + report.kept_row_ptr);
  const int64_t total = end_kept(out.kept_count, rows, 0, row_ptr);
  if (PyByteArray_Resize(memory.ptr(), report.bytes + total * (int64_t)sizeof(int32_t))) {
    throw py::error_already_set();
  }
  char* const at = PyByteArray_AS_STRING(memory.ptr());
  const KeptSets sets = {rows, words, out.num_slots, out.kept_slots, out.kept_bitmask};
  const WithoutGil unlocked;
  list_kept(sets, (const int64_t*)(at + report.kept_row_ptr), (int32_t*)(at + report.bytes), total,
            threads);
}

// A run whose outputs lie in memory that it makes: that, and the number of invalid rows.
py::tuple report(const RowArguments& rows, const CallArguments& call, const ReportArguments& report,
                 int threads, bool restore) {
  Batch batch = checked(rows, call);
  Outputs& out = batch.out;
  auto memory = py::reinterpret_steal<py::bytearray>(
      PyByteArray_FromStringAndSize(nullptr, (Py_ssize_t)report.bytes));
  if (!memory) throw py::error_already_set();
  char* const at = PyByteArray_AS_STRING(memory.ptr());
  const auto place = [&](auto*& output, int64_t offset) {
    if (offset >= 0) output = (std::decay_t<decltype(output)>)(at + offset);
  };
  std::optional<Lent> lent;
  if (report.kept_row_ptr >= 0)
    lent.emplace(out, batch.logits.rows, (batch.logits.vocab + 31) / 32);
  place(out.kept_count, report.kept_count);
  place(out.kept_bitmask, report.kept_bitmask);
  place(out.log_kept_mass, report.log_kept_mass);
  place(out.entropy, report.entropy);
  const int64_t invalid = without_gil(
      batch, restore, [&](const auto& stop) { return sample_batch(batch, threads, stop); });
  if (lent) list_report(batch, report, memory, threads);
  return py::make_tuple(invalid, std::move(memory));
}

int64_t verify(const RowArguments& rows, const CallArguments& call, const DraftArguments& drafts,
               int threads) {
  const Batch batch = checked(rows, call, &drafts);
  return without_gil(batch, false,
                     [&](const auto& stop) { return verify_batch(batch, threads, stop); });
}

// f() with its stop signal: nothing that it does is undone.
template <class F>
void without_gil(F f) {
  without_gil(Batch{}, false, [&](const auto&) -> int64_t {
    f();
    return 0;
  });
}

void answer(const LogitsArguments& l, const PartArguments& ask, int threads) {
  const Logits logits = {(const void*)l.logits, l.logits_stride, l.rows,
                         (int32_t)l.vocab,      (DType)l.dtype,  (InputKind)l.input};
  without_gil([&] { answer_part({logits, ask}, threads); });
}

void search_rows(const PartArguments& ask, int64_t rows) {
  const WithoutGil unlocked;
  search(ask, rows);
}

// gather(own, words, found) takes addresses, and raises where ranks fail. answer(logits, ask, rows,
// count) answers for this rank, given the part's address, a record, and the address of so many
// rows; None: this engine does.
py::tuple sample_split_rows(const SplitArguments& split, const RowArguments& rows,
                            const CallArguments& call, int threads, const py::function& gather,
                            const py::object& answer) {
  const auto answer_here = [&](const LogitsArguments& part, const PartArguments& ask,
                               const Words& some) {
    without_gil([&] { answer_rows(part, ask, some, threads); });
  };
  const auto answer_there = [&](const LogitsArguments& part, const PartArguments& ask,
                                const Words& some) {
    const py::bytes record((const char*)&ask, sizeof ask);
    answer(part.logits, record, (int64_t)some.data(), some.size());
  };
  std::function<void(const LogitsArguments&, const PartArguments&, const Words&)> asked =
      answer_here;
  if (!answer.is_none()) asked = answer_there;
  const SplitHost host = {asked,
                          [&](const Batch& batch) {
                            return without_gil(batch, false, [&](const auto& stop) {
                              return sample_batch(batch, threads, stop);
                            });
                          },
                          [&](const int64_t* own, int64_t words, int64_t* found) {
                            gather((int64_t)own, words, (int64_t)found);
                          }};
  const SplitResult result = sample_split(split, rows, call, host);
  return py::make_tuple(result.invalid, result.knows_sums, result.tells_raw);
}

// Returns what has happened, the rank that is to blame, and the round.
std::tuple<int, int, int64_t> exchange_at(int64_t memory, int64_t room, int rank, int size,
                                          int64_t round, int64_t own, int64_t bytes, int64_t found,
                                          double seconds, const std::vector<int>& processes) {
  ExchangeResult result = {};
  without_gil(Batch{}, false, [&](const auto& stop) -> int64_t {
    result = exchange({(char*)memory, room, rank, size}, &round, (const char*)own, bytes,
                      (char*)found, seconds, processes, stop);
    return 0;
  });
  return {result.what, result.rank, round};
}

// The next step of every sequence, in offsets that Python owns.
void advance(const RowArguments& rows) {
  int64_t* offsets = (int64_t*)rows.offsets;
  for (int64_t r = 0; r < rows.num_offsets; ++r) offsets[r] = (int64_t)((uint64_t)offsets[r] + 1);
}

int64_t end_kept_at(int64_t counts, int64_t rows, int64_t capacity, int64_t row_ptr) {
  return end_kept((const int32_t*)counts, rows, capacity, (int64_t*)row_ptr);
}

void list_kept_at(int64_t bitmask, int64_t rows, int64_t words, int64_t row_ptr, int64_t ids,
                  int64_t room, int threads) {
  const KeptSets sets = {rows, words, 0, nullptr, (const int32_t*)bitmask};
  const WithoutGil unlocked;
  list_kept(sets, (const int64_t*)row_ptr, (int32_t*)ids, room, threads);
}

}  // namespace
}  // namespace fastsample

// No state here needs the GIL: what threads share in csrc/cpu is atomic or locked.
PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  namespace fs = fastsample;
  m.doc() = "The CPU engine: see fastsample.backends.cpu, its only caller.";
  fs::add_fields(m);
  m.def("run", &fs::run, "Fill the output buffers; returns the number of invalid rows.");
  m.def("report", &fs::report, "The same, with outputs in memory of their own; returns that, too.");
  m.def("verify", &fs::verify,
        "Sample the rows of drafts as far as these are right; returns the number of invalid ones.");
  m.def("end_kept", &fs::end_kept_at, "Where each row's ids end; returns how many there are.");
  m.def("list_kept", &fs::list_kept_at, "List the ids of each row's set.");
  m.def("answer", &fs::answer, "Answer what is asked of a part of rows.");
  m.def("sample_split", &fs::sample_split_rows,
        "Fill outputs of rows whose lists all ranks know; returns the number of invalid rows, and "
        "whether sums and raw log-probabilities of them are known.");
  m.def("search", &fs::search_rows, "Answer what all ranks' answers tell of rows.");
  m.def("exchange", &fs::exchange_at, "Exchange messages with the other ranks of this machine.");
  m.def("exchange_bytes", &fs::SharedPlaces::bytes_of, "How much memory that takes.");
  m.def("advance", &fs::advance, "Add 1 to every offset.");
  m.def("isa", [] { return fs::kernel().isa; }, "Name of the instruction set in use.");
  m.def(
      "vector_bytes", [] { return fs::kernel().vector_bytes; }, "Vector width of the code in use.");
  m.def("isas", &fs::isas, "Instruction sets that this CPU can run, best first.");
  m.def("force_isa", &fs::force_isa,
        "Use this instruction set from now on; ValueError where it cannot run here.");
}
