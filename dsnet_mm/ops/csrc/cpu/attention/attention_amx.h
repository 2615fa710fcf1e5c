// Attention of one head in bfloat16, with the matrix products of AMX: both products of
// the forward, without dropout, and the first two of the backward's five. The equations
// are those of attention_kernel.h.
//
// Products have float sums, and the softmax is in float. Weights are rounded to
// bfloat16 for their product with the values, as in PyTorch's kernel. Loop order and
// memory are described at attend_forward and PackedBlock.

namespace dsnet {
namespace amx {

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
    pack_columns(n, cols, width, head.k + begin * head.kv_stride, head.kv_stride, k,
                 key_rows);
    pack_pairs(n, cols, width, head.v + begin * head.kv_stride, head.kv_stride, v);
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

// As avx512::attend_backward. Gradients have room for multiples of kBackwardBlock rows
// and of 32 channels.
//
// Weights and their gradients are [key][query]. So they are left factors, as they are,
// of the gradients of values and keys. For those of queries, ds is transposed. It is
// interleaved by pairs of keys first, since a pair is a word.
inline void attend_backward(const Head<BFloat16>& head, const BFloat16* out,
                            int64_t out_stride, const BFloat16* grad_out,
                            int64_t grad_out_stride, const float* lse, int64_t q_begin,
                            int64_t q_end, int64_t k_begin, int64_t k_end,
                            float* grad_q, float* grad_k, float* grad_v,
                            int64_t grad_stride, Arena& arena) {
  constexpr int64_t kBlock = kBackwardBlock, kSquare = kBlock * kBlock;
  const int64_t width = head.width, padded = round_up(width, kTileDepth);
  const int64_t queries = q_end - q_begin, all_queries = round_up(queries, kBlock);
  const auto operand = [&] { return arena.allocate<BFloat16>(kBlock * padded); };
  BFloat16 *k_rows = operand(), *v_rows = operand(), *k_pairs = operand();
  BFloat16 *q_columns = operand(), *g_columns = operand(), *rows = operand();
  BFloat16 *q_pairs = operand(), *g_pairs = operand();
  float* p = arena.allocate<float>(kSquare);
  float* ds = arena.allocate<float>(kSquare);
  BFloat16* w_packed = arena.allocate<BFloat16>(kSquare);
  BFloat16* ds_packed = arena.allocate<BFloat16>(kSquare);
  BFloat16* ds_transposed = arena.allocate<BFloat16>(kSquare);
  float* ds_pairs = arena.allocate<float>(kSquare / 2);  // [pair of keys][query]
  float* row_lse = arena.allocate<float>(all_queries);
  float* delta = arena.allocate<float>(all_queries);  // over sqrt(d)
  if (arena.counts()) return;

  const __m512i interleave = interleaving();
  const float scale = 1 / std::sqrt(float(width));
  const float log2_scale = scale * 1.44269504088896340736f;
  std::fill(row_lse + queries, row_lse + all_queries, 0.f);
  std::fill(delta + queries, delta + all_queries, 0.f);
  std::copy(lse + q_begin, lse + q_end, row_lse);
  for (int64_t i = 0; i < queries; ++i) {
    const BFloat16* g = grad_out + (q_begin + i) * grad_out_stride;
    const BFloat16* o = out + (q_begin + i) * out_stride;
    float dot = 0;
    for (int64_t c = 0; c < width; ++c) dot += float(g[c]) * float(o[c]);
    delta[i] = dot * scale;
  }
  const TileConfig config;
  for (int64_t begin = k_begin; begin < k_end; begin += kBlock) {
    const int64_t n = std::min(kBlock, k_end - begin), all_n = round_up(n, kTwoTiles);
    const BFloat16 *k = head.k + begin * head.kv_stride,
                   *v = head.v + begin * head.kv_stride;
    pack_rows(n, all_n, width, k, head.kv_stride, k_rows);
    pack_rows(n, all_n, width, v, head.kv_stride, v_rows);
    pack_pairs(n, all_n, width, k, head.kv_stride, k_pairs);
    for (int64_t first = 0; first < queries; first += kBlock) {
      const int64_t m = std::min(kBlock, queries - first);
      const int64_t all_m = round_up(m, kTwoTiles);
      const BFloat16* q = head.q + (q_begin + first) * head.q_stride;
      const BFloat16* g = grad_out + (q_begin + first) * grad_out_stride;
      pack_columns(m, all_m, width, q, head.q_stride, q_columns, rows);
      pack_columns(m, all_m, width, g, grad_out_stride, g_columns, rows);
      pack_pairs(m, all_m, width, q, head.q_stride, q_pairs);
      pack_pairs(m, all_m, width, g, grad_out_stride, g_pairs);
      multiply_packed(all_n, all_m, padded, k_rows, all_n, q_columns, p, kBlock, false);
      multiply_packed(all_n, all_m, padded, v_rows, all_n, g_columns, ds, kBlock,
                      false);
      for (int64_t i = 0; i < all_m; i += kTileDepth) {
        avx512::RandomWords<float> words[2];
        for (int h = 0; head.dropout && h < 2; ++h)
          words[h] = avx512::random_words<float>(
              *head.dropout, head.first_query + q_begin + first + i + h * kTileRows);
        for (int64_t j = 0; j < all_n; j += 2) {
          Vec<float> d[2][2];  // of two keys and 2 x 16 queries
          for (int r = 0; r < 2; ++r) {
            Vec<float> w[2];
            for (int h = 0; h < 2; ++h) {
              const int64_t at = i + h * kTileRows, cell = (j + r) * kBlock + at;
              w[h] = exp2(vec(p + cell) * log2_scale - vec(row_lse + first + at));
              d[r][h] = vec(ds + cell) * scale;
              Vec<float> factor = Vec<float>{} + 1.f;
              if (head.dropout)
                factor = avx512::dropout_factor<float>(
                    *head.dropout, words[h],
                    avx512::Vector<float>::words{} + uint32_t(begin + j + r));
              if (j + r >= n) w[h] = Vec<float>{};  // beyond the last key
              d[r][h] = w[h] * (d[r][h] * factor - vec(delta + first + at));
              w[h] *= factor;
            }
            const int64_t at = i * all_n + (j + r) * kTileDepth;
            store_pairs(w_packed + at, w[0], w[1]);
            store_pairs(ds_packed + at, d[r][0], d[r][1]);
          }
          for (int h = 0; h < 2; ++h)
            _mm512_store_si512(
                ds_pairs + j / 2 * kBlock + i + h * kTileRows,
                _mm512_permutexvar_epi16(interleave, to_pairs(d[0][h], d[1][h])));
        }
      }
      for (int64_t j = 0; j < all_n; j += kTileDepth)
        avx512::transpose<float>(kTileRows, all_m, ds_pairs + j / 2 * kBlock, kBlock,
                                 reinterpret_cast<float*>(ds_transposed + j * all_m),
                                 kTileRows);
      const int64_t at_key = (begin - k_begin) * grad_stride;
      multiply_packed(all_n, padded, all_m, w_packed, all_n, g_pairs, grad_v + at_key,
                      grad_stride, first > 0);
      multiply_packed(all_n, padded, all_m, ds_packed, all_n, q_pairs, grad_k + at_key,
                      grad_stride, first > 0);
      multiply_packed(all_m, padded, all_n, ds_transposed, all_m, k_pairs,
                      grad_q + first * grad_stride, grad_stride, begin > k_begin);
    }
  }
}

}  // namespace amx
}  // namespace dsnet
