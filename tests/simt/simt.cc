#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

// Switching by ucontext takes system calls, which these few instructions do not. Under
// AddressSanitizer, which has to be told of each switch, it is ucontext, which it knows.
#if defined(__x86_64__) && !SIMT_ASAN
#define SIMT_ASM 1
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#define SIMT_ASM 0
#endif

namespace simt {

Settings settings;
Counters counters;
Place* here;
void (*warp_met)(void* warp);

namespace {

constexpr size_t kStack = SIMT_ASAN ? 512 << 10 : 64 << 10;

// Threads that wait for each other: a block, a cluster, or the lanes of a warp.
struct Meeting {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t given[2][32];  // used in turn, so that one exchange cannot overwrite another
};

struct Block {
  Meeting meeting;
  Meeting* cluster;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  size_t shared_size;
  Block* first_of_cluster;
  Index index;
};

struct Fiber {
  Place place;
  Block* block;
  Warp* warp;
  const uint64_t* waits_for = nullptr;  // runs again once this differs from `seen`
  uint64_t seen = 0;
  uint64_t cluster_seen = 0;  // when the thread arrived at its cluster's barrier
  bool arrived_at_cluster = false;
  bool paused = false, done = false;
  char* stack = nullptr;
  void* sp = nullptr;
  ucontext_t context;
  void* fake_stack = nullptr;
};

#if SIMT_ASM
void* scheduler_sp;
#else
ucontext_t scheduler;
#endif
#if SIMT_ASAN
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif
Fiber* current;
Body body;
const void* body_context;
const char* failure;
std::vector<char*> free_stacks;
std::vector<Block>* blocks_running;

void to_scheduler() {
  Fiber* self = current;
#if SIMT_ASM
  simt_switch(&self->sp, scheduler_sp);
#else
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, scheduler_stack,
                                 scheduler_stack_size);
#endif
  swapcontext(&self->context, &scheduler);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
#endif
}

void fiber_main() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body(body_context);
  current->done = true;
  to_scheduler();
}

void prepare(Fiber* fiber) {
#if SIMT_ASM
  void** top = (void**)(fiber->stack + kStack) - 1;  // aligned as after a call
  *top = nullptr;
  *--top = (void*)fiber_main;
  fiber->sp = top - 6;  // six registers, whose contents do not matter
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
#endif
}

void resume(Fiber* fiber) {
  current = fiber;
  here = &fiber->place;
  fiber->waits_for = nullptr;
  fiber->paused = false;
#if SIMT_ASM
  simt_switch(&scheduler_sp, fiber->sp);
#else
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, kStack);
#endif
  swapcontext(&scheduler, &fiber->context);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
#endif
}

// Returns whether the calling thread was the last to come.
bool wait(Meeting& meeting) {
  const uint64_t seen = meeting.generation;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
    return true;
  }
  current->waits_for = &meeting.generation;
  current->seen = seen;
  to_scheduler();
  return false;
}

void met(Block& block) {
  if (!warp_met) return;
  for (Warp& warp : block.warps) warp_met(&warp);
}

char* take_stack() {
  if (free_stacks.empty()) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    return (char*)p;
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

// Puts the fibers in the order in which they get their turns.
void arrange(std::vector<Fiber*>& fibers, std::mt19937_64& random) {
  switch (settings.order) {
    case kAscending:
      break;
    case kDescending:
      std::reverse(fibers.begin(), fibers.end());
      break;
    case kShuffled:
      std::shuffle(fibers.begin(), fibers.end(), random);
      break;
    default: {  // kWarpByWarp
      std::vector<size_t> warps(fibers.size() / 32);
      for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
      std::shuffle(warps.begin(), warps.end(), random);
      std::vector<Fiber*> arranged;
      for (size_t w : warps) {
        arranged.insert(arranged.end(), fibers.begin() + (long)(32 * w),
                        fibers.begin() + (long)(32 * (w + 1)));
      }
      fibers = arranged;
    }
  }
}

void schedule(std::vector<Fiber*> fibers) {
  while (!fibers.empty() && !failure) {
    bool progress = false, finished = false;
    const size_t group = settings.order == kWarpByWarp ? 32 : fibers.size();
    for (size_t begin = 0; begin < fibers.size(); begin += group) {
      bool moved = true;
      while (moved) {
        moved = false;
        for (size_t i = begin; i < std::min(begin + group, fibers.size()); ++i) {
          Fiber* fiber = fibers[i];
          if (fiber->done || (fiber->waits_for && *fiber->waits_for == fiber->seen)) continue;
          const bool was_paused = fiber->paused;
          resume(fiber);
          moved |= !was_paused && !fiber->paused;
          progress |= !was_paused || !fiber->paused;
          finished |= fiber->done;
        }
        if (settings.order != kWarpByWarp) break;
      }
    }
    if (!progress) failure = "deadlock: every thread waits";
    // All lanes of a warp end together, so warps stay whole.
    if (finished) {
      for (Fiber* fiber : fibers) {
        if (fiber->done) free_stacks.push_back(fiber->stack);
      }
      fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](Fiber* f) { return f->done; }),
                   fibers.end());
    }
  }
  for (Fiber* fiber : fibers) free_stacks.push_back(fiber->stack);
}

