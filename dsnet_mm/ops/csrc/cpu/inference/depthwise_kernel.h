// Rows of a depth-wise 3x3 convolution, for one instruction set: included by
// each_isa.h.

#include "../common/vectors.h"

namespace dsnet {
namespace DSNET_ISA {

// As many elements of S as V has lanes, or one, in float.
template <typename V, typename S>
inline V read(const S* x) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*x);
  } else if constexpr (std::is_same_v<S, float>) {
    return loose(x);
  } else {
#if DSNET_BYTES == 64
    // The compiler would make four instructions of the first.
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#endif
    using words = Vector<float>::words;
    using halves = Vector<float>::halves;
    return (V)(__builtin_convertvector(*reinterpret_cast<const halves*>(x), words)
               << 16);
  }
}

template <typename V, typename S>
inline void write(V y, S* x) {
  if constexpr (std::is_same_v<V, float>) {
    *x = static_cast<S>(y);
  } else if constexpr (std::is_same_v<S, float>) {
    put(x, y);
  } else {
    using words = Vector<float>::words;
    using halves = Vector<float>::halves;
    const words bits = (words)y, rounded = bits + 0x7FFF + (bits >> 16 & 1);
    const words number = y == y ? rounded : bits | 0x400000;
    *reinterpret_cast<halves*>(x) = __builtin_convertvector(number >> 16, halves);
  }
}

// K vectors of channels, or one channel, from the first on. A pixel that was read is in
// the sums of three.
template <typename V, int K, typename S>
inline void convolve(const Row<S>& row, int64_t width, int64_t channels,
                     const float* taps, const float* constants, S* out) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  V w[9][K], left[K]{}, here[K]{};
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) w[i][k] = read<V>(taps + i * channels + k * lanes);
  for (int64_t i = 0; i <= width; ++i) {
    V right[K]{};
    if (i < width) {
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
          const V x = read<V>(row.lines[j] + i * row.strides[j] + k * lanes);
          left[k] += x * w[3 * j + 2][k];
          here[k] += x * w[3 * j + 1][k];
          right[k] += x * w[3 * j][k];
        }
    }
    const float* more = constants + ((i == 1) + 2 * (i == width)) * channels;
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      if (i > 0)
        write(left[k] + read<V>(more + k * lanes),
              out + (i - 1) * channels + k * lanes);
      left[k] = here[k];
      here[k] = right[k];
    }
  }
}

template <typename S>
void convolve_row(Row<S> row, int64_t width, int64_t channels, const float* taps,
                  const float* constants, S* out) {
  constexpr int lanes = Vector<float>::lanes;
  constexpr int most = DSNET_BYTES == 64 ? 2 : 1;  // of 32 registers, or of 16
  for (int64_t c = 0; c < channels;) {
    const int64_t left = channels - c;
    const auto run = left >= most * lanes ? convolve<Vec<float>, most, S>
                     : left >= lanes      ? convolve<Vec<float>, 1, S>
                                          : convolve<float, 1, S>;
    const int step = left >= most * lanes ? most * lanes : left >= lanes ? lanes : 1;
    run(row, width, channels, taps + c, constants + c, out + c);
    for (int j = 0; j < 3; ++j) row.lines[j] += row.strides[j] ? step : 0;
    c += step;
  }
}

}  // namespace DSNET_ISA
}  // namespace dsnet
