// dsnet_mm::ds_block: the forward of a Dual-Stream block (Fig. 2 of the paper) whose
// batch norms are folded, for inference.
//
//   x   = x + depthwise(x)                                 position
//   f_g = W_g resize(x),  f_l = W_l x                      split
//   f_l = f_l + depthwise(scale f_l + shift)               intra-scale propagation
//   f_g = f_g + attention(W LN(f_g))
//   h_l, h_g = co_attention(W f_l, W LN(f_g))              inter-scale alignment
//   f_l = f_l + W h_l,  f_g = f_g + W h_g
//   x   = x + resize(W_g' f_g) + W_l' f_l                  merge
//   x   = x + FFN(x)
//
// This file computes nothing itself. It calls the other operators through the
// dispatcher, so that profilers, FLOP counters and compilers see these. From Python
// the same calls would take as long as the smaller operators themselves.
//
// Maps are channels-last, which is the memory of tokens (N, H * W, C).

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "../../find_operator.h"

namespace dsnet {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// ------------------------------------------------------------------- operators

// x + conv(scale * x + shift)
Tensor residual_conv(const Tensor& x, const Tensor& w, const Tensor& b,
                     const Optional& scale = {}, const Optional& shift = {}) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                  const Optional&)>("dsnet_mm::residual_conv");
  return op.call(x.contiguous(at::MemoryFormat::ChannelsLast), w, b, scale, shift);
}

Tensor layer_norm(const Tensor& x, const Tensor& w, const Tensor& b) {
  return at::layer_norm_symint(x, {x.sym_size(-1)}, w, b);
}

// W x + b
Tensor linear(const Tensor& x, const Tensor& w, const Optional& b) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Optional&)>("dsnet_mm::linear");
  return op.call(x, w, b);
}

// out += W x + b
void linear_(Tensor& out, const Tensor& x, const Tensor& w, const Optional& b) {
  static const auto op =
      find<void(Tensor&, const Tensor&, const Tensor&, const Optional&)>(
          "dsnet_mm::linear_");
  op.call(out, x, w, b);
}

Tensor self_attention(const Tensor& qkv, const Tensor& seed, int64_t num_heads) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double)>(
          "dsnet_mm::self_attention");
  return std::get<0>(op.call(qkv, seed, num_heads, 0.));
}

std::tuple<Tensor, Tensor> co_attention(const Tensor& local_qkv,
                                        const Tensor& global_qkv, const Tensor& seed,
                                        int64_t num_heads) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
      "dsnet_mm::co_attention");
  const auto out = op.call(local_qkv, global_qkv, seed, num_heads, 0.);
  return {std::get<0>(out), std::get<1>(out)};
}

// out += resize(x)
void resize_add_(Tensor& out, const Tensor& x) {
  static const auto op = find<void(Tensor&, const Tensor&)>("dsnet_mm::resize_add_");
  op.call(out, x);
}

// f_l += W h_l + b if there is an h_l, x += W_out f_l and x += FFN(x)
void merge_(Tensor& x, Tensor& f_l, const Optional& h_l, const Optional& w,
            const Optional& b, const Tensor& w_out, const Tensor& w1, const Tensor& b1,
            const Tensor& w2, const Tensor& b2) {
  static const auto op =
      find<void(Tensor&, Tensor&, const Optional&, const Optional&, const Optional&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&)>("dsnet_mm::merge_");
  op.call(x, f_l, h_l, w, b, w_out, w1, b1, w2, b2);
}

// (N, C, H, W), channels-last, as (N, H * W, C), and back
Tensor to_tokens(const Tensor& x) { return x.permute({0, 2, 3, 1}).flatten(1, 2); }

Tensor to_map(const Tensor& x, c10::SymIntArrayRef size) {
  return x.unflatten_symint(1, size).permute({0, 3, 1, 2});
}

// --------------------------------------------------------------------- weights

// The weights of a block by their names in DSBlock. A packed one is in the order of
// dsnet_mm.ops.pack: its first axis is panels of outputs, and its second one is inputs
// (in bfloat16, blocks of 32). Where the machine has no kernels for a type, packed ones
// are (C_out, C_in) as well.
class Weights {
 public:
  explicit Weights(const c10::Dict<std::string, Tensor>& named) : named_(named) {}

  bool has(const std::string& name) const { return named_.contains(name); }

  Tensor operator()(const std::string& name) const {
    const auto found = named_.find(name);
    TORCH_CHECK(found != named_.end(), "ds_block takes the weights of a fused block ",
                "by name, and ", name, " is not among them");
    return found->value();
  }

  Tensor packed(const std::string& layer) const { return (*this)(layer + ".packed"); }
  Tensor weight(const std::string& layer) const { return (*this)(layer + ".weight"); }
  Tensor bias(const std::string& layer) const { return (*this)(layer + ".bias"); }

