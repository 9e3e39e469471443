// Greedy, noisy and masked choice. See sampling.hpp for the rule.
#include "sampling.hpp"

#include <algorithm>
#include <cmath>

#include "lanes.hpp"

namespace mill {

void place(Choice choice, Choice* best, int places) {
  const auto ahead = [&](const Choice& other) {
    return other.token < 0 || choice.value > other.value || (choice.value == other.value && choice.token < other.token);
  };
  int at = places - 1;
  if (!ahead(best[at])) return;
  for (; at > 0 && ahead(best[at - 1]); at--) best[at] = best[at - 1];
  best[at] = choice;
}

namespace {

constexpr int kChunk = 256;

struct PhiloxKeys {
  uint32_t low[10], high[10];
  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; round++) {
      low[round] = uint32_t(seed) + round * 0x9E3779B9u;
      high[round] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// v of 16 ids. Plain loops over integers: any vectorisation gives the same bits.
void uniform(const PhiloxKeys& keys, uint64_t position, const uint32_t ids[kLanes], float v[kLanes]) {
  uint32_t a[kLanes], b[kLanes], c[kLanes], d[kLanes];
  for (int i = 0; i < kLanes; i++) {
    a[i] = ids[i];
    b[i] = uint32_t(position);
    c[i] = uint32_t(position >> 32);
    d[i] = 0;
  }
  for (int round = 0; round < 10; round++)
    for (int i = 0; i < kLanes; i++) {
      const uint64_t one = uint64_t(a[i]) * 0xD2511F53u, two = uint64_t(c[i]) * 0xCD9E8D57u;
      a[i] = uint32_t(two >> 32) ^ b[i] ^ keys.low[round];
      b[i] = uint32_t(two);
      c[i] = uint32_t(one >> 32) ^ d[i] ^ keys.high[round];
      d[i] = uint32_t(one);
    }
  for (int i = 0; i < kLanes; i++) {
    const float exact = (float(int32_t(a[i] >> 8)) + 0.5f) * 0x1p-24f;
    v[i] = exact < 1.0f - 0x1p-24f ? exact : 1.0f - 0x1p-24f;
  }
}

inline float log_estimate(float x) {  // normal x; relative error of the exponent's share aside, below 2e-7
  const uint32_t bits = float_to_bits(x) - 0x3F3504F3;  // mantissa in [0.707, 1.414)
  const int32_t exponent = int32_t(bits) >> 23;
  const float m = bits_to_float((bits & 0x7FFFFF) + 0x3F3504F3);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  return float(exponent) * 0.69314718f + 2.0f * s * (1.0f + z * (1.0f / 3 + z * (0.2f + z * (1.0f / 7 + z * (1.0f / 9)))));
}

inline float gumbel_estimate(float v) {
  const float series = v * (1.0f + v * (0.5f + v * (1.0f / 3)));
  const float logarithm = -log_estimate(1.0f - v);
  return -log_estimate(v < 0.01f ? series : logarithm);
}

float gumbel(float v) { return float(-std::log(-std::log1p(-double(v)))); }

// The largest value, lowest row first. A vector maximum per chunk; the id is looked up only in the chunk that wins.
Choice choose_greedy(const float* values, int first, int last) {
  float best = -INFINITY;
  int where = -1;
  for (int start = first; start < last; start += kChunk) {
    const int end = std::min(start + kChunk, last);
    float peak = -INFINITY;
    if (end - start == kChunk) {
      Lanes lanes = load(values + start);
      for (int i = kLanes; i < kChunk; i += kLanes) lanes = largest(lanes, load(values + start + i));
      peak = largest_of(lanes);
    } else {
      for (int i = start; i < end; i++) peak = std::max(peak, values[i]);
    }
    if (peak > best) {
      best = peak;
      where = start;
    }
  }
  if (where < 0) return {best, -1};
  while (values[where] != best) where++;
  return {best, where};
}

// The largest `places` values in order, lowest id first.
void race_greedy(const float* values, const int32_t* ids, int first, int last, int places, Choice* best) {
  std::fill(best, best + places, Choice{-INFINITY, -1});
  for (int i = first; i < last; i++)
    if (values[i] > best[places - 1].value) place({values[i], ids ? ids[i] : i}, best, places);
}

// Float32 estimates rank the rows; whoever may be among the best `places` is evaluated exactly.
void race_noisy(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling, int places, Choice* best) {
  const PhiloxKeys keys(sampling.seed);
  struct Candidate {
    float scaled, v, estimate;
    int32_t token;
  };
  std::vector<Candidate> candidates;
  std::vector<float> leading(size_t(places), -INFINITY);  // the best estimates, descending
  float bar = -INFINITY;
  // Sums of float32 numbers round to a part in 2^23 of their size; the estimate adds 1e-5.
  const auto margin = [](float value) { return 1e-3f + 1e-6f * std::fabs(value); };
  const auto lead = [&](float estimate) {
    if (!(estimate > leading.back())) return;
    size_t at = leading.size() - 1;
    for (; at > 0 && leading[at - 1] < estimate; at--) leading[at] = leading[at - 1];
    leading[at] = estimate;
    bar = leading.back() - margin(leading.back());
  };
  for (int start = first; start < last; start += kLanes) {
    uint32_t tokens[kLanes] = {};
    float v[kLanes], scaled[kLanes], sums[kLanes];
    const int count = std::min(kLanes, last - start);
    if (ids)
      std::copy(ids + start, ids + start + count, tokens);
    else
      for (int i = 0; i < kLanes; i++) tokens[i] = uint32_t(start + i);
    uniform(keys, sampling.position, tokens, v);
    for (int i = 0; i < kLanes; i++) scaled[i] = i < count ? logits[start + i] : -INFINITY;
    for (int i = 0; i < kLanes; i++) scaled[i] = scaled[i] / sampling.temperature;
    for (int i = 0; i < kLanes; i++) sums[i] = scaled[i] + gumbel_estimate(v[i]);
    if (!(largest_of(load(sums)) > bar)) continue;
    for (int i = 0; i < count; i++) lead(sums[i]);
    for (int i = 0; i < count; i++)
      if (sums[i] > -INFINITY && sums[i] >= bar) candidates.push_back({scaled[i], v[i], sums[i], int32_t(tokens[i])});
  }
  std::fill(best, best + places, Choice{-INFINITY, -1});
  for (const Candidate& candidate : candidates)
    if (candidate.estimate >= bar) place({candidate.scaled + gumbel(candidate.v), candidate.token}, best, places);
}

Choice choose_noisy(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling) {
  Choice choice;
  race_noisy(logits, ids, first, last, sampling, 1, &choice);
  return choice;
}

// The scaled logits that top_k, top_p and min_p leave, minus infinity for others; empty when there are none.
std::vector<float> masked(const float* logits, int count, const Sampling& sampling) {
  std::vector<float> scaled(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) scaled[size_t(i)] = logits[i] / sampling.temperature;

  std::vector<int32_t> ranked;  // a heap: the next rank is popped off its top
  for (int32_t i = 0; i < count; i++)
    if (scaled[size_t(i)] > -INFINITY) ranked.push_back(i);
  if (ranked.empty()) return {};
  const auto ranks_after = [&](int32_t a, int32_t b) {
    return scaled[size_t(a)] != scaled[size_t(b)] ? scaled[size_t(a)] < scaled[size_t(b)] : a > b;
  };
  const bool limited = sampling.top_k > 0 && size_t(sampling.top_k) < ranked.size();
  if (limited) {
    std::nth_element(ranked.begin(), ranked.begin() + sampling.top_k - 1, ranked.end(),
                     [&](int32_t a, int32_t b) { return ranks_after(b, a); });
    ranked.resize(size_t(sampling.top_k));
    std::sort(ranked.begin(), ranked.end());  // nth_element's order is the library's own; sums must not depend on it
  }

  float peak = -INFINITY;
  for (int32_t id : ranked) peak = std::max(peak, scaled[size_t(id)]);
  const auto relative = [&](int32_t id) { return std::exp(double(scaled[size_t(id)]) - double(peak)); };

  std::vector<float> kept(static_cast<size_t>(count), -INFINITY);
  if (sampling.top_p < 1.0f) {
    double total = 0;
    for (int32_t id : ranked) total += relative(id);
    const double wanted = double(sampling.top_p) * total;
    std::make_heap(ranked.begin(), ranked.end(), ranks_after);
    double before = 0;
    for (bool first = true; !ranked.empty() && (first || before < wanted); first = false) {
      std::pop_heap(ranked.begin(), ranked.end(), ranks_after);
      const int32_t id = ranked.back();
      ranked.pop_back();
      const double share = relative(id);
      if (!first && share < double(sampling.min_p)) break;
      before += share;
      kept[size_t(id)] = scaled[size_t(id)];
    }
  } else {
    for (int32_t id : ranked)
      if (relative(id) >= double(sampling.min_p)) kept[size_t(id)] = scaled[size_t(id)];
  }
  return kept;
}

}  // namespace

bool all_finite(const float* values, int first, int last) {
  uint32_t special = 0;
  for (int i = first; i < last; i++) special |= uint32_t((float_to_bits(values[i]) & 0x7F800000) == 0x7F800000);
  return !special || std::all_of(values + first, values + last, [](float x) { return x < INFINITY; });
}

// exp(x - largest): 16 lanes over a chunk, the lanes in a tree, chunks in float64.
Likelihood likelihood(const float* logits, int count) {
  const float largest_logit = logits[choose_greedy(logits, 0, count).token];
  double total = 0;
  for (int start = 0; start < count; start += kChunk) {
    Lanes lanes = splat(0.0f);
    for (int i = start; i < std::min(start + kChunk, count); i += kLanes) {
      float x[kLanes];
      for (int lane = 0; lane < kLanes; lane++) x[lane] = i + lane < count ? logits[i + lane] - largest_logit : -INFINITY;
      Lanes power = exponential(load(x));
      if (i + kLanes > count) {
        store(x, power);
        for (int lane = count - i; lane < kLanes; lane++) x[lane] = 0;
        power = load(x);
      }
      lanes = lanes + power;
    }
    total += double(sum_of(lanes));
  }
  return {largest_logit, std::log(total)};
}

Likelihood fill_top(const mill_logprobs& asked, int row, const float* logits, int count) {
  const Likelihood of_row = likelihood(logits, count);
  const int most = asked.most;
  int32_t* const ids = asked.top_ids + size_t(row) * size_t(most);
  float* const values = asked.top + size_t(row) * size_t(most);
  int found = 0;
  for (int id = 0; most > 0 && id < count; id++) {
    if (found == most && !(logits[id] > values[most - 1])) continue;
    int place = found < most ? found++ : most - 1;
    for (; place > 0 && logits[id] > values[place - 1]; place--) {
      values[place] = values[place - 1];
      ids[place] = ids[place - 1];
    }
    values[place] = logits[id];
    ids[place] = id;
  }
  for (int place = 0; place < found; place++) values[place] = of_row.of(values[place]);
  if (asked.targets[row] >= 0) fill_target(asked, row, logits, count, of_row, asked.targets[row]);
  return of_row;
}

void fill_target(const mill_logprobs& asked, int row, const float* logits, int count, const Likelihood& likelihood, int32_t token) {
  const float own = logits[token];
  int rank = 1;
  for (int id = 0; id < count; id++) rank += int(logits[id] > own) + int((logits[id] == own) & (id < token));
  asked.of_target[row] = likelihood.of(own);
  asked.ranks[row] = rank;
}

void adjust(const mill_adjustments& all, int row, float* logits, int first, int last) {
  const float repetition = all.repetition[row], frequency = all.frequency[row], presence = all.presence[row];
  for (int at = all.count_starts[row]; at < all.count_starts[row + 1]; at++) {
    const int id = all.counted[at];
    if (id < first || id >= last) continue;
    float x = logits[id];
    x = x > 0 ? x / repetition : x * repetition;
    if (all.counts[at] > 0) x = x - frequency * float(all.counts[at]) - presence;
    logits[id] = x;
  }
  for (int at = all.shift_starts[row]; at < all.shift_starts[row + 1]; at++) {
    const int id = all.shifted[at];
    if (id >= first && id < last) logits[id] += all.shifts[at];
  }
  if (all.mask_of[row] < 0) return;
  const uint32_t* const mask = all.masks + size_t(all.mask_of[row]) * size_t(all.mask_words);
  for (int id = first; id < last;) {
    const int word = id / 32, end = std::min(last, (word + 1) * 32);
    const uint32_t bits = word < all.mask_words ? mask[word] : 0;
    if (bits == ~0u)
      id = end;
    else
      for (; id < end; id++)
        if (!(bits >> (id % 32) & 1)) logits[id] = -INFINITY;
  }
}

Choice choose(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling, bool& finite) {
  if (!all_finite(logits, first, last)) finite = false;
  if (!sampling.greedy()) return choose_noisy(logits, ids, first, last, sampling);
  Choice choice = choose_greedy(logits, first, last);
  if (ids && choice.token >= 0) choice.token = ids[choice.token];
  return choice;
}

void race(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling, int places, Choice* best,
          bool& finite) {
  if (!all_finite(logits, first, last)) finite = false;
  if (sampling.greedy())
    race_greedy(logits, ids, first, last, places, best);
  else
    race_noisy(logits, ids, first, last, sampling, places, best);
}

Choice choose_masked(const float* logits, const int32_t* ids, int count, const Sampling& sampling, bool& finite) {
  Choice choice;
  race_masked(logits, ids, count, sampling, 1, &choice, finite);
  return choice;
}

void race_masked(const float* logits, const int32_t* ids, int count, const Sampling& sampling, int places, Choice* best,
                 bool& finite) {
  std::fill(best, best + places, Choice{-INFINITY, -1});
  if (!all_finite(logits, 0, count)) {
    finite = false;
    return;
  }
  const std::vector<float> kept = masked(logits, count, sampling);
  if (kept.empty()) return;
  Sampling plain = sampling;
  plain.temperature = 1.0f;
  race_noisy(kept.data(), ids, 0, count, plain, places, best);
}

}  // namespace mill
