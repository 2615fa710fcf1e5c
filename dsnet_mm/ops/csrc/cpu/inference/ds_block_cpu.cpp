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

// An operator of this library, as a function.
template <typename Signature>
auto find(const char* name) {
  return [op = find_operator(name).typed<Signature>()](auto&&... args) {
    return op.call(std::forward<decltype(args)>(args)...);
  };
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

// Numbers [begin, end) of the ``all`` outputs (axis 0) or inputs (axis 1) of a weight,
// packed or not.
Tensor part(const Tensor& weight, int64_t axis, int64_t begin, int64_t end,
            int64_t all) {
  const int64_t blocks = weight.size(axis);
  return weight.narrow(axis, begin * blocks / all, (end - begin) * blocks / all);
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

  // The operators, as functions of their arguments and the name of a layer.
  static const auto residual_conv =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                  const Optional&)>("dsnet_mm::residual_conv");
  static const auto linear =
      find<Tensor(const Tensor&, const Tensor&, const Optional&)>("dsnet_mm::linear");
  static const auto linear_ =
      find<void(const Tensor&, const Tensor&, const Tensor&, const Optional&)>(
          "dsnet_mm::linear_");
  static const auto self_attention =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double)>(
          "dsnet_mm::self_attention");
  static const auto co_attention = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
      "dsnet_mm::co_attention");
  static const auto resize_add_ =
      find<void(const Tensor&, const Tensor&)>("dsnet_mm::resize_add_");
  static const auto merge_ =
      find<void(const Tensor&, const Tensor&, const Optional&, const Optional&,
                const Optional&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&)>("dsnet_mm::merge_");
  const auto convolve = [&](const Tensor& x, const char* layer, const Optional& scale,
                            const Optional& shift) {
    return residual_conv(x.contiguous(at::MemoryFormat::ChannelsLast),
                         weights.weight(layer), weights.bias(layer), scale, shift);
  };
  const auto project = [&](const Tensor& x, const char* layer) {
    return linear(x, weights.packed(layer), weights.bias(layer));
  };
  const auto normalize = [&](const Tensor& x, const char* layer) {
    return at::layer_norm_symint(x, {x.sym_size(-1)}, weights.weight(layer),
                                 weights.bias(layer));
  };

  Tensor x = convolve(input, "pos_embed", {}, {});

  // Split
  const Tensor proj_in = weights.packed("proj_in");
  const Tensor low = at::upsample_bilinear2d_symint(x, size, false);
  Tensor f_g = to_tokens(linear(low, part(proj_in, 0, 0, global_channels, channels),
                                bias_in.narrow(0, 0, global_channels)));
  Tensor f_l = linear(x, part(proj_in, 0, global_channels, channels, channels),
                      bias_in.narrow(0, global_channels, local_channels));

  // Intra-scale propagation
  f_l = convolve(f_l, "local_conv", weights("local_norm.scale"),
                 weights("local_norm.shift"));
  const Tensor qkv = project(normalize(f_g, "global_norm"), "global_qkv");
  f_g.add_(std::get<0>(self_attention(qkv, seed, num_heads, 0.)));

  // Inter-scale alignment
  Optional h_l, local_w, local_b;
  if (weights.has("isa.local_qkv.packed")) {
    const Tensor local_qkv = project(to_tokens(f_l), "isa.local_qkv");
    const Tensor global_qkv =
        project(normalize(f_g, "isa.global_norm"), "isa.global_qkv");
    Tensor h_g;
    std::tie(h_l, h_g, std::ignore, std::ignore) =
        co_attention(local_qkv, global_qkv, seed, num_heads, 0.);
    local_w = weights.packed("isa.local_proj");
    local_b = weights.bias("isa.local_proj");
    linear_(f_g, h_g, weights.packed("isa.global_proj"),
            weights.bias("isa.global_proj"));
  }

  // Merge and feed-forward network
  const Tensor proj_out = weights.packed("proj_out");
  resize_add_(x, linear(to_map(f_g, size),
                        part(proj_out, 1, local_channels, channels, channels),
                        weights.bias("proj_out")));
  merge_(x, f_l, h_l, local_w, local_b, part(proj_out, 1, 0, local_channels, channels),
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
