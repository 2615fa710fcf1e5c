// Projections of pixels on the CPU:
//
//   linear:        y = W x + b
//   ffn:           y = W2 GELU(W1 x + b1) + b2
//   merge_:        f_l += W h_l + b, x += W_out f_l, x += ffn(x): the end of a block
//   ffn_backward:  the gradients of the ffn, for training
//
// linear_ adds to a tensor. Pixels are those of channels-last maps
// (N, C, H, W), or tokens (..., C). float runs on AVX-512 or AVX2, bfloat16 on
// AMX or AVX512-BF16;
// weights come packed for either, see projections_kernel.h and projections_amx.h.
//
// Threads divide the pixels, and go over them in chunks of kChunkPixels: a chunk and
// its hidden layer stay in the L2 cache of a core through all products of an operator.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <tuple>

#include "../common/amx.h"

namespace dsnet {

constexpr int64_t kChunkPixels = 256;     // Pixels of a chunk.
constexpr int64_t kBackwardPixels = 132;  // The same in ffn_backward, at most.
constexpr int64_t kHiddenChunk = 256;     // Channels of the hidden layer at a time.
constexpr int64_t kPanel = 32;            // Outputs of a panel of a weight in float.
constexpr int64_t kPixelGroup = 12;       // A thread gets multiples of it, in float.

template <typename T>
struct Layer {
  int64_t in, out;
  int64_t stride;  // from one panel of outputs (in bfloat16, tile) to the next
  const T *w, *b;  // The weight is packed. b may be null.
};

}  // namespace dsnet

#define DSNET_KERNEL "../inference/projections_kernel.h"
#include "../common/each_isa.h"
#ifdef DSNET_AMX
DSNET_AMX_BEGIN
#include "../common/amx_operands.h"
#include "projections_amx.h"
DSNET_AMX_END
#endif

namespace dsnet {
namespace {

using at::BFloat16;
using at::Tensor;

int64_t channels(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, "projections take maps or tokens, got a number");
  return x.size(x.dim() == 4 ? 1 : -1);
}

// Whether both have the same pixels: maps of one size, tokens of one shape, or a map
// and its tokens (N, H * W, C). As many pixels alone could be those of a transposed
// map.
bool same_pixels(const Tensor& x, const Tensor& y) {
  if (x.dim() == 4 && y.dim() == 3)
    return x.size(0) == y.size(0) && x.size(2) * x.size(3) == y.size(1);
  bool same = x.dim() == y.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i)
    same = x.size(i) == y.size(i) || i == (x.dim() == 4 ? 1 : x.dim() - 1);
  return same;
}

// Whether this processor has the instructions for projections of a type.
bool has_projections(at::ScalarType type) {
#ifdef DSNET_AMX
  if (type == at::kBFloat16) return amx::available();
#endif
  return type == at::kFloat && isa_level() > 0;
}

