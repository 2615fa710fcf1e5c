// Compiles one kernel header for several instruction sets and chooses among them.
//
// Define DSNET_KERNEL as the path of the header, then include this file. The header is
// included once for each instruction set, so it has no include guard. Each time, two
// macros are defined:
//   DSNET_ISA           the namespace of the functions: avx512, avx2 or baseline
//   DSNET_VECTOR_BYTES  the size of a vector register: 64, 32 or 16
// DSNET_BEST(kernel) is the kernel of the best of them that this processor runs.
// ATEN_CPU_CAPABILITY limits the choice, as it does for PyTorch's own kernels.
//
// DSNET_FLOAT_OR_BFLOAT16(type, name, lambda) calls the lambda with scalar_t as one of
// these types, as PyTorch's AT_DISPATCH macros do.

#include <ATen/Dispatch.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "memory.h"

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

namespace dsnet {

// 2 for AVX-512, 1 for AVX2, otherwise 0.
inline int isa_level() {
#ifdef DSNET_X86
  static const int level = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? 2 : name == "AVX2" ? 1 : 0;
  }();
  return level;
#else
  return 0;
#endif
}

}  // namespace dsnet

#ifdef DSNET_X86
#define DSNET_BEST(...)                     \
  (isa_level() == 2   ? avx512::__VA_ARGS__ \
   : isa_level() == 1 ? avx2::__VA_ARGS__   \
                      : baseline::__VA_ARGS__)
#else
#define DSNET_BEST(...) baseline::__VA_ARGS__
#endif

#define DSNET_FLOAT_OR_BFLOAT16(TYPE, NAME, ...)               \
  AT_DISPATCH_SWITCH(TYPE, NAME,                               \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
