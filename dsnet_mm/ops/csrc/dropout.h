// Random numbers of the attention dropout, the same on every device and in
// dsnet_mm/ops/reference.py: a hash of (seed, query) gives a query two words,
// a hash of these and the key's index gives a weight its word.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSNET_INLINE __host__ __device__ __forceinline__
#else
// Always: a call would pass vectors by another convention.
#define DSNET_INLINE __attribute__((always_inline)) inline
#endif

namespace dsnet {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // a weight stays if its word is not below
  double scale;        // of the weights that stay, 1 / (1 - p)
};

// SplitMix64 (Steele, Lea, Flood 2014) at position ``query`` of ``seed``.
DSNET_INLINE uint64_t query_words(uint64_t seed, uint64_t query) {
  uint64_t z = seed + (query + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// MurmurHash3's finalizer with the second word mixed in half way; ``Words``
// is uint32_t or a vector of it, and so is ``Key``.
template <typename Words, typename Key>
DSNET_INLINE Words random_word(Words first, Words second, Key key) {
  Words x = first + key * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = ((x ^ (x >> 13)) + second) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

}  // namespace dsnet
