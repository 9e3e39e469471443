// Exact int32 products of one packed group of weights with rows of activations: what instruction sets differ in most.
//
// A group is the 64-byte lines of a panel (linear.hpp) for 16 outputs and 32 inputs: 4 lines of nibbles, or 8 of bytes. R rows go
// together, their sums in registers; a row's four inputs are broadcast, and meet the same four of all 16 outputs.
//     AVX-512   vpdpbusd wants unsigned weights. Nibbles are; int8 weights become so by adding 128 (flipping their highest
//               bit), and the sum of a row starts at -128 times the sum of its inputs.
//     AVX2      pairs of products are added in int16, which no weights and inputs can overflow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lanes.hpp"

namespace mill {

constexpr int kGroup = 32;

// The rows of one group of activations that go together.
struct GroupRows {
  const int8_t* q;          // [R][32]
  const float *scale, *sum;  // [R]
  const int32_t *offset, *first_offset;  // [R]  -128 * the sum of q, and of its first half

  // To the same rows of the next group, where so many rows stand beside one another.
  MILL_INLINE void to_next_group(int rows) {
    q += size_t(rows) * kGroup, scale += rows, sum += rows, offset += rows, first_offset += rows;
  }
};

// What the nibbles of MXFP4 stand for, in halves; four times, as shuffles of bytes read it.
#define MILL_FOURS 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12
alignas(64) constexpr int8_t kFours[64] = {MILL_FOURS, MILL_FOURS, MILL_FOURS, MILL_FOURS};
#undef MILL_FOURS

// Where halves of a group have scales of their own (int8, Q6_K), the dot is scale * dot of the first half + scale * dot of
// the second: below 2^24 (128 * 32 * 127 * 32), so float32 has it exactly.

#if MILL_AVX512

// Eight sums of rows, eight running sums, scales and weights: 20 of 32 registers.
constexpr int kRowsTogether = 8;

MILL_INLINE __m512i line(const void* p) { return _mm512_loadu_si512(p); }
MILL_INLINE __m512i four_inputs(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// The two vectors of four inputs each that a line of Q4 holds.
MILL_INLINE void unpack_line(const uint8_t* at, __m512i& low, __m512i& high) {
  const __m512i nibble = _mm512_set1_epi8(15), bytes = line(at);
  low = _mm512_and_si512(bytes, nibble);
  high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
}

template <int R>
MILL_INLINE void q4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  __m512i sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512i low, high;
    unpack_line(lines + 64 * i, low, high);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], low, four_inputs(rows.q + r * kGroup + 8 * i));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], high, four_inputs(rows.q + r * kGroup + 8 * i + 4));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = {_mm512_cvtepi32_ps(sums[r])};
}

template <int R>
MILL_INLINE void q8_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  __m512i sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r] = _mm512_set1_epi32(rows.offset[r]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512i weights = _mm512_xor_si512(line(lines + 64 * i), _mm512_set1_epi8(-128));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], weights, four_inputs(rows.q + r * kGroup + 4 * i));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = {_mm512_cvtepi32_ps(sums[r])};
}

template <int R>
MILL_INLINE void half_dots(const uint8_t* lines, const GroupRows& rows, Lanes first_scale, Lanes second_scale, Lanes dots[R]) {
  __m512i first[R], second[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    first[r] = _mm512_set1_epi32(rows.first_offset[r]);
    second[r] = _mm512_set1_epi32(rows.offset[r] - rows.first_offset[r]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i flip = _mm512_set1_epi8(-128);
    const __m512i a = _mm512_xor_si512(line(lines + 64 * i), flip), b = _mm512_xor_si512(line(lines + 64 * (i + 4)), flip);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) first[r] = _mm512_dpbusd_epi32(first[r], a, four_inputs(rows.q + r * kGroup + 4 * i));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) second[r] = _mm512_dpbusd_epi32(second[r], b, four_inputs(rows.q + r * kGroup + 4 * (i + 4)));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    dots[r] = fma(second_scale, Lanes{_mm512_cvtepi32_ps(second[r])}, first_scale * Lanes{_mm512_cvtepi32_ps(first[r])});
}

// A shuffle makes numbers of nibbles, with 128 added as VNNI wants them.
template <int R>
MILL_INLINE void fp4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  const __m512i numbers = _mm512_xor_si512(line(kFours), _mm512_set1_epi8(-128));
  __m512i sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r] = _mm512_set1_epi32(rows.offset[r]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512i low, high;
    unpack_line(lines + 64 * i, low, high);
    low = _mm512_shuffle_epi8(numbers, low), high = _mm512_shuffle_epi8(numbers, high);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], low, four_inputs(rows.q + r * kGroup + 8 * i));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = _mm512_dpbusd_epi32(sums[r], high, four_inputs(rows.q + r * kGroup + 8 * i + 4));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = {_mm512_cvtepi32_ps(sums[r])};
}

