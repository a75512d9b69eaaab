// What every kernel takes, and the table of kernels that each instruction set fills.
//
// Letters as in the Python API: B batch, T queries, S keys, N query heads, K kv heads (N = K * G), H head size, L sequence,
// R rows, V vocabulary, D width, E a target's width, C streams of logits, M banned ids.
// In a mixture: E experts, F the width inside one, K experts of each row. Of a product: F columns.
// Arrays are dense and row-major; sizes and offsets are int64.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parallel.h"
#include "types.h"

// kernels_ and DLM_ISA joined are the name of an instruction set's table; in two steps, that DLM_ISA is replaced first.
#define DLM_JOIN_(a, b) a##b
#define DLM_JOIN(a, b) DLM_JOIN_(a, b)

namespace dlm {

struct AttentionArgs {
  DType dtype;                         // of query, key, value, out and their gradients
  int64_t b, t, s, n, k, h;
  const void* query;                   // [B,T,N,H]
  const void* key;                     // [B,S,K,H]
  const void* value;                   // [B,S,K,H]
  const int32_t* bounds;               // [bounds_b,T,bounds_width], [start, stop) pairs; null sees all. Clipped to [0, S], and no
                                       // number of a row below the one before it: disjoint, in order, empty if start == stop
  int64_t bounds_b, bounds_width;      // 1 or B; 2 or 4
  float scale, soft_cap;               // soft_cap 0: none
  void* out;                           // [B,T,N,H], written by forward, read by backward
  float* lse;                          // [B,N,T], likewise
  const void* dout;                    // [B,T,N,H], backward only, as all below
  const float* dlse;                   // [B,N,T]
  void *dquery, *dkey, *dvalue;        // [B,T,N,H], [B,S,K,H], [B,S,K,H]
};

// How tokens are scored, the same for given logits and for those of an LM head.
struct Scoring {
  const float* temperature;            // [R]; null: greedy everywhere; not above 0: greedy in that row
  const uint32_t* key_data;            // [R,2] threefry keys; null without noise of our own
  const int32_t* counter_row;          // [R]: element (r, v) has counter counter_row[r] * V + v
  const float* noise;                  // [R,V] or null
  const bool* active;                  // [R] or null; a row that is not active is not read
  const int32_t* banned;               // [M] token ids; those outside [0, V) are ignored
  int64_t banned_count;
  enum class Confidence { kProbability, kMargin, kNegEntropy } confidence_kind;
  bool tempered_confidence;            // take the distribution from logits / temperature
  float soft_cap;                      // 0: none
  int32_t* token;                      // [R], as all below
  float *confidence, *entropy, *logsumexp;
};

struct ScoreArgs {
  DType dtype;                         // of logits and unconditional
  int64_t r, v;
  const void* logits;                  // [R,V]
  const void* unconditional;           // [R,V] or null
  const float* guidance_scale;         // [R], with unconditional
  Scoring scoring;
};

struct UnmaskArgs {
  int64_t b, l;
  const int32_t *tokens, *proposal;    // [B,L]
  const float *confidence, *entropy;   // [B,L]; entropy only with a budget
  const bool *eligible, *editable;     // [B,L]; editable only with edit_threshold
  const int32_t* num_unmask;           // [B] or null, as the four below
  const float *threshold, *factor, *entropy_budget, *edit_threshold;
  int32_t* new_tokens;                 // [B,L]
  bool* unmasked;                      // [B,L]
  int32_t* count;                      // [B]
};

struct MixArgs {
  DType dtype;
  int64_t streams, r, v;
  const void* logits[2];               // mix: conditional and unconditional [R,V]; combine: [C,R,V] in the first
  const float* weights;                // mix: scale [R]; combine: [C,R]
  void* out;                           // [R,V]
};

struct TruncateArgs {
  DType dtype;                         // of logits and out
  int64_t r, v;
  const void* logits;                  // [R,V]
  const float* inverse_temperature;    // [R], each above 0 and finite
  const float* top_p;                  // [R] or null
  const int32_t* top_k;                // [R] or null
  void* out;                           // [R,V]
};

struct HeadArgs {
  DType dtype;                         // of hidden and weight
  int64_t r, d, v;
  const void* hidden;                  // [R,D]
  const void* weight;                  // [V,D], or as head.h has it packed
  bool packed;
  bool round_logits;                   // to logits_dtype before anything else
  DType logits_dtype;
  Scoring scoring;
};

struct CrossEntropyArgs {
  DType dtype;
  int64_t r, d, v;
  const void* hidden;                  // [R,D]
  const void* weight;                  // [V,D]
  const int32_t* targets;              // [R]
  const bool* active;                  // [R]
  float soft_cap;
  float* loss;                         // [R], forward
  float* lse;                          // [R], written by forward, read by backward
  const float* dloss;                  // [R], backward only, as all below
  void *dhidden, *dweight;             // [R,D], [V,D]
};

struct DivergenceArgs {
  DType dtype;                         // of hidden, weight, the target's and the gradients
  int64_t r, d, e, v;
  const void* hidden;                  // [R,D]
  const void* weight;                  // [V,D]
  const void* target_hidden;           // [R,E]
  const void* target_weight;           // [V,E]
  const bool* active;                  // [R]
  float* loss;                         // [R], forward
  float *lse, *target_lse;             // [R], written by forward, read by backward
  const float* dloss;                  // [R], backward only, as all below
  void *dhidden, *dweight;             // [R,D], [V,D]
};

struct MixtureArgs {
  DType dtype;                         // of x, gate, up, down and out
  int64_t r, k, e, d, f;
  const void* x;                       // [R,D]
  const void *gate, *up;               // [E,D,F]
  const void* down;                    // [E,F,D]
  const int32_t* expert;               // [R,K]; one outside [0, E) makes its row NaN
  const float* weight;                 // [R,K]
  enum class Activation { kSilu, kGelu } activation;
  void* out;                           // [R,D]
};

struct MatmulArgs {
  DType dtype;                         // of x, weight and out
  int64_t r, d, f;
  const void* x;                       // [R,D]
  const void* weight;                  // [D,F]
  void* out;                           // [R,F]
};

// Each kernel, void name(const Args&, const Parallel&): the one list of them, from which the tables and the handlers are made.
#define DLM_KERNELS(EACH)                                \
  EACH(attention_forward, AttentionArgs)                 \
  EACH(attention_backward, AttentionArgs)                \
  EACH(score_tokens, ScoreArgs)                          \
  EACH(unmask_topk, UnmaskArgs)                          \
  EACH(mix_guidance, MixArgs)                            \
  EACH(combine_guidance, MixArgs)                        \
  EACH(truncate_logits, TruncateArgs)                    \
  EACH(lm_head_scores, HeadArgs)                         \
  EACH(masked_cross_entropy_forward, CrossEntropyArgs)   \
  EACH(masked_cross_entropy_backward, CrossEntropyArgs)  \
  EACH(masked_divergence_forward, DivergenceArgs)        \
  EACH(masked_divergence_backward, DivergenceArgs)       \
  EACH(mix_experts, MixtureArgs)                         \
  EACH(matmul, MatmulArgs)

struct Kernels {
  const char* isa;
#define DLM_MEMBER(name, Args) void (*name)(const Args&, const Parallel&);
  DLM_KERNELS(DLM_MEMBER)
#undef DLM_MEMBER
};

// The table for this machine: the best instruction set it has, or the one that DLM_KERNELS_ISA names. Throws
// std::invalid_argument where that is unknown or not to be had here.
const Kernels& kernels();

// What DLM_KERNELS_ISA may name on this machine, best first.
std::vector<std::string> available_isas();

}  // namespace dlm