at::MemoryFormat layout(const Tensor& x) {
  return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Returns the data of a tensor whose type and memory format it checks.
template <typename T>
const T* checked_data(const Tensor& x,
                      at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(x.is_contiguous(format) && x.scalar_type() == type,
              "projections take tensors of one type, ", type,
              ", contiguous or in maps channels-last, got ", x.scalar_type(), " of ",
              x.sizes(), " with strides ", x.strides());
  return x.const_data_ptr<T>();
}

template <typename T>
Layer<T> make_layer(const Tensor& w, const std::optional<Tensor>& b) {
  // A panel of a weight in float, a tile of one in bfloat16.
  constexpr bool panels = std::is_same_v<T, float>;
  constexpr int64_t outputs = panels ? kPanel : 16, inputs = panels ? 1 : 32;
  TORCH_CHECK(w.dim() == 3 && w.numel() > 0 && w.size(2) == outputs * inputs,
              "projections take weights (C_out / ", outputs, ", C_in / ", inputs, ", ",
              outputs * inputs, "), got ", w.sizes());
  const int64_t in = w.size(1) * inputs, out = w.size(0) * outputs;
  TORCH_CHECK(out % kPanel == 0, "projections take multiples of ", kPanel,
              " outputs, got ", out);
  TORCH_CHECK(!b || b->sizes() == at::IntArrayRef({out}), "projections to ", out,
              " channels take biases of as many, got ", b->sizes());
  // A slice of the inputs of a larger weight has its panels further apart.
  int64_t contiguous = 1;
  for (int64_t i = w.dim() - 1; i > 0; contiguous *= w.size(i--))
    TORCH_CHECK(w.stride(i) == contiguous, "projections take weights whose panels are ",
                "contiguous, got ", w.sizes(), " with strides ", w.strides());
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(w.scalar_type() == type, "projections of ", type,
              " take weights of that type, got ", w.scalar_type());
  return {in, out, w.stride(0), w.const_data_ptr<T>(),
          b ? checked_data<T>(*b) : nullptr};
}

// A layer to the hidden channels, and one from them.
template <typename T>
void check_hidden(const Layer<T>& fc1, const Layer<T>& fc2) {
  TORCH_CHECK(fc1.out == fc2.in, "the hidden layer has ", fc1.out, " or ", fc2.in,
              " channels");
}

// An output of ``width`` channels for the pixels of x.
Tensor empty_for(const Tensor& x, int64_t width) {
  channels(x);  // checks that it is no number
  auto shape = x.sizes().vec();
  shape[x.dim() == 4 ? 1 : x.dim() - 1] = width;
  return at::empty(shape, x.options(), layout(x));
}

// Pixels that are multiplied together: only the last thread may get fewer.
template <typename T>
constexpr int64_t kPixelRows = std::is_same_v<T, float> ? kPixelGroup : 32;

// Calls task(first, count) for chunks of all pixels.
template <typename T, typename Task>
void for_each_chunk(int64_t pixels, const Task& task) {
  constexpr int64_t rows = kPixelRows<T>;
  at::parallel_for(0, ceil_div(pixels, rows), 1, [&](int64_t begin, int64_t end) {
    begin *= rows;
    end = std::min(end * rows, pixels);
    const int64_t chunks = ceil_div(end - begin, kChunkPixels);
    const int64_t size = round_up(ceil_div(end - begin, chunks), rows);
    for (int64_t i = begin; i < end; i += size) task(i, std::min(size, end - i));
  });
}

// Calls kernel(first, count, x, out) for chunks of the pixels of x, which has ``in``
// channels, and of out, which has ``width``.
template <typename T, typename Kernel>
void map_pixels(const Tensor& x, int64_t in, const Tensor& out, int64_t width,
                const Kernel& kernel) {
  TORCH_CHECK(channels(x) == in && channels(out) == width && same_pixels(out, x),
              "projections from ", in, " to ", width, " channels got ", x.sizes(),
              " and ", out.sizes());
  const Tensor pixels = x.contiguous(layout(x));
  const T* src = checked_data<T>(pixels, layout(x));
  checked_data<T>(out, layout(out));
  T* dst = out.data_ptr<T>();
  for_each_chunk<T>(x.numel() / in, [&](int64_t first, int64_t count) {
    kernel(first, count, src + first * in, dst + first * width);
  });
}

// The kernels of the best instructions, for ``count`` pixels; has_projections(type)
// holds.
template <typename T>
void linear(const Layer<T>& fc, bool add, int64_t count, const T* x, T* out) {
  if constexpr (std::is_same_v<T, float>) DSNET_BEST(linear)(fc, add, count, x, out);
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<T, BFloat16>)
    in_scratch(amx::linear, fc, add, count, x, out);
#endif
}

template <typename T>
void ffn(const Layer<T>& fc1, const Layer<T>& fc2, bool add, int64_t count, const T* x,
         T* out) {
  if constexpr (std::is_same_v<T, float>)
    in_scratch(DSNET_BEST(ffn), fc1, fc2, add, count, x, out);
#ifdef DSNET_AMX
  if constexpr (std::is_same_v<T, BFloat16>)
    in_scratch(amx::ffn, fc1, fc2, add, count, x, out);
#endif
}

void check_type(at::ScalarType type) {
  TORCH_CHECK(
      has_projections(type),
      "projections are for float32 with AVX2 and bfloat16 with AVX512-BF16, got ", type,
      " where there is ", at::get_cpu_capability());
}

template <typename T>
void project(const Layer<T>& fc, bool add, const Tensor& x, const Tensor& out) {
  map_pixels<T>(x, fc.in, out, fc.out,
                [&](int64_t, int64_t count, const T* src, T* dst) {
                  linear(fc, add, count, src, dst);
                });
}

Tensor linear_op(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) {
  check_type(x.scalar_type());
  return DSNET_FLOAT_OR_BFLOAT16(x.scalar_type(), "linear", [&] {
    const auto fc = make_layer<scalar_t>(w, b);
    const Tensor out = empty_for(x, fc.out);
    project(fc, false, x, out);
    return out;
  });
}

void linear_add(const Tensor& out, const Tensor& x, const Tensor& w,
                const std::optional<Tensor>& b) {
  at::assert_no_overlap(out, x);
  check_type(x.scalar_type());
  DSNET_FLOAT_OR_BFLOAT16(x.scalar_type(), "linear_",
                          [&] { project(make_layer<scalar_t>(w, b), true, x, out); });
}

