// Attention of one head on the CPU, forward and backward, for one instruction set.
// Included by each_isa.h. For queries i, keys j and channels c:
//
// Forward:   s_ij = q_i k_j / sqrt(d) * log2(e)       scores
//            lse_i = log2 sum_j 2^s_ij                log-sum-exp
//            w_ij = 2^(s_ij - lse_i)                  weights
//            out_i = sum_j w_ij f_ij v_j              f is the dropout factor, or 1
//
// Backward:  delta_i = out_i grad_out_i
//            grad_v_j = sum_i w_ij f_ij grad_out_i
//            ds_ij = w_ij (f_ij grad_out_i v_j - delta_i) / sqrt(d)
//            grad_q_i = sum_j ds_ij k_j
//            grad_k_j = sum_i ds_ij q_i
//
// The forward goes over the keys once, block by block. For each query it holds the
// running maximum of its scores, the denominator and an accumulator of the values; a
// new maximum rescales the last two. No matrix of all weights is ever in memory.
//
// Loop order and memory are described at attend_forward and attend_backward.

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// ------------------------------------------------------------ log2 for x >= 1

inline Vec<float> log2(Vec<float> x) {
  using bits = Vector<float>::bits;
  const bits exponent = ((bits)x - 0x3F3504F3) >> 23;  // Leaves a mantissa near 1.
  const Vec<float> m = (Vec<float>)((bits)x - (exponent << 23));
  const Vec<float> t = (m - 1.f) / (m + 1.f), t2 = t * t;
  Vec<float> y = t2 * (2.8853900818f / 9) + 2.8853900818f / 7;
  y = y * t2 + 2.8853900818f / 5;
  y = y * t2 + 2.8853900818f / 3;
  y = y * t2 + 2.8853900818f;
  return y * t + __builtin_convertvector(exponent, Vec<float>);
}

inline Vec<double> log2(Vec<double> x) {
  for (int i = 0; i < Vector<double>::lanes; ++i) x[i] = std::log2(x[i]);
  return x;
}

// C[m][n] = sum_k A[m][k] B[k][n], added to C if ``add``. ``cols`` is a multiple of the
// lanes; a_m and a_k are the strides of A, b_k and c_m those of the rows of B and C.
template <typename T>
void matmul(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_m,
            int64_t a_k, const T* b, int64_t b_k, T* c, int64_t c_m, bool add) {
  constexpr int lanes = Vector<T>::lanes;
  // The columns of a tile: four vectors where there are 32 registers, otherwise two.
  constexpr int max_vectors = DSNET_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t n = 0; n < cols;) {
    const int64_t left = (cols - n) / lanes;
    const auto at = [=](int64_t m, int v) -> Vec<T>& {
      return vec(c + m * c_m + n + v * lanes);
    };
    const auto init = [=](int64_t m, int v) { return add ? at(m, v) : Vec<T>{}; };
    const auto epilogue = [=](int64_t m, int v, Vec<T> sum) { at(m, v) = sum; };
    if (left >= max_vectors) {
      multiply_tiles<T, max_vectors>(rows, depth, a, a_m, a_k, b + n, b_k, init,
                                     epilogue);
      n += max_vectors * lanes;
    } else if (left >= 2) {
      multiply_tiles<T, 2>(rows, depth, a, a_m, a_k, b + n, b_k, init, epilogue);
      n += 2 * lanes;
    } else {
      multiply_tiles<T, 1>(rows, depth, a, a_m, a_k, b + n, b_k, init, epilogue);
      n += lanes;
    }
  }
}

// ----------------------------------------------------------- loads and stores

// dst[r][c] = factor * src[r][c], with zeros up to all_rows by all_cols.
template <typename S, typename T>
void load(int64_t rows, int64_t cols, const S* src, int64_t src_stride, T* dst,
          int64_t all_rows, int64_t all_cols, T factor) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dst + r * all_cols;
    int64_t c = 0;
    if constexpr (std::is_same_v<S, T>)
      for (; c + Vector<T>::lanes <= cols; c += Vector<T>::lanes)
        storeu<T>(row + c, loadu(src + r * src_stride + c) * factor);
    for (; c < cols; ++c) row[c] = static_cast<T>(src[r * src_stride + c]) * factor;
    for (; c < all_cols; ++c) row[c] = 0;
  }
  std::fill(dst + rows * all_cols, dst + all_rows * all_cols, T(0));
}

