// Attention of a few queries of one head, forward and backward, for one
// instruction set. each_isa.h includes this file once for each, with
// DSNET_ISA (a namespace) and DSNET_BYTES (the width of a vector) defined; so
// there is no include guard.
//
// What is read by many is read as it lies in memory, and what is the lanes of vectors
// is transposed once: in forward a task's queries, in backward a block of keys.

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// ------------------------------------------------------------ log2 for x >= 1

inline Vec<float> log2(Vec<float> x) {
  using bits = Vector<float>::bits;
  const bits exponent = ((bits)x - 0x3F3504F3) >> 23;  // to a mantissa near 1
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

// C[m][n] = sum_k A[m][k] B[k][n], added to C if ``add``; ``cols`` is a
// multiple of the lanes, a_m and a_k are the strides of A, b_k and c_m those
// of the rows of B and C.
template <typename T>
void matmul(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_m,
            int64_t a_k, const T* b, int64_t b_k, T* c, int64_t c_m, bool add) {
  constexpr int lanes = Vector<T>::lanes;
  // All sums of a tile stay in registers: 32 of 64 bytes, else 16.
  constexpr int widest = DSNET_BYTES == 64 ? 4 : 2;
  for (int64_t n = 0; n < cols;) {
    const int64_t left = (cols - n) / lanes;
    const auto at = [=](int64_t m, int v) -> Vec<T>& {
      return vec(c + m * c_m + n + v * lanes);
    };
    const auto read = [=](int64_t m, int v) { return add ? at(m, v) : Vec<T>{}; };
    const auto write = [=](int64_t m, int v, Vec<T> sum) { at(m, v) = sum; };
    if (left >= widest) {
      tiles<T, widest>(rows, depth, a, a_m, a_k, b + n, b_k, read, write);
      n += widest * lanes;
    } else if (left >= 2) {
      tiles<T, 2>(rows, depth, a, a_m, a_k, b + n, b_k, read, write);
      n += 2 * lanes;
    } else {
      tiles<T, 1>(rows, depth, a, a_m, a_k, b + n, b_k, read, write);
      n += lanes;
    }
  }
}

// ------------------------------------------------------------ moving elements

// dst[r][c] = factor * src[r][c], zeros around it up to all_rows by all_cols.
template <typename S, typename T>
void load(int64_t rows, int64_t cols, const S* src, int64_t src_row, T* dst,
          int64_t all_rows, int64_t all_cols, T factor) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dst + r * all_cols;
    int64_t c = 0;
    if constexpr (std::is_same_v<S, T>)
      for (; c + Vector<T>::lanes <= cols; c += Vector<T>::lanes)
        put<T>(row + c, loose(src + r * src_row + c) * factor);
    for (; c < cols; ++c) row[c] = static_cast<T>(src[r * src_row + c]) * factor;
    for (; c < all_cols; ++c) row[c] = 0;
  }
  std::fill(dst + rows * all_cols, dst + all_rows * all_cols, T(0));
}

// dst[r][c] = factor * src[r][c]
template <typename S, typename T>
void store(int64_t rows, int64_t cols, const T* src, int64_t src_row, S* dst,
           int64_t dst_row, T factor) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    if constexpr (std::is_same_v<S, T>)
      for (; c + Vector<T>::lanes <= cols; c += Vector<T>::lanes)
        put<T>(dst + r * dst_row + c, loose(src + r * src_row + c) * factor);
    for (; c < cols; ++c)
      dst[r * dst_row + c] = static_cast<S>(src[r * src_row + c] * factor);
  }
}

// Rows of S as rows of T: themselves where the types are the same.
template <typename S, typename T>
inline const T* as_rows(int64_t rows, int64_t cols, const S* src, int64_t& src_row,
                        T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    return src;
  } else {
    load<S, T>(rows, cols, src, src_row, buffer, rows, cols, T(1));
    src_row = cols;
    return buffer;
  }
}

// Rows of S as rows of T that end on a whole vector, with zeros if need be:
// themselves where they are that.
template <typename S, typename T>
inline const T* as_vectors(int64_t rows, int64_t cols, const S* src, int64_t& src_row,
                           T* buffer) {
  const int64_t padded = pad<T>(cols);
  if constexpr (std::is_same_v<S, T>)
    if (cols == padded) return src;
  load<S, T>(rows, cols, src, src_row, buffer, rows, padded, T(1));
  src_row = padded;
  return buffer;
}

