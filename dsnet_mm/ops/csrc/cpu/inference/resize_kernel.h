// One row of a bilinear resize, for one instruction set. Included by each_isa.h. The
// equation and the loop order are in resize_cpu.cpp.

namespace dsnet {
namespace DSNET_ISA {

// Adds a row of ``width`` pixels to out. ``map`` is the input, whose rows have
// ``row_size`` numbers, ``row`` a buffer for as many.
template <typename S>
void resize_add_row(int64_t row_size, const S* map, const Interpolation& rows,
                    int64_t width, int64_t channels, const Interpolation* columns,
                    float* row, S* out) {
  const S *first = map + rows.first * row_size, *second = map + rows.second * row_size;
  for (int64_t i = 0; i < row_size; ++i) {
    const float x = static_cast<float>(first[i]);
    row[i] = x + rows.weight * (static_cast<float>(second[i]) - x);
  }
  for (int64_t i = 0; i < width; ++i, out += channels) {
    const float t = columns[i].weight;
    const float* a = row + columns[i].first * channels;
    const float* b = row + columns[i].second * channels;
    for (int64_t c = 0; c < channels; ++c)
      out[c] = static_cast<S>(static_cast<float>(out[c]) + a[c] + t * (b[c] - a[c]));
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
