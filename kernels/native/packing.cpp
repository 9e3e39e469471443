// Panels: packing a checkpoint's rows into them, and reading weights back. See linear.hpp for the layout.
//
// A block of GGML is decoded into codes and scales as its authors define them, then both are put where the panel wants
// them. Nothing is rounded: what the panel has is what the block had.
#include "linear.hpp"
#include "panels.hpp"

namespace mill {

namespace {

constexpr int kSuperInputs = kSuperGroups * kGroup;
constexpr size_t kMinimaOfSuper = 2 * kLanes;  // behind the factors: those of minima
constexpr float kLowestQ4 = -8.0f, kLowestQ5 = -16.0f;  // the minimum of Q4_0 and Q5_0, in steps

uint16_t read_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

void write_half(uint8_t* p, uint16_t half) { std::memcpy(p, &half, 2); }

uint32_t read_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// The codes of output n in one group, two to a byte.
void put_nibbles(uint8_t* lines, int n, const int8_t codes[kGroup]) {
  for (int k = 0; k < kGroup; k++) {
    uint8_t& pair = lines[k / 8 * 64 + 4 * n + k % 4];
    pair = uint8_t(pair | codes[k] << (k % 8 < 4 ? 0 : 4));  // a region starts as zeros
  }
}

void put_bytes(uint8_t* lines, int n, const int8_t codes[kGroup]) {
  for (int i = 0; i < kGroup / 4; i++) std::memcpy(lines + 64 * i + 4 * n, codes + 4 * i, 4);
}

int nibble_at(const uint8_t* lines, int n, int k) {
  const uint8_t pair = lines[k / 8 * 64 + 4 * n + k % 4];
  return k % 8 < 4 ? pair & 15 : pair >> 4;
}

int byte_at(const uint8_t* lines, int n, int k) { return int8_t(lines[k / 4 * 64 + 4 * n + k % 4]); }

// Nibbles as Q4_0 to Q5_1 have them: the low ones of 16 bytes, then the high ones.
void read_nibbles(const uint8_t* from, int8_t codes[kGroup]) {
  for (int k = 0; k < kGroup / 2; k++) codes[k] = int8_t(from[k] & 15), codes[k + kGroup / 2] = int8_t(from[k] >> 4);
}

// A block of 256 weights: per group a scale and a minimum, or in Q6_K the scales of its halves.
struct SuperBlock {
  uint16_t factor = 0, lowest = 0;
  int8_t scales[kSuperGroups][2] = {};
  int8_t codes[kSuperInputs] = {};
};

// Eight scales and eight minima of six bits each.
void read_packed_scales(const uint8_t* from, SuperBlock& block) {
  for (int g = 0; g < 4; g++) {
    block.scales[g][0] = int8_t(from[g] & 63);
    block.scales[g][1] = int8_t(from[g + 4] & 63);
    block.scales[g + 4][0] = int8_t((from[g + 8] & 15) | from[g] >> 6 << 4);
    block.scales[g + 4][1] = int8_t((from[g + 8] >> 4) | from[g + 4] >> 6 << 4);
  }
}

// Q4_K: factors, scales, and per 64 weights 32 bytes of nibbles. Q5_K has fifth bits before them: bit g of byte k is that of
// weight k of group g.
template <bool FifthBits>
SuperBlock read_q4_k(const uint8_t* from) {
  SuperBlock block;
  block.factor = read_half(from);
  block.lowest = uint16_t(read_half(from + 2) ^ 0x8000);
  read_packed_scales(from + 4, block);
  const uint8_t *const fifth = from + 16, *const nibbles = fifth + (FifthBits ? kGroup : 0);
  for (int g = 0; g < kSuperGroups; g++)
    for (int k = 0; k < kGroup; k++) {
      const uint8_t pair = nibbles[g / 2 * kGroup + k];
      const int high = FifthBits ? (fifth[k] >> g & 1) << 4 : 0;
      block.codes[g * kGroup + k] = int8_t((g % 2 ? pair >> 4 : pair & 15) | high);
    }
  return block;
}

// Per 128 weights 64 bytes of nibbles (low ones: the first 64) and 32 bytes of two bits for each of four runs of 32.
SuperBlock read_q6_k(const uint8_t* from) {
  const uint8_t *const nibbles = from, *const twos = from + 128, *const scales = from + 192;
  SuperBlock block;
  block.factor = read_half(from + 208);
  std::memcpy(block.scales, scales, sizeof block.scales);
  for (int run = 0; run < kSuperGroups; run++)
    for (int k = 0; k < kGroup; k++) {
      const int half = run / 4, quarter = run % 4;
      const uint8_t pair = nibbles[half * 64 + quarter % 2 * kGroup + k];
      const int low = quarter < 2 ? pair & 15 : pair >> 4, high = twos[half * kGroup + k] >> 2 * quarter & 3;
      block.codes[run * kGroup + k] = int8_t((low | high << 4) - 32);
    }
  return block;
}

size_t group_lines(Kind kind) { return kind == Kind::Q4_K ? kQ4LineBytes : kQ8LineBytes; }
size_t super_bytes(Kind kind) { return kSuperHeadBytes + kSuperGroups * group_lines(kind); }
// Where the scale of a group lies in the head of its super block; the second one kLanes behind.
size_t super_scale_at(Kind kind, int group) {
  return (kind == Kind::Q6_K ? 1 : 2) * kMinimaOfSuper + size_t(group) * 2 * kLanes;
}

void put_super(Kind kind, uint8_t* to, int n, const SuperBlock& block) {
  write_half(to + 2 * n, block.factor);
  if (kind != Kind::Q6_K) write_half(to + kMinimaOfSuper + 2 * size_t(n), block.lowest);
  for (int g = 0; g < kSuperGroups; g++) {
    uint8_t* const scales = to + super_scale_at(kind, g) + n;
    scales[0] = uint8_t(block.scales[g][0]), scales[kLanes] = uint8_t(block.scales[g][1]);
    uint8_t* const lines = to + kSuperHeadBytes + size_t(g) * group_lines(kind);
    if (kind == Kind::Q4_K)
      put_nibbles(lines, n, block.codes + g * kGroup);
    else
      put_bytes(lines, n, block.codes + g * kGroup);
  }
}

// One output's blocks of 32 with a scale, and a minimum that is stored or so many steps.
void put_pairs(Kind stored, const uint8_t* from, int groups, uint8_t* to, int n) {
  const bool five = stored == Kind::Q5_0 || stored == Kind::Q5, minima = stored == Kind::Q4 || stored == Kind::Q5;
  const size_t head = minima ? 4 : 2, block_bytes = head + (five ? 4 : 0) + kGroup / 2;
  for (int g = 0; g < groups; g++, from += block_bytes) {
    uint8_t* const group = to + size_t(g) * (five ? kQ5GroupBytes : kQ4GroupBytes);
    const uint16_t scale = read_half(from);
    // exact unless the scale is above 8190 (Q5_0: 4095), which would be infinite in fp16
    const uint16_t minimum =
        minima ? read_half(from + 2) : float_to_half((five ? kLowestQ5 : kLowestQ4) * half_to_float(scale));
    write_half(group + 2 * n, scale);
    write_half(group + 2 * (kLanes + n), minimum);
    int8_t codes[kGroup];
    read_nibbles(from + block_bytes - kGroup / 2, codes);
    if (five)
      for (int k = 0; k < kGroup; k++) codes[k] = int8_t(codes[k] | (read_word(from + head) >> k & 1) << 4);
    if (five)
      put_bytes(group + kPairBytes, n, codes);
    else
      put_nibbles(group + kPairBytes, n, codes);
  }
}

void put_q8(const uint8_t* from, int groups, uint8_t* to, int n) {
  uint8_t* lines = to + q8_header_bytes(groups);
  for (int g = 0; g < groups; g++, from += 2 + kGroup, lines += kQ8LineBytes) {
    write_half(to + 2 * (size_t(g) * kLanes + size_t(n)), read_half(from));
    put_bytes(lines, n, (const int8_t*)from + 2);
  }
}

void put_mxfp4(const uint8_t* from, int groups, uint8_t* to, int n) {
  uint8_t* lines = to + mxfp4_header_bytes(groups);
  for (int g = 0; g < groups; g++, from += 1 + kGroup / 2, lines += kQ4LineBytes) {
    to[g * kLanes + n] = from[0];
    int8_t codes[kGroup];
    read_nibbles(from + 1, codes);
    put_nibbles(lines, n, codes);
  }
}

}  // namespace

void Matrix::describe(int32_t ggml_type, int outputs_, int inputs_, int panels_per_unit_) {
  const Kind stored = Kind(ggml_type);
  kind = stored == Kind::Q4_0 ? Kind::Q4 : stored == Kind::Q5_0 ? Kind::Q5 : stored;
  outputs = outputs_;
  inputs = inputs_;
  panels_per_unit = panels_per_unit_;
  const size_t groups = size_t(inputs) / kGroup;
  switch (kind) {
    case Kind::Q4_0:
    case Kind::Q4: panel_bytes = groups * kQ4GroupBytes; break;
    case Kind::Q5_0:
    case Kind::Q5: panel_bytes = groups * kQ5GroupBytes; break;
    case Kind::Q8: panel_bytes = q8_header_bytes(int(groups)) + groups * kQ8LineBytes; break;
    case Kind::MXFP4: panel_bytes = mxfp4_header_bytes(int(groups)) + groups * kQ4LineBytes; break;
    case Kind::Q4_K:
    case Kind::Q5_K:
    case Kind::Q6_K: panel_bytes = groups / kSuperGroups * super_bytes(kind); break;
    case Kind::F32: panel_bytes = size_t(inputs) * kLanes * 4; break;
    case Kind::F16:
    case Kind::BF16: panel_bytes = size_t(inputs) * kLanes * 2; break;
  }
  unit_stride = panel_bytes * size_t(panels_per_unit);
}

void Matrix::repack(int thread, uint8_t* region, const void* source, int32_t ggml_type) {
  Share& share = shares[size_t(thread)];
  share.base = region + share.offset;
  const Kind stored = Kind(ggml_type);
  const int groups = inputs / kGroup;
  for (int index = share.first; index < share.last; index++) {
    uint8_t* const to = panel(share, index);
    for (int n = 0; n < kLanes; n++) {
      const size_t output = size_t(index) * kLanes + size_t(n);
      if (output >= size_t(outputs)) break;  // the region starts as zeros
      const auto row = [&](size_t unit_inputs, size_t unit_bytes) {
        return static_cast<const uint8_t*>(source) + output * (size_t(inputs) / unit_inputs * unit_bytes);
      };
      const auto super_blocks = [&](size_t bytes, SuperBlock (*read)(const uint8_t*)) {
        const uint8_t* from = row(kSuperInputs, bytes);
        for (int at = 0; at < inputs / kSuperInputs; at++)
          put_super(kind, to + size_t(at) * super_bytes(kind), n, read(from + size_t(at) * bytes));
      };
      switch (stored) {
        case Kind::Q4_0: put_pairs(stored, row(kGroup, 18), groups, to, n); break;
        case Kind::Q4: put_pairs(stored, row(kGroup, 20), groups, to, n); break;
        case Kind::Q5_0: put_pairs(stored, row(kGroup, 22), groups, to, n); break;
        case Kind::Q5: put_pairs(stored, row(kGroup, 24), groups, to, n); break;
        case Kind::Q8: put_q8(row(kGroup, 34), groups, to, n); break;
        case Kind::MXFP4: put_mxfp4(row(kGroup, 17), groups, to, n); break;
        case Kind::Q4_K: super_blocks(144, read_q4_k<false>); break;
        case Kind::Q5_K: super_blocks(176, read_q4_k<true>); break;
        case Kind::Q6_K: super_blocks(210, read_q6_k); break;
        case Kind::F32:
        case Kind::F16:
        case Kind::BF16: {
          const size_t bytes = kind == Kind::F32 ? 4 : 2;
          const uint8_t* const from = row(1, bytes);
          for (size_t k = 0; k < size_t(inputs); k++) std::memcpy(to + (k * kLanes + size_t(n)) * bytes, from + k * bytes, bytes);
        }
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
    const auto half = [n](const uint8_t* halves) { return half_to_float(read_half(halves + 2 * n)); };
    switch (kind) {
      case Kind::Q4_0:
      case Kind::Q4:
      case Kind::Q5_0:
      case Kind::Q5: {
        const bool five = kind == Kind::Q5;
        const uint8_t *const group = from + size_t(g) * (five ? kQ5GroupBytes : kQ4GroupBytes), *const lines = group + kPairBytes;
        const int code = five ? byte_at(lines, n, at) : nibble_at(lines, n, at);
        values[k] = std::fma(half(group), float(code), half(group + 2 * kLanes));
        break;
      }
      case Kind::Q8: {
        const uint8_t* const lines = from + q8_header_bytes(groups) + size_t(g) * kQ8LineBytes;
        values[k] = half(from + size_t(g) * 2 * kLanes) * float(byte_at(lines, n, at));
        break;
      }
      case Kind::MXFP4: {
        const uint8_t* const lines = from + mxfp4_header_bytes(groups) + size_t(g) * kQ4LineBytes;
        values[k] = exponent_to_float(from[g * kLanes + n]) * float(kFours[nibble_at(lines, n, at)]);
        break;
      }
      case Kind::Q4_K:
      case Kind::Q5_K:
      case Kind::Q6_K: {
        const int within = g % kSuperGroups;
        const uint8_t* const block = from + size_t(g / kSuperGroups) * super_bytes(kind);
        const int8_t* const scales = (const int8_t*)block + super_scale_at(kind, within) + n;
        const uint8_t* const lines = block + kSuperHeadBytes + size_t(within) * group_lines(kind);
        if (kind == Kind::Q6_K) {
          values[k] = half(block) * float(scales[at / (kGroup / 2) * kLanes] * byte_at(lines, n, at));
          break;
        }
        const int code = kind == Kind::Q4_K ? nibble_at(lines, n, at) : byte_at(lines, n, at);
        values[k] = std::fma(half(block) * float(scales[0]), float(code), half(block + kMinimaOfSuper) * float(scales[kLanes]));
        break;
      }
      case Kind::F32: std::memcpy(&values[k], from + (size_t(k) * kLanes + size_t(n)) * 4, 4); break;
      case Kind::F16: values[k] = half_to_float(read_half(from + (size_t(k) * kLanes + size_t(n)) * 2)); break;
      case Kind::BF16: values[k] = bits_to_float(uint32_t(read_half(from + (size_t(k) * kLanes + size_t(n)) * 2)) << 16); break;
    }
  }
}

}  // namespace mill
