// Attention of a few queries of one head, forward and backward, for one
// instruction set. co_attention_cpu.cpp includes this file once for each, with
// DSNET_ISA (a namespace) and DSNET_BYTES (the width of a vector) defined; so
// there is no include guard.
//
// Every matrix product is C[m][lanes] += A[m][k] * B[k][lanes] with single
// elements of A. The tokens of the shorter stream are the lanes of vectors, and
// the longer stream is read as it lies in memory, row by row: its queries make
// scores [query][key], its keys scores [key][query].

namespace dsnet {
namespace DSNET_ISA {

template <typename T>
struct Vector {
  static constexpr int lanes = DSNET_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(DSNET_BYTES), may_alias));
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits bits __attribute__((vector_size(DSNET_BYTES), may_alias));
  // In memory of the caller, which need not be aligned.
  typedef T loose __attribute__((vector_size(DSNET_BYTES), may_alias, aligned(4)));
  // As many 32-bit words as there are lanes.
  typedef uint32_t words __attribute__((vector_size(lanes * 4), may_alias));
};

template <typename T>
using Vec = typename Vector<T>::type;

template <typename T>
inline Vec<T>& vec(T* x) {
  return *reinterpret_cast<Vec<T>*>(x);
}

template <typename T>
inline const Vec<T>& vec(const T* x) {
  return *reinterpret_cast<const Vec<T>*>(x);
}

template <typename T>
inline Vec<T> loose(const T* x) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(x);
}

template <typename T>
constexpr int64_t pad(int64_t n) {
  constexpr int64_t lanes = Vector<T>::lanes;
  return (n + lanes - 1) / lanes * lanes;
}

// a > b ? a : b, so b if one of them is no number.
template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if DSNET_BYTES == 64
  // The compiler makes three instructions of the comparison.
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// ------------------------------------------------------------ 2^x for x <= 0

inline Vec<float> exp2(Vec<float> x) {
  using bits = Vector<float>::bits;
  constexpr float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds
  x = larger<float>(Vec<float>{} - 126.f, x);
  const Vec<float> rounded = x + shift;
  const Vec<float> f = x - (rounded - shift);
  // Minimax on [-0.5, 0.5], relative error 7.5e-8.
  Vec<float> y = f * 1.3276471520e-3f + 9.6755413307e-3f;
  y = y * f + 5.5507132750e-2f;
  y = y * f + 2.4022119724e-1f;
  y = y * f + 6.9314696706e-1f;
  y = y * f + 1.0000000717f;
  return (Vec<float>)((bits)y + ((bits)rounded << 23));
}

inline Vec<double> exp2(Vec<double> x) {
  using bits = Vector<double>::bits;
  constexpr double shift = 6755399441055744.;  // 1.5 * 2^52
  x = larger<double>(Vec<double>{} - 1022., x);
  const Vec<double> rounded = x + shift;
  const Vec<double> f = (x - (rounded - shift)) * 0.69314718055994530942;
  Vec<double> y = Vec<double>{} + 1.;
  for (int n = 13; n > 0; --n) y = y * f * (1. / n) + 1.;  // Taylor
  return (Vec<double>)((bits)y + ((bits)rounded << 52));
}

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

// ------------------------------------------------------- across the lanes

// The largest element, or the sum of all.
template <typename T, bool kSum>
inline T reduce(Vec<T> x) {
#if DSNET_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return kSum ? _mm512_reduce_add_ps((__m512)x) : _mm512_reduce_max_ps((__m512)x);
#endif
  T y = x[0];
  for (int i = 1; i < Vector<T>::lanes; ++i) y = kSum ? y + x[i] : x[i] > y ? x[i] : y;
  return y;
}

// ----------------------------------------------------------- matrix products

