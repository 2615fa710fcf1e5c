// Random numbers of the attention dropout. They are the same on every device and in
// dsnet_mm/ops/plain.py, and no mask is stored:
//
//   words(query) = hash(seed, query)             two words of 32 bits
//   word(query, key) = hash(words(query), key)   one word of 32 bits
//
// A weight is kept, and divided by 1 - p, if its word is not below the threshold p
// 2^32.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSNET_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: the calling conventions of vectors differ among instruction sets.
#define DSNET_INLINE __attribute__((always_inline)) inline
#endif

namespace dsnet {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // p 2^32
  double scale;        // 1 / (1 - p)
};

// SplitMix64 (Steele, Lea, Flood 2014) at position ``query`` of ``seed``.
DSNET_INLINE uint64_t query_words(uint64_t seed, uint64_t query) {
  uint64_t z = seed + (query + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// MurmurHash3's finalizer, with the second word mixed in half way. ``Words`` and
// ``Key`` are uint32_t or vectors of it.
template <typename Words, typename Key>
DSNET_INLINE Words random_word(Words first, Words second, Key key) {
  Words x = first + key * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = ((x ^ (x >> 13)) + second) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

}  // namespace dsnet
