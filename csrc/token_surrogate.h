// Arithmetic of the surrogate that clips each token by itself (GRPO, Dr. GRPO, DAPO, PPO) that every device shares.
//
// A template of the number: the same lines are compiled for one double (CUDA) and for a register of doubles (CPU).
#pragma once

#include "sequence_ratio.h"

namespace gspo {

// Columns of the forward's table after the kColumns of the sequence ratio.
enum SurrogateColumn : int {
  kClippedLow = 6,   // trained tokens that lost their gradient to the lower bound
  kClippedHigh = 7,  // and to an upper one
  kObjective = 8,    // sum of m min(r A, clip(r) A)
  kSurrogateColumns = 9,
};

template <class Number>
struct TokenTerms {
  Number objective;  // min(r A, clip(r) A), and where A < 0 not below dual A
  Number slope;      // d objective / d logp_new
  Number low, high;  // 1 where the token lost its gradient to the lower bound, to an upper one; else 0
};

// A token that is not trained has advantage 0. Every product is formed everywhere and the wrong ones are dropped: a
// ratio of infinity that is clipped or has no weight leaves no trace. Comparisons let a ratio or an advantage that is
// not a number through to objective and slope.
template <class Number>
GSPO_INLINE TokenTerms<Number> token_terms(Number ratio, Number advantage, ClipBounds clip) {
  const Number zero = {}, one = zero + 1.0;
  const auto up = advantage > zero, down = advantage < zero;
  const auto low = down & (ratio < zero + clip.low);
  const auto above = up & (ratio > zero + clip.high), over = down & (ratio > zero + clip.dual);
  const Number free = advantage == zero ? zero : ratio * advantage;
  Number bounded = above ? advantage * clip.high : free;
  bounded = over ? advantage * clip.dual : bounded;
  bounded = low ? advantage * clip.low : bounded;
  const auto flat = low | above | over;
  return {bounded, flat ? zero : free, low ? one : zero, (above | over) ? one : zero};
}

}  // namespace gspo