template <typename T, int M, int V>
inline void tile(int64_t depth, const T* a, int64_t a_m, int64_t a_k, const T* b,
                 int64_t b_k, T* c, int64_t c_m, bool add) {
  constexpr int lanes = Vector<T>::lanes;
  Vec<T> sum[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[m][v] = add ? vec(c + m * c_m + v * lanes) : Vec<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = loose(b + k * b_k + v * lanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T x = a[m * a_m + k * a_k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vec(c + m * c_m + v * lanes) = sum[m][v];
  }
}

template <typename T, int V>
inline void tiles(int64_t rows, int64_t depth, const T* a, int64_t a_m, int64_t a_k,
                  const T* b, int64_t b_k, T* c, int64_t c_m, bool add) {
  // Sums and a row of B in 32 registers of 64 bytes, else in 16. Tiles are of
  // nearly equal height: a last one of one row would be slow.
  constexpr int64_t tallest = DSNET_BYTES == 64 && V <= 2 ? 12 : 6;
  const int64_t count = (rows + tallest - 1) / tallest;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t height = rows / count + (i < rows % count);
    switch (height) {
#define DSNET_TILE(M)                                         \
  case M:                                                     \
    if constexpr (M <= tallest)                               \
      tile<T, M, V>(depth, a, a_m, a_k, b, b_k, c, c_m, add); \
    break;
      DSNET_TILE(1)
      DSNET_TILE(2)
      DSNET_TILE(3)
      DSNET_TILE(4)
      DSNET_TILE(5)
      DSNET_TILE(6)
      DSNET_TILE(7)
      DSNET_TILE(8)
      DSNET_TILE(9)
      DSNET_TILE(10)
      DSNET_TILE(11)
      DSNET_TILE(12)
#undef DSNET_TILE
    }
    a += height * a_m;
    c += height * c_m;
  }
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
    if (left >= widest) {
      tiles<T, widest>(rows, depth, a, a_m, a_k, b + n, b_k, c + n, c_m, add);
      n += widest * lanes;
    } else if (left >= 2) {
      tiles<T, 2>(rows, depth, a, a_m, a_k, b + n, b_k, c + n, c_m, add);
      n += 2 * lanes;
    } else {
      tiles<T, 1>(rows, depth, a, a_m, a_k, b + n, b_k, c + n, c_m, add);
      n += lanes;
    }
  }
}

// ------------------------------------------------------------ moving elements

// dst[c][r] = src[r][c]; both extents are multiples of the lanes.
template <typename T>
void transpose(int64_t rows, int64_t cols, const T* src, int64_t src_row, T* dst,
               int64_t dst_row) {
#ifdef __clang__
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[c * dst_row + r] = src[r * src_row + c];
#else
  constexpr int n = Vector<T>::lanes;
  using bits = typename Vector<T>::bits;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < cols; c += n) {
      Vec<T> x[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) x[i] = vec(src + (r + i) * src_row + c);
    // Swaps the off-diagonal blocks of 2 * s by 2 * s elements.
#pragma GCC unroll 4
      for (int s = 1; s < n; s *= 2) {
        bits low, high;
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          low[i] = i & s ? n + i - s : i;
          high[i] = i & s ? n + i : i + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          if (i & s) continue;
          const Vec<T> a = x[i], b = x[i + s];
          x[i] = __builtin_shuffle(a, b, low);
          x[i + s] = __builtin_shuffle(a, b, high);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) vec(dst + (c + i) * dst_row + r) = x[i];
    }
#endif
}

// dst[r][c] = factor * src[r][c], zeros around it up to all_rows by all_cols.
template <typename S, typename T>
void load(int64_t rows, int64_t cols, const S* src, int64_t src_row, T* dst,
          int64_t all_rows, int64_t all_cols, T factor) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dst + r * all_cols;
    for (int64_t c = 0; c < cols; ++c)
      row[c] = static_cast<T>(src[r * src_row + c]) * factor;
    for (int64_t c = cols; c < all_cols; ++c) row[c] = 0;
  }
  std::fill(dst + rows * all_cols, dst + all_rows * all_cols, T(0));
}

// dst[r][c] = factor * src[r][c]
template <typename S, typename T>
void store(int64_t rows, int64_t cols, const T* src, int64_t src_row, S* dst,
           int64_t dst_row, T factor) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      dst[r * dst_row + c] = static_cast<S>(src[r * src_row + c] * factor);
}

