// Scores, softmax and weighted values of one row. See attention.hpp for layout and arithmetic.
#include "attention.hpp"

#include <algorithm>
#include <cfloat>

namespace mill {

namespace {

constexpr int kChunk = 32;

// Keeps loads on their side. Three heads need 12 registers for sums and 3 for operands; a compiler that loads ahead spills
// a sum, and then every addition waits for memory: three times slower.
MILL_INLINE void load_no_further() { asm volatile("" ::: "memory"); }

// How numbers are read, and what a format multiplies them by afterwards.
struct Half {
  using Number = uint16_t;
  static MILL_INLINE Lanes read(const Number* p) { return load_half(p); }
  static MILL_INLINE Lanes times_steps(Lanes x, const Number*, int) { return x; }
};

struct Int8 {
  using Number = int8_t;
  static MILL_INLINE Lanes read(const Number* p) { return load_int8(p); }
  static MILL_INLINE Lanes times_steps(Lanes x, const Number* side, int head_dim) {
    return x * load((const float*)(side + kBlockTokens * head_dim));
  }
};

struct Fp8 {
  using Number = uint8_t;
  static MILL_INLINE Lanes read(const Number* p) { return load_fp8(p); }
  static MILL_INLINE Lanes times_steps(Lanes x, const Number*, int) { return x * splat(256.0f); }
};

template <typename F>
const typename F::Number* keys_of(const KvCache& cache, const AttentionPlace& place, int at) {
  return (const typename F::Number*)cache.keys(place.block_table[at], place.layer, place.kv_head);
}

template <typename F>
const typename F::Number* values_of(const KvCache& cache, const AttentionPlace& place, int at) {
  return (const typename F::Number*)cache.values(place.block_table[at], place.layer, place.kv_head);
}

template <typename F, int H>
void score_block(const typename F::Number* keys, const float* queries, int head_dim, Lanes scores[H]) {
  Lanes even[H], odd[H];
  for (int h = 0; h < H; h++) even[h] = odd[h] = splat(0.0f);
  for (int d = 0; d < head_dim; d += 2) {
    const Lanes first = F::read(keys + d * kBlockTokens);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) even[h] = fma(splat(queries[h * head_dim + d]), first, even[h]);
    load_no_further();
    const Lanes second = F::read(keys + (d + 1) * kBlockTokens);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) odd[h] = fma(splat(queries[h * head_dim + d + 1]), second, odd[h]);
    load_no_further();
  }
  for (int h = 0; h < H; h++) scores[h] = F::times_steps(even[h] + odd[h], keys, head_dim);
}

// Adds the values of one block, `tokens` of them, to C * 16 dimensions of H heads.
template <typename F, int H, int C>
MILL_INLINE void add_values(const typename F::Number* values, const float* weights, size_t stride, int tokens, Lanes sums[H][C]) {
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      const Lanes value = F::read(values + (t * C + c) * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) sums[h][c] = fma(splat(weights[size_t(h) * stride + size_t(t)]), value, sums[h][c]);
      load_no_further();
    }
}

template <typename F, int H, int C>
void weigh_chunk(const KvCache& cache, const AttentionPlace& place, const float* weights, size_t stride, int first_dim,
                 const float* inverse, float* out) {
  Lanes sums[H][C];
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) sums[h][c] = splat(0.0f);
  for (int start = place.first / kBlockTokens * kBlockTokens; start <= place.position; start += kBlockTokens) {
    const typename F::Number* const values = values_of<F>(cache, place, start / kBlockTokens);
    const int tokens = std::min(kBlockTokens, place.position + 1 - start);
    add_values<F, H, C>(values + first_dim * kBlockTokens, weights + start, stride, tokens, sums);
  }
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) store(out + h * cache.head_dim + first_dim + c * kLanes, sums[h][c] * splat(inverse[h]));
}

template <typename F, int H>
void attend_heads(const KvCache& cache, const AttentionPlace& place, const float* queries, float* scores, float* out) {
  const int begin = place.first / kBlockTokens, blocks = place.position / kBlockTokens + 1;
  const size_t stride = size_t(blocks) * kBlockTokens;
  // What a row sees of a block; `unseen` is put in place of the rest.
  const auto blot_out = [&](int b, float* at, float unseen) {
    if (b == begin) std::fill(at, at + place.first % kBlockTokens, unseen);
    if (b == blocks - 1) std::fill(at + place.position % kBlockTokens + 1, at + kBlockTokens, unseen);
  };

  Lanes peaks[H];
  for (int h = 0; h < H; h++) peaks[h] = splat(-INFINITY);
  for (int b = begin; b < blocks; b++) {
    Lanes block[H];
    score_block<F, H>(keys_of<F>(cache, place, b), queries, cache.head_dim, block);
    for (int h = 0; h < H; h++) {
      float* const at = scores + size_t(h) * stride + size_t(b) * kBlockTokens;
      store(at, block[h]);
      blot_out(b, at, -INFINITY);
      peaks[h] = largest(peaks[h], load(at));
    }
  }

  float inverse[H];
  for (int h = 0; h < H; h++) {
    const Lanes peak = splat(largest_of(peaks[h]));
    Lanes total = splat(0.0f);
    for (int b = begin; b < blocks; b++) {
      float* const at = scores + size_t(h) * stride + size_t(b) * kBlockTokens;
      store(at, exponential(load(at) - peak));
      blot_out(b, at, 0.0f);
      total = total + load(at);
      store(at, F::times_steps(load(at), values_of<F>(cache, place, b), cache.head_dim));
    }
    inverse[h] = 1.0f / sum_of(total);
  }

  int dim = 0;
  for (; dim + kChunk <= cache.head_dim; dim += kChunk) weigh_chunk<F, H, 2>(cache, place, scores, stride, dim, inverse, out);
  if (dim < cache.head_dim) weigh_chunk<F, H, 1>(cache, place, scores, stride, dim, inverse, out);
}

