// The bytes of a fuzzer as the arguments of a call, in buffers without a spare byte, so that
// AddressSanitizer sees every access beyond them.
#pragma once

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <set>
#include <vector>

#include "core/arguments.h"

namespace fuzz {

using namespace fastsample;

// Zeros follow the last byte.
struct Bytes {
  const uint8_t* data;
  size_t size;
  size_t at = 0;

  uint8_t byte() { return at < size ? data[at++] : 0; }
  template <class T>
  T take() {
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= (T)((T)byte() << (8 * i));
    return value;
  }
  uint32_t below(uint32_t n) { return (n <= 256 ? byte() : take<uint16_t>()) % n; }
  bool flag() { return byte() & 1; }
};

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Any bits at all, or one of the values at which something changes.
inline float any_float(Bytes& in) {
  static const float kSpecial[] = {0.0f,
                                   -0.0f,
                                   1.0f,
                                   -1.0f,
                                   0.5f,
                                   -0.5f,
                                   2.0f,
                                   20.0f,
                                   -20.0f,
                                   -28.42f,
                                   -41.6f,
                                   -60.0f,
                                   1e-5f,
                                   9.99e-6f,
                                   0x1p-149f,
                                   -0x1p-149f,
                                   0x1p-126f,
                                   FLT_MAX,
                                   -FLT_MAX,
                                   3e38f,
                                   -3e38f,
                                   -INFINITY,
                                   -INFINITY,
                                   INFINITY,
                                   NAN,
                                   float_of(0x7f800001),
                                   float_of(0xffc12345),
                                   0x1.fffffep-1f,
                                   0.9f,
                                   0.05f,
                                   0x1p20f,
                                   1e-12f};
  const uint8_t choice = in.byte();
  return choice < 128 ? kSpecial[choice % 32] : float_of(in.take<uint32_t>());
}

// Any float32 of the range: Python refuses the others before they come here.
inline float in_range(Bytes& in, float low, float high, float otherwise, bool open_low = false) {
  const float x = any_float(in);
  return x <= high && (open_low ? x > low : x >= low) ? x : otherwise;
}

// splitmix64: a few bytes stand for many values.
struct Noise {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t n) { return (uint32_t)((next() >> 32) * n >> 32); }
  float normal() {  // close to it
    const uint64_t r = next();
    const float sum = (float)(r & 0xffff) + (float)(r >> 16 & 0xffff) + (float)(r >> 32 & 0xffff);
    return sum * 0x1p-15f - 3;
  }
};

// Truncates; numbers too large for float16 become infinite.
inline uint16_t narrow(float x, DType dtype) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  if (dtype == kBFloat16) return (uint16_t)(b >> 16);
  const uint16_t sign = (uint16_t)(b >> 16 & 0x8000);
  const float magnitude = fabsf(x);
  if (x != x) return (uint16_t)(sign | 0x7e00 | (b >> 13 & 1023));
  if (magnitude >= 65536.0f) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x1p-14f) return (uint16_t)(sign | (uint16_t)(magnitude * 0x1p24f));
  return (uint16_t)(sign | ((b >> 23 & 255) - 112) << 10 | (b >> 13 & 1023));
}

inline std::vector<float> make_row(Bytes& in, int32_t vocab) {
  std::vector<float> x(vocab), palette(1 + in.below(8));
  const uint32_t kind = in.below(7);
  Noise noise{in.take<uint32_t>()};
  const float scale = ldexpf((float)(1 + in.byte()), (int)in.below(24) - 12);
  for (float& value : palette) value = any_float(in);
  const uint32_t run = 1 + in.byte();
  for (int32_t i = 0; i < vocab; ++i) {
    switch (kind) {
      case 0:  // whatever follows in the input
        x[i] = any_float(in);
        break;
      case 1:  // few values
        x[i] = palette[noise.below((uint32_t)palette.size())];
        break;
      case 2:  // runs of few values
        x[i] = palette[i / run % palette.size()];
        break;
      case 3:
        x[i] = noise.normal() * scale;
        break;
      case 4:  // ties
        x[i] = floorf(noise.normal() * 4) * scale;
        break;
      case 5:  // sorted
        x[i] = (run & 1 ? 1.0f : -1.0f) * (float)(i / (int)(1 + run / 8)) * scale / (float)vocab;
        break;
      default:  // a bulk and a few above it
        x[i] = noise.normal() * 1.5f - (noise.below(64) ? 15.0f : 0.0f);
    }
  }
  for (uint32_t n = in.below(6); n > 0; --n) {
    const int32_t where = (int32_t)(in.take<uint16_t>() % (uint32_t)vocab);
    x[where] = any_float(in);
  }
  return x;
}

