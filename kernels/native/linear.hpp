// Weight matrices as panels of sixteen outputs, and their products with rows of activations.
//
// A panel holds the weights of 16 consecutive outputs for all inputs, group after group of 32 inputs, so outputs are
// lanes and no sum ever crosses lanes. The checkpoint's own numbers are only moved, never widened:
//     Q4   per group: 16 fp16 scales, 16 fp16 minima, 4 lines of 64 bytes. Byte 4n+j of line i belongs to output n;
//          low nibble: input 8i+j, high nibble: input 8i+4+j (j = 0..3).   Q4_0 is Q4 with minimum -8 * scale.
//     Q8   all scales first (16 fp16 per group, padded to 64 bytes), then per group 8 lines of 64 bytes:
//          byte 4n+j of line i is output n, input 4i+j.
//     MXFP4   all exponents first (16 bytes per group, padded to 64), then per group 4 lines as Q4, whose nibbles are floats:
//          a weight is 2^(exponent - 128) times twice that float, a whole number from -12 to 12.
//     Q5   per group: scales and minima as Q4, then lines as Q8.   Q5_0 is Q5 with minimum -16 * scale.
//     Q4_K, Q5_K   per 8 groups: 16 fp16 factors of scales, 16 fp16 factors of minima (negated), per group 16 int8 scales and
//          16 int8 minima, which they multiply; then lines as Q4 or Q8, group after group.
//     Q6_K per 8 groups: 16 fp16 factors, per group two times 16 int8 scales of its halves, 32 bytes unused; then lines as Q8.
//     F32, F16, BF16   per input 16 numbers.
// Each thread's panels of all matrices lie in execution order in one region: a step is one stream per thread. A thread that
// is done with its own panels takes over what is left of the others'.
//
// Arithmetic, per output and for every number of rows: groups in ascending order,
//     acc = fma(scale * row_scale, float(exact int32 dot), acc), and with minima   acc = fma(minimum, row_scale * sum(q), acc);
//     scales and minima of Q4_K and Q5_K are products that float32 has exactly, and so is the dot of Q6_K (dots.hpp);
//     float kinds: inputs in ascending order, acc = fma(weight, x, acc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ahead.hpp"
#include "dots.hpp"

namespace mill {

constexpr int kPassRows = 160;  // rows that go through the layers together; more rows go in several passes

enum class Kind : int32_t {  // the numbers of GGUF
  F32 = 0, F16 = 1, Q4_0 = 2, Q4 = 3, Q5_0 = 6, Q5 = 7, Q8 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30,
  MXFP4 = 39
};

struct Matrix;

// What matrices read of their activations beside the int8.
struct Wanted {
  bool plain = false;   // the numbers as they were: float weights
  bool halves = false;  // sums of halves of groups: Q6_K

  void by(const Matrix& matrix);
};

// Rows of activations: int8 with a scale per group of 32 for quantised weights, and as they were for float weights.
struct Activations {
  int rows = 0;
  std::vector<int8_t> q;        // [inputs / 32][rows][32]
  std::vector<float> scale;     // [inputs / 32][rows]   largest magnitude / 127
  std::vector<float> sum;       // [inputs / 32][rows]   scale * sum of q
  std::vector<int32_t> offset;  // [inputs / 32][rows]   -128 * sum of q
  std::vector<int32_t> first_offset;  // of its first half, if wanted
  std::vector<float> plain;     // [rows][inputs], if wanted
  Wanted wanted;

  void reserve(int inputs, Wanted what, int most_rows = kPassRows);
  // The rows of one group from `row` on.
  GroupRows group(int index, int row) const {
    const size_t at = size_t(index) * size_t(rows) + size_t(row);
    return {q.data() + at * kGroup, scale.data() + at, sum.data() + at, offset.data() + at, first_offset.data() + at};
  }
  // Takes the 32 numbers of one group of one row.
  void set_group(int row, int group, int inputs, const float* values);
  // Takes a row as it stands in others that keep all that these want.
  void copy_row(int row, int inputs, const Activations& from, int from_row);
};

// Consecutive rows of activations: all of them, or some.
struct Rows {
  const Activations* of;
  int first, count;

  Rows(const Activations& all) : of(&all), first(0), count(all.rows) {}
  Rows(const Activations& all, int first_, int count_) : of(&all), first(first_), count(count_) {}
  GroupRows group(int index, int row) const { return of->group(index, first + row); }
  int stride() const { return of->rows; }  // from a group to the next one
  const float* plain(int row, int inputs) const { return of->plain.data() + size_t(first + row) * size_t(inputs); }
};

struct Matrix {
  Kind kind = Kind::F32;
  int outputs = 0, inputs = 0;
  int panels_per_unit = 1;  // a unit is what is never split between threads
  int stretch = 0;          // when a step reads it: the number of its stretch of weights
  size_t panel_bytes = 0;
  size_t unit_stride = 0;   // bytes from one unit of this matrix to the next in a thread's region

  struct Share {
    size_t offset = 0;  // of its first unit in the thread's region
    int first = 0, last = 0;  // panels
    uint8_t* base = nullptr;  // where the first unit lies
  };
  std::vector<Share> shares;  // one per thread

  void describe(int32_t ggml_type, int outputs, int inputs, int panels_per_unit);
  int panels() const { return (outputs + kLanes - 1) / kLanes; }
  bool is_float() const { return kind == Kind::F32 || kind == Kind::F16 || kind == Kind::BF16; }
  uint8_t* panel(const Share& share, int index) const {
    const int ahead = index - share.first;
    return share.base + size_t(ahead / panels_per_unit) * unit_stride + size_t(ahead % panels_per_unit) * panel_bytes;
  }
  // Moves one thread's share from the checkpoint's rows into panels in that thread's region.
  void repack(int thread, uint8_t* region, const void* source, int32_t ggml_type);
  // One row of weights as float32, for embeddings: scale * q, or fma(scale, q, minimum).
  void row(int index, float* values) const;
};

// acc[row][16] for all rows of `x` = the product with one panel.
// Where rows are many enough to go in several turns, `ahead` is fetched beside all but the first.
// `unpacked`: inputs * 16 bytes on a line of 64 for AMX to work in, and then this thread has Tiles; null: none are used.
void multiply_panel(const Matrix& matrix, const uint8_t* panel, const Rows& x, float* acc, uint8_t* unpacked, Ahead& ahead);

}  // namespace mill
