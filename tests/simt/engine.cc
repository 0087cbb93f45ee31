// csrc/cuda as a library for ctypes: the same plans, layouts and launches, on fibers.
#include <algorithm>
#include <iterator>
#include <tuple>
#include <vector>

#include "core/arguments.h"
#include "cuda/launch.cuh"
#include "cuda/list.cuh"

namespace {

using namespace fastsample;

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
  static void run(const void* call) {
    std::apply(((const Call*)call)->kernel, ((const Call*)call)->arguments);
  }
};

const char* failure;

struct Launch {
  template <class... Parameters, class... Arguments>
  int operator()(void (*kernel)(Parameters...), const Plan& plan,
                 const Arguments&... arguments) const {
    const Call<std::decay_t<Parameters>...> call = {kernel, {arguments...}};
    const int64_t blocks = (int64_t)plan.teams * plan.parts;
    const int cluster = plan.policy == kClusterPolicy ? plan.parts : 1;
    const int64_t together = plan.policy == kGridPolicy ? blocks : cluster;
    simt::settings.parts = plan.parts;
    failure =
        simt::run(blocks, plan.threads, (size_t)plan.shared, together, cluster, call.run, &call);
    return failure ? 1 : 0;
  }
};

template <class T>
void run(const Batch& batch, const Layout& layout, const Workspace& ws) {
  if (launch_sample<T>(batch, layout.sample, ws, Launch())) return;
  if (wants_kept(batch.out) && launch_keep<T>(batch, layout.outputs, ws, Launch())) return;
  if (batch.out.weights && launch_law<T>(batch, layout.outputs, ws, Launch())) return;
  if (wants_outputs(batch.out)) launch_outputs<T>(batch, layout.outputs, ws, Launch());
}

struct PlanArguments {
  int64_t arch, multiprocessors, shared_block, shared_sm, largest_cluster;
  int64_t resident;  // teams at once, as the driver would say; -1: as tuning.h estimates
  int64_t policy;    // -1: what tuning.h says
  int64_t parts, threads, teams;
};

Plan planned(const Device& device, const Shape& shape, int64_t resident) {
  return plan(device, shape, [&](const Plan& candidate) {
    // What the driver says of clusters alone: a grid without clusters is not cut up.
    const bool told = resident >= 0 && candidate.policy == kClusterPolicy;
    return told ? resident : resident_teams(device, candidate);
  });
}

Plan plan_of(const Device& device, const Batch& batch, const PlanArguments& a) {
  if (a.policy < 0) return planned(device, shape_of(batch), a.resident);
  Plan p =
      make_plan(device, shape_of(batch), (Policy)a.policy, (int32_t)a.parts, (int32_t)a.threads);
  p.teams = at_most(a.teams, batch.logits.rows);
  return p;
}

}  // namespace

