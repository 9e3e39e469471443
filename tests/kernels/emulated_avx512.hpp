// AVX-512 and AMX for a CPU that has neither: every instruction of the native step, written down from its definition.
//
// Included before anything else (-include), it takes the place of the compiler's own intrinsics; the step's sources do not
// know. Misuse that a real CPU would answer with a fault (tiles that were not laid out, or do not fit) ends the process.
// The environment variable MILL_TILES_DENIED plays a Linux that permits no tiles.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define MILL_AVX512 1
#define MILL_AMX 1

namespace emulated {

struct alignas(64) Floats {
  float at[16];
};

struct alignas(64) Integers {
  int32_t at[16];
};

template <typename To, typename From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename To, typename From, typename Operation>
To lane_by_lane(const From& from, Operation operation) {
  To to;
  for (int i = 0; i < 16; i++) to.at[i] = operation(from.at[i]);
  return to;
}

template <typename Lanes, typename Operation>
Lanes lane_by_lane(const Lanes& x, const Lanes& y, Operation operation) {
  Lanes to;
  for (int i = 0; i < 16; i++) to.at[i] = operation(x.at[i], y.at[i]);
  return to;
}

template <typename Lanes>
Lanes load(const void* p) {
  Lanes to;
  std::memcpy(&to, p, 64);
  return to;
}

inline Integers load_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();
  return load<Integers>(p);
}

template <typename Lanes>
void store(void* p, const Lanes& x) {
  std::memcpy(p, &x, 64);
}

inline Floats add(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a + b; }); }
inline Floats sub(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a - b; }); }
inline Floats mul(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a * b; }); }
inline Floats div(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a / b; }); }
// The second one where they do not compare.
inline Floats max(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a > b ? a : b; }); }
inline Floats min(Floats x, Floats y) { return lane_by_lane(x, y, [](float a, float b) { return a < b ? a : b; }); }
inline Floats magnitude(Floats x) { return lane_by_lane<Floats>(x, [](float a) { return std::fabs(a); }); }
inline Floats fmadd(Floats x, Floats y, Floats z) {
  Floats to;
  for (int i = 0; i < 16; i++) to.at[i] = std::fma(x.at[i], y.at[i], z.at[i]);
  return to;
}
template <int Control>
Floats roundscale(Floats x) {
  static_assert(Control == _MM_FROUND_NO_EXC, "to whole numbers, nearest even, without exceptions");
  return lane_by_lane<Floats>(x, [](float a) { return std::nearbyint(a); });
}

inline Integers add(Integers x, Integers y) {
  return lane_by_lane(x, y, [](int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); });
}
inline Integers bit_and(Integers x, Integers y) { return lane_by_lane(x, y, [](int32_t a, int32_t b) { return a & b; }); }
inline Integers bit_xor(Integers x, Integers y) { return lane_by_lane(x, y, [](int32_t a, int32_t b) { return a ^ b; }); }
inline Integers least(Integers x, Integers y) { return lane_by_lane(x, y, [](int32_t a, int32_t b) { return a < b ? a : b; }); }
inline Integers most(Integers x, Integers y) { return lane_by_lane(x, y, [](int32_t a, int32_t b) { return a > b ? a : b; }); }
// Of each sixteen bytes those that the lowest four bits of `places` name; 0 where their highest bit is set.
inline Integers shuffle_bytes(Integers x, Integers places) {
  uint8_t from[64], at[64], to[64];
  std::memcpy(from, &x, 64), std::memcpy(at, &places, 64);
  for (int i = 0; i < 64; i++) to[i] = at[i] & 0x80 ? 0 : from[i / 16 * 16 + (at[i] & 15)];
  return load<Integers>(to);
}
inline Integers shift_left(Integers x, int by) {
  return lane_by_lane<Integers>(x, [=](int32_t a) { return int32_t(uint32_t(a) << by); });
}
inline Integers shift_words_right(Integers x, int by) {
  return lane_by_lane<Integers>(x, [=](int32_t a) {
    const uint32_t low = uint32_t(a) & 0xFFFF, high = uint32_t(a) >> 16;
    return int32_t(low >> by | (high >> by) << 16);
  });
}
inline int32_t reduce_add(Integers x) {
  uint32_t sum = 0;
  for (int32_t each : x.at) sum += uint32_t(each);
  return int32_t(sum);
}

