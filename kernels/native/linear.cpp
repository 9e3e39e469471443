// Panels: packing, reading back, and the products. See linear.hpp for the layout and the arithmetic.
#include "linear.hpp"

#include <algorithm>
#include <cfloat>

namespace mill {

namespace {

constexpr size_t kQ4GroupBytes = 320, kQ8LineBytes = 512;
// 2-8 KB ahead were all alike on the machines tried; without it a single row is 10-20 % slower.
constexpr int kPrefetchAhead = 4096;

size_t q8_header_bytes(int groups) { return (size_t(groups) * 2 * kLanes + 63) / 64 * 64; }

MILL_INLINE void prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 3); }

#if MILL_AVX2

MILL_INLINE __m256i line(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
MILL_INLINE __m256i four_inputs(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Keeps a value in its register. Left alone, gcc reassociates the sums of a group and spills every product, and reads
// weights from memory once per row: three times slower.
MILL_INLINE __m256i kept(__m256i x) {
  asm("" : "+x"(x));
  return x;
}

// Eight products of at most 15 * 127 * 2 stay below 2^15, so a whole group is summed in int16.
template <int R>
struct Q4Dots {
  __m256i low[R], high[R];

  MILL_INLINE void quad(int i, __m256i weights_low, __m256i weights_high, const int8_t* x) {
    weights_low = kept(weights_low), weights_high = kept(weights_high);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i inputs = four_inputs(x + r * kGroup + 4 * i);
      const __m256i a = _mm256_maddubs_epi16(weights_low, inputs), b = _mm256_maddubs_epi16(weights_high, inputs);
      low[r] = kept(i ? _mm256_add_epi16(low[r], a) : a);
      high[r] = kept(i ? _mm256_add_epi16(high[r], b) : b);
    }
  }
  MILL_INLINE Lanes total(int r) const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(low[r], ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(high[r], ones))};
  }
};

// |w| <= 128 and |x| <= 127: a pair of products is at most 32512, so int16 does not saturate.
template <int R>
struct Q8Dots {
  __m256i low[R], high[R];

  MILL_INLINE void quad(int i, const uint8_t* lines, const int8_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i a = kept(line(lines + 64 * i)), b = kept(line(lines + 64 * i + 32));
    const __m256i a_size = kept(_mm256_abs_epi8(a)), b_size = kept(_mm256_abs_epi8(b));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i inputs = four_inputs(x + r * kGroup + 4 * i);
      const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(a_size, _mm256_sign_epi8(inputs, a)), ones);
      const __m256i q = _mm256_madd_epi16(_mm256_maddubs_epi16(b_size, _mm256_sign_epi8(inputs, b)), ones);
      low[r] = kept(i ? _mm256_add_epi32(low[r], p) : p);
      high[r] = kept(i ? _mm256_add_epi32(high[r], q) : q);
    }
  }
  MILL_INLINE Lanes total(int r) const { return {_mm256_cvtepi32_ps(low[r]), _mm256_cvtepi32_ps(high[r])}; }
};

MILL_INLINE void unpack_line(const uint8_t* lines, int i, __m256i quads[4]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i a = line(lines + 64 * i), b = line(lines + 64 * i + 32);
  quads[0] = _mm256_and_si256(a, nibble);
  quads[1] = _mm256_and_si256(b, nibble);
  quads[2] = _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble);
  quads[3] = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
}

// The int32 dots of R rows with one packed group (64-byte lines after the scales).
template <int R>
MILL_INLINE void q4_dots(const uint8_t* lines, const int8_t* x, Lanes dots[R]) {
  Q4Dots<R> sums;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256i quads[4];
    unpack_line(lines, i, quads);
    sums.quad(2 * i, quads[0], quads[1], x);
    sums.quad(2 * i + 1, quads[2], quads[3], x);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = sums.total(r);
}

template <int R>
MILL_INLINE void q8_dots(const uint8_t* lines, const int8_t* x, Lanes dots[R]) {
  Q8Dots<R> sums;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) sums.quad(i, lines, x);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = sums.total(r);
}

#else