// dst[r][c] = factor * src[r][c]
template <typename S, typename T>
void store(int64_t rows, int64_t cols, const T* src, int64_t src_stride, S* dst,
           int64_t dst_stride, T factor) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    if constexpr (std::is_same_v<S, T>)
      for (; c + Vector<T>::lanes <= cols; c += Vector<T>::lanes)
        storeu<T>(dst + r * dst_stride + c, loadu(src + r * src_stride + c) * factor);
    for (; c < cols; ++c)
      dst[r * dst_stride + c] = static_cast<S>(src[r * src_stride + c] * factor);
  }
}

// Returns rows of ``all_cols`` elements in the type T, and sets their stride. They are
// the source itself if that has this type and length. Otherwise they are converted into
// ``buffer``, with zeros beyond ``cols``.
template <typename S, typename T>
inline const T* as_rows(int64_t rows, int64_t cols, int64_t all_cols, const S* src,
                        int64_t& stride, T* buffer) {
  if constexpr (std::is_same_v<S, T>)
    if (cols == all_cols) return src;
  load<S, T>(rows, cols, src, stride, buffer, rows, all_cols, T(1));
  stride = all_cols;
  return buffer;
}

// dst[channel][token] = factor * src[token][channel], with zeros up to whole vectors of
// both. ``rows`` is a buffer for the padded tokens.
template <typename S, typename T>
void load_transposed(int64_t tokens, int64_t width, const S* src, int64_t src_stride,
                     T* dst, int64_t dst_stride, T factor, T* rows) {
  const int64_t all = pad<T>(tokens), padded = pad<T>(width);
  load(tokens, width, src, src_stride, rows, all, padded, factor);
  transpose(all, padded, rows, padded, dst, dst_stride);
}

template <typename S>
inline void prefetch(int64_t rows, int64_t cols, const S* src, int64_t src_stride) {
  constexpr int64_t line = 64 / sizeof(S);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += line)
      __builtin_prefetch(src + r * src_stride + c);
}

// -------------------------------------------------------------------- dropout

template <typename T>
struct RandomWords {
  typename Vector<T>::words low, high;
};

// The random words of as many queries as there are lanes, from number ``first`` on.
template <typename T>
inline RandomWords<T> random_words(const Dropout& dropout, uint64_t first) {
  RandomWords<T> words;
  for (int i = 0; i < Vector<T>::lanes; ++i) {
    const uint64_t word = query_words(dropout.seed, first + i);
    words.low[i] = static_cast<uint32_t>(word);
    words.high[i] = static_cast<uint32_t>(word >> 32);
  }
  return words;
}

// 1 / (1 - p) for weights that are kept, 0 for weights that are dropped.
template <typename T>
inline Vec<T> dropout_factor(const Dropout& dropout, const RandomWords<T>& query,
                             typename Vector<T>::words key) {
  const auto x = random_word(query.low, query.high, key);
  const auto keep = x >= dropout.threshold;  // -1 or 0
  return __builtin_convertvector(keep, Vec<T>) * T(-dropout.scale);
}

// -------------------------------------------------------------------- forward

// A block of keys and values. ``begin`` is the number of the first key.
template <typename T>
struct KeyBlock {
  int64_t begin, count;
  const T *k, *v;
  int64_t k_stride, v_stride;
};

// A group of queries, as many as one or two vectors have lanes, and their state.
template <typename T>
struct QueryGroup {
  uint64_t first;  // number of the first query among all, for dropout
  int64_t count;
  const T* q;      // [channel][query], scaled
  T* running_max;  // of the scores
  T* denominator;  // sum of 2^(score - running_max), before dropout
  T* accumulator;  // [query][channel], sum of the values by their weights
};

