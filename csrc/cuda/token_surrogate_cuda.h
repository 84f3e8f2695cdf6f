// Launches of the token surrogate's kernels, in the manner of sequence_ratio_cuda.h; never yet run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "token_blocks.h"

namespace gspo {
namespace cuda {

// Fills table [S, kSurrogateColumns] and objective [S]; scratch is overwritten.
cudaError_t launch_surrogate(const SurrogateForwardArguments& a, cudaStream_t stream);

// Fills gradient [T], with zeros at tokens of no sequence.
cudaError_t launch_surrogate_gradient(const SurrogateBackwardArguments& a, cudaStream_t stream);

}  // namespace cuda
}  // namespace gspo