// dst[channel][token] = factor * src[token][channel], with zeros up to whole
// vectors of both; ``rows`` is for as many tokens of whole vectors.
template <typename S, typename T>
void load_transposed(int64_t tokens, int64_t width, const S* src, int64_t src_row,
                     T* dst, int64_t dst_row, T factor, T* rows) {
  const int64_t all = pad<T>(tokens), padded = pad<T>(width);
  load(tokens, width, src, src_row, rows, all, padded, factor);
  transpose(all, padded, rows, padded, dst, dst_row);
}

// Asks for rows that are read next.
template <typename S>
inline void fetch(int64_t rows, int64_t cols, const S* src, int64_t src_row) {
  constexpr int64_t line = 64 / sizeof(S);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += line) __builtin_prefetch(src + r * src_row + c);
}

// -------------------------------------------------------------------- dropout

template <typename T>
struct Words {
  typename Vector<T>::words low, high;
};

// The random words of as many queries as there are lanes, from number ``row`` on.
template <typename T>
inline Words<T> query_lanes(const Dropout& dropout, uint64_t row) {
  Words<T> words;
  for (int i = 0; i < Vector<T>::lanes; ++i) {
    const uint64_t word = query_words(dropout.seed, row + i);
    words.low[i] = static_cast<uint32_t>(word);
    words.high[i] = static_cast<uint32_t>(word >> 32);
  }
  return words;
}

// 1 / (1 - p) for the weights that stay, 0 for the others, of queries for keys.
template <typename T>
inline Vec<T> kept(const Dropout& dropout, const Words<T>& query,
                   typename Vector<T>::words key) {
  const auto x = random_word(query.low, query.high, key);
  const auto stays = x >= dropout.threshold;  // -1 or 0
  return __builtin_convertvector(stays, Vec<T>) * T(-dropout.scale);
}

// -------------------------------------------------------------------- forward

// A block of keys, the first of them number ``begin``, and their values.
template <typename T>
struct Keys {
  int64_t begin, count;
  const T *k, *v;
  int64_t k_row, v_row;
};

// Queries, as many as one or two vectors have lanes, and what they have read so far.
template <typename T>
struct Queries {
  uint64_t row;  // of the first among all, for dropout
  int64_t count;
  const T* q;  // [channel][query], scaled
  T* top;      // of the scores,
  T* total;    // the sum of the weights 2^(score - top), before dropout,
  T* sum;      // and that of the values by the weights, [query][channel]
};

// Lets V vectors of queries read a block of keys. Scores are [key][query], so that the
// largest of a query and the sum of its weights stay in a lane.
template <typename T, int V>
void read(const Queries<T>& queries, const Keys<T>& keys, int64_t width,
          const Dropout* dropout, T* p) {
  constexpr int lanes = Vector<T>::lanes, all = V * lanes;
  Vec<T> largest[V];
  for (int v = 0; v < V; ++v) largest[v] = vec(queries.top + v * lanes);
  tiles<T, V>(
      keys.count, width, keys.k, keys.k_row, int64_t(1), queries.q, all,
      [](int64_t, int) { return Vec<T>{}; },
      [&](int64_t j, int v, Vec<T> score) {
        largest[v] = larger<T>(score, largest[v]);
        vec(p + j * all + v * lanes) = score;
      });

  alignas(64) T shrink[all];  // what was read below the old top
  for (int v = 0; v < V; ++v) {
    const Vec<T> peak = largest[v];
    Vec<T> mass{};
    T* weights = p + v * lanes;
    for (int64_t j = 0; j < keys.count; ++j) {
      const Vec<T> weight = exp2(vec(weights + j * all) - peak);
      mass += weight;
      vec(weights + j * all) = weight;
    }
    if (dropout) {
      const Words<T> words = query_lanes<T>(*dropout, queries.row + v * lanes);
      typename Vector<T>::words key{};
      key += static_cast<uint32_t>(keys.begin);
      for (int64_t j = 0; j < keys.count; ++j, key += 1)
        vec(weights + j * all) *= kept<T>(*dropout, words, key);
    }
    Vec<T>&top = vec(queries.top + v * lanes), &total = vec(queries.total + v * lanes);
    const Vec<T> less = exp2(top - peak);
    vec(shrink + v * lanes) = less;
    total = total * less + mass;
    top = peak;
  }

  const int64_t padded = pad<T>(width);
  const auto add_values = [&](auto vectors, int64_t c) {
    const auto at = [&](int64_t r, int v) -> Vec<T>& {
      return vec(queries.sum + r * padded + c + v * lanes);
    };
    tiles<T, vectors>(
        queries.count, keys.count, p, int64_t(1), all, keys.v + c, keys.v_row,
        [&](int64_t r, int v) { return keys.begin ? at(r, v) * shrink[r] : Vec<T>{}; },
        [&](int64_t r, int v, Vec<T> sum) { at(r, v) = sum; });
  };
  int64_t c = 0;
  for (; c + 2 * lanes <= padded; c += 2 * lanes)
    add_values(std::integral_constant<int, 2>(), c);
  if (c < padded) add_values(std::integral_constant<int, 1>(), c);
}