// Updates the state of V vectors of queries by one block of keys. Loop order: scores of
// all keys, then weights of all keys, then the product with the values.
//
// ``p`` holds scores, later weights, as [key][query]: queries are the lanes, so that
// maxima and sums over the keys need no operation across lanes. p, the queries and
// their accumulators lie in L1, the block of keys and values in L2.
template <typename T, int V>
void attend_to_block(const QueryGroup<T>& queries, const KeyBlock<T>& keys,
                     int64_t width, const Dropout* dropout, T* p) {
  constexpr int lanes = Vector<T>::lanes, all = V * lanes;
  Vec<T> maxima[V];
  for (int v = 0; v < V; ++v) maxima[v] = vec(queries.running_max + v * lanes);
  multiply_tiles<T, V>(
      keys.count, width, keys.k, keys.k_stride, int64_t(1), queries.q, all,
      [](int64_t, int) { return Vec<T>{}; },
      [&](int64_t j, int v, Vec<T> score) {
        maxima[v] = maximum<T>(score, maxima[v]);
        vec(p + j * all + v * lanes) = score;
      });

  alignas(64) T rescale[all];  // 2^(old maximum - new maximum)
  for (int v = 0; v < V; ++v) {
    const Vec<T> new_max = maxima[v];
    Vec<T> sum{};
    T* weights = p + v * lanes;
    for (int64_t j = 0; j < keys.count; ++j) {
      const Vec<T> weight = exp2(vec(weights + j * all) - new_max);
      sum += weight;
      vec(weights + j * all) = weight;
    }
    if (dropout) {
      const RandomWords<T> words = random_words<T>(*dropout, queries.first + v * lanes);
      typename Vector<T>::words key{};
      key += static_cast<uint32_t>(keys.begin);
      for (int64_t j = 0; j < keys.count; ++j, key += 1)
        vec(weights + j * all) *= dropout_factor<T>(*dropout, words, key);
    }
    Vec<T>& running_max = vec(queries.running_max + v * lanes);
    Vec<T>& denominator = vec(queries.denominator + v * lanes);
    const Vec<T> factor = exp2(running_max - new_max);
    vec(rescale + v * lanes) = factor;
    denominator = denominator * factor + sum;
    running_max = new_max;
  }

  const int64_t padded = pad<T>(width);
  const auto multiply_values = [&](auto vectors, int64_t c) {
    const auto at = [&](int64_t r, int v) -> Vec<T>& {
      return vec(queries.accumulator + r * padded + c + v * lanes);
    };
    multiply_tiles<T, vectors>(
        queries.count, keys.count, p, int64_t(1), all, keys.v + c, keys.v_stride,
        [&](int64_t r, int v) { return keys.begin ? at(r, v) * rescale[r] : Vec<T>{}; },
        [&](int64_t r, int v, Vec<T> sum) { at(r, v) = sum; });
  };
  int64_t c = 0;
  for (; c + 2 * lanes <= padded; c += 2 * lanes)
    multiply_values(std::integral_constant<int, 2>(), c);
  if (c < padded) multiply_values(std::integral_constant<int, 1>(), c);
}

