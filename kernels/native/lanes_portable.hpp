// Sixteen float32 lanes as an array, for any CPU. Part of lanes.hpp, which has the rules.
#pragma once

namespace mill {

struct Lanes {
  float at[kLanes];
};

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
MILL_INLINE Lanes load_exponents(const uint8_t* p) { MILL_EACH(exponent_to_float(p[i])); }
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

}  // namespace mill
