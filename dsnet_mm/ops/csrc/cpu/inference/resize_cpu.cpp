// dsnet_mm::resize_add_ on the CPU: resizes a map and adds it to another one.
//
//   out[y][x] += bilinear(in, y, x)    with align_corners=False
//
// Loop order: rows of the output, which threads divide. For each, the two input rows
// are interpolated to one row, which lies in L1 or L2; then its pixels are interpolated
// along the row and added. Maps are channels-last.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

namespace dsnet {

// Along one axis, an output pixel is first + weight * (second - first), where ``first``
// and ``second`` are the numbers of input pixels.
struct Interpolation {
  int64_t first, second;
  float weight;
};

}  // namespace dsnet

#define DSNET_KERNEL "../inference/resize_kernel.h"
#include "../common/each_isa.h"

namespace dsnet {
namespace {

using at::Tensor;

// The interpolations of an axis of ``in`` pixels to ``out`` pixels.
std::vector<Interpolation> interpolations(int64_t in, int64_t out) {
  std::vector<Interpolation> all(out);
  const float scale = static_cast<float>(in) / out;
  for (int64_t i = 0; i < out; ++i) {
    const float position = std::max((i + 0.5f) * scale - 0.5f, 0.f);
    const int64_t first = std::min<int64_t>(position, in - 1);
    all[i] = {first, std::min(first + 1, in - 1), position - first};
  }
  return all;
}

template <typename S>
void resize_add(const Tensor& out, const Tensor& x) {
  const int64_t channels = out.size(1), height = out.size(2), width = out.size(3);
  const int64_t row_size = x.size(3) * channels;
  const std::vector<Interpolation> rows = interpolations(x.size(2), height);
  const std::vector<Interpolation> columns = interpolations(x.size(3), width);
  S* dst = out.data_ptr<S>();
  const S* src = x.const_data_ptr<S>();
  const auto kernel = DSNET_BEST(resize_add_row<S>);
  at::parallel_for(0, out.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(row_size);
    for (int64_t i = begin; i < end; ++i)
      kernel(row_size, src + i / height * x.size(2) * row_size, rows[i % height], width,
             channels, columns.data(), row.data(), dst + i * width * channels);
  });
}

void resize_add_op(const Tensor& out, const Tensor& x) {
  const auto layout = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(
      out.dim() == 4 && x.dim() == 4 && out.size(0) == x.size(0) &&
          out.size(1) == x.size(1) && x.size(2) > 0 && x.size(3) > 0 &&
          out.scalar_type() == x.scalar_type() &&
          (out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16) &&
          out.is_contiguous(layout) && x.is_contiguous(layout),
      "resize_add_ takes channels-last maps (N, C, H, W) of any two sizes, both "
      "in float32 or both in bfloat16, got ",
      out.scalar_type(), " of ", out.sizes(), " and ", x.scalar_type(), " of ",
      x.sizes());
  at::assert_no_overlap(out, x);
  DSNET_FLOAT_OR_BFLOAT16(out.scalar_type(), "resize_add_",
                          [&] { resize_add<scalar_t>(out, x); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("resize_add_(Tensor(a!) out, Tensor x) -> ()");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) { m.impl("resize_add_", resize_add_op); }

}  // namespace dsnet
