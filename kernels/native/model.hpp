// A decoder on the CPU, dense or a mixture of experts: the weights, the KV cache, and one step over them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "linear.hpp"
#include "sampling.hpp"
#include "team.hpp"
#include "tiles.hpp"

// The C structs below are mirrored in decoder.py.
extern "C" {

// A rank among several that compute one model (kernels/shards.py): of a row of numbers, rank r computes the columns from
// starts[r] to starts[r + 1]. Its tensors hold those outputs alone.
struct mill_ranks {
  int32_t size, rank;
  const int32_t *attention, *hidden, *feed_forward, *head;  // [size + 1] starts
  // Fills `everyone` [size][count] with each rank's `own` [count]. Not 0: a rank is lost. Called by the step's caller.
  int32_t (*exchange)(const float* own, float* everyone, int64_t count);
};

// Of this rank: heads, kv_heads and feed_forward are what it computes itself.
struct mill_config {
  int32_t layers, hidden, heads, kv_heads, head_dim, rope_dims, feed_forward, vocabulary, context, blocks, threads;
  int32_t rope_interleaved;  // 1: element 2i turns with 2i + 1; 0: i with i + rope_dims / 2
  int32_t kv_format;         // a KvFormat
  float norm_epsilon;
  float rope_magnitude;      // cosines and sines are multiplied by it
  const double* frequencies;  // [rope_dims / 2] radians per position of each pair
  const int32_t* windows;     // [layers] positions that a row of the layer sees, its own included; 0: all before it
  const int32_t* head_ids;    // [head_rows] the token id of each row of a trimmed head, ascending; null: row i is id i
  int32_t head_rows;
  int32_t experts, experts_per_token, expert_feed_forward;  // 0: no layer has any
  int32_t experts_normalised;  // 1: weights are a softmax over the chosen; 0: over all
  int32_t clamped;             // 1: experts compute gate / (1 + e^(-alpha gate)) (up + 1), both within the limit
  float swiglu_alpha, swiglu_limit;
  const mill_ranks* ranks;    // null: it is alone
};

struct mill_tensor {
  const void* data;  // of a vector; the rows of a matrix are fetched
  int32_t type;      // as numbered in GGUF
  int32_t outputs, inputs;  // 0: there is none (an untied head; a gate; biases; norms of heads; an MLP, or experts in its place)
};

// The rows of a matrix as stored, by its number among the tensors; they stay until the next call. Null: they cannot be read.
typedef const void* (*mill_fetch)(int32_t tensor);

// Rows whose last layer's output is wanted, behind the final norm; ascending.
struct mill_hidden {
  int32_t rows;
  const int32_t* at;
  float* values;  // [rows][hidden]
};

// Every row as kernels/step.py describes it; what it says of adjustments, logprobs and hidden has been checked there.
struct mill_inputs {
  int32_t rows, sequences, table_width, samples;
  const int32_t *tokens, *positions, *sequence_starts, *block_tables, *sample_rows;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const uint64_t* seeds;
  const mill_adjustments* adjustments;  // null: no row has any
  const mill_logprobs* logprobs;        // null: nobody asks
  const mill_hidden* hidden;            // null: nobody asks
};

// What a step is run for: `logits`, or the best `places` ids of each sample in order, with their scores where wanted.
struct mill_wanted {
  int32_t* tokens;  // [samples][places]; -1 past the last that may be chosen
  float* scores;    // [samples][places] logit / temperature + noise, or null
  float* logits;    // [samples][head_rows], or null
  int32_t places;
};
}

namespace mill {

// Zeroed memory that becomes resident only as it is touched.
class Region {
 public:
  Region() = default;
  explicit Region(size_t bytes);
  ~Region();
  Region(Region&& other) noexcept { *this = std::move(other); }
  Region& operator=(Region&& other) noexcept {
    std::swap(mapped_, other.mapped_), std::swap(mapped_bytes_, other.mapped_bytes_), std::swap(data_, other.data_);
    return *this;
  }
  uint8_t* data() const { return data_; }

