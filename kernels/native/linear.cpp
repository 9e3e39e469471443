// Panels: packing, reading back, and the products. See linear.hpp for the layout and the arithmetic.
#include "linear.hpp"

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "tiles.hpp"

namespace mill {

namespace {

constexpr size_t kQ4GroupBytes = 320, kQ8LineBytes = 512;
// 2-8 KB ahead were all alike on the machines tried; without it a single row is 10-20 % slower.
constexpr int kPrefetchAhead = 4096;

size_t q8_header_bytes(int groups) { return (size_t(groups) * 2 * kLanes + 63) / 64 * 64; }

MILL_INLINE void prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 3); }

// Calls work(R, row) for all rows from `row` on, R of them at a time: `Most`, and what is left at last.
template <int Most = kRowsTogether, typename Work>
MILL_INLINE void by_rows(int row, int rows, Work work) {
  for (; row + Most <= rows; row += Most) work(std::integral_constant<int, Most>(), row);
  if constexpr (Most > 1) by_rows<Most - 1>(row, rows, work);
}

// R rows from `row` on: one pass over the panel, sums in registers. Unpacking is an eighth of the work at four rows, and
// more rows find the panel in L1: unpacking it once for all of them was no faster on Zen 3.
template <int R>
void multiply_q4(const uint8_t* panel, int groups, const Activations& x, int row, float* acc) {
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  for (int g = 0; g < groups; g++, panel += kQ4GroupBytes) {
    if (row == 0)
      for (int ahead = 0; ahead < int(kQ4GroupBytes); ahead += 64) prefetch(panel + kPrefetchAhead + ahead);
    const Lanes scale = load_half((const uint16_t*)panel), minimum = load_half((const uint16_t*)panel + kLanes);
    const GroupRows rows = x.group(g, row);
    Lanes dots[R];
    q4_dots<R>(panel + 64, rows, dots);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      sums[r] = fma(scale * splat(rows.scale[r]), dots[r], sums[r]);
      sums[r] = fma(minimum, splat(rows.sum[r]), sums[r]);
    }
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
}

