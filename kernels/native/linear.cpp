// Products with panels. See linear.hpp for the layout and the arithmetic.
#include "linear.hpp"

#include <algorithm>
#include <cfloat>
#include <numeric>
#include <type_traits>

#include "panels.hpp"
#include "tiles.hpp"

namespace mill {

namespace {

// 2-8 KB ahead were all alike on the machines tried; without it a single row is 10-20 % slower.
constexpr int kPrefetchAhead = 4096;

MILL_INLINE void prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 3); }

// Calls work(R, row) for all rows from `row` on, R of them at a time: `Most`, and what is left at last.
template <int Most = kRowsTogether, typename Work>
MILL_INLINE void by_rows(int row, int rows, Work work) {
  for (; row + Most <= rows; row += Most) work(std::integral_constant<int, Most>(), row);
  if constexpr (Most > 1) by_rows<Most - 1>(row, rows, work);
}

template <size_t Bytes>
MILL_INLINE void prefetch_ahead(const uint8_t* at) {
  for (size_t ahead = 0; ahead < Bytes; ahead += 64) prefetch(at + kPrefetchAhead + ahead);
}

// The fp32 work on one group.
template <int R>
MILL_INLINE void add_with_minimum(Lanes scale, Lanes minimum, const GroupRows& rows, const Lanes dots[R], Lanes sums[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    sums[r] = fma(scale * splat(rows.scale[r]), dots[r], sums[r]);
    sums[r] = fma(minimum, splat(rows.sum[r]), sums[r]);
  }
}

template <int R>
MILL_INLINE void add(Lanes scale, const GroupRows& rows, const Lanes dots[R], Lanes sums[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r] = fma(scale * splat(rows.scale[r]), dots[r], sums[r]);
}

