// Sixteen float32 lanes: the unit in which every floating-point number of a step is computed.
//
// Rule: an operation here rounds exactly once per lane, so every instruction set gives the same bits. Sums across lanes
// use one fixed tree. Nothing is contracted behind our back (-ffp-contract=off); a fused multiply-add is written `fma`.
// Another instruction set is another block of these few functions (AVX-512: one register), and no other change.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MILL_AVX2 1
#include <immintrin.h>
#endif

namespace mill {

constexpr int kLanes = 16;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// IEEE binary16 to binary32, exact.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13 | (fraction ? 0x400000 : 0));
  if (exponent == 0) return bits_to_float(float_to_bits(float(fraction) * 0x1p-24f) | sign);
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// binary32 to binary16, to nearest even; the caller has clamped to +-65504.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude < 0x38800000)  // below 2^-14: a multiple of 2^-24
    return uint16_t(sign | uint32_t(std::nearbyint(bits_to_float(magnitude) * 0x1p24f)));
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestFp8 = 448.0f;

// binary32 to e4m3 (bias 7, no infinity), to nearest even; the caller has clamped to +-448. No branch: it vectorises.
inline uint8_t float_to_fp8(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - 960;
  const uint32_t tiny = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000;  // below 2^-6: a multiple of 2^-9
  return uint8_t((bits >> 24 & 0x80) | (magnitude < 0x3C800000 ? tiny : normal));
}

#if MILL_AVX2

struct Lanes {
  __m256 low, high;
};

#define MILL_INLINE inline __attribute__((always_inline))
MILL_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MILL_INLINE void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
MILL_INLINE Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MILL_INLINE Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
MILL_INLINE Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }
MILL_INLINE Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
MILL_INLINE Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)}; }
MILL_INLINE Lanes fma(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
MILL_INLINE Lanes largest(Lanes x, Lanes y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
MILL_INLINE Lanes smallest(Lanes x, Lanes y) { return {_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)}; }
MILL_INLINE Lanes magnitude(Lanes x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  return {_mm256_and_ps(x.low, mask), _mm256_and_ps(x.high, mask)};
}
MILL_INLINE Lanes to_integer(Lanes x) {  // nearest, ties to even
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MILL_INLINE Lanes power_of_two(Lanes n) {  // integers -126..127
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.low), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.high), bias), 23))};
}
MILL_INLINE Lanes load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
MILL_INLINE Lanes load_bfloat(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1)), 16))};
}
MILL_INLINE Lanes load_int8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
// e4m3 divided by 256: its bits are those of an fp16 number, after the sign has moved.
MILL_INLINE Lanes load_fp8(const uint8_t* p) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xBFFF)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
MILL_INLINE void store_half(uint16_t* p, Lanes x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds 32 numbers of magnitude at most 127.5 to int8, ties to even; returns their sum.
MILL_INLINE int32_t store_int8(int8_t* p, Lanes x, Lanes y) {
  const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(y.low), _mm256_cvtps_epi32(y.high));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
  const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

#else

struct Lanes {
  float at[kLanes];
};

#define MILL_INLINE inline
#define MILL_EACH(expression)                  \
  Lanes result;                                \
  for (int i = 0; i < kLanes; i++) result.at[i] = (expression); \
  return result
MILL_INLINE Lanes load(const float* p) { MILL_EACH(p[i]); }
MILL_INLINE void store(float* p, Lanes x) { std::memcpy(p, x.at, sizeof x.at); }
MILL_INLINE Lanes splat(float x) { MILL_EACH(x); }
MILL_INLINE Lanes operator+(Lanes x, Lanes y) { MILL_EACH(x.at[i] + y.at[i]); }
MILL_INLINE Lanes operator-(Lanes x, Lanes y) { MILL_EACH(x.at[i] - y.at[i]); }
MILL_INLINE Lanes operator*(Lanes x, Lanes y) { MILL_EACH(x.at[i] * y.at[i]); }
MILL_INLINE Lanes operator/(Lanes x, Lanes y) { MILL_EACH(x.at[i] / y.at[i]); }
MILL_INLINE Lanes fma(Lanes x, Lanes y, Lanes z) { MILL_EACH(std::fma(x.at[i], y.at[i], z.at[i])); }
MILL_INLINE Lanes largest(Lanes x, Lanes y) { MILL_EACH(x.at[i] > y.at[i] ? x.at[i] : y.at[i]); }
MILL_INLINE Lanes smallest(Lanes x, Lanes y) { MILL_EACH(x.at[i] < y.at[i] ? x.at[i] : y.at[i]); }
MILL_INLINE Lanes magnitude(Lanes x) { MILL_EACH(std::fabs(x.at[i])); }
MILL_INLINE Lanes to_integer(Lanes x) { MILL_EACH(std::nearbyint(x.at[i])); }
MILL_INLINE Lanes power_of_two(Lanes n) { MILL_EACH(bits_to_float(uint32_t(int32_t(n.at[i]) + 127) << 23)); }
MILL_INLINE Lanes load_half(const uint16_t* p) { MILL_EACH(half_to_float(p[i])); }
MILL_INLINE Lanes load_bfloat(const uint16_t* p) { MILL_EACH(bits_to_float(uint32_t(p[i]) << 16)); }
MILL_INLINE Lanes load_int8(const int8_t* p) { MILL_EACH(float(p[i])); }
MILL_INLINE Lanes load_fp8(const uint8_t* p) { MILL_EACH(half_to_float(uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7))); }
MILL_INLINE void store_half(uint16_t* p, Lanes x) {
  for (int i = 0; i < kLanes; i++) p[i] = float_to_half(x.at[i]);
}
MILL_INLINE int32_t store_int8(int8_t* p, Lanes x, Lanes y) {
  int32_t sum = 0;
  for (int i = 0; i < 2 * kLanes; i++) {
    p[i] = int8_t(std::nearbyint(i < kLanes ? x.at[i] : y.at[i - kLanes]));
    sum += p[i];
  }
  return sum;
}

#endif

// The one order in which lanes are added: i with i + 8, then i + 4, i + 2, i + 1.
inline float sum_of(Lanes x) {
  float at[kLanes];
  store(at, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) at[i] += at[i + half];
  return at[0];
}

inline float largest_of(Lanes x) {
  float at[kLanes];
  store(at, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) at[i] = at[i] > at[i + half] ? at[i] : at[i + half];
  return at[0];
}

// e^x within 2 units in the last place; x is clamped to [-87, 88], so the result is normal and finite.
MILL_INLINE Lanes exponential(Lanes x) {
  x = largest(smallest(x, splat(88.0f)), splat(-87.0f));
  const Lanes n = to_integer(x * splat(1.44269504f));
  Lanes r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes sum = splat(1.0f / 720);
  sum = fma(sum, r, splat(1.0f / 120));
  sum = fma(sum, r, splat(1.0f / 24));
  sum = fma(sum, r, splat(1.0f / 6));
  sum = fma(sum, r, splat(0.5f));
  sum = fma(sum, r, splat(1.0f));
  sum = fma(sum, r, splat(1.0f));
  return sum * power_of_two(n);
}

}  // namespace mill
