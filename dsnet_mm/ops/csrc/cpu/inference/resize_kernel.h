// Rows of a bilinear resize, for one instruction set: included by each_isa.h.

namespace dsnet {
namespace DSNET_ISA {

// line[i] = a[i] + t * (b[i] - a[i])
template <typename S>
void mix(int64_t n, const S* a, const S* b, float t, float* line) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>(a[i]);
    line[i] = x + t * (static_cast<float>(b[i]) - x);
  }
}

// out[pixel][channel] += the line, of pixels of ``channels``, at each pixel's place.
template <typename S>
void add_row(int64_t pixels, int64_t channels, const float* line, const Place* places,
             S* out) {
  for (int64_t i = 0; i < pixels; ++i, out += channels) {
    const float t = places[i].weight;
    const float* a = line + places[i].first * channels;
    const float* b = line + places[i].second * channels;
    for (int64_t c = 0; c < channels; ++c)
      out[c] = static_cast<S>(static_cast<float>(out[c]) + a[c] + t * (b[c] - a[c]));
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
