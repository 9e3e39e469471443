// Sizes within a panel. See linear.hpp for the layout.
#pragma once

#include <cstddef>

#include "lanes.hpp"

namespace mill {

constexpr size_t kQ4LineBytes = 256, kQ8LineBytes = 512;  // the codes of a group
constexpr size_t kPairBytes = 64;  // scales and minima of a group
constexpr size_t kQ4GroupBytes = kPairBytes + kQ4LineBytes, kQ5GroupBytes = kPairBytes + kQ8LineBytes;
constexpr int kSuperGroups = 8;         // groups that share factors
constexpr size_t kSuperHeadBytes = 320;  // their factors, scales and minima

// All scales of a Q8 panel.
inline size_t q8_header_bytes(int groups) { return (size_t(groups) * 2 * kLanes + 63) / 64 * 64; }

// All exponents of an MXFP4 panel.
inline size_t mxfp4_header_bytes(int groups) { return (size_t(groups) * kLanes + 63) / 64 * 64; }

}  // namespace mill
