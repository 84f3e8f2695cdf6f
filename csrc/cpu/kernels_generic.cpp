// All CPU kernels for any machine.
#define GSPO_ISA generic
#define GSPO_LANES 2  // SSE2, NEON
#include "sequence_ratio.inc"
#include "sequence_results.inc"
#include "token_surrogate.inc"

namespace gspo {
const Kernels kGenericKernels = {
    "generic", generic::partials, generic::results, generic::gradient,
    generic::surrogate_forward, generic::surrogate_backward,
};
}