// Asks for rows that are read soon; hardware does not foresee the strides.
template <typename S>
inline void prefetch(int64_t rows, int64_t cols, const S* src, int64_t src_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += 64 / sizeof(S))
      __builtin_prefetch(src + r * src_row + c);
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

// -------------------------------------------------------------------- dropout

// 1 / (1 - p) for the weights that stay, 0 for the others.
template <typename T>
inline Vec<T> kept(const Dropout& dropout, const uint32_t* keys, int64_t lane,
                   uint32_t column) {
  using words = typename Vector<T>::words;
  const words first = *reinterpret_cast<const words*>(keys + lane);
  const words second = *reinterpret_cast<const words*>(keys + kQueries + lane);
  const words x = random_word(first, second, column);
  const auto stays = x >= dropout.threshold;  // -1 or 0
  return __builtin_convertvector(stays, Vec<T>) * T(-dropout.scale);
}

// The same for lanes that are keys, from ``column`` on, of one query.
template <typename T>
inline Vec<T> kept(const Dropout& dropout, uint64_t query, uint32_t column) {
  using words = typename Vector<T>::words;
  const words key = *reinterpret_cast<const words*>(kIota) + column;
  const words x = random_word(words{} + static_cast<uint32_t>(query),
                              words{} + static_cast<uint32_t>(query >> 32), key);
  const auto stays = x >= dropout.threshold;  // -1 or 0
  return __builtin_convertvector(stays, Vec<T>) * T(-dropout.scale);
}

// -------------------------------------------------------------------- forward

// A panel of queries and what it has read so far.
template <typename T>
struct Panel {
  Panel(Arena& arena, int64_t padded)
      : q(arena.take<T>(padded * kQueries)),
        sum(arena.take<T>(padded * kQueries)),
        top(arena.take<T>(kQueries)),
        total(arena.take<T>(kQueries)),
        keys(arena.take<uint32_t>(2 * kQueries)) {}

  T *q, *sum;      // [channel][query]
  T *top, *total;  // largest score, sum of 2^(score - top)
  uint32_t* keys;  // of the dropout
};

// Turns scores of n keys into weights 2^(score - top) of a panel and shrinks
// what it has summed to a new top.
template <typename T>
void read_scores(const Dropout* dropout, const Panel<T>& x, int64_t begin, int64_t n,
                 int64_t cols, int64_t width, T* p) {
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < cols; i += lanes) {
    const Vec<T> before = vec(x.top + i);
    Vec<T> peak = before;
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> s = vec(p + j * kQueries + i);
      peak = larger<T>(s, peak);
    }
    const Vec<T> shrink = exp2(before - peak);
    Vec<T> mass = vec(x.total + i) * shrink;
    for (int64_t j = 0; j < n; ++j) {
      T* s = p + j * kQueries + i;
      const Vec<T> e = exp2(vec(s) - peak);
      mass += e;
      vec(s) = e;
    }
    if (dropout)
      for (int64_t j = 0; j < n; ++j)
        vec(p + j * kQueries + i) *= kept<T>(*dropout, x.keys, i, begin + j);
    vec(x.top + i) = peak;
    vec(x.total + i) = mass;
    if (begin)
      for (int64_t c = 0; c < width; ++c) vec(x.sum + c * kQueries + i) *= shrink;
  }
}