// Queries [first, first + count) of a head, at most kMost. All of them read a block of
// keys before the next one is fetched.
template <typename S, typename T>
void attend(const Head<S>& head, int64_t first, int64_t count, S* out, int64_t out_row,
            T* lse, char* memory) {
  constexpr int lanes = Vector<T>::lanes, together = 2 * lanes;
  const int64_t width = head.width, padded = pad<T>(width);
  const int64_t all = ceil_div(count, together) * together;
  Arena arena(memory);
  T* q = arena.take<T>(all * padded);
  T* sum = arena.take<T>(all * padded);
  T* top = arena.take<T>(all);
  T* total = arena.take<T>(all);
  T* q_rows = arena.take<T>(together * padded);
  T* k_rows = arena.take<T>(kColumns * padded);
  T* v_rows = arena.take<T>(kColumns * padded);
  T* p = arena.take<T>(kColumns * together);
  const T scale = T(1.44269504088896340736 / std::sqrt(double(width)));
  std::fill(top, top + all, -std::numeric_limits<T>::infinity());
  std::fill(total, total + all, T(0));

  for (int64_t begin = 0; begin < head.keys; begin += kColumns) {
    const int64_t n = std::min<int64_t>(kColumns, head.keys - begin);
    int64_t k_row = head.kv_row, v_row = head.kv_row;
    const T* k = as_rows<S, T>(n, width, head.k + begin * k_row, k_row, k_rows);
    const T* v = as_vectors<S, T>(n, width, head.v + begin * v_row, v_row, v_rows);
    const Keys<T> keys{begin, n, k, v, k_row, v_row};
    const int64_t next = begin + n, left = std::min(kColumns, head.keys - next);
    fetch(left, width, head.k + next * head.kv_row, head.kv_row);
    fetch(left, width, head.v + next * head.kv_row, head.kv_row);
    for (int64_t i = 0; i < count; i += together) {
      const int64_t m = std::min<int64_t>(together, count - i);
      const S* own = head.q + (first + i) * head.q_row;
      if (begin == 0) {
        fetch(std::min<int64_t>(together, count - i - m), width, own + m * head.q_row,
              head.q_row);
        load_transposed(m, width, own, head.q_row, q + i * padded, pad<T>(m), scale,
                        q_rows);
      }
      const Queries<T> queries{
          head.row + first + i, m, q + i * padded, top + i, total + i,
          sum + i * padded};
      (m > lanes ? read<T, 2> : read<T, 1>)(queries, keys, width, head.dropout, p);
      if (next < head.keys) continue;
      for (int64_t r = i; r < i + m; ++r)
        store(1, width, sum + r * padded, padded, out + r * out_row, out_row,
              T(1) / total[r]);
    }
  }
  for (int64_t i = 0; i < count; i += lanes) vec(top + i) += log2(vec(total + i));
  std::copy(top, top + count, lse);
}

// ------------------------------------------------------------------- backward

// Rows of queries or gradients, as they came and in T.
template <typename S, typename T>
struct Rows {
  const S* source;
  int64_t source_row;
  const T* x;
  int64_t row;
};

// Products of rows with a block of keys and values.
template <typename S, typename T>
class Block {
 public:
  Block(int64_t width, Arena& arena)
      : width_(width),
        k_(arena.take<T>(pad<T>(width) * kBlock)),
        v_(arena.take<T>(pad<T>(width) * kBlock)),
        rows_(arena.take<T>(kBlock * pad<T>(width))) {}

  void read(int64_t n, const S* keys, const S* values, int64_t row) {
    load_transposed(n, width_, keys, row, k_, kBlock, T(1), rows_);
    load_transposed(n, width_, values, row, v_, kBlock, T(1), rows_);
  }