extern "C" {

// Name and fields of a record that simt_run takes, or null after the last.
const char* const* simt_record(int index) {
  return index < (int)std::size(kRecords) ? kRecords[index] : nullptr;
}

// Returns null or what went wrong. `chosen` gets policy, parts, threads, teams and shared memory.
const char* simt_run(const RowArguments* rows, const CallArguments* call,
                     const DraftArguments* drafts, int64_t advance,
                     const PlanArguments* plan_arguments, int64_t* chosen) {
  const Batch batch = batch_of(*rows, *call, drafts);
  const PlanArguments& a = *plan_arguments;
  const Device device = {(int32_t)a.arch,      (int32_t)a.multiprocessors, (int32_t)a.shared_block,
                         (int32_t)a.shared_sm, (int32_t)a.largest_cluster, 0};
  const Plan plan = plan_of(device, batch, a);
  Layout layout = layout_for(device, batch, rows->bias_entries, plan);
  if (layout.outputs.teams && a.policy >= 0) {
    layout.outputs.threads = plan.threads;
    const Plan own = make_plan(device, shape_of(batch), kBlockPolicy, 1, plan.threads);
    if (!layout.outputs.far_bitmap) layout.outputs.shared = own.shared;
    layout.outputs.teams = at_most(a.teams, batch.logits.rows);
  }
  Workspace ws;
  // Exactly as much as is needed, so that AddressSanitizer sees what lies past it; never zeros.
  layout.workspace = lay_out(batch, layout, nullptr, nullptr, ws);
  std::vector<char> workspace((size_t)layout.workspace, (char)0xA5);
  // The boards are what the launch before has left, as far as it had any, and zeros from there on.
  static std::vector<char> left;
  std::vector<char> boards((size_t)layout.boards, 0);
  std::copy_n(left.begin(), std::min(boards.size(), left.size()), boards.begin());
  lay_out(batch, layout, workspace.data(), boards.data(), ws);
  if (advance) ws.offsets = (int64_t*)rows->offsets;
  const int64_t out[] = {plan.policy,   plan.parts,           plan.threads,
                         plan.teams,    plan.shared,          layout.workspace,
                         layout.boards, layout.outputs.teams, layout.outputs.far_bitmap};
  for (size_t i = 0; i < sizeof out / sizeof *out; ++i) chosen[i] = out[i];
  const Logits& l = batch.logits;
  const int64_t itemsize = l.dtype == kFloat32 ? 4 : 2;
  simt::settings.logits_begin = (const char*)l.data;
  simt::settings.logits_end = (const char*)l.data + ((l.rows - 1) * l.stride + l.vocab) * itemsize;
  const int64_t vectors = vectors_per_block(shape_of(batch), plan.parts, plan.threads);
  simt::settings.held_begin = sizeof(Shared);
  simt::settings.held_end = sizeof(Shared) + (plan.policy == kClusterPolicy ? 16 * vectors : 0);
  simt::settings.semaphores = (const char*)ws.semaphores;
  simt::settings.semaphores_end = simt::settings.semaphores + (ws.semaphores ? kSemaphoreBytes : 0);
  simt::counters = {};
  failure = nullptr;
  if (l.rows == 0) return nullptr;
  switch (l.dtype) {
    case kFloat16:
      run<Half>(batch, layout, ws);
      break;
    case kBFloat16:
      run<BFloat>(batch, layout, ws);
      break;
    default:
      run<float>(batch, layout, ws);
  }
  // Bins and totals are left zero for the next launch.
  const Board* board = ws.boards;
  for (int32_t i = 0; ws.boards && i < plan.teams && !failure; ++i) {
    bool clean = board[i].total == 0;
    for (u64 bin : board[i].bins) clean &= bin == 0;
    if (!clean) failure = "a board is not zero after the launch";
  }
  const Drafts& d = batch.drafts;
  for (int64_t i = 0; d.num_accepted && i < l.rows / (d.count + 1) && !failure; ++i) {
    if (d.arrivals[i]) failure = "a request's arrivals are not zero after the launch";
  }
  if (boards.size() > left.size()) left.resize(boards.size());
  std::copy(boards.begin(), boards.end(), left.begin());
  if (failure) left.clear();
  return failure;
}

// Returns null or what went wrong.
const char* simt_list(const int32_t* bitmask, int64_t rows, int64_t words, const int64_t* row_ptr,
                      int32_t* ids, int64_t size, int64_t threads) {
  const Lists lists = {bitmask, rows, (int32_t)words, row_ptr, ids, size};
  Launch()(list_kernel, Plan{kBlockPolicy, 1, (int32_t)threads, (int32_t)rows, kListShared, false},
           lists);
  return failure;
}

// The plan for a device that need not be there, whose fields `d` has, and after them `resident`:
// policy, parts, threads, teams, shared memory. And what a grid that does not fit becomes, again
// and again: `shrinks` times.
void simt_plan(const int64_t* d, int64_t rows, int64_t vocab, int64_t itemsize, int64_t edits,
               int64_t shrinks, int64_t* chosen) {
  const Device device = {(int32_t)d[0], (int32_t)d[1], (int32_t)d[2],
                         (int32_t)d[3], (int32_t)d[4], (int32_t)d[5]};
  const Shape shape = {rows, (int32_t)vocab, (int32_t)itemsize, edits != 0};
  Plan p = planned(device, shape, d[6]);
  while (shrinks-- > 0) {
    if (!shrink(device, shape, p)) p = Plan{};
  }
  const int64_t out[] = {p.policy, p.parts, p.threads, p.teams, p.shared};
  memcpy(chosen, out, sizeof out);
}

void simt_settings(int order, uint64_t seed, const char* skip_file, int skip_line) {
  simt::settings.order = order;
  simt::settings.seed = seed;
  simt::settings.skip_file = skip_file;
  simt::settings.skip_line = skip_line;
}

void simt_counters(int64_t* to) { memcpy(to, &simt::counters, sizeof simt::counters); }
}