// Every element of `x` and `y` is four bytes, those of `x` unsigned, of `y` signed: their products are added up.
inline Integers dpbusd(Integers sums, Integers x, Integers y) {
  for (int i = 0; i < 16; i++) {
    uint8_t unsigned_bytes[4];
    int8_t signed_bytes[4];
    std::memcpy(unsigned_bytes, &x.at[i], 4), std::memcpy(signed_bytes, &y.at[i], 4);
    for (int j = 0; j < 4; j++) sums.at[i] += int32_t(unsigned_bytes[j]) * int32_t(signed_bytes[j]);
  }
  return sums;
}

template <typename Lanes, typename Number>
Lanes all_of(Number x) {
  Lanes to;
  for (int i = 0; i < int(64 / sizeof x); i++) std::memcpy(reinterpret_cast<char*>(&to) + size_t(i) * sizeof x, &x, sizeof x);
  return to;
}

// Widening, from the narrow numbers of a smaller register.
template <typename Lanes, typename Narrow, typename Register>
Lanes widened(Register from) {
  Narrow narrow[16];
  static_assert(sizeof narrow == sizeof from);
  std::memcpy(narrow, &from, sizeof narrow);
  Lanes to;
  for (int i = 0; i < 16; i++) to.at[i] = narrow[i];
  return to;
}
inline Floats from_half(__m256i from) {
  __m128i halves[2];
  std::memcpy(halves, &from, 32);
  Floats to;
  _mm256_storeu_ps(to.at, _mm256_cvtph_ps(halves[0])), _mm256_storeu_ps(to.at + 8, _mm256_cvtph_ps(halves[1]));
  return to;
}
template <int Control>
__m256i to_half(Floats x) {
  return _mm256_setr_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(x.at), Control), _mm256_cvtps_ph(_mm256_loadu_ps(x.at + 8), Control));
}
template <int At>
__m256 half(Floats x) {
  return _mm256_loadu_ps(x.at + 8 * At);
}
inline Integers to_integers(Floats x) {
  return lane_by_lane<Integers>(x, [](float a) { return _mm_cvtss_si32(_mm_set_ss(a)); });
}
inline Floats to_floats(Integers x) {
  return lane_by_lane<Floats>(x, [](int32_t a) { return float(a); });
}
inline __m128i to_bytes_saturated(Integers x) {
  int8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = int8_t(x.at[i] > 127 ? 127 : x.at[i] < -128 ? -128 : x.at[i]);
  return as<__m128i>(bytes);
}

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t bytes[16][64] = {};
};

struct Tiles {
  bool laid_out = false;
  Tile tiles[8];
};

inline thread_local Tiles state;
inline std::atomic<bool> permitted{false};
inline std::atomic<long> products{0};

inline Tile& tile(int index) {
  if (!state.laid_out) fault("no tiles are laid out on this thread");
  if (state.tiles[index].rows == 0) fault("this tile is not laid out");
  return state.tiles[index];
}

inline void load_config(const void* config) {
  if (!permitted) fault("Linux was not asked, or has not permitted tiles");
  uint8_t bytes[64];
  std::memcpy(bytes, config, 64);
  if (bytes[0] != 1 || bytes[1] != 0) fault("palette 1 from row 0 is the only layout");
  for (int i = 2; i < 16; i++)
    if (bytes[i]) fault("reserved bytes must be 0");
  state = Tiles{true, {}};
  for (int i = 0; i < 16; i++) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    if (row_bytes > 64 || rows > 16 || !row_bytes != !rows || (i >= 8 && rows)) fault("there are 8 tiles of at most 16 rows of 64 bytes");
    if (i < 8) state.tiles[i].rows = rows, state.tiles[i].row_bytes = row_bytes;
  }
}

