// Attention of one head in bfloat16, with the matrix products of AMX: both products of
// the forward, without dropout, and the first two of the backward's five. The equations
// are those of attention_kernel.h.
//
// Products have float sums, and the softmax is in float. Weights are rounded to
// bfloat16 for their product with the values, as in PyTorch's kernel. Loop order and
// memory are described at attend_forward and PackedBlock.

namespace dsnet {
namespace amx {

using avx512::Vec;
using avx512::vec;

// Packs keys as tiles of B, 32 channels by 16 keys: dst[block of 32 channels]
// [block of 16 keys][16 pairs of channels][16 keys][2]. A pair of channels is a word of
// 32 bits, and words are transposed. ``rows`` is a buffer of the size of dst.
inline void pack_keys(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                      int64_t src_stride, BFloat16* dst, BFloat16* rows) {
  pack_rows(count, all, width, src, src_stride, rows);
  for (int64_t i = 0; i < round_up(width, kTileDepth) * all; i += kTileSize)
    avx512::transpose<float>(kTileRows, kTileRows,
                             reinterpret_cast<const float*>(rows + i), kTileRows,
                             reinterpret_cast<float*>(dst + i), kTileRows);
}

// Packs values as tiles of B, 32 keys by 16 channels: dst[block of 32 keys]
// [block of 16 channels][16 pairs of keys][16 channels][2]. Two keys are interleaved.
inline void pack_values(int64_t count, int64_t all, int64_t width, const BFloat16* src,
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

// 2^x for x <= 0 to 13 bits. That is enough for weights, which are rounded to 8.
inline Vec<float> exp2(Vec<float> x) {
  x = avx512::maximum<float>(Vec<float>{} - 125.f, x);
  const __m512 f = _mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  Vec<float> y = (Vec<float>)f * 7.8024521e-2f + 2.2606716e-1f;
  y = y * (Vec<float>)f + 6.9583354e-1f;
  y = y * (Vec<float>)f + 9.9992520e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
}

// Turns unscaled scores p of four queries, for a block of keys, into weights w. Updates
// the running maxima and denominators, and rescales the accumulators where a maximum
// has changed. ``begin`` is the number of the block's first key.
inline void softmax_rows(int64_t begin, int64_t cols, float scale, int64_t padded,
                         const float* p, BFloat16* w, float* running_max,
                         float* denominator, float* accumulator) {
  constexpr int R = 4;
  Vec<float> maxima[R], sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    maxima[r] = vec(p + r * kKeyBlock);
    sums[r] = Vec<float>{};
  }
  for (int64_t j = kTileRows; j < cols; j += kTileRows)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      maxima[r] = avx512::maximum<float>(vec(p + r * kKeyBlock + j), maxima[r]);
  float new_max[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    new_max[r] =
        std::max(running_max[r], _mm512_reduce_max_ps((__m512)maxima[r]) * scale);
  for (int64_t j = 0; j < cols; j += kTileDepth)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* s = p + r * kKeyBlock + j;
      const Vec<float> a = exp2(vec(s) * scale - new_max[r]);
      const Vec<float> b = exp2(vec(s + kTileRows) * scale - new_max[r]);
      sums[r] += a + b;
      _mm512_store_si512(w + r * kKeyBlock + j,
                         (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
  for (int r = 0; r < R; ++r) {
    if (begin && new_max[r] > running_max[r]) {
      const float rescale =
          avx512::exp2(Vec<float>{} + (running_max[r] - new_max[r]))[0];
      denominator[r] *= rescale;
      for (int64_t c = 0; c < padded; c += kTileRows)
        vec(accumulator + r * padded + c) *= rescale;
    }
    denominator[r] += _mm512_reduce_add_ps((__m512)sums[r]);
    running_max[r] = new_max[r];
  }
}

// As avx512::attend_forward, without dropout.
//
// Loop order: blocks of kKeyBlock keys, then 32 queries at a time: scores, softmax, and
// the product of weights and values. The packed keys and values of a block, the packed
// queries and the accumulators lie in L2, the scores and weights of 32 queries in L1.
inline void attend_forward(const Head<BFloat16>& head, int64_t first, int64_t count,
                           BFloat16* out, int64_t out_stride, float* lse,
                           Arena& arena) {
  const int64_t width = head.width, padded = round_up(width, kTileDepth);
  const int64_t rows = round_up(count, kTwoTiles);
  BFloat16* q = arena.allocate<BFloat16>(rows * padded);
  BFloat16* k = arena.allocate<BFloat16>(kKeyBlock * padded);
  BFloat16* v = arena.allocate<BFloat16>(kKeyBlock * padded);
  BFloat16* key_rows = arena.allocate<BFloat16>(kKeyBlock * padded);
  float* p = arena.allocate<float>(kTwoTiles * kKeyBlock);  // [query][key]
  BFloat16* weights[2] = {arena.allocate<BFloat16>(kTwoTiles * kKeyBlock),
                          arena.allocate<BFloat16>(kTwoTiles * kKeyBlock)};
  float* accumulator = arena.allocate<float>(rows * padded);  // [query][channel]
  float* running_max = arena.allocate<float>(rows);
  float* denominator = arena.allocate<float>(rows);
  if (arena.counts()) return;

  const float scale = 1.44269504088896340736 / std::sqrt(double(width));
  std::fill(running_max, running_max + rows, -std::numeric_limits<float>::infinity());
  std::fill(denominator, denominator + rows, 0.f);
  pack_rows(count, rows, width, head.q + first * head.q_stride, head.q_stride, q);

  const TileConfig config;
  for (int64_t begin = 0; begin < head.keys; begin += kKeyBlock) {
    const int64_t n = std::min<int64_t>(kKeyBlock, head.keys - begin);
    const int64_t cols = round_up(n, kTileDepth);
    pack_keys(n, cols, width, head.k + begin * head.kv_stride, head.kv_stride, k,
              key_rows);
    pack_values(n, cols, width, head.v + begin * head.kv_stride, head.kv_stride, v);
    // Values are multiplied one step after their weights: what a tile or a vector has
    // stored is then ready to be loaded. There are two buffers of weights for this.
    const auto multiply_values = [&](int64_t i) {
      for (int64_t c = 0; c < padded; c += kTileDepth)
        multiply_2x2(cols / kTileDepth, weights[i / kTwoTiles % 2], kKeyBlock,
                     kTileRows * kKeyBlock, kTileDepth, v + c * kTileDepth,
                     padded * kTileDepth, kTileSize, accumulator + i * padded + c,
                     padded, begin > 0);
    };
    for (int64_t i = 0; i < rows; i += kTwoTiles) {
      for (int64_t j = 0; j < cols; j += kTileDepth)
        multiply_2x2(padded / kTileDepth, q + i * kTileDepth, kTileDepth, kTileSize,
                     rows * kTileDepth, k + j * kTileDepth, cols * kTileDepth,
                     kTileSize, p + j, kKeyBlock, false);
      for (int64_t r = 0; n < cols && r < kTwoTiles; ++r)  // Beyond the last key.
        std::fill(p + r * kKeyBlock + n, p + r * kKeyBlock + cols,
                  -std::numeric_limits<float>::infinity());
      if (i > 0) multiply_values(i - kTwoTiles);
      for (int64_t r = 0; r < kTwoTiles; r += 4)
        softmax_rows(begin, cols, scale, padded, p + r * kKeyBlock,
                     weights[i / kTwoTiles % 2] + r * kKeyBlock, running_max + i + r,
                     denominator + i + r, accumulator + (i + r) * padded);
    }
    multiply_values(rows - kTwoTiles);
  }

  for (int64_t i = 0; i < count; ++i)
    avx512::store(1, width, accumulator + i * padded, padded, out + i * out_stride,
                  out_stride, 1 / denominator[i]);
  for (int64_t i = 0; i < count; i += kTileRows)
    vec(denominator + i) = avx512::log2(vec(denominator + i));
  for (int64_t i = 0; i < count; ++i) lse[i] = running_max[i] + denominator[i];
}

// As avx512::TransposedBlock. Keys and values are packed once for all queries; rows of
// queries and gradients are packed for each product. All of it lies in L2.
class PackedBlock {
 public:
  PackedBlock(int64_t width, Arena& arena)
      : width_(width),
        padded_(round_up(width, kTileDepth)),
        k_(arena.allocate<BFloat16>(kBackwardBlock * padded_)),
        v_(arena.allocate<BFloat16>(kBackwardBlock * padded_)),
        rows_(arena.allocate<BFloat16>(kBackwardBlock * padded_)) {}
  ~PackedBlock() {}  // Here it is compiled with the instructions of AMX.

  void load(int64_t n, const BFloat16* keys, const BFloat16* values, int64_t stride) {
    const int64_t all = round_up(n, kTwoTiles);
    pack_keys(n, all, width_, keys, stride, k_, rows_);
    pack_keys(n, all, width_, values, stride, v_, rows_);
  }

  void multiply(int64_t m, int64_t n, const avx512::Rows<BFloat16, float>& q,
                const avx512::Rows<BFloat16, float>& g, float* qk, float* gv) {
    multiply(m, n, q.source, q.source_stride, k_, qk);
    multiply(m, n, g.source, g.source_stride, v_, gv);
  }

 private:
  void multiply(int64_t m, int64_t n, const BFloat16* a, int64_t a_stride,
                const BFloat16* b, float* c) {
    const int64_t rows = round_up(m, kTwoTiles), cols = round_up(n, kTwoTiles);
    pack_rows(m, rows, width_, a, a_stride, rows_);
    for (int64_t i = 0; i < rows; i += kTwoTiles)
      for (int64_t j = 0; j < cols; j += kTwoTiles)
        multiply_2x2(padded_ / kTileDepth, rows_ + i * kTileDepth, kTileDepth,
                     kTileSize, rows * kTileDepth, b + j * kTileDepth,
                     cols * kTileDepth, kTileSize, c + i * kBackwardBlock + j,
                     kBackwardBlock, false);
  }

  TileConfig config_;
  int64_t width_, padded_;
  BFloat16 *k_, *v_, *rows_;
};

}  // namespace amx
}  // namespace dsnet
