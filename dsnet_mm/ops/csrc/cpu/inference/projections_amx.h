// Projections of pixels in bfloat16 by AMX: out = W x + b, and out += W2 GELU(W1 x +
// b1) + b2. Weights: [C_out / 16][C_in / 32][16 pairs of inputs][16 outputs][2].

namespace dsnet {
namespace amx {

inline __m512 to_float(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// x times the share of a normal distribution below x, of which a minimax polynomial
// is 0.5 + u * (c0 + c1 u^2 + ...). The error is below 1.5e-4 for |x| < 6.
inline __m512 gelu(__m512 x) {
  constexpr float c[] = {3.9827165e-1f, -6.5110579e-2f, 9.0208165e-3f, -8.6661224e-4f,
                         5.3555625e-5f, -1.8903269e-6f, 2.8693483e-8f};
  // The smaller of |x| and where the polynomial ends, with the sign of x.
  const __m512 u = _mm512_range_ps(x, _mm512_set1_ps(3.86f), 2);
  const __m512 s = u * u;
  __m512 y = s * c[6] + c[5];
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) y = y * s + c[i];
  return x * (y * u + 0.5f);
}

// Calls finish(product, channel, row) for each 32 rows of 32 channels of W x, a step
// later: what a product has stored can be loaded by then. ``a`` is x by pack_rows.
template <typename Finish>
inline void multiply(int64_t rows, int64_t in, int64_t out, const BFloat16* a,
                     const BFloat16* w, int64_t w_stride, float* p,
                     const Finish& finish) {
  constexpr int64_t kSize = kGroup * kGroup;
  const int64_t groups = rows / kGroup, steps = out / kGroup * groups;
  for (int64_t i = 0; i <= steps; ++i) {
    if (i < steps)
      product(in / kDepth, a + i % groups * kGroup * kDepth, kDepth, kTile,
              rows * kDepth, w + 2 * (i / groups) * w_stride, kTile, w_stride,
              p + i % 2 * kSize, kGroup, false);
    if (i > 0)
      finish(p + (i - 1) % 2 * kSize, (i - 1) / groups * kGroup,
             (i - 1) % groups * kGroup);
  }
}

// out = sum + b, of up to 32 rows of 32 channels, added to out if ``add``.
inline void write(const float* sum, int64_t count, const BFloat16* b, bool add,
                  BFloat16* out, int64_t out_row) {
  const __m512 low = b ? to_float(b) : __m512{};
  const __m512 high = b ? to_float(b + kSide) : __m512{};
  for (int64_t r = 0; r < count; ++r, sum += kGroup, out += out_row) {
    __m512 x = _mm512_load_ps(sum) + low, y = _mm512_load_ps(sum + kSide) + high;
    if (add) {
      x += to_float(out);
      y += to_float(out + kSide);
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// hidden = GELU(sum + b), of 32 rows of 32 channels.
inline void activate(const float* sum, const BFloat16* b, BFloat16* hidden) {
  const __m512 low = to_float(b), high = to_float(b + kSide);
  for (int64_t r = 0; r < kGroup; ++r, sum += kGroup, hidden += kDepth) {
    const __m512 x = gelu(_mm512_load_ps(sum) + low);
    const __m512 y = gelu(_mm512_load_ps(sum + kSide) + high);
    _mm512_store_si512(hidden, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// Up to kPixels rows.
inline void linear(const Layer<BFloat16>& fc, bool add, int64_t count,
                   const BFloat16* x, BFloat16* out, char* memory) {
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  BFloat16* a = arena.take<BFloat16>(rows * fc.in);
  float* p = arena.take<float>(2 * kGroup * kGroup);
  pack_rows(count, rows, fc.in, x, fc.in, a);
  const Configuration configuration;
  multiply(rows, fc.in, fc.out, a, fc.w, fc.stride, p,
           [&](const float* sum, int64_t c, int64_t r) {
             write(sum, std::min(kGroup, count - r), fc.b ? fc.b + c : nullptr, add,
                   out + r * fc.out + c, fc.out);
           });
}

// Up to kPixels rows.
inline void ffn(const Layer<BFloat16>& fc1, const Layer<BFloat16>& fc2, bool add,
                int64_t count, const BFloat16* x, BFloat16* out, char* memory) {
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  BFloat16* a = arena.take<BFloat16>(rows * fc1.in);
  BFloat16* h = arena.take<BFloat16>(rows * kHidden);
  float* p = arena.take<float>(2 * kGroup * kGroup);
  float* sum = arena.take<float>(rows * fc2.out);  // [out / 32][row][32]
  pack_rows(count, rows, fc1.in, x, fc1.in, a);
  const Configuration configuration;
  for (int64_t begin = 0; begin < fc1.out; begin += kHidden) {
    const int64_t n = std::min(kHidden, fc1.out - begin);
    multiply(rows, fc1.in, n, a, fc1.w + begin / kSide * fc1.stride, fc1.stride, p,
             [&](const float* part, int64_t c, int64_t r) {
               activate(part, fc1.b + begin + c, h + c * rows + r * kDepth);
             });
    for (int64_t c = 0; c < fc2.out; c += kGroup)
      for (int64_t r = 0; r < rows; r += kGroup)
        product(n / kDepth, h + r * kDepth, kDepth, kTile, rows * kDepth,
                fc2.w + c / kSide * fc2.stride + begin * kSide, kTile, fc2.stride,
                sum + c * rows + r * kGroup, kGroup, begin > 0);
  }
  for (int64_t c = 0; c < fc2.out; c += kGroup)
    write(sum + c * rows, count, fc2.b + c, add, out + c, fc2.out);
}

}  // namespace amx
}  // namespace dsnet
