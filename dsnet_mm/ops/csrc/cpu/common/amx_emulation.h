// The instructions of AMX that the kernels use, in plain C++. amx.h includes this file
// if DSNET_EMULATE_AMX is defined, as in the build of ``make test-asan``: that build
// runs the kernels on machines without AMX, and AddressSanitizer sees what tiles load
// and store.
//
// As the processor does, each thread has eight tiles of up to 16 rows of 64 bytes. A
// tile that is used before it is configured ends the process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Tile {
  int rows = 0, bytes = 0;  // of a row
  alignas(64) char data[16][64];

  float* floats(int row) { return reinterpret_cast<float*>(data[row]); }

  // Pair ``i`` of a row holds two bfloat16 numbers, the first in the lower half.
  float number(int row, int pair, bool second) const {
    uint32_t bits;
    std::memcpy(&bits, data[row] + 4 * pair, 4);
    bits = second ? bits & 0xFFFF0000u : bits << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

inline thread_local Tile tiles[8];

inline Tile& tile(int i) {
  if (tiles[i].rows == 0) std::abort();
  return tiles[i];
}

// Bytes 16 to 31 hold the lengths of rows, 48 to 55 the numbers of rows.
inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; ++i) {
    tiles[i].rows = bytes[48 + i];
    tiles[i].bytes = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i];
    std::memset(tiles[i].data, 0, sizeof(tiles[i].data));
  }
}

inline void release() {
  for (Tile& tile : tiles) tile.rows = 0;
}

inline void zero(int i) { std::memset(tile(i).data, 0, sizeof(tile(i).data)); }

inline void load(int i, const void* from, int64_t stride) {
  Tile& to = tile(i);
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.data[r], static_cast<const char*>(from) + r * stride, to.bytes);
}

inline void store(int i, void* to, int64_t stride) {
  Tile& from = tile(i);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, from.data[r], from.bytes);
}

// C[m][n] += A[m][k] * B[k][n], summed over pairs of bfloat16 numbers.
inline void multiply(int c_tile, int a_tile, int b_tile) {
  Tile &c = tile(c_tile), &a = tile(a_tile), &b = tile(b_tile);
  for (int k = 0; k < a.bytes / 4; ++k) {
    float first[16], second[16];
    for (int n = 0; n < 16; ++n) first[n] = b.number(k, n, false);
    for (int n = 0; n < 16; ++n) second[n] = b.number(k, n, true);
    for (int m = 0; m < c.rows; ++m) {
      const float x = a.number(m, k, false), y = a.number(m, k, true);
      float* sums = c.floats(m);
      for (int n = 0; n < c.bytes / 4; ++n) sums[n] += x * first[n] + y * second[n];
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbf16ps amx_emulation::multiply