// Outputs and lse of queries [first, first + count) of a head.
//
// Loop order: blocks of keys, then groups of queries. All queries of the task read a
// block before the next one is loaded. Keys and values are read where they lie, unless
// they are converted or padded; queries are transposed once. The queries' state lies in
// L2, one block of keys and values as well.
template <typename S, typename T = at::opmath_type<S>>
void attend_forward(const Head<S>& head, int64_t first, int64_t count, S* out,
                    int64_t out_stride, T* lse, Arena& arena) {
  constexpr int lanes = Vector<T>::lanes, group = 2 * lanes;
  const int64_t width = head.width, padded = pad<T>(width);
  const int64_t all = round_up(count, group);
  T* q = arena.allocate<T>(all * padded);
  T* accumulator = arena.allocate<T>(all * padded);
  T* running_max = arena.allocate<T>(all);
  T* denominator = arena.allocate<T>(all);
  T* q_rows = arena.allocate<T>(group * padded);
  T* k_rows = arena.allocate<T>(kKeyBlock * padded);
  T* v_rows = arena.allocate<T>(kKeyBlock * padded);
  T* p = arena.allocate<T>(kKeyBlock * group);
  if (arena.counts()) return;

  const T scale = T(1.44269504088896340736 / std::sqrt(double(width)));
  std::fill(running_max, running_max + all, -std::numeric_limits<T>::infinity());
  std::fill(denominator, denominator + all, T(0));

  for (int64_t begin = 0; begin < head.keys; begin += kKeyBlock) {
    const int64_t n = std::min<int64_t>(kKeyBlock, head.keys - begin);
    int64_t k_stride = head.kv_stride, v_stride = head.kv_stride;
    const T* k = as_rows(n, width, width, head.k + begin * k_stride, k_stride, k_rows);
    const T* v = as_rows(n, width, padded, head.v + begin * v_stride, v_stride, v_rows);
    const KeyBlock<T> keys{begin, n, k, v, k_stride, v_stride};
    const int64_t next = begin + n, left = std::min(kKeyBlock, head.keys - next);
    prefetch(left, width, head.k + next * head.kv_stride, head.kv_stride);
    prefetch(left, width, head.v + next * head.kv_stride, head.kv_stride);
    for (int64_t i = 0; i < count; i += group) {
      const int64_t m = std::min<int64_t>(group, count - i);
      const S* src = head.q + (first + i) * head.q_stride;
      if (begin == 0) {
        prefetch(std::min<int64_t>(group, count - i - m), width,
                 src + m * head.q_stride, head.q_stride);
        load_transposed(m, width, src, head.q_stride, q + i * padded, pad<T>(m), scale,
                        q_rows);
      }
      const QueryGroup<T> queries{head.first_query + first + i,
                                  m,
                                  q + i * padded,
                                  running_max + i,
                                  denominator + i,
                                  accumulator + i * padded};
      (m > lanes ? attend_to_block<T, 2> : attend_to_block<T, 1>)(queries, keys, width,
                                                                  head.dropout, p);
      if (next < head.keys) continue;
      for (int64_t r = i; r < i + m; ++r)
        store(1, width, accumulator + r * padded, padded, out + r * out_stride,
              out_stride, T(1) / denominator[r]);
    }
  }
  for (int64_t i = 0; i < count; i += lanes)
    vec(running_max + i) += log2(vec(denominator + i));
  std::copy(running_max, running_max + count, lse);
}

// ------------------------------------------------------------------- backward