// Queries [first, first + count) of a head, of the shorter stream, at most kPanels
// panels. All panels read a block of keys before the next one is fetched.
template <typename S, typename T>
void attend(const Head<S>& head, int64_t first, int64_t count, S* out, int64_t out_row,
            T* lse, char* memory) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width, padded = pad<T>(width);
  Arena arena(memory);
  T* rows = arena.take<T>(kQueries * padded);
  T* p = arena.take<T>(kKeys * kQueries);  // [key][query]
  T* k_rows = arena.take<T>(kKeys * width);
  T* v_rows = arena.take<T>(kKeys * width);
  const T scale = T(1.44269504088896340736 / std::sqrt(double(width)));
  const auto panels = [&](auto body) {
    for (int64_t i = 0; i * kQueries < count; ++i)
      body(i, std::min<int64_t>(kQueries, count - i * kQueries));
  };

  std::vector<Panel<T>> state;
  panels([&](int64_t i, int64_t queries) {
    state.emplace_back(arena, padded);
    const Panel<T>& x = state.back();
    const int64_t row = first + i * kQueries, cols = pad<T>(queries);
    load_transposed(queries, width, head.q + row * head.q_row, head.q_row, x.q,
                    kQueries, scale, rows);
    if (head.dropout) row_keys(*head.dropout, head.row + row, cols, x.keys);
    std::fill(x.top, x.top + cols, -std::numeric_limits<T>::infinity());
    std::fill(x.total, x.total + cols, T(0));
    std::fill(x.sum, x.sum + padded * kQueries, T(0));
  });

  for (int64_t begin = 0; begin < head.keys; begin += kKeys) {
    const int64_t n = std::min<int64_t>(kKeys, head.keys - begin);
    int64_t k_row = head.kv_row, v_row = head.kv_row;
    const int64_t next = begin + n, more = std::min(kKeys, head.keys - next);
    prefetch(more, width, head.k + next * k_row, k_row);
    prefetch(more, width, head.v + next * v_row, v_row);
    const T* k = as_rows<S, T>(n, width, head.k + begin * k_row, k_row, k_rows);
    const T* v = as_rows<S, T>(n, width, head.v + begin * v_row, v_row, v_rows);
    panels([&](int64_t i, int64_t queries) {
      const Panel<T>& x = state[i];
      const int64_t cols = pad<T>(queries);
      matmul(n, cols, width, k, k_row, int64_t(1), x.q, kQueries, p, kQueries, false);
      read_scores<T>(head.dropout, x, begin, n, cols, width, p);
      matmul(width, cols, n, v, int64_t(1), v_row, p, kQueries, x.sum, kQueries, true);
    });
  }

  panels([&](int64_t i, int64_t queries) {
    const Panel<T>& x = state[i];
    const int64_t row = i * kQueries, cols = pad<T>(queries);
    for (int64_t j = 0; j < cols; j += lanes) {
      const Vec<T> inverse = T(1) / vec(x.total + j);
      for (int64_t c = 0; c < width; ++c) vec(x.sum + c * kQueries + j) *= inverse;
    }
    transpose(padded, cols, x.sum, kQueries, rows, padded);
    store(queries, width, rows, padded, out + row * out_row, out_row, T(1));
    for (int64_t j = 0; j < cols; j += lanes)
      vec(x.total + j) = vec(x.top + j) + log2(vec(x.total + j));
    std::copy(x.total, x.total + queries, lse + row);
  });
}

// Turns scores of n keys from ``begin`` on into weights 2^(score - top) of R rows
// of queries, and shrinks what these have summed to a new top. Several rows at a
// time, because each is a chain of instructions that wait for one another.
template <typename T, int R>
inline void read_rows(const Dropout* dropout, uint64_t first_row, int64_t begin,
                      int64_t n, Vec<T> padding, int64_t padded, T* p, T* top, T* total,
                      T* sum) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t cols = pad<T>(n);
  Vec<T> largest[R], mass[R];
  T peak[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    T* s = p + r * kColumns;
    vec(s + cols - lanes) += padding;
    largest[r] = vec(s);
    mass[r] = Vec<T>{};
  }
  for (int64_t j = lanes; j < cols; j += lanes)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      largest[r] = larger<T>(vec(p + r * kColumns + j), largest[r]);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) peak[r] = std::max(top[r], reduce<T, false>(largest[r]));
  for (int64_t j = 0; j < cols; j += lanes)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* s = p + r * kColumns + j;
      const Vec<T> e = exp2(vec(s) - peak[r]);
      mass[r] += e;
      vec(s) = e;
    }
  for (int r = 0; r < R; ++r) {
    if (dropout) {
      const uint64_t words = query_words(dropout->seed, first_row + r);
      for (int64_t j = 0; j < cols; j += lanes)
        vec(p + r * kColumns + j) *= kept<T>(*dropout, words, begin + j);
    }
    if (begin) {
      const T shrink = exp2(Vec<T>{} + (top[r] - peak[r]))[0];
      total[r] *= shrink;
      for (int64_t c = 0; c < padded; c += lanes) vec(sum + r * padded + c) *= shrink;
    }
    total[r] += reduce<T, true>(mass[r]);
    top[r] = peak[r];
  }
}

