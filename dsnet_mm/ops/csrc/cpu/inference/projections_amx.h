// Projections of pixels in bfloat16, with the matrix products of AMX.
//
//   linear:  y = W x + b
//   ffn:     y = W2 GELU(W1 x + b1) + b2
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

// x times the cumulative distribution function of the normal distribution, which is the
// minimax polynomial 0.5 + u * (c0 + c1 u^2 + ...). The error is below 1.5e-4 for
// |x| < 6.
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

}  // namespace amx
}  // namespace dsnet