  // qk = q k^T and gv = g v^T, rows of kBlock.
  void multiply(int64_t m, int64_t n, const Rows<S, T>& q, const Rows<S, T>& g, T* qk,
                T* gv) {
    matmul(m, pad<T>(n), width_, q.x, q.row, int64_t(1), k_, kBlock, qk, kBlock, false);
    matmul(m, pad<T>(n), width_, g.x, g.row, int64_t(1), v_, kBlock, gv, kBlock, false);
  }

 private:
  int64_t width_;
  T *k_, *v_, *rows_;  // [channel][key] twice, and to make them
};

// Gradients of queries [q_begin, q_end) and keys [k_begin, k_end) of a head as
// far as they come from each other, with rows of ``padded`` = pad<T>(width) elements:
// rows of as_vectors have as many and no more.
template <typename S, typename T, typename Products = Block<S, T>>
void differentiate(const Head<S>& head, const S* out, int64_t out_row,
                   const S* grad_out, int64_t grad_row, const T* lse, int64_t q_begin,
                   int64_t q_end, int64_t k_begin, int64_t k_end, T* grad_q, T* grad_k,
                   T* grad_v, int64_t padded, char* memory) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width;
  Arena arena(memory);
  Products products(width, arena);
  T* k_rows = arena.take<T>(kBlock * padded);
  T* q_rows = arena.take<T>(kBlock * padded);
  T* g_rows = arena.take<T>(kBlock * padded);
  T* p = arena.take<T>(kBlock * kBlock);   // [query][key]
  T* ds = arena.take<T>(kBlock * kBlock);  // [query][key]
  T* delta = arena.take<T>(q_end - q_begin);

  const auto iota = *reinterpret_cast<const typename Vector<T>::words*>(kIota);
  const double scale = 1 / std::sqrt(double(width));
  const T to_log2 = scale * 1.44269504088896340736;
  for (int64_t i = q_begin; i < q_end; ++i) {
    T dot = 0;
    for (int64_t c = 0; c < width; ++c)
      dot += static_cast<T>(grad_out[i * grad_row + c]) *
             static_cast<T>(out[i * out_row + c]);
    delta[i - q_begin] = dot * T(scale);
  }
  for (int64_t begin = k_begin; begin < k_end; begin += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, k_end - begin), cols = pad<T>(n);
    int64_t kv_row = head.kv_row;
    products.read(n, head.k + begin * kv_row, head.v + begin * kv_row, kv_row);
    const T* keys = as_vectors<S, T>(n, width, head.k + begin * kv_row, kv_row, k_rows);
    for (int64_t first = q_begin; first < q_end; first += kBlock) {
      const int64_t m = std::min<int64_t>(kBlock, q_end - first);
      int64_t q_row = head.q_row, g_row = grad_row;
      const T* q = as_vectors<S, T>(m, width, head.q + first * q_row, q_row, q_rows);
      const T* g = as_vectors<S, T>(m, width, grad_out + first * g_row, g_row, g_rows);
      products.multiply(m, n, {head.q + first * head.q_row, head.q_row, q, q_row},
                        {grad_out + first * grad_row, grad_row, g, g_row}, p, ds);
      for (int64_t r = 0; r < m; ++r) {
        const T norm = lse[first + r], d = delta[first + r - q_begin];
        Words<T> words{};
        if (head.dropout) {
          const uint64_t word = query_words(head.dropout->seed, head.row + first + r);
          words.low += static_cast<uint32_t>(word);
          words.high += static_cast<uint32_t>(word >> 32);
        }
        for (int64_t j = 0; j < cols; j += lanes) {
          Vec<T>& weight = vec(p + r * kBlock + j);
          Vec<T>& slope = vec(ds + r * kBlock + j);
          const Vec<T> e = exp2(weight * to_log2 - norm);
          if (head.dropout) {
            const auto key = iota + static_cast<uint32_t>(begin + j);
            const Vec<T> keep = kept<T>(*head.dropout, words, key);
            slope = e * (slope * T(scale) * keep - d);
            weight = e * keep;
          } else {
            slope = e * (slope * T(scale) - d);
            weight = e;
          }
        }
      }
      const int64_t at_key = (begin - k_begin) * padded;
      matmul(n, padded, m, p, int64_t(1), kBlock, g, g_row, grad_v + at_key, padded,
             first > q_begin);
      matmul(n, padded, m, ds, int64_t(1), kBlock, q, q_row, grad_k + at_key, padded,
             first > q_begin);
      matmul(m, padded, n, ds, kBlock, int64_t(1), keys, kv_row,
             grad_q + (first - q_begin) * padded, padded, begin > k_begin);
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
