// Picks the ISA once and runs the rows of a batch, with each thread's scratch.
#include "cpu/dispatch.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>

#include "core/process.h"
#include "cpu/platform.h"
#include "cpu/pool.h"
#include "cpu/verify.h"

namespace fastsample {
namespace {

// Kernels that this CPU can run, best first. Found once, as a virtual machine traps each cpuid.
const std::vector<const Kernel*>& supported() {
  static const std::vector<const Kernel*> kernels = platform::find_kernels();
  return kernels;
}

const Kernel& find_kernel(const std::string& name, const char* what) {
  std::string names;
  for (const Kernel* k : supported()) {
    if (name == k->isa) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->isa;
  }
  throw std::invalid_argument(std::string(what) + " = '" + name + "': this CPU can run " + names);
}

std::atomic<const Kernel*> chosen{nullptr};

// Scratch that grows to the largest batch seen and is then reused. It begins at a page boundary:
// where few values are copied, vectors are stored to the same place again and again, and a store
// across two pages takes many times as long.
template <class T>
struct Buffer {
  static constexpr std::align_val_t kPage{4096};
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, kPage); }
  };
  std::unique_ptr<T, Delete> data;
  size_t size = 0;

  T* at_least(size_t n) {
    if (n > size) {
      data.reset();
      size = 0;
      // Not initialised: pages that are never touched cost nothing.
      data.reset(static_cast<T*>(::operator new(n * sizeof(T), kPage)));
      size = n;
    }
    return data.get();
  }
};

struct Scratch {
  Buffer<float> block_max, values, spare, list_x;
  Buffer<uint64_t> group_mass, rest_mass;
  Buffer<int32_t> edit_start, segment, list_id, history, equal;
  Buffer<Edit> edits, repetitions;
  Buffer<float> powers;
  Buffer<uint32_t> breakers;
  struct {
    Buffer<uint64_t> ends;
    Buffer<int32_t> id, guide, rank;
    Buffer<float> logprob;
  } table[2];
  Buffer<uint32_t> keys[2];
  Buffer<uint8_t> taken;
  bool crowded = false;

  Workspace workspace(int32_t vocab, size_t biases, size_t ids, bool many_draws) {
    const size_t blocks = (size_t)(vocab + kBlock - 1) / kBlock;
    const size_t groups = (blocks + kGroup - 1) / kGroup;
    const size_t tokens = (size_t)vocab + kPad;
    Workspace ws = {};
    ws.block_max = block_max.at_least(blocks + kPad);
    ws.group_mass = group_mass.at_least(groups);
    ws.rest_mass = rest_mass.at_least(groups);
    ws.edit_start = edit_start.at_least(blocks + 1);
    ws.edits = edits.at_least(biases + 2 * ids);
    ws.repetitions = repetitions.at_least(ids + 1);
    ws.history = history.at_least(ids + kPad);
    ws.equal = equal.at_least(ids + kPad);
    ws.powers = powers.at_least(ids + 1);
    ws.segment = segment.at_least(groups + 1);
    ws.values = values.at_least(tokens);
    ws.spare = spare.at_least(tokens);
    ws.list_x = list_x.at_least(tokens);
    ws.list_id = list_id.at_least(tokens);
    ws.crowded = &crowded;
    if (!many_draws) return ws;
    for (int i = 0; i < 2; ++i) {
      ws.table[i].ends = table[i].ends.at_least(tokens);
      ws.table[i].id = table[i].id.at_least(tokens);
      ws.table[i].guide = table[i].guide.at_least(guide_size((int64_t)tokens));
      ws.table[i].rank = table[i].rank.at_least(tokens);
      ws.table[i].logprob = table[i].logprob.at_least(tokens);
    }
    for (int i = 0; i < 2; ++i) ws.keys[i] = keys[i].at_least(tokens);
    return ws;
  }
};

// A thread's scratch while it samples. A call within a call, as a signal handler may make it, gets
// scratch of its own.
class OwnScratch {
 public:
  OwnScratch() : outermost_(!in_use()) {
    if (outermost_) {
      in_use() = true;
    } else {
      own_.reset(new Scratch);
    }
  }
  ~OwnScratch() {
    if (outermost_) in_use() = false;
  }
  OwnScratch(const OwnScratch&) = delete;

  bool outermost() const { return outermost_; }
  Scratch& get() {
    thread_local Scratch kept;
    return outermost_ ? kept : *own_;
  }

 private:
  static bool& in_use() {
    thread_local bool in_use = false;
    return in_use;
  }

  const bool outermost_;
  std::unique_ptr<Scratch> own_;
};