void run_together(int64_t first, int64_t blocks, int64_t grid, int threads, size_t shared,
                  int cluster, std::mt19937_64& random) {
  std::vector<Block> all((size_t)blocks);
  std::vector<Meeting> clusters((size_t)(blocks / cluster));
  std::vector<Fiber> fibers((size_t)(blocks * threads));
  std::vector<Fiber*> order;
  for (int64_t b = 0; b < blocks; ++b) {
    Block& block = all[(size_t)b];
    block.meeting.members = threads;
    block.cluster = &clusters[(size_t)(b / cluster)];
    block.cluster->members = threads * cluster;
    block.first_of_cluster = &all[(size_t)(b / cluster * cluster)];
    block.warps.resize((size_t)threads / 32);
    for (Warp& warp : block.warps) warp.meeting.members = 32;
    block.shared.reset(new char[shared]);
    block.shared_size = shared;
    memset(block.shared.get(), 0xA5, shared);  // nothing may rely on zeros
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[(size_t)(b * threads + t)];
      fiber.place = Place{{(uint32_t)t, 0, 0},
                          {(uint32_t)(first + b), 0, 0},
                          {(uint32_t)threads, 1, 1},
                          {(uint32_t)grid, 1, 1},
                          (int)(b % cluster)};
      fiber.block = &block;
      fiber.warp = &block.warps[(size_t)t / 32];
      fiber.stack = take_stack();
      prepare(&fiber);
      order.push_back(&fiber);
    }
  }
  arrange(order, random);
  blocks_running = &all;
  schedule(std::move(order));
  for (Block& block : all) met(block);
}

bool skipped(const char* file, int line) {
  if (!settings.skip_file || line != settings.skip_line) return false;
  const size_t n = strlen(file), m = strlen(settings.skip_file);
  return n >= m && !strcmp(file + n - m, settings.skip_file);
}

}  // namespace

void block_barrier(const char* file, int line) {
  if (skipped(file, line)) return;
  if (threadIdx.x == 0) ++counters.barriers;
  Block& block = *current->block;
  if (wait(block.meeting)) met(block);
}

void cluster_arrive() {
  Block* first = current->block->first_of_cluster;
  Meeting& cluster = *current->block->cluster;
  if (current->arrived_at_cluster) failure = "a thread arrives twice at its cluster's barrier";
  current->arrived_at_cluster = true;
  current->cluster_seen = cluster.generation;
  if (++cluster.arrived < cluster.members) return;
  cluster.arrived = 0;
  ++cluster.generation;
  ++counters.team_barriers;
  for (int i = 0; i < cluster.members / (int)blockDim.x; ++i) met(first[i]);
}

void cluster_wait() {
  if (!current->arrived_at_cluster) failure = "a thread waits where it has not arrived";
  current->arrived_at_cluster = false;
  current->waits_for = &current->block->cluster->generation;
  current->seen = current->cluster_seen;
  if (*current->waits_for == current->seen) to_scheduler();
}

void pause() {
  current->paused = true;
  to_scheduler();
}

char* shared_memory() { return current->block->shared.get(); }

char* shared_memory_of(int rank) { return current->block->first_of_cluster[rank].shared.get(); }

uint64_t exchange(uint64_t mine, int from) {
  Warp& warp = *current->warp;
  uint64_t* given = warp.given[warp.meeting.generation & 1];
  given[threadIdx.x & 31] = mine;
  ++counters.warp_operations;
  if (wait(warp.meeting) && warp_met) warp_met(&warp);
  return given[from];
}

uint32_t vote(bool mine) {
  Warp& warp = *current->warp;
  uint64_t* given = warp.given[warp.meeting.generation & 1];
  given[threadIdx.x & 31] = mine;
  ++counters.warp_operations;
  if (wait(warp.meeting) && warp_met) warp_met(&warp);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (uint32_t)given[i] << i;
  return bits;
}

void count_read(const void* p, size_t bytes) {
  const bool logits =
      (const char*)p >= settings.logits_begin && (const char*)p < settings.logits_end;
  (logits ? counters.logit_bytes : counters.other_bytes) += (int64_t)bytes;
}

bool is_shared(const void* p) {
  for (const Block& block : *blocks_running) {
    const char* begin = block.shared.get();
    if (p >= begin && p < begin + block.shared_size) return true;
  }
  return false;
}

void count_atomic(const void* p, size_t bytes) {
  ++counters.atomics;
  counters.wide_shared_atomics += bytes == 8 && is_shared(p);
  // The team's first block adds the most, which the others' cannot be told from: each counts its
  // part.
  static int64_t parts = 0;
  if (p < settings.semaphores || p >= settings.semaphores_end) return;
  if (++parts % settings.parts == 0) ++counters.team_barriers;
}

Running running() {
  Block& block = *current->block;
  return Running{current->warp, block.shared.get(), block.shared_size, simt_lane()};
}

const char* run(int64_t grid, int threads, size_t shared, int64_t together, int cluster, Body b,
                const void* context) {
  std::mt19937_64 random(settings.seed);
  ++counters.launches;
  failure = nullptr;
  body = b;
  body_context = context;
  for (int64_t first = 0; first < grid && !failure; first += together) {
    run_together(first, std::min(together, grid - first), grid, threads, shared, cluster, random);
  }
  here = nullptr;
  return failure;
}

}  // namespace simt