// At most `count` heads, some of them at a time.
template <typename F>
void attend_all(const KvCache& cache, const AttentionPlace& place, const float* queries, int count, float* scores, float* out) {
  static_assert(kHeadsTogether == 3, "one case each");
  for (; count > 0; count -= kHeadsTogether) {
    switch (std::min(count, kHeadsTogether)) {
      case 3: attend_heads<F, 3>(cache, place, queries, scores, out); break;
      case 2: attend_heads<F, 2>(cache, place, queries, scores, out); break;
      case 1: attend_heads<F, 1>(cache, place, queries, scores, out); break;
    }
    queries += kHeadsTogether * cache.head_dim;
    out += kHeadsTogether * cache.head_dim;
  }
}

// The Hadamard transform of each w numbers (see attention.hpp), unscaled: stages of distance 1, 2, 4, ...
void spread(float* x, int head_dim) {
  const int width = head_dim & -head_dim;
  for (int half = 1; half < width; half *= 2)
    for (int start = 0; start < head_dim; start += 2 * half)
      for (int i = start; i < start + half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
}

struct Shares {
  float key, query;  // powers of two; their product is 1 / w
};

Shares spread_shares(int head_dim) {
  int stages = 0;
  while ((head_dim >> stages) % 2 == 0) stages++;
  return {std::ldexp(1.0f, -(stages / 2)), std::ldexp(1.0f, stages / 2 - stages)};
}

void multiply(float* x, int count, float factor) {
  for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) * splat(factor));
}

MILL_INLINE Lanes clamped(Lanes x, float most) { return largest(smallest(x, splat(most)), splat(-most)); }

// The step of head_dim numbers in int8; 0 when a quotient by it could leave the range.
float step_of(const float* x, int head_dim) {
  Lanes peak = splat(0.0f);
  for (int i = 0; i < head_dim; i += kLanes) peak = largest(peak, magnitude(clamped(load(x + i), kLargestHalf)));
  const float step = largest_of(peak) / 127.0f;
  return step < FLT_MIN ? 0.0f : step;
}

// Sixteen numbers as bytes.
void to_bytes(const float* x, KvFormat format, float step, uint8_t* bytes) {
  if (format == KvFormat::fp8) {
    float limited[kLanes];
    store(limited, clamped(load(x), kLargestFp8));
    for (int i = 0; i < kLanes; i++) bytes[i] = float_to_fp8(limited[i]);
    return;
  }
  int8_t rounded[2 * kLanes] = {};
  if (step > 0) store_int8(rounded, clamped(load(x), kLargestHalf) / splat(step), splat(0.0f));
  std::memcpy(bytes, rounded, kLanes);
}

void put_bytes(const KvCache& cache, uint8_t* keys, uint8_t* values, int slot, float* key, const float* value) {
  const int head_dim = cache.head_dim;
  spread(key, head_dim);
  multiply(key, head_dim, spread_shares(head_dim).key);
  float key_step = 0, value_step = 0;
  if (cache.format == KvFormat::int8) {
    const size_t behind = size_t(kBlockTokens) * size_t(head_dim);
    ((float*)(keys + behind))[slot] = key_step = step_of(key, head_dim);
    ((float*)(values + behind))[slot] = value_step = step_of(value, head_dim);
  }
  for (int dim = 0; dim < head_dim; dim += kLanes) {
    uint8_t bytes[kLanes];
    to_bytes(key + dim, cache.format, key_step, bytes);
    for (int i = 0; i < kLanes; i++) keys[(dim + i) * kBlockTokens + slot] = bytes[i];
    const int chunk = dim / kChunk * kChunk, width = std::min(kChunk, head_dim - chunk);
    to_bytes(value + dim, cache.format, value_step, values + chunk * kBlockTokens + slot * width + dim - chunk);
  }
}

void put_halves(uint16_t* keys, uint16_t* values, int head_dim, int slot, const float* key, const float* value) {
  for (int dim = 0; dim < head_dim; dim += kLanes) {
    uint16_t halves[kLanes];
    store_half(halves, clamped(load(key + dim), kLargestHalf));
    for (int i = 0; i < kLanes; i++) keys[(dim + i) * kBlockTokens + slot] = halves[i];
    const int chunk = dim / kChunk * kChunk, width = std::min(kChunk, head_dim - chunk);
    store_half(values + chunk * kBlockTokens + slot * width + dim - chunk, clamped(load(value + dim), kLargestHalf));
  }
}

}  // namespace

void KvCache::put(int block, int layer, int head, int slot, float* key, const float* value) const {
  uint8_t *const to_keys = keys(block, layer, head), *const to_values = values(block, layer, head);
  if (format == KvFormat::half)
    put_halves((uint16_t*)to_keys, (uint16_t*)to_values, head_dim, slot, key, value);
  else
    put_bytes(*this, to_keys, to_values, slot, key, value);
}

void attend(const KvCache& cache, const AttentionPlace& place, float* queries, int count, float* scores, float* out) {
  if (cache.format != KvFormat::half) {
    for (int head = 0; head < count; head++) spread(queries + head * cache.head_dim, cache.head_dim);
    multiply(queries, count * cache.head_dim, spread_shares(cache.head_dim).query);
  }
  switch (cache.format) {
    case KvFormat::half: attend_all<Half>(cache, place, queries, count, scores, out); break;
    case KvFormat::int8: attend_all<Int8>(cache, place, queries, count, scores, out); break;
    case KvFormat::fp8: attend_all<Fp8>(cache, place, queries, count, scores, out); break;
  }
}

}  // namespace mill
