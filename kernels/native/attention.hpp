// Attention over the paged KV cache, of one row or of neighbouring rows of a sequence together.
//
// A block holds 16 tokens of all layers: [layer][kv head], each piece a side of keys and a side of values.
//     keys    [head_dim][16 tokens]                 scores come out as 16 tokens in 16 lanes
//     values  [head_dim / 32][16 tokens][32]        outputs come out as dimensions in lanes (a last chunk may be 16 wide)
// A number is stored in one of three formats (a token's own when it is written, so no cut of a prompt can change it):
//     half    fp16, clamped to +-65504
//     int8    x / step rounded to even; step = largest magnitude / 127 of the token's key, or value, in this head. The 16
//             steps of a side stand behind its numbers, in float32. A step below the smallest normal number counts as 0
//     fp8     e4m3, clamped to +-448; read as number / 256, so that its step is 256
// int8 and fp8 store keys spread by a Hadamard transform over the largest power of two, w, that divides head_dim: a few
// large dimensions of a key would set the step of all. Queries are spread as well, which leaves their dot products: 1 / w,
// as two powers of two, goes to keys (w >> floor(log2(w) / 2)) and queries.
// Arithmetic, per row and query head, whatever stands beside it:
//     score[t] = ((fma chain over even dimensions) + (fma chain over odd ones), in ascending order) * key step[t]; the
//                query is scaled before it is spread
//     p[t]     = exponential(score[t] - largest score)
//     total    = 16 lanes, lane t % 16, blocks ascending, then sum_of
//                a head's sink is one more score: part of the largest, and exponential(sink - largest score) of the total
//     out      = (fma chain over t ascending of (p[t] * value step[t]) * value[t]) * (1 / total)
// Slots beyond the row's position are never read into a sum: they may hold anything. With a window only the positions from
// `first` on are seen; t counts from 0 all the same, so that lanes stay what they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.hpp"

namespace mill {

constexpr int kBlockTokens = 16;
constexpr int kHeadsTogether = 3;  // query heads of a KV head that share its loads: 12 sums of 8 lanes in registers
// Neighbouring rows that share them too, where there are registers for 24 sums.
#if MILL_AVX512
constexpr int kRowsInTile = 4;
#else
constexpr int kRowsInTile = 1;
#endif

enum class KvFormat : int32_t { half = 0, int8 = 1, fp8 = 2 };

struct KvCache {
  uint8_t* base = nullptr;
  int layers = 0, heads = 0, head_dim = 0;
  KvFormat format = KvFormat::half;

  size_t number_bytes() const { return format == KvFormat::half ? 2 : 1; }
  size_t step_bytes() const { return format == KvFormat::int8 ? sizeof(float) : 0; }
  size_t side_bytes() const { return size_t(kBlockTokens) * (size_t(head_dim) * number_bytes() + step_bytes()); }
  size_t block_bytes() const { return 2 * side_bytes() * size_t(layers) * size_t(heads); }
  uint8_t* keys(int block, int layer, int head) const {
    return base + size_t(block) * block_bytes() + (size_t(layer) * size_t(heads) + size_t(head)) * 2 * side_bytes();
  }
  uint8_t* values(int block, int layer, int head) const { return keys(block, layer, head) + side_bytes(); }
  // Writes one token's key and value (head_dim numbers each); `key` is used up.
  void put(int block, int layer, int head, int slot, float* key, const float* value) const;
};

// A row of a sequence, or a tile: kRowsInTile of them at `position` and behind it, all in one block and none with a window
// that has begun to move (`first` is 0).
struct AttentionPlace {
  const int32_t* block_table;
  int first, position, layer, kv_head;  // seen by the first row: positions first..position
  int rows = 1;
  const float* sinks = nullptr;  // of the query heads; null: they have none
};

inline size_t attention_scratch(int head_dim, int context) {  // numbers
  return size_t(kHeadsTogether) * kRowsInTile * size_t(head_dim + context + kBlockTokens);
}

// `queries` [rows][count][head_dim], rotated and scaled, are used up; `out`: a row's heads, the next row's `out_stride` on.
void attend(const KvCache& cache, const AttentionPlace& place, float* queries, int count, float* scratch, float* out,
            size_t out_stride);

}  // namespace mill