 private:
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  uint8_t* data_ = nullptr;  // on the boundary of a huge page
};

struct Unread : std::runtime_error {
  Unread() : std::runtime_error("a tensor cannot be read") {}
};

// Columns of which each rank computes its own.
struct Cut {
  std::vector<int32_t> starts;
  int rank = 0;

  Cut(const mill_ranks* ranks, const int32_t* of, int count)
      : starts(ranks ? std::vector<int32_t>(of, of + ranks->size + 1) : std::vector<int32_t>{0, count}), rank(ranks ? ranks->rank : 0) {}
  int first() const { return starts[size_t(rank)]; }
  int whole() const { return starts.back(); }
  int width(int of) const { return starts[size_t(of) + 1] - starts[size_t(of)]; }
  int widest() const {
    int most = 0;
    for (int of = 0; of + 1 < int(starts.size()); of++) most = std::max(most, width(of));
    return most;
  }
};

struct RankLost {};

class Model {
 public:
  // `tensors`: per layer attn_norm, q, k, v, output, ffn_norm, gate, up, down, the biases of q, k, v and output, the norms
  // of the heads of q and k, the biases of attn_norm and ffn_norm, the sinks, and where the model has experts, the router and
  // its bias, and of each expert gate, up, down and their biases; then token_embd, output_norm, its bias, output.
  // Copies what it needs, one matrix after the other. Throws std::bad_alloc, or Unread when a matrix cannot be fetched.
  Model(const mill_config& config, const mill_tensor* tensors, mill_fetch fetch);

  // What is wrong with the inputs; empty when nothing is.
  std::string complaint(const mill_inputs& inputs) const;

  // False when a row's logits are not finite: nothing can be chosen from them. Throws RankLost.
  bool step(const mill_inputs& inputs, const mill_wanted& wanted);

  const KvCache& cache() const { return cache_; }
  // Threads that took part in the last step; and: leave the steps of the next seconds to the caller's alone.
  int crew() const { return team_.crew(); }
  void go_alone(int seconds) { team_.go_alone(Crowding::Clock::now() + std::chrono::seconds(seconds)); }

 private:
  struct Norm {
    std::vector<float> weight, bias;  // a bias: a layer norm; none: root mean square
  };
  struct alignas(64) Counter {
    std::atomic<int> next{0};
  };
  struct Mlp {
    Matrix gate, up, down;  // without outputs, there is no gate
    std::vector<float> gate_bias, up_bias, down_bias;  // empty: none
  };
  struct Layer {
    Norm attention_norm, feed_forward_norm;
    std::vector<float> query_bias, key_bias, value_bias, output_bias, sinks;  // empty: none
    Norm query_norm, key_norm;                                                // as well
    Matrix query, key, value, output;
    Mlp mlp;
    Matrix router;
    std::vector<float> router_bias;
    std::vector<Mlp> experts;  // in place of `mlp`, where there are any
  };
  struct Routed {
    int expert;
    float weight;
  };
  // A layer's rows, expert by expert: a row stands once in a list of pairs for each expert that it chose.
  struct Routing {
    std::vector<int> experts;  // chosen by some row, ascending
    std::vector<int> starts;   // [experts + 1] the first pair of each
    std::vector<int> rows;     // [pairs] ascending within an expert
    std::vector<float> weights;  // [pairs]
    std::vector<int> next;     // [all experts] scratch of group()

    void group(const std::vector<Routed>& chosen, int rows, int per_token, int all_experts);
    Rows of(const Activations& pairs, size_t at) const { return {pairs, starts[at], starts[at + 1] - starts[at]}; }
  };
  struct Scratch {  // one thread's own
    Activations normed, attended, down;  // the last of several ranks only
    std::vector<float> acc, other_acc, row, head, rotated;
    std::vector<float> shares, mixed;  // of experts: what a router gives each, and a unit's sums
    std::vector<uint8_t> taken;
    Routing routing;
    Ahead ahead;
    Region scores, unpacked;  // `unpacked` only where tiles may be used
  };
  struct Asked;
  struct Tile;
  struct Pass;

