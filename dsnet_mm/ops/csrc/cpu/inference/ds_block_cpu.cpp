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

#include "../../call_operator.h"

namespace dsnet {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// (N, C, H, W), channels-last, as (N, H * W, C), and back
Tensor to_tokens(const Tensor& x) { return x.permute({0, 2, 3, 1}).flatten(1, 2); }

Tensor to_map(const Tensor& x, c10::SymIntArrayRef size) {
  return x.unflatten_symint(1, size).permute({0, 3, 1, 2});
}

// Numbers [begin, end) of the ``all`` outputs (axis 0) or inputs (axis 1) of a weight.
Tensor part(const Tensor& weight, int64_t axis, int64_t begin, int64_t end,
            int64_t all) {
  const int64_t blocks = weight.size(axis);
  return weight.narrow(axis, begin * blocks / all, (end - begin) * blocks / all);
}

// The weights of a block come by their names in DSBlock. A packed one is in the order
// of dsnet_mm.ops.pack: its first axis is panels of outputs, and its second one is
// inputs (in bfloat16, blocks of 32).
Tensor ds_block(const Tensor& input, const c10::Dict<std::string, Tensor>& weights,
                int64_t num_heads, c10::SymIntArrayRef global_size) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && input.requires_grad()),
              "ds_block has no gradients, and its input requires one");
  TORCH_CHECK(input.dim() == 4 && num_heads > 0 && global_size.size() == 2,
              "ds_block takes a map (N, C, H, W), a positive number of heads and the ",
              "height and width of the global stream, got ", input.dim(), " axes, ",
              num_heads, " and ", global_size);
  const auto weight = [&](const std::string& name) {
    const auto found = weights.find(name);
    TORCH_CHECK(found != weights.end(), "ds_block takes the weights of a fused block ",
                "by name, and ", name, " is not among them");
    return found->value();
  };
  const auto convolve = [&](const Tensor& x, const std::string& layer,
                            const Optional& scale, const Optional& shift) {
    return call("dsnet_mm::residual_conv", x.contiguous(at::MemoryFormat::ChannelsLast),
                weight(layer + ".weight"), weight(layer + ".bias"), scale, shift)[0]
        .toTensor();
  };
  const auto linear = [&](const Tensor& x, const Tensor& w, const Tensor& b) {
    return call("dsnet_mm::linear", x, w, b)[0].toTensor();
  };
  const auto project = [&](const Tensor& x, const std::string& layer) {
    return linear(x, weight(layer + ".packed"), weight(layer + ".bias"));
  };
  const auto normalize = [&](const Tensor& x, const std::string& layer) {
    return at::layer_norm_symint(x, {x.sym_size(-1)}, weight(layer + ".weight"),
                                 weight(layer + ".bias"));
  };
  const Tensor seed = at::zeros({1}, at::kLong);  // unused, there is no dropout
  const Tensor bias_in = weight("proj_in.bias");
  const int64_t channels = bias_in.size(0);
  const int64_t global_channels = weight("global_norm.bias").size(0);
  const int64_t local_channels = channels - global_channels;
  TORCH_CHECK(channels > 0, "ds_block takes blocks of at least one channel, got none");

  const Tensor x = convolve(input, "pos_embed", {}, {});

  // Split
  const Tensor proj_in = weight("proj_in.packed");
  const Tensor low = at::upsample_bilinear2d_symint(x, global_size, false);
  const Tensor f_g =
      to_tokens(linear(low, part(proj_in, 0, 0, global_channels, channels),
                       bias_in.narrow(0, 0, global_channels)));
  Tensor f_l = linear(x, part(proj_in, 0, global_channels, channels, channels),
                      bias_in.narrow(0, global_channels, local_channels));

  // Intra-scale propagation
  f_l = convolve(f_l, "local_conv", weight("local_norm.scale"),
                 weight("local_norm.shift"));
  const Tensor qkv = project(normalize(f_g, "global_norm"), "global_qkv");
  f_g.add_(call("dsnet_mm::self_attention", qkv, seed, num_heads, 0.)[0].toTensor());

  // Inter-scale alignment
  Optional h_l, local_w, local_b;
  if (weights.contains("isa.local_qkv.packed")) {
    const Tensor local_qkv = project(to_tokens(f_l), "isa.local_qkv");
    const Tensor global_qkv =
        project(normalize(f_g, "isa.global_norm"), "isa.global_qkv");
    const auto h =
        call("dsnet_mm::co_attention", local_qkv, global_qkv, seed, num_heads, 0.);
    h_l = h[0].toTensor();
    local_w = weight("isa.local_proj.packed");
    local_b = weight("isa.local_proj.bias");
    call("dsnet_mm::linear_", f_g, h[1].toTensor(), weight("isa.global_proj.packed"),
         weight("isa.global_proj.bias"));
  }

  // Merge and feed-forward network
  const Tensor proj_out = weight("proj_out.packed");
  const Tensor merged = linear(to_map(f_g, global_size),
                               part(proj_out, 1, local_channels, channels, channels),
                               weight("proj_out.bias"));
  call("dsnet_mm::resize_add_", x, merged);
  call("dsnet_mm::merge_", x, f_l, h_l, local_w, local_b,
       part(proj_out, 1, 0, local_channels, channels), weight("ffn.fc1.packed"),
       weight("ffn.fc1.bias"), weight("ffn.fc2.packed"), weight("ffn.fc2.bias"));
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "ds_block(Tensor x, Dict(str, Tensor) weights, int num_heads, "
      "SymInt[2] global_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CompositeImplicitAutograd, m) {
  m.impl("ds_block", ds_block);
}

}  // namespace dsnet
