// Projections of pixels in float, for one instruction set. Included by each_isa.h.
//
//   linear:        y = W x + b
//   ffn:           y = W2 GELU(h) + b2 with h = W1 x + b1
//   ffn_backward:  the gradients of x, W1, b1 and W2 of the ffn
//
// Weights are panels of 32 outputs: [C_out / 32][C_in][32]. A panel is the right factor
// of a matrix product whose left factor is some rows of pixels; see vectors.h for the
// tile and its registers.
//
// Loop order: panels, then tiles of pixels, then inputs. The pixels of a call lie in L2
// and stay there for all panels. A panel passes through L1 once a call.

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// ----------------------------------------------------------------------- GELU

// The cumulative distribution function of the normal distribution. It is the minimax
// polynomial 0.5 + u * (c0 + c1 t + ...), where t goes from -1 to 1: powers of u^2
// itself would cancel. The error is at most 2.7e-7; that of PyTorch's GELU 3.5e-7.
inline Vec<float> normal_cdf(Vec<float> x) {
  constexpr float end = 5;
  constexpr float c[] = {1.4136379e-1f, -7.0296281e-2f, 5.1520523e-2f, -4.0442608e-2f,
                         3.1442168e-2f, -2.3268651e-2f, 1.6402195e-2f, -1.1164345e-2f,
                         6.4104656e-3f, -2.6855685e-3f, 1.7228436e-3f, -1.6132678e-3f,
                         6.0871116e-4f};
  // u is x, limited to [-end, end].
#if DSNET_VECTOR_BYTES == 64
  // The smaller of |x| and end, with the sign of x.
  const Vec<float> u = (Vec<float>)_mm512_range_ps((__m512)x, _mm512_set1_ps(end), 2);
#else
  const Vec<float> zero{}, low = x < -end ? zero - end : x;
  const Vec<float> u = low > end ? zero + end : low;
#endif
  const Vec<float> t = u * u * (2 / (end * end)) - 1.f;
  Vec<float> y = t * c[12] + c[11];
#pragma GCC unroll 11
  for (int i = 10; i >= 0; --i) y = y * t + c[i];
  return y * u + 0.5f;
}

inline Vec<float> gelu(Vec<float> x) { return x * normal_cdf(x); }

// The derivative of GELU; ``cdf`` is normal_cdf(x).
inline Vec<float> gelu_derivative(Vec<float> x, Vec<float> cdf) {
  constexpr float log2_scale = -0.72134752f;  // exp(-x^2 / 2) = 2^(log2_scale x^2)
  constexpr float density = 0.39894228f;      // 1 / sqrt(2 pi)
  return cdf + x * (exp2(x * x * log2_scale) * density);
}

// -------------------------------------------------------------------- forward

alignas(64) constexpr float kZeros[kPanel] = {};

// Calls epilogue(row, channel, W x) for the vectors of one panel. The epilogue adds the
// bias: sums that start from zero round less.
template <typename Epilogue>
inline void multiply_panel(int64_t rows, int64_t in, const float* x, int64_t x_stride,
                           const float* panel, const Epilogue& epilogue) {
  constexpr int lanes = Vector<float>::lanes;
  for (int c = 0; c < kPanel; c += 2 * lanes)
    multiply_tiles<float, 2>(
        rows, in, x, x_stride, int64_t(1), panel + c, kPanel,
        [](int64_t, int) { return Vec<float>{}; },
        [=](int64_t r, int v, Vec<float> sum) { epilogue(r, c + v * lanes, sum); });
}

// out = W x + b, added to out if ``add``.
inline void linear(const Layer<float>& fc, bool add, int64_t rows, const float* x,
                   float* out) {
  const int64_t stride = fc.out;
  for (int64_t c = 0; c < stride; c += kPanel) {
    float* dst = out + c;
    const float* b = fc.b ? fc.b + c : kZeros;
    multiply_panel(rows, fc.in, x, fc.in, fc.w + c / kPanel * fc.stride,
                   [=](int64_t r, int64_t i, Vec<float> y) {
                     y += loadu(b + i);
                     float* to = dst + r * stride + i;
                     storeu(to, add ? y + loadu(to) : y);
                   });
  }
}

