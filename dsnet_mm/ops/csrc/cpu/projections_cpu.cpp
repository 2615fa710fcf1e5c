// Projections of pixels in bfloat16 on the CPU, by AMX, without gradients:
// dsnet_mm::linear_, out = W x + b or out += W x + b, and
// dsnet_mm::ffn_, out += W2 GELU(W1 x + b1) + b2, whose hidden layer stays in a core's
// cache, a few hundred pixels at a time.
//
// Weights come in the order in which AMX reads them, pairs of inputs for each output:
// [C_out / 16][C_in / 32][16 pairs][16 outputs][2].

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "amx.h"
#include "memory.h"

#ifdef DSNET_AMX
DSNET_AMX_BEGIN
namespace dsnet {
namespace amx {

constexpr int64_t kPixels = 256;  // that share weights in the cache,
constexpr int64_t kHidden = 256;  // and channels of their hidden layer at a time

struct Layer {
  int64_t in, out;
  const BFloat16 *w, *b;  // b may be null
};

inline __m512 to_float(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// x times the share of a normal distribution below x, of which a minimax polynomial
// is 0.5 + u * (c0 + c1 u^2 + ...). The error is below 1.5e-4 for |x| < 6.
inline __m512 gelu(__m512 x) {
  constexpr float c[] = {3.9827165e-1f, -6.5110579e-2f, 9.0208165e-3f, -8.6661224e-4f,
                         5.3555625e-5f, -1.8903269e-6f, 2.8693483e-8f};
  // The smaller of |x| and where the polynomial ends, with the sign of x.
  const __m512 u = _mm512_range_ps(x, _mm512_set1_ps(3.86f), 2);
  const __m512 s = u * u;
  __m512 y = s * c[6] + c[5];
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) y = y * s + c[i];
  return x * (y * u + 0.5f);
}

// Calls finish(product, channel, row) for each 32 rows of 32 channels of W x, a step
// later: what a product has stored can be loaded by then. ``a`` is x by pack_rows.
template <typename Finish>
inline void multiply(int64_t rows, int64_t in, int64_t out, const BFloat16* a,
                     const BFloat16* w, float* p, const Finish& finish) {
  constexpr int64_t kSize = kGroup * kGroup;
  const int64_t groups = rows / kGroup, steps = out / kGroup * groups;
  for (int64_t i = 0; i <= steps; ++i) {
    if (i < steps)
      product(in / kDepth, a + i % groups * kGroup * kDepth, kDepth, kTile,
              rows * kDepth, w + i / groups * kGroup * in, kTile, kSide * in,
              p + i % 2 * kSize, kGroup, false);
    if (i > 0)
      finish(p + (i - 1) % 2 * kSize, (i - 1) / groups * kGroup,
             (i - 1) % groups * kGroup);
  }
}

// out = sum + b, of up to 32 rows of 32 channels, added to out if ``add``.
inline void write(const float* sum, int64_t count, const BFloat16* b, bool add,
                  BFloat16* out, int64_t out_row) {
  const __m512 low = b ? to_float(b) : __m512{};
  const __m512 high = b ? to_float(b + kSide) : __m512{};
  for (int64_t r = 0; r < count; ++r, sum += kGroup, out += out_row) {
    __m512 x = _mm512_load_ps(sum) + low, y = _mm512_load_ps(sum + kSide) + high;
    if (add) {
      x += to_float(out);
      y += to_float(out + kSide);
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// hidden = GELU(sum + b), of 32 rows of 32 channels.
inline void activate(const float* sum, const BFloat16* b, BFloat16* hidden) {
  const __m512 low = to_float(b), high = to_float(b + kSide);
  for (int64_t r = 0; r < kGroup; ++r, sum += kGroup, hidden += kDepth) {
    const __m512 x = gelu(_mm512_load_ps(sum) + low);
    const __m512 y = gelu(_mm512_load_ps(sum + kSide) + high);
    _mm512_store_si512(hidden, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// Up to kPixels rows.
inline void linear(const Layer& fc, bool add, int64_t count, const BFloat16* x,
                   BFloat16* out, char* memory) {
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  BFloat16* a = arena.take<BFloat16>(rows * fc.in);
  float* p = arena.take<float>(2 * kGroup * kGroup);
  pack_rows(count, rows, fc.in, x, fc.in, a);
  multiply(rows, fc.in, fc.out, a, fc.w, p,
           [&](const float* sum, int64_t c, int64_t r) {
             write(sum, std::min(kGroup, count - r), fc.b ? fc.b + c : nullptr, add,
                   out + r * fc.out + c, fc.out);
           });
}

// Up to kPixels rows.
inline void ffn(const Layer& fc1, const Layer& fc2, int64_t count, const BFloat16* x,
                BFloat16* out, char* memory) {
  const int64_t rows = round_up(count, kGroup);
  Arena arena(memory);
  BFloat16* a = arena.take<BFloat16>(rows * fc1.in);
  BFloat16* h = arena.take<BFloat16>(rows * kHidden);
  float* p = arena.take<float>(2 * kGroup * kGroup);
  float* sum = arena.take<float>(rows * fc2.out);  // [out / 32][row][32]
  pack_rows(count, rows, fc1.in, x, fc1.in, a);
  for (int64_t begin = 0; begin < fc1.out; begin += kHidden) {
    const int64_t n = std::min(kHidden, fc1.out - begin);
    multiply(rows, fc1.in, n, a, fc1.w + begin * fc1.in, p,
             [&](const float* part, int64_t c, int64_t r) {
               activate(part, fc1.b + begin + c, h + c * rows + r * kDepth);
             });
    for (int64_t c = 0; c < fc2.out; c += kGroup)
      for (int64_t r = 0; r < rows; r += kGroup)
        product(n / kDepth, h + r * kDepth, kDepth, kTile, rows * kDepth,
                fc2.w + c * fc2.in + begin * kSide, kTile, kSide * fc2.in,
                sum + c * rows + r * kGroup, kGroup, begin > 0);
  }
  for (int64_t c = 0; c < fc2.out; c += kGroup)
    write(sum + c * rows, count, fc2.b + c, true, out + c, fc2.out);
}

}  // namespace amx
}  // namespace dsnet
DSNET_AMX_END
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

#ifdef DSNET_AMX

using amx::BFloat16;

const BFloat16* read(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kBFloat16,
              "projections take contiguous tensors of bfloat16, got ", x.scalar_type(),
              " of ", x.sizes());
  return x.const_data_ptr<BFloat16>();
}

amx::Layer layer(const Tensor& w, const Tensor* b) {
  TORCH_CHECK(w.dim() == 5 && w.numel() > 0 && w.size(2) == 16 && w.size(3) == 16 &&
                  w.size(4) == 2 && w.size(0) % 2 == 0 &&
                  (!b || b->numel() == 16 * w.size(0)),
              "projections take weights (C_out / 16, C_in / 32, 16, 16, 2), C_out a "
              "multiple of 32, and biases (C_out,), got ",
              w.sizes());
  return {32 * w.size(1), 16 * w.size(0), read(w), b ? read(*b) : nullptr};
}

// Calls task(count, x, out, memory) for all pixels, a few hundred at a time.
template <typename Task>
void each(const Tensor& x, int64_t in, Tensor& out, int64_t width, int64_t bytes,
          const Task& task) {
  TORCH_CHECK(has_amx(), "projections in bfloat16 need AMX, which is not here");
  TORCH_CHECK(x.dim() > 0 && out.dim() == x.dim() && x.size(-1) == in &&
                  out.size(-1) == width && x.numel() / in == out.numel() / width,
              "projections take pixels (..., C_in) to (..., C_out), here ", in, " to ",
              width, " channels, got ", x.sizes(), " and ", out.sizes());
  const BFloat16* from = read(x);
  read(out);
  BFloat16* to = out.data_ptr<BFloat16>();
  const int64_t count = x.numel() / in,
                groups = (count + amx::kGroup - 1) / amx::kGroup;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    char* memory = scratch(bytes);
    const amx::Configuration configuration;
    const int64_t last = std::min(end * amx::kGroup, count);
    for (int64_t i = begin * amx::kGroup; i < last; i += amx::kPixels)
      task(std::min(amx::kPixels, last - i), from + i * in, to + i * width, memory);
  });
}

void linear_(Tensor& out, const Tensor& x, const Tensor& w,
             const std::optional<Tensor>& b, bool add) {
  const amx::Layer fc = layer(w, b ? &*b : nullptr);
  const int64_t bytes = 2 * amx::kPixels * fc.in + 8 * amx::kGroup * amx::kGroup;
  each(x, fc.in, out, fc.out, bytes,
       [&](auto... pixels) { amx::linear(fc, add, pixels...); });
}

void ffn_(Tensor& out, const Tensor& x, const Tensor& w1, const Tensor& b1,
          const Tensor& w2, const Tensor& b2) {
  const amx::Layer fc1 = layer(w1, &b1), fc2 = layer(w2, &b2);
  TORCH_CHECK(fc1.out == fc2.in, "the hidden layer has ", fc1.out, " or ", fc2.in,
              " channels");
  const int64_t bytes = amx::kPixels * (2 * fc1.in + 2 * amx::kHidden + 4 * fc2.out) +
                        8 * amx::kGroup * amx::kGroup;
  each(x, fc1.in, out, fc2.out, bytes,
       [&](auto... pixels) { amx::ffn(fc1, fc2, pixels...); });
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("linear_", linear_);
  m.impl("ffn_", ffn_);
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("has_amx() -> bool", has_amx);
  m.def("linear_(Tensor(a!) out, Tensor x, Tensor w, Tensor? b, bool add) -> ()");
  m.def(
      "ffn_(Tensor(a!) out, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> "
      "()");
}

}  // namespace dsnet
