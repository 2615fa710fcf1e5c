// One row of a depth-wise 3x3 convolution, for one instruction set. Included by
// each_isa.h. The equation is in depthwise_cpu.cpp.
//
// Loop order: blocks of channels, as many as fill one or two vectors; within a block,
// pixels from left to right. Registers: the nine taps of the block, and the sums of
// three output pixels. An input pixel is loaded once and added to all three. The three
// input rows of a block come from L1 or L2.

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// Loads as many elements of S as V has lanes, or one, as float.
template <typename V, typename S>
inline V load(const S* x) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*x);
  } else if constexpr (std::is_same_v<S, float>) {
    return loadu(x);
  } else {
#if DSNET_VECTOR_BYTES == 64
    // The compiler would make four instructions of the conversion below.
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#endif
    using words = Vector<float>::words;
    using halves = Vector<float>::halves;
    return (V)(__builtin_convertvector(*reinterpret_cast<const halves*>(x), words)
               << 16);
  }
}

// Stores them, rounded to nearest even.
template <typename V, typename S>
inline void store(V y, S* x) {
  if constexpr (std::is_same_v<V, float>) {
    *x = static_cast<S>(y);
  } else if constexpr (std::is_same_v<S, float>) {
    storeu(x, y);
  } else {
    using words = Vector<float>::words;
    using halves = Vector<float>::halves;
    const words bits = (words)y, rounded = bits + 0x7FFF + (bits >> 16 & 1);
    const words number = y == y ? rounded : bits | 0x400000;  // NaN remains NaN.
    *reinterpret_cast<halves*>(x) = __builtin_convertvector(number >> 16, halves);
  }
}

// Convolves the first K vectors of channels, or the first channel, of a row.
template <typename V, int K, typename S>
inline void convolve(const InputRows<S>& in, int64_t width, int64_t channels,
                     const float* taps, const float* offsets, S* out) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  // The sums of output pixels i - 1 and i, and below i + 1, when pixel i is loaded.
  V w[9][K], previous[K]{}, current[K]{};
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) w[i][k] = load<V>(taps + i * channels + k * lanes);
  for (int64_t i = 0; i <= width; ++i) {
    V next[K]{};
    if (i < width) {
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
          const V x = load<V>(in.rows[j] + i * in.strides[j] + k * lanes);
          previous[k] += x * w[3 * j + 2][k];
          current[k] += x * w[3 * j + 1][k];
          next[k] += x * w[3 * j][k];
        }
    }
    const float* offset = offsets + ((i == 1) + 2 * (i == width)) * channels;
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      if (i > 0)
        store(previous[k] + load<V>(offset + k * lanes),
              out + (i - 1) * channels + k * lanes);
      previous[k] = current[k];
      current[k] = next[k];
    }
  }
}

template <typename S>
void convolve_row(InputRows<S> in, int64_t width, int64_t channels, const float* taps,
                  const float* offsets, S* out) {
  constexpr int lanes = Vector<float>::lanes;
  // Taps and sums of two vectors fit in 32 registers, of one vector in 16.
  constexpr int max_vectors = DSNET_VECTOR_BYTES == 64 ? 2 : 1;
  for (int64_t c = 0; c < channels;) {
    const int64_t left = channels - c;
    const auto run = left >= max_vectors * lanes ? convolve<Vec<float>, max_vectors, S>
                     : left >= lanes             ? convolve<Vec<float>, 1, S>
                                                 : convolve<float, 1, S>;
    const int step = left >= max_vectors * lanes ? max_vectors * lanes
                     : left >= lanes             ? lanes
                                                 : 1;
    run(in, width, channels, taps + c, offsets + c, out + c);
    for (int j = 0; j < 3; ++j) in.rows[j] += in.strides[j] ? step : 0;
    c += step;
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
