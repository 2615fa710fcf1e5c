// One row of a bilinear resize, for one instruction set. Included by each_isa.h. The
// equation and the loop order are in resize_cpu.cpp.

namespace dsnet {
namespace DSNET_ISA {

// row[i] = a[i] + t * (b[i] - a[i])
template <typename S>
void interpolate(int64_t n, const S* a, const S* b, float t, float* row) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>(a[i]);
    row[i] = x + t * (static_cast<float>(b[i]) - x);
  }
}

// out[i] += first + weight * (second - first) for each output pixel i, where ``first``
// and ``second`` are the pixels of the row that columns[i] names.
template <typename S>
void interpolate_add(int64_t pixels, int64_t channels, const float* row,
                     const Interpolation* columns, S* out) {
  for (int64_t i = 0; i < pixels; ++i, out += channels) {
    const float t = columns[i].weight;
    const float* a = row + columns[i].first * channels;
    const float* b = row + columns[i].second * channels;
    for (int64_t c = 0; c < channels; ++c)
      out[c] = static_cast<S>(static_cast<float>(out[c]) + a[c] + t * (b[c] - a[c]));
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
