// Projections of pixels in bfloat16, with the matrix products of AMX.
//
//   linear:        y = W x + b
//   ffn:           y = W2 GELU(W1 x + b1) + b2
//   ffn_backward:  the gradients of x, W1, b1 and W2 of the ffn
//
// Weights are tiles of B: [C_out / 16][C_in / 32][16 pairs of inputs][16 outputs][2].
// Pixels are packed as tiles of A, once a call; they and the hidden layer lie in L2.
//
// Loop order: 32 outputs, then 32 pixels, then inputs. The sums of 32 by 32 lie in L1,
// in two buffers: the epilogue of one product runs after the next product, when what
// the tiles have stored is ready to be loaded.

namespace dsnet {
namespace amx {

inline __m512 to_float(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// The cumulative distribution function of the normal distribution. It is the minimax
// polynomial 0.5 + u * (c0 + c1 u^2 + ...). The error of x times it is below 1.5e-4 for
// |x| < 6.
inline __m512 normal_cdf(__m512 x) {
  constexpr float c[] = {3.9827165e-1f, -6.5110579e-2f, 9.0208165e-3f, -8.6661224e-4f,
                         5.3555625e-5f, -1.8903269e-6f, 2.8693483e-8f};
  // The smaller of |x| and where the polynomial ends, with the sign of x.
  const __m512 u = _mm512_range_ps(x, _mm512_set1_ps(3.86f), 2);
  const __m512 s = u * u;
  __m512 y = s * c[6] + c[5];
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) y = y * s + c[i];
  return y * u + 0.5f;
}

inline __m512 gelu(__m512 x) { return x * normal_cdf(x); }

// Calls epilogue(sums, channel, row) for each 32 rows of 32 channels of W x. ``a`` is x
// as pack_rows packs it, ``w_stride`` goes from 16 outputs to the next, and ``p`` has
// room for the sums of two products.
template <typename Epilogue>
inline void multiply(int64_t rows, int64_t in, int64_t out, const BFloat16* a,
                     const BFloat16* w, int64_t w_stride, float* p,
                     const Epilogue& epilogue) {
  constexpr int64_t kSize = kTwoTiles * kTwoTiles;
  const int64_t groups = rows / kTwoTiles, steps = out / kTwoTiles * groups;
  for (int64_t i = 0; i <= steps; ++i) {
    if (i < steps)
      multiply_2x2(in / kTileDepth, a + i % groups * kTwoTiles * kTileDepth, kTileDepth,
                   kTileSize, rows * kTileDepth, w + 2 * (i / groups) * w_stride,
                   kTileSize, w_stride, p + i % 2 * kSize, kTwoTiles, false);
    if (i > 0)
      epilogue(p + (i - 1) % 2 * kSize, (i - 1) / groups * kTwoTiles,
               (i - 1) % groups * kTwoTiles);
  }
}

// out = sum + b for ``count`` rows of 32 channels, added to out if ``add``.
inline void write(const float* sum, int64_t count, const BFloat16* b, bool add,
                  BFloat16* out, int64_t out_stride) {
  const __m512 low = b ? to_float(b) : __m512{};
  const __m512 high = b ? to_float(b + kTileRows) : __m512{};
  for (int64_t r = 0; r < count; ++r, sum += kTwoTiles, out += out_stride) {
    __m512 x = _mm512_load_ps(sum) + low, y = _mm512_load_ps(sum + kTileRows) + high;
    if (add) {
      x += to_float(out);
      y += to_float(out + kTileRows);
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// hidden = GELU(sum + b) for 32 rows of 32 channels.
inline void activate(const float* sum, const BFloat16* b, BFloat16* hidden) {
  const __m512 low = to_float(b), high = to_float(b + kTileRows);
  for (int64_t r = 0; r < kTwoTiles; ++r, sum += kTwoTiles, hidden += kTileDepth) {
    const __m512 x = gelu(_mm512_load_ps(sum) + low);
    const __m512 y = gelu(_mm512_load_ps(sum + kTileRows) + high);
    _mm512_store_si512(hidden, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// out = W x + b for up to kChunkPixels rows, added to out if ``add``.
inline void linear(const Layer<BFloat16>& fc, bool add, int64_t count,
                   const BFloat16* x, BFloat16* out, Arena& arena) {
  const int64_t rows = round_up(count, kTwoTiles);
  BFloat16* a = arena.allocate<BFloat16>(rows * fc.in);
  float* p = arena.allocate<float>(2 * kTwoTiles * kTwoTiles);
  if (arena.counts()) return;

  pack_rows(count, rows, fc.in, x, fc.in, a);
  const TileConfig config;
  multiply(rows, fc.in, fc.out, a, fc.w, fc.stride, p,
           [&](const float* sum, int64_t c, int64_t r) {
             write(sum, std::min(kTwoTiles, count - r), fc.b ? fc.b + c : nullptr, add,
                   out + r * fc.out + c, fc.out);
           });
}

// out = W2 GELU(W1 x + b1) + b2 for up to kChunkPixels rows, added to out if ``add``.
// Loop order: chunks of kHiddenChunk hidden channels, as in the kernel in float.
inline void ffn(const Layer<BFloat16>& fc1, const Layer<BFloat16>& fc2, bool add,
                int64_t count, const BFloat16* x, BFloat16* out, Arena& arena) {
  const int64_t rows = round_up(count, kTwoTiles);
  BFloat16* a = arena.allocate<BFloat16>(rows * fc1.in);
  BFloat16* h = arena.allocate<BFloat16>(rows * kHiddenChunk);
  float* p = arena.allocate<float>(2 * kTwoTiles * kTwoTiles);
  float* sums = arena.allocate<float>(rows * fc2.out);  // [C_out / 32][row][32]
  if (arena.counts()) return;

  pack_rows(count, rows, fc1.in, x, fc1.in, a);
  const TileConfig config;
  for (int64_t begin = 0; begin < fc1.out; begin += kHiddenChunk) {
    const int64_t n = std::min(kHiddenChunk, fc1.out - begin);
    multiply(rows, fc1.in, n, a, fc1.w + begin / kTileRows * fc1.stride, fc1.stride, p,
             [&](const float* sum, int64_t c, int64_t r) {
               activate(sum, fc1.b + begin + c, h + c * rows + r * kTileDepth);
             });
    for (int64_t c = 0; c < fc2.out; c += kTwoTiles)
      for (int64_t r = 0; r < rows; r += kTwoTiles)
        multiply_2x2(n / kTileDepth, h + r * kTileDepth, kTileDepth, kTileSize,
                     rows * kTileDepth,
                     fc2.w + c / kTileRows * fc2.stride + begin * kTileRows, kTileSize,
                     fc2.stride, sums + c * rows + r * kTwoTiles, kTwoTiles, begin > 0);
  }
  for (int64_t c = 0; c < fc2.out; c += kTwoTiles)
    write(sums + c * rows, count, fc2.b + c, add, out + c, fc2.out);
}

// The weights of ffn_backward, for all tasks.
struct BackwardWeights {
  BFloat16 *w1, *w2_t;  // W1 and W2 transposed, as pack_rows packs them
  BFloat16* w1_pairs;   // W1 as pack_pairs packs it
  const BFloat16* b1;
};

// Packs w1 and w2_t, for the channels [first, last) of the input and the output.
inline void pack_for_hidden(int64_t width, int64_t hidden, const BFloat16* w1,
                            const BFloat16* w2, int64_t first, int64_t last,
                            const BackwardWeights& weights, Arena& arena) {
  BFloat16* pairs = arena.allocate<BFloat16>((last - first) * hidden);
  if (arena.counts()) return;

  const int64_t count = last - first;
  for (int64_t c = first; c < last; c += kTileDepth)
    pack_rows(hidden, hidden, kTileDepth, w1 + c, width, weights.w1 + c * hidden);
  pack_transposed(count, count, hidden, w2 + first * hidden, hidden,
                  weights.w2_t + first * hidden, pairs);
}

// As avx512::ffn_backward.
//
// Loop order: kRows pixels, then kChannels hidden channels. The hidden layer is
// [channel][pixel]. So grad_h is, as it is, the left factor of the gradient of W1. For
// that of W2, the tiles of GELU(h) are transposed, for that of x those of grad_h. It is
// interleaved by pairs of channels first, since a pair is a word.
inline void ffn_backward(int64_t width, int64_t hidden, const BackwardWeights& weights,
                         int64_t first, int64_t last, int64_t pixels, const BFloat16* x,
                         const BFloat16* grad, BFloat16* grad_x, float* grad_w1,
                         float* grad_b1, float* grad_w2, Arena& arena) {
  constexpr int64_t kRows = 128, kChannels = 64, kCells = kRows * kChannels;
  const auto operand = [&] { return arena.allocate<BFloat16>(kRows * width); };
  BFloat16 *x_columns = operand(), *g_columns = operand(), *rows = operand();
  BFloat16 *x_pairs = operand(), *g_transposed = operand();
  float* h = arena.allocate<float>(kCells);  // [channel][pixel]
  float* d = arena.allocate<float>(kCells);  // its gradient
  BFloat16* gelu_h = arena.allocate<BFloat16>(kCells);
  BFloat16* gelu_h_columns = arena.allocate<BFloat16>(kCells);
  BFloat16* grad_h = arena.allocate<BFloat16>(kCells);
  BFloat16* grad_h_t = arena.allocate<BFloat16>(kCells);
  float* grad_h_pairs = arena.allocate<float>(kCells / 2);
  float* sums = arena.allocate<float>(kRows * width);  // grad_x
  if (arena.counts()) return;

  const __m512i interleave = interleaving();
  std::fill(grad_b1 + first, grad_b1 + last, 0.f);
  const TileConfig config;
  for (int64_t i = 0; i < pixels; i += kRows) {
    const int64_t m = std::min(kRows, pixels - i), all = round_up(m, kTwoTiles);
    pack_columns(m, all, width, x + i * width, width, x_columns, rows);
    pack_columns(m, all, width, grad + i * width, width, g_columns, rows);
    pack_pairs(m, all, width, x + i * width, width, x_pairs);
    pack_transposed(m, all, width, grad + i * width, width, g_transposed, rows);
    for (int64_t c = first; c < last; c += kChannels) {
      const int64_t n = std::min(kChannels, last - c);
      multiply_packed(n, all, width, weights.w1 + c * kTileDepth, hidden, x_columns, h,
                      kRows, false);
      multiply_packed(n, all, width, weights.w2_t + c * kTileDepth, hidden, g_columns,
                      d, kRows, false);
      for (int64_t j = 0; j < n; j += 2) {
        Vec<float> sum[2] = {};
        for (int64_t p = 0; p < all; p += kTileDepth) {
          Vec<float> g[2][2];  // of two channels and 2 x 16 pixels
          for (int r = 0; r < 2; ++r) {
            const float b = weights.b1[c + j + r];
            Vec<float> y[2];
            for (int k = 0; k < 2; ++k) {
              const int64_t cell = (j + r) * kRows + p + k * kTileRows;
              const Vec<float> value = vec(h + cell) + b;
              const Vec<float> cdf = (Vec<float>)normal_cdf((__m512)value);
              // exp(-h^2 / 2) / sqrt(2 pi)
              const Vec<float> density =
                  exp2(value * value * -0.72134752f) * 0.39894228f;
              y[k] = value * cdf;
              g[r][k] = vec(d + cell) * (cdf + value * density);
              sum[r] += g[r][k];
            }
            const int64_t at = p * n + (j + r) * kTileDepth;
            store_pairs(gelu_h + at, y[0], y[1]);
            store_pairs(grad_h + at, g[r][0], g[r][1]);
          }
          for (int k = 0; k < 2; ++k)
            _mm512_store_si512(
                grad_h_pairs + j / 2 * kRows + p + k * kTileRows,
                _mm512_permutexvar_epi16(interleave, to_pairs(g[0][k], g[1][k])));
        }
        for (int r = 0; r < 2; ++r)
          grad_b1[c + j + r] += _mm512_reduce_add_ps((__m512)sum[r]);
      }
      for (int64_t j = 0; j < n; j += kTileDepth)
        avx512::transpose<float>(kTileRows, all, grad_h_pairs + j / 2 * kRows, kRows,
                                 reinterpret_cast<float*>(grad_h_t + j * all),
                                 kTileRows);
      multiply_packed(n, width, all, grad_h, n, x_pairs, grad_w1 + c * width, width,
                      i > 0);
      transpose_tiles(n * all, gelu_h, gelu_h_columns);
      multiply_packed(width, n, all, g_transposed, width, gelu_h_columns, grad_w2 + c,
                      hidden, i > 0);
      multiply_packed(all, width, n, grad_h_t, all, weights.w1_pairs + c * width, sums,
                      width, c > first);
    }
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < width; c += kTileDepth)
        _mm512_storeu_si512(
            grad_x + (i + r) * width + c,
            to_pairs(vec(sums + r * width + c), vec(sums + r * width + c + kTileRows)));
  }
}

}  // namespace amx
}  // namespace dsnet
