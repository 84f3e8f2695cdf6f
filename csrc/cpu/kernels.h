// The CPU kernels as a table of functions, one table for each instruction set. kernels_generic.cpp, kernels_avx2.cpp
// and kernels_avx512.cpp fill them from sequence_ratio.inc, sequence_results.inc and token_surrogate.inc; dispatch.cpp
// chooses one.
#pragma once

#include <stdint.h>

#include "../scalars.h"
#include "../sequence_ratio.h"

namespace gspo {

struct PartialsArguments {
  Vector logp_new, logp_old, mask;  // logp_old: kFloat, kDouble or logp_new's type; mask: kFloat or kByte
  Vector entropy, advantages;       // may be nothing
  const int32_t* cu_seqlens;        // [S + 1], monotone, inside [0, T]
  int64_t num_sequences, num_tokens;
  int columns;      // kColumns or kTokenColumns
  double* table;    // [S, columns]
  double* scratch;  // [scratch_rows(T), columns]
};

struct ResultArguments {
  const double* table;  // [S, columns]
  int columns;
  Vector advantages;  // [S] kFloat or kDouble; nothing where they differ by token
  ClipBounds clip;
  double *ratios, *clipped, *slopes;  // [S], [S, 2], [S, 2]
};

struct GradientArguments {
  void* gradient;  // [T]
  Scalar type;
  Vector mask, advantages;    // advantages: nothing where they are one a sequence
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t num_sequences;
  const double* slopes;  // [S, 2]
  double scale;          // multiplies the slopes
};

// What both passes of the token surrogate read.
struct SurrogateTokens {
  Vector logp_new, logp_old, mask;  // of any type; kByte only for the mask
  Vector advantages;                // [T] where by_token, else [S]; kFloat or kDouble
  bool by_token;
  const int32_t* cu_seqlens;  // [S + 1], monotone, inside [0, T]
  int64_t num_sequences;
  ClipBounds clip;
};

struct SurrogateForwardArguments {
  SurrogateTokens tokens;
  Vector entropy;   // may be nothing
  double* table;    // [S, kSurrogateColumns]
  double* scratch;  // [scratch_rows(T), kSurrogateColumns]
};

struct SurrogateBackwardArguments {
  SurrogateTokens tokens;
  const double* grad;  // [S], d loss / d objective
  void* gradient;      // [T]
  Scalar type;
};

struct Kernels {
  const char* instruction_set;
  // Every block whose first token is in [begin, end).
  void (*partials)(const PartialsArguments&, int64_t begin, int64_t end);
  // Sequences [begin, end); returns the sum of their objectives.
  double (*results)(const ResultArguments&, int64_t begin, int64_t end);
  // Tokens [begin, end).
  void (*gradient)(const GradientArguments&, int64_t begin, int64_t end);
  // As partials, and as gradient.
  void (*surrogate_forward)(const SurrogateForwardArguments&, int64_t begin, int64_t end);
  void (*surrogate_backward)(const SurrogateBackwardArguments&, int64_t begin, int64_t end);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GSPO_X86_KERNELS 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The widest set that this machine has; GSPO_MEGATRON_ISA=generic|avx2|avx512 asks for a narrower one.
const Kernels& kernels();

}  // namespace gspo
