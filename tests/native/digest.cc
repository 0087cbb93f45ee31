// Prints a digest of everything the CPU engine writes for rows made from a counter. The digest must
// be the same for every instruction set, also for one that this machine can only emulate: .ci/run
// compares NEON under qemu with x86.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "core/philox.h"
#include "cpu/dispatch.h"

using namespace fastsample;

namespace {

uint64_t random64(uint64_t& counter) {
  ++counter;
  return uniform60(99, counter, 0) << 4 ^ uniform60(98, counter, 1);
}

struct Digest {
  uint64_t value = 0xcbf29ce484222325;

  template <class T>
  void add(const std::vector<T>& data) {
    const unsigned char* bytes = (const unsigned char*)data.data();
    for (size_t i = 0; i < data.size() * sizeof(T); ++i)
      value = (value ^ bytes[i]) * 0x100000001b3;  // FNV-1a
  }
};

uint16_t bits_of(float x, DType dtype) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  if (dtype == kBFloat16) return (uint16_t)(b >> 16);
  // Normal numbers only, truncated: enough to make float16 rows.
  const int exponent = (int)(b >> 23 & 255) - 112;
  const uint16_t sign = (uint16_t)(b >> 16 & 0x8000);
  return exponent < 1 ? sign
                      : (uint16_t)(sign | (exponent > 30 ? 30 : exponent) << 10 | (b >> 13 & 1023));
}

RowParams params_of(uint64_t bits) {
  const auto pick = [&](std::initializer_list<float> choices) {
    const float v = choices.begin()[bits % choices.size()];
    bits /= choices.size();
    return v;
  };
  RowParams p = {};
  p.temperature = pick({0.0f, 0.7f, 1.0f, 3.0f, 1e-4f});
  p.top_k = (int32_t)pick({0, 0, 1, 7, 50, 3000});
  p.top_p = pick({1.0f, 1.0f, 0.9f, 0.3f, 0.999f});
  p.min_p = pick({0.0f, 0.0f, 0.05f, 1e-6f});
  p.repetition_penalty = pick({1.0f, 1.3f});
  p.frequency_penalty = pick({0.0f, 0.4f});
  p.presence_penalty = pick({0.0f, -0.2f});
  p.ties = (int32_t)pick({0, 1});
  p.order = (int32_t)pick({0, 1, 2, 3});
  return p;
}

// Every filter that is not as common, among others.
void add_filters(RowParams& p, uint64_t bits) {
  const auto pick = [&](std::initializer_list<float> choices) {
    const float v = choices.begin()[bits % choices.size()];
    bits /= choices.size();
    return v;
  };
  p.top_n_sigma = pick({0.0f, 0.0f, 0.0f, 1.0f, 2.5f});
  p.typical_p = pick({1.0f, 1.0f, 1.0f, 0.9f, 0.2f});
  p.epsilon_cutoff = pick({0.0f, 0.0f, 0.0f, 3e-4f, 0.02f});
  p.eta_cutoff = pick({0.0f, 0.0f, 0.0f, 2e-3f, 0.3f});
  p.top_a = pick({0.0f, 0.0f, 0.0f, 0.2f});
  p.p_less = (int32_t)pick({0, 0, 0, 1});
  p.xtc_probability = pick({0.0f, 0.0f, 0.5f, 1.0f});
  p.xtc_threshold = pick({0.1f, 0.01f, 1e-20f});
}

void digest_row(uint64_t& counter, DType dtype, int32_t vocab, Digest& digest) {
  std::vector<float> x(vocab);
  std::vector<uint16_t> narrow(vocab);
  const bool quantised = random64(counter) % 2, masked = random64(counter) % 2;
  for (int i = 0; i < vocab; ++i) {
    // A sum of uniforms: close to normal, and exact.
    const uint64_t r = random64(counter);
    x[i] =
        ((float)(r & 0xffff) + (float)(r >> 16 & 0xffff) + (float)(r >> 32 & 0xffff)) * 0x1p-13f -
        12.0f;
    if (quantised) x[i] = floorf(x[i] * 4) / 4;
    if (r >> 58 == 0) x[i] = -INFINITY;
    narrow[i] = bits_of(x[i], dtype);
  }
  RowParams params = params_of(random64(counter));
  add_filters(params, random64(counter));
  const int64_t seed = (int64_t)random64(counter), offset = (int64_t)random64(counter);
  std::vector<int32_t> mask((size_t)(vocab + 31) / 32);
  for (int32_t& word : mask) word = (int32_t)(random64(counter) | random64(counter));
  std::vector<int64_t> ids(60);
  for (int64_t& id : ids) id = (int64_t)(random64(counter) % (uint64_t)(vocab + 3)) - 1;
  const int32_t draws = random64(counter) % 4 ? 2 : 300;
  std::vector<int32_t> status(1);
  std::vector<int64_t> tokens(draws), ranks(draws), top_ids(3);
  std::vector<float> filtered(vocab), probabilities(vocab), logprobs(draws), top_logprobs(3);
  const Batch batch = {
      Logits{dtype == kFloat32 ? (const void*)x.data() : narrow.data(), vocab, 1, vocab, dtype,
             kLogits},
      Rows{{&params, 0},
           {&seed, 0},
           {&offset, 0},
           {masked ? mask.data() : nullptr, 0, (int64_t)mask.size()},
           {nullptr, nullptr, nullptr},
           {ids.data(), 0, 20},
           {ids.data() + 20, 0, 40},
           {nullptr, 0, 0}},
      Outputs{status.data(), tokens.data(), filtered.data(), probabilities.data(), logprobs.data(),
              ranks.data(), top_ids.data(), top_logprobs.data(), draws, 3, kProcessedLogprobs},
  };
  sample_batch(batch, 1);
  digest.add(status);
  digest.add(tokens);
  digest.add(filtered);
  digest.add(probabilities);
  digest.add(ranks);
  digest.add(top_ids);  // not the logarithms: two C libraries may round them differently
}

}  // namespace

int main() {
  fprintf(stderr, "%s\n", kernel().isa);
  uint64_t counter = 0;
  for (int32_t vocab : {1, 2, 17, 255, 256, 257, 1000, 4099, 32000}) {
    for (DType dtype : {kFloat32, kFloat16, kBFloat16}) {
      Digest digest;
      const int rows = vocab > 2000 ? 12 : 60;
      for (int r = 0; r < rows; ++r) digest_row(counter, dtype, vocab, digest);
      printf("V = %d dtype %d: %016llx\n", vocab, dtype, (unsigned long long)digest.value);
    }
  }
}