  void place_weights(const mill_tensor* tensors, mill_fetch fetch);
  void run_pass(Pass& pass, int thread);
  void embed(const Pass& pass, int thread);
  template <typename Row>
  const Activations& prepare(Activations& shared, Activations& own, int rows, int width, int thread, Row values);
  template <typename Work>
  void share_out(const Matrix& matrix, Counter* taken, int thread, Work work);
  Counter* taken(const Matrix& matrix) { return &taken_[size_t(matrix.stretch) * size_t(team_.size())]; }
  Counter* taken_of_experts(size_t at) { return expert_taken_.data() + at * size_t(team_.size()); }
  void project(const Matrix& matrix, const std::vector<float>& bias, const Activations& x, int thread, float* out, int stride, bool add);
  void write_cache(const Pass& pass, int layer, int thread);
  void look_ahead(const Pass& pass, int layer, int thread);
  void attend_all(const Pass& pass, int layer, int thread);
  void attend_tile(const Pass& pass, int layer, int row, int rows, int kv_head, Scratch& scratch);
  void attend_heads(const Pass& pass, int layer, int row, int rows, int first_head, int last_head, Scratch& scratch);
  void norm(const float* x, const Norm& by, int width, float* out) const;
  void gate_and_up(const Mlp& mlp, const Rows& x, Counter* taken, int thread, Activations& out, int first_out, int width);
  void feed_forward(const Layer& layer, const Activations& x, int thread);
  void mixture(const Layer& layer, const Activations& x, int thread);
  void choose_experts(const float* logits, Scratch& scratch, Routed* chosen) const;
  void add_experts(const Layer& layer, const Routing& routing, int rows, int thread);
  void gather(float* rows, int count, const Cut& cut, int thread);
  const Activations& between(int rows, int thread);
  void tell_hidden(Pass& pass, int thread);
  void sample(Pass& pass, int thread);
  void say_how_likely(Pass& pass, int thread, bool& finite);
  const float* normed_head(const float* head, const Norm& by, Scratch& scratch) const;
  void rotate(const float* from, float* to, int row) const;
  float* queries(int row) { return qkv_.data() + size_t(row) * size_t(qkv_width_); }
  float* keys(int row) { return queries(row) + config_.heads * config_.head_dim; }
  float* values(int row) { return keys(row) + config_.kv_heads * config_.head_dim; }
  float* residual(int row) { return residual_.data() + size_t(row) * size_t(config_.hidden); }

  mill_config config_;
  int ranks_ = 1;
  decltype(mill_ranks::exchange) exchange_ = nullptr;
  Cut attention_, hidden_, between_, logits_cut_;
  std::vector<float> between_numbers_;  // [kPassRows][whole width between], of several ranks
  Region own_, everyone_;               // to exchange
  std::atomic<bool> lost_{false};
  std::vector<double> frequencies_;
  std::vector<int32_t> windows_, head_ids_;  // of the head: empty when row i is id i
  int qkv_width_ = 0;
  std::vector<Layer> layers_;
  Matrix embedding_, head_;
  bool tied_ = true;
  const bool tiles_permitted_ = tiles_permitted();
  Norm final_norm_;
  std::vector<Region> weights_;  // one per thread
  KvCache cache_;
  Region cache_memory_;

  std::vector<float> residual_, qkv_, attended_, rotation_;  // [kPassRows][...]
  Activations normed_input_, attended_input_, down_input_, head_input_;
  std::vector<float> router_logits_;  // [kPassRows][experts]
  std::vector<Routed> routed_;        // [kPassRows][experts per token]
  Activations expert_input_, expert_down_input_;  // [pairs of a row and one of its experts]
  Region logits_;
  std::vector<Scratch> scratch_;
  std::vector<Counter> taken_;  // [stretches][threads] units of a thread's share that somebody has begun, in this pass
  std::vector<Counter> expert_taken_;  // [1 + experts][threads] the same in this layer: down projections, then each expert
  std::atomic<int> next_item_{0};
  Team team_;
};

}  // namespace mill
