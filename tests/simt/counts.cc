// How a warp's accesses to shared memory fall on its banks. engine.cc is compiled for
// ThreadSanitizer, which calls a function at every access; these are the functions, without its
// library.
//
// Lanes run one after another. The n-th time that each comes to an instruction, since the warp last
// met, is one access of the warp.
#include <algorithm>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace {

using namespace simt;

constexpr size_t kWord = 4, kBanks = 32;

// What one lane did: its `time`th access by an instruction since the warp last met.
struct Access {
  const void* instruction;
  int time, lane;
  size_t offset, bytes;
};

std::unordered_map<void*, std::vector<Access>> logs;  // by warp

// As many lanes as 32 banks serve at once make up a phase, which takes as long as its busiest bank.
template <class Iterator>
void count(Iterator begin, Iterator end) {
  const size_t words = std::max<size_t>(1, begin->bytes / kWord);
  const int lanes = (int)(32 / words);
  while (begin != end) {
    const int phase = begin->lane / lanes;
    std::set<size_t> seen;
    size_t in_bank[kBanks] = {};
    for (; begin != end && begin->lane / lanes == phase; ++begin) {
      for (size_t w = 0; w < words; ++w) {
        const size_t word = begin->offset / kWord + w;
        if (seen.insert(word).second) ++in_bank[word % kBanks];
      }
    }
    ++counters.phases;
    counters.wavefronts += (int64_t)*std::max_element(in_bank, in_bank + kBanks);
  }
}

void meet(void* warp) {
  std::vector<Access>& log = logs[warp];
  const auto sort_by = [&](auto key) {
    std::stable_sort(log.begin(), log.end(),
                     [&](const Access& a, const Access& b) { return key(a) < key(b); });
  };
  sort_by([](const Access& a) { return std::make_tuple(a.instruction, a.lane); });
  for (size_t i = 1; i < log.size(); ++i) {
    const bool again =
        log[i].instruction == log[i - 1].instruction && log[i].lane == log[i - 1].lane;
    log[i].time = again ? log[i - 1].time + 1 : 0;
  }
  const auto access = [](const Access& a) { return std::make_tuple(a.instruction, a.time); };
  sort_by([&](const Access& a) { return std::make_tuple(a.instruction, a.time, a.lane); });
  for (size_t i = 0, end; i < log.size(); i = end) {
    for (end = i; end < log.size() && access(log[end]) == access(log[i]);) ++end;
    count(log.begin() + (long)i, log.begin() + (long)end);
  }
  log.clear();
}

const bool installed = (warp_met = meet, true);

void note(void* instruction, const void* p, size_t bytes, bool reads) {
  if (!here) return;
  const Running r = running();
  const size_t offset = (size_t)((const char*)p - r.shared);
  if (offset >= r.shared_size) {
    counters.remote += is_shared(p);
    return;
  }
  if (reads && offset >= settings.held_begin && offset < settings.held_end) {
    counters.held_bytes += (int64_t)bytes;
  }
  logs[r.warp].push_back(Access{instruction, 0, r.lane, offset, bytes});
}

}  // namespace

#define SIMT_ACCESS(name, bytes, reads) \
  void __tsan_##name(void* p) { note(__builtin_return_address(0), p, bytes, reads); }
#define SIMT_ACCESSES(bytes)                        \
  SIMT_ACCESS(read##bytes, bytes, true)             \
  SIMT_ACCESS(write##bytes, bytes, false)           \
  SIMT_ACCESS(unaligned_read##bytes, bytes, true)   \
  SIMT_ACCESS(unaligned_write##bytes, bytes, false) \
  SIMT_ACCESS(volatile_read##bytes, bytes, true)    \
  SIMT_ACCESS(volatile_write##bytes, bytes, false)

extern "C" {
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { note(__builtin_return_address(0), p, bytes, true); }
void __tsan_write_range(void* p, size_t bytes) {
  note(__builtin_return_address(0), p, bytes, false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }  // guards of static variables
}
