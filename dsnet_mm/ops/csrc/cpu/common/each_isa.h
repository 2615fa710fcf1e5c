// Compiles one kernel header for several instruction sets and chooses among them.
//
// Define DSNET_KERNEL as the path of the header, then include this file. The header is
// included once for each instruction set, so it has no include guard. Each time, two
// macros are defined:
//   DSNET_ISA           the namespace of the functions: avx512, avx2 or baseline
//   DSNET_VECTOR_BYTES  the size of a vector register: 64, 32 or 16
// DSNET_DISPATCH(kernel, args...) calls the best of them that this processor runs.
// ATEN_CPU_CAPABILITY limits the choice, as it does for PyTorch's own kernels.

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
#define DSNET_VECTOR_BYTES 64
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DSNET_ISA avx2
#define DSNET_VECTOR_BYTES 32
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_VECTOR_BYTES
#pragma GCC pop_options
#endif
#define DSNET_ISA baseline
#define DSNET_VECTOR_BYTES 16
#include DSNET_KERNEL
#undef DSNET_ISA
#undef DSNET_VECTOR_BYTES

#ifdef DSNET_X86
namespace dsnet {

// 2 for AVX-512, 1 for AVX2, otherwise 0.
inline int isa_level() {
  static const int level = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? 2 : name == "AVX2" ? 1 : 0;
  }();
  return level;
}

}  // namespace dsnet
#define DSNET_DISPATCH(KERNEL, ...)  \
  switch (isa_level()) {             \
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
inline int isa_level() { return 0; }
}  // namespace dsnet
#define DSNET_DISPATCH(KERNEL, ...) baseline::KERNEL(__VA_ARGS__)
#endif

namespace dsnet {

// The size of a vector register in the kernels that DSNET_DISPATCH calls.
inline int64_t vector_bytes() { return 16 << isa_level(); }

}  // namespace dsnet