// As ``attend``, for queries of the longer stream, at most kPanels * kQueries.
template <typename S, typename T>
void attend_rows(const Head<S>& head, int64_t first, int64_t count, S* out,
                 int64_t out_row, T* lse, char* memory) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width, padded = pad<T>(width);
  Arena arena(memory);
  T* k = arena.take<T>(padded * kColumns);  // [channel][key]
  T* rows = arena.take<T>(kColumns * padded);
  T* v_rows = arena.take<T>(kColumns * padded);
  T* q_rows = arena.take<T>(kRows * width);
  T* p = arena.take<T>(kRows * kColumns);  // [query][key]
  T* sum = arena.take<T>(count * padded);  // [query][channel]
  T* top = arena.take<T>(pad<T>(count));
  T* total = arena.take<T>(pad<T>(count));
  const T scale = T(1.44269504088896340736 / std::sqrt(double(width)));
  std::fill(top, top + count, -std::numeric_limits<T>::infinity());
  std::fill(total, total + pad<T>(count), T(0));

  for (int64_t begin = 0; begin < head.keys; begin += kColumns) {
    const int64_t n = std::min<int64_t>(kColumns, head.keys - begin);
    int64_t v_row = head.kv_row;
    load_transposed(n, width, head.k + begin * head.kv_row, head.kv_row, k, kColumns,
                    scale, rows);
    const T* v = as_vectors<S, T>(n, width, head.v + begin * v_row, v_row, v_rows);
    Vec<T> padding{};  // of the last vector: no keys, so no weights
    for (int64_t j = n; j < pad<T>(n); ++j)
      padding[j - pad<T>(n) + lanes] = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t m = std::min<int64_t>(kRows, count - i);
      int64_t q_row = head.q_row;
      if (!begin)
        prefetch(std::min<int64_t>(kRows, count - i - m), width,
                 head.q + (first + i + m) * q_row, q_row);
      const T* q = as_rows<S, T>(m, width, head.q + (first + i) * q_row, q_row, q_rows);
      matmul(m, pad<T>(n), width, q, q_row, int64_t(1), k, kColumns, p, kColumns,
             false);
      for (int64_t r = 0; r < m;) {
        const int64_t at = i + r;
        const auto read = m - r >= 4 ? read_rows<T, 4> : read_rows<T, 1>;
        read(head.dropout, head.row + first + at, begin, n, padding, padded,
             p + r * kColumns, top + at, total + at, sum + at * padded);
        r += m - r >= 4 ? 4 : 1;
      }
      matmul(m, padded, n, p, kColumns, int64_t(1), v, v_row, sum + i * padded, padded,
             begin > 0);
    }
  }

  for (int64_t i = 0; i < count; ++i)
    store(1, width, sum + i * padded, padded, out + i * out_row, out_row,
          T(1) / total[i]);
  for (int64_t i = 0; i < count; i += lanes) vec(total + i) = log2(vec(total + i));
  for (int64_t i = 0; i < count; ++i) lse[i] = top[i] + total[i];
}

// ------------------------------------------------------------------- backward