 private:
  const c10::Dict<std::string, Tensor> named_;
};

// Outputs [begin, end) of a weight.
Tensor outputs(const Tensor& packed, int64_t begin, int64_t end) {
  const int64_t panel = packed.dim() == 2                    ? 1
                        : packed.scalar_type() == at::kFloat ? 32
                                                             : 16;
  return packed.narrow(0, begin / panel, (end - begin) / panel);
}

// Inputs [begin, end) of a weight.
Tensor inputs(const Tensor& packed, int64_t begin, int64_t end) {
  const bool by_one = packed.dim() == 2 || packed.scalar_type() == at::kFloat;
  const int64_t depth = by_one ? 1 : 32;
  return packed.narrow(1, begin / depth, (end - begin) / depth);
}

// ----------------------------------------------------------------------- block

Tensor ds_block(const Tensor& input, const c10::Dict<std::string, Tensor>& named,
                int64_t num_heads, int64_t global_factor) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && input.requires_grad()),
              "ds_block has no gradients, and its input requires one");
  TORCH_CHECK(input.dim() == 4 && num_heads > 0 && global_factor > 0,
              "ds_block takes a map (N, C, H, W) and positive numbers of heads and ",
              "factor, got ", input.dim(), " axes, ", num_heads, " and ",
              global_factor);
  const Weights weights(named);
  const Tensor seed = at::zeros({1}, at::kLong);  // unused, there is no dropout
  const Tensor bias_in = weights.bias("proj_in");
  const int64_t channels = bias_in.size(0);
  const int64_t global_channels = weights.bias("global_norm").size(0);
  const int64_t local_channels = channels - global_channels;
  const auto at_low_resolution = [&](const c10::SymInt& side) {
    return (side / global_factor).max(1);
  };
  const c10::SymInt height = input.sym_size(2), width = input.sym_size(3);
  const c10::SymInt size[2] = {at_low_resolution(height), at_low_resolution(width)};

  Tensor x =
      residual_conv(input, weights.weight("pos_embed"), weights.bias("pos_embed"));

  // Split
  const Tensor proj_in = weights.packed("proj_in");
  const Tensor low = at::upsample_bilinear2d_symint(x, size, false);
  Tensor f_g = to_tokens(linear(low, outputs(proj_in, 0, global_channels),
                                bias_in.narrow(0, 0, global_channels)));
  Tensor f_l = linear(x, outputs(proj_in, global_channels, channels),
                      bias_in.narrow(0, global_channels, local_channels));

  // Intra-scale propagation
  f_l = residual_conv(f_l, weights.weight("local_conv"), weights.bias("local_conv"),
                      weights("local_norm.scale"), weights("local_norm.shift"));
  const Tensor normed =
      layer_norm(f_g, weights.weight("global_norm"), weights.bias("global_norm"));
  f_g.add_(self_attention(
      linear(normed, weights.packed("global_qkv"), weights.bias("global_qkv")), seed,
      num_heads));

  // Inter-scale alignment
  Optional h_l, local_w, local_b;
  if (weights.has("isa.local_qkv.packed")) {
    const Tensor local_qkv = linear(to_tokens(f_l), weights.packed("isa.local_qkv"),
                                    weights.bias("isa.local_qkv"));
    const Tensor global_normed = layer_norm(f_g, weights.weight("isa.global_norm"),
                                            weights.bias("isa.global_norm"));
    const Tensor global_qkv = linear(global_normed, weights.packed("isa.global_qkv"),
                                     weights.bias("isa.global_qkv"));
    Tensor h_g;
    std::tie(h_l, h_g) = co_attention(local_qkv, global_qkv, seed, num_heads);
    local_w = weights.packed("isa.local_proj");
    local_b = weights.bias("isa.local_proj");
    linear_(f_g, h_g, weights.packed("isa.global_proj"),
            weights.bias("isa.global_proj"));
  }

  // Merge and feed-forward network
  const Tensor proj_out = weights.packed("proj_out");
  resize_add_(x, linear(to_map(f_g, size), inputs(proj_out, local_channels, channels),
                        weights.bias("proj_out")));
  merge_(x, f_l, h_l, local_w, local_b, inputs(proj_out, 0, local_channels),
         weights.packed("ffn.fc1"), weights.bias("ffn.fc1"), weights.packed("ffn.fc2"),
         weights.bias("ffn.fc2"));
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "ds_block(Tensor x, Dict(str, Tensor) weights, int num_heads, "
      "int global_factor) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CompositeImplicitAutograd, m) {
  m.impl("ds_block", ds_block);
}

}  // namespace dsnet
