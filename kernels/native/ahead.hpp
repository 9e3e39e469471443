// The KV cache that attention reads next, fetched while products with weights keep the arithmetic busy.
//
// Attention of many sequences waits for memory, products with many rows do not touch it for most of their time. So each
// product fetches a few lines between two groups, of the layer whose attention comes next. What does not fit into L2
// moves on to L3, which is still several times nearer. Nothing is computed here: it may be left out, or stop anywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.hpp"

namespace mill {

class Ahead {
 public:
  // Of a layer's pieces, `bytes` long at `base` + block * `block_bytes`, those of every `step`-th block of first..last.
  void begin(const uint8_t* base, size_t block_bytes, size_t bytes, const int32_t* first, const int32_t* last, int step) {
    base_ = base, block_bytes_ = block_bytes, lines_ = int(bytes / kLine), block_ = first, last_ = last, step_ = step, left_ = 0;
  }
  void stop() { left_ = 0, block_ = last_; }

  MILL_INLINE void fetch() {
    if (left_ < kAtOnce) {
      if (block_ >= last_) return;
      at_ = base_ + size_t(*block_) * block_bytes_, left_ = lines_, block_ += step_;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; i++) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += kAtOnce * kLine, left_ -= kAtOnce;
  }

 private:
  static constexpr int kLine = 64, kAtOnce = 4;  // a piece's last lines, if they are fewer, are left to attention

  const uint8_t *base_ = nullptr, *at_ = nullptr;
  size_t block_bytes_ = 0;
  int lines_ = 0, left_ = 0, step_ = 1;
  const int32_t *block_ = nullptr, *last_ = nullptr;
};

}  // namespace mill