inline void release() { state = Tiles{}; }

inline void zero(int index) { std::memset(tile(index).bytes, 0, sizeof(Tile::bytes)); }

inline void load_tile(int index, const void* base, long stride) {
  zero(index);
  Tile& to = tile(index);
  for (int row = 0; row < to.rows; row++) std::memcpy(to.bytes[row], static_cast<const char*>(base) + row * stride, size_t(to.row_bytes));
}

inline void store_tile(int index, void* base, long stride) {
  const Tile& from = tile(index);
  for (int row = 0; row < from.rows; row++) std::memcpy(static_cast<char*>(base) + row * stride, from.bytes[row], size_t(from.row_bytes));
}

// sums[m][n] += the products of four signed bytes of x[m][k] and y[k][n], for every k.
inline void dot_tiles(int sums, int x, int y) {
  Tile& to = tile(sums);
  const Tile &left = tile(x), &right = tile(y);
  if (sums == x || sums == y || x == y) fault("three different tiles are needed");
  if (to.rows != left.rows || to.row_bytes != right.row_bytes || left.row_bytes != 4 * right.rows) fault("these tiles do not fit");
  for (int m = 0; m < to.rows; m++)
    for (int k = 0; k < right.rows; k++)
      for (int n = 0; n < to.row_bytes / 4; n++) {
        int32_t sum;
        std::memcpy(&sum, to.bytes[m] + 4 * n, 4);
        for (int j = 0; j < 4; j++) sum += int32_t(int8_t(left.bytes[m][4 * k + j])) * int32_t(int8_t(right.bytes[k][4 * n + j]));
        std::memcpy(to.bytes[m] + 4 * n, &sum, 4);
      }
  products++;
}

template <typename... Arguments>
long system_call(long number, Arguments... arguments) {
  if (number != SYS_arch_prctl) return syscall(number, arguments...);
  const long asked[] = {long(arguments)...};
  if (asked[0] != 0x1023 || asked[1] != 18) fault("the only call is for permission to use tile data");
  permitted = !std::getenv("MILL_TILES_DENIED");
  return permitted ? 0 : -1;
}

}  // namespace emulated

// How many tile products there have been, for tests to see that tiles did the work.
extern "C" __attribute__((visibility("default"), used)) inline long mill_tile_products() { return emulated::products; }

#define __m512 emulated::Floats
#define __m512i emulated::Integers
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::load<emulated::Floats>
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::store
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::all_of<emulated::Floats, float>
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul
#undef _mm512_div_ps
#define _mm512_div_ps emulated::div
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min
#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::magnitude
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::all_of<emulated::Integers, int32_t>
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::all_of<emulated::Integers, int8_t>
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::Integers
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::as<emulated::Floats>
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::shift_left
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::shift_words_right
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::bit_and
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::bit_xor
#undef _mm512_min_epi32
#define _mm512_min_epi32 emulated::least
#undef _mm512_max_epi32
#define _mm512_max_epi32 emulated::most
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated::shuffle_bytes
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::widened<emulated::Integers, uint8_t>
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::load<emulated::Integers>
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::load_aligned
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::store
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::from_half
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::widened<emulated::Integers, uint16_t>
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::widened<emulated::Integers, int8_t>
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::to_floats
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::to_integers
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8 emulated::to_bytes_saturated
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add
#undef _tile_loadconfig
#define _tile_loadconfig emulated::load_config
#undef _tile_release
#define _tile_release emulated::release
#undef _tile_zero
#define _tile_zero emulated::zero
#undef _tile_loadd
#define _tile_loadd emulated::load_tile
#undef _tile_stored
#define _tile_stored emulated::store_tile
#undef _tile_dpbssd
#define _tile_dpbssd emulated::dot_tiles
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated::half<0>
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, at) emulated::half<at>(x)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(x, control) emulated::roundscale<control>(x)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, control) emulated::to_half<control>(x)
#define syscall emulated::system_call
