// Choosing a token: the largest of  logits / temperature + keyed Gumbel noise.
//
// The noise of a token id is a function of (seed, position, id) alone: Philox4x32-10, key = seed, counter = (id, position
// low, position high, 0), word 0 = x, v = min((float(x >> 8) + 0.5) * 2^-24, 1 - 2^-24), g = -log(-log1p(-v)) in float64
// rounded once to float32. Evaluating two float64 logarithms per id would take longer than a layer, so ids are first
// ranked by a float32 estimate (error below 1e-5) and only those within a wide margin of the best are evaluated exactly:
// the choice is that of the exact rule, on every instruction set.
#pragma once

#include <cstdint>
#include <vector>

// Mirrored in decoder.py; described in kernels/step.py.
extern "C" struct mill_adjustments {
  int32_t rows, mask_words;
  const int32_t* samples;
  const float *repetition, *frequency, *presence;
  const int32_t *count_starts, *counted, *counts, *shift_starts, *shifted;
  const float* shifts;
  const int32_t* mask_of;
  const uint32_t* masks;
};

// Mirrored in decoder.py; described in kernels/step.py.
extern "C" struct mill_logprobs {
  int32_t rows, most;
  const int32_t *samples, *targets;
  float* of_target;
  int32_t *ranks, *top_ids;
  float* top;
};

namespace mill {

constexpr float kGreedyBelow = 1e-5f;

struct Choice {
  float value;
  int32_t token;  // -1: no id had a finite value
};

// Larger values win; of equal ones the lower id.
inline Choice better(Choice a, Choice b) {
  if (a.token < 0 || b.token < 0) return a.token < 0 ? b : a;
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.token < b.token ? a : b;
}

// Puts a choice among the best `places`, which stand in order.
void place(Choice choice, Choice* best, int places);

struct Sampling {
  float temperature, top_p, min_p;
  int32_t top_k;
  uint64_t seed, position;

  bool greedy() const { return temperature < kGreedyBelow; }
  bool masked() const { return !greedy() && (top_k > 0 || top_p < 1.0f || min_p > 0.0f); }
};

// False for NaN and plus infinity; minus infinity marks an id that may not be chosen.
bool all_finite(const float* values, int first, int last);

// Shifts and masks the logits of ids first..last-1 of one row, as `row` of the adjustments says. Every operation rounded.
void adjust(const mill_adjustments& all, int row, float* logits, int first, int last);

// The logarithm of a softmax of logits: log p(id) = (logits[id] - largest) - log_total.
struct Likelihood {
  float largest;
  double log_total;
  float of(float logit) const { return float(double(logit) - double(largest) - log_total); }
};
Likelihood likelihood(const float* logits, int count);

// Fills row `row` of what is asked, but for the token that is yet to be chosen. One thread, in one order.
Likelihood fill_top(const mill_logprobs& asked, int row, const float* logits, int count);
// Fills what is asked of `token`.
void fill_target(const mill_logprobs& asked, int row, const float* logits, int count, const Likelihood& likelihood, int32_t token);

// The best of rows first..last-1 of a head, masks ignored; `finite` becomes false when one of their logits is NaN or
// infinite above. `ids`: the token id of each row, ascending; null: row i is id i.
Choice choose(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling, bool& finite);

// The best of all rows after top_k, top_p and min_p (in this order, each on what the one before left).
Choice choose_masked(const float* logits, const int32_t* ids, int count, const Sampling& sampling, bool& finite);

// As the two above, the best `places` in order; past the last that may be chosen {-INFINITY, -1}.
void race(const float* logits, const int32_t* ids, int first, int last, const Sampling& sampling, int places, Choice* best,
          bool& finite);
void race_masked(const float* logits, const int32_t* ids, int count, const Sampling& sampling, int places, Choice* best,
                 bool& finite);

}  // namespace mill