Tensor ffn_op(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
              const Tensor& b2) {
  check_type(x.scalar_type());
  return DSNET_FLOAT_OR_BFLOAT16(x.scalar_type(), "ffn", [&] {
    using T = scalar_t;
    const auto fc1 = make_layer<T>(w1, b1), fc2 = make_layer<T>(w2, b2);
    check_hidden(fc1, fc2);
    const Tensor out = empty_for(x, fc2.out);
    map_pixels<T>(x, fc1.in, out, fc2.out,
                  [&](int64_t, int64_t count, const T* src, T* dst) {
                    ffn(fc1, fc2, false, count, src, dst);
                  });
    return out;
  });
}

// f_l += W h_l + b if there is an h_l, x += W_out f_l, and x += FFN(x), chunk by chunk:
// what one product has written is still in the cache for the next.
void merge(const Tensor& x, const Tensor& f_l, const std::optional<Tensor>& h_l,
           const std::optional<Tensor>& w, const std::optional<Tensor>& b,
           const Tensor& w_out, const Tensor& w1, const Tensor& b1, const Tensor& w2,
           const Tensor& b2) {
  TORCH_CHECK(!h_l || (w && b), "merge_ takes a weight and a bias for h_l");
  at::assert_no_overlap(x, f_l);
  if (h_l) {
    at::assert_no_overlap(x, *h_l);
    at::assert_no_overlap(f_l, *h_l);
  }
  check_type(x.scalar_type());
  DSNET_FLOAT_OR_BFLOAT16(x.scalar_type(), "merge_", [&] {
    using T = scalar_t;
    const auto out = make_layer<T>(w_out, {});
    const auto fc1 = make_layer<T>(w1, b1), fc2 = make_layer<T>(w2, b2);
    const auto proj = h_l ? make_layer<T>(*w, b) : Layer<T>{out.in, out.in};
    const int64_t width = fc2.out, local_width = out.in, pixels = x.numel() / width;
    TORCH_CHECK(
        channels(x) == width && channels(f_l) == local_width && same_pixels(x, f_l) &&
            out.out == width &&
            (!h_l || (channels(*h_l) == local_width && same_pixels(f_l, *h_l))) &&
            proj.in == local_width && proj.out == local_width && fc1.in == width &&
            fc1.out == fc2.in,
        "merge_ takes a map, its local stream and h_l of the same size, got ",
        x.sizes(), " and ", f_l.sizes(), " for weights from ", proj.in, " to ",
        proj.out, ", ", out.in, " to ", out.out, ", and ", fc1.in, " to ", fc2.out,
        " channels");
    checked_data<T>(x, layout(x));
    checked_data<T>(f_l, layout(f_l));
    const T* h_data = h_l ? checked_data<T>(*h_l, layout(*h_l)) : nullptr;
    T *f_data = f_l.data_ptr<T>(), *x_data = x.data_ptr<T>();
    for_each_chunk<T>(pixels, [&](int64_t first, int64_t count) {
      T *f_chunk = f_data + first * local_width, *x_chunk = x_data + first * width;
      if (h_l) linear(proj, true, count, h_data + first * local_width, f_chunk);
      linear(out, true, count, f_chunk, x_chunk);
      ffn(fc1, fc2, true, count, x_chunk, x_chunk);
    });
  });
}

using FfnGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Divides the work of ffn_backward among threads. A task is a group of pixels and a
// slice of the hidden channels. Its gradients of weights, in float, are one term of a
// sum over the groups, its gradients of x one term of a sum over the slices.
template <typename T, typename Kernel>
FfnGradients divide_backward(const Tensor& grad, const Tensor& x, int64_t hidden,
                             const Kernel& kernel) {
  const int64_t count = x.size(0), width = x.size(1);
  const T *x_data = checked_data<T>(x), *g_data = checked_data<T>(grad);
  // The numbers of groups and slices that make all terms together smallest.
  const int64_t threads = at::get_num_threads();
  const int64_t ranges = std::clamp<int64_t>(
      std::lround(std::sqrt(threads * count / (2. * hidden))), 1, threads);
  const int64_t size = round_up(ceil_div(count, ranges), kPixelRows<T>);
  const int64_t groups = ceil_div(count, size);
  const int64_t length = round_up(ceil_div(hidden, threads / ranges), kPanel);
  const int64_t slices = ceil_div(hidden, length);
  const auto floats = x.options().dtype(at::kFloat);
  Tensor grad_x = at::empty({slices, count, width}, x.options());
  Tensor grad_w1 = at::empty({groups, hidden, width}, floats);
  Tensor grad_b1 = at::empty({groups, hidden}, floats);
  Tensor grad_w2 = at::empty({groups, width, hidden}, floats);
  T* gx_data = grad_x.data_ptr<T>();
  float *gw1_data = grad_w1.data_ptr<float>(), *gb1_data = grad_b1.data_ptr<float>(),
        *gw2_data = grad_w2.data_ptr<float>();
  at::parallel_for(0, groups * slices, 1, [&](int64_t task, int64_t last_task) {
    for (; task < last_task; ++task) {
      const int64_t group = task / slices, slice = task % slices;
      const int64_t first = group * size, n = std::min(size, count - first);
      const int64_t channel = slice * length, last = std::min(channel + length, hidden);
      kernel(channel, last, n, x_data + first * width, g_data + first * width,
             gx_data + (slice * count + first) * width,
             gw1_data + group * hidden * width, gb1_data + group * hidden,
             gw2_data + group * hidden * width);
    }
  });
  const auto sum = [](const Tensor& terms) {
    return terms.size(0) == 1 ? terms[0] : terms.sum(0);
  };
  return {sum(grad_x), sum(grad_w1), sum(grad_b1), sum(grad_w2)};
}

#ifdef DSNET_AMX
FfnGradients ffn_backward_amx(const Tensor& grad, const Tensor& x, const Tensor& w1,
                              const Tensor& b1, const Tensor& w2) {
  const int64_t width = x.size(1), hidden = w1.size(0);
  const BFloat16 *w1_data = checked_data<BFloat16>(w1),
                 *w2_data = checked_data<BFloat16>(w2);
  const Tensor packed = at::empty({3, hidden * width}, w1.options());
  const auto data = [&](int i) { return packed[i].data_ptr<BFloat16>(); };
  const amx::BackwardWeights weights{data(0), data(1), data(2),
                                     checked_data<BFloat16>(b1)};
  at::parallel_for(0, width / kPanel, 1, [&](int64_t first, int64_t last) {
    in_scratch(amx::pack_for_hidden, width, hidden, w1_data, w2_data, first * kPanel,
               last * kPanel, weights);
  });
  at::parallel_for(0, hidden / kPanel, 1, [&](int64_t first, int64_t last) {
    first *= kPanel;
    const int64_t rows = last * kPanel - first;
    amx::pack_pairs(rows, rows, width, w1_data + first * width, width,
                    weights.w1_pairs + first * width);
  });
  return divide_backward<BFloat16>(grad, x, hidden, [&](auto... task) {
    in_scratch(amx::ffn_backward, width, hidden, weights, task...);
  });
}
#endif

// Gradients of tokens x, W1, b1 and W2. Those of weights are float in bfloat16 too.
FfnGradients ffn_backward(const Tensor& grad, const Tensor& x, const Tensor& w1,
                          const Tensor& b1, const Tensor& w2) {
  TORCH_CHECK(x.dim() == 2 && w1.dim() == 2 && x.sizes() == grad.sizes() &&
                  x.size(1) == w1.size(1) && b1.sizes() == w1.sizes().slice(0, 1) &&
                  w2.sizes() == w1.t().sizes() && x.numel() > 0 && w1.numel() > 0 &&
                  w1.size(0) % kPanel == 0 && w1.size(1) % kPanel == 0,
              "ffn_backward takes gradients and inputs (P, C), weights (C_hidden, C), "
              "(C_hidden,) and (C, C_hidden) with multiples of 32, got ",
              grad.sizes(), ", ", x.sizes(), ", ", w1.sizes(), ", ", b1.sizes(), ", ",
              w2.sizes());
  check_type(x.scalar_type());
#ifdef DSNET_AMX
  if (x.scalar_type() == at::kBFloat16) return ffn_backward_amx(grad, x, w1, b1, w2);
#endif
  const int64_t width = x.size(1), hidden = w1.size(0);
  const float *w1_data = checked_data<float>(w1), *b1_data = checked_data<float>(b1),
              *w2_data = checked_data<float>(w2);
  return divide_backward<float>(grad, x, hidden, [&](auto... task) {
    in_scratch(DSNET_BEST(ffn_backward), width, hidden, w1_data, b1_data, w2_data,
               task...);
  });
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
      "ffn_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dsnet_mm, CPU, m) {
  m.impl("linear", linear_op);
  m.impl("linear_", linear_add);
  m.impl("ffn", ffn_op);
  m.impl("ffn_backward", ffn_backward);
  m.impl("merge_", merge);
}

}  // namespace dsnet