// As an argument: 0 where there is nothing.
template <class T>
int64_t address(const std::vector<T>& values) {
  return values.empty() ? 0 : (int64_t)values.data();
}

// A table of `rows` rows, `stride` elements apart, that ends with its last element.
template <class T>
size_t table_size(int64_t rows, int64_t stride, int64_t length) {
  return (size_t)((rows - 1) * stride + length) * sizeof(T);
}

struct Input {
  int32_t vocab, num_samples, num_top;
  int64_t rows;
  DType dtype;
  LogprobsMode mode;
  bool wants_tokens, wants_filtered, wants_probabilities, wants_ranks;
  size_t shift;  // of the logits, in bytes: elements are aligned, vectors need not be
  std::vector<uint8_t> logits;
  int64_t stride;
  std::vector<RowParams> params;
  std::vector<int64_t> seeds, offsets;
  std::vector<int32_t> mask;
  int64_t mask_stride = 0, mask_words = 0;
  bool has_mask;
  std::vector<int64_t> row_ptr, bias_ids;
  std::vector<float> bias_values;
  std::vector<int64_t> prompt, output, breakers, drafted, requests;
  int64_t prompt_stride = 0, output_stride = 0, prompt_length = 0, output_length = 0;
  int64_t breakers_stride = 0, breakers_length = 0, drafted_stride = 0, drafted_length = 0;
  InputKind kind = kLogits;

  explicit Input(Bytes in);
  RowArguments row_arguments() const;
  LogitsArguments logits_arguments() const;
  void take_params(Bytes& in);
  void take_further_params(Bytes& in);
  void take_logits(Bytes& in);
  void take_mask(Bytes& in);
  void take_bias(Bytes& in);
  std::vector<int64_t> take_ids(Bytes& in, int64_t* stride, int64_t* length);
};

// FASTSAMPLE_FUZZ_VOCAB bounds V: short rows alone run ten times as fast.
inline int32_t most_tokens() {
  static const char* bound = getenv("FASTSAMPLE_FUZZ_VOCAB");
  return bound ? std::max(1, atoi(bound)) : 1 << 20;
}

inline Input::Input(Bytes in) {
  // Most rows are short, for speed; some are long enough for cutoffs to be estimated from a sample.
  const uint8_t size = in.byte();
  vocab = 1 + (int32_t)(size < 200   ? in.below(70)
                        : size < 244 ? in.below(700)
                        : size < 254 ? in.below(2600)
                                     : 4000 + in.below(1500));
  vocab = std::min(vocab, most_tokens());
  rows = vocab < 700 ? 1 + in.below(3) : 1;
  dtype = (DType)in.below(3);
  const uint8_t wants = in.byte();
  wants_filtered = wants & 1;
  wants_probabilities = wants & 2;
  wants_tokens = wants & 12 || !(wants & 3);
  wants_ranks = wants & 16;
  mode = wants_tokens ? (LogprobsMode)in.below(3) : kNoLogprobs;
  const uint8_t draws = in.byte();  // few, or enough for a table of the kept tokens
  num_samples = draws < 224 ? 1 + draws % 3 : 8 + (draws - 224) * 20;
  const uint8_t top = in.byte();
  num_top = mode == kNoLogprobs ? 0 : top < 250 ? std::min<int32_t>(top % 9, vocab) : vocab;
  take_params(in);
  take_mask(in);
  take_bias(in);
  prompt = take_ids(in, &prompt_stride, &prompt_length);
  output = take_ids(in, &output_stride, &output_length);
  // From the last byte on, so that what comes before keeps its meaning.
  std::vector<uint8_t> reversed(in.data, in.data + in.size);
  std::reverse(reversed.begin(), reversed.end());
  Bytes back = {reversed.data(), std::min<size_t>(reversed.size(), 128)};
  take_further_params(back);
  take_logits(in);
}

