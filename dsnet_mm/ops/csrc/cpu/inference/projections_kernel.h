// Projections of pixels in float, for one instruction set: included by each_isa.h.
// Weights are panels of 32 outputs: [C_out / 32][C_in][32].

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// The share of a normal distribution below x, of which a minimax polynomial is
// 0.5 + u * (c0 + c1 t + ...), where t runs from -1 to 1: powers of u^2 itself would
// cancel. Off by 2.7e-7 at most; PyTorch's by 3.5e-7.
inline Vec<float> share_below(Vec<float> x) {
  constexpr float end = 5;
  constexpr float c[] = {1.4136379e-1f, -7.0296281e-2f, 5.1520523e-2f, -4.0442608e-2f,
                         3.1442168e-2f, -2.3268651e-2f, 1.6402195e-2f, -1.1164345e-2f,
                         6.4104656e-3f, -2.6855685e-3f, 1.7228436e-3f, -1.6132678e-3f,
                         6.0871116e-4f};
#if DSNET_BYTES == 64
  const Vec<float> u =  // the smaller of |x| and the end, with the sign of x
      (Vec<float>)_mm512_range_ps((__m512)x, _mm512_set1_ps(end), 2);
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

inline Vec<float> gelu(Vec<float> x) { return x * share_below(x); }

// The slope of GELU where the share below x is ``share``.
inline Vec<float> gelu_slope(Vec<float> x, Vec<float> share) {
  constexpr float to_log2 = -0.72134752f, density = 0.39894228f;  // 1 / sqrt(2 pi)
  return share + x * (exp2(x * x * to_log2) * density);
}

alignas(64) constexpr float kZeros[kPanel] = {};

// Calls finish(row, channel, W x) for the vectors of a panel. Finish adds the rest,
// since sums that start from zero round less.
template <typename Finish>
inline void multiply(int64_t rows, int64_t in, const float* x, int64_t x_row,
                     const float* panel, const Finish& finish) {
  constexpr int lanes = Vector<float>::lanes;
  for (int c = 0; c < kPanel; c += 2 * lanes)
    tiles<float, 2>(
        rows, in, x, x_row, int64_t(1), panel + c, kPanel,
        [](int64_t, int) { return Vec<float>{}; },
        [=](int64_t r, int v, Vec<float> sum) { finish(r, c + v * lanes, sum); });
}

// out = W x + b, added to out if ``add``.
inline void linear(const Layer<float>& fc, bool add, int64_t rows, const float* x,
                   float* out, char*) {
  const int64_t row = fc.out;
  for (int64_t c = 0; c < row; c += kPanel) {
    float* to = out + c;
    const float* b = fc.b ? fc.b + c : kZeros;
    const auto write = [=](int64_t r, int64_t i, Vec<float> y) {
      put(to + r * row + i, y + loose(b + i));
    };
    const auto accumulate = [=](int64_t r, int64_t i, Vec<float> y) {
      put(to + r * row + i, y + loose(b + i) + loose(to + r * row + i));
    };
    if (add)
      multiply(rows, fc.in, x, fc.in, fc.w + c / kPanel * fc.stride, accumulate);
    else
      multiply(rows, fc.in, x, fc.in, fc.w + c / kPanel * fc.stride, write);
  }
}

// out = W2 GELU(W1 x + b1) + b2, added to out if ``add``. What out was is read after
// the last of x. W1 x + b1 goes to ``hidden`` if there is one.
inline void ffn(const Layer<float>& fc1, const Layer<float>& fc2, bool add,
                int64_t rows, const float* x, float* out, char* memory,
                float* hidden = nullptr) {
  Arena arena(memory);
  float* h = arena.take<float>(rows * kHidden);
  float* sums = arena.take<float>(rows * fc2.out);
  const int64_t row = fc2.out;
  for (int64_t begin = 0; begin < fc1.out; begin += kHidden) {
    const int64_t n = std::min(kHidden, fc1.out - begin);
    for (int64_t c = 0; c < n; c += kPanel) {
      float* to = h + c;
      const float* b = fc1.b + begin + c;
      float* kept = hidden ? hidden + begin + c : nullptr;
      multiply(rows, fc1.in, x, fc1.in, fc1.w + (begin + c) / kPanel * fc1.stride,
               [=, row = fc1.out](int64_t r, int64_t i, Vec<float> y) {
                 y += loose(b + i);
                 if (kept) put(kept + r * row + i, y);
                 put(to + r * kHidden + i, gelu(y));
               });
    }
    const bool last = begin + n == fc1.out;
    for (int64_t c = 0; c < fc2.out; c += kPanel) {
      // What is there from the channels before, or first of all b, in rows of b_row.
      const float* b = begin ? sums + c : fc2.b + c;
      const int64_t b_row = begin ? row : 0;
      float* to = (last ? out : sums) + c;
      const auto write = [=](int64_t r, int64_t i, Vec<float> y) {
        put(to + r * row + i, y + loose(b + r * b_row + i));
      };
      const auto accumulate = [=](int64_t r, int64_t i, Vec<float> y) {
        put(to + r * row + i, y + loose(b + r * b_row + i) + loose(to + r * row + i));
      };
      const float* panel = fc2.w + c / kPanel * fc2.stride + begin * kPanel;
      if (last && add)
        multiply(rows, n, h, kHidden, panel, accumulate);
      else
        multiply(rows, n, h, kHidden, panel, write);
    }
  }
}

// Rows as panels of 32 channels, [C / 32][rows][32].
inline void to_panels(int64_t rows, int64_t width, const float* x, int64_t x_row,
                      float* panels) {
  constexpr int lanes = Vector<float>::lanes;
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < kPanel; i += lanes)
        put(panels + c * rows + r * kPanel + i, loose(x + r * x_row + c + i));
}

