// Projections of pixels on the CPU: dsnet_mm::linear, W x + b, and dsnet_mm::ffn, W2
// GELU(W1 x + b1) + b2, whose hidden layer stays in a core's cache, a few hundred
// pixels at a time; linear_, which adds to a tensor that is there; merge_,
// which is three of these; and, for training in float, ffn_hidden and ffn_backward.
// Pixels are those of channels-last maps (N, C, H, W), or tokens (..., C). In float by
// the vectors of AVX-512 or AVX2, in bfloat16 by AMX; weights come in the order in
// which these read them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "../common/amx.h"
#include "../common/memory.h"

namespace dsnet {

constexpr int64_t kPixels = 256;  // that share weights in the cache,
constexpr int64_t kShare = 132;   // the same in backward, where they need more of it,
constexpr int64_t kHidden = 256;  // and channels of their hidden layer at a time
constexpr int64_t kPanel = 32;    // outputs
constexpr int64_t kRows = 12;     // by which threads share the pixels, in float

template <typename T>
struct Layer {
  int64_t in, out;
  int64_t stride;  // from one panel of outputs (in bfloat16, tile) to the next
  const T *w, *b;  // b may be null
};

}  // namespace dsnet

#define DSNET_KERNEL "../inference/projections_kernel.h"
#include "../common/each_isa.h"
#ifdef DSNET_AMX
DSNET_AMX_BEGIN
#include "projections_amx.h"
DSNET_AMX_END
#endif

