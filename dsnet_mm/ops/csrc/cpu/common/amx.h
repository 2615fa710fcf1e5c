// Matrix products of bfloat16 with float sums, by AMX (Advanced Matrix Extensions) or,
// where a processor has none, by the dot products of AVX512-BF16.
//
//   C[32][32] (+)= sum_k A[32][k] B[k][32]
//
// Operands are in the order of AMX. One of its instructions computes C[16][16] +=
// A[16][32] B[32][16] with all three in tile registers. A tile of A holds 16 rows as
// they lie in memory. A tile of B holds pairs of rows interleaved: [16 pairs][16
// columns][2].
//
// Loop order: k, in steps of 32. Tile registers 0 to 3 are the accumulators, two by
// two; 4 and 5 hold A, 6 and 7 hold B. Operands and results lie in L1 or L2.

#pragma once

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <c10/util/BFloat16.h>

#include <cstring>

#include "memory.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DSNET_AMX  // The compiler knows AMX.
#include <immintrin.h>

// Enclose code that uses AMX. The instruction sets include the AVX-512 of each_isa.h:
// otherwise the compiler would not inline its functions.
#define DSNET_AMX_BEGIN                                                      \
  _Pragma("GCC push_options")                                                \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\")") \
          _Pragma("GCC target(\"avx512bf16,amx-tile,amx-bf16\")")
#define DSNET_AMX_END _Pragma("GCC pop_options")

namespace dsnet {
namespace amx {

// Whether the processor has tiles and the system lets this process use them.
inline bool has_tiles() {
#ifdef __SANITIZE_ADDRESS__
  return false;  // It does not see what tiles load and store.
#endif
  static const bool yes = __builtin_cpu_supports("amx-tile") &&
                          __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();
  return yes;
}

// Whether the processor has the instructions of this file, except those of tiles.
inline bool available() {
  static const bool yes =
      at::get_cpu_capability() == "AVX512" && __builtin_cpu_supports("avx512bf16");
  return yes;
}

}  // namespace amx
}  // namespace dsnet

DSNET_AMX_BEGIN
namespace dsnet {
namespace amx {

using c10::BFloat16;

constexpr int64_t kTileRows = 16;   // Rows of a tile of A and C, columns of one of C.
constexpr int64_t kTileDepth = 32;  // Columns of a tile of A.
constexpr int64_t kTileSize = kTileRows * kTileDepth;  // Numbers in a tile of A or B.
constexpr int64_t kTwoTiles = 2 * kTileRows;  // Rows, and columns, of multiply_2x2.

// While it lives, all tile registers have their full size. Nothing is restored: by the
// ABI no caller may rely on the configuration across a call.
struct TileConfig {
  TileConfig() {
    if (!has_tiles()) return;
    alignas(64) uint8_t full[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) {
      full[16 + 2 * i] = 2 * kTileDepth;  // bytes of a row, a 16-bit number
      full[48 + i] = kTileRows;
    }
    _tile_loadconfig(full);
  }
  ~TileConfig() {
    if (has_tiles()) _tile_release();
  }
};

// Packs ``count`` rows of ``width`` channels as tiles of A: dst[block of 32 channels]
// [row][32]. There are zeros up to ``all`` rows and up to whole blocks of channels.
inline void pack_rows(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                      int64_t src_stride, BFloat16* dst) {
  for (int64_t c = 0; c < width; c += kTileDepth) {
    const int64_t left = width - c;
    const __mmask32 mask = left >= kTileDepth ? ~0u : (1u << left) - 1;
    for (int64_t r = 0; r < count; ++r, dst += kTileDepth)
      _mm512_storeu_si512(dst,
                          _mm512_maskz_loadu_epi16(mask, src + r * src_stride + c));
    std::memset(dst, 0, (all - count) * kTileDepth * sizeof(BFloat16));
    dst += (all - count) * kTileDepth;
  }
}

// multiply_2x2 by vectors: the sums of 8 rows of A and 32 columns of B lie in
// registers.
inline void multiply_vectors(int64_t depth, const BFloat16* a, int64_t a_stride,
                             int64_t a_m, int64_t a_k, const BFloat16* b, int64_t b_k,
                             int64_t b_n, float* c, int64_t c_stride, bool add) {
  constexpr int64_t M = 8;
  for (int64_t i = 0; i < kTwoTiles; i += M, c += M * c_stride) {
    const BFloat16* rows = a + i / kTileRows * a_m + i % kTileRows * a_stride;
    __m512 sums[M][2];
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int64_t n = 0; n < 2; ++n)
        sums[m][n] = add ? _mm512_loadu_ps(c + m * c_stride + n * kTileRows) : __m512{};
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t pair = 0; pair < kTileDepth; pair += 2) {
        const BFloat16* at = b + k * b_k + pair * kTileRows;
        const auto low = (__m512bh)_mm512_loadu_si512(at);
        const auto high = (__m512bh)_mm512_loadu_si512(at + b_n);
#pragma GCC unroll 8
        for (int64_t m = 0; m < M; ++m) {
          int two;
          std::memcpy(&two, rows + k * a_k + m * a_stride + pair, sizeof(two));
          const auto x = (__m512bh)_mm512_set1_epi32(two);
          sums[m][0] = _mm512_dpbf16_ps(sums[m][0], x, low);
          sums[m][1] = _mm512_dpbf16_ps(sums[m][1], x, high);
        }
      }
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int64_t n = 0; n < 2; ++n)
        _mm512_storeu_ps(c + m * c_stride + n * kTileRows, sums[m][n]);
  }
}

// C[32][32] = sum of A B over ``depth`` tiles, added to C if ``add``. a_m and a_k are
// the strides from tile to tile of A, b_k and b_n those of B; a_stride and c_stride are
// the strides of the rows of A and C. All strides count numbers.
inline void multiply_2x2(int64_t depth, const BFloat16* a, int64_t a_stride,
                         int64_t a_m, int64_t a_k, const BFloat16* b, int64_t b_k,
                         int64_t b_n, float* c, int64_t c_stride, bool add) {
  if (!has_tiles())
    return multiply_vectors(depth, a, a_stride, a_m, a_k, b, b_k, b_n, c, c_stride,
                            add);
  const int64_t c_bytes = c_stride * sizeof(float);
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles read memory.
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTileRows, c_bytes);
    _tile_loadd(2, c + kTileRows * c_stride, c_bytes);
    _tile_loadd(3, c + kTileRows * c_stride + kTileRows, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, a + k * a_k, a_stride * sizeof(BFloat16));
    _tile_loadd(5, a + k * a_k + a_m, a_stride * sizeof(BFloat16));
    _tile_loadd(6, b + k * b_k, kTileDepth * sizeof(BFloat16));
    _tile_loadd(7, b + k * b_k + b_n, kTileDepth * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTileRows, c_bytes);
  _tile_stored(2, c + kTileRows * c_stride, c_bytes);
  _tile_stored(3, c + kTileRows * c_stride + kTileRows, c_bytes);
}

}  // namespace amx
}  // namespace dsnet
DSNET_AMX_END
#endif
