// token_surrogate_forward and token_surrogate_backward for CUDA, under the names of
// gspo_megatron/ops/token_surrogate.py.
//
// As sequence_ratio_cuda.cpp: built only where torch has CUDA, never yet run on a GPU, never waits for the device; wrong
// values of cu_seqlens show as an objective that is not a number.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../cuda/token_surrogate_cuda.h"
#include "checks.h"
#include "cuda.h"

namespace gspo {
namespace {

using namespace cuda;

// The inputs of both passes, checked and contiguous; held until the launches are queued.
struct Inputs {
  at::Tensor fresh, old, mask, bounds, advantages;
  Packing packing;
  SurrogateTokens tokens;

  Inputs(const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& loss_mask,
         const at::Tensor& cu_seqlens, const at::Tensor& weights, ClipBounds clip) {
    const int64_t size = logp_new.numel();
    const at::Device device = logp_new.device();
    fresh = vector(logp_new, "logp_new", size, device);
    tokens.logp_new = {fresh.const_data_ptr(), float_type(fresh, "logp_new")};
    mask = vector(loss_mask, "mask", size, device);
    tokens.mask = {mask.const_data_ptr(), mask_type(mask)};
    bounds = boundary_vector(cu_seqlens, device);
    packing = packing_of(bounds, size);
    old = vector(logp_old, "logp_old", size, device);
    tokens.logp_old = {old.const_data_ptr(), float_type(old, "logp_old")};
    tokens.by_token = check_advantages(weights, packing.num_sequences, size, device);
    advantages = weights.contiguous();
    tokens.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
    tokens.clip = clip;
  }
};

std::tuple<at::Tensor, at::Tensor> token_surrogate_forward(
    const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& mask, const at::Tensor& cu_seqlens,
    const std::optional<at::Tensor>& entropy, const at::Tensor& advantages, double clip_low, double clip_high,
    double clip_dual) {
  const at::Device device = logp_new.device();
  const c10::cuda::CUDAGuard guard(device);
  const int64_t tokens = logp_new.numel();
  const Inputs in(logp_new, logp_old, mask, cu_seqlens, advantages, {1.0 - clip_low, 1.0 + clip_high, clip_dual});
  Vector entropy_vector;
  at::Tensor entropies;
  if (entropy) {
    entropies = vector(*entropy, "entropy", tokens, device);
    entropy_vector = {entropies.const_data_ptr(), float_type(entropies, "entropy")};
  }
  const int64_t size = in.packing.num_sequences;
  const at::Tensor table = fp64({size, kSurrogateColumns}, device), objective = fp64({size}, device);
  const at::Tensor scratch = fp64({scratch_rows(tokens), kSurrogateColumns}, device);
  const SurrogateForwardArguments a = {in.packing,
                                       in.tokens,
                                       entropy_vector,
                                       table.mutable_data_ptr<double>(),
                                       scratch.mutable_data_ptr<double>(),
                                       objective.mutable_data_ptr<double>()};
  C10_CUDA_CHECK(launch_surrogate(a, c10::cuda::getCurrentCUDAStream()));
  return {objective, table};
}

at::Tensor token_surrogate_backward(const at::Tensor& grad, const at::Tensor& logp_new, const at::Tensor& logp_old,
                                    const at::Tensor& mask, const at::Tensor& cu_seqlens, const at::Tensor& advantages,
                                    double clip_low, double clip_high, double clip_dual) {
  const at::Device device = logp_new.device();
  const c10::cuda::CUDAGuard guard(device);
  const Inputs in(logp_new, logp_old, mask, cu_seqlens, advantages, {1.0 - clip_low, 1.0 + clip_high, clip_dual});
  check_grad(grad, in.packing.num_sequences, device);
  const at::Tensor factors = grad.contiguous();
  const at::Tensor out = at::empty({logp_new.numel()}, logp_new.options());
  const SurrogateBackwardArguments a = {in.packing, in.tokens, factors.const_data_ptr<double>(), out.mutable_data_ptr(),
                                        in.tokens.logp_new.type};
  C10_CUDA_CHECK(launch_surrogate_gradient(a, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace gspo

TORCH_LIBRARY_IMPL(gspo_megatron, CUDA, m) {
  m.impl("token_surrogate_forward", gspo::token_surrogate_forward);
  m.impl("token_surrogate_backward", gspo::token_surrogate_backward);
}
