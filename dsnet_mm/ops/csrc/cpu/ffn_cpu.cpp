// dsnet_mm::ffn_ on the CPU: out += fc2(GELU(fc1(x))) of pixels in bfloat16, by AMX.
//
// The hidden layer of a few hundred pixels stays in a core's cache, between the
// products. Weights come in the order in which AMX reads them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "amx.h"
#include "memory.h"

#ifdef DSNET_AMX
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
namespace dsnet {
namespace amx {

constexpr int64_t kPixels = 256;  // that share weights in the cache,
constexpr int64_t kHidden = 256;  // and channels of their hidden layer at a time

struct Layers {
  int64_t in, hidden, out;       // channels
  const Half *w1, *b1, *w2, *b2;  // w[outputs / 16][inputs / 32][16 pairs][16]
};

inline __m512 to_float(const Half* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// x times the share of a normal distribution below x, of which a minimax polynomial
// is u * (c0 + c1 u^2 + ...) + 0.5. The error is below 1.5e-4 for |x| < 6.
constexpr float kEnd = 3.86f;
constexpr float kGelu[] = {3.9827165e-1f,  -6.5110579e-2f, 9.0208165e-3f, -8.6661224e-4f,
                           5.3555625e-5f, -1.8903269e-6f, 2.8693483e-8f};

inline __m512 gelu(__m512 x) {
  const __m512 u = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-kEnd)),
                                 _mm512_set1_ps(kEnd));
  const __m512 s = u * u;
  __m512 y = s * kGelu[6] + kGelu[5];
  for (int i = 4; i >= 0; --i) y = y * s + kGelu[i];
  return x * (y * u + 0.5f);
}

// 32 rows of 32 hidden channels: hidden = GELU(sum + b).
inline void activate(const float* sum, const Half* b, Half* hidden) {
  const __m512 low = to_float(b), high = to_float(b + kSide);
  for (int64_t r = 0; r < kGroup; ++r) {
    const __m512 x = gelu(_mm512_load_ps(sum + r * kGroup) + low);
    const __m512 y = gelu(_mm512_load_ps(sum + r * kGroup + kSide) + high);
    _mm512_store_si512(hidden + r * kDepth, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// Up to kPixels rows.
inline void ffn(const Layers& layers, int64_t count, const Half* x, Half* out,
                char* memory) {
  const auto [in, hidden, width, w1, b1, w2, b2] = layers;
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  Half* a = arena.take<Half>(rows * in);          // [in / 32][row][32]
  Half* h = arena.take<Half>(rows * kHidden);     // [hidden / 32][row][32]
  float* sum = arena.take<float>(rows * width);   // [width / 32][row][32]
  float* p[2] = {arena.take<float>(kGroup * kGroup),
                 arena.take<float>(kGroup * kGroup)};
  pack_rows(count, rows, in, x, in, a);
  for (int64_t begin = 0; begin < hidden; begin += kHidden) {
    const int64_t n = std::min(kHidden, hidden - begin);
    // Activated a step later: what a product has stored can be loaded by then.
    const int64_t steps = n / kGroup * (rows / kGroup);
    const auto position = [&](int64_t i) {
      return std::make_pair(i / (rows / kGroup) * kGroup, i % (rows / kGroup) * kGroup);
    };
    for (int64_t i = 0; i <= steps; ++i) {
      if (i < steps) {
        const auto [j, r] = position(i);
        product(in / kDepth, a + r * kDepth, kDepth, kTile, rows * kDepth,
                w1 + (begin + j) * in, kTile, kSide * in, p[i % 2], kGroup, false);
      }
      if (i > 0) {
        const auto [j, r] = position(i - 1);
        activate(p[(i - 1) % 2], b1 + begin + j, h + j * rows + r * kDepth);
      }
    }
    for (int64_t c = 0; c < width; c += kGroup)
      for (int64_t r = 0; r < rows; r += kGroup)
        product(n / kDepth, h + r * kDepth, kDepth, kTile, rows * kDepth,
                w2 + c * hidden + begin * kSide, kTile, kSide * hidden,
                sum + c * rows + r * kGroup, kGroup, begin > 0);
  }
  for (int64_t c = 0; c < width; c += kGroup) {
    const __m512 low = to_float(b2 + c), high = to_float(b2 + c + kSide);
    const float* s = sum + c * rows;
    for (int64_t r = 0; r < count; ++r, s += kGroup) {
      Half* y = out + r * width + c;
      const __m512 first = to_float(y) + low + _mm512_load_ps(s);
      const __m512 second = to_float(y + kSide) + high + _mm512_load_ps(s + kSide);
      _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
  }
}

}  // namespace amx
}  // namespace dsnet
#pragma GCC pop_options
#endif

namespace dsnet {
namespace {

using at::Tensor;

bool has_amx() {
#ifdef DSNET_AMX
  return amx::available();
#else
  return false;
#endif
}

void ffn_(Tensor& out, const Tensor& x, const Tensor& w1, const Tensor& b1,
          const Tensor& w2, const Tensor& b2) {
  TORCH_CHECK(has_amx(), "ffn_ needs AMX, which is not here");
  const int64_t in = x.dim() == 2 ? x.size(1) : 0, hidden = b1.numel();
  const int64_t width = b2.numel();
  TORCH_CHECK(in > 0 && in % 32 == 0 && hidden % 32 == 0 && width % 32 == 0 &&
                  w1.numel() == in * hidden && w2.numel() == hidden * width &&
                  out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == width,
              "ffn_ takes pixels (P, C) and weights of widths that are multiples of 32, "
              "got ", x.sizes(), ", ", w1.sizes(), ", ", w2.sizes(), " and ", out.sizes());
  for (const Tensor* each : {&std::as_const(out), &x, &w1, &b1, &w2, &b2})
    TORCH_CHECK(each->is_contiguous() && each->scalar_type() == at::kBFloat16,
                "ffn_ takes contiguous tensors of bfloat16");
#ifdef DSNET_AMX
  using amx::Half;
  const amx::Layers layers{in,
                           hidden,
                           width,
                           w1.const_data_ptr<Half>(),
                           b1.const_data_ptr<Half>(),
                           w2.const_data_ptr<Half>(),
                           b2.const_data_ptr<Half>()};
  const Half* from = x.const_data_ptr<Half>();
  Half* to = out.data_ptr<Half>();
  const int64_t count = x.size(0), groups = (count + amx::kGroup - 1) / amx::kGroup;
  const int64_t bytes = amx::kPixels * (2 * in + 2 * amx::kHidden + 4 * width) +
                        8 * amx::kGroup * amx::kGroup + 64 * 8;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    char* memory = scratch(bytes);
    const amx::Configuration configuration;
    const int64_t last = std::min(end * amx::kGroup, count);
    for (int64_t i = begin * amx::kGroup; i < last; i += amx::kPixels)
      amx::ffn(layers, std::min(amx::kPixels, last - i), from + i * in, to + i * width,
               memory);
  });
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("has_amx() -> bool", has_amx);
  m.def(
      "ffn_(Tensor(a!) out, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> ()");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) { m.impl("ffn_", ffn_); }

}  // namespace dsnet
