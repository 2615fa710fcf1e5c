// Operands of amx::multiply_2x2, for kernels that include each_isa.h.

namespace dsnet {
namespace amx {

using avx512::Vec;
using avx512::vec;

// Transposes tiles of 16 by 16 words, pairs of numbers. A tile of A becomes one of B,
// and one of B one of A.
inline void transpose_tiles(int64_t size, const BFloat16* src, BFloat16* dst) {
  for (int64_t i = 0; i < size; i += kTileSize)
    avx512::transpose<float>(kTileRows, kTileRows,
                             reinterpret_cast<const float*>(src + i), kTileRows,
                             reinterpret_cast<float*>(dst + i), kTileRows);
}

// Packs the transpose of ``count`` rows of ``width`` channels as tiles of B, 32
// channels by 16 rows: dst[block of 32 channels][block of 16 rows][16 pairs of
// channels] [16 rows][2]. A pair of channels is a word of 32 bits, and words are
// transposed. ``rows`` is a buffer of the size of dst.
inline void pack_columns(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                         int64_t src_stride, BFloat16* dst, BFloat16* rows) {
  pack_rows(count, all, width, src, src_stride, rows);
  transpose_tiles(round_up(width, kTileDepth) * all, rows, dst);
}

// Packs rows as tiles of B, 32 rows by 16 channels: dst[block of 32 rows]
// [block of 16 channels][16 pairs of rows][16 channels][2]. Two rows are interleaved.
inline void pack_pairs(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                       int64_t src_stride, BFloat16* dst) {
  alignas(64) int16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = i / 2 + (i % 2 ? 32 : 0);
    order[1][i] = order[0][i] + 16;
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const int64_t tiles = round_up(width, kTileDepth) / kTileRows;
  for (int64_t j = 0; j < all; j += 2) {
    BFloat16* row =
        dst + j / kTileDepth * tiles * kTileSize + j % kTileDepth / 2 * kTileDepth;
    for (int64_t c = 0; c < width; c += kTileDepth, row += 2 * kTileSize) {
      const int64_t left = width - c;
      const __mmask32 mask = left >= kTileDepth ? ~0u : (1u << left) - 1;
      const auto key = [&](int64_t i) {
        return i < count ? _mm512_maskz_loadu_epi16(mask, src + i * src_stride + c)
                         : _mm512_setzero_si512();
      };
      const __m512i a = key(j), b = key(j + 1);
      _mm512_store_si512(row, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(row + kTileSize, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Packs the transpose of rows as tiles of A, as pack_rows would: dst[block of 32 rows]
// [channel][32 rows]. ``pairs`` is a buffer of the size of dst.
inline void pack_transposed(int64_t count, int64_t all, int64_t width,
                            const BFloat16* src, int64_t src_stride, BFloat16* dst,
                            BFloat16* pairs) {
  pack_pairs(count, all, width, src, src_stride, pairs);
  transpose_tiles(round_up(width, kTileDepth) * all, pairs, dst);
}

// 2^x for x <= 0 to 13 bits. That is enough for weights, which are rounded to 8.
inline Vec<float> exp2(Vec<float> x) {
  x = avx512::maximum<float>(Vec<float>{} - 125.f, x);
  const __m512 f = _mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  Vec<float> y = (Vec<float>)f * 7.8024521e-2f + 2.2606716e-1f;
  y = y * (Vec<float>)f + 6.9583354e-1f;
  y = y * (Vec<float>)f + 9.9992520e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
}

// 32 numbers, of two vectors.
inline __m512i to_pairs(Vec<float> low, Vec<float> high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

inline void store_pairs(BFloat16* to, Vec<float> low, Vec<float> high) {
  _mm512_store_si512(to, to_pairs(low, high));
}

// The order in which the halves of 32 numbers are interleaved.
inline __m512i interleaving() {
  alignas(64) int16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = i / 2 + (i % 2 ? 16 : 0);
  return _mm512_load_si512(order);
}

// C[m][n] = A B, added to C if ``add``, with A as pack_rows packs it, of ``a_rows``
// rows, and B as pack_columns or pack_pairs. m, n and depth are multiples of 32.
inline void multiply_packed(int64_t m, int64_t n, int64_t depth, const BFloat16* a,
                            int64_t a_rows, const BFloat16* b, float* c,
                            int64_t c_stride, bool add) {
  for (int64_t i = 0; i < m; i += kTwoTiles)
    for (int64_t j = 0; j < n; j += kTwoTiles)
      multiply_2x2(depth / kTileDepth, a + i * kTileDepth, kTileDepth, kTileSize,
                   a_rows * kTileDepth, b + j * kTileDepth, n * kTileDepth, kTileSize,
                   c + i * c_stride + j, c_stride, add);
}

}  // namespace amx
}  // namespace dsnet
