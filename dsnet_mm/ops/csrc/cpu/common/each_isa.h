// Compiles DSNET_KERNEL, a header without include guard, for each instruction set,
// in a namespace of its own, with DSNET_BYTES the width of a vector. PyTorch's own
// check of the machine (and ATEN_CPU_CAPABILITY) decides which one DSNET_BEST calls.

#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DSNET_X86
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define DSNET_ISA avx512
#define DSNET_BYTES 64
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DSNET_ISA avx2
#define DSNET_BYTES 32
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_BYTES
#pragma GCC pop_options
#endif
#define DSNET_ISA baseline
#define DSNET_BYTES 16
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_BYTES

#ifdef DSNET_X86
namespace dsnet {

// 2 for AVX-512, 1 for AVX2, otherwise 0.
inline int instructions() {
  static const int best = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? 2 : name == "AVX2" ? 1 : 0;
  }();
  return best;
}

// Bytes of a vector of the kernels that DSNET_BEST calls.
inline int64_t vector_bytes() { return 16 << instructions(); }

}  // namespace dsnet
#define DSNET_BEST(KERNEL, ...)      \
  switch (instructions()) {          \
    case 2:                          \
      avx512::KERNEL(__VA_ARGS__);   \
      break;                         \
    case 1:                          \
      avx2::KERNEL(__VA_ARGS__);     \
      break;                         \
    default:                         \
      baseline::KERNEL(__VA_ARGS__); \
  }
#else
namespace dsnet {
inline int instructions() { return 0; }
inline int64_t vector_bytes() { return 16; }
}  // namespace dsnet
#define DSNET_BEST(KERNEL, ...) baseline::KERNEL(__VA_ARGS__)
#endif
