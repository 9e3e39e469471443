// Scores, softmax and weighted values of one row. See attention.hpp for layout and arithmetic.
#include "attention.hpp"

#include <algorithm>

namespace mill {

namespace {

constexpr int kChunk = 32;

// Keeps loads on their side. Three heads need 12 registers for sums and 3 for operands; a compiler that loads ahead spills
// a sum, and then every addition waits for memory: three times slower.
MILL_INLINE void load_no_further() { asm volatile("" ::: "memory"); }

template <int H>
void score_block(const uint16_t* keys, const float* queries, int head_dim, Lanes scores[H]) {
  Lanes even[H], odd[H];
  for (int h = 0; h < H; h++) even[h] = odd[h] = splat(0.0f);
  for (int d = 0; d < head_dim; d += 2) {
    const Lanes first = load_half(keys + d * kBlockTokens);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) even[h] = fma(splat(queries[h * head_dim + d]), first, even[h]);
    load_no_further();
    const Lanes second = load_half(keys + (d + 1) * kBlockTokens);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) odd[h] = fma(splat(queries[h * head_dim + d + 1]), second, odd[h]);
    load_no_further();
  }
  for (int h = 0; h < H; h++) scores[h] = even[h] + odd[h];
}

// Adds the values of one block, `tokens` of them, to C * 16 dimensions of H heads.
template <int H, int C>
MILL_INLINE void add_values(const uint16_t* values, const float* weights, size_t stride, int tokens, Lanes sums[H][C]) {
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      const Lanes value = load_half(values + (t * C + c) * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) sums[h][c] = fma(splat(weights[size_t(h) * stride + size_t(t)]), value, sums[h][c]);
      load_no_further();
    }
}

template <int H, int C>
void weigh_chunk(const KvCache& cache, const AttentionPlace& place, const float* weights, size_t stride, int first_dim,
                 const float* inverse, float* out) {
  Lanes sums[H][C];
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) sums[h][c] = splat(0.0f);
  for (int start = 0; start <= place.position; start += kBlockTokens) {
    const uint16_t* values = cache.values(place.block_table[start / kBlockTokens], place.layer, place.kv_head);
    const int tokens = std::min(kBlockTokens, place.position + 1 - start);
    add_values<H, C>(values + first_dim * kBlockTokens, weights + start, stride, tokens, sums);
  }
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) store(out + h * cache.head_dim + first_dim + c * kLanes, sums[h][c] * splat(inverse[h]));
}

template <int H>
void attend_heads(const KvCache& cache, const AttentionPlace& place, const float* queries, float* scores, float* out) {
  const int blocks = place.position / kBlockTokens + 1;
  const size_t stride = size_t(blocks) * kBlockTokens;
  const int last = place.position % kBlockTokens;

  Lanes peaks[H];
  for (int h = 0; h < H; h++) peaks[h] = splat(-INFINITY);
  for (int b = 0; b < blocks; b++) {
    Lanes block[H];
    score_block<H>(cache.keys(place.block_table[b], place.layer, place.kv_head), queries, cache.head_dim, block);
    for (int h = 0; h < H; h++) {
      float* const at = scores + size_t(h) * stride + size_t(b) * kBlockTokens;
      store(at, block[h]);
      if (b == blocks - 1) std::fill(at + last + 1, at + kBlockTokens, -INFINITY);
      peaks[h] = largest(peaks[h], load(at));
    }
  }

  float inverse[H];
  for (int h = 0; h < H; h++) {
    const Lanes peak = splat(largest_of(peaks[h]));
    Lanes total = splat(0.0f);
    for (int b = 0; b < blocks; b++) {
      float* const at = scores + size_t(h) * stride + size_t(b) * kBlockTokens;
      store(at, exponential(load(at) - peak));
      if (b == blocks - 1) std::fill(at + last + 1, at + kBlockTokens, 0.0f);
      total = total + load(at);
    }
    inverse[h] = 1.0f / sum_of(total);
  }

  int dim = 0;
  for (; dim + kChunk <= cache.head_dim; dim += kChunk) weigh_chunk<H, 2>(cache, place, scores, stride, dim, inverse, out);
  if (dim < cache.head_dim) weigh_chunk<H, 1>(cache, place, scores, stride, dim, inverse, out);
}

}  // namespace

void KvCache::put(int block, int layer, int head, int slot, const float* key, const float* value) const {
  const auto clamped = [](const float* p) { return largest(smallest(load(p), splat(kLargestHalf)), splat(-kLargestHalf)); };
  uint16_t* const to_keys = keys(block, layer, head);
  uint16_t* const to_values = values(block, layer, head);
  for (int dim = 0; dim < head_dim; dim += kLanes) {
    uint16_t halves[kLanes];
    store_half(halves, clamped(key + dim));
    for (int i = 0; i < kLanes; i++) to_keys[(dim + i) * kBlockTokens + slot] = halves[i];
    const int chunk = dim / kChunk * kChunk, width = std::min(kChunk, head_dim - chunk);
    store_half(to_values + chunk * kBlockTokens + slot * width + dim - chunk, clamped(value + dim));
  }
}

void attend(const KvCache& cache, const AttentionPlace& place, const float* queries, int count, float* scores, float* out) {
  static_assert(kHeadsTogether == 3, "one case each");
  for (; count > 0; count -= kHeadsTogether) {
    switch (std::min(count, kHeadsTogether)) {
      case 3: attend_heads<3>(cache, place, queries, scores, out); break;
      case 2: attend_heads<2>(cache, place, queries, scores, out); break;
      case 1: attend_heads<1>(cache, place, queries, scores, out); break;
    }
    queries += kHeadsTogether * cache.head_dim;
    out += kHeadsTogether * cache.head_dim;
  }
}

}  // namespace mill
