// Sixteen float32 lanes as one AVX-512 register. Part of lanes.hpp, which has the rules.
#pragma once

namespace mill {

struct Lanes {
  __m512 all;
};

MILL_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
MILL_INLINE void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.all); }
MILL_INLINE __m256 lower(Lanes x) { return _mm512_castps512_ps256(x.all); }
MILL_INLINE __m256 upper(Lanes x) { return _mm512_extractf32x8_ps(x.all, 1); }
MILL_INLINE Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
MILL_INLINE Lanes operator+(Lanes x, Lanes y) { return {_mm512_add_ps(x.all, y.all)}; }
MILL_INLINE Lanes operator-(Lanes x, Lanes y) { return {_mm512_sub_ps(x.all, y.all)}; }
MILL_INLINE Lanes operator*(Lanes x, Lanes y) { return {_mm512_mul_ps(x.all, y.all)}; }
MILL_INLINE Lanes operator/(Lanes x, Lanes y) { return {_mm512_div_ps(x.all, y.all)}; }
MILL_INLINE Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm512_fmadd_ps(x.all, y.all, z.all)}; }
MILL_INLINE Lanes largest(Lanes x, Lanes y) { return {_mm512_max_ps(x.all, y.all)}; }
MILL_INLINE Lanes smallest(Lanes x, Lanes y) { return {_mm512_min_ps(x.all, y.all)}; }
MILL_INLINE Lanes magnitude(Lanes x) { return {_mm512_abs_ps(x.all)}; }
MILL_INLINE Lanes to_integer(Lanes x) {  // nearest, ties to even
  return {_mm512_roundscale_ps(x.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MILL_INLINE Lanes power_of_two(Lanes n) {  // integers -126..127
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.all), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
MILL_INLINE Lanes load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
MILL_INLINE Lanes load_bfloat(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
MILL_INLINE Lanes load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// As exponent_to_float: below 2 the first operand of the maximum is 0 or negative.
MILL_INLINE Lanes load_exponents(const uint8_t* p) {
  const __m512i exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i least = _mm512_min_epi32(exponents, _mm512_set1_epi32(1));
  const __m512i tiny = _mm512_add_epi32(_mm512_slli_epi32(least, 21), _mm512_set1_epi32(0x00200000));
  const __m512i normal = _mm512_slli_epi32(_mm512_add_epi32(exponents, _mm512_set1_epi32(-1)), 23);
  return {_mm512_castsi512_ps(_mm512_max_epi32(normal, tiny))};
}
// e4m3 divided by 256: its bits are those of an fp16 number, after the sign has moved.
MILL_INLINE Lanes load_fp8(const uint8_t* p) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xBFFF))))};
}
MILL_INLINE void store_half(uint16_t* p, Lanes x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.all, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds 32 numbers of magnitude at most 127.5 to int8, ties to even; returns their sum.
MILL_INLINE int32_t store_int8(int8_t* p, Lanes x, Lanes y) {
  const __m512i a = _mm512_cvtps_epi32(x.all), b = _mm512_cvtps_epi32(y.all);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a));
  _mm_storeu_si128((__m128i*)p + 1, _mm512_cvtsepi32_epi8(b));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

}  // namespace mill
