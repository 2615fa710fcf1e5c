// dsnet_mm::ds_block: DSBlock.forward (Fig. 2) with its norms folded, without
// gradients. It computes nothing itself. One call takes the place of some twenty from
// Python, which last as long as the smaller operators; profiles and compilers still see
// the operators.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace dsnet {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// An operator as the dispatcher knows it.
template <typename Signature>
auto find(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return schema.typed<Signature>();
}

struct ResidualConv {
  const Tensor &w, &b;
  const Optional border;

  Tensor operator()(const Tensor& x) const {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&)>(
            "dsnet_mm::depthwise_conv");
    return op.call(x.contiguous(at::MemoryFormat::ChannelsLast), w, b, border);
  }
};

struct LayerNorm {
  const Tensor &w, &b;

  Tensor operator()(const Tensor& x) const {
    return at::layer_norm_symint(x, {x.sym_size(-1)}, w, b);
  }
};

struct Projection {
  const Tensor& w;
  const Optional b;

  Tensor operator()(const Tensor& x) const {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Optional&)>("dsnet_mm::linear");
    return op.call(x, w, b);
  }

  void add_to(Tensor& out, const Tensor& x) const {
    static const auto op =
        find<void(Tensor&, const Tensor&, const Tensor&, const Optional&)>(
            "dsnet_mm::linear_");
    op.call(out, x, w, b);
  }
};

struct Attention {
  const int64_t num_heads;
  const Tensor seed = at::zeros({1}, at::kLong);  // without dropout, any

  Tensor operator()(const Tensor& qkv) const {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double)>(
            "dsnet_mm::self_attention");
    return std::get<0>(op.call(qkv, seed, num_heads, 0.));
  }

  std::tuple<Tensor, Tensor> operator()(const Tensor& local_qkv,
                                        const Tensor& global_qkv) const {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
        "dsnet_mm::co_attention");
    const auto outs = op.call(local_qkv, global_qkv, seed, num_heads, 0.);
    return {std::get<0>(outs), std::get<1>(outs)};
  }
};

void resize_add(Tensor& out, const Tensor& x) {
  static const auto op = find<void(Tensor&, const Tensor&)>("dsnet_mm::resize_add_");
  op.call(out, x);
}

// f_l += proj(h_l), x += W_out f_l and x += FFN(x)
void merge(Tensor& x, Tensor& f_l, const Optional& h_l, const Optional& w,
           const Optional& b, const Tensor& w_out, at::TensorList ffn) {
  static const auto op =
      find<void(Tensor&, Tensor&, const Optional&, const Optional&, const Optional&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&)>("dsnet_mm::merge_");
  op.call(x, f_l, h_l, w, b, w_out, ffn[0], ffn[1], ffn[2], ffn[3]);
}

// (N, C, H, W), channels-last, as (N, H * W, C), and back
Tensor to_tokens(const Tensor& x) { return x.permute({0, 2, 3, 1}).flatten(1, 2); }

Tensor to_map(const Tensor& x, c10::SymIntArrayRef size) {
  return x.unflatten_symint(1, size).permute({0, 3, 1, 2});
}

// The weights come in the order of DSBlock.pack, those of ISA last.
Tensor ds_block(const Tensor& input, at::TensorList w, int64_t num_heads,
                int64_t global_factor) {
  TORCH_CHECK(!at::GradMode::is_enabled(), "ds_block has no gradients");
  TORCH_CHECK(input.dim() == 4 && num_heads > 0 && global_factor > 0 &&
                  (w.size() == 20 || w.size() == 30),
              "ds_block takes a map (N, C, H, W), and 20 weights, or with inter-scale "
              "alignment 30, got ",
              input.dim(), " axes and ", w.size(), " weights");
  const Attention attention{num_heads};
  const auto at_low_resolution = [&](const c10::SymInt& side) {
    return (side / global_factor).max(1);
  };
  const c10::SymInt height = input.sym_size(2), width = input.sym_size(3);
  const c10::SymInt size[2] = {at_low_resolution(height), at_low_resolution(width)};

  Tensor x = ResidualConv{w[0], w[1], {}}(input);

  // Split
  const Tensor small = at::upsample_bilinear2d_symint(x, size, false);
  Tensor f_g = to_tokens(Projection{w[2], w[3]}(small));
  Tensor f_l = Projection{w[4], w[5]}(x);

  // Intra-scale propagation
  f_l = ResidualConv{w[6], w[7], w[8]}(f_l);
  const Tensor qkv = Projection{w[11], w[12]}(LayerNorm{w[9], w[10]}(f_g));
  f_g.add_(attention(qkv));

  // Inter-scale alignment
  Optional h_l, local_w, local_b;
  if (w.size() == 30) {
    const Tensor local_qkv = Projection{w[20], w[21]}(to_tokens(f_l));
    const Tensor global_qkv = Projection{w[24], w[25]}(LayerNorm{w[22], w[23]}(f_g));
    Tensor h_g;
    std::tie(h_l, h_g) = attention(local_qkv, global_qkv);
    std::tie(local_w, local_b) = std::tie(w[26], w[27]);
    Projection{w[28], w[29]}.add_to(f_g, h_g);
  }

  // Merge
  resize_add(x, Projection{w[13], w[14]}(to_map(f_g, size)));
  merge(x, f_l, h_l, local_w, local_b, w[15], w.slice(16, 4));
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("ds_block(Tensor x, Tensor[] w, int num_heads, int global_factor) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CompositeImplicitAutograd, m) {
  m.impl("ds_block", ds_block);
}

}  // namespace dsnet