Workspace workspace_for(const Batch& batch, Scratch& scratch) {
  size_t biases = 0;
  if (const int64_t* ptr = batch.rows.bias.row_ptr) {
    int64_t most = 0;
    for (int64_t r = 0; r < batch.logits.rows; ++r) most = std::max(most, ptr[r + 1] - ptr[r]);
    biases = (size_t)most;
  }
  const bool many_draws = batch.out.tokens && batch.out.num_samples >= kManyDraws;
  Workspace ws =
      scratch.workspace(batch.logits.vocab, biases, (size_t)ids_of_a_row(batch.rows), many_draws);
  ws.breakers = scratch.breakers.at_least((size_t)num_ids(batch) / 32 + 1);
  return ws;
}

const void* row_address(const Logits& l, int64_t row) {
  return (const char*)l.data + row * l.stride * (l.dtype == kFloat32 ? 4 : 2);
}

// Takes a unit of work; true for one thread only.
bool claim(uint8_t* taken) {
  return !__atomic_load_n(taken, __ATOMIC_RELAXED) &&
         !__atomic_exchange_n(taken, (uint8_t)1, __ATOMIC_RELAXED);
}

// What a thread takes at a time: a row, or a part of its draws where they are many. Each part is
// sampled like a row of its own, since filters take little time beside that many draws.
struct Units {
  const Batch& batch;
  int32_t parts;  // of each row

  Units(const Batch& b, int threads) : batch(b), parts(1) {
    // The draws of a part take tens of milliseconds at most, and nearly all of its time.
    constexpr int64_t kMost = 1 << 20, kLeast = 1 << 15;
    const int64_t rows = b.logits.rows, draws = b.out.tokens ? b.out.num_samples : 0;
    if (rows == 0 || draws <= kLeast) return;
    const int64_t sharing = (threads + rows - 1) / rows;
    const int64_t useful = draws / std::max<int64_t>(kLeast, b.logits.vocab);
    parts = (int32_t)std::max({(draws + kMost - 1) / kMost, std::min(sharing, useful), (int64_t)1});
  }
  int64_t count() const { return batch.logits.rows * parts; }
  int64_t row(int64_t unit) const { return unit / parts; }
  Draws draws(int64_t unit) const {
    const int64_t part = unit % parts, n = batch.out.num_samples;
    return Draws{(int32_t)(n * part / parts), (int32_t)(n * (part + 1) / parts)};
  }
  // How many threads have enough to do: to wake one for less work than this costs more than it
  // saves.
  int useful_threads(int threads) const {
    constexpr int64_t kLogitsPerThread = 1 << 16, kLogitsPerDraw = 64;
    const int64_t draws = batch.out.num_samples >= kManyDraws ? batch.out.num_samples : 0;
    const int64_t row_work = batch.logits.vocab + draws * kLogitsPerDraw;
    const int64_t useful = batch.logits.rows * row_work / kLogitsPerThread + 1;
    return (int)std::min({(int64_t)threads, count(), useful});
  }
};

// One call's work, shared by its threads.
struct Work {
  const Units& units;
  const Kernel& kernel;
  int threads;
  uint8_t* taken;  // [units]
  const std::function<bool()>& stop;
  std::atomic<bool> stopped{false};
  std::atomic<int64_t> invalid{0};
};

// Samples units until none is left. Each thread first takes every `threads`-th one: the same ones
// in every batch, whose rows its core may still have in its cache. Then it takes what the others
// have left, so that expensive rows do not wait for each other.
void run_units(Work& work, int thread, Scratch& scratch) {
  // Logits, ids and draws before `stop` is asked: tens of microseconds at least.
  constexpr int64_t kBeforeAsking = 1 << 20;
  const platform::FloatEnvironment environment;
  const Units& units = work.units;
  const Batch& batch = units.batch;
  const int64_t count = units.count();
  const int64_t length = batch.logits.vocab + ids_of_a_row(batch.rows);
  const bool verifies = batch.drafts.num_accepted;
  Workspace workspace = workspace_for(batch, scratch);
  int64_t invalid = 0, done = 0;
  for (int i = 0; i < work.threads; ++i) {
    for (int64_t u = (thread + i) % work.threads; u < count; u += work.threads) {
      if (work.stopped.load(std::memory_order_relaxed)) return;
      if (!claim(work.taken + u)) continue;
      const int64_t next = u + work.threads, r = units.row(u);
      if (verifies && is_past(batch.drafts, r)) continue;
      const Draws draws = units.draws(u);
      workspace.ahead = next < count ? row_address(batch.logits, units.row(next)) : nullptr;
      const Status status = work.kernel.sample_row(batch, r, draws, workspace);
      if (draws.begin == 0) {
        batch.out.status[r] = status;
        invalid += status != kValid;
      }
      if (verifies) compare(batch.drafts, r, batch.out.tokens[r]);
      done += length + (draws.end - draws.begin);
      if (thread == 0 && work.stop && done >= kBeforeAsking) {
        done = 0;
        if (work.stop()) work.stopped = true;
      }
    }
  }
  work.invalid += invalid;
}

}  // namespace

