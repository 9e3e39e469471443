// Attention of one row over the paged KV cache.
//
// A block holds 16 tokens of all layers: [layer][kv head], each piece keys then values in fp16.
//     keys    [head_dim][16 tokens]                 scores come out as 16 tokens in 16 lanes
//     values  [head_dim / 32][16 tokens][32]        outputs come out as dimensions in lanes (a last chunk may be 16 wide)
// Arithmetic, per row and query head, whatever stands beside it:
//     score[t] = (fma chain over even dimensions) + (fma chain over odd ones), in ascending order; the query is scaled
//     p[t]     = exponential(score[t] - largest score)
//     total    = 16 lanes, lane t % 16, blocks ascending, then sum_of
//     out      = (fma chain over t ascending of p[t] * value[t]) * (1 / total)
// Slots beyond the row's position are never read into a sum: they may hold anything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.hpp"

namespace mill {

constexpr int kBlockTokens = 16;
constexpr int kHeadsTogether = 3;  // query heads of a KV head that share its loads: 12 sums of 8 lanes in registers

struct KvCache {
  uint8_t* base = nullptr;
  int layers = 0, heads = 0, head_dim = 0;

  size_t piece_bytes() const { return size_t(2) * kBlockTokens * size_t(head_dim) * 2; }
  size_t block_bytes() const { return piece_bytes() * size_t(layers) * size_t(heads); }
  uint16_t* keys(int block, int layer, int head) const {
    return (uint16_t*)(base + size_t(block) * block_bytes() + (size_t(layer) * size_t(heads) + size_t(head)) * piece_bytes());
  }
  uint16_t* values(int block, int layer, int head) const {
    return keys(block, layer, head) + size_t(kBlockTokens) * size_t(head_dim);
  }
  // Writes one token's key and value (head_dim numbers each; clamped to the range of fp16).
  void put(int block, int layer, int head, int slot, const float* key, const float* value) const;
};

struct AttentionPlace {
  const int32_t* block_table;
  int position, layer, kv_head;
};

// `queries` [count][head_dim], rotated and scaled; `scores` is scratch for count * (position + 16) numbers.
void attend(const KvCache& cache, const AttentionPlace& place, const float* queries, int count, float* scores, float* out);

}  // namespace mill
