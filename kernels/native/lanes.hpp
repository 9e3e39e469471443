// Sixteen float32 lanes: the unit in which every floating-point number of a step is computed.
//
// Rule: an operation here rounds exactly once per lane, so every instruction set gives the same bits. Sums across lanes
// use one fixed tree. Nothing is contracted behind our back (-ffp-contract=off); a fused multiply-add is written `fma`.
// Another instruction set is another lanes_*.hpp with these few functions, and another section of dots.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The compiler's flags decide; each level has all that the one below has.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MILL_AVX512 1
#endif
#if MILL_AVX512 && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define MILL_AMX 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MILL_AVX2 1
#if defined(__GNUC__) && !defined(__clang__)  // gcc 12 warns of values that its own header leaves undefined on purpose
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#define MILL_INLINE inline __attribute__((always_inline))
#else
#define MILL_INLINE inline
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

// 2^(exponent - 128), of weights that are counted in halves: MXFP4. 2^-128 and 2^-127 are no normal numbers.
inline float exponent_to_float(uint8_t exponent) {
  return bits_to_float(exponent < 2 ? 0x00200000u << exponent : uint32_t(exponent - 1) << 23);
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

}  // namespace mill

#if MILL_AVX512
#include "lanes_avx512.hpp"
#elif MILL_AVX2
#include "lanes_avx2.hpp"
#else
#include "lanes_portable.hpp"
#endif

namespace mill {

// The one order in which lanes are added: i with i + 8, then i + 4, i + 2, i + 1. The largest: by the same tree, in each pair
// the second unless the first is greater.
#if MILL_AVX2
template <typename Join>
MILL_INLINE float joined(__m256 eight, Join join) {  // join(first, second), on four lanes
  __m128 x = join(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = join(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(join(x, _mm_movehdup_ps(x)));
}
MILL_INLINE float sum_of(Lanes x) {
  return joined(_mm256_add_ps(lower(x), upper(x)), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
MILL_INLINE float largest_of(Lanes x) {
  return joined(_mm256_max_ps(lower(x), upper(x)), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
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
#endif

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
