// Products of a panel with sixteen rows at a time, in AMX tiles.
//
// A product is one group: 16 rows x 32 inputs (A) times 32 inputs x 16 outputs (B) gives 16 x 16 exact int32 (C). B is the
// eight lines of a group as VNNI takes them: Q8 is loaded from the panel itself, Q4 is unpacked once for all rows.
// The fp32 work on C is that of linear.hpp, in the same order, so tiles change no bit. It goes on while the next group is
// in the tiles: two sets of tiles take turns.
//
// Rules: the process asks Linux once before any thread uses tiles; each thread lays them out (Tiles) before it multiplies.
// A reads sixteen rows where there are fewer: Activations holds enough for that, and what comes of them is dropped.
//
// These paths have been checked by emulation of the instructions only (docs/decisions/0010), never on a CPU that has them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.hpp"

#if MILL_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mill {

#if MILL_AMX

constexpr int kTileRows = 16;
// From how many rows on a tile beats row by row: 12, where a prototype on Sapphire Rapids found the two to cost the same.
constexpr int kFewestTileRows = 12;

// Whether this process may use tiles; asking again does no harm. Linux refuses when it is old, or an alternate signal stack
// is too small for the tiles.
inline bool tiles_permitted() {
  constexpr int ask_for_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0;
}

// The layout of one thread's tiles as ldtilecfg reads it.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 32, 32, 64, 64};  // C, C, A, A, B, B
  uint8_t rows[16] = {16, 16, 16, 16, 8, 8};
};
static_assert(sizeof(TileShapes) == 64);

// While it lives, this thread's tiles are laid out.
class Tiles {
 public:
  explicit Tiles(bool permitted) : permitted_(permitted) {
    if (!permitted_) return;
    alignas(64) const TileShapes shapes;
    const void* at = &shapes;
    asm volatile("" : "+r"(at) : : "memory");  // gcc thinks that the next line reads eight bytes
    _tile_loadconfig(at);
  }
  ~Tiles() {
    if (permitted_) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool permitted_;
};

// C[Set] = the products of one group, left in `products`. Both operands are signed: a nibble is a small positive byte.
template <int Set>
MILL_INLINE void tile_product(const int8_t* rows, const uint8_t* lines, int32_t* products) {
  if constexpr (Set == 0) {
    _tile_zero(0);
    _tile_loadd(2, rows, kGroup);
    _tile_loadd(4, lines, 64);
    _tile_dpbssd(0, 2, 4);
    _tile_stored(0, products, 64);
  } else {
    _tile_zero(1);
    _tile_loadd(3, rows, kGroup);
    _tile_loadd(5, lines, 64);
    _tile_dpbssd(1, 3, 5);
    _tile_stored(1, products, 64);
  }
}

// Every nibble of a Q4 panel as a byte, eight lines a group. `lines`: those of the first group.
inline void unpack_nibbles(const uint8_t* lines, size_t group_bytes, int groups, uint8_t* to) {
  for (int g = 0; g < groups; g++, lines += group_bytes)
    for (int i = 0; i < 4; i++, to += 128) {
      __m512i low, high;
      unpack_line(lines + 64 * i, low, high);
      _mm512_storeu_si512(to, low), _mm512_storeu_si512(to + 64, high);
    }
  }

struct TilePanel {
  int groups;
  const uint8_t* scales;  // and minima of Q4 behind those of each group
  size_t scale_stride;    // bytes from one group to the next
  const uint8_t* lines;   // unpacked: eight a group
  const uint8_t* next;    // where to fetch ahead, `next_stride` bytes for each group; null: nowhere
  size_t next_stride;
};

// The fp32 work on one group of sixteen rows.
template <bool Nibbles>
MILL_INLINE void add_products(const TilePanel& panel, int group, const GroupRows& rows, const int32_t* products,
                              Lanes sums[kTileRows]) {
  const uint16_t* const scales = (const uint16_t*)(panel.scales + size_t(group) * panel.scale_stride);
  const Lanes scale = load_half(scales), minimum = Nibbles ? load_half(scales + kLanes) : scale;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++) {
    const Lanes dots{_mm512_cvtepi32_ps(_mm512_load_si512(products + r * kLanes))};
    sums[r] = fma(scale * splat(rows.scale[r]), dots, sums[r]);
    if constexpr (Nibbles) sums[r] = fma(minimum, splat(rows.sum[r]), sums[r]);
  }
  if (panel.next)
    for (size_t ahead = 0; ahead < panel.next_stride; ahead += 64)
      __builtin_prefetch(panel.next + size_t(group) * panel.next_stride + ahead, 0, 3);
}

// acc[row][16] for sixteen rows from `row` on, or as many as there are.
template <bool Nibbles>
void multiply_sixteen(const TilePanel& panel, const Rows& x, int row, float* acc) {
  alignas(64) int32_t products[2][kTileRows * kLanes];
  Lanes sums[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++) sums[r] = splat(0.0f);
  const auto lines = [&](int group) { return panel.lines + size_t(group) * 8 * 64; };
  asm volatile("" : : : "memory");  // gcc does not know that a tile is loaded from memory
  tile_product<0>(x.group(0, row).q, lines(0), products[0]);
  int g = 0;
  for (; g + 1 < panel.groups; g += 2) {
    tile_product<1>(x.group(g + 1, row).q, lines(g + 1), products[1]);
    add_products<Nibbles>(panel, g, x.group(g, row), products[0], sums);
    if (g + 2 < panel.groups) tile_product<0>(x.group(g + 2, row).q, lines(g + 2), products[0]);
    add_products<Nibbles>(panel, g + 1, x.group(g + 1, row), products[1], sums);
  }
  if (g < panel.groups) add_products<Nibbles>(panel, g, x.group(g, row), products[0], sums);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++)
    if (row + r < x.count) store(acc + (row + r) * kLanes, sums[r]);
}

#else

inline bool tiles_permitted() { return false; }

struct Tiles {
  explicit Tiles(bool) {}
};

#endif

}  // namespace mill
