// Launches of the CUDA kernels: pointers to device memory, sizes and a stream, without torch headers.
//
// Nothing here allocates, waits or reads device memory on the host, and the grids depend on S and T alone, so the
// launches can be captured in a CUDA graph and replayed with other cu_seqlens of as many sequences. Each returns the
// status of its launches; what goes wrong while a kernel runs shows at a later call, as always in CUDA.
//
// Compiled for sm_80, sm_90 and sm_100 and emulated on a CPU (csrc/tests/cuda_emulation.cpp); never yet run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "blocks.h"

namespace gspo {
namespace cuda {

// Fills table [S, columns]; scratch is overwritten.
cudaError_t launch_partials(const PartialsArguments& a, cudaStream_t stream);

// Fills loss, ratios, clipped and slopes; scratch is overwritten.
cudaError_t launch_forward(const ForwardArguments& a, cudaStream_t stream);

// Fills gradient [T], with zeros at tokens of no sequence.
cudaError_t launch_gradient(const GradientArguments& a, cudaStream_t stream);

}  // namespace cuda
}  // namespace gspo