// Gradients of queries [q_begin, q_end) and keys [k_begin, k_end) of a head, as far as
// they come from each other. The rows of the gradients are ``grad_stride`` apart, which
// is at least pad<T>(width): whole vectors are written.
//
// Loop order: blocks of keys, then blocks of queries, both of kBackwardBlock. Weights
// and their gradients of a pair of blocks, p and ds, are computed again from lse; they
// and the two blocks lie in L2. Each of the five products streams through L1.
template <typename S, typename T = at::opmath_type<S>>
void attend_backward(const Head<S>& head, const S* out, int64_t out_stride,
                     const S* grad_out, int64_t grad_out_stride, const T* lse,
                     int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end,
                     T* grad_q, T* grad_k, T* grad_v, int64_t grad_stride,
                     Arena& arena) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width, padded = pad<T>(width);
  T* k_columns = arena.allocate<T>(padded * kBackwardBlock);  // [channel][key]
  T* v_columns = arena.allocate<T>(padded * kBackwardBlock);
  T* k_rows = arena.allocate<T>(kBackwardBlock * padded);
  T* q_rows = arena.allocate<T>(kBackwardBlock * padded);
  T* g_rows = arena.allocate<T>(kBackwardBlock * padded);
  T* p = arena.allocate<T>(kBackwardBlock * kBackwardBlock);   // [query][key]
  T* ds = arena.allocate<T>(kBackwardBlock * kBackwardBlock);  // [query][key]
  T* delta = arena.allocate<T>(q_end - q_begin);               // over sqrt(d)
  if (arena.counts()) return;

  const auto iota = *reinterpret_cast<const typename Vector<T>::words*>(kIota);
  const double scale = 1 / std::sqrt(double(width));
  const T log2_scale = scale * 1.44269504088896340736;
  for (int64_t i = q_begin; i < q_end; ++i) {
    T dot = 0;
    for (int64_t c = 0; c < width; ++c)
      dot += static_cast<T>(grad_out[i * grad_out_stride + c]) *
             static_cast<T>(out[i * out_stride + c]);
    delta[i - q_begin] = dot * T(scale);
  }
  for (int64_t begin = k_begin; begin < k_end; begin += kBackwardBlock) {
    const int64_t n = std::min<int64_t>(kBackwardBlock, k_end - begin);
    const int64_t cols = pad<T>(n);
    int64_t kv_stride = head.kv_stride;
    load_transposed(n, width, head.k + begin * kv_stride, kv_stride, k_columns,
                    kBackwardBlock, T(1), k_rows);
    load_transposed(n, width, head.v + begin * kv_stride, kv_stride, v_columns,
                    kBackwardBlock, T(1), k_rows);
    const T* keys =
        as_rows(n, width, padded, head.k + begin * kv_stride, kv_stride, k_rows);
    for (int64_t first = q_begin; first < q_end; first += kBackwardBlock) {
      const int64_t m = std::min<int64_t>(kBackwardBlock, q_end - first);
      int64_t q_stride = head.q_stride, g_stride = grad_out_stride;
      const T* q =
          as_rows(m, width, padded, head.q + first * q_stride, q_stride, q_rows);
      const T* g =
          as_rows(m, width, padded, grad_out + first * g_stride, g_stride, g_rows);
      matmul(m, cols, width, q, q_stride, int64_t(1), k_columns, kBackwardBlock, p,
             kBackwardBlock, false);
      matmul(m, cols, width, g, g_stride, int64_t(1), v_columns, kBackwardBlock, ds,
             kBackwardBlock, false);
      for (int64_t r = 0; r < m; ++r) {
        const T row_lse = lse[first + r], row_delta = delta[first + r - q_begin];
        RandomWords<T> words{};
        if (head.dropout) {
          const uint64_t word =
              query_words(head.dropout->seed, head.first_query + first + r);
          words.low += static_cast<uint32_t>(word);
          words.high += static_cast<uint32_t>(word >> 32);
        }
        for (int64_t j = 0; j < cols; j += lanes) {
          // From q k^T to the weight after dropout, and from g v^T to ds.
          Vec<T>& weight = vec(p + r * kBackwardBlock + j);
          Vec<T>& grad_score = vec(ds + r * kBackwardBlock + j);
          const Vec<T> w = exp2(weight * log2_scale - row_lse);
          if (head.dropout) {
            const auto key = iota + static_cast<uint32_t>(begin + j);
            const Vec<T> factor = dropout_factor<T>(*head.dropout, words, key);
            grad_score = w * (grad_score * T(scale) * factor - row_delta);
            weight = w * factor;
          } else {
            grad_score = w * (grad_score * T(scale) - row_delta);
            weight = w;
          }
        }
      }
      const int64_t at_key = (begin - k_begin) * grad_stride;
      matmul(n, padded, m, p, int64_t(1), kBackwardBlock, g, g_stride, grad_v + at_key,
             grad_stride, first > q_begin);
      matmul(n, padded, m, ds, int64_t(1), kBackwardBlock, q, q_stride, grad_k + at_key,
             grad_stride, first > q_begin);
      matmul(m, padded, n, ds, kBackwardBlock, int64_t(1), keys, kv_stride,
             grad_q + (first - q_begin) * grad_stride, grad_stride, begin > k_begin);
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
