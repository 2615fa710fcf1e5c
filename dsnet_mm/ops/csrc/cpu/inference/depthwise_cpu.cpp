// dsnet_mm::depthwise_conv on the CPU: a depth-wise 3x3 convolution of a channels-last
// map. For pixel (y, x) and channel c:
//
//   out[y][x][c] = sum_ij weight[c][i][j] in[y + i - 1][x + j - 1][c] + bias[c]
//                  + sum of border[k][c] over the edges and corners k of the pixel
//
// The border corrects a batch norm that is folded into the convolution: at the border
// the norm's shift is missing where the kernel reads zeros of the padding. border[0] to
// border[3] are for the top, bottom, left and right edge, border[4] to border[7] for
// the corners top left, top right, bottom left and bottom right.
//
// Threads divide the rows of the output; see depthwise_kernel.h for one row.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <type_traits>
#include <vector>

namespace dsnet {

// The three input rows of one output row. A row of the padding is one pixel of zeros
// with stride 0.
template <typename S>
struct InputRows {
  const S* rows[3];
  int64_t strides[3];  // from pixel to pixel
};

}  // namespace dsnet

#define DSNET_KERNEL "../inference/depthwise_kernel.h"
#include "../common/each_isa.h"

namespace dsnet {
namespace {

using at::Tensor;

// The bias and the border terms of all kinds of pixels:
// [top + 2 * bottom][left + 2 * right][channel].
template <typename S>
std::vector<float> offsets(int64_t channels, const S* bias, const S* border) {
  std::vector<float> all(16 * channels);
  for (int kind = 0; kind < 16; ++kind) {
    const bool at[4] = {(kind & 4) != 0, (kind & 8) != 0, (kind & 1) != 0,
                        (kind & 2) != 0};  // top, bottom, left, right
    float* offset = all.data() + kind * channels;
    std::copy(bias, bias + channels, offset);
    for (int i = 0; border && i < 8; ++i) {
      const int corner = i - 4;
      if (i < 4 ? at[i] : at[corner / 2] && at[2 + corner % 2])
        for (int64_t c = 0; c < channels; ++c) offset[c] += border[i * channels + c];
    }
  }
  return all;
}

template <typename S>
void convolve(const Tensor& x, const Tensor& weight, const Tensor& bias,
              const Tensor* border, Tensor& out) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const S* w = weight.const_data_ptr<S>();
  std::vector<float> taps(9 * channels);  // [tap][channel]
  for (int64_t c = 0; c < channels; ++c)
    for (int i = 0; i < 9; ++i) taps[i * channels + c] = w[c * 9 + i];
  const std::vector<float> all_offsets =
      offsets(channels, bias.const_data_ptr<S>(),
              border ? border->const_data_ptr<S>() : nullptr);
  const std::vector<S> zeros(channels);
  const S* src = x.const_data_ptr<S>();
  S* dst = out.data_ptr<S>();
  const int64_t row_size = width * channels;
  at::parallel_for(0, x.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % height;
      InputRows<S> in;
      for (int j = 0; j < 3; ++j) {
        const bool inside = y + j > 0 && y + j <= height;
        in.rows[j] = inside ? src + (i + j - 1) * row_size : zeros.data();
        in.strides[j] = inside ? channels : 0;
      }
      const int kind = 4 * ((y == 0) + 2 * (y == height - 1));
      DSNET_DISPATCH(convolve_row, in, width, channels, taps.data(),
                     all_offsets.data() + kind * channels, dst + i * row_size);
    }
  });
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                      const std::optional<Tensor>& border) {
  const auto type = x.scalar_type();
  const int64_t channels = x.dim() == 4 ? x.size(1) : -1;
  const auto fits = [&](const Tensor& t, int64_t numel) {
    return t.scalar_type() == type && t.numel() == numel && t.is_contiguous();
  };
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && channels >= 0 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                  fits(weight, 9 * channels) && fits(bias, channels) &&
                  (!border || fits(*border, 8 * channels)),
              "depthwise_conv takes a channels-last map (N, C, H, W) in float32 or "
              "bfloat16, a weight (C, 1, 3, 3), a bias (C,) and a border (8, C) of its "
              "type, got ",
              type, " of ", x.sizes(), ", ", weight.sizes(), ", ", bias.sizes());
  Tensor out = at::empty_like(x);
  const Tensor* border_or_null = border ? &*border : nullptr;
  if (type == at::kFloat)
    convolve<float>(x, weight, bias, border_or_null, out);
  else
    convolve<at::BFloat16>(x, weight, bias, border_or_null, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "depthwise_conv(Tensor x, Tensor weight, Tensor bias, Tensor? border) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) { m.impl("depthwise_conv", depthwise_conv); }

}  // namespace dsnet
