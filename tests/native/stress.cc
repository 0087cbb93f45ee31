// What the sanitizers run: the fuzzer's check on its corpus and on random bytes, from several
// threads, and the pool under callers that get in each other's way.
//   stress INPUTS THREADS [FILE or FOLDER]...
#include <stdio.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "cpu/dispatch.h"
#include "inputs.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using namespace fastsample;

void random_inputs(uint32_t seed, int n) {
  fuzz::Noise noise{seed};
  for (int i = 0; i < n; ++i) {
    std::vector<uint8_t> bytes(noise.below(300));
    const uint32_t zeros = noise.below(4);  // where most things are left at their defaults
    for (uint8_t& byte : bytes) byte = noise.below(4) < zeros ? 0 : (uint8_t)noise.next();
    if (!bytes.empty()) bytes[0] = (uint8_t)noise.next();
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}

size_t replay(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(path)) {
    size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path)) count += replay(entry);
    return count;
  }
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  LLVMFuzzerTestOneInput((const uint8_t*)bytes.data(), bytes.size());
  return 1;
}

// Rows, or draws of a few rows, enough for several threads of the pool.
struct Load {
  static constexpr int kVocab = 8192;
  int rows, draws;
  std::vector<float> logits;
  std::vector<int64_t> seeds;
  RowParams params = {};

  Load(uint32_t seed, int rows, int draws)
      : rows(rows), draws(draws), logits(rows * kVocab), seeds(rows) {
    params.temperature = 0.9f;
    params.top_p = 0.95f;
    params.typical_p = params.repetition_penalty = 1;
    fuzz::Noise noise{seed};
    for (float& x : logits) x = 4 * noise.normal();
    for (int64_t& s : seeds) s = (int64_t)noise.next();
  }

  std::vector<int64_t> sample(int threads) const {
    static const int64_t kOffset = 0;
    std::vector<int64_t> tokens((size_t)rows * draws);
    std::vector<int32_t> status(rows);
    Batch batch = {};
    batch.logits = Logits{logits.data(), kVocab, rows, kVocab, kFloat32, kLogits};
    batch.rows.params = {&params, 0};
    batch.rows.seeds = {seeds.data(), 1};
    batch.rows.offsets = {&kOffset, 0};
    batch.out.status = status.data();
    batch.out.tokens = tokens.data();
    batch.out.num_samples = draws;
    sample_batch(batch, threads);
    return tokens;
  }
};

void share_the_pool(uint32_t seed) {
  for (const Load& load : {Load(seed, 48, 1), Load(seed, 2, 100000)}) {
    const std::vector<int64_t> want = load.sample(1);
    for (int round = 0; round < 12; ++round) {
      if (load.sample(1 + (int)(seed + (uint32_t)round) % 7) == want) continue;
      fprintf(stderr, "the pool changes tokens\n");
      abort();
    }
  }
}

template <class Work>
void on_threads(int threads, Work work) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) running.emplace_back([=] { work((uint32_t)t); });
  for (std::thread& thread : running) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int inputs = argc > 1 ? atoi(argv[1]) : 1000, threads = argc > 2 ? atoi(argv[2]) : 1;
  size_t replayed = 0;
  for (int i = 3; i < argc; ++i) replayed += replay(argv[i]);
  on_threads(threads, [=](uint32_t t) { random_inputs(1 + t, inputs / threads); });
  on_threads(threads, share_the_pool);
  printf("%d random inputs and %zu of the corpus on %d threads\n", inputs, replayed, threads);
}