namespace dsnet {
namespace {

using at::BFloat16;
using at::Tensor;

// Whether this processor has what projections of a type take.
bool has_projections(at::ScalarType type) {
#ifdef DSNET_AMX
  if (type == at::kBFloat16) return amx::available();
#endif
  return type == at::kFloat && instructions() > 0;
}

int64_t channels(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, "projections take maps or tokens, got a number");
  return x.size(x.dim() == 4 ? 1 : -1);
}

at::MemoryFormat layout(const Tensor& x) {
  return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

template <typename T>
const T* read(const Tensor& x, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(x.is_contiguous(format) && x.scalar_type() == type,
              "projections take tensors of one type, ", type,
              ", contiguous or in maps channels-last, got ", x.scalar_type(), " of ",
              x.sizes(), " with strides ", x.strides());
  return x.const_data_ptr<T>();
}

template <typename T>
Layer<T> layer(const Tensor& w, const Tensor* b) {
  int64_t in, out;
  if constexpr (std::is_same_v<T, float>) {
    TORCH_CHECK(w.dim() == 3 && w.numel() > 0 && w.size(2) == kPanel,
                "projections take weights (C_out / 32, C_in, 32), got ", w.sizes());
    in = w.size(1);
    out = w.size(0) * kPanel;
  } else {
    TORCH_CHECK(
        w.dim() == 5 && w.numel() > 0 && w.size(0) % 2 == 0 &&
            w.sizes().slice(2) == at::IntArrayRef({16, 16, 2}),
        "projections take weights (C_out / 16, C_in / 32, 16, 16, 2) with C_out "
        "a multiple of 32, got ",
        w.sizes());
    in = w.size(1) * 32;
    out = w.size(0) * 16;
  }
  TORCH_CHECK(!b || b->numel() == out, "projections to ", out,
              " channels take biases of as many, got ", b->sizes());
  // A part of the inputs of a larger weight has its panels further apart.
  int64_t contiguous = 1;
  for (int64_t i = w.dim() - 1; i > 0; contiguous *= w.size(i--))
    TORCH_CHECK(w.stride(i) == contiguous, "projections take weights whose panels are ",
                "contiguous, got ", w.sizes(), " with strides ", w.strides());
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(w.scalar_type() == type, "projections of ", type,
              " take weights of that type, got ", w.scalar_type());
  return {in, out, w.stride(0), w.const_data_ptr<T>(), b ? read<T>(*b) : nullptr};
}

// Calls task(first, count, memory) for all pixels, up to kPixels at a time, with memory
// for layers that have so many channels on their two sides.
template <typename T, typename Task>
void each_part(int64_t pixels, int64_t channels, const Task& task) {
  // Rows of pixels that are multiplied together: no thread gets less but the last.
  constexpr int64_t rows = std::is_same_v<T, float> ? kRows : 32;
  at::parallel_for(0, ceil_div(pixels, rows), 1, [&](int64_t begin, int64_t end) {
    char* memory = scratch(4 * (kPixels + rows) * (channels + kHidden) + 16 * 1024);
    begin *= rows;
    end = std::min(end * rows, pixels);
    const int64_t parts = ceil_div(end - begin, kPixels);
    const int64_t size = ceil_div(ceil_div(end - begin, parts), rows) * rows;
    for (int64_t i = begin; i < end; i += size)
      task(i, std::min(size, end - i), memory);
  });
}

// Calls task(count, x, out, memory) likewise.
template <typename T, typename Task>
void each(const Tensor& x, int64_t in, Tensor& out, int64_t width, const Task& task) {
  TORCH_CHECK(channels(x) == in && channels(out) == width && out.dim() == x.dim() &&
                  x.numel() / in == out.numel() / width,
              "projections from ", in, " to ", width, " channels got ", x.sizes(),
              " and ", out.sizes());
  const Tensor pixels = x.contiguous(layout(x));
  const T* from = read<T>(pixels, layout(x));
  read<T>(out, layout(out));
  T* to = out.data_ptr<T>();
  each_part<T>(x.numel() / in, in + width,
               [&](int64_t first, int64_t count, char* memory) {
                 task(count, from + first * in, to + first * width, memory);
               });
}

// By the best instructions.
template <typename... Args>
void linear(const Layer<float>& fc, Args... args) {
  DSNET_BEST(linear, fc, args...);
}

template <typename... Args>
void ffn(const Layer<float>& fc1, const Layer<float>& fc2, Args... args) {
  DSNET_BEST(ffn, fc1, fc2, args...);
}

#ifdef DSNET_AMX
using amx::ffn;
using amx::linear;
#endif

// Calls f with a number of the type, which is one of those above.
template <typename F>
void for_type(at::ScalarType type, const F& f) {
  TORCH_CHECK(has_projections(type),
              "projections are for float32 with AVX2 and bfloat16 with AMX, got ", type,
              " where there is ", at::get_cpu_capability(),
              has_projections(at::kBFloat16) ? " and AMX" : " and no AMX");
  if (type == at::kFloat) f(0.f);
#ifdef DSNET_AMX
  if (type == at::kBFloat16) f(BFloat16());
#endif
}

void project(Tensor& out, const Tensor& x, const Tensor& w, const Tensor* b, bool add) {
  for_type(x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const Layer<T> fc = layer<T>(w, b);
    each<T>(x, fc.in, out, fc.out, [&](auto... pixels) { linear(fc, add, pixels...); });
  });
}

// For what a weight in tiles makes of x.
Tensor empty_for(const Tensor& x, const Tensor& w) {
  auto shape = x.sizes().vec();
  channels(x);
  shape[x.dim() == 4 ? 1 : x.dim() - 1] = w.size(0) * (w.dim() == 3 ? kPanel : 16);
  return at::empty(shape, x.options(), layout(x));
}

Tensor linear_op(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) {
  Tensor out = empty_for(x, w);
  project(out, x, w, b ? &*b : nullptr, false);
  return out;
}

void linear_add(Tensor& out, const Tensor& x, const Tensor& w,
                const std::optional<Tensor>& b) {
  project(out, x, w, b ? &*b : nullptr, true);
}

Tensor ffn_op(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
              const Tensor& b2) {
  Tensor out = empty_for(x, w2);
  for_type(x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const Layer<T> fc1 = layer<T>(w1, &b1), fc2 = layer<T>(w2, &b2);
    TORCH_CHECK(fc1.out == fc2.in, "the hidden layer has ", fc1.out, " or ", fc2.in,
                " channels");
    each<T>(x, fc1.in, out, fc2.out,
            [&](auto... pixels) { ffn(fc1, fc2, false, pixels...); });
  });
  return out;
}