// History, filters beyond top-k, top-p and min-p, the fourth order, and probabilities as input.
inline void Input::take_further_params(Bytes& in) {
  const uint8_t kinds = in.byte();
  const bool on = kinds % 4 == 3;
  kind = on && kinds & 64 ? kProbabilities : kLogits;
  if (on && kinds & 128) breakers = take_ids(in, &breakers_stride, &breakers_length);
  for (RowParams& p : params) {
    const uint16_t chosen = on ? in.take<uint16_t>() : 0;  // bits: not left at its default
    const auto pick = [&](int bit, float low, float high, float otherwise, bool open = false) {
      return chosen >> bit & 1 ? in_range(in, low, high, otherwise, open) : otherwise;
    };
    p.top_n_sigma = pick(0, 0, FLT_MAX, 0);
    p.typical_p = pick(1, 0, 1, 1, true);
    p.epsilon_cutoff = pick(2, 0, 0x1.fffffep-1f, 0);
    p.eta_cutoff = pick(3, 0, 0x1.fffffep-1f, 0);
    p.top_a = pick(4, 0, 1, 0);
    p.p_less = chosen >> 5 & 1;
    p.xtc_probability = pick(6, 0, 1, 0);
    p.xtc_threshold = pick(7, 0, 1, 0.1f, true);
    p.dry_multiplier = pick(8, 0, FLT_MAX, 0);
    p.dry_base = pick(9, 1, FLT_MAX, 1.75f);
    p.dry_allowed_length = chosen >> 10 & 1 ? 1 + in.byte() % 8 : 2;
    p.dry_range = chosen >> 11 & 1 ? in.byte() : 0;
    p.no_repeat_ngram_size = chosen >> 12 & 1 ? in.byte() % 9 : 0;
    if (chosen >> 13 & 1) p.order = kTemperatureLast;
    if (kind == kProbabilities) {  // what needs logits is refused before it comes here
      p.temperature = p.temperature < 1e-5f ? 0 : 1;
      p.repetition_penalty = 1;
      p.frequency_penalty = p.presence_penalty = p.top_n_sigma = p.eta_cutoff = 0;
      p.typical_p = 1;
      p.dry_multiplier = 0;
      p.no_repeat_ngram_size = 0;
    }
  }
  if (on && in.flag()) drafted = take_ids(in, &drafted_stride, &drafted_length);
  if (on && in.flag()) {
    for (int64_t r = 0; r < rows; ++r) requests.push_back(in.byte() % rows);
  }
  if (kind == kProbabilities) {
    row_ptr.clear();
    bias_ids.clear();
    bias_values.clear();
  }
}

inline void Input::take_params(Bytes& in) {
  params.resize(in.flag() ? (size_t)rows : 1);
  for (RowParams& p : params) {
    const uint16_t neutral = in.take<uint16_t>();  // bits: left at its default
    const auto pick = [&](int bit, float low, float high, float otherwise, bool open = false) {
      return neutral >> bit & 1 ? otherwise : in_range(in, low, high, otherwise, open);
    };
    p.temperature = pick(0, 0, 0x1p20f, 1);
    p.top_k = 0;
    if (!(neutral & 2)) {
      const int32_t k = in.take<int32_t>() & INT32_MAX;
      p.top_k = neutral & 4 ? k : k % (vocab + 2);
    }
    p.top_p = pick(3, 0, 1, 1, true);
    p.min_p = pick(4, 0, 1, 0);
    p.repetition_penalty = pick(5, 0, FLT_MAX, 1, true);
    p.frequency_penalty = pick(6, -FLT_MAX, FLT_MAX, 0);
    p.presence_penalty = pick(7, -FLT_MAX, FLT_MAX, 0);
    p.ties = neutral >> 8 & 1;
    p.order = (neutral >> 9) % 3;
  }
  seeds.resize(in.flag() ? (size_t)rows : 1);
  offsets.resize(in.flag() ? (size_t)rows : 1);
  for (int64_t& seed : seeds) seed = in.take<int64_t>();
  for (int64_t& offset : offsets) offset = in.take<int64_t>();
}

