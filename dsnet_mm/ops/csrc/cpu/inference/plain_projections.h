// Projections by the matrix products of PyTorch, for weights (C_out, C_in) that are not
// packed: bfloat16 without AMX, and float without AVX2.
//
//   add_linear:  out += W x + b
//   merge:       f_l += W h_l + b, x += W_out f_l, x += W2 GELU(W1 x + b1) + b2
//
// The hidden layer is computed for a chunk of pixels at a time, so that it stays in the
// L2 cache.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <optional>

namespace dsnet {
namespace plain {

using at::Tensor;

constexpr int64_t kHiddenBytes = 4 << 20;  // Of the hidden layer of a chunk.

// The pixels (P, C) of a channels-last map (N, C, H, W) or of tokens (..., C).
inline Tensor pixels(const Tensor& x) {
  const Tensor last = x.dim() == 4 ? x.permute({0, 2, 3, 1}) : x;
  return last.reshape({-1, last.size(-1)});
}

inline Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) {
  if (x.dim() < 4) return at::linear(x, w, b);
  return at::linear(x.permute({0, 2, 3, 1}), w, b).permute({0, 3, 1, 2});
}

// ``out`` is (P, C_out), x is (P, C_in).
inline void add_linear(const Tensor& out, const Tensor& x, const Tensor& w,
                       const std::optional<Tensor>& b) {
  out.addmm_(x, w.t());
  if (b) out.add_(*b);
}

inline void merge(const Tensor& x, const Tensor& f_l, const std::optional<Tensor>& h_l,
                  const std::optional<Tensor>& w, const std::optional<Tensor>& b,
                  const Tensor& w_out, const Tensor& w1, const Tensor& b1,
                  const Tensor& w2, const Tensor& b2) {
  TORCH_CHECK(w1.size(0) > 0, "merge_ takes a hidden layer of at least one channel, ",
              "got a weight ", w1.sizes());
  const Tensor x_pixels = pixels(x), f_pixels = pixels(f_l);
  if (h_l) add_linear(f_pixels, pixels(*h_l), *w, b);
  add_linear(x_pixels, f_pixels, w_out, {});
  const int64_t bytes = w1.size(0) * x.element_size(), count = x_pixels.size(0);
  const int64_t size = std::max<int64_t>(kHiddenBytes / bytes, 1);
  for (int64_t first = 0; first < count; first += size) {
    const Tensor chunk = x_pixels.narrow(0, first, std::min(size, count - first));
    Tensor hidden = at::addmm(b1, chunk, w1.t());
    at::gelu_(hidden);
    add_linear(chunk, hidden, w2, b2);
  }
}

}  // namespace plain
}  // namespace dsnet
