// The CUDA kernels: blocks.h on a grid, with the exchange of sums between threads.
#include "sequence_ratio_cuda.h"
#include "threads.h"

namespace gspo {
namespace cuda {
namespace {

template <int kN>
__global__ void __launch_bounds__(kThreads) partials_kernel(const PartialsArguments a) {
  const Block block = block_at(a.packing, blockIdx.x);
  if (!block.exists) return;  // all threads alike
  double sums[kN] = {};
  thread_partials(a, block, threadIdx.x, sums);
  add_threads(sums);
  if (threadIdx.x == 0) {
    double* row = row_at(a, blockIdx.x);
#pragma unroll
    for (int c = 0; c < kN; ++c) row[c] = sums[c];
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const PartialsArguments a) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < a.packing.num_sequences * a.columns) finish_column(a, i / a.columns, (int)(i % a.columns));
}

__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArguments a) {
  const int64_t s = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  double objective[1] = {s < a.packing.num_sequences ? sequence_forward(a, s) : 0.0};
  add_threads(objective);
  if (threadIdx.x == 0) a.scratch[blockIdx.x] = objective[0];
}

__global__ void __launch_bounds__(kThreads) loss_kernel(const ForwardArguments a) {
  double objective[1] = {thread_objective(a, threadIdx.x)};
  add_threads(objective);
  if (threadIdx.x == 0) *a.loss = -objective[0] / a.denominator;
}

__global__ void __launch_bounds__(kThreads) gradient_kernel(const GradientArguments a) {
  thread_gradient(a, blockIdx.x, threadIdx.x);
}

}  // namespace

cudaError_t launch_partials(const PartialsArguments& a, cudaStream_t stream) {
  const unsigned places = (unsigned)block_places(a.packing);
  if (a.columns == kTokenColumns) {
    partials_kernel<kTokenColumns><<<places, kThreads, 0, stream>>>(a);
  } else {
    partials_kernel<kColumns><<<places, kThreads, 0, stream>>>(a);
  }
  const int64_t cells = a.packing.num_sequences * a.columns;
  if (cells > 0) finish_kernel<<<(unsigned)divide_up(cells, kThreads), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_forward(const ForwardArguments& a, cudaStream_t stream) {
  const unsigned rows = (unsigned)objective_rows(a.packing.num_sequences);
  if (rows > 0) forward_kernel<<<rows, kThreads, 0, stream>>>(a);
  loss_kernel<<<1, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_gradient(const GradientArguments& a, cudaStream_t stream) {
  const unsigned spans = (unsigned)divide_up(a.packing.num_tokens, kSpan);
  if (spans > 0) gradient_kernel<<<spans, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace gspo
