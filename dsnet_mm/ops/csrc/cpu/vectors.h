// Vectors of one instruction set, and matrix products whose sums stay in them. The
// kernels that each_isa.h includes include this, again for each, so there is no
// include guard.
//
// Every product is C[m][lanes] += A[m][k] * B[k][lanes] with single elements of A.

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
  // As many 32-bit words, and 16-bit ones, as there are lanes.
  typedef uint32_t words __attribute__((vector_size(lanes * 4), may_alias));
  typedef uint16_t halves
      __attribute__((vector_size(lanes * 2), may_alias, aligned(2)));
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
inline void put(T* to, Vec<T> x) {
  *reinterpret_cast<typename Vector<T>::loose*>(to) = x;
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

// ----------------------------------------------------------- matrix products

// Calls finish(m, v, start(m, v) + vector v of row m of A B), of M rows and V vectors.
// a_m and a_k are the strides of A, b_k that of the rows of B.
template <typename T, int M, int V, typename Start, typename Finish>
inline void tile(int64_t depth, const T* a, int64_t a_m, int64_t a_k, const T* b,
                 int64_t b_k, const Start& start, const Finish& finish) {
  constexpr int lanes = Vector<T>::lanes;
  Vec<T> sum[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = start(m, v);
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
    for (int v = 0; v < V; ++v) finish(m, v, sum[m][v]);
  }
}

// The same for any number of rows.
template <typename T, int V, typename Start, typename Finish>
inline void tiles(int64_t rows, int64_t depth, const T* a, int64_t a_m, int64_t a_k,
                  const T* b, int64_t b_k, const Start& start, const Finish& finish) {
  // Sums and a row of B in 32 registers of 64 bytes, else in 16. Tiles are of
  // nearly equal height: a last one of one row would be slow.
  constexpr int64_t tallest = DSNET_BYTES == 64 && V <= 2 ? 12 : 6;
  const int64_t count = (rows + tallest - 1) / tallest;
  for (int64_t i = 0, first = 0; i < count; ++i) {
    const int64_t height = rows / count + (i < rows % count);
    const T* from = a + first * a_m;
    const auto read = [=](int m, int v) { return start(first + m, v); };
    const auto write = [=](int m, int v, Vec<T> sum) { finish(first + m, v, sum); };
    switch (height) {
#define DSNET_TILE(M)                                            \
  case M:                                                        \
    if constexpr (M <= tallest)                                  \
      tile<T, M, V>(depth, from, a_m, a_k, b, b_k, read, write); \
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
    first += height;
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