template <int R>
void multiply_q8(const uint8_t* panel, int groups, const Activations& x, int row, float* acc) {
  const uint16_t* scales = (const uint16_t*)panel;
  const uint8_t* lines = panel + q8_header_bytes(groups);
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
  for (int g = 0; g < groups; g++, lines += kQ8LineBytes) {
    if (row == 0)
      for (int ahead = 0; ahead < int(kQ8LineBytes) + 64; ahead += 64) prefetch(lines + kPrefetchAhead + ahead);
    const Lanes scale = load_half(scales + g * kLanes);
    const GroupRows rows = x.group(g, row);
    Lanes dots[R];
    q8_dots<R>(lines, rows, dots);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = fma(scale * splat(rows.scale[r]), dots[r], sums[r]);
  }
  for (int r = 0; r < R; r++) store(acc + (row + r) * kLanes, sums[r]);
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
void multiply_float(const uint8_t* panel, int inputs, const Activations& x, float* acc) {
  by_rows(0, x.rows, [&](auto count, int row) {
    multiply_float_rows<K, count>(panel, inputs, x.plain.data() + size_t(row) * size_t(inputs), acc + row * kLanes);
  });
}

uint16_t read_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

// The first rows of a product with a quantised panel, if there are enough of them for tiles; returns how many they are.
int multiply_tiles([[maybe_unused]] const Matrix& matrix, [[maybe_unused]] const uint8_t* panel,
                   [[maybe_unused]] const Activations& x, [[maybe_unused]] float* acc, [[maybe_unused]] uint8_t* unpacked) {
  int row = 0;
#if MILL_AMX
  if (!unpacked || x.rows < kFewestTileRows) return 0;
  const int groups = matrix.inputs / kGroup;
  const bool nibbles = matrix.kind == Kind::Q4;
  if (nibbles) unpack_nibbles(panel + 64, kQ4GroupBytes, groups, unpacked);
  TilePanel tiles{groups, panel, nibbles ? kQ4GroupBytes : 2 * kLanes, nibbles ? unpacked : panel + q8_header_bytes(groups),
                  panel + matrix.panel_bytes, matrix.panel_bytes / size_t(groups)};
  for (; x.rows - row >= kFewestTileRows; row += kTileRows) {
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

void multiply_panel(const Matrix& matrix, const uint8_t* panel, const Activations& x, float* acc, uint8_t* unpacked) {
  const int groups = matrix.inputs / kGroup;
  switch (matrix.kind) {
    case Kind::Q4_0:  // described as Q4
    case Kind::Q4:
      return by_rows(multiply_tiles(matrix, panel, x, acc, unpacked), x.rows,
                     [&](auto count, int row) { multiply_q4<count>(panel, groups, x, row, acc); });
    case Kind::Q8:
      return by_rows(multiply_tiles(matrix, panel, x, acc, unpacked), x.rows,
                     [&](auto count, int row) { multiply_q8<count>(panel, groups, x, row, acc); });
    case Kind::F32: return multiply_float<Kind::F32>(panel, matrix.inputs, x, acc);
    case Kind::F16: return multiply_float<Kind::F16>(panel, matrix.inputs, x, acc);
    case Kind::BF16: return multiply_float<Kind::BF16>(panel, matrix.inputs, x, acc);
  }
}

void Activations::reserve(int inputs, bool keep_plain) {
  q.resize(size_t(inputs) * kPassRows);
  scale.resize(size_t(inputs / kGroup) * kPassRows);
  sum.resize(size_t(inputs / kGroup) * kPassRows);
  offset.resize(size_t(inputs / kGroup) * kPassRows);
  if (keep_plain) plain.resize(size_t(inputs) * kPassRows);
}

void Activations::set_group(int row, int group, int inputs, const float* values) {
  const Lanes a = load(values), b = load(values + kLanes);
  if (!plain.empty()) {
    float* const kept = plain.data() + size_t(row) * inputs + size_t(group) * kGroup;
    store(kept, a), store(kept + kLanes, b);
  }
  const float step = largest_of(largest(magnitude(a), magnitude(b))) / 127.0f;
  const size_t at = size_t(group) * rows + row;
  if (step < FLT_MIN) {  // a quotient by a denormal step could leave the range of int8
    std::memset(q.data() + at * kGroup, 0, kGroup);
    scale[at] = sum[at] = 0.0f;
    offset[at] = 0;
    return;
  }
  const int32_t total = store_int8(q.data() + at * kGroup, a / splat(step), b / splat(step));
  scale[at] = step;
  sum[at] = step * float(total);
  offset[at] = -128 * total;
}

void Matrix::describe(int32_t ggml_type, int outputs_, int inputs_, int panels_per_unit_) {
  kind = Kind(ggml_type) == Kind::Q4_0 ? Kind::Q4 : Kind(ggml_type);
  outputs = outputs_;
  inputs = inputs_;
  panels_per_unit = panels_per_unit_;
  const size_t groups = size_t(inputs) / kGroup;
  switch (kind) {
    case Kind::Q4_0:
    case Kind::Q4: panel_bytes = groups * kQ4GroupBytes; break;
    case Kind::Q8: panel_bytes = q8_header_bytes(int(groups)) + groups * kQ8LineBytes; break;
    case Kind::F32: panel_bytes = size_t(inputs) * kLanes * 4; break;
    case Kind::F16:
    case Kind::BF16: panel_bytes = size_t(inputs) * kLanes * 2; break;
  }
  unit_stride = panel_bytes * size_t(panels_per_unit);
}

void Matrix::repack(int thread, uint8_t* region, const void* source, int32_t ggml_type) {
  Share& share = shares[size_t(thread)];
  share.base = region + share.offset;
  const bool q4_0 = Kind(ggml_type) == Kind::Q4_0;
  const int groups = inputs / kGroup;
  for (int index = share.first; index < share.last; index++) {
    uint8_t* const to = panel(share, index);
    for (int n = 0; n < kLanes; n++) {
      const size_t output = size_t(index) * kLanes + size_t(n);
      if (output >= size_t(outputs)) break;  // the region starts as zeros
      if (kind == Kind::Q4) {
        const size_t block_bytes = q4_0 ? 18 : 20;
        const uint8_t* from = (const uint8_t*)source + output * size_t(groups) * block_bytes;
        for (int g = 0; g < groups; g++, from += block_bytes) {
          uint8_t* const group = to + size_t(g) * kQ4GroupBytes;
          const uint16_t scale = read_half(from);
          // exact unless the scale is above 8190, which would be infinite in fp16
          const uint16_t minimum = q4_0 ? float_to_half(-8.0f * half_to_float(scale)) : read_half(from + 2);
          std::memcpy(group + 2 * n, &scale, 2);
          std::memcpy(group + 2 * (kLanes + n), &minimum, 2);
          const uint8_t* const nibbles = from + block_bytes - 16;  // byte b: inputs b (low) and b + 16 (high)
          for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
              const int low = 8 * i + j, high = low + 4;
              const uint8_t first = low < 16 ? nibbles[low] & 15 : nibbles[low - 16] >> 4;
              const uint8_t second = high < 16 ? nibbles[high] & 15 : nibbles[high - 16] >> 4;
              group[64 + 64 * i + 4 * n + j] = uint8_t(first | second << 4);
            }
        }
      } else if (kind == Kind::Q8) {
        const uint8_t* from = (const uint8_t*)source + output * size_t(groups) * 34;
        uint8_t* lines = to + q8_header_bytes(groups);
        for (int g = 0; g < groups; g++, from += 34, lines += kQ8LineBytes) {
          std::memcpy(to + 2 * (size_t(g) * kLanes + size_t(n)), from, 2);
          for (int i = 0; i < 8; i++) std::memcpy(lines + 64 * i + 4 * n, from + 2 + 4 * i, 4);
        }
      } else {
        const size_t bytes = kind == Kind::F32 ? 4 : 2;
        const uint8_t* from = (const uint8_t*)source + output * size_t(inputs) * bytes;
        for (size_t k = 0; k < size_t(inputs); k++) std::memcpy(to + (k * kLanes + size_t(n)) * bytes, from + k * bytes, bytes);
      }
    }
  }
}

void Matrix::row(int index, float* values) const {
  const Share* share = shares.data();
  while (index / kLanes >= share->last) share++;
  const uint8_t* const from = panel(*share, index / kLanes);
  const int n = index % kLanes, groups = inputs / kGroup;
  for (int k = 0; k < inputs; k++) {
    const int g = k / kGroup, at = k % kGroup;
    switch (kind) {
      case Kind::Q4_0:
      case Kind::Q4: {
        const uint8_t* const group = from + size_t(g) * kQ4GroupBytes;
        const uint8_t pair = group[64 + at / 8 * 64 + 4 * n + at % 4];
        const int q = at % 8 < 4 ? pair & 15 : pair >> 4;
        values[k] = std::fma(half_to_float(read_half(group + 2 * n)), float(q), half_to_float(read_half(group + 2 * (kLanes + n))));
        break;
      }
      case Kind::Q8: {
        const uint8_t* const lines = from + q8_header_bytes(groups) + size_t(g) * kQ8LineBytes;
        values[k] = half_to_float(read_half(from + 2 * (g * kLanes + n))) * float(int8_t(lines[at / 4 * 64 + 4 * n + at % 4]));
        break;
      }
      case Kind::F32: std::memcpy(&values[k], from + (size_t(k) * kLanes + size_t(n)) * 4, 4); break;
      case Kind::F16: values[k] = half_to_float(read_half(from + (size_t(k) * kLanes + size_t(n)) * 2)); break;
      case Kind::BF16: values[k] = bits_to_float(uint32_t(read_half(from + (size_t(k) * kLanes + size_t(n)) * 2)) << 16); break;
    }
  }
}

}  // namespace mill
