// Scores, softmax and weighted values of a row, or of a tile of rows. See attention.hpp for layout and arithmetic.
#include "attention.hpp"

#include <algorithm>
#include <cfloat>

namespace mill {

namespace {

constexpr int kChunk = 32;

float first_of(Lanes x) {
  float at[kLanes];
  store(at, x);
  return at[0];
}

// Keeps loads on their side. Three heads need 12 of 16 registers for sums and 3 for operands, a tile 24 of 32; a compiler
// that loads ahead spills a sum, and then every addition waits for memory: three times slower.
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

// Of N queries, turned: [head_dim][N].
template <typename F, int N>
void score_block(const typename F::Number* keys, const float* queries, int head_dim, Lanes scores[N]) {
  Lanes even[N], odd[N];
  for (int n = 0; n < N; n++) even[n] = odd[n] = splat(0.0f);
  for (int d = 0; d < head_dim; d += 2, queries += 2 * N) {
    const Lanes first = F::read(keys + d * kBlockTokens);
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) even[n] = fma(splat(queries[n]), first, even[n]);
    load_no_further();
    const Lanes second = F::read(keys + (d + 1) * kBlockTokens);
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) odd[n] = fma(splat(queries[N + n]), second, odd[n]);
    load_no_further();
  }
  for (int n = 0; n < N; n++) scores[n] = F::times_steps(even[n] + odd[n], keys, head_dim);
}

// Adds the values of a block's tokens begin..end-1 to C * 16 dimensions of the queries From..N-1. `weights`: [N][16].
template <typename F, int From, int N, int C>
MILL_INLINE void add_values(const typename F::Number* values, const float* weights, int begin, int end, Lanes sums[N][C]) {
  for (int t = begin; t < end; t++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      const Lanes value = F::read(values + (t * C + c) * kLanes);
#pragma GCC unroll 12
      for (int n = From; n < N; n++) sums[n][c] = fma(splat(weights[n * kBlockTokens + t]), value, sums[n][c]);
      load_no_further();
    }
}

// Adds what rows `Row` and later see of the last block, of which row Row - 1 sees nothing from `token` on.
template <typename F, int Row, int R, int H, int C>
MILL_INLINE void add_later_values(const typename F::Number* values, const float* weights, int token, Lanes sums[R * H][C]) {
  if constexpr (Row < R) {
    add_values<F, Row * H, R * H, C>(values, weights, token, token + 1, sums);
    add_later_values<F, Row + 1, R, H, C>(values, weights, token + 1, sums);
  }
}

template <typename F, int R, int H, int C>
void weigh_chunk(const KvCache& cache, const AttentionPlace& place, const float* weights, int first_dim,
                 const float* inverse, float* out, size_t out_stride) {
  constexpr int N = R * H;
  Lanes sums[N][C];
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) sums[n][c] = splat(0.0f);
  const int last = place.position / kBlockTokens, seen = place.position % kBlockTokens + 1;
  const auto values = [&](int b) { return values_of<F>(cache, place, b) + first_dim * kBlockTokens; };
  int b = place.first / kBlockTokens;
  for (; b < last; b++) add_values<F, 0, N, C>(values(b), weights + b * N * kBlockTokens, 0, kBlockTokens, sums);
  add_values<F, 0, N, C>(values(b), weights + b * N * kBlockTokens, 0, seen, sums);
  add_later_values<F, 1, R, H, C>(values(b), weights + b * N * kBlockTokens, seen, sums);
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++)
      store(out + size_t(n / H) * out_stride + n % H * cache.head_dim + first_dim + c * kLanes, sums[n][c] * splat(inverse[n]));
}

