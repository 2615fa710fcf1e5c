// Vector registers of one instruction set, and the matrix product of all kernels.
//
//   C[m][n] = init[m][n] + sum_k A[m][k] B[k][n]
//
// Loop order: tiles of rows m; within a tile, k; within k, all vectors of the tile.
// Registers: the accumulators of the tile, M rows of V vectors along n, and one row of
// V vectors of B. Elements of A are broadcast from memory. A and B lie in L1 or L2:
// callers choose their extents accordingly.
//
// The kernels that each_isa.h includes include this file, once for each instruction
// set, so it has no include guard.

namespace dsnet {
namespace DSNET_ISA {

template <typename T>
struct Vector {
  static constexpr int lanes = DSNET_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(DSNET_VECTOR_BYTES), may_alias));
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits bits __attribute__((vector_size(DSNET_VECTOR_BYTES), may_alias));
  // The same in memory that is aligned to 4 bytes only.
  typedef T unaligned
      __attribute__((vector_size(DSNET_VECTOR_BYTES), may_alias, aligned(4)));
  // As many integers of 32 bits, and of 16 bits, as there are lanes.
  typedef uint32_t words __attribute__((vector_size(lanes * 4), may_alias));
  typedef uint16_t halves
      __attribute__((vector_size(lanes * 2), may_alias, aligned(2)));
};

template <typename T>
using Vec = typename Vector<T>::type;

// The vector at an address that is aligned to a whole vector.
template <typename T>
inline Vec<T>& vec(T* x) {
  return *reinterpret_cast<Vec<T>*>(x);
}

template <typename T>
inline const Vec<T>& vec(const T* x) {
  return *reinterpret_cast<const Vec<T>*>(x);
}

// Loads and stores a vector at an address that need not be aligned.
template <typename T>
inline Vec<T> loadu(const T* x) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(x);
}

template <typename T>
inline void storeu(T* to, Vec<T> x) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = x;
}

// Rounds n up to a multiple of the lanes.
template <typename T>
constexpr int64_t pad(int64_t n) {
  return round_up(n, Vector<T>::lanes);
}

// The larger of a and b in each lane; b if one of them is NaN.
template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if DSNET_VECTOR_BYTES == 64
  // The compiler makes three instructions of the expression below.
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// ------------------------------------------------------------ 2^x for x <= 0

inline Vec<float> exp2(Vec<float> x) {
  x = maximum<float>(Vec<float>{} - 125.f, x);  // Denormal results would be slow.
#if DSNET_VECTOR_BYTES == 64
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  // Minimax polynomial on [0, 1], relative error 7.5e-8.
  Vec<float> y = f * 1.8775670e-3f + 8.9893634e-3f;
  y = y * f + 5.5826299e-2f;
  y = y * f + 2.4015362e-1f;
  y = y * f + 6.9315307e-1f;
  y = y * f + 9.9999993e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
#else
  using bits = Vector<float>::bits;
  constexpr float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to integers.
  const Vec<float> rounded = x + shift;
  const Vec<float> f = x - (rounded - shift);
  // Minimax polynomial on [-0.5, 0.5], relative error 7.5e-8.
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
  x = maximum<double>(Vec<double>{} - 1022., x);
  const Vec<double> rounded = x + shift;
  const Vec<double> f = (x - (rounded - shift)) * 0.69314718055994530942;
  Vec<double> y = Vec<double>{} + 1.;
  for (int n = 13; n > 0; --n) y = y * f * (1. / n) + 1.;  // Taylor series
  return (Vec<double>)((bits)y + ((bits)rounded << 52));
}

// ------------------------------------------------------------------ transpose

// dst[c][r] = src[r][c], for ``rows`` and ``cols`` that are multiples of the lanes. A
// square of lanes by lanes elements lies in registers: its off-diagonal blocks are
// swapped, first those of one element, then of two, and so on.
template <typename T>
void transpose(int64_t rows, int64_t cols, const T* src, int64_t src_stride, T* dst,
               int64_t dst_stride) {
#ifdef __clang__
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      dst[c * dst_stride + r] = src[r * src_stride + c];
#else
  constexpr int n = Vector<T>::lanes;
  using bits = typename Vector<T>::bits;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < cols; c += n) {
      Vec<T> x[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) x[i] = loadu(src + (r + i) * src_stride + c);
    // Swaps the off-diagonal blocks of s by s elements.
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
      for (int i = 0; i < n; ++i) vec(dst + (c + i) * dst_stride + r) = x[i];
    }
#endif
}

// ----------------------------------------------------------- matrix products

// One tile of C: M rows of V vectors. init(m, v) returns the value from which an
// accumulator starts, and epilogue(m, v, sum) receives the result. a_m and a_k are the
// strides of A, b_k is the stride of the rows of B.
template <typename T, int M, int V, typename Init, typename Epilogue>
inline void multiply_tile(int64_t depth, const T* a, int64_t a_m, int64_t a_k,
                          const T* b, int64_t b_k, const Init& init,
                          const Epilogue& epilogue) {
  constexpr int lanes = Vector<T>::lanes;
  Vec<T> sum[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = init(m, v);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = loadu(b + k * b_k + v * lanes);
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
    for (int v = 0; v < V; ++v) epilogue(m, v, sum[m][v]);
  }
}

// The same for any number of rows, tile by tile.
template <typename T, int V, typename Init, typename Epilogue>
inline void multiply_tiles(int64_t rows, int64_t depth, const T* a, int64_t a_m,
                           int64_t a_k, const T* b, int64_t b_k, const Init& init,
                           const Epilogue& epilogue) {
  // The accumulators and a row of B fill 32 registers of 64 bytes, otherwise 16. Tiles
  // have nearly equal numbers of rows: a last tile of one row would be slow.
  constexpr int64_t max_rows = DSNET_VECTOR_BYTES == 64 && V <= 2 ? 12 : 6;
  const int64_t count = (rows + max_rows - 1) / max_rows;
  for (int64_t i = 0, first = 0; i < count; ++i) {
    const int64_t height = rows / count + (i < rows % count);
    const T* a_tile = a + first * a_m;
    const auto tile_init = [=](int m, int v) { return init(first + m, v); };
    const auto tile_epilogue = [=](int m, int v, Vec<T> sum) {
      epilogue(first + m, v, sum);
    };
    switch (height) {
#define DSNET_TILE(M)                                                    \
  case M:                                                                \
    if constexpr (M <= max_rows)                                         \
      multiply_tile<T, M, V>(depth, a_tile, a_m, a_k, b, b_k, tile_init, \
                             tile_epilogue);                             \
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
