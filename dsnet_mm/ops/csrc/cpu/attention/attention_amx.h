// Attention of one head in bfloat16 with AMX's products: all of the forward's, without
// dropout, and the first two of the backward's.
//
// Softmax and sums are those of attention_kernel.h, in float; the weights are
// rounded to bfloat16 for their product with the values, as in PyTorch's kernel.

namespace dsnet {
namespace amx {

using avx512::Vec;
using avx512::vec;

// Keys as tiles B of 32 channels by 16 keys: a pair of channels is a word, and words
// are transposed. dst[block of channels][block of keys][16][16 words].
inline void pack_keys(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                      int64_t src_row, BFloat16* dst, BFloat16* rows) {
  pack_rows(count, all, width, src, src_row, rows);
  for (int64_t i = 0; i < round_up(width, kDepth) * all; i += kTile)
    avx512::transpose<float>(kSide, kSide, reinterpret_cast<const float*>(rows + i),
                             kSide, reinterpret_cast<float*>(dst + i), kSide);
}

// Values as tiles B of 32 keys by 16 channels: two keys are interleaved.
// dst[block of 32 keys][block of 16 channels][16][16 pairs].
inline void pack_values(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                        int64_t src_row, BFloat16* dst) {
  alignas(64) int16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = i / 2 + (i % 2 ? 32 : 0);
    order[1][i] = order[0][i] + 16;
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const int64_t tiles = round_up(width, kDepth) / kSide;
  for (int64_t j = 0; j < all; j += 2) {
    BFloat16* row = dst + j / kDepth * tiles * kTile + j % kDepth / 2 * kDepth;
    for (int64_t c = 0; c < width; c += kDepth, row += 2 * kTile) {
      const int64_t left = width - c;
      const __mmask32 mask = left >= kDepth ? ~0u : (1u << left) - 1;
      const auto key = [&](int64_t i) {
        return i < count ? _mm512_maskz_loadu_epi16(mask, src + i * src_row + c)
                         : _mm512_setzero_si512();
      };
      const __m512i a = key(j), b = key(j + 1);
      _mm512_store_si512(row, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(row + kTile, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// 2^x for x <= 0 to 13 bits, for weights that are rounded to 8.
inline Vec<float> exp2(Vec<float> x) {
  x = avx512::larger<float>(Vec<float>{} - 125.f, x);
  const __m512 f = _mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  Vec<float> y = (Vec<float>)f * 7.8024521e-2f + 2.2606716e-1f;
  y = y * (Vec<float>)f + 6.9583354e-1f;
  y = y * (Vec<float>)f + 9.9992520e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
}

// Turns scores of keys from ``begin`` on, not scaled yet, into weights of four rows of
// queries, which go to ``w``, and shrinks what these have summed to a new top.
inline void read_rows(int64_t begin, int64_t cols, float scale, int64_t padded,
                      const float* p, BFloat16* w, float* top, float* total,
                      float* sum) {
  constexpr int R = 4;
  Vec<float> largest[R], mass[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    largest[r] = vec(p + r * kColumns);
    mass[r] = Vec<float>{};
  }
  for (int64_t j = kSide; j < cols; j += kSide)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      largest[r] = avx512::larger<float>(vec(p + r * kColumns + j), largest[r]);
  float peak[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    peak[r] = std::max(top[r], _mm512_reduce_max_ps((__m512)largest[r]) * scale);
  for (int64_t j = 0; j < cols; j += kDepth)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* s = p + r * kColumns + j;
      const Vec<float> a = exp2(vec(s) * scale - peak[r]);
      const Vec<float> b = exp2(vec(s + kSide) * scale - peak[r]);
      mass[r] += a + b;
      _mm512_store_si512(w + r * kColumns + j,
                         (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
  for (int r = 0; r < R; ++r) {
    if (begin && peak[r] > top[r]) {
      const float shrink = avx512::exp2(Vec<float>{} + (top[r] - peak[r]))[0];
      total[r] *= shrink;
      for (int64_t c = 0; c < padded; c += kSide) vec(sum + r * padded + c) *= shrink;
    }
    total[r] += _mm512_reduce_add_ps((__m512)mass[r]);
    top[r] = peak[r];
  }
}

// As avx512::attend, without dropout.
inline void attend(const Head<BFloat16>& head, int64_t first, int64_t count,
                   BFloat16* out, int64_t out_row, float* lse, char* memory) {
  const int64_t width = head.width, padded = round_up(width, kDepth);
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  BFloat16* q = arena.take<BFloat16>(rows * padded);
  BFloat16* k = arena.take<BFloat16>(kColumns * padded);
  BFloat16* v = arena.take<BFloat16>(kColumns * padded);
  BFloat16* key_rows = arena.take<BFloat16>(kColumns * padded);
  float* p = arena.take<float>(kGroup * kColumns);  // [query][key]
  BFloat16* weights[2] = {arena.take<BFloat16>(kGroup * kColumns),
                          arena.take<BFloat16>(kGroup * kColumns)};
  float* sum = arena.take<float>(rows * padded);  // [query][channel]
  float* top = arena.take<float>(rows);
  float* total = arena.take<float>(rows);
  const float scale = 1.44269504088896340736 / std::sqrt(double(width));
  std::fill(top, top + rows, -std::numeric_limits<float>::infinity());
  std::fill(total, total + rows, 0.f);
  pack_rows(count, rows, width, head.q + first * head.q_row, head.q_row, q);

  const Configuration configuration;
  for (int64_t begin = 0; begin < head.keys; begin += kColumns) {
    const int64_t n = std::min<int64_t>(kColumns, head.keys - begin);
    const int64_t cols = round_up(n, kDepth);
    pack_keys(n, cols, width, head.k + begin * head.kv_row, head.kv_row, k, key_rows);
    pack_values(n, cols, width, head.v + begin * head.kv_row, head.kv_row, v);
    // A step later than their weights: what these have stored can be loaded by then,
    // and likewise the scores.
    const auto read_values = [&](int64_t i) {
      for (int64_t c = 0; c < padded; c += kDepth)
        product(cols / kDepth, weights[i / kGroup % 2], kColumns, kSide * kColumns,
                kDepth, v + c * kDepth, padded * kDepth, kTile, sum + i * padded + c,
                padded, begin > 0);
    };
    for (int64_t i = 0; i < rows; i += kGroup) {
      for (int64_t j = 0; j < cols; j += kDepth)
        product(padded / kDepth, q + i * kDepth, kDepth, kTile, rows * kDepth,
                k + j * kDepth, cols * kDepth, kTile, p + j, kColumns, false);
      for (int64_t r = 0; n < cols && r < kGroup; ++r)  // no keys, so no weights
        std::fill(p + r * kColumns + n, p + r * kColumns + cols,
                  -std::numeric_limits<float>::infinity());
      if (i > 0) read_values(i - kGroup);
      for (int64_t r = 0; r < kGroup; r += 4)
        read_rows(begin, cols, scale, padded, p + r * kColumns,
                  weights[i / kGroup % 2] + r * kColumns, top + i + r, total + i + r,
                  sum + (i + r) * padded);
    }
    read_values(rows - kGroup);
  }

  for (int64_t i = 0; i < count; ++i)
    avx512::store(1, width, sum + i * padded, padded, out + i * out_row, out_row,
                  1 / total[i]);
  for (int64_t i = 0; i < count; i += kSide)
    vec(total + i) = avx512::log2(vec(total + i));
  for (int64_t i = 0; i < count; ++i) lse[i] = top[i] + total[i];
}

// As avx512::Block.
class Block {
 public:
  Block(int64_t width, Arena& arena)
      : width_(width),
        padded_(round_up(width, kDepth)),
        k_(arena.take<BFloat16>(kBlock * padded_)),
        v_(arena.take<BFloat16>(kBlock * padded_)),
        rows_(arena.take<BFloat16>(kBlock * padded_)) {}
  ~Block() {}  // with the instructions of this file

  void read(int64_t n, const BFloat16* keys, const BFloat16* values, int64_t row) {
    const int64_t all = round_up(n, kGroup);
    pack_keys(n, all, width_, keys, row, k_, rows_);
    pack_keys(n, all, width_, values, row, v_, rows_);
  }

  void multiply(int64_t m, int64_t n, const avx512::Rows<BFloat16, float>& q,
                const avx512::Rows<BFloat16, float>& g, float* qk, float* gv) {
    multiply(m, n, q.source, q.source_row, k_, qk);
    multiply(m, n, g.source, g.source_row, v_, gv);
  }

 private:
  void multiply(int64_t m, int64_t n, const BFloat16* a, int64_t a_row,
                const BFloat16* b, float* c) {
    const int64_t rows = round_up(m, kGroup), cols = round_up(n, kGroup);
    pack_rows(m, rows, width_, a, a_row, rows_);
    for (int64_t i = 0; i < rows; i += kGroup)
      for (int64_t j = 0; j < cols; j += kGroup)
        product(padded_ / kDepth, rows_ + i * kDepth, kDepth, kTile, rows * kDepth,
                b + j * kDepth, cols * kDepth, kTile, c + i * kBlock + j, kBlock,
                false);
  }

  Configuration configuration_;
  int64_t width_, padded_;
  BFloat16 *k_, *v_, *rows_;
};

}  // namespace amx
}  // namespace dsnet
