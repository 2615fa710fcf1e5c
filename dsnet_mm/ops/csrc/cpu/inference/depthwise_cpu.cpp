// dsnet_mm::residual_conv on the CPU, for a channels-last map:
//
//   y = x + conv(scale * x + shift)
//
// conv is a depth-wise 3x3 convolution with a bias, padded with zeros. For pixel (r, c)
// and one channel, with the residual and the scale in the taps:
//
//   y[r][c] = sum_ij taps[i][j] x[r + i - 1][c + j - 1] + offset
//   taps[i][j] = scale * weight[i][j], plus 1 in the centre
//   offset = bias + shift * (the sum of weight[i][j] over the taps inside of the map)
//
// Threads divide the rows of the output; depthwise_kernel.h computes one row.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

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

// The offsets of all kinds of pixels: [top + 2 * bottom][left + 2 * right][channel]. A
// pixel on the top edge has no tap above, and so on. ``taps`` is the weight.
std::vector<float> offsets(int64_t channels, const std::vector<float>& taps,
                           const std::vector<float>& bias,
                           const std::vector<float>& shift) {
  std::vector<float> all(16 * channels);
  for (int edges = 0; edges < 16; ++edges) {
    const bool left = edges & 1, right = edges & 2, top = edges & 4, bottom = edges & 8;
    float* offset = all.data() + edges * channels;
    std::copy(bias.begin(), bias.end(), offset);
    for (int i = top; i < 3 - bottom; ++i)
      for (int j = left; j < 3 - right; ++j)
        for (int64_t c = 0; c < channels; ++c)
          offset[c] += shift[c] * taps[(3 * i + j) * channels + c];
  }
  return all;
}

// The numbers of x as float, or ``otherwise`` for each channel if there is no x.
template <typename S>
std::vector<float> to_float(const std::optional<Tensor>& x, int64_t count,
                            float otherwise) {
  if (!x) return std::vector<float>(count, otherwise);
  const S* data = x->const_data_ptr<S>();
  return std::vector<float>(data, data + count);
}

template <typename S>
void convolve(const Tensor& x, const Tensor& weight, const Tensor& bias,
              const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
              const Tensor& out) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const S* w = weight.const_data_ptr<S>();
  std::vector<float> taps(9 * channels);  // [tap][channel]
  for (int64_t c = 0; c < channels; ++c)
    for (int i = 0; i < 9; ++i) taps[i * channels + c] = w[c * 9 + i];
  const auto all_offsets = offsets(channels, taps, to_float<S>(bias, channels, 0),
                                   to_float<S>(shift, channels, 0));
  const auto factor = to_float<S>(scale, channels, 1);
  for (int i = 0; i < 9; ++i)
    for (int64_t c = 0; c < channels; ++c)
      taps[i * channels + c] = taps[i * channels + c] * factor[c] + (i == 4);
  const std::vector<S> zeros(channels);
  const S* src = x.const_data_ptr<S>();
  S* dst = out.data_ptr<S>();
  const int64_t row_size = width * channels;
  const auto kernel = DSNET_BEST(convolve_row<S>);
  at::parallel_for(0, x.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % height;
      InputRows<S> in;
      for (int j = 0; j < 3; ++j) {
        const bool inside = y + j > 0 && y + j <= height;
        in.rows[j] = inside ? src + (i + j - 1) * row_size : zeros.data();
        in.strides[j] = inside ? channels : 0;
      }
      const int edges = 4 * ((y == 0) + 2 * (y == height - 1));
      kernel(in, width, channels, taps.data(), all_offsets.data() + edges * channels,
             dst + i * row_size);
    }
  });
}

Tensor residual_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift) {
  const auto type = x.scalar_type();
  const int64_t channels = x.dim() == 4 ? x.size(1) : -1;
  const auto fits = [&](const Tensor& t, at::IntArrayRef sizes) {
    return t.scalar_type() == type && t.sizes() == sizes && t.is_contiguous();
  };
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && channels >= 0 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                  fits(weight, {channels, 1, 3, 3}) && fits(bias, channels) &&
                  (!scale || fits(*scale, channels)) &&
                  (!shift || fits(*shift, channels)),
              "residual_conv takes a channels-last map (N, C, H, W) in float32 or "
              "bfloat16, and of its type a weight (C, 1, 3, 3) and a bias, a scale and "
              "a shift (C,), got ",
              type, " of ", x.sizes(), ", ", weight.sizes(), ", ", bias.sizes());
  const Tensor out = at::empty_like(x);
  DSNET_FLOAT_OR_BFLOAT16(type, "residual_conv", [&] {
    convolve<scalar_t>(x, weight, bias, scale, shift, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def(
      "residual_conv(Tensor x, Tensor weight, Tensor bias, Tensor? scale, "
      "Tensor? shift) -> Tensor");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) { m.impl("residual_conv", residual_conv); }

}  // namespace dsnet