// The same in float, and the hidden layer before GELU.
std::tuple<Tensor, Tensor> ffn_hidden(const Tensor& x, const Tensor& w1,
                                      const Tensor& b1, const Tensor& w2,
                                      const Tensor& b2) {
  const Layer<float> fc1 = layer<float>(w1, &b1), fc2 = layer<float>(w2, &b2);
  TORCH_CHECK(has_projections(at::kFloat) && fc1.out == fc2.in,
              "ffn_hidden takes AVX2, and weights for one hidden layer, got ", fc1.out,
              " and ", fc2.in, " channels");
  Tensor out = empty_for(x, w2), hidden = empty_for(x, w1);
  const float* start = out.const_data_ptr<float>();
  float* kept = hidden.data_ptr<float>();
  each<float>(x, fc1.in, out, fc2.out,
              [&](int64_t count, const float* from, float* to, char* memory) {
                const int64_t pixel = (to - start) / fc2.out;
                ffn(fc1, fc2, false, count, from, to, memory, kept + pixel * fc1.out);
              });
  return {out, hidden};
}

// What comes last in a block: f_l += W h_l + b where there is an h_l, x += W_out f_l,
// and x += FFN(x), for one part of the pixels after the other, which are then still in
// a core's cache.
void merge(Tensor& x, Tensor& f_l, const std::optional<Tensor>& h_l,
           const std::optional<Tensor>& w, const std::optional<Tensor>& b,
           const Tensor& w_out, const Tensor& w1, const Tensor& b1, const Tensor& w2,
           const Tensor& b2) {
  TORCH_CHECK(!h_l || (w && b),
              "merge_ takes a weight and a bias for what has been read");
  for_type(x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const Layer<T> out = layer<T>(w_out, nullptr);
    const Layer<T> fc1 = layer<T>(w1, &b1), fc2 = layer<T>(w2, &b2);
    const Layer<T> proj = h_l ? layer<T>(*w, &*b) : Layer<T>{out.in, out.in, 0};
    const int64_t width = fc2.out, local_width = out.in, pixels = x.numel() / width;
    TORCH_CHECK(channels(x) == width && channels(f_l) == local_width &&
                    f_l.numel() == pixels * local_width &&
                    (!h_l || h_l->numel() == f_l.numel()) && out.out == width &&
                    proj.in == local_width && proj.out == local_width &&
                    fc1.in == width && fc1.out == fc2.in,
                "merge_ takes a map, its local stream and what that has read, got ",
                x.sizes(), " and ", f_l.sizes(), " for weights from ", proj.in, " to ",
                proj.out, ", ", out.in, " to ", out.out, ", and ", fc1.in, " to ",
                fc2.out, " channels");
    read<T>(x, layout(x));
    read<T>(f_l, layout(f_l));
    const T* from = h_l ? read<T>(*h_l) : nullptr;
    T *to_local = f_l.data_ptr<T>(), *to = x.data_ptr<T>();
    const int64_t widths = local_width + 2 * width;
    each_part<T>(pixels, widths, [&](int64_t first, int64_t count, char* memory) {
      T *local = to_local + first * local_width, *part = to + first * width;
      if (h_l) linear(proj, true, count, from + first * local_width, local, memory);
      linear(out, true, count, local, part, memory);
      ffn(fc1, fc2, true, count, part, part, memory);
    });
  });
}

