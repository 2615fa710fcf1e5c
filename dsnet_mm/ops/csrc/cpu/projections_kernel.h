// Projections of pixels in float, for one instruction set: included by each_isa.h.
// Weights are panels of 32 outputs: [C_out / 32][C_in][32].

#include "vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// x times the share of a normal distribution below x, of which a minimax polynomial is
// 0.5 + u * (c0 + c1 t + ...), where t runs from -1 to 1: powers of u^2 itself would
// cancel. Off by 2.7e-7 |x| at most; PyTorch's by 3.5e-7 |x|.
inline Vec<float> gelu(Vec<float> x) {
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
  return x * (y * u + 0.5f);
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
      multiply(rows, fc.in, x, fc.in, fc.w + c * fc.in, accumulate);
    else
      multiply(rows, fc.in, x, fc.in, fc.w + c * fc.in, write);
  }
}

// out += W2 GELU(W1 x + b1) + b2. What out was is read after the last of x.
inline void ffn(const Layer<float>& fc1, const Layer<float>& fc2, int64_t rows,
                const float* x, float* out, char* memory) {
  Arena arena(memory);
  float* h = arena.take<float>(rows * kHidden);
  float* sums = arena.take<float>(rows * fc2.out);
  const int64_t row = fc2.out;
  for (int64_t begin = 0; begin < fc1.out; begin += kHidden) {
    const int64_t n = std::min(kHidden, fc1.out - begin);
    for (int64_t c = 0; c < n; c += kPanel) {
      float* to = h + c;
      const float* b = fc1.b + begin + c;
      multiply(rows, fc1.in, x, fc1.in, fc1.w + (begin + c) * fc1.in,
               [=](int64_t r, int64_t i, Vec<float> y) {
                 put(to + r * kHidden + i, gelu(y + loose(b + i)));
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
      if (last)
        multiply(rows, n, h, kHidden, fc2.w + c * fc2.in + begin * kPanel, accumulate);
      else
        multiply(rows, n, h, kHidden, fc2.w + c * fc2.in + begin * kPanel, write);
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