// out = W2 GELU(h) + b2 with h = W1 x + b1, added to out if ``add``.
//
// Loop order: chunks of kHiddenChunk hidden channels. GELU of a chunk lies in L2 and is
// multiplied by W2 at once; the sums over the chunks lie in L2 as well. ``out`` may be
// ``x``: it is read and written after x was read for the last time.
inline void ffn(const Layer<float>& fc1, const Layer<float>& fc2, bool add,
                int64_t rows, const float* x, float* out, Arena& arena) {
  float* h = arena.allocate<float>(rows * kHiddenChunk);
  float* sums = arena.allocate<float>(rows * fc2.out);
  if (arena.counts()) return;

  const int64_t stride = fc2.out;
  for (int64_t begin = 0; begin < fc1.out; begin += kHiddenChunk) {
    const int64_t n = std::min(kHiddenChunk, fc1.out - begin);
    for (int64_t c = 0; c < n; c += kPanel) {
      float* dst = h + c;
      const float* b = fc1.b + begin + c;
      multiply_panel(rows, fc1.in, x, fc1.in, fc1.w + (begin + c) / kPanel * fc1.stride,
                     [=](int64_t r, int64_t i, Vec<float> y) {
                       storeu(dst + r * kHiddenChunk + i, gelu(y + loadu(b + i)));
                     });
    }
    const bool last = begin + n == fc1.out;
    for (int64_t c = 0; c < fc2.out; c += kPanel) {
      // What is added: b2 in the first chunk, later the sums over the earlier chunks.
      const float* b = begin ? sums + c : fc2.b + c;
      const int64_t b_stride = begin ? stride : 0;
      float* dst = (last ? out : sums) + c;
      multiply_panel(rows, n, h, kHiddenChunk,
                     fc2.w + c / kPanel * fc2.stride + begin * kPanel,
                     [=](int64_t r, int64_t i, Vec<float> y) {
                       y += loadu(b + r * b_stride + i);
                       float* to = dst + r * stride + i;
                       storeu(to, last && add ? y + loadu(to) : y);
                     });
    }
  }
}

// ------------------------------------------------------------------- backward

// Packs rows as panels of 32 channels: [C / 32][rows][32].
inline void pack_panels(int64_t rows, int64_t width, const float* x, int64_t x_stride,
                        float* panels) {
  constexpr int lanes = Vector<float>::lanes;
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < kPanel; i += lanes)
        storeu(panels + c * rows + r * kPanel + i, loadu(x + r * x_stride + c + i));
}

// grad[m][n] = sum over the rows of a[row][m] b[row][n], added to grad if ``add``. b is
// packed as panels.
inline void multiply_transposed(int64_t m, int64_t n, int64_t rows, const float* a,
                                int64_t a_stride, const float* b, float* grad,
                                int64_t grad_stride, bool add) {
  constexpr int lanes = Vector<float>::lanes;
  for (int64_t c = 0; c < n; c += kPanel)
    for (int i = 0; i < kPanel; i += 2 * lanes) {
      float* dst = grad + c + i;
      multiply_tiles<float, 2>(
          m, rows, a, int64_t(1), a_stride, b + c * rows + i, kPanel,
          [](int64_t, int) { return Vec<float>{}; },
          [=](int64_t r, int v, Vec<float> sum) {
            float* at = dst + r * grad_stride + v * lanes;
            storeu(at, add ? sum + loadu(at) : sum);
          });
    }
}

