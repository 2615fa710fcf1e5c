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

using at::Tensor;

inline int64_t channels(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, "projections take maps or tokens, got a number");
  return x.size(x.dim() == 4 ? 1 : -1);
}

// Whether both have the same pixels: maps of one size, tokens of one shape, or a map
// and its tokens (N, H * W, C). As many pixels alone could be those of a transposed
// map.
inline bool same_pixels(const Tensor& x, const Tensor& y) {
  if (x.dim() == 4 && y.dim() == 3)
    return x.size(0) == y.size(0) && x.size(2) * x.size(3) == y.size(1);
  bool same = x.dim() == y.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i)
    same = x.size(i) == y.size(i) || i == (x.dim() == 4 ? 1 : x.dim() - 1);
  return same;
}

namespace plain {

constexpr int64_t kHiddenBytes = 4 << 20;  // Of the hidden layer of a chunk.

// Refuses what PyTorch would broadcast or cast. Returns the number of outputs.
inline int64_t check_layer(const Tensor& x, int64_t in, const Tensor& w,
                           const std::optional<Tensor>& b) {
  const auto type = x.scalar_type();
  TORCH_CHECK(
      w.dim() == 2 && w.size(1) == in && w.scalar_type() == type &&
          (!b || (b->sizes() == w.sizes().slice(0, 1) && b->scalar_type() == type)),
      "projections of ", in, " channels in ", type, " take a weight (C_out, ", in,
      ") and a bias (C_out,) of that type, got ", w.sizes(), " in ", w.scalar_type(),
      " and ", b ? b->sizes() : at::IntArrayRef());
  return w.size(0);
}

// The pixels (P, C) of a channels-last map (N, C, H, W) or of tokens (..., C).
inline Tensor pixels(const Tensor& x) {
  const Tensor last = x.dim() == 4 ? x.permute({0, 2, 3, 1}) : x.unsqueeze(0);
  return last.flatten(0, -2);
}

inline Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) {
  check_layer(x, channels(x), w, b);
  if (x.dim() != 4) return at::linear(x, w, b);
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
  const int64_t width = channels(x), local_width = channels(f_l), hidden = w1.size(0);
  TORCH_CHECK(
      same_pixels(x, f_l) && f_l.scalar_type() == x.scalar_type() &&
          check_layer(x, local_width, w_out, {}) == width &&
          check_layer(x, width, w1, b1) == hidden && hidden > 0 &&
          check_layer(x, hidden, w2, b2) == width &&
          (!h_l || (same_pixels(f_l, *h_l) && h_l->scalar_type() == x.scalar_type() &&
                    check_layer(x, channels(*h_l), *w, b) == local_width)),
      "merge_ takes a map, its local stream and h_l of the same size and type, "
      "and a hidden layer of at least one channel, got ",
      x.sizes(), ", ", f_l.sizes(), ", ", h_l ? h_l->sizes() : f_l.sizes(),
      " and weights ", w_out.sizes(), ", ", w1.sizes(), ", ", w2.sizes());
  const Tensor x_pixels = pixels(x), f_pixels = pixels(f_l);
  if (h_l) add_linear(f_pixels, pixels(*h_l), *w, b);
  add_linear(x_pixels, f_pixels, w_out, {});
  const int64_t bytes = hidden * x.element_size(), count = x_pixels.size(0);
  const int64_t size = std::max<int64_t>(kHiddenBytes / bytes, 1);
  for (int64_t first = 0; first < count; first += size) {
    const Tensor chunk = x_pixels.narrow(0, first, std::min(size, count - first));
    Tensor layer = at::addmm(b1, chunk, w1.t());
    at::gelu_(layer);
    add_linear(chunk, layer, w2, b2);
  }
}

}  // namespace plain
}  // namespace dsnet
