// The CUDA kernels of the token surrogate: token_blocks.h on a grid.
#include "threads.h"
#include "token_surrogate_cuda.h"

namespace gspo {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) surrogate_kernel(const SurrogateForwardArguments a) {
  const Block block = block_at(a.packing, blockIdx.x);
  if (!block.exists) return;  // all threads alike
  double sums[kSurrogateColumns] = {};
  thread_surrogate(a, block, threadIdx.x, sums);
  add_threads(sums);
  if (threadIdx.x == 0) {
    double* row = row_at(a, blockIdx.x);
#pragma unroll
    for (int c = 0; c < kSurrogateColumns; ++c) row[c] = sums[c];
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const SurrogateForwardArguments a) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < a.packing.num_sequences * a.columns) finish_surrogate(a, i / a.columns, (int)(i % a.columns));
}

__global__ void __launch_bounds__(kThreads) surrogate_gradient_kernel(const SurrogateBackwardArguments a) {
  thread_surrogate_gradient(a, blockIdx.x, threadIdx.x);
}

}  // namespace

cudaError_t launch_surrogate(const SurrogateForwardArguments& a, cudaStream_t stream) {
  surrogate_kernel<<<(unsigned)block_places(a.packing), kThreads, 0, stream>>>(a);
  const int64_t cells = a.packing.num_sequences * a.columns;
  if (cells > 0) finish_kernel<<<(unsigned)divide_up(cells, kThreads), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_surrogate_gradient(const SurrogateBackwardArguments& a, cudaStream_t stream) {
  const unsigned spans = (unsigned)divide_up(a.packing.num_tokens, kSpan);
  if (spans > 0) surrogate_gradient_kernel<<<spans, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace gspo
