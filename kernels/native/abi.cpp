// The C ABI: what decoder.py calls. Every name begins with mill_; everything else is hidden.
#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

#include "model.hpp"

#define MILL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void tell(const std::string& what, char* message, int32_t capacity) {
  const size_t length = std::min(what.size(), size_t(capacity) - 1);
  std::memcpy(message, what.data(), length);
  message[length] = 0;
}

}  // namespace

// The instruction set that models opened now will use: what the library was compiled for, less tiles if Linux denies them.
MILL_EXPORT const char* mill_instructions() {
#if MILL_AVX512
  return mill::tiles_permitted() ? "amx" : "avx512";
#elif MILL_AVX2
  return "avx2";
#else
  return "portable";
#endif
}

// A model, to be closed by mill_close; null with a message when memory is short or a tensor cannot be read.
MILL_EXPORT void* mill_open(const mill_config* config, const mill_tensor* tensors, mill_fetch fetch, char* message, int32_t capacity) {
  try {
    return new mill::Model(*config, tensors, fetch);
  } catch (const std::exception& error) {
    tell(error.what(), message, capacity);
    return nullptr;
  }
}

MILL_EXPORT void mill_close(void* model) { delete static_cast<mill::Model*>(model); }

// The KV cache of a model: block b is the mill_block_bytes from b times mill_block_bytes on. Not during a step.
MILL_EXPORT uint8_t* mill_cache(void* model) { return static_cast<mill::Model*>(model)->cache().base; }
MILL_EXPORT int64_t mill_block_bytes(void* model) { return int64_t(static_cast<mill::Model*>(model)->cache().block_bytes()); }

// How many threads took part in the last step; and the steps of the next seconds for the calling thread alone.
MILL_EXPORT int32_t mill_crew(void* model) { return static_cast<mill::Model*>(model)->crew(); }
MILL_EXPORT void mill_go_alone(void* model, int32_t seconds) { static_cast<mill::Model*>(model)->go_alone(seconds); }

// Fills what is wanted. 0: done. 1: bad inputs, nothing has changed. 2: the step failed. 3: a rank is lost.
MILL_EXPORT int32_t mill_step(void* model, const mill_inputs* inputs, const mill_wanted* wanted, char* message, int32_t capacity) {
  try {
    auto& decoder = *static_cast<mill::Model*>(model);
    const std::string complaint = decoder.complaint(*inputs);
    if (!complaint.empty()) {
      tell(complaint, message, capacity);
      return 1;
    }
    if (decoder.step(*inputs, *wanted)) return 0;
    tell("no token can be chosen: some logits are not finite, so the weights are broken, or every id of a row is masked", message, capacity);
  } catch (const mill::RankLost&) {
    tell("another rank is lost", message, capacity);
    return 3;
  } catch (const std::exception& error) {
    tell(error.what(), message, capacity);
  }
  return 2;
}

// One choice from given logits, exactly as a step makes it; -1 when they hold NaN or +inf, or every id is masked.
MILL_EXPORT int32_t mill_choose(const float* logits, int32_t count, float temperature, int32_t top_k, float top_p, float min_p,
                                uint64_t seed, uint64_t position) {
  const mill::Sampling sampling{temperature, top_p, min_p, top_k, seed, position};
  bool finite = true;
  const mill::Choice choice = sampling.masked() ? mill::choose_masked(logits, nullptr, count, sampling, finite)
                                                : mill::choose(logits, nullptr, 0, count, sampling, finite);
  return finite ? choice.token : -1;
}