template <int R>
void q4_dots(const uint8_t* lines, const int8_t* x, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot = 0;
      for (int k = 0; k < kGroup; k++) {
        const uint8_t pair = lines[k / 8 * 64 + 4 * n + k % 4];
        dot += int32_t(k % 8 < 4 ? pair & 15 : pair >> 4) * x[r * kGroup + k];
      }
      dots[r].at[n] = float(dot);
    }
}

template <int R>
void q8_dots(const uint8_t* lines, const int8_t* x, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot = 0;
      for (int k = 0; k < kGroup; k++) dot += int32_t(int8_t(lines[k / 4 * 64 + 4 * n + k % 4])) * x[r * kGroup + k];
      dots[r].at[n] = float(dot);
    }
}

#endif

// Where the rows of one group lie, from `row` on.
struct GroupRows {
  const int8_t* q;
  const float *scale, *sum;

  GroupRows(const Activations& x, int group, int row) {
    const size_t at = size_t(group) * size_t(x.rows) + size_t(row);
    q = x.q.data() + at * kGroup;
    scale = x.scale.data() + at;
    sum = x.sum.data() + at;
  }
};

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
    const GroupRows group(x, g, row);
    Lanes dots[R];
    q4_dots<R>(panel + 64, group.q, dots);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      sums[r] = fma(scale * splat(group.scale[r]), dots[r], sums[r]);
      sums[r] = fma(minimum, splat(group.sum[r]), sums[r]);
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
    const GroupRows group(x, g, row);
    Lanes dots[R];
    q8_dots<R>(lines, group.q, dots);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = fma(scale * splat(group.scale[r]), dots[r], sums[r]);
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
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[r] = fma(weights, splat(x[size_t(r) * inputs + k]), sums[r]);
  }
  for (int r = 0; r < R; r++) store(acc + r * kLanes, sums[r]);
}

template <Kind K>
void multiply_float(const uint8_t* panel, int inputs, const Activations& x, float* acc) {
  const float* rows = x.plain.data();
  int row = 0;
  for (; row + 4 <= x.rows; row += 4) multiply_float_rows<K, 4>(panel, inputs, rows + size_t(row) * inputs, acc + row * kLanes);
  for (; row < x.rows; row++) multiply_float_rows<K, 1>(panel, inputs, rows + size_t(row) * inputs, acc + row * kLanes);
}

uint16_t read_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

}  // namespace

void multiply_panel(const Matrix& matrix, const uint8_t* panel, const Activations& x, float* acc) {
  const int groups = matrix.inputs / kGroup;
  int row = 0;
  switch (matrix.kind) {
    case Kind::Q4_0:  // described as Q4
    case Kind::Q4:
      for (; row + 4 <= x.rows; row += 4) multiply_q4<4>(panel, groups, x, row, acc);
      switch (x.rows - row) {
        case 3: return multiply_q4<3>(panel, groups, x, row, acc);
        case 2: return multiply_q4<2>(panel, groups, x, row, acc);
        case 1: return multiply_q4<1>(panel, groups, x, row, acc);
      }
      return;
    case Kind::Q8:
      for (; row + 4 <= x.rows; row += 4) multiply_q8<4>(panel, groups, x, row, acc);
      switch (x.rows - row) {
        case 3: return multiply_q8<3>(panel, groups, x, row, acc);
        case 2: return multiply_q8<2>(panel, groups, x, row, acc);
        case 1: return multiply_q8<1>(panel, groups, x, row, acc);
      }
      return;
    case Kind::F32: return multiply_float<Kind::F32>(panel, matrix.inputs, x, acc);
    case Kind::F16: return multiply_float<Kind::F16>(panel, matrix.inputs, x, acc);
    case Kind::BF16: return multiply_float<Kind::BF16>(panel, matrix.inputs, x, acc);
  }
}

void Activations::reserve(int inputs, bool keep_plain) {
  q.resize(size_t(inputs) * kPassRows);
  scale.resize(size_t(inputs / kGroup) * kPassRows);
  sum.resize(size_t(inputs / kGroup) * kPassRows);
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
    return;
  }
  scale[at] = step;
  sum[at] = step * float(store_int8(q.data() + at * kGroup, a / splat(step), b / splat(step)));
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
