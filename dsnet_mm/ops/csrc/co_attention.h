// The co-attention and what its implementations for each device share.
#pragma once

#include <ATen/OpMathType.h>

#include <tuple>

#include "dropout.h"
#include "pytorch_cpp_helper.hpp"
#include "pytorch_device_registry.hpp"

namespace dsnet {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;

// These check their arguments. MMCV's registry then chooses the implementation that a
// device has registered for the function: REGISTER_DEVICE_IMPL(co_attention, CPU, ...).
Outputs co_attention(const Tensor& local_qkv, const Tensor& global_qkv,
                     const Tensor& seed, int64_t num_heads, double dropout_p);

Gradients co_attention_backward(const Tensor& grad_local, const Tensor& grad_global,
                                const Tensor& local_qkv, const Tensor& global_qkv,
                                const Tensor& local_out, const Tensor& global_out,
                                const Tensor& local_lse, const Tensor& global_lse,
                                const Tensor& seed, int64_t num_heads,
                                double dropout_p);

// Refuses arguments that do not fit. Self-attention has one stream, which comes twice.
void check_attention(const char* name, const Tensor& local_qkv,
                     const Tensor& global_qkv, const Tensor& seed, int64_t num_heads,
                     double dropout_p);

// Kernels read whole rows: a tensor whose last axis is strided is copied.
inline Tensor with_rows(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// Whether x can be an output of the attention, (N, L, C), or the log-sum-exp of its
// scores, (N, heads, L).
inline bool is_output(const Tensor& x, const Tensor& qkv) {
  return x.dim() == 3 && x.size(0) == qkv.size(0) && x.size(1) == qkv.size(1) &&
         x.size(2) * 3 == qkv.size(2) && x.scalar_type() == qkv.scalar_type();
}

inline bool is_lse(const Tensor& x, const Tensor& qkv, int64_t num_heads) {
  return x.dim() == 3 && x.size(0) == qkv.size(0) && x.size(1) == num_heads &&
         x.size(2) == qkv.size(1) &&
         x.scalar_type() == at::toOpMathType(qkv.scalar_type());
}

inline Dropout make_dropout(double p, int64_t seed) {
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(p * 4294967296.),
          1 / (1 - p)};
}

}  // namespace dsnet