inline void Input::take_logits(Bytes& in) {
  const size_t width = dtype == kFloat32 ? 4 : 2;
  const uint8_t layout = in.byte();
  stride = layout % 3 == 0 ? vocab : layout % 3 == 1 ? vocab + layout / 3 : 0;
  shift = in.below(8) * width;
  logits.resize(shift + table_size<uint8_t>(rows, stride * (int64_t)width, vocab * (int64_t)width));
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> x = make_row(in, vocab);
    const bool negative = kind == kProbabilities && in.byte() == 1;  // an invalid row
    for (float& value : x) value = kind == kLogits || negative ? value : fabsf(value);
    uint8_t* to = logits.data() + shift + r * stride * (int64_t)width;
    for (int32_t i = 0; i < vocab; ++i) {
      const uint16_t bits = dtype == kFloat32 ? 0 : narrow(x[i], dtype);
      memcpy(to + i * (int64_t)width, dtype == kFloat32 ? (const void*)&x[i] : &bits, width);
    }
  }
}

inline void Input::take_mask(Bytes& in) {
  const uint8_t kind = in.byte();
  has_mask = kind & 1;
  if (!has_mask) return;
  const int32_t all = (vocab + 31) / 32;
  mask_words = kind & 2 ? all : in.below((uint32_t)all + 3);
  mask_stride = kind & 4 ? mask_words + in.below(3) : 0;
  mask.resize(mask_words ? table_size<uint8_t>(rows, mask_stride, mask_words) : 0);
  Noise noise{in.take<uint16_t>()};
  for (int32_t& word : mask) {
    word = kind & 8 ? -1 : (int32_t)noise.next();
    if (kind & 16 && noise.below(2)) word = 0;
  }
  for (uint32_t n = in.below(3); n > 0 && !mask.empty(); --n) {
    const size_t at = in.take<uint16_t>() % mask.size();
    mask[at] = in.take<int32_t>();
  }
}

inline void Input::take_bias(Bytes& in) {
  if (!in.flag()) return;
  row_ptr.push_back(0);
  for (int64_t r = 0; r < rows; ++r) {
    std::set<int64_t> ids;
    for (uint32_t n = in.below(9); n > 0; --n) ids.insert(in.take<uint16_t>() % vocab);
    for (int64_t id : ids) {
      bias_ids.push_back(id);
      bias_values.push_back(in_range(in, -INFINITY, FLT_MAX, -1));
    }
    row_ptr.push_back((int64_t)bias_ids.size());
  }
  bias_ids.shrink_to_fit();
  bias_values.shrink_to_fit();
}

inline std::vector<int64_t> Input::take_ids(Bytes& in, int64_t* stride, int64_t* length) {
  if (!in.flag()) return {};
  *length = in.below(40);
  *stride = in.flag() ? *length + in.below(4) : 0;
  if (!*length) return {};
  std::vector<int64_t> ids(table_size<uint8_t>(rows, *stride, *length));
  Noise noise{in.take<uint16_t>()};
  const uint32_t range = 1 + in.below((uint32_t)vocab);
  for (int64_t& id : ids) {
    const uint32_t odd = noise.below(64);
    id = odd == 0 ? (int64_t)noise.next() : odd == 1 ? -1 : odd == 2 ? vocab : noise.below(range);
  }
  return ids;
}

inline RowArguments Input::row_arguments() const {
  const auto stride = [](const auto& v, int64_t words = 1) { return v.size() > 1 ? words : 0; };
  RowArguments a = {};
  a.params = address(params);
  a.params_stride = stride(params, sizeof(RowParams) / sizeof(int32_t));
  a.seeds = address(seeds);
  a.seeds_stride = stride(seeds);
  a.offsets = address(offsets);
  a.offsets_stride = stride(offsets);
  a.num_offsets = (int64_t)offsets.size();
  a.mask = address(mask);
  a.mask_stride = mask_stride;
  a.mask_words = has_mask ? mask_words : -1;
  a.bias_row_ptr = address(row_ptr);
  a.bias_ids = address(bias_ids);
  a.bias_values = address(bias_values);
  a.bias_entries = (int64_t)bias_ids.size();
  a.prompt = address(prompt);
  a.prompt_stride = prompt_stride;
  a.prompt_length = prompt_length;
  a.output = address(output);
  a.output_stride = output_stride;
  a.output_length = output_length;
  a.breakers = address(breakers);
  a.breakers_stride = breakers_stride;
  a.breakers_length = breakers_length;
  a.drafted = address(drafted);
  a.drafted_stride = drafted_stride;
  a.drafted_length = drafted_length;
  a.requests = address(requests);
  return a;
}

inline LogitsArguments Input::logits_arguments() const {
  return LogitsArguments{address(logits) + (int64_t)shift, stride, rows, vocab, dtype, kind};
}

}  // namespace fuzz