const Kernel& kernel() {
  const Kernel* k = chosen.load(std::memory_order_acquire);
  if (!k) {
    const char* name = getenv("FASTSAMPLE_ISA");
    k = name && *name ? &find_kernel(name, "FASTSAMPLE_ISA") : supported().front();
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernel* k : supported()) names.push_back(k->isa);
  return names;
}

void force_isa(const std::string& name) {
  chosen.store(&find_kernel(name, "isa"), std::memory_order_release);
}

int64_t sample_batch(const Batch& batch, int threads, const std::function<bool()>& stop) {
  OwnScratch own;
  if (!own.outermost()) threads = 1;  // the pool is this thread's already
  const Units units(batch, threads);
  uint8_t* taken = own.get().taken.at_least((size_t)units.count());
  std::fill_n(taken, units.count(), (uint8_t)0);
  Work work = {units, kernel(), units.useful_threads(threads), taken, stop};
  run_on_threads(work.threads, [&](int thread) {
    if (thread == 0) return run_units(work, 0, own.get());
    OwnScratch helpers;
    run_units(work, thread, helpers.get());
  });
  return work.invalid;
}

int64_t end_kept(const int32_t* counts, int64_t rows, int64_t capacity, int64_t* row_ptr) {
  int64_t total = row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (!capacity || counts[r] <= capacity) total += counts[r];
    row_ptr[r + 1] = total;
  }
  return total;
}

void list_kept(const KeptSets& sets, const int64_t* row_ptr, int32_t* ids, int64_t room,
               int threads) {
  constexpr int64_t kIdsPerThread = 1 << 16;
  const int64_t total = row_ptr[sets.rows];
  const int useful = (int)std::min<int64_t>(threads, total / kIdsPerThread + 1);
  std::atomic<int64_t> next{0};
  run_on_threads(useful, [&](int) {
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < sets.rows;) {
      const int64_t begin = row_ptr[r], n = row_ptr[r + 1] - begin;
      if (n == 0) continue;
      if (n <= sets.num_slots) {
        std::copy_n(sets.slots + r * sets.num_slots, n, ids + begin);
      } else {
        kernel().list_bits(sets.bitmask + r * sets.words, sets.words, ids + begin, n);
      }
    }
  });
  std::fill(ids + total, ids + room, -1);
}

void answer_part(const Part& part, int threads) {
  constexpr int64_t kLogitsPerThread = 1 << 16;
  const Logits& l = part.logits;
  OwnScratch own;
  if (!own.outermost()) threads = 1;
  const int64_t useful = std::min(l.rows, l.rows * l.vocab / kLogitsPerThread + 1);
  std::atomic<int64_t> next{0};
  const auto work = [&](Scratch& scratch) {
    const platform::FloatEnvironment environment;
    const Workspace workspace = scratch.workspace(l.vocab, 0, 0, false);
    for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < l.rows;) {
      kernel().answer(part, r, workspace);
    }
  };
  run_on_threads((int)std::min<int64_t>(threads, useful), [&](int thread) {
    if (thread == 0) return work(own.get());
    OwnScratch helpers;
    work(helpers.get());
  });
}

void answer_rows(const LogitsArguments& l, const PartArguments& ask,
                 const std::vector<int64_t>& rows, int threads) {
  const int64_t size = l.dtype == kFloat32 ? 4 : 2, word = sizeof(int64_t);
  const auto n = (int64_t)rows.size();
  for (int64_t k = 0, next; k < n; k = next) {  // rows one behind the other
    for (next = k + 1; next < n && rows[(size_t)next] == rows[(size_t)next - 1] + 1;) ++next;
    const char* first = (const char*)l.logits + rows[(size_t)k] * l.logits_stride * size;
    Part part = {{first, l.logits_stride, next - k, (int32_t)l.vocab, (DType)l.dtype}, ask};
    part.ask.queries += k * (int64_t)sizeof(PartQuery);
    part.ask.details += k * ask.count * word;
    part.ask.answers += k * ask.words * word;
    answer_part(part, threads);
  }
}

int64_t verify_batch(const Batch& batch, int threads, const std::function<bool()>& stop) {
  const Drafts& drafts = batch.drafts;
  const int64_t requests = batch.logits.rows / (drafts.count + 1);
  std::fill_n(drafts.num_accepted, requests, (int32_t)drafts.count);
  sample_batch(batch, threads, stop);
  return pad(drafts, requests, batch.out, batch.logits.vocab);
}

}  // namespace fastsample
