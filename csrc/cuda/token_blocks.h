// The token surrogate's part of a GPU block and thread; blocks.h has the packing and the order of sums.
#pragma once

#include "../token_surrogate.h"
#include "blocks.h"

namespace gspo {
namespace cuda {

// What both passes read.
struct SurrogateTokens {
  Vector logp_new, logp_old, mask;  // any type that the operator takes; kByte only for the mask
  Vector advantages;                // [T] where by_token, else [S]
  bool by_token;
  ClipBounds clip;
};

struct SurrogateForwardArguments {
  static constexpr int columns = kSurrogateColumns;
  Packing packing;
  SurrogateTokens tokens;
  Vector entropy;     // may be nothing
  double* table;      // [S, columns]
  double* scratch;    // [scratch_rows(T), columns]
  double* objective;  // [S]
};

struct SurrogateBackwardArguments {
  Packing packing;
  SurrogateTokens tokens;
  const double* grad;  // [S], d loss / d objective
  void* gradient;      // [T]
  Scalar type;
};

// The advantage of all tokens of sequence s; 0 where they differ by token.
GSPO_INLINE double sequence_advantage(const SurrogateTokens& a, int64_t s) {
  if (a.by_token) return 0.0;
  return a.advantages.type == Scalar::kDouble ? ((const double*)a.advantages.data)[s]
                                              : ((const float*)a.advantages.data)[s];
}

struct TokenGroup {
  double logp_new[kGroup], logp_old[kGroup], mask[kGroup], advantages[kGroup];
};

GSPO_INLINE void load_tokens(const SurrogateTokens& a, int64_t size, int64_t first, int64_t count, TokenGroup& group) {
  load_group(a.logp_new, size, first, count, group.logp_new);
  load_group(a.logp_old, size, first, count, group.logp_old);
  load_group(a.mask, size, first, count, group.mask);  // zeros past the end, so those tokens are not trained
  load_group(a.by_token ? a.advantages : Vector{}, size, first, count, group.advantages);
}

// The share of one thread of a block of one sequence: groups of tokens, kSpan apart.
GSPO_INLINE void thread_surrogate(const SurrogateForwardArguments& a, const Block& block, int thread,
                                  double (&sums)[kSurrogateColumns]) {
  const double of_all = sequence_advantage(a.tokens, block.sequence);
  for (int64_t first = block.begin + thread * kGroup; first < block.end; first += kSpan) {
    const int64_t count = least(kGroup, block.end - first);
    TokenGroup group;
    double entropy[kGroup];
    load_tokens(a.tokens, a.packing.num_tokens, first, count, group);
    load_group(a.entropy, a.packing.num_tokens, first, count, entropy);
    GSPO_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if (!(group.mask[i] > 0)) continue;
      const double d = group.logp_new[i] - group.logp_old[i];
      const double advantage = a.tokens.by_token ? group.advantages[i] : of_all;
      const TokenTerms<double> terms = token_terms(exp(d), advantage, a.tokens.clip);
      const double part[kSurrogateColumns] = {1.0,        d,         d * d,      k3_term(d),     fabs(d),
                                              entropy[i], terms.low, terms.high, terms.objective};
      add_partials(sums, part, kSurrogateColumns);
    }
  }
}

// The second level, and the column that has a vector of its own.
GSPO_INLINE void finish_surrogate(const SurrogateForwardArguments& a, int64_t s, int column) {
  finish_column(a, s, column);
  if (column == kObjective) a.objective[s] = a.table[s * kSurrogateColumns + kObjective];
}

// The share of one thread: group `thread` of the span of tokens with this number.
GSPO_INLINE void thread_surrogate_gradient(const SurrogateBackwardArguments& a, int64_t span, int thread) {
  const int64_t size = a.packing.num_tokens;
  Group at = group_at(a.packing, span, thread);
  if (at.count == 0) return;
  TokenGroup group;
  load_tokens(a.tokens, size, at.first, at.count, group);
  double slope[kGroup], grad = 0.0, of_all = 0.0;
  GSPO_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const int64_t t = at.first + i;
    slope[i] = 0.0;
    if (i >= at.count) continue;
    if (moved(a.packing, at, t) && at.s < a.packing.num_sequences) {
      grad = a.grad[at.s];
      of_all = sequence_advantage(a.tokens, at.s);
    }
    if (t >= at.start && group.mask[i] > 0) {
      const double ratio = exp(group.logp_new[i] - group.logp_old[i]);
      const double advantage = a.tokens.by_token ? group.advantages[i] : of_all;
      slope[i] = grad * token_terms(ratio, advantage, a.tokens.clip).slope;
    }
  }
  store_group(a.gradient, a.type, size, at.first, at.count, slope);
}

}  // namespace cuda
}  // namespace gspo