// Q4 and Q5. R rows from `row` on: one pass over the panel, sums in registers. Unpacking is an eighth of the work at four
// rows, and more rows find the panel in L1: unpacking it once for all of them was no faster on Zen 3.
template <bool Nibbles, int R>
void multiply_pairs(const uint8_t* panel, int groups, const Rows& x, int row, float* acc, Ahead& ahead) {
  constexpr size_t kGroupBytes = Nibbles ? kQ4GroupBytes : kQ5GroupBytes;
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  GroupRows rows = x.group(0, row);
  const int stride = x.stride();
  for (int g = 0; g < groups; g++, panel += kGroupBytes, rows.to_next_group(stride)) {
    if (row == 0)
      prefetch_ahead<kGroupBytes>(panel);
    else
      ahead.fetch();
    const Lanes scale = load_half((const uint16_t*)panel), minimum = load_half((const uint16_t*)panel + kLanes);
    Lanes dots[R];
    if constexpr (Nibbles)
      q4_dots<R>(panel + kPairBytes, rows, dots);
    else
      q8_dots<R>(panel + kPairBytes, rows, dots);
    add_with_minimum<R>(scale, minimum, rows, dots, sums);
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
}

template <int R>
void multiply_q8(const uint8_t* panel, int groups, const Rows& x, int row, float* acc, Ahead& ahead) {
  const uint16_t* scales = (const uint16_t*)panel;
  const uint8_t* lines = panel + q8_header_bytes(groups);
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  GroupRows rows = x.group(0, row);
  const int stride = x.stride();
  for (int g = 0; g < groups; g++, lines += kQ8LineBytes, rows.to_next_group(stride)) {
    if (row == 0)
      prefetch_ahead<kQ8LineBytes + 64>(lines);
    else
      ahead.fetch();
    const Lanes scale = load_half(scales + g * kLanes);
    Lanes dots[R];
    q8_dots<R>(lines, rows, dots);
    add<R>(scale, rows, dots, sums);
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
}

template <int R>
void multiply_mxfp4(const uint8_t* panel, int groups, const Rows& x, int row, float* acc, Ahead& ahead) {
  const uint8_t *exponents = panel, *lines = panel + mxfp4_header_bytes(groups);
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  GroupRows rows = x.group(0, row);
  const int stride = x.stride();
  for (int g = 0; g < groups; g++, lines += kQ4LineBytes, exponents += kLanes, rows.to_next_group(stride)) {
    if (row == 0)
      prefetch_ahead<kQ4LineBytes>(lines);
    else
      ahead.fetch();
    const Lanes scale = load_exponents(exponents);
    Lanes dots[R];
    fp4_dots<R>(lines, rows, dots);
    add<R>(scale, rows, dots, sums);
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
}

// Q4_K, Q5_K and Q6_K.
template <Kind K, int R>
void multiply_super(const uint8_t* panel, int groups, const Rows& x, int row, float* acc) {
  constexpr size_t kLineBytes = K == Kind::Q4_K ? kQ4LineBytes : kQ8LineBytes;
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  GroupRows rows = x.group(0, row);
  const int stride = x.stride();
  for (int first = 0; first < groups; first += kSuperGroups) {
    const Lanes factor = load_half((const uint16_t*)panel), lowest = load_half((const uint16_t*)panel + kLanes);
    const int8_t* scales = (const int8_t*)panel + (K == Kind::Q6_K ? 1 : 2) * 2 * kLanes;
    if (row == 0) prefetch_ahead<kSuperHeadBytes>(panel);
    panel += kSuperHeadBytes;
    for (int g = first; g < first + kSuperGroups; g++, panel += kLineBytes, scales += 2 * kLanes, rows.to_next_group(stride)) {
      if (row == 0) prefetch_ahead<kLineBytes>(panel);
      const Lanes one = load_int8(scales), other = load_int8(scales + kLanes);
      Lanes dots[R];
      if constexpr (K == Kind::Q6_K) {
        half_dots<R>(panel, rows, one, other, dots);
        add<R>(factor, rows, dots, sums);
      } else {
        if constexpr (K == Kind::Q4_K)
          q4_dots<R>(panel, rows, dots);
        else
          q8_dots<R>(panel, rows, dots);
        add_with_minimum<R>(factor * one, lowest * other, rows, dots, sums);
      }
    }
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
}

template <Kind K>
void multiply_super_rows(const uint8_t* panel, int groups, const Rows& x, float* acc) {
  by_rows(0, x.count, [&](auto count, int row) { multiply_super<K, count>(panel, groups, x, row, acc); });
}

template <Kind K>
MILL_INLINE Lanes float_weights(const uint8_t* panel, int input) {
  if constexpr (K == Kind::F32) return load((const float*)panel + input * kLanes);
  if constexpr (K == Kind::F16) return load_half((const uint16_t*)panel + input * kLanes);
  return load_bfloat((const uint16_t*)panel + input * kLanes);
}

template <Kind K, int R>
void multiply_float_rows(const uint8_t* panel, int inputs, const float* x, float* acc) {
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  for (int k = 0; k < inputs; k++) {
    const Lanes weights = float_weights<K>(panel, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = fma(weights, splat(x[size_t(r) * inputs + k]), sums[r]);
  }
  for (int r = 0; r < R; r++) store(acc + r * kLanes, sums[r]);
}

template <Kind K>
void multiply_float(const uint8_t* panel, int inputs, const Rows& x, float* acc) {
  by_rows(0, x.count, [&](auto count, int row) {
    multiply_float_rows<K, count>(panel, inputs, x.plain(row, inputs), acc + row * kLanes);
  });
}

// The first rows of a product with a quantised panel, if there are enough of them for tiles; returns how many they are.
int multiply_tiles([[maybe_unused]] const Matrix& matrix, [[maybe_unused]] const uint8_t* panel,
                   [[maybe_unused]] const Rows& x, [[maybe_unused]] float* acc, [[maybe_unused]] uint8_t* unpacked) {
  int row = 0;
#if MILL_AMX
  if (!unpacked || x.count < kFewestTileRows || (matrix.kind != Kind::Q4 && matrix.kind != Kind::Q8)) return 0;
  const int groups = matrix.inputs / kGroup;
  const bool nibbles = matrix.kind == Kind::Q4;
  if (nibbles) unpack_nibbles(panel + 64, kQ4GroupBytes, groups, unpacked);
  TilePanel tiles{groups, panel, nibbles ? kQ4GroupBytes : 2 * kLanes, nibbles ? unpacked : panel + q8_header_bytes(groups),
                  panel + matrix.panel_bytes, matrix.panel_bytes / size_t(groups)};
  for (; x.count - row >= kFewestTileRows; row += kTileRows) {
    if (nibbles)
      multiply_sixteen<true>(tiles, x, row, acc);
    else
      multiply_sixteen<false>(tiles, x, row, acc);
    tiles.next = nullptr;
  }
#endif
  return row;
}

}  // namespace

void multiply_panel(const Matrix& matrix, const uint8_t* panel, const Rows& x, float* acc, uint8_t* unpacked, Ahead& ahead) {
  const int groups = matrix.inputs / kGroup;
  switch (matrix.kind) {
    case Kind::Q4_0:  // described as Q4
    case Kind::Q4:
      return by_rows(multiply_tiles(matrix, panel, x, acc, unpacked), x.count,
                     [&](auto count, int row) { multiply_pairs<true, count>(panel, groups, x, row, acc, ahead); });
    case Kind::Q5_0:  // described as Q5
    case Kind::Q5:
      return by_rows(0, x.count, [&](auto count, int row) { multiply_pairs<false, count>(panel, groups, x, row, acc, ahead); });
    case Kind::Q8:
      return by_rows(multiply_tiles(matrix, panel, x, acc, unpacked), x.count,
                     [&](auto count, int row) { multiply_q8<count>(panel, groups, x, row, acc, ahead); });
    case Kind::MXFP4:
      return by_rows(0, x.count, [&](auto count, int row) { multiply_mxfp4<count>(panel, groups, x, row, acc, ahead); });
    case Kind::Q4_K: return multiply_super_rows<Kind::Q4_K>(panel, groups, x, acc);
    case Kind::Q5_K: return multiply_super_rows<Kind::Q5_K>(panel, groups, x, acc);
    case Kind::Q6_K: return multiply_super_rows<Kind::Q6_K>(panel, groups, x, acc);
    case Kind::F32: return multiply_float<Kind::F32>(panel, matrix.inputs, x, acc);
    case Kind::F16: return multiply_float<Kind::F16>(panel, matrix.inputs, x, acc);
    case Kind::BF16: return multiply_float<Kind::BF16>(panel, matrix.inputs, x, acc);
  }
}

void Wanted::by(const Matrix& matrix) {
  plain = plain || matrix.is_float();
  halves = halves || matrix.kind == Kind::Q6_K;
}

void Activations::reserve(int inputs, Wanted what, int most_rows) {
  wanted = what;
  const size_t numbers = size_t(inputs) * size_t(most_rows), groups = numbers / kGroup;
  q.resize(numbers);
  scale.resize(groups), sum.resize(groups), offset.resize(groups), first_offset.resize(groups);
  if (wanted.plain) plain.resize(numbers);
}

void Activations::set_group(int row, int group, int inputs, const float* values) {
  const Lanes a = load(values), b = load(values + kLanes);
  if (wanted.plain) {
    float* const kept = plain.data() + size_t(row) * inputs + size_t(group) * kGroup;
    store(kept, a), store(kept + kLanes, b);
  }
  const float step = largest_of(largest(magnitude(a), magnitude(b))) / 127.0f;
  const size_t at = size_t(group) * rows + row;
  if (step < FLT_MIN) {  // a quotient by a denormal step could leave the range of int8
    std::memset(q.data() + at * kGroup, 0, kGroup);
    scale[at] = sum[at] = 0.0f;
    offset[at] = first_offset[at] = 0;
    return;
  }
  const int32_t total = store_int8(q.data() + at * kGroup, a / splat(step), b / splat(step));
  scale[at] = step;
  sum[at] = step * float(total);
  offset[at] = -128 * total;
  if (wanted.halves) {
    const int8_t* const first = q.data() + at * kGroup;
    first_offset[at] = -128 * std::accumulate(first, first + kGroup / 2, 0);
  }
}

void Activations::copy_row(int row, int inputs, const Activations& from, int from_row) {
  for (int group = 0; group < inputs / kGroup; group++) {
    const size_t to = size_t(group) * size_t(rows) + size_t(row), at = size_t(group) * size_t(from.rows) + size_t(from_row);
    std::memcpy(q.data() + to * kGroup, from.q.data() + at * kGroup, kGroup);
    scale[to] = from.scale[at], sum[to] = from.sum[at];
    offset[to] = from.offset[at], first_offset[to] = from.first_offset[at];
  }
  if (wanted.plain)
    std::memcpy(plain.data() + size_t(row) * size_t(inputs), from.plain.data() + size_t(from_row) * size_t(inputs), size_t(inputs) * sizeof(float));
}

}  // namespace mill
