// Matrix products of bfloat16 by AMX, which computes C[16][16] += A[16][32] * B[32][16]
// in one instruction, where A is rows as they lie in memory and B has pairs of rows
// side by side.

#pragma once

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <c10/util/BFloat16.h>

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DSNET_AMX  // can be compiled
#include <immintrin.h>
#ifdef DSNET_AMX_ON_CPU  // a build for tests, see setup.py
#include "amx_on_cpu.h"
#endif

// Around code that uses it. With fewer instructions than the AVX-512 of each_isa.h
// nothing of that would be inlined.
#define DSNET_AMX_BEGIN                                                      \
  _Pragma("GCC push_options")                                                \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\")") \
          _Pragma("GCC target(\"avx512bf16,amx-tile,amx-bf16\")")
#define DSNET_AMX_END _Pragma("GCC pop_options")

namespace dsnet {
namespace amx {

// Whether the processor has tiles and the system lets this process use them.
inline bool has_tiles() {
#ifdef DSNET_AMX_ON_CPU
  return true;
#else
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         at::cpu::init_amx();
#endif
}

inline bool available() {
  static const bool yes = at::get_cpu_capability() == "AVX512" &&
                          __builtin_cpu_supports("avx512bf16") && has_tiles();
  return yes;
}

}  // namespace amx
}  // namespace dsnet

DSNET_AMX_BEGIN
namespace dsnet {
namespace amx {

using c10::BFloat16;

constexpr int64_t kSide = 16;   // rows of a tile, and columns of C
constexpr int64_t kDepth = 32;  // columns of A
constexpr int64_t kTile = kSide * kDepth;
constexpr int64_t kGroup = 2 * kSide;  // rows, and columns, of a product

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// All tiles of full size while it lives. Nobody may rely on the configuration across
// a call, says the ABI, so nothing is restored.
struct Configuration {
  Configuration() {
    alignas(64) uint8_t full[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) {
      full[16 + 2 * i] = 2 * kDepth;  // bytes of a row, 16 bits
      full[48 + i] = kSide;
    }
    _tile_loadconfig(full);
  }
  ~Configuration() { _tile_release(); }
};

// Rows of 32 channels, zeros around: dst[block of channels][row][32].
inline void pack_rows(int64_t count, int64_t all, int64_t width, const BFloat16* src,
                      int64_t src_row, BFloat16* dst) {
  for (int64_t c = 0; c < width; c += kDepth) {
    const int64_t left = width - c;
    const __mmask32 mask = left >= kDepth ? ~0u : (1u << left) - 1;
    for (int64_t r = 0; r < count; ++r, dst += kDepth)
      _mm512_storeu_si512(dst, _mm512_maskz_loadu_epi16(mask, src + r * src_row + c));
    std::memset(dst, 0, (all - count) * kDepth * sizeof(BFloat16));
    dst += (all - count) * kDepth;
  }
}

// C[2 * 16][2 * 16] = sum over ``depth`` tiles of A B, added to C if ``add``. Strides
// from tile to tile: a_m and a_k of A, b_k and b_n of B; ``a_row`` is that of the
// rows of A, all in numbers.
inline void product(int64_t depth, const BFloat16* a, int64_t a_row, int64_t a_m,
                    int64_t a_k, const BFloat16* b, int64_t b_k, int64_t b_n, float* c,
                    int64_t c_row, bool add) {
  const int64_t c_bytes = c_row * sizeof(float);
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles are read from it
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kSide, c_bytes);
    _tile_loadd(2, c + kSide * c_row, c_bytes);
    _tile_loadd(3, c + kSide * c_row + kSide, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, a + k * a_k, a_row * sizeof(BFloat16));
    _tile_loadd(5, a + k * a_k + a_m, a_row * sizeof(BFloat16));
    _tile_loadd(6, b + k * b_k, kDepth * sizeof(BFloat16));
    _tile_loadd(7, b + k * b_k + b_n, kDepth * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kSide, c_bytes);
  _tile_stored(2, c + kSide * c_row, c_bytes);
  _tile_stored(3, c + kSide * c_row + kSide, c_bytes);
}

}  // namespace amx
}  // namespace dsnet
DSNET_AMX_END
#endif
