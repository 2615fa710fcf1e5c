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

// ------------------------------------------------------------ 2^x for x <= 0

inline Vec<float> exp2(Vec<float> x) {
  x = larger<float>(Vec<float>{} - 125.f, x);  // denormal results would be slow
#if DSNET_BYTES == 64
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  // Minimax on [0, 1], relative error 7.5e-8.
  Vec<float> y = f * 1.8775670e-3f + 8.9893634e-3f;
  y = y * f + 5.5826299e-2f;
  y = y * f + 2.4015362e-1f;
  y = y * f + 6.9315307e-1f;
  y = y * f + 9.9999993e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
#else
  using bits = Vector<float>::bits;
  constexpr float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds
  const Vec<float> rounded = x + shift;
  const Vec<float> f = x - (rounded - shift);
  // Minimax on [-0.5, 0.5], relative error 7.5e-8.
  Vec<float> y = f * 1.3276471520e-3f + 9.6755413307e-3f;
  y = y * f + 5.5507132750e-2f;
  y = y * f + 2.4022119724e-1f;
  y = y * f + 6.9314696706e-1f;
  y = y * f + 1.0000000717f;
  return (Vec<float>)((bits)y + ((bits)rounded << 23));
#endif
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
      for (int i = 0; i < n; ++i) x[i] = loose(src + (r + i) * src_row + c);
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