// Gradients of W2 GELU(h) with h = W1 x + b1, as far as they go through the hidden
// channels [first, last), for some pixels:
//
//   grad_h  = (W2^T grad) GELU'(h)
//   grad_x  = W1^T grad_h
//   grad_w1 = sum over pixels of grad_h x^T,   grad_b1 = sum over pixels of grad_h
//   grad_w2 = sum over pixels of grad GELU(h)^T
//
// h is computed again.
//
// Loop order: chunks of kHiddenChunk hidden channels, then at most kBackwardPixels
// pixels. The weights of a chunk are packed once. They, GELU(h), grad_h and the packed
// pixels and gradients lie in L2.
inline void ffn_backward(int64_t width, int64_t hidden, const float* w1,
                         const float* b1, const float* w2, int64_t first, int64_t last,
                         int64_t pixels, const float* x, const float* grad,
                         float* grad_x, float* grad_w1, float* grad_b1, float* grad_w2,
                         Arena& arena) {
  // Rows of another length than a power of two: otherwise all would share a few sets of
  // the cache.
  const int64_t h_stride = kHiddenChunk + 16;
  const int64_t parts = ceil_div(pixels, kBackwardPixels);
  const int64_t size = round_up(ceil_div(pixels, parts), kPixelGroup);
  float* gelu_h = arena.allocate<float>(size * kHiddenChunk);  // in panels
  float* grad_h = arena.allocate<float>(size * h_stride);
  float* x_panels = arena.allocate<float>(size * width);
  float* grad_panels = arena.allocate<float>(size * width);
  float* w1_panels = arena.allocate<float>(kHiddenChunk * width);    // W1
  float* w1_t_panels = arena.allocate<float>(kHiddenChunk * width);  // W1 transposed
  float* w2_t_panels = arena.allocate<float>(kHiddenChunk * width);  // W2 transposed
  if (arena.counts()) return;

  std::fill(grad_b1 + first, grad_b1 + last, 0.f);
  for (int64_t begin = first; begin < last; begin += kHiddenChunk) {
    const int64_t n = std::min(kHiddenChunk, last - begin);
    for (int64_t c = 0; c < n; c += kPanel)
      transpose(kPanel, width, w1 + (begin + c) * width, width, w1_panels + c * width,
                kPanel);
    pack_panels(n, width, w1 + begin * width, width, w1_t_panels);
    pack_panels(width, n, w2 + begin, hidden, w2_t_panels);
    for (int64_t i = 0; i < pixels; i += size) {
      const int64_t rows = std::min(size, pixels - i);
      const float *xs = x + i * width, *grads = grad + i * width;
      for (int64_t c = 0; c < n; c += kPanel) {
        // GELU(h), and GELU'(h) in the place of grad_h.
        float *h_panel = gelu_h + c * rows, *grad_h_panel = grad_h + c;
        const auto activate = [=](int64_t r, int64_t j, Vec<float> h) {
          const Vec<float> cdf = normal_cdf(h);
          storeu(h_panel + r * kPanel + j, h * cdf);
          storeu(grad_h_panel + r * h_stride + j, gelu_derivative(h, cdf));
        };
        const float* b = b1 + begin + c;
        multiply_panel(rows, width, xs, width, w1_panels + c * width,
                       [=](int64_t r, int64_t j, Vec<float> y) {
                         activate(r, j, y + loadu(b + j));
                       });
        multiply_panel(rows, width, grads, width, w2_t_panels + c * width,
                       [=](int64_t r, int64_t j, Vec<float> y) {
                         float* at = grad_h_panel + r * h_stride + j;
                         storeu(at, y * loadu(at));
                       });
      }
      for (int64_t c = 0; c < width; c += kPanel) {
        float* dst = grad_x + i * width + c;
        multiply_panel(rows, n, grad_h, h_stride, w1_t_panels + c * n,
                       [=](int64_t r, int64_t j, Vec<float> y) {
                         float* at = dst + r * width + j;
                         storeu(at, begin > first ? y + loadu(at) : y);
                       });
      }
      pack_panels(rows, width, xs, width, x_panels);
      multiply_transposed(n, width, rows, grad_h, h_stride, x_panels,
                          grad_w1 + begin * width, width, i > 0);
      pack_panels(rows, width, grads, width, grad_panels);
      for (int64_t c = 0; c < width; c += kPanel)
        multiply_transposed(kPanel, n, rows, grad_panels + c * rows, kPanel, gelu_h,
                            grad_w2 + c * hidden + begin, hidden, i > 0);
      float sums[kHiddenChunk] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c) sums[c] += grad_h[r * h_stride + c];
      for (int64_t c = 0; c < n; ++c) grad_b1[begin + c] += sums[c];
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