// `queries`: [head_dim][R][H]; `sinks`: [H]; a block's scores: [R][H][16].
template <typename F, int R, int H>
void attend_heads(const KvCache& cache, const AttentionPlace& place, const float* queries, const float* sinks, float* scores,
                  float* out, size_t out_stride) {
  constexpr int N = R * H;
  const int begin = place.first / kBlockTokens, blocks = place.position / kBlockTokens + 1;
  const auto at = [&](int b, int n) { return scores + (size_t(b) * N + size_t(n)) * kBlockTokens; };
  // What a query sees of a block; `unseen` is put in place of the rest.
  const auto blot_out = [&](int b, int n, float unseen) {
    if (b == begin) std::fill(at(b, n), at(b, n) + place.first % kBlockTokens, unseen);
    if (b == blocks - 1) std::fill(at(b, n) + (place.position + n / H) % kBlockTokens + 1, at(b, n) + kBlockTokens, unseen);
  };

  Lanes peaks[N];
  for (int n = 0; n < N; n++) peaks[n] = splat(sinks ? sinks[n % H] : -INFINITY);
  for (int b = begin; b < blocks; b++) {
    Lanes block[N];
    score_block<F, N>(keys_of<F>(cache, place, b), queries, cache.head_dim, block);
    for (int n = 0; n < N; n++) {
      store(at(b, n), block[n]);
      blot_out(b, n, -INFINITY);
      peaks[n] = largest(peaks[n], load(at(b, n)));
    }
  }

  float inverse[N];
  for (int n = 0; n < N; n++) {
    const float largest_score = largest_of(peaks[n]);
    const Lanes peak = splat(largest_score);
    Lanes total = splat(0.0f);
    for (int b = begin; b < blocks; b++) {
      store(at(b, n), exponential(load(at(b, n)) - peak));
      blot_out(b, n, 0.0f);
      total = total + load(at(b, n));
      store(at(b, n), F::times_steps(load(at(b, n)), values_of<F>(cache, place, b), cache.head_dim));
    }
    float sum = sum_of(total);
    if (sinks) sum += first_of(exponential(splat(sinks[n % H] - largest_score)));
    inverse[n] = 1.0f / sum;
  }

  int dim = 0;
  for (; dim + kChunk <= cache.head_dim; dim += kChunk)
    weigh_chunk<F, R, H, 2>(cache, place, scores, dim, inverse, out, out_stride);
  if (dim < cache.head_dim) weigh_chunk<F, R, H, 1>(cache, place, scores, dim, inverse, out, out_stride);
}

// All heads, some of them at a time. `queries`: [R][count][head_dim].
template <typename F, int R>
void attend_rows(const KvCache& cache, const AttentionPlace& place, const float* queries, int count, float* scratch, float* out,
                 size_t out_stride) {
  static_assert(kHeadsTogether == 3, "one case each");
  const int dim = cache.head_dim;
  for (int first = 0; first < count; first += kHeadsTogether) {
    const int heads = std::min(count - first, kHeadsTogether);
    float* const turned = scratch;
    for (int row = 0, n = 0; row < R; row++)
      for (int head = first; head < first + heads; head++, n++)
        for (int d = 0; d < dim; d++) turned[d * R * heads + n] = queries[(row * count + head) * dim + d];
    float *const scores = scratch + R * heads * dim, *const to = out + first * dim;
    const float* const sinks = place.sinks ? place.sinks + first : nullptr;
    switch (heads) {
      case 3: attend_heads<F, R, 3>(cache, place, turned, sinks, scores, to, out_stride); break;
      case 2: attend_heads<F, R, 2>(cache, place, turned, sinks, scores, to, out_stride); break;
      case 1: attend_heads<F, R, 1>(cache, place, turned, sinks, scores, to, out_stride); break;
    }
  }
}

template <typename F>
void attend_format(const KvCache& cache, const AttentionPlace& place, const float* queries, int count, float* scratch, float* out,
                   size_t out_stride) {
  if (place.rows == 1)
    attend_rows<F, 1>(cache, place, queries, count, scratch, out, out_stride);
  else
    attend_rows<F, kRowsInTile>(cache, place, queries, count, scratch, out, out_stride);
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

void attend(const KvCache& cache, const AttentionPlace& place, float* queries, int count, float* scratch, float* out,
            size_t out_stride) {
  if (cache.format != KvFormat::half) {
    for (int query = 0; query < place.rows * count; query++) spread(queries + query * cache.head_dim, cache.head_dim);
    multiply(queries, place.rows * count * cache.head_dim, spread_shares(cache.head_dim).query);
  }
  switch (cache.format) {
    case KvFormat::half: attend_format<Half>(cache, place, queries, count, scratch, out, out_stride); break;
    case KvFormat::int8: attend_format<Int8>(cache, place, queries, count, scratch, out, out_stride); break;
    case KvFormat::fp8: attend_format<Fp8>(cache, place, queries, count, scratch, out, out_stride); break;
  }
}

}  // namespace mill