// Gradients of queries [q_begin, q_end), of the shorter stream, and keys
// [k_begin, k_end) of a head as far as they come from each other, with rows of
// ``padded`` elements, a multiple of the lanes.
template <typename S, typename T>
void differentiate(const Head<S>& head, const S* out, int64_t out_row,
                   const S* grad_out, int64_t grad_row, const T* lse, int64_t q_begin,
                   int64_t q_end, int64_t k_begin, int64_t k_end, T* grad_q, T* grad_k,
                   T* grad_v, int64_t padded, char* memory) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width;
  Arena arena(memory);
  T* q_rows = arena.take<T>(kQueries * padded);  // [query][channel]
  T* q = arena.take<T>(padded * kQueries);       // [channel][query]
  T* g_rows = arena.take<T>(kQueries * padded);
  T* g = arena.take<T>(padded * kQueries);
  T* sum = arena.take<T>(padded * kQueries);
  T* p = arena.take<T>(kKeys * kQueries);   // [key][query]
  T* ds = arena.take<T>(kKeys * kQueries);  // [key][query]
  T* k_rows = arena.take<T>(kKeys * width);
  T* v_rows = arena.take<T>(kKeys * width);
  T* norm = arena.take<T>(kQueries);
  T* delta = arena.take<T>(kQueries);
  uint32_t* keys = arena.take<uint32_t>(2 * kQueries);

  const double scale = 1 / std::sqrt(double(width));
  std::fill(grad_k, grad_k + (k_end - k_begin) * padded, T(0));
  std::fill(grad_v, grad_v + (k_end - k_begin) * padded, T(0));
  for (int64_t first = q_begin; first < q_end; first += kQueries) {
    const int64_t count = std::min<int64_t>(kQueries, q_end - first);
    const int64_t cols = pad<T>(count);
    load(count, width, head.q + first * head.q_row, head.q_row, q_rows, cols, padded,
         T(1));
    transpose(cols, padded, q_rows, padded, q, kQueries);
    load(count, width, grad_out + first * grad_row, grad_row, g_rows, cols, padded,
         T(1));
    transpose(cols, padded, g_rows, padded, g, kQueries);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < cols; i += lanes)
        vec(q + c * kQueries + i) *= T(scale * 1.44269504088896340736);
    for (int64_t i = 0; i < cols; ++i) norm[i] = i < count ? lse[first + i] : 0;
    std::fill(delta, delta + cols, T(0));
    for (int64_t i = 0; i < count; ++i) {
      T dot = 0;
      for (int64_t c = 0; c < width; ++c)
        dot += g_rows[i * padded + c] * static_cast<T>(out[(first + i) * out_row + c]);
      delta[i] = dot;
    }
    if (head.dropout) row_keys(*head.dropout, head.row + first, cols, keys);

    for (int64_t begin = k_begin; begin < k_end; begin += kKeys) {
      const int64_t n = std::min<int64_t>(kKeys, k_end - begin);
      int64_t k_row = head.kv_row, v_row = head.kv_row;
      const T* k = as_rows<S, T>(n, width, head.k + begin * k_row, k_row, k_rows);
      const T* v = as_rows<S, T>(n, width, head.v + begin * v_row, v_row, v_rows);
      matmul(n, cols, width, k, k_row, int64_t(1), q, kQueries, p, kQueries, false);
      matmul(n, cols, width, v, v_row, int64_t(1), g, kQueries, ds, kQueries, false);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < cols; i += lanes) {
          Vec<T>& weight = vec(p + j * kQueries + i);
          Vec<T>& slope = vec(ds + j * kQueries + i);
          const Vec<T> e = exp2(weight - vec(norm + i));
          if (head.dropout) {
            const Vec<T> keep = kept<T>(*head.dropout, keys, i, begin + j);
            slope = e * (slope * keep - vec(delta + i));
            weight = e * keep;
          } else {
            slope = e * (slope - vec(delta + i));
            weight = e;
          }
        }
      const int64_t at_key = (begin - k_begin) * padded;
      matmul(n, padded, count, p, int64_t(kQueries), int64_t(1), g_rows, padded,
             grad_v + at_key, padded, true);
      matmul(n, padded, count, ds, int64_t(kQueries), int64_t(1), q_rows, padded,
             grad_k + at_key, padded, true);
      matmul(width, cols, n, k, int64_t(1), k_row, ds, kQueries, sum, kQueries,
             begin > k_begin);
    }
    for (int64_t c = width; c < padded; ++c)
      std::fill(sum + c * kQueries, sum + c * kQueries + cols, T(0));
    transpose(padded, cols, sum, kQueries, q_rows, padded);
    store(count, padded, q_rows, padded, grad_q + (first - q_begin) * padded, padded,
          T(scale));
  }
  for (int64_t i = 0; i < (k_end - k_begin) * padded; ++i) grad_k[i] *= T(scale);
}