#elif MILL_AVX2

constexpr int kRowsTogether = 4;

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
MILL_INLINE void q4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  Q4Dots<R> sums;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256i quads[4];
    unpack_line(lines, i, quads);
    sums.quad(2 * i, quads[0], quads[1], rows.q);
    sums.quad(2 * i + 1, quads[2], quads[3], rows.q);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = sums.total(r);
}

template <int R>
MILL_INLINE void q8_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  Q8Dots<R> sums;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) sums.quad(i, lines, rows.q);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = sums.total(r);
}

template <int R>
MILL_INLINE void half_dots(const uint8_t* lines, const GroupRows& rows, Lanes first_scale, Lanes second_scale, Lanes dots[R]) {
  Q8Dots<R> first, second;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) first.quad(i, lines, rows.q);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = first_scale * first.total(r);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) second.quad(i, lines + 4 * 64, rows.q + kGroup / 2);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = fma(second_scale, second.total(r), dots[r]);
}

// Eight products of at most 12 * 127 * 2 stay below 2^15, so a whole group is summed in int16.
template <int R>
struct Fp4Dots {
  __m256i low[R], high[R];

  MILL_INLINE void quad(int i, __m256i a, __m256i b, const int8_t* x) {
    a = kept(a), b = kept(b);
    const __m256i a_size = kept(_mm256_abs_epi8(a)), b_size = kept(_mm256_abs_epi8(b));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i inputs = four_inputs(x + r * kGroup + 4 * i);
      const __m256i p = _mm256_maddubs_epi16(a_size, _mm256_sign_epi8(inputs, a));
      const __m256i q = _mm256_maddubs_epi16(b_size, _mm256_sign_epi8(inputs, b));
      low[r] = kept(i ? _mm256_add_epi16(low[r], p) : p);
      high[r] = kept(i ? _mm256_add_epi16(high[r], q) : q);
    }
  }
  MILL_INLINE Lanes total(int r) const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(low[r], ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(high[r], ones))};
  }
};

template <int R>
MILL_INLINE void fp4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  const __m256i numbers = line(kFours);
  Fp4Dots<R> sums;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256i quads[4];
    unpack_line(lines, i, quads);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) quads[j] = _mm256_shuffle_epi8(numbers, quads[j]);
    sums.quad(2 * i, quads[0], quads[1], rows.q);
    sums.quad(2 * i + 1, quads[2], quads[3], rows.q);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) dots[r] = sums.total(r);
}

#else

constexpr int kRowsTogether = 4;

template <int R>
void q4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot = 0;
      for (int k = 0; k < kGroup; k++) {
        const uint8_t pair = lines[k / 8 * 64 + 4 * n + k % 4];
        dot += int32_t(k % 8 < 4 ? pair & 15 : pair >> 4) * rows.q[r * kGroup + k];
      }
      dots[r].at[n] = float(dot);
    }
}

template <int R>
void q8_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot = 0;
      for (int k = 0; k < kGroup; k++) dot += int32_t(int8_t(lines[k / 4 * 64 + 4 * n + k % 4])) * rows.q[r * kGroup + k];
      dots[r].at[n] = float(dot);
    }
}

template <int R>
void half_dots(const uint8_t* lines, const GroupRows& rows, Lanes first_scale, Lanes second_scale, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot[2] = {0, 0};
      for (int k = 0; k < kGroup; k++)
        dot[k / (kGroup / 2)] += int32_t(int8_t(lines[k / 4 * 64 + 4 * n + k % 4])) * rows.q[r * kGroup + k];
      dots[r].at[n] = first_scale.at[n] * float(dot[0]) + second_scale.at[n] * float(dot[1]);
    }
}

template <int R>
void fp4_dots(const uint8_t* lines, const GroupRows& rows, Lanes dots[R]) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < kLanes; n++) {
      int32_t dot = 0;
      for (int k = 0; k < kGroup; k++) {
        const uint8_t pair = lines[k / 8 * 64 + 4 * n + k % 4];
        dot += int32_t(kFours[k % 8 < 4 ? pair & 15 : pair >> 4]) * rows.q[r * kGroup + k];
      }
      dots[r].at[n] = float(dot);
    }
}

#endif

}  // namespace mill
