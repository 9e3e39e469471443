// The step: what the threads of the team do together, phase by phase.
//
// Rule: a number's value depends on its row alone. Rows are independent in every phase; which thread computes an output,
// how many rows go together, and in how many passes a step is cut, changes who does the work and never its order.
//
// Phases of a layer, with a meeting of the threads after each:
//     1. normalise, quantise      at most two rows: every thread for itself, which saves the meeting
//     2. queries, keys, values    a thread's own panels, then what others have not begun (as 6, 8, 9 and the head)
//     3. normalise (some families) and rotate keys, write the KV cache
//     4. attention                by (row, KV head), taken as threads become free
//     5. quantise                 as 1
//     6. output projection, added to the residual stream
//     7. normalise, quantise      as 1
//     8. gate and up, SiLU, quantise   in units of 32 outputs, so a thread has whole groups; some families: up, squared ReLU
//     9. down projection, added to the residual stream
// Where a layer has experts, in place of the last two:
//     8. the router's logits
//     9. each row's experts, and their weights
//    10. rows put side by side by expert (one row stays where it is)
//    11. gate and up of one chosen expert after the other, for the rows that chose it
//    12. down projections   a thread adds all experts of its outputs, in their order, and then to the residual stream
#include "model.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <new>

namespace mill {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kRowsEachThreadPrepares = 2;
constexpr int kExpertDownPanels = 4;  // of an expert's down projection that lie and are read together: one alone is a few KB
constexpr int kRowsBeyond = 16;  // tiles read so many rows, whether they are there or not

// x * weight / root mean square; squares are summed in 16 lanes (lane i % 16, ascending), then by sum_of. `out` may be x.
void rms_norm(const float* x, const float* weight, int width, float epsilon, float* out) {
  Lanes squares = splat(0.0f);
  for (int i = 0; i < width; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Lanes scale = splat(1.0f / std::sqrt(sum_of(squares) / float(width) + epsilon));
  for (int i = 0; i < width; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

// x less its mean; the mean is summed as the squares above.
void centre(const float* x, int width, float* out) {
  Lanes total = splat(0.0f);
  for (int i = 0; i < width; i += kLanes) total = total + load(x + i);
  const Lanes mean = splat(sum_of(total) / float(width));
  for (int i = 0; i < width; i += kLanes) store(out + i, load(x + i) - mean);
}

MILL_INLINE Lanes squared_relu(Lanes x) { return x * largest(x, splat(0.0f)); }  // NaN stays

// What an MLP with a gate hands to its down projection.
MILL_INLINE Lanes swiglu(Lanes gate, Lanes up, const mill_config& config) {
  const Lanes one = splat(1.0f), none = splat(0.0f);
  if (!config.clamped) return gate / (one + exponential(none - gate)) * up;
  const Lanes limit = splat(config.swiglu_limit), alpha = splat(config.swiglu_alpha);
  gate = smallest(gate, limit), up = largest(smallest(up, limit), none - limit);
  return gate / (one + exponential(none - alpha * gate)) * (up + one);
}

void add_bias(float* acc, int rows, const float* bias) {
  for (int row = 0; row < rows; row++) store(acc + row * kLanes, load(acc + row * kLanes) + load(bias));
}

std::pair<int, int> share_of(int count, int thread, int threads) {
  return {int(int64_t(count) * thread / threads), int(int64_t(count) * (thread + 1) / threads)};
}

}  // namespace

Region::Region(size_t bytes) : mapped_bytes_(bytes + kHugePage) {
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapped_);
  data_ = reinterpret_cast<uint8_t*>((start + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: no failure matters
#endif
}

Region::~Region() {
  if (data_) munmap(mapped_, mapped_bytes_);
}

// How likely a sample's tokens are, before its logits are adjusted in place.
struct Model::Asked {
  int row = -1;  // of the logprobs; -1: nobody asks
  Likelihood likelihood{};
  std::vector<float> raw;  // the logits, where they are adjusted
};

// Neighbouring rows of one sequence and of one block.
struct Model::Tile {
  int row, rows;  // at most kRowsInTile
};

// Some consecutive rows of a step, at most kPassRows, and where each of them stands.
struct Model::Pass {
  const mill_inputs& inputs;
  int first, rows;
  int first_sample, samples;
  std::vector<const int32_t*> tables;  // [rows] the block table of the row's sequence
  std::vector<Tile> tiles;             // all rows
  std::vector<int32_t> blocks;         // that its attention reads, each once; empty where fetching them ahead is not worth it
  float* logits;                       // [samples][head rows]
  int32_t* tokens;                     // [samples][places], or null
  float* scores;                       // [samples][places], or null
  int places;
  std::vector<Choice> choices;         // [threads][samples][places]
  std::vector<Asked> asked;            // [samples] what is to be said of the chosen token; empty when nobody asks
  std::atomic<bool> finite{true};

  int position(int row) const { return inputs.positions[first + row]; }
  void find_blocks() {
    if (rows <= kRowsTogether) return;
    for (int row = 0; row < rows; row++)
      if (row + 1 == rows || tables[size_t(row)] != tables[size_t(row) + 1])
        blocks.insert(blocks.end(), tables[size_t(row)], tables[size_t(row)] + position(row) / kBlockTokens + 1);
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  }
  // Puts the next row beside its neighbour, or into a tile of its own.
  void place(int row) {
    const bool beside = row > 0 && tables[size_t(row)] == tables[size_t(row) - 1] && position(row) == position(row - 1) + 1 &&
                        position(row) % kBlockTokens != 0 && tiles.back().rows < kRowsInTile;
    if (beside)
      tiles.back().rows++;
    else
      tiles.push_back({row, 1});
  }
  Sampling sampling(int sample) const {
    const int at = first_sample + sample;
    return {inputs.temperature[at], inputs.top_p[at], inputs.min_p[at], inputs.top_k[at], inputs.seeds[at],
            uint64_t(inputs.positions[inputs.sample_rows[at]]) + 1};
  }
};

Model::Model(const mill_config& config, const mill_tensor* tensors, mill_fetch fetch)
    : config_(config),
      ranks_(config.ranks ? config.ranks->size : 1),
      exchange_(config.ranks ? config.ranks->exchange : nullptr),
      attention_(config.ranks, config.ranks ? config.ranks->attention : nullptr, config.heads * config.head_dim),
      hidden_(config.ranks, config.ranks ? config.ranks->hidden : nullptr, config.hidden),
      between_(config.ranks, config.ranks ? config.ranks->feed_forward : nullptr, config.feed_forward),
      logits_cut_(config.ranks, config.ranks ? config.ranks->head : nullptr, config.head_rows),
      frequencies_(config.frequencies, config.frequencies + config.rope_dims / 2),
      windows_(config.windows, config.windows + config.layers),
      head_ids_(config.head_ids, config.head_ids ? config.head_ids + config.head_rows : config.head_ids),
      layers_(size_t(config.layers)),
      scratch_(size_t(config.threads)),
      team_(config.threads) {
  // The caller's, which need not outlive the construction.
  config_.ranks = nullptr;
  config_.frequencies = nullptr;
  config_.windows = config_.head_ids = nullptr;
  place_weights(tensors, fetch);

  cache_.layers = config.layers;
  cache_.heads = config.kv_heads;
  cache_.head_dim = config.head_dim;
  cache_.format = KvFormat(config.kv_format);
  cache_memory_ = Region(cache_.block_bytes() * size_t(config.blocks));
  cache_.base = cache_memory_.data();

  const int attention_width = attention_.whole();
  qkv_width_ = (config.heads + 2 * config.kv_heads) * config.head_dim;
  residual_.resize(size_t(kPassRows) * size_t(config.hidden));
  qkv_.resize(size_t(kPassRows) * size_t(qkv_width_));
  attended_.resize(size_t(kPassRows) * size_t(attention_width));
  rotation_.resize(size_t(kPassRows) * size_t(config.rope_dims));
  logits_ = Region(size_t(kPassRows) * size_t(config.head_rows) * sizeof(float));
  if (ranks_ > 1) {
    const int widest = std::max({attention_.widest(), hidden_.widest(), between_.widest(), logits_cut_.widest()});
    const size_t bytes = size_t(kPassRows) * size_t(widest) * sizeof(float);
    own_ = Region(bytes);
    everyone_ = Region(bytes * size_t(ranks_));
    between_numbers_.resize(size_t(kPassRows) * size_t(between_.whole()));
  }

  Wanted of_normed, of_attended, of_down, of_expert, of_expert_down;
  of_normed.by(head_);
  for (const Layer& layer : layers_) {
    for (const Matrix* matrix : {&layer.query, &layer.key, &layer.value}) of_normed.by(*matrix);
    of_attended.by(layer.output);
    if (layer.experts.empty()) {
      for (const Matrix* matrix : {&layer.mlp.gate, &layer.mlp.up})
        if (matrix->outputs) of_normed.by(*matrix);
      of_down.by(layer.mlp.down);
      continue;
    }
    of_normed.by(layer.router);
    for (const Mlp& expert : layer.experts) {
      for (const Matrix* matrix : {&expert.gate, &expert.up}) of_normed.by(*matrix), of_expert.by(*matrix);
      of_expert_down.by(expert.down);
    }
  }
  normed_input_.reserve(config.hidden, of_normed);
  head_input_.reserve(config.hidden, of_normed);
  attended_input_.reserve(attention_width, of_attended);
  down_input_.reserve(between_.whole(), of_down);
  if (config.experts) {
    const int pairs = kPassRows * config.experts_per_token;
    expert_input_.reserve(config.hidden, of_expert, pairs + kRowsBeyond);
    expert_down_input_.reserve(config.expert_feed_forward, of_expert_down, pairs + kRowsBeyond);
    router_logits_.resize(size_t(kPassRows) * size_t(config.experts));
    routed_.resize(size_t(pairs));
    expert_taken_ = std::vector<Counter>(size_t(1 + config.experts) * size_t(team_.size()));
  }
  const int widest = std::max({config.hidden, attention_width, between_.whole(), config.expert_feed_forward});
  for (Scratch& scratch : scratch_) {
    scratch.normed.reserve(config.hidden, of_normed);
    scratch.attended.reserve(attention_width, of_attended);
    if (ranks_ > 1) scratch.down.reserve(between_.whole(), of_down);
    scratch.acc.resize(size_t(kPassRows) * kGroup);
    scratch.other_acc.resize(size_t(kPassRows) * kGroup);
    scratch.row.resize(size_t(std::max(config.hidden, attention_width)));
    scratch.head.resize(size_t(config.head_dim));
    if (config.experts) {
      scratch.shares.resize(size_t(config.experts + kLanes - 1) / kLanes * kLanes);
      scratch.taken.resize(size_t(config.experts));
      scratch.mixed.resize(size_t(kPassRows) * kExpertDownPanels * kLanes);
    }
    if (tiles_permitted_) scratch.unpacked = Region(size_t(widest) * kLanes);
    scratch.rotated.resize(size_t(kRowsInTile) * size_t(config.heads / config.kv_heads * config.head_dim));
    scratch.scores = Region(attention_scratch(config.head_dim, config.context) * sizeof(float));
  }
}

// One region per thread, filled in the order in which a step reads it.
void Model::place_weights(const mill_tensor* tensors, mill_fetch fetch) {
  struct Part {
    Matrix* matrix;
    const mill_tensor* tensor;
  };
  std::vector<std::vector<Part>> stretches, of_experts;  // the parts of a stretch take turns, unit by unit
  const auto part = [](Matrix& matrix, const mill_tensor& tensor, int panels_per_unit) {
    matrix.describe(tensor.type, tensor.outputs, tensor.inputs, panels_per_unit);
    return Part{&matrix, &tensor};
  };
  const auto vector = [](const mill_tensor& tensor) {
    const float* const values = static_cast<const float*>(tensor.data);
    return values ? std::vector<float>(values, values + tensor.inputs) : std::vector<float>();
  };
  const auto mlp = [&](Mlp& to, const mill_tensor* three, int down_panels, std::vector<std::vector<Part>>& of) {
    const mill_tensor &gate = three[0], &up = three[1], &down = three[2];
    if (!up.outputs) return;
    of.emplace_back();
    if (gate.outputs) of.back().push_back(part(to.gate, gate, kGroup / kLanes));
    of.back().push_back(part(to.up, up, kGroup / kLanes));
    of.push_back({part(to.down, down, down_panels)});
  };
  const auto expert = [&](Mlp& to, const mill_tensor* six) {
    mlp(to, six, kExpertDownPanels, of_experts);
    to.gate_bias = vector(six[3]), to.up_bias = vector(six[4]), to.down_bias = vector(six[5]);
  };
  const mill_tensor* next = tensors;
  for (Layer& layer : layers_) {
    layer.attention_norm.weight = vector(*next++);
    for (Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output})
      stretches.push_back({part(*matrix, *next++, 1)});
    layer.feed_forward_norm.weight = vector(*next++);
    mlp(layer.mlp, next, 1, stretches);
    next += 3;
    for (std::vector<float>* to : {&layer.query_bias, &layer.key_bias, &layer.value_bias, &layer.output_bias, &layer.query_norm.weight,
                                   &layer.key_norm.weight, &layer.attention_norm.bias, &layer.feed_forward_norm.bias, &layer.sinks})
      *to = vector(*next++);
    if (config_.experts == 0) continue;
    const mill_tensor* const router = next++;
    layer.router_bias = vector(*next++);
    if (router->outputs) {
      stretches.push_back({part(layer.router, *router, 1)});
      layer.experts.resize(size_t(config_.experts));
      for (size_t at = 0; at < layer.experts.size(); at++) expert(layer.experts[at], next + 6 * at);
    }
    next += 6 * config_.experts;
  }
  const mill_tensor& embedding = *next++;
  final_norm_.weight = vector(*next++);
  final_norm_.bias = vector(*next++);
  const mill_tensor& head = *next++;
  tied_ = head.outputs == 0;
  stretches.push_back({part(head_, tied_ ? embedding : head, 1)});
  if (!tied_) stretches.push_back({part(embedding_, embedding, 1)});

  taken_ = std::vector<Counter>(stretches.size() * size_t(team_.size()));
  for (size_t index = 0; index < stretches.size(); index++)
    for (const Part& each : stretches[index]) each.matrix->stretch = int(index);
  stretches.insert(stretches.end(), of_experts.begin(), of_experts.end());

  std::vector<size_t> sizes;
  for (int thread = 0; thread < team_.size(); thread++) {
    size_t offset = 0;
    for (const auto& stretch : stretches) {
      const Matrix& leader = *stretch[0].matrix;
      const int per_unit = leader.panels_per_unit;
      const auto [first, last] = share_of((leader.panels() + per_unit - 1) / per_unit, thread, team_.size());
      size_t stride = 0;
      for (const Part& each : stretch) stride += each.matrix->panel_bytes * size_t(per_unit);
      size_t within = offset;
      for (const Part& each : stretch) {
        Matrix& matrix = *each.matrix;
        matrix.unit_stride = stride;
        matrix.shares.push_back({within, first * per_unit, std::min(last * per_unit, matrix.panels())});
        within += matrix.panel_bytes * size_t(per_unit);
      }
      offset += stride * size_t(last - first);
    }
    sizes.push_back(offset);
  }
  for (const size_t size : sizes) weights_.emplace_back(size);
  for (const auto& stretch : stretches)
    for (const Part& each : stretch) {
      const void* const rows = fetch(int32_t(each.tensor - tensors));
      if (!rows) throw Unread();
      team_.run([&](int thread) {  // whoever reads a page later is the first to touch it
        each.matrix->repack(thread, weights_[size_t(thread)].data(), rows, each.tensor->type);
      });
    }
}

std::string Model::complaint(const mill_inputs& inputs) const {
  const auto number = [](int64_t value) { return std::to_string(value); };
  if (inputs.sequence_starts[0] != 0 || inputs.sequence_starts[inputs.sequences] != inputs.rows)
    return "sequence_starts must begin with 0 and end with the number of rows, " + number(inputs.rows);
  for (int row = 0; row < inputs.rows; row++) {
    if (inputs.tokens[row] < 0 || inputs.tokens[row] >= config_.vocabulary)
      return "row " + number(row) + ": token " + number(inputs.tokens[row]) + " is outside the vocabulary of " + number(config_.vocabulary);
    if (inputs.positions[row] < 0 || inputs.positions[row] >= config_.context)
      return "row " + number(row) + ": position " + number(inputs.positions[row]) + " is outside the context of " + number(config_.context);
  }
  for (int sequence = 0; sequence < inputs.sequences; sequence++) {
    const int first = inputs.sequence_starts[sequence], last = inputs.sequence_starts[sequence + 1];
    if (first < 0 || last < first || last > inputs.rows) return "sequence_starts must not decrease";
    for (int row = first + 1; row < last; row++)
      if (inputs.positions[row] <= inputs.positions[row - 1])
        return "row " + number(row) + ": the rows of a sequence must stand in ascending position order";
    if (last == first) continue;
    const int blocks = inputs.positions[last - 1] / kBlockTokens + 1;
    if (blocks > inputs.table_width)
      return "sequence " + number(sequence) + " needs " + number(blocks) + " blocks; its table has " + number(inputs.table_width);
    for (int at = 0; at < blocks; at++) {
      const int block = inputs.block_tables[int64_t(sequence) * inputs.table_width + at];
      if (block < 0 || block >= config_.blocks)
        return "sequence " + number(sequence) + ": block id " + number(block) + " is outside 0.." + number(config_.blocks - 1);
    }
  }
  for (int sample = 0; sample < inputs.samples; sample++) {
    const int row = inputs.sample_rows[sample];
    if (row < 0 || row >= inputs.rows || (sample > 0 && row <= inputs.sample_rows[sample - 1]))
      return "sample_rows must be ascending row numbers below " + number(inputs.rows);
    if (!(inputs.temperature[sample] >= 0) || !(inputs.top_p[sample] >= 0) || !(inputs.min_p[sample] >= 0) || inputs.top_k[sample] < 0)
      return "sample " + number(sample) + ": temperature, top_k, top_p and min_p must not be negative or NaN";
  }
  return "";
}

bool Model::step(const mill_inputs& inputs, const mill_wanted& wanted) {
  int sequence = 0, sample = 0;
  lost_ = false;
  for (int first = 0; first < inputs.rows; first += kPassRows) {
    const int rows = std::min(kPassRows, inputs.rows - first);
    int samples = 0;
    while (sample + samples < inputs.samples && inputs.sample_rows[sample + samples] < first + rows) samples++;
    Pass pass{inputs, first, rows, sample, samples, {}, {}, {}, nullptr, nullptr, nullptr, wanted.places, {}, {}};
    if (inputs.logprobs && wanted.tokens) pass.asked.resize(size_t(samples));
    const size_t placed = size_t(sample) * size_t(wanted.places);
    pass.logits = wanted.logits ? wanted.logits + size_t(sample) * size_t(config_.head_rows) : reinterpret_cast<float*>(logits_.data());
    pass.tokens = wanted.logits ? nullptr : wanted.tokens + placed;
    pass.scores = wanted.scores ? wanted.scores + placed : nullptr;
    pass.choices.resize(size_t(team_.size()) * size_t(samples) * size_t(wanted.places));
    for (int row = first; row < first + rows; row++) {
      while (inputs.sequence_starts[sequence + 1] <= row) sequence++;
      pass.tables.push_back(inputs.block_tables + int64_t(sequence) * inputs.table_width);
      pass.place(row - first);
    }
    pass.find_blocks();
    normed_input_.rows = attended_input_.rows = down_input_.rows = rows;
    head_input_.rows = samples;
    expert_input_.rows = expert_down_input_.rows = rows * config_.experts_per_token;
    for (Counter& counter : taken_) counter.next.store(0, std::memory_order_relaxed);
    team_.run_step([&](int thread) { run_pass(pass, thread); });
    if (lost_) throw RankLost{};
    if (!pass.finite) return false;
    sample += samples;
  }
  return true;
}

void Model::run_pass(Pass& pass, int thread) {
  const Tiles tiles(tiles_permitted_);
  Scratch& scratch = scratch_[size_t(thread)];
  const int hidden = config_.hidden, attention_width = attention_.whole(), rows = pass.rows;
  embed(pass, thread);
  look_ahead(pass, 0, thread);
  team_.meet();
  for (int index = 0; index < config_.layers; index++) {
    const Layer& layer = layers_[size_t(index)];
    const auto normed = [&](const Norm& by) {
      return [&](int row) {
        norm(residual(row), by, hidden, scratch.row.data());
        return scratch.row.data();
      };
    };
    const Activations& x = prepare(normed_input_, scratch.normed, rows, hidden, thread, normed(layer.attention_norm));
    project(layer.query, layer.query_bias, x, thread, queries(0), qkv_width_, false);
    project(layer.key, layer.key_bias, x, thread, keys(0), qkv_width_, false);
    project(layer.value, layer.value_bias, x, thread, values(0), qkv_width_, false);
    team_.meet();
    write_cache(pass, index, thread);
    if (thread == 0) next_item_.store(0, std::memory_order_relaxed);
    team_.meet();
    scratch.ahead.stop();
    attend_all(pass, index, thread);
    look_ahead(pass, index + 1, thread);
    team_.meet();
    gather(attended_.data(), rows, attention_, thread);
    const Activations& attended = prepare(attended_input_, scratch.attended, rows, attention_width, thread, [&](int row) {
      return attended_.data() + size_t(row) * size_t(attention_width);
    });
    project(layer.output, layer.output_bias, attended, thread, residual(0) + hidden_.first(), hidden, true);
    team_.meet();
    gather(residual(0), rows, hidden_, thread);
    const Activations& fed = prepare(normed_input_, scratch.normed, rows, hidden, thread, normed(layer.feed_forward_norm));
    if (layer.experts.empty())
      feed_forward(layer, fed, thread);
    else
      mixture(layer, fed, thread);
    team_.meet();
    gather(residual(0), rows, hidden_, thread);
  }
  scratch.ahead.stop();
  if (pass.inputs.hidden) tell_hidden(pass, thread);
  if (pass.samples > 0) sample(pass, thread);
}

// This thread's part of what attention of that layer will read.
void Model::look_ahead(const Pass& pass, int layer, int thread) {
  if (layer == config_.layers) return;
  const int32_t *const first = pass.blocks.data(), *const last = first + pass.blocks.size();
  if (last - first > thread)
    scratch_[size_t(thread)].ahead.begin(cache_.keys(0, layer, 0), cache_.block_bytes(),
                                         2 * cache_.side_bytes() * size_t(cache_.heads), first + thread, last, team_.crew());
}

// Token embeddings into the residual stream; cosines and sines of each row's position, in float64, rounded once.
void Model::embed(const Pass& pass, int thread) {
  const auto [first, last] = share_of(pass.rows, thread, team_.crew());
  for (int row = first; row < last; row++) {
    (tied_ ? head_ : embedding_).row(pass.inputs.tokens[pass.first + row], residual(row));
    float* const rotation = rotation_.data() + size_t(row) * size_t(config_.rope_dims);
    for (size_t pair = 0; pair < frequencies_.size(); pair++) {
      const double angle = double(pass.position(row)) * frequencies_[pair];
      rotation[2 * pair] = float(std::cos(angle) * double(config_.rope_magnitude));
      rotation[2 * pair + 1] = float(std::sin(angle) * double(config_.rope_magnitude));
    }
  }
}

// Quantises the rows given by values(row). A few rows every thread prepares for itself; more are shared out.
template <typename Row>
const Activations& Model::prepare(Activations& shared, Activations& own, int rows, int width, int thread, Row values) {
  const bool each = rows <= kRowsEachThreadPrepares;
  Activations& to = each ? own : shared;
  if (each) own.rows = rows;
  const auto [first, last] = each ? std::pair(0, rows) : share_of(rows, thread, team_.crew());
  for (int row = first; row < last; row++) {
    const float* const numbers = values(row);
    for (int group = 0; group < width / kGroup; group++) to.set_group(row, group, width, numbers + group * kGroup);
  }
  if (!each) team_.meet();
  return to;
}

// Each rank's columns of some rows to every rank. The caller's thread does it, between two meetings.
void Model::gather(float* rows, int count, const Cut& cut, int thread) {
  if (ranks_ == 1) return;
  if (thread == 0 && !lost_ && count > 0) {
    float *const own = reinterpret_cast<float*>(own_.data()), *const everyone = reinterpret_cast<float*>(everyone_.data());
    const size_t whole = size_t(cut.whole()), widest = size_t(cut.widest());
    for (int row = 0; row < count; row++) {
      const float* const from = rows + size_t(row) * whole + cut.first();
      std::copy(from, from + cut.width(cut.rank), own + size_t(row) * widest);
    }
    if (exchange_(own, everyone, int64_t(count) * int64_t(widest)) != 0) {
      lost_ = true;  // the step goes on to its end, with numbers that nobody will see
    } else {
      for (int rank = 0; rank < ranks_; rank++)
        for (int row = 0; row < count; row++) {
          const float* const from = everyone + (size_t(rank) * size_t(count) + size_t(row)) * widest;
          std::copy(from, from + cut.width(rank), rows + size_t(row) * whole + cut.starts[size_t(rank)]);
        }
    }
  }
  team_.meet();
}

// What down reads: quantised as it was made, or gathered from the ranks first.
const Activations& Model::between(int rows, int thread) {
  if (ranks_ == 1) return down_input_;
  gather(between_numbers_.data(), rows, between_, thread);
  return prepare(down_input_, scratch_[size_t(thread)].down, rows, between_.whole(), thread, [&](int row) {
    return between_numbers_.data() + size_t(row) * size_t(between_.whole());
  });
}

// Calls work(share, first panel) for units nobody has begun: this thread's own, then the others'. A thread whose core is
// taken away for a while holds up the step by one unit, not by its share.
template <typename Work>
void Model::share_out(const Matrix& matrix, Counter* taken, int thread, Work work) {
  for (int offset = 0; offset < team_.size(); offset++) {
    const int owner = (thread + offset) % team_.size();
    const Matrix::Share& share = matrix.shares[size_t(owner)];
    std::atomic<int>& next = taken[owner].next;
    int panel;
    while ((panel = share.first + next.fetch_add(1, std::memory_order_relaxed) * matrix.panels_per_unit) < share.last)
      work(share, panel);
  }
}

// out[row][outputs] = or += matrix * x + bias, for the outputs this thread gets.
void Model::project(const Matrix& matrix, const std::vector<float>& bias, const Activations& x, int thread, float* out, int stride,
                    bool add) {
  Scratch& scratch = scratch_[size_t(thread)];
  float* const acc = scratch.acc.data();
  share_out(matrix, taken(matrix), thread, [&](const Matrix::Share& share, int index) {
    multiply_panel(matrix, matrix.panel(share, index), x, acc, scratch.unpacked.data(), scratch.ahead);
    const int count = std::min(kLanes, matrix.outputs - index * kLanes);
    if (!bias.empty())
      for (int row = 0; row < x.rows; row++)
        for (int i = 0; i < count; i++) acc[row * kLanes + i] += bias[size_t(index * kLanes + i)];
    for (int row = 0; row < x.rows; row++) {
      float* const to = out + size_t(row) * size_t(stride) + size_t(index) * kLanes;
      const float* const from = acc + row * kLanes;
      if (count == kLanes)
        store(to, add ? load(to) + load(from) : load(from));
      else
        for (int i = 0; i < count; i++) to[i] = add ? to[i] + from[i] : from[i];
    }
  });
}

void Model::norm(const float* x, const Norm& by, int width, float* out) const {
  if (by.bias.empty()) return rms_norm(x, by.weight.data(), width, config_.norm_epsilon, out);
  centre(x, width, out);
  rms_norm(out, by.weight.data(), width, config_.norm_epsilon, out);
  for (int i = 0; i < width; i += kLanes) store(out + i, load(out + i) + load(by.bias.data() + i));
}

// The head as it is to be rotated: normalised into scratch.head where its family does that.
const float* Model::normed_head(const float* head, const Norm& by, Scratch& scratch) const {
  if (by.weight.empty()) return head;
  norm(head, by, config_.head_dim, scratch.head.data());
  return scratch.head.data();
}

// Rotates the pairs of one head: (a cos - b sin, a sin + b cos), every operation rounded.
void Model::rotate(const float* from, float* to, int row) const {
  const float* const rotation = rotation_.data() + size_t(row) * size_t(config_.rope_dims);
  const int pairs = config_.rope_dims / 2;
  const int step = config_.rope_interleaved ? 2 : 1, apart = config_.rope_interleaved ? 1 : pairs;
  for (int pair = 0; pair < pairs; pair++) {
    const int i = pair * step, j = i + apart;
    const float a = from[i], b = from[j], cosine = rotation[2 * pair], sine = rotation[2 * pair + 1];
    to[i] = a * cosine - b * sine;
    to[j] = a * sine + b * cosine;
  }
  std::copy(from + config_.rope_dims, from + config_.head_dim, to + config_.rope_dims);
}

void Model::write_cache(const Pass& pass, int layer, int thread) {
  const int dim = config_.head_dim;
  const auto [first, last] = share_of(pass.rows * config_.kv_heads, thread, team_.crew());
  Scratch& scratch = scratch_[size_t(thread)];
  float* const key = scratch.row.data();
  for (int item = first; item < last; item++) {
    const int row = item / config_.kv_heads, head = item % config_.kv_heads, position = pass.position(row);
    rotate(normed_head(keys(row) + head * dim, layers_[size_t(layer)].key_norm, scratch), key, row);
    cache_.put(pass.tables[size_t(row)][position / kBlockTokens], layer, head, position % kBlockTokens, key, values(row) + head * dim);
  }
}

void Model::attend_all(const Pass& pass, int layer, int thread) {
  Scratch& scratch = scratch_[size_t(thread)];
  const int items = pass.rows * config_.kv_heads, group = config_.heads / config_.kv_heads;
  if (items < 4 * team_.crew()) {  // too few to even out by themselves: split the query heads
    const auto [first, last] = share_of(config_.heads, thread, team_.crew());
    for (int row = 0; row < pass.rows; row++)
      for (int head = first; head < last; head = (head / group + 1) * group)
        attend_heads(pass, layer, row, 1, head, std::min(last, (head / group + 1) * group), scratch);
    return;
  }
  // KV heads outside, so that neighbouring rows of a sequence find the same keys and values in the cache.
  const int tiles = int(pass.tiles.size());
  for (int item; (item = next_item_.fetch_add(1, std::memory_order_relaxed)) < tiles * config_.kv_heads;) {
    const Tile& tile = pass.tiles[size_t(item % tiles)];
    attend_tile(pass, layer, tile.row, tile.rows, item / tiles, scratch);
  }
}

// All query heads of a KV head; row by row unless the rows are a tile and see all that is before them.
void Model::attend_tile(const Pass& pass, int layer, int row, int rows, int kv_head, Scratch& scratch) {
  const int group = config_.heads / config_.kv_heads, head = kv_head * group, window = windows_[size_t(layer)];
  if (rows == kRowsInTile && (!window || pass.position(row) + rows <= window))
    return attend_heads(pass, layer, row, rows, head, head + group, scratch);
  for (int end = row + rows; row < end; row++) attend_heads(pass, layer, row, 1, head, head + group, scratch);
}

// Query heads first_head..last_head-1, all of one KV head.
void Model::attend_heads(const Pass& pass, int layer, int row, int rows, int first_head, int last_head, Scratch& scratch) {
  const int dim = config_.head_dim, width = attention_.whole();
  const Lanes scale = splat(float(1.0 / std::sqrt(double(dim))));
  float* to = scratch.rotated.data();
  for (int at = row; at < row + rows; at++)
    for (int head = first_head; head < last_head; head++, to += dim) {
      rotate(normed_head(queries(at) + head * dim, layers_[size_t(layer)].query_norm, scratch), to, at);
      for (int i = 0; i < dim; i += kLanes) store(to + i, load(to + i) * scale);
    }
  const int position = pass.position(row), window = windows_[size_t(layer)];
  const std::vector<float>& sinks = layers_[size_t(layer)].sinks;
  const AttentionPlace place{pass.tables[size_t(row)], window ? std::max(0, position - window + 1) : 0, position, layer,
                             first_head / (config_.heads / config_.kv_heads), rows, sinks.empty() ? nullptr : &sinks[size_t(first_head)]};
  attend(cache_, place, scratch.rotated.data(), last_head - first_head, reinterpret_cast<float*>(scratch.scores.data()),
         attended_.data() + size_t(row) * size_t(width) + size_t(attention_.first()) + size_t(first_head) * size_t(dim), size_t(width));
}

void Model::feed_forward(const Layer& layer, const Activations& x, int thread) {
  gate_and_up(layer.mlp, x, taken(layer.mlp.up), thread, down_input_, 0, config_.feed_forward);
  team_.meet();
  project(layer.mlp.down, {}, between(x.rows, thread), thread, residual(0) + hidden_.first(), config_.hidden, true);
}

// Rows of `out` from first_out on, `width` numbers each = gate and up put together, or the square of what is positive of up,
// quantised as soon as a group of 32 is there.
void Model::gate_and_up(const Mlp& mlp, const Rows& x, Counter* taken, int thread, Activations& out, int first_out, int width) {
  constexpr int per_unit = kGroup / kLanes;
  Scratch& scratch = scratch_[size_t(thread)];
  const size_t half = size_t(x.count) * kLanes;
  float *const gates = scratch.acc.data(), *const ups = scratch.other_acc.data();
  const auto multiply = [&](const Matrix& matrix, const std::vector<float>& bias, size_t owner, int index, float* acc) {
    for (int i = 0; i < per_unit; i++) {
      float* const to = acc + size_t(i) * half;
      multiply_panel(matrix, matrix.panel(matrix.shares[owner], index + i), x, to, scratch.unpacked.data(), scratch.ahead);
      if (!bias.empty()) add_bias(to, x.count, &bias[size_t(index + i) * kLanes]);
    }
  };
  const bool gated = mlp.gate.outputs > 0;
  const Matrix& leader = gated ? mlp.gate : mlp.up;
  share_out(leader, taken, thread, [&](const Matrix::Share& share, int index) {
    const size_t owner = size_t(&share - leader.shares.data());
    if (gated) multiply(mlp.gate, mlp.gate_bias, owner, index, gates);
    multiply(mlp.up, mlp.up_bias, owner, index, ups);
    for (int row = 0; row < x.count; row++) {
      float group[kGroup];
      for (int i = 0; i < per_unit; i++) {
        const size_t at = size_t(i) * half + size_t(row) * kLanes;
        store(group + i * kLanes, gated ? swiglu(load(gates + at), load(ups + at), config_) : squared_relu(load(ups + at)));
      }
      if (ranks_ == 1)
        out.set_group(first_out + row, index / per_unit, width, group);
      else
        std::copy(group, group + kGroup,
                  between_numbers_.data() + size_t(row) * size_t(between_.whole()) + size_t(between_.first()) + size_t(index) * kLanes);
    }
  });
}

// The experts of a layer for the rows that chose them, added to the residual stream.
void Model::mixture(const Layer& layer, const Activations& x, int thread) {
  Scratch& scratch = scratch_[size_t(thread)];
  const int rows = x.rows, all = config_.experts, per_token = config_.experts_per_token;
  project(layer.router, layer.router_bias, x, thread, router_logits_.data(), all, false);
  team_.meet();
  const auto [first, last] = share_of(rows, thread, team_.crew());
  for (int row = first; row < last; row++)
    choose_experts(router_logits_.data() + size_t(row) * size_t(all), scratch, routed_.data() + size_t(row) * size_t(per_token));
  if (thread == 0)
    for (Counter* each = taken_of_experts(0); each < taken_of_experts(size_t(1 + std::min(all, rows * per_token))); each++)
      each->next.store(0, std::memory_order_relaxed);
  team_.meet();
  Routing& routing = scratch.routing;
  routing.group(routed_, rows, per_token, all);
  if (rows > 1) {
    const auto [begin, end] = share_of(rows * per_token, thread, team_.crew());
    for (int pair = begin; pair < end; pair++) expert_input_.copy_row(pair, config_.hidden, x, routing.rows[size_t(pair)]);
    team_.meet();
  }
  for (size_t at = 0; at < routing.experts.size(); at++)
    gate_and_up(layer.experts[size_t(routing.experts[at])], rows > 1 ? routing.of(expert_input_, at) : Rows(x),
                taken_of_experts(1 + at), thread, expert_down_input_, routing.starts[at], config_.expert_feed_forward);
  team_.meet();
  add_experts(layer, routing, rows, thread);
}

// The largest logits win, of equal ones the lower expert; `chosen` is in ascending order.
void Model::choose_experts(const float* logits, Scratch& scratch, Routed* chosen) const {
  const int count = config_.experts;
  std::vector<float>& shares = scratch.shares;
  std::fill(scratch.taken.begin(), scratch.taken.end(), uint8_t(0));
  float largest = logits[0];
  for (int n = 0; n < config_.experts_per_token; n++) {
    int best = -1;
    for (int expert = 0; expert < count; expert++)
      if (!scratch.taken[size_t(expert)] && (best < 0 || logits[expert] > logits[best])) best = expert;
    scratch.taken[size_t(best)] = 1;
    if (n == 0) largest = logits[best];
  }
  std::copy(logits, logits + count, shares.begin());
  std::fill(shares.begin() + count, shares.end(), largest);
  for (size_t i = 0; i < shares.size(); i += kLanes) store(&shares[i], exponential(load(&shares[i]) - splat(largest)));
  std::fill(shares.begin() + count, shares.end(), 0.0f);
  if (config_.experts_normalised)
    for (int expert = 0; expert < count; expert++)
      if (!scratch.taken[size_t(expert)]) shares[size_t(expert)] = 0.0f;
  Lanes total = splat(0.0f);
  for (size_t i = 0; i < shares.size(); i += kLanes) total = total + load(&shares[i]);
  const float sum = sum_of(total);
  for (int expert = 0; expert < count; expert++)
    if (scratch.taken[size_t(expert)]) *chosen++ = {expert, shares[size_t(expert)] / sum};
}

void Model::Routing::group(const std::vector<Routed>& chosen, int count, int per_token, int all_experts) {
  const size_t pairs = size_t(count) * size_t(per_token);
  next.assign(size_t(all_experts), 0);
  for (size_t pair = 0; pair < pairs; pair++) next[size_t(chosen[pair].expert)]++;
  experts.clear(), starts.clear();
  rows.resize(pairs), weights.resize(pairs);
  int start = 0;
  for (int expert = 0; expert < all_experts; expert++) {
    const int of_expert = next[size_t(expert)];
    if (of_expert) experts.push_back(expert), starts.push_back(start);
    next[size_t(expert)] = start;
    start += of_expert;
  }
  starts.push_back(start);
  for (size_t pair = 0; pair < pairs; pair++) {
    const size_t at = size_t(next[size_t(chosen[pair].expert)]++);
    rows[at] = int(pair) / per_token, weights[at] = chosen[pair].weight;
  }
}

// residual += the sum of weight * down(expert), experts ascending. All experts have the same shape, so the same shares.
void Model::add_experts(const Layer& layer, const Routing& routing, int rows, int thread) {
  Scratch& scratch = scratch_[size_t(thread)];
  const Matrix& leader = layer.experts[size_t(routing.experts[0])].down;
  float *const acc = scratch.acc.data(), *const mixed = scratch.mixed.data();
  const auto sum_of_row = [&](int row, int i) { return mixed + (size_t(row) * kExpertDownPanels + size_t(i)) * kLanes; };
  share_out(leader, taken_of_experts(0), thread, [&](const Matrix::Share& share, int index) {
    const size_t owner = size_t(&share - leader.shares.data());
    const int panels = std::min(kExpertDownPanels, share.last - index);
    std::fill(mixed, sum_of_row(rows, 0), 0.0f);
    for (size_t at = 0; at < routing.experts.size(); at++) {
      const Mlp& expert = layer.experts[size_t(routing.experts[at])];
      const Matrix& down = expert.down;
      const Rows x = routing.of(expert_down_input_, at);
      for (int i = 0; i < panels; i++) {
        multiply_panel(down, down.panel(down.shares[owner], index + i), x, acc, scratch.unpacked.data(), scratch.ahead);
        if (!expert.down_bias.empty()) add_bias(acc, x.count, &expert.down_bias[size_t(index + i) * kLanes]);
        for (int n = 0; n < x.count; n++) {
          const size_t pair = size_t(x.first + n);
          float* const to = sum_of_row(routing.rows[pair], i);
          store(to, fma(splat(routing.weights[pair]), load(acc + n * kLanes), load(to)));
        }
      }
    }
    for (int row = 0; row < rows; row++)
      for (int i = 0; i < panels; i++) {
        float* const to = residual(row) + (index + i) * kLanes;
        store(to, load(to) + load(sum_of_row(row, i)));
      }
  });
}

// The final norm of the rows that are asked for, each by one thread.
void Model::tell_hidden(Pass& pass, int thread) {
  const mill_hidden& asked = *pass.inputs.hidden;
  const int32_t *const first = std::lower_bound(asked.at, asked.at + asked.rows, pass.first),
                *const last = std::lower_bound(first, asked.at + asked.rows, pass.first + pass.rows);
  for (const int32_t* at = first + thread; at < last; at += team_.crew()) {
    float* const to = asked.values + size_t(at - asked.at) * size_t(config_.hidden);
    norm(residual(*at - pass.first), final_norm_, config_.hidden, to);
    if (!all_finite(to, 0, config_.hidden)) pass.finite = false;
  }
}

// The head for the rows whose next token is wanted, and the choice.
void Model::sample(Pass& pass, int thread) {
  Scratch& scratch = scratch_[size_t(thread)];
  const int head_rows = config_.head_rows, places = pass.places;
  const int32_t* const ids = head_ids_.empty() ? nullptr : head_ids_.data();
  const Activations& x = prepare(head_input_, scratch.normed, pass.samples, config_.hidden, thread, [&](int sample) {
    const int row = pass.inputs.sample_rows[pass.first_sample + sample] - pass.first;
    norm(residual(row), final_norm_, config_.hidden, scratch.row.data());
    return scratch.row.data();
  });
  project(head_, {}, x, thread, pass.logits + logits_cut_.first(), head_rows, false);
  if (!pass.tokens && ranks_ == 1) return;
  team_.meet();
  gather(pass.logits, pass.samples, logits_cut_, thread);
  if (!pass.tokens) return;

  const auto [first, last] = share_of((head_rows + kLanes - 1) / kLanes, thread, team_.crew());
  const auto logits = [&](int sample) { return pass.logits + size_t(sample) * size_t(head_rows); };
  const auto choices = [&](int of, int sample) { return pass.choices.data() + size_t(of * pass.samples + sample) * size_t(places); };
  bool finite = true;
  if (!pass.asked.empty()) {
    say_how_likely(pass, thread, finite);
    team_.meet();
  }
  if (const mill_adjustments* const all = pass.inputs.adjustments)
    for (int row = 0; row < all->rows; row++) {
      const int sample = all->samples[row] - pass.first_sample;
      if (sample < 0 || sample >= pass.samples) continue;
      const int begin = first * kLanes, end = std::min(last * kLanes, head_rows);
      if (!all_finite(logits(sample), begin, end)) finite = false;
      adjust(*all, row, logits(sample), begin, end);
    }
  for (int sample = 0; sample < pass.samples; sample++) {
    const Sampling sampling = pass.sampling(sample);
    if (sampling.masked()) continue;
    const int begin = first * kLanes, end = std::min(last * kLanes, head_rows);
    if (places == 1)
      *choices(thread, sample) = choose(logits(sample), ids, begin, end, sampling, finite);
    else
      race(logits(sample), ids, begin, end, sampling, places, choices(thread, sample), finite);
  }
  team_.meet();
  std::vector<Choice> best(static_cast<size_t>(places));
  for (int sample = thread; sample < pass.samples; sample += team_.crew()) {
    const Sampling sampling = pass.sampling(sample);
    std::fill(best.begin(), best.end(), Choice{-INFINITY, -1});
    if (sampling.masked())
      race_masked(logits(sample), ids, head_rows, sampling, places, best.data(), finite);
    else
      for (int other = 0; other < team_.crew(); other++)
        for (const Choice* choice = choices(other, sample); choice < choices(other, sample) + places && choice->token >= 0; choice++)
          place(*choice, best.data(), places);
    for (int at = 0; at < places; at++) {
      pass.tokens[sample * places + at] = best[size_t(at)].token;
      if (pass.scores) pass.scores[sample * places + at] = best[size_t(at)].value;
    }
    if (best[0].token < 0) finite = false;
    if (!pass.asked.empty() && best[0].token >= 0) {
      const Asked& asked = pass.asked[size_t(sample)];
      if (asked.row >= 0 && pass.inputs.logprobs->targets[asked.row] < 0)
        fill_target(*pass.inputs.logprobs, asked.row, asked.raw.empty() ? logits(sample) : asked.raw.data(), head_rows,
                    asked.likelihood, best[0].token);
    }
  }
  if (!finite) pass.finite = false;
}

// What is asked of raw logits, each sample by one thread.
void Model::say_how_likely(Pass& pass, int thread, bool& finite) {
  const int vocabulary = config_.head_rows;  // nobody asks a trimmed head
  const mill_logprobs& all = *pass.inputs.logprobs;
  for (int row = 0; row < all.rows; row++) {
    const int sample = all.samples[row] - pass.first_sample;
    if (sample < 0 || sample >= pass.samples || sample % team_.crew() != thread) continue;
    const float* const logits = pass.logits + size_t(sample) * size_t(vocabulary);
    if (!all_finite(logits, 0, vocabulary)) {
      finite = false;
      continue;
    }
    Asked& asked = pass.asked[size_t(sample)];
    asked.row = row;
    asked.likelihood = fill_top(all, row, logits, vocabulary);
    const mill_adjustments* const adjustments = pass.inputs.adjustments;
    if (adjustments && std::binary_search(adjustments->samples, adjustments->samples + adjustments->rows, all.samples[row]))
      asked.raw.assign(logits, logits + vocabulary);
  }
}

}  // namespace mill