// Gradients of tokens x, W1, b1 and W2, from W1 x + b1 if it is given. Each thread
// takes some of the pixels and some of the hidden channels: what it finds for weights
// is a part of a sum over the pixels, what it finds for x one of a sum over the
// channels.
std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const std::optional<Tensor>& kept) {
  TORCH_CHECK(
      x.dim() == 2 && w1.dim() == 2 && x.sizes() == grad.sizes() &&
          x.size(1) == w1.size(1) && b1.numel() == w1.size(0) &&
          w2.sizes() == w1.t().sizes() && x.numel() > 0 && w1.size(0) % kPanel == 0 &&
          w1.size(1) % kPanel == 0 &&
          (!kept || kept->sizes() == at::IntArrayRef({x.size(0), w1.size(0)})),
      "ffn_backward takes gradients and inputs (P, C), weights (C_hidden, C), "
      "(C_hidden,) and (C, C_hidden) with multiples of 32, and, or not, a hidden "
      "layer (P, C_hidden), got ",
      grad.sizes(), ", ", x.sizes(), ", ", w1.sizes(), ", ", b1.sizes(), ", ",
      w2.sizes());
  TORCH_CHECK(has_projections(at::kFloat), "ffn_backward takes AVX2");
  const int64_t count = x.size(0), width = x.size(1), hidden = w1.size(0);
  const float *x_data = read<float>(x), *g_data = read<float>(grad),
              *w1_data = read<float>(w1), *b1_data = read<float>(b1),
              *w2_data = read<float>(w2),
              *kept_data = kept ? read<float>(*kept) : nullptr;
  // As many of either as make the parts smallest.
  const int64_t threads = at::get_num_threads();
  const int64_t ranges = std::clamp<int64_t>(
      std::lround(std::sqrt(threads * count / (2. * hidden))), 1, threads);
  const int64_t size = ceil_div(ceil_div(count, ranges), kRows) * kRows;
  const int64_t groups = ceil_div(count, size);
  const int64_t length = ceil_div(ceil_div(hidden, threads / ranges), kPanel) * kPanel;
  const int64_t slices = ceil_div(hidden, length);
  Tensor grad_x = at::empty({slices, count, width}, x.options());
  Tensor grad_w1 = at::empty({groups, hidden, width}, x.options());
  Tensor grad_b1 = at::empty({groups, hidden}, x.options());
  Tensor grad_w2 = at::empty({groups, width, hidden}, x.options());
  float *to_x = grad_x.data_ptr<float>(), *to_w1 = grad_w1.data_ptr<float>(),
        *to_b1 = grad_b1.data_ptr<float>(), *to_w2 = grad_w2.data_ptr<float>();
  at::parallel_for(0, groups * slices, 1, [&](int64_t task, int64_t last_task) {
    char* memory = scratch(
        4 * (2 * (kShare + kRows) * (kHidden + 16 + width) + 3 * kHidden * width) +
        7 * 64);
    for (; task < last_task; ++task) {
      const int64_t group = task / slices, slice = task % slices;
      const int64_t first = group * size, n = std::min(size, count - first);
      const int64_t channel = slice * length, last = std::min(channel + length, hidden);
      DSNET_BEST(ffn_backward, width, hidden, w1_data, b1_data, w2_data, channel, last,
                 n, x_data + first * width, kept ? kept_data + first * hidden : nullptr,
                 g_data + first * width, to_x + (slice * count + first) * width,
                 to_w1 + group * hidden * width, to_b1 + group * hidden,
                 to_w2 + group * hidden * width, memory);
    }
  });
  const auto sum = [](const Tensor& parts) {
    return parts.size(0) == 1 ? parts[0] : parts.sum(0);
  };
  return {sum(grad_x), sum(grad_w1), sum(grad_b1), sum(grad_w2)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dsnet_mm, m) {
  m.def("has_projections(ScalarType type) -> bool", has_projections);
  m.def("linear(Tensor x, Tensor w, Tensor? b) -> Tensor");
  m.def("linear_(Tensor(a!) out, Tensor x, Tensor w, Tensor? b) -> ()");
  m.def("ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor");
  m.def(
      "merge_(Tensor(a!) x, Tensor(b!) f_l, Tensor? h_l, Tensor? w, Tensor? b, "
      "Tensor w_out, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> ()");
  m.def(
      "ffn_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor? hidden) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ffn_hidden(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("linear", linear_op);
  m.impl("linear_", linear_add);
  m.impl("ffn", ffn_op);
  m.impl("ffn_backward", ffn_backward);
  m.impl("ffn_hidden", ffn_hidden);
  m.impl("merge_", merge);
}

}  // namespace dsnet
