// sequence_partials, gspo_forward and gspo_backward for CUDA, under the names of gspo_megatron/ops/sequence_ratio.py.
//
// Built only where torch has CUDA and nvcc is there (setup.py). Never yet run on a GPU. Checks what the host can see,
// allocates outputs and scratch from torch's allocator, and launches on the current stream; it never waits for the
// device, so the operators can be captured in a CUDA graph. What the CPU library raises for the values of cu_seqlens
// shows here as a loss that is not a number (csrc/cuda/blocks.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../cuda/sequence_ratio_cuda.h"
#include "checks.h"
#include "cuda.h"

namespace gspo {
namespace {

using namespace cuda;

at::Tensor sequence_partials(const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& mask,
                             const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& entropy,
                             const std::optional<at::Tensor>& token_advantages) {
  const at::Device device = logp_new.device();
  const c10::cuda::CUDAGuard guard(device);
  const int64_t tokens = logp_new.numel();
  cuda::PartialsArguments a = {};
  // Held until the launches are queued: contiguous() may have made copies, whose memory the stream's order then guards.
  const at::Tensor fresh = vector(logp_new, "logp_new", tokens, device);
  const at::Tensor old = vector(logp_old, "logp_old", tokens, device);
  const at::Tensor kept = vector(mask, "mask", tokens, device), bounds = boundary_vector(cu_seqlens, device);
  a.logp_new = {fresh.const_data_ptr(), float_type(fresh, "logp_new")};
  a.logp_old = {old.const_data_ptr(), float_type(old, "logp_old")};
  a.mask = {kept.const_data_ptr(), mask_type(kept)};
  at::Tensor entropies, advantages;
  if (entropy) {
    entropies = vector(*entropy, "entropy", tokens, device);
    a.entropy = {entropies.const_data_ptr(), float_type(entropies, "entropy")};
  }
  if (token_advantages) {
    advantages = vector(*token_advantages, "advantages", tokens, device);
    a.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
  }
  a.packing = packing_of(bounds, tokens);
  a.columns = token_advantages ? kTokenColumns : kColumns;
  const at::Tensor table = fp64({a.packing.num_sequences, a.columns}, device);
  const at::Tensor scratch = fp64({scratch_rows(tokens), a.columns}, device);
  a.table = table.mutable_data_ptr<double>();
  a.scratch = scratch.mutable_data_ptr<double>();
  C10_CUDA_CHECK(cuda::launch_partials(a, c10::cuda::getCurrentCUDAStream()));
  return table;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gspo_forward(
    const at::Tensor& logp_new, const at::Tensor& partials, const at::Tensor& advantages, const at::Tensor& mask,
    const at::Tensor& cu_seqlens, double clip_low, double clip_high, double denominator, double clip_dual) {
  const at::Device device = logp_new.device();
  const c10::cuda::CUDAGuard guard(device);
  const int64_t size = cu_seqlens.numel() - 1, tokens = logp_new.numel();
  vector(mask, "mask", tokens, device);  // read by the backward alone; an error belongs here
  mask_type(mask);
  float_type(logp_new, "logp_new");
  const at::Tensor bounds = boundary_vector(cu_seqlens, device);
  const bool by_token = check_forward(partials, advantages, size, tokens, denominator, device);

  const at::Tensor table = partials.contiguous(), weights = advantages.contiguous();
  const at::Tensor ratios = fp64({size}, device), clipped = fp64({size, 2}, device);
  const at::Tensor slopes = fp64({size, 2}, device), loss = fp64({}, device);
  const at::Tensor scratch = fp64({cuda::objective_rows(size)}, device);
  cuda::ForwardArguments a = {};
  a.packing = packing_of(bounds, tokens);
  a.partials = table.const_data_ptr<double>();
  a.columns = static_cast<int>(table.size(1));
  if (!by_token) a.advantages = {weights.const_data_ptr(), advantage_type(weights)};
  a.clip = {1.0 - clip_low, 1.0 + clip_high, clip_dual};
  a.denominator = denominator;
  a.ratios = ratios.mutable_data_ptr<double>();
  a.clipped = clipped.mutable_data_ptr<double>();
  a.slopes = slopes.mutable_data_ptr<double>();
  a.scratch = scratch.mutable_data_ptr<double>();
  a.loss = loss.mutable_data_ptr<double>();
  C10_CUDA_CHECK(cuda::launch_forward(a, c10::cuda::getCurrentCUDAStream()));
  return {loss, ratios, clipped, slopes};
}

at::Tensor gspo_backward(const at::Tensor& grad_loss, const at::Tensor& slopes,
                         const std::optional<at::Tensor>& token_advantages, const at::Tensor& mask,
                         const at::Tensor& cu_seqlens, double denominator, at::ScalarType dtype) {
  const at::Device device = mask.device();
  const c10::cuda::CUDAGuard guard(device);
  const int64_t tokens = mask.numel();
  check_backward(grad_loss, slopes, cu_seqlens.numel() - 1, device);
  const at::Tensor kept = vector(mask, "mask", tokens, device), bounds = boundary_vector(cu_seqlens, device);
  const at::Tensor factors = slopes.contiguous();
  const at::Tensor out = at::empty({tokens}, at::TensorOptions().dtype(dtype).device(device));
  cuda::GradientArguments a = {};
  a.packing = packing_of(bounds, tokens);
  a.gradient = out.mutable_data_ptr();
  a.type = float_type(out, "gradient");
  a.mask = {kept.const_data_ptr(), mask_type(kept)};
  at::Tensor advantages;
  if (token_advantages) {
    advantages = vector(*token_advantages, "advantages", tokens, device);
    a.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
  }
  a.slopes = factors.const_data_ptr<double>();
  a.grad_loss = grad_loss.const_data_ptr<double>();
  a.denominator = denominator;
  C10_CUDA_CHECK(cuda::launch_gradient(a, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace gspo

TORCH_LIBRARY_IMPL(gspo_megatron, CUDA, m) {
  m.impl("sequence_partials", gspo::sequence_partials);
  m.impl("gspo_forward", gspo::gspo_forward);
  m.impl("gspo_backward", gspo::gspo_backward);
}
