// Compares the emulated AVX-512 instructions with those of SIMDe, another project's emulation, on random and odd numbers.
// Compiled with emulated_avx512.hpp before it; ends with 1 after naming the first instruction that differs.
#include <simde/x86/avx512/abs.h>
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/and.h>
#include <simde/x86/avx512/cvts.h>
#include <simde/x86/avx512/div.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/max.h>
#include <simde/x86/avx512/min.h>
#include <simde/x86/avx512/mul.h>
#include <simde/x86/avx512/roundscale.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/shuffle.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/srli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>
#include <simde/x86/avx512/xor.h>

#include <random>

namespace {

template <typename Ours, typename Theirs>
void expect_same(const char* name, const Ours& ours, const Theirs& theirs) {
  static_assert(sizeof ours == sizeof theirs);
  if (std::memcmp(&ours, &theirs, sizeof ours) == 0) return;
  std::printf("%s differs\n", name);
  std::exit(1);
}

const float kOdd[] = {0.0f, -0.0f, 0.5f, -1.5f, 2.5f, 1e-42f, -3e38f, INFINITY, -INFINITY, 127.5f, 8388609.0f};

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int round = 0; round < 1000; round++) {
    uint32_t bits[3][16];
    float numbers[3][16];
    for (int which = 0; which < 3; which++)
      for (int i = 0; i < 16; i++) {
        bits[which][i] = uint32_t(random());
        const uint32_t choice = uint32_t(random()) % 64;
        numbers[which][i] = choice < std::size(kOdd) ? kOdd[choice] : std::ldexp(float(int32_t(random())), int(choice) - 60);
      }
    const __m512i a = _mm512_loadu_si512(bits[0]), b = _mm512_loadu_si512(bits[1]), c = _mm512_loadu_si512(bits[2]);
    const simde__m512i s = simde_mm512_loadu_si512(bits[0]), t = simde_mm512_loadu_si512(bits[1]), u = simde_mm512_loadu_si512(bits[2]);
    expect_same("dpbusd", _mm512_dpbusd_epi32(a, b, c), simde_mm512_dpbusd_epi32(s, t, u));
    expect_same("add_epi32", _mm512_add_epi32(a, b), simde_mm512_add_epi32(s, t));
    expect_same("and_si512", _mm512_and_si512(a, b), simde_mm512_and_si512(s, t));
    expect_same("xor_si512", _mm512_xor_si512(a, b), simde_mm512_xor_si512(s, t));
    expect_same("min_epi32", _mm512_min_epi32(a, b), simde_mm512_min_epi32(s, t));
    expect_same("max_epi32", _mm512_max_epi32(a, b), simde_mm512_max_epi32(s, t));
    expect_same("shuffle_epi8", _mm512_shuffle_epi8(a, b), simde_mm512_shuffle_epi8(s, t));
    expect_same("slli_epi32", _mm512_slli_epi32(a, 23), simde_mm512_slli_epi32(s, 23));
    expect_same("srli_epi16", _mm512_srli_epi16(a, 4), simde_mm512_srli_epi16(s, 4));
    expect_same("cvtsepi32_epi8", _mm512_cvtsepi32_epi8(a), simde_mm512_cvtsepi32_epi8(s));
    expect_same("set1_epi8", _mm512_set1_epi8(int8_t(bits[0][0])), simde_mm512_set1_epi8(int8_t(bits[0][0])));
    expect_same("set1_epi32", _mm512_set1_epi32(int32_t(bits[0][0])), simde_mm512_set1_epi32(int32_t(bits[0][0])));

    const __m512 x = _mm512_loadu_ps(numbers[0]), y = _mm512_loadu_ps(numbers[1]), z = _mm512_loadu_ps(numbers[2]);
    const simde__m512 p = simde_mm512_loadu_ps(numbers[0]), q = simde_mm512_loadu_ps(numbers[1]), r = simde_mm512_loadu_ps(numbers[2]);
    expect_same("add_ps", _mm512_add_ps(x, y), simde_mm512_add_ps(p, q));
    expect_same("sub_ps", _mm512_sub_ps(x, y), simde_mm512_sub_ps(p, q));
    expect_same("mul_ps", _mm512_mul_ps(x, y), simde_mm512_mul_ps(p, q));
    expect_same("div_ps", _mm512_div_ps(x, y), simde_mm512_div_ps(p, q));
    expect_same("max_ps", _mm512_max_ps(x, y), simde_mm512_max_ps(p, q));
    expect_same("min_ps", _mm512_min_ps(x, y), simde_mm512_min_ps(p, q));
    // SIMDe keeps the sign of -0 where the instruction clears it.
    const __m512 zero = _mm512_set1_ps(0.0f);
    expect_same("abs_ps", _mm512_add_ps(_mm512_abs_ps(x), zero), simde_mm512_add_ps(simde_mm512_abs_ps(p), simde_mm512_set1_ps(0.0f)));
    expect_same("fmadd_ps", _mm512_fmadd_ps(x, y, z), simde_mm512_fmadd_ps(p, q, r));
    expect_same("roundscale_ps", _mm512_roundscale_ps(x, _MM_FROUND_NO_EXC), simde_mm512_roundscale_ps(p, _MM_FROUND_NO_EXC));
    expect_same("set1_ps", _mm512_set1_ps(numbers[0][0]), simde_mm512_set1_ps(numbers[0][0]));
  }
}
