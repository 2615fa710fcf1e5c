// dsnet_mm::co_attention on CUDA: launches the kernels of attention_kernel.cuh, which
// has the equations. The forward is one kernel for each direction, the backward two.

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "../co_attention.h"
#include "attention_kernel.cuh"

namespace dsnet {
namespace {

// Direction 0 has the queries of the local stream, direction 1 those of the global one.
template <typename S>
Direction<S> make_direction(const Tensor (&qkv)[2], int i, const Tensor& seed,
                            int64_t heads, double dropout_p) {
  const Tensor &queries = qkv[i], &keys = qkv[1 - i];
  return {queries.const_data_ptr<S>(),
          keys.const_data_ptr<S>(),
          queries.stride(0),
          queries.stride(1),
          keys.stride(0),
          keys.stride(1),
          queries.size(1),
          keys.size(1),
          heads,
          queries.size(2) / (3 * heads),
          i * queries.size(0) * heads * qkv[0].size(1),
          make_dropout(dropout_p, 0),
          dropout_p > 0 ? seed.const_data_ptr<int64_t>() : nullptr};
}

unsigned grid(int64_t heads, int64_t tokens, int split) {
  const int64_t blocks = num_blocks(heads, tokens, split);
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(),
              "co_attention: too many tokens for one launch");
  return static_cast<unsigned>(blocks);
}

// Calls body with the number of threads that share a token, as a constant.
template <typename Body>
void with_split(int64_t width, const Body& body) {
  if (width <= kChannels)
    body(std::integral_constant<int, 1>());
  else if (width <= 2 * kChannels)
    body(std::integral_constant<int, 2>());
  else
    body(std::integral_constant<int, 4>());
}

template <typename S>
void forward(const Tensor (&qkv)[2], const Tensor& seed, int64_t heads,
             double dropout_p, Tensor (&out)[2], Tensor (&lse)[2]) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t all = qkv[0].size(0) * heads;
  for (int i = 0; i < 2; ++i) {
    const Direction<S> d = make_direction<S>(qkv, i, seed, heads, dropout_p);
    S* o = out[i].mutable_data_ptr<S>();
    float* l = lse[i].mutable_data_ptr<float>();
    with_split(d.width, [&](auto split) {
      forward_kernel<S, split>
          <<<grid(all, d.queries, split), kThreads, 0, stream>>>(d, o, l);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename S>
void backward(const Tensor (&qkv)[2], const Tensor (&grad_out)[2],
              const Tensor (&out)[2], const Tensor (&lse)[2], const Tensor& seed,
              int64_t heads, double dropout_p, Tensor (&grad)[2]) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t all = qkv[0].size(0) * heads;
  for (int i = 0; i < 2; ++i) {
    const Direction<S> d = make_direction<S>(qkv, i, seed, heads, dropout_p);
    const Tensor deltas = at::empty_like(lse[i]);
    const S *o = out[i].const_data_ptr<S>(), *g = grad_out[i].const_data_ptr<S>();
    S* grad_queries = grad[i].mutable_data_ptr<S>();
    S* grad_keys = grad[1 - i].mutable_data_ptr<S>();
    const float* l = lse[i].const_data_ptr<float>();
    float* delta = deltas.mutable_data_ptr<float>();
    with_split(d.width, [&](auto split) {
      grad_q_kernel<S, split><<<grid(all, d.queries, split), kThreads, 0, stream>>>(
          d, o, g, l, delta, grad_queries);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      grad_kv_kernel<S, split><<<grid(all, d.keys, split), kThreads, 0, stream>>>(
          d, g, l, delta, grad_keys);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// Defines scalar_t for float32, float16 and bfloat16.
#define DSNET_DISPATCH(TYPE, NAME, ...)                           \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                  \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)    \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                             AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

void check_width(const Tensor& qkv, int64_t heads) {
  TORCH_CHECK(qkv.size(2) / (3 * heads) <= 4 * kChannels,
              "co_attention on CUDA takes heads of at most 128 channels, got ",
              qkv.size(2) / (3 * heads));
}

}  // namespace

Outputs co_attention_cuda(const Tensor& local_qkv, const Tensor& global_qkv,
                          const Tensor& seed, int64_t num_heads, double dropout_p) {
  check_width(local_qkv, num_heads);
  const c10::cuda::CUDAGuard guard(local_qkv.device());
  const Tensor qkv[2] = {local_qkv, global_qkv};
  Tensor out[2], lse[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t samples = qkv[i].size(0), tokens = qkv[i].size(1);
    out[i] = at::empty({samples, tokens, qkv[i].size(2) / 3}, qkv[i].options());
    lse[i] =
        at::empty({samples, num_heads, tokens}, qkv[i].options().dtype(at::kFloat));
  }
  if (local_qkv.size(0) > 0)
    DSNET_DISPATCH(local_qkv.scalar_type(), "co_attention", [&] {
      forward<scalar_t>(qkv, seed, num_heads, dropout_p, out, lse);
    });
  return {out[0], out[1], lse[0], lse[1]};
}

Gradients co_attention_backward_cuda(const Tensor& grad_local,
                                     const Tensor& grad_global, const Tensor& local_qkv,
                                     const Tensor& global_qkv, const Tensor& local_out,
                                     const Tensor& global_out, const Tensor& local_lse,
                                     const Tensor& global_lse, const Tensor& seed,
                                     int64_t num_heads, double dropout_p) {
  check_width(local_qkv, num_heads);
  const c10::cuda::CUDAGuard guard(local_qkv.device());
  const Tensor qkv[2] = {local_qkv, global_qkv};
  const Tensor lse[2] = {local_lse, global_lse};
  // The kernels take contiguous outputs and gradients.
  const Tensor grad_out[2] = {grad_local.contiguous(), grad_global.contiguous()};
  const Tensor out[2] = {local_out.contiguous(), global_out.contiguous()};
  Tensor grad[2] = {at::empty(local_qkv.sizes(), local_qkv.options()),
                    at::empty(global_qkv.sizes(), global_qkv.options())};
  if (local_qkv.size(0) > 0)
    DSNET_DISPATCH(local_qkv.scalar_type(), "co_attention_backward", [&] {
      backward<scalar_t>(qkv, grad_out, out, lse, seed, num_heads, dropout_p, grad);
    });
  return {grad[0], grad[1]};
}

REGISTER_DEVICE_IMPL(co_attention, CUDA, co_attention_cuda);
REGISTER_DEVICE_IMPL(co_attention_backward, CUDA, co_attention_backward_cuda);

}  // namespace dsnet