// As ``differentiate``, for queries of the longer stream.
template <typename S, typename T>
void differentiate_rows(const Head<S>& head, const S* out, int64_t out_row,
                        const S* grad_out, int64_t grad_row, const T* lse,
                        int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end,
                        T* grad_q, T* grad_k, T* grad_v, int64_t padded, char* memory) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t width = head.width;
  Arena arena(memory);
  T* k = arena.take<T>(padded * kQueries);  // [channel][key]
  T* v = arena.take<T>(padded * kQueries);
  T* k_rows = arena.take<T>(kQueries * padded);
  T* q_rows = arena.take<T>(kQueries * padded);
  T* g_rows = arena.take<T>(kQueries * padded);
  T* p = arena.take<T>(kQueries * kQueries);   // [query][key]
  T* ds = arena.take<T>(kQueries * kQueries);  // [query][key]
  T* delta = arena.take<T>(q_end - q_begin);

  const double scale = 1 / std::sqrt(double(width));
  for (int64_t i = q_begin; i < q_end; ++i) {
    T dot = 0;
    for (int64_t c = 0; c < width; ++c)
      dot += static_cast<T>(grad_out[i * grad_row + c]) *
             static_cast<T>(out[i * out_row + c]);
    delta[i - q_begin] = dot * T(scale);
  }
  for (int64_t begin = k_begin; begin < k_end; begin += kQueries) {
    const int64_t n = std::min<int64_t>(kQueries, k_end - begin), cols = pad<T>(n);
    int64_t kv_row = head.kv_row;
    load_transposed(n, width, head.k + begin * kv_row, kv_row, k, kQueries,
                    T(scale * 1.44269504088896340736), k_rows);
    load_transposed(n, width, head.v + begin * kv_row, kv_row, v, kQueries, T(scale),
                    k_rows);
    const T* keys = as_vectors<S, T>(n, width, head.k + begin * kv_row, kv_row, k_rows);
    for (int64_t first = q_begin; first < q_end; first += kQueries) {
      const int64_t m = std::min<int64_t>(kQueries, q_end - first);
      int64_t q_row = head.q_row, g_row = grad_row;
      const T* q = as_vectors<S, T>(m, width, head.q + first * q_row, q_row, q_rows);
      const T* g = as_vectors<S, T>(m, width, grad_out + first * g_row, g_row, g_rows);
      matmul(m, cols, width, q, q_row, int64_t(1), k, kQueries, p, kQueries, false);
      matmul(m, cols, width, g, g_row, int64_t(1), v, kQueries, ds, kQueries, false);
      for (int64_t r = 0; r < m; ++r) {
        const T norm = lse[first + r], d = delta[first + r - q_begin];
        const uint64_t words =
            head.dropout ? query_words(head.dropout->seed, head.row + first + r) : 0;
        for (int64_t j = 0; j < cols; j += lanes) {
          Vec<T>& weight = vec(p + r * kQueries + j);
          Vec<T>& slope = vec(ds + r * kQueries + j);
          const Vec<T> e = exp2(weight - norm);
          if (head.dropout) {
            const Vec<T> keep = kept<T>(*head.dropout, words, begin + j);
            slope = e * (slope * keep - d);
            weight = e * keep;
          } else {
            slope = e * (slope - d);
            weight = e;
          }
        }
      }
      const int64_t at_key = (begin - k_begin) * padded;
      matmul(n, padded, m, p, int64_t(1), kQueries, g, g_row, grad_v + at_key, padded,
             first > q_begin);
      matmul(n, padded, m, ds, int64_t(1), kQueries, q, q_row, grad_k + at_key, padded,
             first > q_begin);
      matmul(m, padded, n, ds, kQueries, int64_t(1), keys, kv_row,
             grad_q + (first - q_begin) * padded, padded, begin > k_begin);
    }
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
