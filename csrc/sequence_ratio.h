// Arithmetic of the sequence ratio (GSPO, arXiv 2507.18071, equations 5 to 7, 13 and 14) that every device shares.
//
// Two parts: which tokens make a block and where its partial sums go, and what one sequence's sums become (ratio, clip
// decision, loss term, gradient). Plain inline functions of numbers and raw pointers, without torch headers, so that
// any compiler for any device builds them in a moment. `static` and always inline on purpose: the CPU kernels compile
// this file once for each instruction set, and a shared symbol would let the linker pick the wide one for old machines.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define GSPO_INLINE static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GSPO_INLINE static inline __attribute__((always_inline))
#else
#define GSPO_INLINE static inline
#endif

namespace gspo {

// Columns of the table of partial sums; the same order as SequenceTable.COLUMNS in gspo_megatron/batch.py.
enum Column : int {
  kNumTokens = 0,
  kSumLogRatio = 1,
  kSumSquares = 2,
  kSumK3 = 3,
  kMaxAbs = 4,
  kSumEntropy = 5,
  kColumns = 6,
  // Only where advantages differ by token: all that the GSPO-token loss needs of them.
  kSumPositive = 6,  // sum of m A over A > 0
  kSumNegative = 7,
  kNumPositive = 8,  // sum of m over A > 0
  kNumNegative = 9,
  kTokenColumns = 10,
};

// ---- Index arithmetic ------------------------------------------------------------------------------------------
//
// A sequence is cut into blocks of kBlockTokens counted from its own first token, the last one shorter; a sequence
// without tokens is one empty block. A block's sums never depend on who computes it, and blocks are added in order, so
// the table has the same bits for any number of threads and for any packing.

constexpr int64_t kBlockTokens = 4096;

GSPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Smallest s in [0, n] with cu[s] >= token, n where there is none.
GSPO_INLINE int64_t first_starting_at(const int32_t* cu, int64_t n, int64_t token) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cu[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sequence that holds this token, n for a token past the last sequence. Sequences without tokens hold none.
GSPO_INLINE int64_t sequence_of(const int32_t* cu, int64_t n, int64_t token) {
  return first_starting_at(cu + 1, n, token + 1);
}

// Blocks after a sequence's first keep their sums in a scratch row of this number until they are added. No two blocks
// share one: in a sequence starts are kBlockTokens apart, between sequences further, since first blocks have none.
GSPO_INLINE int64_t scratch_row(int64_t block_start) { return block_start / kBlockTokens; }
GSPO_INLINE int64_t scratch_rows(int64_t num_tokens) { return num_tokens / kBlockTokens + 1; }

// Calls visit(sequence, first token, end token) for every block whose first token is in [begin, end). Ranges that
// together cover [0, T] (T included: a last sequence may be empty) visit every block once.
template <class Visit>
GSPO_INLINE void for_each_block(const int32_t* cu, int64_t n, int64_t begin, int64_t end, const Visit& visit) {
  int64_t s = first_starting_at(cu, n, begin);
  if (s > 0) {  // the sequence before may reach into the range with a later block
    const int64_t origin = cu[s - 1], stop = cu[s];
    const int64_t skipped = (begin - origin + kBlockTokens - 1) / kBlockTokens;
    for (int64_t start = origin + skipped * kBlockTokens; start < least(stop, end); start += kBlockTokens) {
      visit(s - 1, start, least(start + kBlockTokens, stop));
    }
  }
  for (; s < n && cu[s] < end; ++s) {
    const int64_t stop = cu[s + 1];
    int64_t start = cu[s];
    do {
      visit(s, start, least(start + kBlockTokens, stop));
      start += kBlockTokens;
    } while (start < least(stop, end));
  }
}

GSPO_INLINE double add_column(double total, double part, int column) {
  if (column != kMaxAbs) return total + part;
  return part <= total || total != total ? total : part;  // a not-a-number on either side stays one
}

// Adds the sums of one block (or of one context-parallel rank) to those of the blocks before it.
GSPO_INLINE void add_partials(double* total, const double* part, int columns) {
  for (int c = 0; c < columns; ++c) total[c] = add_column(total[c], part[c], c);
}

// ---- One sequence ----------------------------------------------------------------------------------------------

struct ClipBounds {
  double low;   // 1 - eps_low
  double high;  // 1 + eps_high
  double dual;  // where A < 0 the ratio is bounded above by this too; infinity: not
};

struct SequenceResult {
  double ratio;             // s = exp(mean log-ratio); 1 for a sequence without trained tokens
  double objective;         // its share of J before the division by the number of sequences
  double clipped_low;       // tokens that lost their gradient to the lower bound
  double clipped_high;      // and to an upper one
  double slope_positive;    // d objective / d logp_t, by sequence: the slope itself; by token: to be multiplied by A_t
  double slope_negative;    // the same where A_t < 0
};

GSPO_INLINE double mean_log_ratio(const double* partials) {
  const double tokens = partials[kNumTokens], mean = partials[kSumLogRatio] / tokens;
  return tokens > 0 ? mean : 0.0;
}

// min(s A, clip(s) A) is A min(s, high) for A > 0 and A max(s, low) for A < 0 (there s is at most dual), so the tokens
// of a sequence enter by the sum of their positive and of their negative advantages alone. Comparisons let a ratio that
// is not a number through. Nothing here is a branch, so that a loop over sequences becomes one of vectors.
template <bool kByToken>
GSPO_INLINE SequenceResult result_at_ratio(double s, const double* partials, double advantage, ClipBounds clip) {
  SequenceResult out = {s, 0.0, 0.0, 0.0, 0.0, 0.0};
  const double tokens = partials[kNumTokens];
  const bool above = s > clip.high, below = s < clip.low, over = s > clip.dual;
  const double for_positive = above ? clip.high : s, for_negative = below ? clip.low : over ? clip.dual : s;
  if (kByToken) {
    const double positive = partials[kSumPositive], num_positive = partials[kNumPositive];
    const double negative = partials[kSumNegative], num_negative = partials[kNumNegative];
    const double gain = for_positive * positive, loss = for_negative * negative, slope = s / tokens;
    // A ratio of infinity must not meet a sum over no token.
    const double sum = (num_positive > 0 ? gain : 0.0) + (num_negative > 0 ? loss : 0.0);
    // An advantage that is not a number is in neither count; the sums carry it.
    out.objective = (positive != positive ? positive : sum) / tokens;
    out.clipped_low = below ? num_negative : 0.0;
    out.clipped_high = (above ? num_positive : 0.0) + (over ? num_negative : 0.0);
    out.slope_positive = above ? 0.0 : slope;
    out.slope_negative = below | over ? 0.0 : slope;
  } else {
    const bool minus = advantage < 0, plus = advantage > 0;
    const bool low = below & minus, high = (above & plus) | (over & minus);
    const double slope = s * advantage / tokens;
    out.objective = (minus ? for_negative : for_positive) * advantage;
    out.clipped_low = low ? tokens : 0.0;
    out.clipped_high = high ? tokens : 0.0;
    out.slope_positive = out.slope_negative = low | high ? 0.0 : slope;
  }
  const bool counted = tokens > 0;
  out.objective = counted ? out.objective : 0.0;
  out.slope_positive = counted ? out.slope_positive : 0.0;
  out.slope_negative = counted ? out.slope_negative : 0.0;
  return out;
}

template <bool kByToken>
GSPO_INLINE SequenceResult sequence_result(const double* partials, double advantage, ClipBounds clip) {
  return result_at_ratio<kByToken>(exp(mean_log_ratio(partials)), partials, advantage, clip);
}

// d objective / d logp_t of one trained token.
template <bool kByToken>
GSPO_INLINE double token_slope(double positive, double negative, double advantage) {
  return kByToken ? advantage * (advantage < 0 ? negative : positive) : positive;
}

}  // namespace gspo
