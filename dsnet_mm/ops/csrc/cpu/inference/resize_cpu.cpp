// dsnet_mm::resize_add_ on the CPU: a map is resized while it is added to another.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

namespace dsnet {

// Where a pixel lies between two of the input: first + weight * (second - first).
struct Place {
  int64_t first, second;
  float weight;
};

}  // namespace dsnet

#define DSNET_KERNEL "../inference/resize_kernel.h"
#include "../common/each_isa.h"

namespace dsnet {
namespace {

using at::Tensor;

// Pixels have areas, whose centres are compared (align_corners=False).
std::vector<Place> places(int64_t from, int64_t to) {
  std::vector<Place> all(to);
  const float scale = static_cast<float>(from) / to;
  for (int64_t i = 0; i < to; ++i) {
    const float at = std::max((i + 0.5f) * scale - 0.5f, 0.f);
    const int64_t first = std::min<int64_t>(at, from - 1);
    all[i] = {first, std::min(first + 1, from - 1), at - first};
  }
  return all;
}

template <typename S>
void resize_add(Tensor& out, const Tensor& x) {
  const int64_t channels = out.size(1), height = out.size(2), width = out.size(3);
  const int64_t line_size = x.size(3) * channels;
  const std::vector<Place> rows = places(x.size(2), height);
  const std::vector<Place> columns = places(x.size(3), width);
  S* to = out.data_ptr<S>();
  const S* from = x.const_data_ptr<S>();
  at::parallel_for(0, out.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> line(line_size);
    for (int64_t i = begin; i < end; ++i) {
      const Place& row = rows[i % height];
      const S* map = from + i / height * x.size(2) * line_size;
      DSNET_BEST(mix, line_size, map + row.first * line_size,
                 map + row.second * line_size, row.weight, line.data());
      DSNET_BEST(add_row, width, channels, line.data(), columns.data(),
                 to + i * width * channels);
    }
  });
}

void resize_add_(Tensor& out, const Tensor& x) {
  const auto layout = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(out.dim() == 4 && x.dim() == 4 && out.size(0) == x.size(0) &&
                  out.size(1) == x.size(1) && x.size(2) > 0 && x.size(3) > 0 &&
                  out.scalar_type() == x.scalar_type() && out.is_contiguous(layout) &&
                  x.is_contiguous(layout),
              "resize_add_ takes channels-last maps (N, C, H, W) of one dtype and any "
              "two sizes, got ",
              out.scalar_type(), " of ", out.sizes(), " and ", x.scalar_type(), " of ",
              x.sizes());
  if (out.scalar_type() == at::kFloat)
    resize_add<float>(out, x);
  else if (out.scalar_type() == at::kBFloat16)
    resize_add<at::BFloat16>(out, x);
  else
    TORCH_CHECK(false, "resize_add_ takes float32 and bfloat16, got ",
                out.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("resize_add_(Tensor(a!) out, Tensor x) -> ()");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) { m.impl("resize_add_", resize_add_); }

}  // namespace dsnet
