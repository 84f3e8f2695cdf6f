// Which block, thread and row does what on a GPU: everything in the kernels but the launch and the exchange in a block.
//
// A sequence's blocks of kBlockTokens (sequence_ratio.h) are one GPU block each. Their number is known to the device
// alone, so the grid has a place for each that there can be: S first blocks, in the table's rows, then one place for
// each scratch row. Sums are fp64 and added in one order that depends on nothing but the sequence's length: a thread's
// tokens in order, lanes by halving distances, warps in order, blocks in order. No atomics.
//
// cu_seqlens is on the device too, so no error can be raised for its values. They are clamped to [0, T], which keeps
// every access in range, and a sequence with bounds that are out of order or out of range has not-a-number in its row,
// which reaches the loss.
#pragma once

#include "numbers.h"

namespace gspo {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kSpan = kThreads * kGroup;  // tokens that a block takes at once

struct Packing {
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t num_sequences;
  int64_t num_tokens;
};

struct PartialsArguments {
  Packing packing;
  Vector logp_new, logp_old, mask;  // any type that the operator takes; kByte only for the mask
  Vector entropy, advantages;       // may be nothing
  int columns;      // kColumns, or kTokenColumns where there are advantages
  double* table;    // [S, columns]
  double* scratch;  // [scratch_rows(T), columns]
};

struct ForwardArguments {
  Packing packing;
  const double* partials;  // [S, columns]
  int columns;
  Vector advantages;  // [S], or nothing where they differ by token
  ClipBounds clip;
  double denominator;
  double *ratios, *clipped, *slopes;  // [S], [S, 2], [S, 2]
  double* scratch;                    // [objective_rows(S)]
  double* loss;                       // []
};

struct GradientArguments {
  Packing packing;
  void* gradient;  // [T]
  Scalar type;
  Vector mask, advantages;  // advantages: nothing where they are one a sequence
  const double* slopes;     // [S, 2]
  const double* grad_loss;  // []
  double denominator;
};

GSPO_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Packing ----

GSPO_INLINE int64_t bound(const Packing& p, int64_t s) {
  GSPO_EXPECT(s >= 0 && s <= p.num_sequences);
  const int64_t token = p.cu_seqlens[s];
  return token < 0 ? 0 : least(token, p.num_tokens);
}

GSPO_INLINE bool sound(const Packing& p, int64_t s) {
  GSPO_EXPECT(s >= 0 && s < p.num_sequences);
  const int64_t begin = p.cu_seqlens[s], end = p.cu_seqlens[s + 1];
  return begin >= 0 && begin <= end && end <= p.num_tokens;
}

struct Block {
  int64_t begin, end;  // its tokens
  int64_t sequence;
  bool exists;
};

GSPO_INLINE int64_t block_places(const Packing& p) { return p.num_sequences + scratch_rows(p.num_tokens); }

// The first block of sequence `place`, or the later block that keeps its sums in scratch row `place - S`.
GSPO_INLINE Block block_at(const Packing& p, int64_t place) {
  const int64_t n = p.num_sequences;
  if (place < n) {
    const int64_t begin = bound(p, place);
    return {begin, least(bound(p, place + 1), begin + kBlockTokens), place, true};
  }
  // Its start is in [line, line + kBlockTokens), so its sequence starts before that: the last one that does, since
  // later blocks of a sequence that starts in there are past it.
  const int64_t line = (place - n) * kBlockTokens;
  const int64_t s = first_starting_at(p.cu_seqlens, n, line) - 1;
  if (s < 0) return {0, 0, 0, false};
  const int64_t origin = bound(p, s), stop = bound(p, s + 1);
  const int64_t start = origin + divide_up(line - origin, kBlockTokens) * kBlockTokens;
  return {start, least(stop, start + kBlockTokens), s, start < least(stop, line + kBlockTokens)};
}

// ---- Sums by sequence ----

// Here and in finish_column `Arguments` has packing, columns, table and scratch.
template <class Arguments>
GSPO_INLINE double* row_at(const Arguments& a, int64_t place) {
  const int64_t n = a.packing.num_sequences;
  GSPO_EXPECT(place >= 0 && place < block_places(a.packing));
  return place < n ? a.table + place * a.columns : a.scratch + (place - n) * a.columns;
}

template <int kN>
GSPO_INLINE void add_token(double (&sums)[kN], double fresh, double old, double mask, double entropy,
                           double advantage) {
  if (!(mask > 0)) return;  // what stands at a masked token, not-a-number included, is nothing
  const double d = fresh - old;
  double part[kN];
  part[kNumTokens] = 1.0;
  part[kSumLogRatio] = d;
  part[kSumSquares] = d * d;
  part[kSumK3] = k3_term(d);
  part[kMaxAbs] = fabs(d);
  part[kSumEntropy] = entropy;
  if constexpr (kN == kTokenColumns) {
    part[kSumPositive] = advantage < 0 ? 0.0 : advantage;  // not-a-number goes here
    part[kSumNegative] = advantage < 0 ? advantage : 0.0;
    part[kNumPositive] = advantage > 0 ? 1.0 : 0.0;
    part[kNumNegative] = advantage < 0 ? 1.0 : 0.0;
  }
  add_partials(sums, part, kN);
}

// The share of one thread: groups of tokens, kSpan apart.
template <int kN>
GSPO_INLINE void thread_partials(const PartialsArguments& a, const Block& block, int thread, double (&sums)[kN]) {
  const int64_t size = a.packing.num_tokens;
  for (int64_t first = block.begin + thread * kGroup; first < block.end; first += kSpan) {
    const int64_t count = least(kGroup, block.end - first);
    double fresh[kGroup], old[kGroup], mask[kGroup], entropy[kGroup], advantage[kGroup];
    load_group(a.logp_new, size, first, count, fresh);
    load_group(a.logp_old, size, first, count, old);
    load_group(a.mask, size, first, count, mask);  // zeros past the end, so those tokens are not trained
    load_group(a.entropy, size, first, count, entropy);
    load_group(kN == kTokenColumns ? a.advantages : Vector{}, size, first, count, advantage);
    GSPO_UNROLL
    for (int i = 0; i < kGroup; ++i) add_token(sums, fresh[i], old[i], mask[i], entropy[i], advantage[i]);
  }
}

// The second level: adds one column of a sequence's later blocks to its first one's.
template <class Arguments>
GSPO_INLINE void finish_column(const Arguments& a, int64_t s, int column) {
  GSPO_EXPECT(s >= 0 && s < a.packing.num_sequences && column >= 0 && column < a.columns);
  double& out = a.table[s * a.columns + column];
  if (!sound(a.packing, s)) {
    // One token, or the loss would take the sequence for an empty one.
    out = column == kNumTokens ? 1.0 : NAN;
    return;
  }
  const int64_t end = bound(a.packing, s + 1);
  double total = out;
  for (int64_t at = bound(a.packing, s) + kBlockTokens; at < end; at += kBlockTokens) {
    GSPO_EXPECT(scratch_row(at) < scratch_rows(a.packing.num_tokens));
    total = add_column(total, a.scratch[scratch_row(at) * a.columns + column], column);
  }
  out = total;
}

// ---- The loss ----

GSPO_INLINE int64_t objective_rows(int64_t num_sequences) { return divide_up(num_sequences, kThreads); }

// Ratio, clip decision and slopes of one sequence. Returns its share of the objective.
GSPO_INLINE double sequence_forward(const ForwardArguments& a, int64_t s) {
  GSPO_EXPECT(s >= 0 && s < a.packing.num_sequences);
  const double* row = a.partials + s * a.columns;
  SequenceResult one;
  if (a.advantages.data == nullptr) {
    one = sequence_result<true>(row, 0.0, a.clip);
  } else {
    const double advantage = a.advantages.type == Scalar::kDouble ? ((const double*)a.advantages.data)[s]
                                                                  : ((const float*)a.advantages.data)[s];
    one = sequence_result<false>(row, advantage, a.clip);
  }
  a.ratios[s] = one.ratio;
  a.clipped[2 * s] = one.clipped_low;
  a.clipped[2 * s + 1] = one.clipped_high;
  a.slopes[2 * s] = one.slope_positive;
  a.slopes[2 * s + 1] = one.slope_negative;
  return sound(a.packing, s) ? one.objective : NAN;
}

// What one thread of the last block adds of the blocks' objectives.
GSPO_INLINE double thread_objective(const ForwardArguments& a, int thread) {
  double total = 0.0;
  for (int64_t row = thread; row < objective_rows(a.packing.num_sequences); row += kThreads) total += a.scratch[row];
  return total;
}

// ---- The gradient ----

// The tokens that one thread takes in a pass over all, and the sequence of the one that it is at.
struct Group {
  int64_t first, count;
  int64_t s, start, stop;  // sequence and its tokens; s = S behind the last one
};

// Group `thread` of the span of tokens with this number; count is 0 past the end. Here groups start at multiples of
// kGroup from the vector's own start, so nearly every access is wide.
GSPO_INLINE Group group_at(const Packing& p, int64_t span, int thread) {
  const int64_t begin = span * kSpan, end = least(begin + kSpan, p.num_tokens), first = begin + thread * kGroup;
  if (first >= end) return {first, 0, 0, 0, 0};
  // All threads of a block look for its two ends, which costs one broadcast read a step, and then between them.
  const int32_t* cu = p.cu_seqlens;
  const int64_t n = p.num_sequences, low = sequence_of(cu, n, begin), high = sequence_of(cu, n, end - 1);
  // The sequence's own tokens are looked up at the first token.
  return {first, least(kGroup, end - first), low + sequence_of(cu + low, high - low, first), p.num_tokens, 0};
}

// Whether token t, which is not before the last one asked for, is of another sequence; moves there.
GSPO_INLINE bool moved(const Packing& p, Group& at, int64_t t) {
  if (t < at.stop) return false;
  at.s += sequence_of(p.cu_seqlens + at.s, p.num_sequences - at.s, t);
  at.start = at.s < p.num_sequences ? bound(p, at.s) : p.num_tokens;
  at.stop = at.s < p.num_sequences ? bound(p, at.s + 1) : p.num_tokens;
  return true;
}

// The share of one thread.
GSPO_INLINE void thread_gradient(const GradientArguments& a, int64_t span, int thread) {
  const int64_t size = a.packing.num_tokens;
  Group at = group_at(a.packing, span, thread);
  if (at.count == 0) return;
  double mask[kGroup], advantage[kGroup], slope[kGroup];
  load_group(a.mask, size, at.first, at.count, mask);
  load_group(a.advantages, size, at.first, at.count, advantage);
  const double scale = -*a.grad_loss / a.denominator;
  double positive = 0.0, negative = 0.0;
  GSPO_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const int64_t t = at.first + i;
    slope[i] = 0.0;
    if (i >= at.count) continue;
    if (moved(a.packing, at, t)) {
      positive = at.s < a.packing.num_sequences ? scale * a.slopes[2 * at.s] : 0.0;
      negative = at.s < a.packing.num_sequences ? scale * a.slopes[2 * at.s + 1] : 0.0;
    }
    if (t >= at.start && mask[i] > 0) {
      slope[i] = a.advantages.data ? token_slope<true>(positive, negative, advantage[i]) : positive;
    }
  }
  store_group(a.gradient, a.type, size, at.first, at.count, slope);
}

}  // namespace cuda
}  // namespace gspo