// grad = a^T b, added to grad if ``add``, where a has m channels, in rows of a_row, and
// b has n, in panels; grad has rows of grad_row.
inline void outer(int64_t m, int64_t n, int64_t rows, const float* a, int64_t a_row,
                  const float* b, float* grad, int64_t grad_row, bool add) {
  constexpr int lanes = Vector<float>::lanes;
  for (int64_t c = 0; c < n; c += kPanel)
    for (int i = 0; i < kPanel; i += 2 * lanes) {
      float* to = grad + c + i;
      tiles<float, 2>(
          m, rows, a, int64_t(1), a_row, b + c * rows + i, kPanel,
          [](int64_t, int) { return Vec<float>{}; },
          [=](int64_t r, int v, Vec<float> sum) {
            float* at = to + r * grad_row + v * lanes;
            put(at, add ? sum + loose(at) : sum);
          });
    }
}

// Gradients of W2 GELU(W1 x + b1) as far as they go through the hidden channels
// [first, last), for some pixels. W1 x + b1 is read from ``kept`` if there is one.
inline void ffn_backward(int64_t width, int64_t hidden, const float* w1,
                         const float* b1, const float* w2, int64_t first, int64_t last,
                         int64_t pixels, const float* x, const float* kept,
                         const float* grad, float* grad_x, float* grad_w1,
                         float* grad_b1, float* grad_w2, char* memory) {
  const int64_t h_row = kHidden + 16;  // else all rows would share a few cache sets
  const int64_t parts = ceil_div(pixels, kShare);
  const int64_t size = ceil_div(ceil_div(pixels, parts), kRows) * kRows;
  Arena arena(memory);
  float* h = arena.take<float>(size * kHidden);  // in panels,
  float* grad_h = arena.take<float>(size * h_row);
  float* x_panels = arena.take<float>(size * width);
  float* grad_panels = arena.take<float>(size * width);
  float* to_h = arena.take<float>(kHidden * width);       // W1,
  float* from_h = arena.take<float>(kHidden * width);     // the transposed W1,
  float* to_grad_h = arena.take<float>(kHidden * width);  // and the transposed W2
  std::fill(grad_b1 + first, grad_b1 + last, 0.f);
  for (int64_t begin = first; begin < last; begin += kHidden) {
    const int64_t n = std::min(kHidden, last - begin);
    for (int64_t c = 0; !kept && c < n; c += kPanel)
      transpose(kPanel, width, w1 + (begin + c) * width, width, to_h + c * width,
                kPanel);
    to_panels(n, width, w1 + begin * width, width, from_h);
    to_panels(width, n, w2 + begin, hidden, to_grad_h);
    for (int64_t i = 0; i < pixels; i += size) {
      const int64_t rows = std::min(size, pixels - i);
      const float *xs = x + i * width, *grads = grad + i * width;
      for (int64_t c = 0; c < n; c += kPanel) {
        float *to = h + c * rows, *slope = grad_h + c;
        const auto activate = [=](int64_t r, int64_t j, Vec<float> y) {
          const Vec<float> share = share_below(y);
          put(to + r * kPanel + j, y * share);
          put(slope + r * h_row + j, gelu_slope(y, share));
        };
        const float* b = b1 + begin + c;
        if (kept)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < kPanel; j += Vector<float>::lanes)
              activate(r, j, loose(kept + (i + r) * hidden + begin + c + j));
        else
          multiply(rows, width, xs, width, to_h + c * width,
                   [=](int64_t r, int64_t j, Vec<float> y) {
                     activate(r, j, y + loose(b + j));
                   });
        multiply(rows, width, grads, width, to_grad_h + c * width,
                 [=](int64_t r, int64_t j, Vec<float> y) {
                   float* at = slope + r * h_row + j;
                   put(at, y * loose(at));
                 });
      }
      for (int64_t c = 0; c < width; c += kPanel) {
        float* to = grad_x + i * width + c;
        multiply(rows, n, grad_h, h_row, from_h + c * n,
                 [=](int64_t r, int64_t j, Vec<float> y) {
                   float* at = to + r * width + j;
                   put(at, begin > first ? y + loose(at) : y);
                 });
      }
      to_panels(rows, width, xs, width, x_panels);
      outer(n, width, rows, grad_h, h_row, x_panels, grad_w1 + begin * width, width,
            i > 0);
      to_panels(rows, width, grads, width, grad_panels);
      for (int64_t c = 0; c < width; c += kPanel)
        outer(kPanel, n, rows, grad_panels + c * rows, kPanel, h,
              grad_w2 + c * hidden + begin, hidden, i > 0);
      float sums[kHidden] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c) sums[c] += grad_h[r * h_row + c];
      for (int64_t c = 0; c < n; ++c) grad_b1[begin + c] += sums[c];
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
