// Sixteen float32 lanes as two AVX2 registers. Part of lanes.hpp, which has the rules.
#pragma once

namespace mill {

struct Lanes {
  __m256 low, high;
};

MILL_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MILL_INLINE void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
MILL_INLINE __m256 lower(Lanes x) { return x.low; }
MILL_INLINE __m256 upper(Lanes x) { return x.high; }
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
// As exponent_to_float: below 2 the first operand of the last maximum is 0 or negative.
MILL_INLINE __m256 from_exponents(__m256i exponents) {
  const __m256i one = _mm256_set1_epi32(1);
  const __m256i tiny = _mm256_add_epi32(_mm256_slli_epi32(_mm256_min_epi32(exponents, one), 21), _mm256_set1_epi32(0x00200000));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(_mm256_sub_epi32(exponents, one), 23), tiny));
}
MILL_INLINE Lanes load_exponents(const uint8_t* p) {
  return {from_exponents(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          from_exponents(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
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

}  // namespace mill
